//! `burst-prefix-cache-producer`: which requests of a burst belong together?
//!
//! Many requests of one prompt that come at once find every cache cold, and load balancing
//! scatters them. So each waits until its window closes; then the whole window is placed at once
//! (`burst/place.rs`), and every member learns its endpoint when it is decided. A pure state
//! machine: the host lets a request wait until [`Held::until`] and then decides with [`Held::id`].

mod place;

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use self::place::{Placement, Rules};
use crate::Time;
use crate::blocks::{BlockKey, ChainSpec, TokenSpace};
use crate::fleet::EndpointId;
use crate::settings::ms;
use crate::stage::{Inputs, Plugin, PrefixMatch, Row};

/// Longest window that may be configured: a request would wait for longer than anybody wants.
const WINDOW_MS_MAX: u32 = 10_000;
/// Blocks of a prompt that are looked at when `maxPrefixTokensToMatch` is 0.
const BLOCKS_DEFAULT: u32 = 2_048;
/// Windows with members that have not been decided; beyond it the oldest is forgotten.
const WINDOWS_MAX: usize = 1_024;
/// Blocks of all requests that wait, 8 bytes each; beyond it requests are not held.
const BLOCKS_HELD_MAX: usize = 8 << 20;
/// A member that is not decided so long after its window has closed is forgotten. Longer than any
/// window: those of one that filled early still wait until it would have closed.
const FORGET_AFTER: Duration = Duration::from_secs(20);

/// Parameters of `burst-prefix-cache-producer`. It finds a full match on the endpoint where the
/// request belongs, and none elsewhere; let a `prefix-cache-scorer` read it by
/// `prefixMatchInfoProducerName`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct BurstPrefix {
    /// How long requests are held to see which come together, milliseconds, 1 to 10000.
    pub window_duration_ms: u32,
    /// Requests of one prompt that go to the same endpoint before the next one gets some; -1: all.
    pub max_per_replica: i32,
    /// Tokens per block.
    pub block_size_tokens: u32,
    /// Tokens of a prompt that are looked at; 0: 2048 blocks.
    pub max_prefix_tokens_to_match: u32,
    /// Blocks that different prompts must share from their start to go together; 0: only requests
    /// of the same prompt do.
    pub min_colocate_blocks: u32,
    /// Requests in one window, which closes early when it is full; -1: any number.
    pub max_batch_size: i32,
    /// What is spread evenly over the endpoints of a window.
    pub balance_by: BalanceBy,
}

/// What a window's placement spreads evenly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BalanceBy {
    /// Requests.
    #[default]
    #[serde(alias = "")]
    Requests,
    /// Blocks that have to be computed: a prompt counts once per endpoint, without the blocks that
    /// others of the window leave there.
    Tokens,
}

impl Default for BurstPrefix {
    fn default() -> BurstPrefix {
        BurstPrefix {
            window_duration_ms: 100,
            max_per_replica: -1,
            block_size_tokens: 64,
            max_prefix_tokens_to_match: 0,
            min_colocate_blocks: 0,
            max_batch_size: 1_000,
            balance_by: BalanceBy::Requests,
        }
    }
}

impl BurstPrefix {
    /// How long a request is held at most.
    pub fn window(&self) -> Duration {
        ms(self.window_duration_ms)
    }

    /// The chain that requests must come with: a last partial block counts, too.
    pub fn chain_spec(&self, space: TokenSpace) -> ChainSpec {
        ChainSpec { block_size: self.block_size_tokens, space, partial_tail: true }
    }

    /// Blocks of each prompt that are looked at.
    pub fn blocks_max(&self) -> u32 {
        match self.max_prefix_tokens_to_match {
            0 => BLOCKS_DEFAULT,
            tokens => tokens / self.block_size_tokens.max(1),
        }
    }
}

impl Plugin for BurstPrefix {
    fn inputs(&self) -> Inputs<'_> {
        Inputs { tokens: true, ..Inputs::default() }
    }

    fn check(&self) -> Result<(), String> {
        let BurstPrefix { window_duration_ms: window, max_per_replica, .. } = *self;
        let (block, tokens) = (self.block_size_tokens, self.max_prefix_tokens_to_match);
        if window == 0 || window > WINDOW_MS_MAX {
            return Err(format!("windowDurationMs is {window}, not 1 to {WINDOW_MS_MAX}"));
        }
        if max_per_replica != -1 && max_per_replica < 1 {
            return Err(format!(
                "maxPerReplica is {max_per_replica}, neither -1 (all) nor above 0"
            ));
        }
        if block == 0 {
            return Err("blockSizeTokens is 0; a block has at least one token".into());
        }
        if tokens > 0 && tokens < block {
            return Err(format!(
                "maxPrefixTokensToMatch is {tokens}, less than one block (blockSizeTokens \
                 {block}); 0 sets no limit in tokens"
            ));
        }
        if self.max_batch_size != -1 && self.max_batch_size < 1 {
            let size = self.max_batch_size;
            return Err(format!("maxBatchSize is {size}, neither -1 (any) nor above 0"));
        }
        Ok(())
    }
}

/// Names a request that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldId {
    /// Its window.
    pub window: u64,
    /// Its number there, in order of arrival.
    pub member: u32,
}

/// A request that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// What to decide with.
    pub id: HeldId,
    /// When to decide. Not later than now: the request has filled its window, and everybody in it
    /// can be decided at once (a host that cannot wake them loses time, nothing else).
    pub until: Time,
}

/// Why a request is not held; it is decided without this producer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotHeld {
    /// Nothing to compare it by.
    #[error("the prompt has no block")]
    NoBlocks,
    /// Too much waits already.
    #[error("prompts of {BLOCKS_HELD_MAX} blocks wait for their window already, the limit")]
    Full,
}

/// Where a request of a burst belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Blocks of its prompts, all of which count as a match there.
    pub blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
}

impl Assigned {
    /// What the producer tells about a candidate.
    pub fn on(&self, id: EndpointId) -> PrefixMatch {
        let blocks = if id == self.endpoint { self.blocks } else { 0 };
        let (weighted, total) = (f64::from(blocks), self.blocks);
        PrefixMatch { weighted, blocks, total, block_size: self.block_size }
    }
}

/// The windows of one producer. The same calls give the same answers.
#[derive(Clone, Debug)]
pub struct Burst {
    parameters: BurstPrefix,
    windows: BTreeMap<u64, Window>,
    next: u64,
    blocks_held: usize,
}

#[derive(Clone, Debug)]
struct Window {
    until: Time,
    /// By number; a member leaves when it is decided.
    members: BTreeMap<u32, Member>,
    joined: u32,
    /// Once closed.
    placement: Option<Placement>,
}

#[derive(Clone, Debug)]
struct Member {
    /// Digest of everything up to each block, over all prompts. Empty once it is placed.
    prefix: Vec<u64>,
    blocks: u32,
}

impl Burst {
    /// No windows yet.
    pub fn new(parameters: BurstPrefix) -> Burst {
        Burst { parameters, windows: BTreeMap::new(), next: 0, blocks_held: 0 }
    }

    /// Takes a request, by the keys of each of its prompts under [`BurstPrefix::chain_spec`], into
    /// the open window; opens one if there is none.
    pub fn join<'a>(
        &mut self,
        now: Time,
        prompts: impl IntoIterator<Item = &'a [BlockKey]>,
    ) -> Result<Held, NotHeld> {
        self.expire(now);
        let prefix = digests(prompts, self.parameters.blocks_max() as usize);
        if prefix.is_empty() {
            return Err(NotHeld::NoBlocks);
        }
        if self.blocks_held + prefix.len() > BLOCKS_HELD_MAX {
            return Err(NotHeld::Full);
        }
        let number = self.open(now);
        let Some(window) = self.windows.get_mut(&number) else { return Err(NotHeld::Full) };
        let id = HeldId { window: number, member: window.joined };
        window.joined += 1;
        self.blocks_held += prefix.len();
        let blocks = u32::try_from(prefix.len()).unwrap_or(u32::MAX);
        window.members.insert(id.member, Member { prefix, blocks });
        let full = usize::try_from(self.parameters.max_batch_size).unwrap_or(usize::MAX);
        if window.members.len() >= full {
            window.until = now;
        }
        Ok(Held { id, until: window.until })
    }

    /// Where a held request belongs; asked once, when its wait is over. The first of a window to
    /// ask closes it: all its members are placed over this request's candidates (`rows`, by
    /// endpoint name). `None`: nobody shares its prompt, its window is forgotten, or its endpoint
    /// is not among the candidates.
    pub fn assignment(&mut self, now: Time, id: HeldId, rows: &[Row]) -> Option<Assigned> {
        self.expire(now);
        let window = self.windows.get_mut(&id.window)?;
        if window.placement.is_none() && window.members.contains_key(&id.member) {
            let rules = Rules::of(&self.parameters);
            let members = window.members.iter().map(|(number, m)| (*number, m.prefix.as_slice()));
            window.placement = Some(Placement::of(rules, members, rows));
            for member in window.members.values_mut() {
                self.blocks_held -= member.prefix.len();
                member.prefix = Vec::new();
            }
        }
        let endpoint = window.placement.as_ref().and_then(|placed| placed.of_member(id.member));
        let member = self.remove(id)?;
        let endpoint = endpoint.filter(|to| rows.iter().any(|row| row.id == *to))?;
        let block_size = self.parameters.block_size_tokens;
        Some(Assigned { endpoint, blocks: member.blocks, block_size })
    }

    /// A held request is gone before it was decided.
    pub fn leave(&mut self, id: HeldId) {
        self.remove(id);
    }

    /// The endpoint has left the fleet: those that were to go there go elsewhere together.
    pub fn forget(&mut self, endpoint: EndpointId) {
        for window in self.windows.values_mut() {
            if let Some(placement) = &mut window.placement {
                placement.forget(endpoint);
            }
        }
    }

    /// The window that takes requests now.
    fn open(&mut self, now: Time) -> u64 {
        if let Some((number, window)) = self.windows.last_key_value()
            && window.placement.is_none()
            && now < window.until
        {
            return *number;
        }
        let number = self.next;
        self.next += 1;
        let window = Window {
            until: now + self.parameters.window(),
            members: BTreeMap::new(),
            joined: 0,
            placement: None,
        };
        self.windows.insert(number, window);
        while self.windows.len() > WINDOWS_MAX {
            self.drop_oldest();
        }
        number
    }

    fn expire(&mut self, now: Time) {
        while let Some((_, window)) = self.windows.first_key_value()
            && window.until + FORGET_AFTER < now
        {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((_, window)) = self.windows.pop_first() {
            self.blocks_held -= window.members.values().map(|m| m.prefix.len()).sum::<usize>();
        }
    }

    /// Takes a member out; a closed window goes with its last one.
    fn remove(&mut self, id: HeldId) -> Option<Member> {
        let window = self.windows.get_mut(&id.window)?;
        let member = window.members.remove(&id.member)?;
        self.blocks_held -= member.prefix.len();
        if window.members.is_empty() {
            self.windows.remove(&id.window);
        }
        Some(member)
    }
}

/// One number per block that names everything up to it. Keys do so within a prompt; the second
/// prompt of a request starts from the end of the first.
fn digests<'a>(prompts: impl IntoIterator<Item = &'a [BlockKey]>, blocks_max: usize) -> Vec<u64> {
    let mut all: Vec<u64> = Vec::new();
    for keys in prompts {
        let before = all.last().copied();
        all.extend(keys.iter().take(blocks_max).map(|key| match before {
            None => key.0,
            Some(before) => xxh3_64_with_seed(&key.0.to_le_bytes(), before),
        }));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    const AFTER: Time = Time(100_000_000);

    /// `n` blocks, the first `shared` of them as in every other prompt of the same family.
    fn prompt(family: u64, shared: u64, own: u64, n: u64) -> Vec<BlockKey> {
        let key = |i| if i < shared { family * 1_000 + i } else { own * 1_000_000 + i };
        (0..n).map(|i| BlockKey(key(i))).collect()
    }

    fn rows(n: usize) -> Vec<Row> {
        let mut fixture = Fixture::new(n);
        (0..n).for_each(|at| fixture.signals(at, 0, 0, 0.0));
        fixture.rows().to_vec()
    }

    fn join(burst: &mut Burst, now: Time, prompt: &[BlockKey]) -> Held {
        burst.join(now, [prompt]).unwrap()
    }

    /// Where each prompt goes when all come at once.
    fn placed(parameters: &BurstPrefix, rows: &[Row], prompts: &[Vec<BlockKey>]) -> Vec<i32> {
        assert_eq!(parameters.check(), Ok(()));
        let mut burst = Burst::new(parameters.clone());
        let held: Vec<Held> =
            prompts.iter().map(|prompt| join(&mut burst, Time::ZERO, prompt)).collect();
        let at = |to: EndpointId| rows.iter().position(|row| row.id == to).unwrap() as i32;
        let placed = held.iter().map(|held| burst.assignment(AFTER, held.id, rows));
        let placed = placed.map(|to| to.map_or(-1, |to| at(to.endpoint))).collect();
        assert_eq!((burst.windows.len(), burst.blocks_held), (0, 0));
        placed
    }

    #[test]
    fn defaults_and_mistakes() {
        let good = BurstPrefix::default();
        assert_eq!(good.check(), Ok(()));
        assert_eq!((good.window(), good.blocks_max()), (ms(100), 2_048));
        let table = [
            (BurstPrefix { window_duration_ms: 0, ..good.clone() }, "windowDurationMs"),
            (BurstPrefix { window_duration_ms: 10_001, ..good.clone() }, "windowDurationMs"),
            (BurstPrefix { max_per_replica: 0, ..good.clone() }, "maxPerReplica"),
            (BurstPrefix { max_per_replica: -2, ..good.clone() }, "maxPerReplica"),
            (BurstPrefix { block_size_tokens: 0, ..good.clone() }, "blockSizeTokens"),
            (BurstPrefix { max_prefix_tokens_to_match: 63, ..good.clone() }, "maxPrefixTokens"),
            (BurstPrefix { max_batch_size: 0, ..good.clone() }, "maxBatchSize"),
        ];
        for (bad, field) in table {
            assert!(bad.check().unwrap_err().starts_with(field), "{bad:?}");
        }
        let read: BurstPrefix = serde_saphyr::from_str("balanceBy: tokens").unwrap();
        assert_eq!(read, BurstPrefix { balance_by: BalanceBy::Tokens, ..good.clone() });
        assert_eq!(serde_saphyr::from_str::<BurstPrefix>("balanceBy: ''").unwrap(), good);
        assert!(serde_saphyr::from_str::<BurstPrefix>("balanceBy: blocks").is_err());
        let limited = BurstPrefix { max_prefix_tokens_to_match: 640, ..good };
        assert_eq!(limited.blocks_max(), 10);
    }

    #[test]
    fn requests_of_one_prompt_go_together_and_lonely_ones_nowhere() {
        let (a, b, lonely) = (prompt(1, 4, 1, 4), prompt(2, 3, 2, 3), prompt(3, 0, 3, 9));
        let prompts = [a.clone(), b.clone(), a.clone(), lonely, b, a];
        let parameters = BurstPrefix::default();
        assert_eq!(placed(&parameters, &rows(2), &prompts), [0, 1, 0, -1, 1, 0]);
        assert_eq!(placed(&parameters, &rows(1), &prompts), [0, 0, 0, -1, 0, 0]);
        assert_eq!(placed(&parameters, &[], &prompts), [-1; 6]);
        assert_eq!(placed(&parameters, &rows(3), &[]), [0; 0]);
    }

    #[test]
    fn a_group_is_split_at_the_most_per_endpoint() {
        let parameters = BurstPrefix { max_per_replica: 2, ..BurstPrefix::default() };
        let group = |n| vec![prompt(1, 4, 1, 4); n];
        assert_eq!(placed(&parameters, &rows(3), &group(5)), [0, 0, 1, 1, 2]);
        // More than fit anywhere: the rest is spread one by one.
        assert_eq!(placed(&parameters, &rows(2), &group(6)), [0, 0, 1, 1, 0, 1]);
    }

    #[test]
    fn different_prompts_go_together_when_they_share_enough() {
        let relatives = [prompt(1, 4, 1, 6), prompt(1, 4, 2, 6), prompt(1, 4, 3, 5)];
        let other = [prompt(2, 4, 4, 6), prompt(2, 4, 5, 6)];
        let prompts: Vec<_> = relatives.into_iter().chain(other).collect();
        let sharing = |blocks| BurstPrefix { min_colocate_blocks: blocks, ..Default::default() };
        assert_eq!(placed(&sharing(0), &rows(2), &prompts), [-1; 5]);
        assert_eq!(placed(&sharing(5), &rows(2), &prompts), [-1; 5]);
        // Each endpoint takes its fair share of 3: the three relatives fit, the others go on.
        assert_eq!(placed(&sharing(4), &rows(2), &prompts), [0, 0, 0, 1, 1]);
        // Three endpoints: a share of 2, so the third relative goes where least is.
        assert_eq!(placed(&sharing(4), &rows(3), &prompts)[..2], [0, 0]);
    }

    #[test]
    fn tokens_or_requests_are_balanced() {
        let (long, short) = (|own| prompt(own, 32, own, 32), |own| prompt(own, 4, own, 4));
        let mut prompts = Vec::new();
        for family in [long(1), long(2), short(3), short(4), short(5), short(6)] {
            prompts.extend([family.clone(), family]);
        }
        let tokens = BurstPrefix { balance_by: BalanceBy::Tokens, ..BurstPrefix::default() };
        for parameters in [BurstPrefix::default(), tokens.clone()] {
            let to = placed(&parameters, &rows(2), &prompts);
            assert_eq!(to.iter().filter(|at| **at == 0).count(), 6, "{parameters:?}");
            assert_ne!(to[0], to[2], "long prompts are apart: {parameters:?}");
        }
        // One long prompt against many short ones: by tokens it has an endpoint for itself.
        let mut prompts = vec![long(1), long(1)];
        (2..8).for_each(|own| prompts.extend([short(own), short(own)]));
        assert_eq!(placed(&tokens, &rows(2), &prompts)[2..], [1; 12]);
        let by_requests = placed(&BurstPrefix::default(), &rows(2), &prompts);
        assert_eq!(by_requests.iter().filter(|at| **at == 0).count(), 8);
    }

    #[test]
    fn ties_go_to_the_endpoint_with_less_running() {
        let mut fixture = Fixture::new(3);
        fixture.signals(1, 0, 7, 0.0);
        fixture.signals(2, 0, 3, 0.0);
        // e0 has no metrics: the busiest must not win by silence.
        let prompts = vec![prompt(1, 4, 1, 4); 2];
        assert_eq!(placed(&BurstPrefix::default(), fixture.rows(), &prompts), [2, 2]);
    }

    #[test]
    fn windows_follow_each_other_and_a_full_one_closes_at_once() {
        let parameters = BurstPrefix { max_batch_size: 2, ..BurstPrefix::default() };
        let mut burst = Burst::new(parameters);
        let p = prompt(1, 4, 1, 4);
        let first = join(&mut burst, Time(5), &p);
        assert_eq!(first.until, Time(5) + ms(100));
        let second = join(&mut burst, Time(6), &p);
        assert_eq!((second.id.window, second.until), (first.id.window, Time(6)));
        let third = join(&mut burst, Time(6), &p);
        assert_ne!(third.id.window, first.id.window);
        let late = join(&mut burst, third.until, &p);
        assert_ne!(late.id.window, third.id.window);
        let rows = rows(2);
        // The first of a window to ask closes it.
        assert_eq!(burst.assignment(AFTER, late.id, &rows), None);
        let next = join(&mut burst, AFTER, &p);
        assert_ne!(next.id.window, late.id.window);
        let to = burst.assignment(AFTER, first.id, &rows).unwrap();
        assert_eq!((to.blocks, to.block_size, to.endpoint), (4, 64, rows[0].id));
        assert_eq!(to.on(rows[0].id).ratio(), 1.0);
        let elsewhere = PrefixMatch { weighted: 0.0, blocks: 0, total: 4, block_size: 64 };
        assert_eq!(to.on(rows[1].id), elsewhere);
        assert_eq!(burst.assignment(AFTER, second.id, &rows), Some(to));
        assert_eq!(burst.assignment(AFTER, second.id, &rows), None, "asked twice");
    }

    #[test]
    fn everything_that_waits_is_bounded() {
        let mut burst = Burst::new(BurstPrefix { max_batch_size: 1, ..BurstPrefix::default() });
        let p = prompt(1, 4, 1, 4);
        for _ in 0..WINDOWS_MAX + 10 {
            join(&mut burst, Time(1), &p);
        }
        assert_eq!((burst.windows.len(), burst.blocks_held), (WINDOWS_MAX, 4 * WINDOWS_MAX));
        let last = join(&mut burst, Time(2) + FORGET_AFTER, &p);
        assert_eq!((burst.windows.len(), burst.blocks_held), (1, 4));
        burst.leave(last.id);
        assert_eq!((burst.windows.len(), burst.blocks_held), (0, 0));
        assert_eq!(burst.join(Time(3), [&[][..]]), Err(NotHeld::NoBlocks));
        assert_eq!(burst.join(Time(3), []), Err(NotHeld::NoBlocks));

        let mut burst = Burst::new(BurstPrefix { max_batch_size: -1, ..BurstPrefix::default() });
        let long = prompt(1, 0, 1, 5_000);
        let held = (0..).take_while(|_| burst.join(Time(1), [&long[..]]).is_ok()).count();
        assert_eq!(held, BLOCKS_HELD_MAX / BLOCKS_DEFAULT as usize);
        assert_eq!(burst.join(Time(1), [&long[..]]), Err(NotHeld::Full));
    }

    #[test]
    fn endpoints_that_leave_take_nobody_with_them() {
        let mut burst = Burst::new(BurstPrefix::default());
        let p = prompt(1, 4, 1, 4);
        let held: Vec<Held> = (0..4).map(|_| join(&mut burst, Time(1), &p)).collect();
        let rows = rows(3);
        let to = |burst: &mut Burst, at: usize, rows: &[Row]| {
            burst.assignment(AFTER, held[at].id, rows).map(|to| to.endpoint)
        };
        assert_eq!(to(&mut burst, 0, &rows), Some(rows[0].id));
        // Not a candidate of this request, though it is still there.
        assert_eq!(to(&mut burst, 1, &rows[1..]), None);
        burst.forget(rows[0].id);
        assert_eq!(to(&mut burst, 2, &rows[1..]), Some(rows[1].id));
        burst.forget(rows[1].id);
        burst.forget(rows[2].id);
        assert_eq!(to(&mut burst, 3, &rows[2..]), None);
    }

    /// What must hold of every placement, whatever comes in.
    #[test]
    fn placements_of_random_windows_keep_the_rules() {
        for seed in 0..200 {
            let mut rng = crate::Rng::seeded(seed);
            let per_endpoint = [-1, 1, 3][rng.below(3)];
            let parameters = BurstPrefix {
                max_per_replica: per_endpoint,
                min_colocate_blocks: rng.below(3) as u32,
                balance_by: [BalanceBy::Requests, BalanceBy::Tokens][rng.below(2)],
                ..BurstPrefix::default()
            };
            let rows = rows(1 + rng.below(4));
            let owns: Vec<u64> = (0..rng.below(20)).map(|_| rng.below(8) as u64).collect();
            let prompts: Vec<_> = owns.iter().map(|own| prompt(own % 2, 2, *own, 3)).collect();
            let to = placed(&parameters, &rows, &prompts);
            assert_eq!(to, placed(&parameters, &rows, &prompts), "seed {seed}");
            for own in 0..8 {
                let of: Vec<i32> =
                    owns.iter().zip(&to).filter(|(o, _)| **o == own).map(|(_, at)| *at).collect();
                assert!(of.len() < 2 || !of.contains(&-1), "seed {seed}: {to:?}");
                let most = (0..4).map(|at| of.iter().filter(|to| **to == at).count()).max();
                let fair = match usize::try_from(per_endpoint) {
                    Ok(limit) => limit.max(of.len().div_ceil(rows.len())),
                    Err(_) => of.len(),
                };
                // Beyond the limit everywhere, one at a time goes where least is altogether.
                let fits = of.len() <= fair.saturating_mul(rows.len());
                assert!(
                    !fits
                        || per_endpoint < 0
                        || of.len() > per_endpoint as usize * rows.len()
                        || most <= Some(fair),
                    "seed {seed}: {to:?}"
                );
                assert!(per_endpoint > 0 || of.iter().all(|at| *at == of[0]), "seed {seed}");
            }
        }
    }

    #[test]
    fn prompts_of_one_request_count_in_their_order() {
        let (a, b) = (prompt(1, 4, 1, 4), prompt(2, 3, 2, 3));
        let joined = |prompts: [&[BlockKey]; 2]| digests(prompts, 10);
        assert_eq!(joined([&a, &b])[..4], joined([&a, &a])[..4]);
        assert_ne!(joined([&a, &b])[4], joined([&a, &a])[4]);
        assert_ne!(joined([&a, &b]).last(), joined([&b, &a]).last());
        assert_eq!(digests([&a[..], &b[..]], 2).len(), 4);
    }
}
