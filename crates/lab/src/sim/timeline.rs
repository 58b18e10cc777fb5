//! The fleet over time, at equal distances that double when there are too many.

use crate::record::Moment;

/// Moments kept; more double the distance.
const MOMENTS_MAX: usize = 4096;

/// Moments so far, and sums since the last.
pub(crate) struct Timeline {
    interval_s: f64,
    next_s: f64,
    moments: Vec<Moment>,
    /// Sums for the next moment.
    pub sums: Sums,
}

/// What is added up between two moments.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    pub output_tokens: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub preemptions: u64,
}

impl Timeline {
    pub fn new() -> Timeline {
        Timeline::every(1.0)
    }

    /// A moment each so many seconds, to begin with.
    pub fn every(interval_s: f64) -> Timeline {
        Timeline { interval_s, next_s: interval_s, moments: Vec::new(), sums: Sums::default() }
    }

    /// Whether the next moment has come.
    pub fn is_due(&self, now_s: f64) -> bool {
        now_s >= self.next_s
    }

    /// Notes the fleet at the moment that has come. Idle stretches are one moment at each end.
    pub fn note(&mut self, now_s: f64, look: impl FnOnce() -> Moment) {
        let sums = std::mem::take(&mut self.sums);
        let look = look();
        let moment = |at_s: f64, sums: Sums| Moment {
            at_s,
            output_tokens: sums.output_tokens,
            prompt_tokens: sums.prompt_tokens,
            cached_tokens: sums.cached_tokens,
            preemptions: sums.preemptions,
            ..look
        };
        self.moments.push(moment(self.next_s, sums));
        let passed = ((now_s - self.next_s) / self.interval_s).floor();
        if passed >= 1.0 {
            self.moments.push(moment(self.next_s + passed * self.interval_s, Sums::default()));
        }
        self.next_s += (passed + 1.0) * self.interval_s;
        if self.moments.len() > MOMENTS_MAX {
            self.halve();
        }
    }

    fn halve(&mut self) {
        let pairs = self.moments.chunks(2).map(|pair| match pair {
            [a, b] => Moment {
                output_tokens: a.output_tokens + b.output_tokens,
                prompt_tokens: a.prompt_tokens + b.prompt_tokens,
                cached_tokens: a.cached_tokens + b.cached_tokens,
                preemptions: a.preemptions + b.preemptions,
                waiting: (a.waiting + b.waiting) / 2.0,
                waiting_max: a.waiting_max.max(b.waiting_max),
                running: (a.running + b.running) / 2.0,
                kv_usage: (a.kv_usage + b.kv_usage) / 2.0,
                ..*b
            },
            other => other[0],
        });
        self.moments = pairs.collect();
        self.interval_s *= 2.0;
    }

    pub fn into_moments(self) -> Vec<Moment> {
        self.moments
    }
}
