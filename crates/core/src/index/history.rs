//! What was routed to an endpoint lately: parts of runs, least recently used blocks out first.
//!
//! A prompt uses its blocks from the last to the first, so that of two of them the earlier one
//! stays longer. Neighbours that the same request used last are one piece.

use super::runs::Span;
use super::table::{Number, Table};

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Piece {
    span: Span,
    /// Number of the request that used the blocks last.
    stamp: u32,
    newer: u32,
    older: u32,
    /// Another piece of the same run.
    next: u32,
}

/// The pieces, linked from newest to oldest, and by run.
#[derive(Debug)]
pub(super) struct History {
    first_of: Table<Number>,
    pieces: Vec<Piece>,
    /// Pieces that are free, linked by `next`.
    free: u32,
    live: usize,
    newest: u32,
    oldest: u32,
    blocks: usize,
}

impl History {
    pub const fn new() -> History {
        History {
            first_of: Table::new(),
            pieces: Vec::new(),
            free: NONE,
            live: 0,
            newest: NONE,
            oldest: NONE,
            blocks: 0,
        }
    }

    /// Blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.first_of.bytes() + self.pieces.capacity() * size_of::<Piece>()
    }

    /// Bytes that one more request allocates while the old memory is still there, if it goes
    /// through `runs` runs.
    pub fn growth_bytes(&self, runs: usize) -> usize {
        // Each of them may cut another piece in two.
        let pieces = match self.pieces.len() + 2 * runs <= self.pieces.capacity() {
            true => 0,
            false => self.pieces_next() + 2 * runs,
        };
        self.first_of.growth_bytes() + runs * 48 + pieces * size_of::<Piece>()
    }

    fn pieces_next(&self) -> usize {
        (self.pieces.len() + self.pieces.len() / 2).max(8)
    }

    /// Makes blocks the newest.
    pub fn touch(&mut self, span: Span, stamp: u32) {
        let mut at = self.first_of.get(u64::from(span.run)).map_or(NONE, |first| first.0);
        while at != NONE {
            let Piece { span: old, next, .. } = self.pieces[at as usize];
            if old.from < span.to && span.from < old.to {
                self.cut_out(at, span);
            }
            at = next;
        }
        self.blocks += span.len();
        let newest = self.newest;
        self.add(span, stamp, newest);
    }

    /// Takes the blocks of a span out of a piece.
    fn cut_out(&mut self, at: u32, out: Span) {
        let Piece { span, stamp, .. } = self.pieces[at as usize];
        let (from, to) = (span.from.max(out.from), span.to.min(out.to));
        self.blocks -= usize::from(to - from);
        let (front, back) = (Span { to: from, ..span }, Span { from: to, ..span });
        match (front.len(), back.len()) {
            (0, 0) => self.remove(at),
            (0, _) => self.pieces[at as usize].span = back,
            (_, 0) => self.pieces[at as usize].span = front,
            _ => {
                self.pieces[at as usize].span = back;
                self.add(front, stamp, at);
            }
        }
    }

    /// Adds a piece that is newer than another.
    fn add(&mut self, span: Span, stamp: u32, older: u32) {
        let newer = match self.pieces.get(older as usize) {
            Some(older) => older.newer,
            None => NONE,
        };
        let run = u64::from(span.run);
        let next = self.first_of.get(run).map_or(NONE, |first| first.0);
        let piece = Piece { span, stamp, newer, older, next };
        let at = match self.free {
            NONE => {
                if self.pieces.len() == self.pieces.capacity() {
                    self.pieces.reserve_exact(self.pieces_next() - self.pieces.len());
                }
                self.pieces.push(piece);
                (self.pieces.len() - 1) as u32
            }
            free => {
                self.free = self.pieces[free as usize].next;
                self.pieces[free as usize] = piece;
                free
            }
        };
        self.live += 1;
        self.first_of.insert(run, Number(at));
        match self.pieces.get_mut(newer as usize) {
            Some(newer) => newer.older = at,
            None => self.newest = at,
        }
        match self.pieces.get_mut(older as usize) {
            Some(older) => older.newer = at,
            None => self.oldest = at,
        }
    }

    fn remove(&mut self, at: u32) {
        let Piece { span, newer, older, next, .. } = self.pieces[at as usize];
        match self.pieces.get_mut(newer as usize) {
            Some(newer) => newer.older = older,
            None => self.newest = older,
        }
        match self.pieces.get_mut(older as usize) {
            Some(older) => older.newer = newer,
            None => self.oldest = newer,
        }
        let run = u64::from(span.run);
        match self.first_of.get(run).map_or(NONE, |first| first.0) {
            first if first == at && next == NONE => drop(self.first_of.remove(run)),
            first if first == at => self.first_of.insert(run, Number(next)),
            mut before => {
                while self.pieces[before as usize].next != at {
                    before = self.pieces[before as usize].next;
                }
                self.pieces[before as usize].next = next;
            }
        }
        self.pieces[at as usize].next = self.free;
        self.free = at;
        self.live -= 1;
        if self.live == 0 {
            self.pieces.clear();
            self.free = NONE;
        }
    }

    /// The stamp of the oldest block.
    pub fn oldest_stamp(&self) -> Option<u32> {
        self.pieces.get(self.oldest as usize).map(|piece| piece.stamp)
    }

    /// Removes and returns the oldest blocks, of one piece, at most `blocks`.
    pub fn pop(&mut self, blocks: usize) -> Option<Span> {
        let at = self.oldest;
        let span = self.pieces.get(at as usize)?.span;
        let out = span.part(span.len().saturating_sub(blocks)..span.len());
        self.cut_out(at, out);
        Some(out)
    }

    /// All parts of runs, the one unused longest first.
    pub fn oldest_first(&self) -> impl Iterator<Item = Span> + '_ {
        let newer = |piece: &&Piece| self.pieces.get(piece.newer as usize);
        std::iter::successors(self.pieces.get(self.oldest as usize), newer).map(|piece| piece.span)
    }

    /// Gives memory back when less than half is used.
    pub fn trim(&mut self) {
        self.first_of.trim(2);
        if self.live * 2 >= self.pieces.capacity() {
            return;
        }
        let pieces: Vec<Piece> = {
            let newer = |piece: &&Piece| self.pieces.get(piece.newer as usize);
            let first = self.pieces.get(self.oldest as usize);
            std::iter::successors(first, newer).copied().collect()
        };
        let blocks = self.blocks;
        *self = History::new();
        self.pieces.reserve_exact(pieces.len());
        for Piece { span, stamp, .. } in pieces {
            let newest = self.newest;
            self.add(span, stamp, newest);
        }
        self.blocks = blocks;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn the_oldest_blocks_go_first() {
        for seed in 0..50 {
            let mut rng = Rng::seeded(seed);
            let mut history = History::new();
            // Oldest first: run, place, stamp.
            let mut model: Vec<(u32, u16, u32)> = Vec::new();
            for stamp in 0..1500 {
                if rng.below(3) == 0 {
                    assert_eq!(history.oldest_stamp(), model.first().map(|block| block.2));
                    if let Some(out) = history.pop(1 + rng.below(4)) {
                        for at in (out.from..out.to).rev() {
                            let oldest = model.remove(0);
                            assert_eq!((oldest.0, oldest.1), (out.run, at), "seed {seed}");
                        }
                    }
                } else {
                    let from = if rng.below(4) == 0 { rng.below(5) as u16 } else { 0 };
                    let to = from + 1 + rng.below(8) as u16;
                    let run = rng.below(4) as u32;
                    history.touch(Span { run, from, to }, stamp);
                    model.retain(|block| block.0 != run || !(from..to).contains(&block.1));
                    model.extend((from..to).rev().map(|at| (run, at, stamp)));
                }
                if rng.below(8) == 0 {
                    history.trim();
                }
                assert_eq!(history.len(), model.len());
                let all = history.oldest_first();
                let all = all.flat_map(|s| (s.from..s.to).rev().map(move |at| (s.run, at)));
                assert!(all.eq(model.iter().map(|block| (block.0, block.1))), "seed {seed}");
            }
            while history.pop(3).is_some() {}
            history.trim();
            assert_eq!(history.bytes(), 0);
        }
    }
}
