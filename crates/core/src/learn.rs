//! How fast is each endpoint? Learned from its own answers, never configured.
//!
//! Three lines are fitted, each by least squares over the last few hundred requests:
//! - time to first token over the uncached prompt tokens that had to be computed until then, those
//!   of requests ahead included: its slope is the cost of a prompt token;
//! - seconds per output token over the context tokens in flight: its floor is that of a step;
//! - output tokens of an answer, a mean.
//!
//! An endpoint of which little is known takes after the fleet, the fleet after a prior. What is
//! known of an endpoint fades with time, too: one that was slow, and is therefore avoided, could
//! otherwise never show that it no longer is. Values far above the line are clipped: queues and
//! preemptions are no speed.

use serde::{Deserialize, Serialize};

use crate::Time;
use crate::fleet::EndpointId;

/// What a router believes before it has seen anything: a 30-billion-parameter model on two
/// current accelerators. A fleet that differs tenfold shows it within some dozen requests.
const PREFILL_PRIOR: Prior = Prior { floor: 0.1, slope: 50e-6, reach: 4_000.0 };
const STEP_PRIOR: Prior = Prior { floor: 0.02, slope: 50e-9, reach: 200_000.0 };
const OUTPUT_TOKENS_PRIOR: f64 = 256.0;

/// Weight of what is taken over from the fleet, or from the prior, in requests.
const PRIOR_WEIGHT: f64 = 8.0;
/// Requests after which an observation counts half.
const HALF_LIFE: f64 = 200.0;
/// Seconds after which an observation of an endpoint counts half.
const HALF_LIFE_S: f64 = 60.0;
/// An observation counts as at most so many times what was expected.
const CLIP: f64 = 4.0;
/// Answers shorter than this say little about the time per token.
pub(crate) const OUTPUT_TOKENS_MIN: u32 = 8;

/// How fast an endpoint is, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Of a first token with nothing to compute.
    pub first_token_base_s: f64,
    /// Per prompt token that is not cached.
    pub prefill_per_token_s: f64,
    /// Of a decoding step with nothing in flight.
    pub step_base_s: f64,
    /// Of a decoding step, per context token in flight.
    pub step_per_token_s: f64,
    /// Output tokens that an answer is expected to have.
    pub output_tokens: f64,
}

impl Speed {
    fn prefill(&self) -> Prior {
        let (floor, slope) = (self.first_token_base_s, self.prefill_per_token_s);
        Prior { floor, slope, ..PREFILL_PRIOR }
    }

    fn step(&self) -> Prior {
        Prior { floor: self.step_base_s, slope: self.step_per_token_s, ..STEP_PRIOR }
    }
}

impl Default for Speed {
    fn default() -> Speed {
        Speed {
            first_token_base_s: PREFILL_PRIOR.floor,
            prefill_per_token_s: PREFILL_PRIOR.slope,
            step_base_s: STEP_PRIOR.floor,
            step_per_token_s: STEP_PRIOR.slope,
            output_tokens: OUTPUT_TOKENS_PRIOR,
        }
    }
}

/// A line that is believed beforehand, over values from 0 to `reach`.
#[derive(Clone, Copy, Debug)]
struct Prior {
    floor: f64,
    slope: f64,
    reach: f64,
}

/// Sums of a weighted regression; old observations fade.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Sums {
    fn fade(&mut self, factor: f64) {
        for sum in [&mut self.weight, &mut self.x, &mut self.y, &mut self.xx, &mut self.xy] {
            *sum *= factor;
        }
    }

    fn add(&mut self, weight: f64, x: f64, y: f64) {
        self.weight += weight;
        self.x += weight * x;
        self.y += weight * y;
        self.xx += weight * x * x;
        self.xy += weight * x * y;
    }

    /// The line through what was seen, drawn to the prior. Floor and slope are drawn each for
    /// itself: observations near 0 say nothing of the slope, however far they are from the
    /// prior's floor. The slope of the prior weighs like observations half its reach apart.
    fn line(&self, prior: Prior) -> Prior {
        let mut all = *self;
        let square = PRIOR_WEIGHT * (prior.reach / 2.0).powi(2);
        all.weight += PRIOR_WEIGHT;
        all.y += PRIOR_WEIGHT * prior.floor;
        all.xx += square;
        all.xy += square * prior.slope;
        let slope = (all.weight * all.xy - all.x * all.y) / (all.weight * all.xx - all.x * all.x);
        // Neither work nor a step is ever free.
        let slope = slope.max(prior.slope * 1e-3);
        let floor = ((all.y - slope * all.x) / all.weight).max(prior.floor * 1e-3);
        Prior { floor, slope, reach: prior.reach }
    }
}

/// What was seen of one endpoint, or of all.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    prefill: Sums,
    step: Sums,
    outputs: (f64, f64),
}

impl Seen {
    fn speed(&self, prior: &Speed) -> Speed {
        let (prefill, step) = (self.prefill.line(prior.prefill()), self.step.line(prior.step()));
        let (count, sum) = self.outputs;
        Speed {
            first_token_base_s: prefill.floor,
            prefill_per_token_s: prefill.slope,
            step_base_s: step.floor,
            step_per_token_s: step.slope,
            output_tokens: (sum + PRIOR_WEIGHT * prior.output_tokens) / (count + PRIOR_WEIGHT),
        }
    }

    fn fade(&mut self, factor: f64) {
        self.prefill.fade(factor);
        self.step.fade(factor);
        self.outputs.0 *= factor;
        self.outputs.1 *= factor;
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Book {
    generation: u32,
    seen: Seen,
    /// When something was learned last.
    at: Time,
}

impl Book {
    /// What was seen, as it counts now.
    fn seen(&self, now: Time) -> Seen {
        let mut seen = self.seen;
        seen.fade(0.5f64.powf(now.since(self.at).as_secs_f64() / HALF_LIFE_S));
        seen
    }
}

/// Which speeds rest on what was seen more than on the prior.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    /// Those of first tokens.
    pub first_token: bool,
    /// Those of decoding steps.
    pub step: bool,
}

/// What was seen of an endpoint or of the fleet, in a form that can be kept: the bits of sums
/// whose meaning is this module's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SeenState(#[serde(with = "crate::journal::packed")] Vec<u64>);

impl From<Seen> for SeenState {
    fn from(seen: Seen) -> SeenState {
        let sums = |sums: Sums| [sums.weight, sums.x, sums.y, sums.xx, sums.xy];
        let numbers = sums(seen.prefill).into_iter().chain(sums(seen.step));
        let numbers = numbers.chain([seen.outputs.0, seen.outputs.1]);
        SeenState(numbers.map(f64::to_bits).collect())
    }
}

impl From<&SeenState> for Seen {
    /// What is not there, or no number, was not seen.
    fn from(state: &SeenState) -> Seen {
        let at = |at: usize| {
            let number = state.0.get(at).copied().map_or(0.0, f64::from_bits);
            if number.is_finite() { number } else { 0.0 }
        };
        let sums = |from: usize| Sums {
            weight: at(from),
            x: at(from + 1),
            y: at(from + 2),
            xx: at(from + 3),
            xy: at(from + 4),
        };
        Seen { prefill: sums(0), step: sums(5), outputs: (at(10), at(11)) }
    }
}

/// The circumstances of one request, noted while it is in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Circumstances {
    /// Uncached prompt tokens that the endpoint had to compute until the first token, those of
    /// requests ahead included. `None`: it had more to do than that (a queue, a full cache), or
    /// it is not known.
    pub prefill_tokens: Option<f64>,
    /// Context tokens in flight there at the first token.
    pub context_tokens: f64,
}

/// Speeds of all endpoints.
#[derive(Debug, Default)]
pub struct Learner {
    seen: Seen,
    fleet: Speed,
    books: Vec<Book>,
}

impl Learner {
    /// What is believed about an endpoint.
    pub fn speed(&self, now: Time, id: EndpointId) -> Speed {
        let book = self.books.get(usize::from(id.slot));
        match book.filter(|book| book.generation == id.generation) {
            Some(book) => book.seen(now).speed(&self.fleet),
            None => self.fleet,
        }
    }

    /// What is believed about an endpoint that nobody has seen.
    pub fn fleet(&self) -> Speed {
        self.fleet
    }

    /// What is known of the fleet. An endpoint that nobody has seen takes after it, so this holds
    /// for each.
    pub fn learned(&self) -> Learned {
        let learned = |sums: &Sums| sums.weight >= PRIOR_WEIGHT;
        Learned { first_token: learned(&self.seen.prefill), step: learned(&self.seen.step) }
    }

    /// A first token came after so many seconds.
    pub fn first_token(&mut self, now: Time, id: EndpointId, seen: &Circumstances, seconds: f64) {
        let Some(tokens) = seen.prefill_tokens else { return };
        self.each(now, id, |seen, prior| {
            let line = seen.prefill.line(prior.prefill());
            let expected = line.floor + line.slope * tokens;
            seen.prefill.fade(fading());
            seen.prefill.add(1.0, tokens, seconds.clamp(0.0, expected * CLIP));
        });
    }

    /// An answer had so many tokens.
    pub fn answer(&mut self, now: Time, id: EndpointId, tokens: u32) {
        self.each(now, id, |seen, _| {
            seen.outputs.0 = seen.outputs.0 * fading() + 1.0;
            seen.outputs.1 = seen.outputs.1 * fading() + f64::from(tokens);
        });
    }

    /// An answer of so many tokens took so many seconds from its first token to its last, with so
    /// many context tokens in flight on average.
    pub fn steps(
        &mut self,
        now: Time,
        id: EndpointId,
        context_tokens: f64,
        seconds: f64,
        tokens: u32,
    ) {
        if tokens < OUTPUT_TOKENS_MIN {
            return;
        }
        let per_token = seconds / f64::from(tokens - 1);
        self.each(now, id, |seen, prior| {
            let line = seen.step.line(prior.step());
            let expected = line.floor + line.slope * context_tokens;
            seen.step.fade(fading());
            seen.step.add(1.0, context_tokens, per_token.clamp(0.0, expected * CLIP));
        });
    }

    /// Everything that was learned of the fleet.
    pub(crate) fn fleet_state(&self) -> SeenState {
        self.seen.into()
    }

    /// What was learned of an endpoint, and when last.
    pub(crate) fn endpoint_state(&self, id: EndpointId) -> Option<(Time, SeenState)> {
        let book = self.books.get(usize::from(id.slot));
        let book = book.filter(|book| book.generation == id.generation)?;
        Some((book.at, book.seen.into()))
    }

    /// Takes up again what [`Learner::fleet_state`] told.
    pub(crate) fn restore_fleet(&mut self, state: &SeenState) {
        self.seen = state.into();
        self.fleet = self.seen.speed(&Speed::default());
    }

    /// Takes up again what [`Learner::endpoint_state`] told.
    pub(crate) fn restore_endpoint(&mut self, id: EndpointId, at: Time, state: &SeenState) {
        let slot = usize::from(id.slot);
        if self.books.len() <= slot {
            self.books.resize(slot + 1, Book::default());
        }
        self.books[slot] = Book { generation: id.generation, seen: state.into(), at };
    }

    /// The endpoint has left.
    pub fn forget(&mut self, id: EndpointId) {
        if let Some(book) = self.books.get_mut(usize::from(id.slot))
            && !is_later(book.generation, id.generation)
        {
            *book = Book { generation: id.generation.wrapping_add(1), ..Book::default() };
        }
    }

    fn each(&mut self, now: Time, id: EndpointId, change: impl Fn(&mut Seen, &Speed)) {
        change(&mut self.seen, &Speed::default());
        self.fleet = self.seen.speed(&Speed::default());
        let slot = usize::from(id.slot);
        if self.books.len() <= slot {
            self.books.resize(slot + 1, Book::default());
        }
        let book = &mut self.books[slot];
        if is_later(book.generation, id.generation) {
            // It has left, and its place may be another's by now.
            return;
        }
        if book.generation != id.generation {
            *book = Book { generation: id.generation, ..Book::default() };
        }
        let mut seen = book.seen(now);
        change(&mut seen, &self.fleet);
        (book.seen, book.at) = (seen, now);
    }
}

/// Whether generation `a` of a slot came after `b`.
fn is_later(a: u32, b: u32) -> bool {
    (1..1 << 31).contains(&a.wrapping_sub(b))
}

fn fading() -> f64 {
    0.5f64.powf(1.0 / HALF_LIFE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    const NOW: Time = Time(1_000_000_000);

    fn id(slot: u16) -> EndpointId {
        EndpointId { slot, generation: 0 }
    }

    fn later(seconds: f64) -> Time {
        Time::from_secs_f64(1.0 + seconds)
    }

    /// An endpoint that is `factor` times as slow as the prior, with noise and a queue now and
    /// then.
    fn teach(learner: &mut Learner, slot: u16, factor: f64, requests: u32, rng: &mut Rng) {
        for _ in 0..requests {
            let tokens = if rng.below(5) == 0 { 7_000.0 } else { 200.0 } + rng.next_f64() * 300.0;
            let queue = if rng.below(10) == 0 { 30.0 } else { 0.0 };
            let first = 0.15 + factor * 50e-6 * tokens * (0.8 + 0.4 * rng.next_f64()) + queue;
            let seen = Circumstances { prefill_tokens: Some(tokens), context_tokens: 0.0 };
            learner.first_token(NOW, id(slot), &seen, first);
            let context = 500_000.0 * rng.next_f64();
            let step = factor * (0.02 + 50e-9 * context);
            learner.answer(NOW, id(slot), 1000);
            learner.steps(NOW, id(slot), context, step * 999.0, 1000);
        }
    }

    #[test]
    fn speeds_a_hundred_times_apart_are_learned_to_a_factor_of_two() {
        for (slot, factor) in [(0, 0.1), (1, 1.0), (2, 10.0)] {
            let (mut learner, mut rng) = (Learner::default(), Rng::seeded(u64::from(slot)));
            teach(&mut learner, slot, factor, 200, &mut rng);
            let speed = learner.speed(NOW, id(slot));
            for (learned, truth) in [
                (speed.prefill_per_token_s, 50e-6),
                (speed.step_base_s, 0.02),
                (speed.step_per_token_s, 50e-9),
            ] {
                let ratio = learned / (truth * factor);
                assert!((0.5..2.0).contains(&ratio), "{factor}: {ratio} {speed:?}");
            }
            assert!((900.0..1000.0).contains(&speed.output_tokens));
        }
    }

    #[test]
    fn an_endpoint_of_which_little_is_known_takes_after_the_fleet() {
        let (mut learner, mut rng) = (Learner::default(), Rng::seeded(3));
        teach(&mut learner, 0, 10.0, 200, &mut rng);
        assert_eq!(learner.speed(NOW, id(7)), learner.fleet());
        learner.steps(NOW, id(1), 1000.0, 1.0, 20);
        assert!(learner.speed(NOW, id(1)).step_base_s > 0.1);
        learner.forget(id(0));
        assert!(learner.fleet().step_base_s > 0.1);
    }

    #[test]
    fn learned_is_what_was_seen_often_enough() {
        let mut learner = Learner::default();
        let seen = Circumstances { prefill_tokens: Some(500.0), context_tokens: 0.0 };
        (0..8).for_each(|_| learner.first_token(NOW, id(0), &seen, 0.2));
        assert_eq!(learner.learned(), Learned::default());
        learner.first_token(NOW, id(1), &seen, 0.2);
        assert_eq!(learner.learned(), Learned { first_token: true, step: false });
        (0..9).for_each(|_| learner.steps(NOW, id(0), 1_000.0, 1.0, 50));
        assert_eq!(learner.learned(), Learned { first_token: true, step: true });
        let queued = Circumstances { prefill_tokens: None, context_tokens: 0.0 };
        let mut learner = Learner::default();
        (0..50).for_each(|_| learner.first_token(NOW, id(0), &queued, 9.0));
        assert_eq!(learner.learned(), Learned::default());
    }

    #[test]
    fn one_slow_endpoint_is_told_from_the_fast_ones() {
        let (mut learner, mut rng) = (Learner::default(), Rng::seeded(4));
        for _ in 0..40 {
            teach(&mut learner, 0, 1.0, 5, &mut rng);
            teach(&mut learner, 1, 3.0, 5, &mut rng);
        }
        let (fast, slow) = (learner.speed(NOW, id(0)), learner.speed(NOW, id(1)));
        assert!(slow.step_base_s > 1.5 * fast.step_base_s, "{slow:?} {fast:?}");
        assert!(slow.prefill_per_token_s > 1.5 * fast.prefill_per_token_s, "{slow:?} {fast:?}");
    }

    #[test]
    fn nonsense_teaches_nothing_impossible() {
        let mut learner = Learner::default();
        let seen = Circumstances { prefill_tokens: Some(0.0), context_tokens: 0.0 };
        for seconds in [f64::NAN, -1.0, 0.0, 1e300] {
            let seconds = if seconds.is_nan() { 0.0 } else { seconds };
            learner.first_token(NOW, id(0), &seen, seconds);
            learner.steps(NOW, id(0), 0.0, seconds, 9);
        }
        let speed = learner.speed(NOW, id(0));
        assert!(speed.prefill_per_token_s > 0.0 && speed.prefill_per_token_s.is_finite());
        assert!(speed.step_base_s > 0.0 && speed.step_base_s.is_finite());
    }

    #[test]
    fn an_unseen_endpoint_beside_seen_ones_takes_after_the_fleet() {
        let (mut learner, mut rng) = (Learner::default(), Rng::seeded(5));
        teach(&mut learner, 3, 10.0, 200, &mut rng);
        assert_eq!(learner.speed(NOW, id(1)), learner.fleet());
    }

    #[test]
    fn an_endpoint_seen_once_follows_what_the_fleet_learns_later() {
        let (mut learner, mut rng) = (Learner::default(), Rng::seeded(6));
        teach(&mut learner, 0, 1.0, 1, &mut rng);
        teach(&mut learner, 1, 0.1, 300, &mut rng);
        let (one, fleet) = (learner.speed(NOW, id(0)), learner.fleet());
        assert!(one.step_base_s < 3.0 * fleet.step_base_s, "{one:?} {fleet:?}");
    }

    #[test]
    fn a_late_answer_of_an_endpoint_that_left_is_not_its_successors() {
        let (mut learner, mut rng) = (Learner::default(), Rng::seeded(7));
        let (old, new) = (id(0), EndpointId { slot: 0, generation: 1 });
        teach(&mut learner, 0, 1.0, 10, &mut rng);
        learner.forget(old);
        assert_eq!(learner.speed(NOW, new), learner.fleet());
        (0..50).for_each(|_| learner.steps(NOW, new, 1000.0, 100.0, 101));
        assert!(learner.speed(NOW, new).step_base_s > 0.5);
        learner.steps(NOW, old, 1000.0, 1.0, 101);
        assert!(learner.speed(NOW, new).step_base_s > 0.5);
    }

    /// A slow start that has nothing to do with the prompt: a network far away, a slow step.
    #[test]
    fn short_prompts_far_from_the_priors_floor_do_not_make_prefill_free() {
        for base in [0.01, 0.4, 1.0] {
            let (mut learner, mut rng) = (Learner::default(), Rng::seeded(8));
            for _ in 0..400 {
                let tokens = 500.0 * rng.next_f64();
                let seen = Circumstances { prefill_tokens: Some(tokens), context_tokens: 0.0 };
                learner.first_token(NOW, id(0), &seen, base + 50e-6 * tokens);
                let step = base / 5.0 + 50e-9 * 20.0 * tokens;
                learner.steps(NOW, id(0), 20.0 * tokens, step * 99.0, 100);
            }
            for speed in [learner.fleet(), learner.speed(NOW, id(0))] {
                for (learned, truth) in
                    [(speed.prefill_per_token_s, 50e-6), (speed.step_per_token_s, 50e-9)]
                {
                    let ratio = learned / truth;
                    assert!((0.3..4.0).contains(&ratio), "{base}: {ratio} {speed:?}");
                }
            }
        }
    }

    #[test]
    fn what_was_learned_of_an_endpoint_fades_when_nothing_is_heard_of_it() {
        let (mut learner, mut rng) = (Learner::default(), Rng::seeded(9));
        teach(&mut learner, 0, 10.0, 200, &mut rng);
        teach(&mut learner, 1, 1.0, 2000, &mut rng);
        let fleet = learner.fleet().step_base_s;
        assert!(learner.speed(NOW, id(0)).step_base_s > 5.0 * fleet);
        assert!(learner.speed(later(60.0), id(0)).step_base_s > 3.0 * fleet);
        assert!(learner.speed(later(900.0), id(0)).step_base_s < 1.2 * fleet);
    }
}
