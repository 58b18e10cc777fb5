//! Who of a window goes where?
//!
//! Requests with the same prompt are one unit. So is, if different prompts may go together, a
//! single request that shares enough with any other of the window. Units of several requests are
//! placed first, each kind by falling length of the prompt: a long one leaves most for those
//! after it to match. A unit goes where the most of its prompt lies already and the endpoint has
//! not had its fair share, else where least is; a unit too large for one endpoint goes on where
//! least is.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::{BalanceBy, BurstPrefix};
use crate::fleet::EndpointId;
use crate::stage::Row;

/// The parameters that placing needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Requests of one unit per endpoint.
    per_endpoint_max: usize,
    /// Blocks that different prompts must share; 0: they never go together.
    shared_blocks_min: usize,
    balance_by: BalanceBy,
}

impl Rules {
    pub fn of(parameters: &BurstPrefix) -> Rules {
        Rules {
            per_endpoint_max: usize::try_from(parameters.max_per_replica).unwrap_or(usize::MAX),
            shared_blocks_min: parameters.min_colocate_blocks as usize,
            balance_by: parameters.balance_by,
        }
    }
}

/// Where each member of a closed window goes.
#[derive(Clone, Debug)]
pub(super) struct Placement {
    replicas: Vec<Replica>,
    /// Members with a place, by number: position in `replicas`.
    places: BTreeMap<u32, usize>,
}

/// A candidate while a window is placed.
#[derive(Clone, Debug)]
struct Replica {
    /// `None`: it has left.
    id: Option<EndpointId>,
    /// What it runs besides; unknown counts as most.
    running: u32,
    /// Requests or blocks of this window.
    load: usize,
}

/// Requests with the same prompt.
struct Unit<'a> {
    members: Vec<u32>,
    prefix: &'a [u64],
}

impl Placement {
    /// Places members, given by number and prompt digests in order of arrival.
    pub fn of<'a>(
        rules: Rules,
        members: impl Iterator<Item = (u32, &'a [u64])>,
        rows: &[Row],
    ) -> Placement {
        let replicas = rows.iter().map(|row| Replica {
            id: Some(row.id),
            running: row.signals.map_or(u32::MAX, |signals| signals.running),
            load: 0,
        });
        let mut placement = Placement { replicas: replicas.collect(), places: BTreeMap::new() };
        if placement.replicas.is_empty() {
            return placement;
        }
        let units = units(rules, members);
        let weight = |unit: &Unit<'_>| match rules.balance_by {
            BalanceBy::Requests => unit.members.len(),
            BalanceBy::Tokens => unit.prefix.len(),
        };
        let share = units.iter().map(weight).sum::<usize>().div_ceil(placement.replicas.len());
        let mut placed: Vec<(&[u64], usize)> = Vec::new();
        for unit in &units {
            placement.place(rules, unit, share, &mut placed);
        }
        placement
    }

    /// The endpoint of a member.
    pub fn of_member(&self, number: u32) -> Option<EndpointId> {
        self.replicas.get(*self.places.get(&number)?)?.id
    }

    /// Those that were to go to this endpoint go to the one with the least load instead.
    pub fn forget(&mut self, id: EndpointId) {
        let Some(gone) = self.replicas.iter().position(|replica| replica.id == Some(id)) else {
            return;
        };
        self.replicas[gone].id = None;
        if let Some(to) = self.least_loaded(|_| true) {
            self.replicas[to].load += self.replicas[gone].load;
            self.places.values_mut().filter(|at| **at == gone).for_each(|at| *at = to);
        }
    }

    /// Places one unit and adds it to `placed`: prompts and where they are.
    fn place<'a>(
        &mut self,
        rules: Rules,
        unit: &Unit<'a>,
        share: usize,
        placed: &mut Vec<(&'a [u64], usize)>,
    ) {
        let mut held = vec![0; self.replicas.len()];
        for (prefix, at) in placed.iter() {
            held[*at] = shared_blocks(prefix, unit.prefix).max(held[*at]);
        }
        let mut counts = vec![0; self.replicas.len()];
        let mut left = unit.members.as_slice();
        let mut to = self.holder(rules, &held, share);
        while !left.is_empty() {
            let room = |at: &usize| counts[*at] < rules.per_endpoint_max;
            let target = to.take().or_else(|| self.least_loaded(room));
            let Some(at) = target.or_else(|| self.least_loaded(|_| true)) else { return };
            // Where there is no room anywhere, one at a time.
            let run = rules.per_endpoint_max.saturating_sub(counts[at]).clamp(1, left.len());
            let (now, later) = left.split_at(run);
            self.places.extend(now.iter().map(|member| (*member, at)));
            self.replicas[at].load += match rules.balance_by {
                BalanceBy::Requests => run,
                BalanceBy::Tokens if counts[at] == 0 => unit.prefix.len() - held[at],
                BalanceBy::Tokens => 0,
            };
            if counts[at] == 0 {
                placed.push((unit.prefix, at));
            }
            counts[at] += run;
            left = later;
        }
    }

    /// Where most of the prompt lies, if that is enough and the endpoint may have more.
    fn holder(&self, rules: Rules, held: &[usize], share: usize) -> Option<usize> {
        let may =
            |at: &usize| held[*at] >= rules.shared_blocks_min && self.replicas[*at].load < share;
        if rules.shared_blocks_min == 0 {
            return None;
        }
        (0..held.len()).filter(may).min_by_key(|at| (Reverse(held[*at]), self.rank(*at)))
    }

    fn least_loaded(&self, may: impl Fn(&usize) -> bool) -> Option<usize> {
        let there = |at: &usize| self.replicas[*at].id.is_some() && may(at);
        (0..self.replicas.len()).filter(there).min_by_key(|at| self.rank(*at))
    }

    /// Least first; equal ones in the order of the candidates, which is by name.
    fn rank(&self, at: usize) -> (usize, u32) {
        (self.replicas[at].load, self.replicas[at].running)
    }
}

/// What is placed, in the order in which it is.
fn units<'a>(rules: Rules, members: impl Iterator<Item = (u32, &'a [u64])>) -> Vec<Unit<'a>> {
    // A digest names everything up to it, so the last one names the prompt; the length keeps a
    // prompt apart from one that goes on after it.
    let mut at_of: BTreeMap<(usize, u64), usize> = BTreeMap::new();
    let mut units: Vec<Unit<'a>> = Vec::new();
    for (number, prefix) in members {
        let Some(last) = prefix.last() else { continue };
        let at = *at_of.entry((prefix.len(), *last)).or_insert(units.len());
        if at == units.len() {
            units.push(Unit { members: Vec::new(), prefix });
        }
        units[at].members.push(number);
    }
    let mut sharers: BTreeMap<u64, usize> = BTreeMap::new();
    let start = |prefix: &[u64]| prefix.get(rules.shared_blocks_min.checked_sub(1)?).copied();
    for unit in &units {
        if let Some(start) = start(unit.prefix) {
            *sharers.entry(start).or_default() += unit.members.len();
        }
    }
    let has_company = |prefix: &[u64]| start(prefix).is_some_and(|start| sharers[&start] > 1);
    units.retain(|unit| unit.members.len() > 1 || has_company(unit.prefix));
    units.sort_by_key(|unit| (unit.members.len() == 1, Reverse(unit.prefix.len())));
    units
}

/// Blocks that two prompts share from their start: the last position with equal digests.
fn shared_blocks(a: &[u64], b: &[u64]) -> usize {
    let (mut shared, mut end) = (0, a.len().min(b.len()));
    while shared < end {
        let middle = (shared + end) / 2;
        if a[middle] == b[middle] { shared = middle + 1 } else { end = middle }
    }
    shared
}
