//! Is the predicted hit what the engine delivers?
//!
//! Three numbers per request: *available* (best predicted hit among the candidates), *chosen*
//! (predicted hit on the chosen endpoint), *delivered* (the engine's own `cached_tokens`). They are
//! summed per endpoint, and where an engine delivers less than its events promised, its events are
//! put in doubt: wrong hash, wrong template, lost events and unseen resets show up here.

use serde::Serialize;

use crate::fleet::EndpointId;
use crate::settings::Settings;

/// A prediction that was wrong by this many blocks, with nothing delivered at all, is evidence
/// enough alone: a cache was emptied and nobody said so.
const BIG_MISS_BLOCKS: u32 = 4;

/// Each drift without a kept promise since the last one doubles the evidence for the next, so
/// often at most.
const DRIFT_DOUBLINGS_MAX: u32 = 8;

/// So many answers in a row with another count of prompt tokens than the router's mean another
/// tokenizer or chat template, not an odd request.
const PROMPTS_DIFFERENT_MIN: u32 = 3;

/// What one request was expected to get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expectation {
    /// Tokens of all prompts.
    pub prompt_tokens: u32,
    /// Best predicted hit among the candidates.
    pub available_tokens: u32,
    /// Predicted hit on the chosen endpoint.
    pub chosen_tokens: u32,
    /// What the engine's events alone promise there. `None`: nothing to hold the engine to
    /// (no events, or estimated tokens).
    pub promised_tokens: Option<u32>,
    /// Tokens per block.
    pub block_size: u32,
    /// Other requests of this router ran on the endpoint, or waited in it: between prediction and
    /// use, blocks may have been evicted.
    pub concurrent: bool,
    /// How many blocks the endpoint had lost when this was expected.
    pub removals: u64,
    /// The event stream is known to be incomplete: promises that are kept again and again show
    /// that it no longer is.
    pub incomplete: bool,
}

/// Sums over requests, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheSums {
    /// Requests.
    pub requests: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Best predicted hits.
    pub available_tokens: u64,
    /// Predicted hits on the chosen endpoints.
    pub chosen_tokens: u64,
}

impl CacheSums {
    fn add(&mut self, e: &Expectation) {
        self.requests += 1;
        self.prompt_tokens += u64::from(e.prompt_tokens);
        self.available_tokens += u64::from(e.available_tokens);
        self.chosen_tokens += u64::from(e.chosen_tokens);
    }
}

/// Verdicts on predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdicts {
    /// Delivered as promised, to the block.
    pub right: u64,
    /// Delivered less, and nothing explains it.
    pub below: u64,
    /// Delivered less, because a promised block was evicted before the engine came to the request.
    pub evicted: u64,
    /// Delivered more: blocks of concurrent requests, or events that are missing.
    pub above: u64,
    /// Not comparable: no promise was made.
    pub unjudged: u64,
    /// The engine does not report `cached_tokens` (vLLM: `--enable-prompt-tokens-details`).
    pub unreported: u64,
    /// The engine counted the prompt's tokens differently: tokenizer or chat template differ.
    pub prompt_differs: u64,
    /// Times the endpoint's events were put in doubt.
    pub drifts: u64,
    /// Times that doubt ended.
    pub agreements: u64,
}

/// The account of one endpoint, or of the whole fleet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Account {
    /// Of all decisions.
    pub decided: CacheSums,
    /// Of the requests whose engine told what it delivered: to be compared with `delivered_tokens`.
    pub reported: CacheSums,
    /// What engines took from their caches.
    pub delivered_tokens: u64,
    /// Judgement of the predictions.
    pub verdicts: Verdicts,
}

/// What the ledger concludes about an endpoint's events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conclusion {
    /// They promise what is not there.
    Drift,
    /// After doubt, of the ledger or of the stream itself: they are right again.
    Agrees,
}

#[derive(Clone, Copy, Debug, Default)]
struct Book {
    generation: u32,
    account: Account,
    evidence: u32,
    agreements: u32,
    in_doubt: bool,
    /// Answers in a row whose count of prompt tokens was not the router's.
    prompts_different: u32,
    /// Drifts since the last promise that was kept.
    drifts: u32,
}

/// All accounts.
#[derive(Debug)]
pub struct Ledger {
    total: Account,
    books: Vec<Book>,
    evidence_max: u32,
    agreements_min: u32,
}

impl Ledger {
    /// Empty accounts.
    pub fn new(settings: &Settings) -> Ledger {
        Ledger {
            total: Account::default(),
            books: Vec::new(),
            evidence_max: settings.drift_evidence_max.clamp(1, 1 << 20),
            agreements_min: settings.drift_agreements_min.max(1),
        }
    }

    /// The whole fleet's, endpoints that have left included.
    pub fn total(&self) -> &Account {
        &self.total
    }

    /// One endpoint's; empty for one that has left.
    pub fn account(&self, id: EndpointId) -> Account {
        self.book(id).map_or(Account::default(), |book| book.account)
    }

    /// Whether one endpoint's events are in doubt.
    pub fn in_doubt(&self, id: EndpointId) -> bool {
        self.book(id).is_some_and(|book| book.in_doubt)
    }

    fn book(&self, id: EndpointId) -> Option<&Book> {
        self.books.get(usize::from(id.slot)).filter(|book| book.generation == id.generation)
    }

    pub(crate) fn open(&mut self, id: EndpointId) {
        let slot = usize::from(id.slot);
        if self.books.len() <= slot {
            self.books.resize(slot + 1, Book::default());
        }
        self.books[slot] = Book { generation: id.generation, ..Book::default() };
    }

    pub(crate) fn close(&mut self, id: EndpointId) {
        let slot = usize::from(id.slot);
        if let Some(book) = self.books.get_mut(slot)
            && book.generation == id.generation
        {
            *book = Book { generation: id.generation.wrapping_add(1), ..Book::default() };
        }
    }

    fn each(&mut self, id: EndpointId, change: impl Fn(&mut Account)) {
        change(&mut self.total);
        let book = self.books.get_mut(usize::from(id.slot));
        if let Some(book) = book.filter(|book| book.generation == id.generation) {
            change(&mut book.account);
        }
    }

    pub(crate) fn decided(&mut self, id: EndpointId, expectation: &Expectation) {
        self.each(id, |account| account.decided.add(expectation));
    }

    /// The response ended and its engine had not told what it delivered.
    pub(crate) fn unreported(&mut self, id: EndpointId) {
        self.each(id, |account| account.verdicts.unreported += 1);
    }

    /// The engine told what it delivered. `evicted`: should that be less than was promised, the
    /// first missing block has left the cache since.
    pub(crate) fn delivered(
        &mut self,
        id: EndpointId,
        expectation: &Expectation,
        prompt_tokens: u32,
        cached_tokens: u32,
        evicted: bool,
    ) -> Option<Conclusion> {
        let verdict = match Verdict::of(expectation, prompt_tokens, cached_tokens) {
            Verdict::Below { .. } if evicted => Verdict::Evicted,
            verdict => verdict,
        };
        let differs =
            expectation.promised_tokens.is_some() && prompt_tokens != expectation.prompt_tokens;
        self.each(id, |account| {
            account.reported.add(expectation);
            account.delivered_tokens += u64::from(cached_tokens);
            account.verdicts.prompt_differs += u64::from(differs);
            verdict.count(&mut account.verdicts);
        });
        self.compare_prompts(id, expectation, differs);
        let conclusion = self.conclude(id, expectation, verdict)?;
        self.each(id, |account| match conclusion {
            Conclusion::Drift => account.verdicts.drifts += 1,
            Conclusion::Agrees => account.verdicts.agreements += 1,
        });
        Some(conclusion)
    }

    fn compare_prompts(&mut self, id: EndpointId, expectation: &Expectation, differs: bool) {
        if let Some(book) = self.books.get_mut(usize::from(id.slot))
            && book.generation == id.generation
            && expectation.promised_tokens.is_some()
        {
            book.prompts_different =
                if differs { book.prompts_different.saturating_add(1) } else { 0 };
        }
    }

    /// Whether the endpoint's engine makes other tokens of prompts than the router: what its
    /// events hold cannot be found then.
    pub fn prompt_differs(&self, id: EndpointId) -> bool {
        let book = self.books.get(usize::from(id.slot));
        book.is_some_and(|book| {
            book.generation == id.generation && book.prompts_different >= PROMPTS_DIFFERENT_MIN
        })
    }

    /// A verdict, as a snapshot tells it.
    pub(crate) fn restore(&mut self, id: EndpointId, in_doubt: bool, prompt_differs: bool) {
        if let Some(book) = self.books.get_mut(usize::from(id.slot))
            && book.generation == id.generation
        {
            book.in_doubt = in_doubt;
            book.prompts_different = if prompt_differs { PROMPTS_DIFFERENT_MIN } else { 0 };
        }
    }

    fn conclude(
        &mut self,
        id: EndpointId,
        expectation: &Expectation,
        verdict: Verdict,
    ) -> Option<Conclusion> {
        let book = self.books.get_mut(usize::from(id.slot))?;
        if book.generation != id.generation {
            return None;
        }
        match verdict {
            Verdict::Below { nothing_of } => {
                let big = nothing_of >= BIG_MISS_BLOCKS;
                book.agreements = 0;
                book.evidence = book.evidence.saturating_add(match (big, expectation.concurrent) {
                    (true, false) => self.evidence_max,
                    (true, true) | (false, false) => 2,
                    (false, true) => 1,
                });
                // An engine whose reports never agree must not be replayed for every request.
                let doublings = book.drifts.min(DRIFT_DOUBLINGS_MAX);
                if book.in_doubt || book.evidence < self.evidence_max << doublings {
                    return None;
                }
                book.in_doubt = true;
                book.drifts += 1;
                Some(Conclusion::Drift)
            }
            Verdict::Right { promised: true } => {
                (book.evidence, book.drifts) = (0, 0);
                book.agreements += 1;
                let doubted = book.in_doubt || expectation.incomplete;
                if !doubted || book.agreements < self.agreements_min {
                    return None;
                }
                (book.in_doubt, book.agreements) = (false, 0);
                Some(Conclusion::Agrees)
            }
            // Nothing false was promised, but the engine holds more than its events told.
            Verdict::Above if !expectation.concurrent => {
                (book.evidence, book.agreements) = (0, 0);
                None
            }
            // A prediction of nothing is no proof that the events are right.
            Verdict::Right { .. } | Verdict::Above | Verdict::Evicted | Verdict::Unjudged => None,
        }
    }

    /// The doubt is settled otherwise: the stream was rebuilt from the engine's own words.
    pub(crate) fn settled(&mut self, id: EndpointId) {
        if let Some(book) = self.books.get_mut(usize::from(id.slot))
            && book.generation == id.generation
        {
            (book.evidence, book.agreements, book.in_doubt) = (0, 0, false);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Right {
        promised: bool,
    },
    /// `nothing_of`: promised blocks when nothing at all was delivered, else 0.
    Below {
        nothing_of: u32,
    },
    Evicted,
    Above,
    Unjudged,
}

impl Verdict {
    /// Compares in whole blocks. An engine always computes the last prompt token itself, so a full
    /// hit is delivered as `floor((prompt - 1) / block)` blocks (vLLM); promises are made with
    /// that limit, and it is applied again with the engine's own count of prompt tokens.
    fn of(expectation: &Expectation, prompt_tokens: u32, cached_tokens: u32) -> Verdict {
        let Some(promised) = expectation.promised_tokens else { return Verdict::Unjudged };
        let block_size = expectation.block_size.max(1);
        let limit = prompt_tokens.saturating_sub(1) / block_size;
        let promised = (promised / block_size).min(limit);
        let delivered = cached_tokens / block_size;
        match delivered.cmp(&promised) {
            std::cmp::Ordering::Equal => Verdict::Right { promised: promised > 0 },
            std::cmp::Ordering::Greater => Verdict::Above,
            std::cmp::Ordering::Less => {
                Verdict::Below { nothing_of: if delivered == 0 { promised } else { 0 } }
            }
        }
    }

    fn count(self, verdicts: &mut Verdicts) {
        match self {
            Verdict::Right { .. } => verdicts.right += 1,
            Verdict::Below { .. } => verdicts.below += 1,
            Verdict::Evicted => verdicts.evicted += 1,
            Verdict::Above => verdicts.above += 1,
            Verdict::Unjudged => verdicts.unjudged += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: EndpointId = EndpointId { slot: 0, generation: 0 };

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(&Settings::default());
        ledger.open(ID);
        ledger
    }

    fn promise(promised_tokens: u32, concurrent: bool) -> Expectation {
        Expectation {
            prompt_tokens: 161,
            available_tokens: 160,
            chosen_tokens: promised_tokens,
            promised_tokens: Some(promised_tokens),
            block_size: 16,
            concurrent,
            removals: 0,
            incomplete: false,
        }
    }

    #[test]
    fn verdicts_go_by_whole_blocks_and_the_engines_own_limit() {
        let table = [
            (160, 161, 160, Verdict::Right { promised: true }),
            (160, 161, 159, Verdict::Below { nothing_of: 0 }),
            (160, 160, 144, Verdict::Right { promised: true }),
            (160, 161, 0, Verdict::Below { nothing_of: 10 }),
            (0, 161, 0, Verdict::Right { promised: false }),
            (0, 161, 16, Verdict::Above),
            (32, 161, 40, Verdict::Right { promised: true }),
        ];
        for (promised, prompt, cached, verdict) in table {
            assert_eq!(Verdict::of(&promise(promised, false), prompt, cached), verdict);
        }
        let none = Expectation { promised_tokens: None, ..promise(0, false) };
        assert_eq!(Verdict::of(&none, 161, 0), Verdict::Unjudged);
    }

    #[test]
    fn one_emptied_cache_is_enough_small_misses_must_repeat() {
        let mut emptied = ledger();
        assert_eq!(
            emptied.delivered(ID, &promise(160, false), 161, 0, false),
            Some(Conclusion::Drift)
        );
        assert!(emptied.in_doubt(ID));

        let mut small = ledger();
        let mut miss = || small.delivered(ID, &promise(32, false), 161, 16, false);
        assert_eq!([miss(), miss(), miss()], [None, None, Some(Conclusion::Drift)]);

        let mut busy = ledger();
        for _ in 0..5 {
            assert_eq!(busy.delivered(ID, &promise(32, true), 161, 16, false), None);
        }
        assert_eq!(busy.delivered(ID, &promise(32, false), 161, 32, false), None);
        assert_eq!(busy.delivered(ID, &promise(32, true), 161, 16, false), None);
        assert_eq!(busy.account(ID).verdicts.below, 6);
    }

    #[test]
    fn what_was_evicted_meanwhile_is_no_evidence() {
        let mut ledger = ledger();
        for _ in 0..20 {
            assert_eq!(ledger.delivered(ID, &promise(160, false), 161, 0, true), None);
        }
        let verdicts = ledger.account(ID).verdicts;
        assert_eq!((verdicts.evicted, verdicts.below, verdicts.drifts), (20, 0, 0));
    }

    #[test]
    fn agreement_needs_promises_that_are_kept() {
        let mut ledger = ledger();
        ledger.delivered(ID, &promise(160, false), 161, 0, false);
        for _ in 0..10 {
            assert_eq!(ledger.delivered(ID, &promise(0, false), 161, 0, false), None);
        }
        let kept: Vec<_> =
            (0..5).map(|_| ledger.delivered(ID, &promise(32, false), 161, 32, false)).collect();
        assert_eq!(kept, [None, None, None, None, Some(Conclusion::Agrees)]);
        assert!(!ledger.in_doubt(ID));
    }

    #[test]
    fn an_incomplete_stream_is_believed_when_it_misses_nothing_any_more() {
        let mut ledger = ledger();
        let incomplete = Expectation { incomplete: true, ..promise(32, false) };
        for cached in [32, 32, 32, 48, 32, 32, 32, 32] {
            assert_eq!(ledger.delivered(ID, &incomplete, 161, cached, false), None);
        }
        assert_eq!(ledger.delivered(ID, &incomplete, 161, 32, false), Some(Conclusion::Agrees));
        assert_eq!(ledger.delivered(ID, &incomplete, 161, 32, false), None);
    }

    #[test]
    fn an_engine_that_never_agrees_is_doubted_less_and_less_often() {
        let mut ledger = ledger();
        let mut misses = Vec::new();
        for miss in 0..32 {
            if ledger.delivered(ID, &promise(160, false), 161, 0, false).is_some() {
                misses.push(miss);
                ledger.settled(ID);
            }
        }
        assert_eq!(misses, [0, 2, 6, 14, 30]);
        ledger.delivered(ID, &promise(160, false), 161, 160, false);
        let again = ledger.delivered(ID, &promise(160, false), 161, 0, false);
        assert_eq!(again, Some(Conclusion::Drift));
    }

    #[test]
    fn sums_are_kept_per_endpoint_and_in_total() {
        let mut ledger = ledger();
        ledger.decided(ID, &promise(32, false));
        ledger.decided(ID, &promise(160, false));
        ledger.delivered(ID, &promise(32, false), 161, 32, false);
        ledger.unreported(ID);
        let account = ledger.account(ID);
        assert_eq!(account.decided.requests, 2);
        assert_eq!(account.decided.available_tokens, 320);
        assert_eq!(account.decided.chosen_tokens, 192);
        assert_eq!((account.reported.chosen_tokens, account.delivered_tokens), (32, 32));
        assert_eq!(account.verdicts.unreported, 1);
        assert_eq!(*ledger.total(), account);
        ledger.close(ID);
        assert_eq!(ledger.account(ID), Account::default());
        assert_eq!(*ledger.total(), account);
        assert_eq!(ledger.delivered(ID, &promise(160, false), 161, 0, false), None);
    }
}
