//! How do records become figures?

use crate::record::{Ending, Lag, RequestRecord, RunRecord, StageRecord, Tally};
use crate::scenario::{Published, Scenario};

use super::{
    FirstToken, LAG_P99_MAX_S, Pooled, Queue, Run, SeedRun, Stage, Summary, SummaryFile, TokenGap,
    mean, percentile, sorted,
};

impl SummaryFile {
    /// The figures of these records: one run for each name, in the order in which names appear; its
    /// seeds in the order given. The scenario contributes its name and what was published.
    pub fn of(scenario: &Scenario, records: &[RunRecord]) -> SummaryFile {
        let named = by_name(records);
        let published = |name: &str| scenario.published.iter().find(|p| p.name == name);
        SummaryFile {
            scenario: scenario.name.clone(),
            seed: records.first().map_or(0, |record| record.seed),
            seeds: named.iter().map(|records| records.len() as u64).max().unwrap_or(0),
            runs: named
                .iter()
                .map(|records| Run::of(records, published(&records[0].name)))
                .collect(),
        }
    }
}

/// The records of each name; no group is empty.
pub(crate) fn by_name(records: &[RunRecord]) -> Vec<Vec<&RunRecord>> {
    let mut named: Vec<Vec<&RunRecord>> = Vec::new();
    for record in records {
        match named.iter_mut().find(|group| group[0].name == record.name) {
            Some(group) => group.push(record),
            None => named.push(vec![record]),
        }
    }
    named
}

impl Run {
    /// The figures of one configuration, one record for each seed.
    pub fn of(records: &[&RunRecord], published: Option<&Published>) -> Run {
        let mut seeds = Vec::new();
        let (mut failed, mut lag_s) = (0, None::<Lag>);
        for record in records {
            let seed = SeedRun::exact(record);
            failed += unanswered(record);
            if let Some(lag) = record.lag {
                let worst = lag_s.get_or_insert(lag);
                worst.p50 = worst.p50.max(lag.p50);
                worst.p99 = worst.p99.max(lag.p99);
                worst.max = worst.max.max(lag.max);
            }
            seeds.push(seed);
        }
        let summaries: Vec<Summary> = seeds.iter().map(|seed| seed.summary).collect();
        let pools: Vec<Pooled> = seeds.iter().map(|seed| seed.pooled).collect();
        let stages = (0..seeds.iter().map(|seed| seed.stages.len()).max().unwrap_or(0)).map(|at| {
            let same: Vec<&Stage> = seeds.iter().filter_map(|seed| seed.stages.get(at)).collect();
            Stage::mean_of(&same).rounded()
        });
        Run {
            name: records.first().map(|record| record.name.clone()).unwrap_or_default(),
            summary: Summary::mean_of(&summaries).rounded(),
            pooled: Pooled::mean_of(&pools).rounded(),
            stages: stages.collect(),
            published: published.cloned(),
            valid: lag_s.is_none_or(|lag| lag.p99 <= LAG_P99_MAX_S),
            failed,
            lag_s: lag_s.map(|lag| Lag {
                p50: round(lag.p50, 6),
                p99: round(lag.p99, 6),
                max: round(lag.max, 6),
            }),
            seeds: seeds.into_iter().map(SeedRun::rounded).collect(),
        }
    }
}

/// Requests without a complete answer outside of warm-up.
fn unanswered(record: &RunRecord) -> u64 {
    let counts = |request: &&RequestRecord| {
        request.ending != Ending::Answered
            && record.stages.get(request.stage as usize).is_some_and(|stage| !stage.warmup)
    };
    record.requests.iter().filter(counts).count() as u64
}

/// The requests of one stage, added up.
#[derive(Clone, Debug, Default)]
struct Gathered {
    requests: u64,
    /// Of answered requests; sorted once all are there.
    ttft_s: Vec<f64>,
    counted_tokens: f64,
    prompt_tokens: u64,
    cached_tokens: u64,
    /// First and last sending, and the last end of an answer.
    sending: Option<(f64, f64)>,
    answered_s: f64,
}

impl Gathered {
    fn of(record: &RunRecord) -> Vec<Gathered> {
        let mut stages = vec![Gathered::default(); record.stages.len()];
        for request in &record.requests {
            if let Some(stage) = stages.get_mut(request.stage as usize) {
                stage.add(request);
            }
        }
        for stage in &mut stages {
            stage.ttft_s.sort_by(f64::total_cmp);
        }
        stages
    }

    fn add(&mut self, request: &RequestRecord) {
        self.requests += 1;
        let (first, last) = self.sending.unwrap_or((request.sent_s, request.sent_s));
        self.sending = Some((first.min(request.sent_s), last.max(request.sent_s)));
        if request.ending != Ending::Answered {
            return;
        }
        self.ttft_s.push(f64::from(request.ttft_s));
        self.counted_tokens += f64::from(request.counted_tokens);
        self.prompt_tokens += u64::from(request.prompt_tokens);
        self.cached_tokens += u64::from(request.cached_tokens);
        self.answered_s = self.answered_s.max(request.sent_s + f64::from(request.total_s));
    }

    fn answered(&self) -> u64 {
        self.ttft_s.len() as u64
    }

    /// From the first sending to the last end of an answer.
    fn busy(&self) -> Option<(f64, f64)> {
        let (first, _) = self.sending?;
        (self.answered_s > first).then_some((first, self.answered_s))
    }

    /// As planned; where no plan says so, from the first sending to the last.
    fn sending_s(&self, stage: &StageRecord) -> f64 {
        match self.sending {
            _ if stage.duration_s > 0.0 => stage.duration_s,
            Some((first, last)) => last - first,
            None => 0.0,
        }
    }

    fn failed_ratio(&self) -> f64 {
        ratio((self.requests - self.answered()) as f64, self.requests as f64)
    }

    fn hit_ratio(&self) -> f64 {
        ratio(self.cached_tokens as f64, self.prompt_tokens as f64)
    }

    fn stage(&self, record: &StageRecord) -> Stage {
        let span = self.busy().map_or(0.0, |(from, to)| to - from);
        let summary = Summary {
            requests: self.requests,
            output_tokens_per_s: ratio(self.counted_tokens, span),
            requests_per_s: ratio(self.requests as f64, self.sending_s(record)),
            ttft_s: first_token(&self.ttft_s),
            itl_s: stamped_twice(&record.gaps_s, self.answered()),
            wait_queue: tallied(&record.waiting),
            kv_usage: tallied(&record.kv_usage),
            hit_ratio: self.hit_ratio(),
        };
        Stage {
            rate: record.rate,
            summary,
            failed_ratio: self.failed_ratio(),
            tpot_s: true_gaps(&record.gaps_s),
        }
    }
}

impl SeedRun {
    /// The figures of one record, not yet rounded.
    fn exact(record: &RunRecord) -> SeedRun {
        let gathered = Gathered::of(record);
        let kept: Vec<(&StageRecord, &Gathered)> =
            record.stages.iter().zip(&gathered).filter(|(stage, _)| !stage.warmup).collect();
        let stages: Vec<Stage> = kept.iter().map(|(stage, all)| all.stage(stage)).collect();
        let answered: Vec<u64> = kept.iter().map(|(_, all)| all.answered()).collect();
        let sending_s = kept.iter().map(|(stage, all)| all.sending_s(stage)).sum();
        let mut summary = as_published(&stages, &answered, sending_s);
        let tally = |of: fn(&StageRecord) -> &Tally| {
            record.stages.iter().fold(Tally::default(), |mut sum, stage| {
                sum.merge(of(stage));
                sum
            })
        };
        // These two are sampled at every decision of the run, warm-up included.
        summary.wait_queue = tallied(&tally(|stage| &stage.waiting));
        summary.kv_usage = tallied(&tally(|stage| &stage.kv_usage));
        summary.hit_ratio = hit_ratio(&kept);
        SeedRun { seed: record.seed, summary, pooled: pooled(&kept), stages }
    }

    fn rounded(self) -> SeedRun {
        SeedRun {
            seed: self.seed,
            summary: self.summary.rounded(),
            pooled: self.pooled.rounded(),
            stages: self.stages.iter().map(Stage::rounded).collect(),
        }
    }
}

/// The summary of llm-d's benchmark reports from stage figures: throughput is the plain mean over
/// stages, however long they took; times are means of the stage's means and percentiles, weighted
/// by the number of answers; requests are counted when they were due, answered or not.
fn as_published(stages: &[Stage], answered: &[u64], sending_s: f64) -> Summary {
    let requests: u64 = stages.iter().map(|stage| stage.summary.requests).sum();
    let throughput: f64 = stages.iter().map(|stage| stage.summary.output_tokens_per_s).sum();
    let weighted = |of: fn(&Summary) -> f64| {
        let values = stages.iter().map(|stage| of(&stage.summary));
        let sum: f64 = values.zip(answered).map(|(value, &count)| value * count as f64).sum();
        ratio(sum, answered.iter().sum::<u64>() as f64)
    };
    Summary {
        requests,
        output_tokens_per_s: ratio(throughput, stages.len() as f64),
        requests_per_s: ratio(requests as f64, sending_s),
        ttft_s: FirstToken {
            mean: weighted(|s| s.ttft_s.mean),
            p50: weighted(|s| s.ttft_s.p50),
            p90: weighted(|s| s.ttft_s.p90),
            p99: weighted(|s| s.ttft_s.p99),
        },
        itl_s: TokenGap {
            mean: weighted(|s| s.itl_s.mean),
            p50: weighted(|s| s.itl_s.p50),
            p90: weighted(|s| s.itl_s.p90),
        },
        ..Summary::default()
    }
}

/// All requests of these stages in one pool.
fn pooled(stages: &[(&StageRecord, &Gathered)]) -> Pooled {
    let ttft = sorted(stages.iter().flat_map(|(_, all)| all.ttft_s.iter().copied()));
    let requests: u64 = stages.iter().map(|(_, all)| all.requests).sum();
    let tokens: f64 = stages.iter().map(|(_, all)| all.counted_tokens).sum();
    let busy_s = covered(stages.iter().filter_map(|(_, all)| all.busy()).collect());
    let merged = |of: fn(&StageRecord) -> &Tally| {
        stages.iter().fold(Tally::default(), |mut sum, (stage, _)| {
            sum.merge(of(stage));
            sum
        })
    };
    Pooled {
        summary: Summary {
            requests,
            output_tokens_per_s: ratio(tokens, busy_s),
            requests_per_s: ratio(ttft.len() as f64, busy_s),
            ttft_s: first_token(&ttft),
            itl_s: true_gaps(&merged(|stage| &stage.gaps_s)),
            wait_queue: tallied(&merged(|stage| &stage.waiting)),
            kv_usage: tallied(&merged(|stage| &stage.kv_usage)),
            hit_ratio: hit_ratio(stages),
        },
        failed_ratio: ratio((requests - ttft.len() as u64) as f64, requests as f64),
    }
}

fn hit_ratio(stages: &[(&StageRecord, &Gathered)]) -> f64 {
    let sum = |of: fn(&Gathered) -> u64| stages.iter().map(|(_, all)| of(all)).sum::<u64>() as f64;
    ratio(sum(|all| all.cached_tokens), sum(|all| all.prompt_tokens))
}

/// Length of the union of spans: stages that do not wait for each other overlap.
fn covered(mut spans: Vec<(f64, f64)>) -> f64 {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut sum, mut end) = (0.0, f64::NEG_INFINITY);
    for (from, to) in spans {
        sum += (to - from.max(end)).max(0.0);
        end = end.max(to);
    }
    sum
}

/// Gaps as a load generator sees them that stamps each line of an answer: two lines for each token
/// and for the `[DONE]` at the end, so more than half of the gaps are nothing.
fn stamped_twice(gaps: &Tally, answered: u64) -> TokenGap {
    TokenGap {
        mean: ratio(gaps.sum(), (2 * gaps.count() + 3 * answered) as f64),
        p50: 0.0,
        p90: gaps.percentile(80.0),
    }
}

fn true_gaps(gaps: &Tally) -> TokenGap {
    TokenGap { mean: gaps.mean(), p50: gaps.percentile(50.0), p90: gaps.percentile(90.0) }
}

fn first_token(sorted: &[f64]) -> FirstToken {
    FirstToken {
        mean: mean(sorted),
        p50: percentile(sorted, 50.0),
        p90: percentile(sorted, 90.0),
        p99: percentile(sorted, 99.0),
    }
}

fn tallied(tally: &Tally) -> Queue {
    Queue { mean: tally.mean(), p90: tally.percentile(90.0), max: tally.max() }
}

/// 0 where there is nothing to divide by.
fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// To so many decimals; JSON knows no infinity, so what is not finite is 0.
fn round(value: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    let rounded = (value * scale).round() / scale;
    if rounded.is_finite() { rounded } else { 0.0 }
}

impl Summary {
    /// Plain means; of `max` the largest.
    fn mean_of(all: &[Summary]) -> Summary {
        let mean = |of: fn(&Summary) -> f64| ratio(all.iter().map(of).sum(), all.len() as f64);
        let max = |of: fn(&Summary) -> f64| all.iter().map(of).fold(0.0, f64::max);
        Summary {
            requests: mean(|s| s.requests as f64).round() as u64,
            output_tokens_per_s: mean(|s| s.output_tokens_per_s),
            requests_per_s: mean(|s| s.requests_per_s),
            ttft_s: FirstToken {
                mean: mean(|s| s.ttft_s.mean),
                p50: mean(|s| s.ttft_s.p50),
                p90: mean(|s| s.ttft_s.p90),
                p99: mean(|s| s.ttft_s.p99),
            },
            itl_s: TokenGap {
                mean: mean(|s| s.itl_s.mean),
                p50: mean(|s| s.itl_s.p50),
                p90: mean(|s| s.itl_s.p90),
            },
            wait_queue: Queue {
                mean: mean(|s| s.wait_queue.mean),
                p90: mean(|s| s.wait_queue.p90),
                max: max(|s| s.wait_queue.max),
            },
            kv_usage: Queue {
                mean: mean(|s| s.kv_usage.mean),
                p90: mean(|s| s.kv_usage.p90),
                max: max(|s| s.kv_usage.max),
            },
            hit_ratio: mean(|s| s.hit_ratio),
        }
    }

    /// Finer than anything that could be measured, and the same digits on every machine.
    fn rounded(&self) -> Summary {
        let queue = |q: Queue, d| Queue {
            mean: round(q.mean, d),
            p90: round(q.p90, d),
            max: round(q.max, d),
        };
        Summary {
            requests: self.requests,
            output_tokens_per_s: round(self.output_tokens_per_s, 2),
            requests_per_s: round(self.requests_per_s, 4),
            ttft_s: FirstToken {
                mean: round(self.ttft_s.mean, 5),
                p50: round(self.ttft_s.p50, 5),
                p90: round(self.ttft_s.p90, 5),
                p99: round(self.ttft_s.p99, 5),
            },
            itl_s: self.itl_s.rounded(),
            wait_queue: queue(self.wait_queue, 3),
            kv_usage: queue(self.kv_usage, 4),
            hit_ratio: round(self.hit_ratio, 4),
        }
    }
}

impl TokenGap {
    fn mean_of(all: &[&TokenGap]) -> TokenGap {
        let mean =
            |of: fn(&TokenGap) -> f64| ratio(all.iter().map(|gap| of(gap)).sum(), all.len() as f64);
        TokenGap { mean: mean(|g| g.mean), p50: mean(|g| g.p50), p90: mean(|g| g.p90) }
    }

    fn rounded(self) -> TokenGap {
        TokenGap { mean: round(self.mean, 6), p50: round(self.p50, 6), p90: round(self.p90, 6) }
    }
}

impl Stage {
    fn mean_of(all: &[&Stage]) -> Stage {
        let mean = |of: fn(&Stage) -> f64| {
            ratio(all.iter().map(|stage| of(stage)).sum(), all.len() as f64)
        };
        Stage {
            rate: mean(|stage| stage.rate),
            summary: Summary::mean_of(&all.iter().map(|stage| stage.summary).collect::<Vec<_>>()),
            failed_ratio: mean(|stage| stage.failed_ratio),
            tpot_s: TokenGap::mean_of(&all.iter().map(|stage| &stage.tpot_s).collect::<Vec<_>>()),
        }
    }

    fn rounded(&self) -> Stage {
        Stage {
            rate: round(self.rate, 6),
            summary: self.summary.rounded(),
            failed_ratio: round(self.failed_ratio, 4),
            tpot_s: self.tpot_s.rounded(),
        }
    }
}

impl Pooled {
    fn mean_of(all: &[Pooled]) -> Pooled {
        let failed: f64 = all.iter().map(|pooled| pooled.failed_ratio).sum();
        Pooled {
            summary: Summary::mean_of(&all.iter().map(|pool| pool.summary).collect::<Vec<_>>()),
            failed_ratio: ratio(failed, all.len() as f64),
        }
    }

    fn rounded(&self) -> Pooled {
        Pooled { summary: self.summary.rounded(), failed_ratio: round(self.failed_ratio, 4) }
    }
}

#[cfg(test)]
mod tests;
