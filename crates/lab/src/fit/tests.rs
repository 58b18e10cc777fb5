use std::time::Duration;

use kvroute_core::{Rng, Time};

use super::*;
use crate::model::{EngineModel, HashAlgorithm, ModelConfig, NewRequest};

fn truth() -> Profile {
    Profile::built_in("qwen3-32b-tp2-h100").unwrap()
}

fn options() -> FitOptions {
    FitOptions {
        name: "mine".to_owned(),
        batched_tokens: 8192,
        clients: Clients::Together,
        like: None,
    }
}

/// Rows without times: prompts alone, and several concurrencies with and without sharing.
fn plan() -> Vec<Row> {
    let mut rows = Vec::new();
    for prompt in [128, 512, 2048, 4096, 8000, 12_000, 16_000, 30_000] {
        rows.push(Row { concurrency: 1, prompt_tokens: prompt, output_tokens: 33, ..row() });
    }
    for concurrency in [1, 2, 4, 8, 16, 32] {
        for (prompt, shared) in [(256, 0), (2000, 0), (4000, 3840), (8000, 0), (8000, 7680)] {
            rows.push(Row {
                concurrency,
                prompt_tokens: prompt,
                shared_tokens: shared,
                output_tokens: 33,
                ..row()
            });
        }
    }
    rows.iter_mut().enumerate().for_each(|(at, row)| row.line = at + 2);
    rows
}

fn row() -> Row {
    Row { output_tokens: 1, ..Row::default() }
}

/// The rows with the times that the formula gives, times a relative error of up to `noise`.
fn by_formula(overhead_s: f64, clients: Clients, noise: f64) -> Vec<Row> {
    let profile = truth();
    let mut rng = Rng::seeded(11);
    let mut noisy = |value: f64| value * (1.0 + noise * (2.0 * rng.next_f64() - 1.0));
    let sum = |factors: [f64; TERMS.len()]| -> f64 {
        let value = |term: Term| match term {
            Term::Overhead => overhead_s,
            _ => term.of(&profile),
        };
        TERMS.iter().zip(factors).map(|(&term, factor)| value(term) * factor).sum()
    };
    let mut rows = plan();
    for row in &mut rows {
        let prompt = Prefill::of(row, 8192);
        row.ttft_s = Some(noisy(sum(prompt.first_token()))).filter(|_| row.concurrency == 1);
        row.tpot_s = Some(noisy(sum(prompt.per_token(row, clients))));
    }
    rows
}

fn assert_near(fit: &Fit, tolerances: &[(Term, f64)]) {
    for &(term, tolerance) in tolerances {
        let (found, expected) = (term.of(&fit.profile), term.of(&truth()));
        let error = found / expected - 1.0;
        assert!(error.abs() <= tolerance, "{}: {error:.3} of {expected}", term.name());
    }
}

const ALL: [Term; 6] =
    [Term::Base, Term::Prefill, Term::Context, Term::Sequence, Term::Attention, Term::Unique];

#[test]
fn the_formula_gives_its_constants_back() {
    for clients in [Clients::Together, Clients::Independent] {
        let options = FitOptions { clients, ..options() };
        let fit = fit(&by_formula(0.06, clients, 0.0), &options).unwrap();
        assert_near(&fit, &ALL.map(|term| (term, 1e-4)));
        let overhead = fit.constants[place(Term::Overhead)];
        assert!((overhead.value - 0.06).abs() < 1e-5, "{overhead:?}");
        assert!(fit.warnings.is_empty(), "{:?}", fit.warnings);
        assert!(fit.points.iter().all(|point| point.error().abs() < 1e-4));
    }
}

#[test]
fn noise_of_three_percent_costs_little() {
    let fit = fit(&by_formula(0.06, Clients::Together, 0.03), &options()).unwrap();
    let tolerances = [
        (Term::Base, 0.03),
        (Term::Prefill, 0.05),
        (Term::Context, 0.25),
        (Term::Sequence, 0.25),
        (Term::Attention, 0.15),
        (Term::Unique, 0.25),
    ];
    assert_near(&fit, &tolerances);
    assert!(fit.points.iter().all(|point| point.error().abs() < 0.06));
}

#[test]
fn what_the_table_cannot_tell_is_said_and_scaled_from_another_profile() {
    // Nothing shared: context and unique tokens are the same thing.
    let mut rows = by_formula(0.0, Clients::Together, 0.0);
    rows.retain(|row| row.shared_tokens == 0);
    let alone = fit(&rows, &options()).unwrap();
    assert_eq!(alone.constants[place(Term::Unique)].source, Source::Missing);
    assert_eq!(alone.profile.step_per_unique_token_s, 0.0);
    let said = alone.warnings.iter().find(|text| text.starts_with("step_per_unique_token_s"));
    assert!(said.unwrap().contains("--like"), "{:?}", alone.warnings);
    // Hardware with twice the bandwidth: the same ratio between the two.
    let mut like = truth();
    like.step_per_context_token_s /= 2.0;
    like.step_per_unique_token_s /= 2.0;
    let scaled = fit(&rows, &FitOptions { like: Some(like), ..options() }).unwrap();
    let source = scaled.constants[place(Term::Unique)].source;
    assert_eq!(source, Source::InProportion(Term::Context));
    assert_near(&scaled, &ALL.map(|term| (term, 1e-3)));
    // Only decoding was measured: prefill follows the floor of a step.
    rows.iter_mut().for_each(|row| row.ttft_s = None);
    let decode = fit(&rows, &FitOptions { like: Some(truth()), ..options() }).unwrap();
    assert_near(&decode, &ALL.map(|term| (term, 1e-3)));
    assert_eq!(decode.warnings.len(), 4, "{:?}", decode.warnings);
}

#[test]
fn tables_that_say_nothing_are_refused() {
    let busy = Row { concurrency: 8, prompt_tokens: 100, ttft_s: Some(1.0), ..row() };
    assert_eq!(fit(&[busy], &options()).unwrap_err(), FitError::NothingUsable);
    let none = FitOptions { batched_tokens: 0, ..options() };
    assert_eq!(fit(&[busy], &none).unwrap_err(), FitError::BatchedTokens(0));
}

/// An engine in virtual time, as a user would measure it.
struct Bench {
    engine: EngineModel,
    now: Time,
    next: u64,
}

impl Bench {
    fn new() -> Bench {
        let config = ModelConfig {
            blocks: 40_000,
            max_model_len: 40_000,
            hash: HashAlgorithm::XxhashCbor,
            ..ModelConfig::default()
        };
        Bench { engine: EngineModel::new(config, truth()).unwrap(), now: Time::ZERO, next: 0 }
    }

    fn submit(&mut self, row: &Row, output_tokens: u32) {
        self.next += 1;
        let own = self.next as u32 * 100_000;
        let shared = |i: u32| i < row.shared_tokens;
        let tokens = (0..row.prompt_tokens).map(|i| if shared(i) { i } else { own + i }).collect();
        let request = NewRequest {
            id: self.next,
            tokens,
            max_tokens: output_tokens,
            ..NewRequest::default()
        };
        self.engine.submit(self.now, request).unwrap();
    }

    /// All at once, after one that leaves the shared prefix in the cache.
    fn together(&mut self, row: &Row) -> Row {
        if row.shared_tokens > 0 {
            self.submit(row, 1);
            self.run(|_| {});
        }
        (0..row.concurrency).for_each(|_| self.submit(row, row.output_tokens));
        let (mut first, mut total, mut slowest) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        self.run(|finished| {
            first = finished.first_token;
            slowest = slowest.max(finished.first_token);
            total += finished.total - finished.first_token;
        });
        let gaps = f64::from(row.concurrency * (row.output_tokens - 1));
        Row {
            ttft_s: Some(first.as_secs_f64()).filter(|_| row.shared_tokens == 0),
            tpot_s: Some(total.as_secs_f64() / gaps),
            ..*row
        }
    }

    fn run(&mut self, mut ended: impl FnMut(&crate::model::Finished)) {
        while let Some(step) = self.engine.next_step(self.now) {
            self.now = self.now + step.duration;
            step.finished.iter().for_each(&mut ended);
        }
    }

    /// A closed loop of clients that began one after the other.
    fn independent(&mut self, row: &Row) -> Row {
        let answers = row.concurrency * 3;
        let (mut started, mut count, mut gaps) = (0, 0, Vec::new());
        let mut steps = 0;
        loop {
            if started < row.concurrency && steps * row.concurrency >= started * row.output_tokens {
                self.submit(row, row.output_tokens);
                started += 1;
            }
            steps += 1;
            let Some(step) = self.engine.next_step(self.now) else { break };
            self.now = self.now + step.duration;
            for finished in &step.finished {
                count += 1;
                if count > row.concurrency && count <= answers {
                    gaps.push((finished.total - finished.first_token).as_secs_f64());
                }
                if count < answers {
                    self.submit(row, row.output_tokens);
                }
            }
        }
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        Row { tpot_s: Some(mean / f64::from(row.output_tokens - 1)), ..*row }
    }
}

#[test]
fn the_real_engine_model_gives_its_constants_back() {
    let mut rows = Vec::new();
    // As many sequences as have their prompts computed in one step; more would see each other's.
    for row in plan() {
        let own = (row.prompt_tokens - row.shared_tokens) * row.concurrency;
        if own <= 8192 || row.concurrency == 1 {
            rows.push(Bench::new().together(&row));
        }
    }
    let clean = fit(&rows, &options()).unwrap();
    let tolerances = [
        (Term::Base, 0.01),
        (Term::Prefill, 0.01),
        (Term::Context, 0.05),
        (Term::Sequence, 0.1),
        (Term::Attention, 0.02),
        (Term::Unique, 0.05),
    ];
    assert_near(&clean, &tolerances);
    assert!(clean.constants[place(Term::Overhead)].value < 1e-3);
    let mut rng = Rng::seeded(5);
    for row in &mut rows {
        let mut noisy = |value: f64| value * (1.0 + 0.03 * (2.0 * rng.next_f64() - 1.0));
        (row.ttft_s, row.tpot_s) = (row.ttft_s.map(&mut noisy), row.tpot_s.map(&mut noisy));
    }
    let noisy = fit(&rows, &options()).unwrap();
    assert_near(&noisy, &[(Term::Base, 0.05), (Term::Prefill, 0.05), (Term::Attention, 0.25)]);
    // The rest is uncertain, but what it says of a step is not.
    assert!(noisy.points.iter().all(|point| point.error().abs() < 0.08), "{:?}", noisy.points);
}

#[test]
fn a_closed_loop_of_the_real_engine_model_is_explained_with_independent_clients() {
    let mut rows: Vec<Row> = plan()
        .into_iter()
        .filter(|row| row.concurrency == 1)
        .map(|r| Bench::new().together(&r))
        .collect();
    for concurrency in [4, 8, 16] {
        for prompt_tokens in [256, 1000, 3000] {
            let row = Row { concurrency, prompt_tokens, output_tokens: 40, ..row() };
            rows.push(Bench::new().independent(&row));
        }
    }
    let independent = FitOptions { clients: Clients::Independent, ..options() };
    let like = Some(truth());
    let good = fit(&rows, &FitOptions { like, ..independent }).unwrap();
    assert!(good.points.iter().all(|point| point.error().abs() < 0.05), "{:?}", good.points);
    assert_near(&good, &[(Term::Base, 0.05), (Term::Prefill, 0.05)]);
    let wrong = fit(&rows, &options()).unwrap();
    let worst = |fit: &Fit| fit.points.iter().map(|p| p.error().abs()).fold(0.0, f64::max);
    assert!(worst(&wrong) > 2.0 * worst(&good), "{} {}", worst(&wrong), worst(&good));
}
