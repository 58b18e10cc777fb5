//! Which step-time profile explains what somebody measured on an engine?
//!
//! A step takes `base + seq*sequences + ctx*context + uni*unique + pf*prefill + attn*positions`
//! (see [`Profile`]). A table holds what any load tool reports, at several prompt lengths and
//! concurrencies:
//!
//! * time to first token at concurrency 1: an overhead outside of the engine, and the steps of the
//!   prompt's chunks;
//! * time per output token at concurrency `n`: one step with `n` sequences of the mean context
//!   `prompt + output/2`, and `unique = shared + n*(context - shared)`.
//!
//! Both are linear in the constants, so they are found by non-negative least squares of relative
//! errors. What the table cannot tell is said by name, never guessed silently.

mod least_squares;
mod table;
#[cfg(test)]
mod tests;

use crate::model::Profile;
pub use table::{Row, TABLE_BYTES_MAX, TABLE_ROWS_MAX, TableError, parse};

/// What is fitted, in the order in which effects are ascribed when the table cannot tell them
/// apart: the first of two takes the effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// `step_base_s`.
    Base,
    /// `prefill_per_token_s`.
    Prefill,
    /// `step_per_context_token_s`.
    Context,
    /// `step_per_seq_s`.
    Sequence,
    /// Seconds of every time to first token that are not the engine's.
    Overhead,
    /// `prefill_attention_s`.
    Attention,
    /// `step_per_unique_token_s`.
    Unique,
}

const TERMS: [Term; 7] = [
    Term::Base,
    Term::Prefill,
    Term::Context,
    Term::Sequence,
    Term::Overhead,
    Term::Attention,
    Term::Unique,
];

impl Term {
    /// As in a profile.
    pub fn name(self) -> &'static str {
        match self {
            Term::Base => "step_base_s",
            Term::Prefill => "prefill_per_token_s",
            Term::Context => "step_per_context_token_s",
            Term::Sequence => "step_per_seq_s",
            Term::Overhead => "overhead_s",
            Term::Attention => "prefill_attention_s",
            Term::Unique => "step_per_unique_token_s",
        }
    }

    /// Which rows would tell it.
    fn advice(self) -> &'static str {
        match self {
            Term::Base => "measure tpot_s at concurrency 1",
            Term::Prefill => "measure ttft_s at concurrency 1 with different prompt_tokens",
            Term::Context => "measure tpot_s with short and with long prompts",
            Term::Sequence => "measure tpot_s at low and at high concurrency, with short prompts",
            Term::Overhead => "measure ttft_s at concurrency 1 with short and with long prompts",
            Term::Attention => "measure ttft_s at concurrency 1 with prompts of over 10,000 tokens",
            Term::Unique => "measure tpot_s at high concurrency with and without shared_tokens",
        }
    }

    /// In proportion to what it changes from one hardware to another.
    fn relative(self) -> Option<Term> {
        match self {
            Term::Base | Term::Overhead => None,
            Term::Prefill | Term::Context | Term::Sequence => Some(Term::Base),
            Term::Attention => Some(Term::Prefill),
            Term::Unique => Some(Term::Context),
        }
    }

    fn of(self, profile: &Profile) -> f64 {
        match self {
            Term::Base => profile.step_base_s,
            Term::Prefill => profile.prefill_per_token_s,
            Term::Context => profile.step_per_context_token_s,
            Term::Sequence => profile.step_per_seq_s,
            Term::Overhead => 0.0,
            Term::Attention => profile.prefill_attention_s,
            Term::Unique => profile.step_per_unique_token_s,
        }
    }
}

/// How the sequences of one row ran beside each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clients {
    /// All prompts were computed before, or at the same time: nobody's prefill fell into another's
    /// answer.
    #[default]
    Together,
    /// A closed loop of clients out of step: during an answer every other client's prompt is
    /// computed once.
    Independent,
}

/// How to fit.
#[derive(Clone, Debug)]
pub struct FitOptions {
    /// Name of the profile.
    pub name: String,
    /// The engine's `--max-num-batched-tokens`.
    pub batched_tokens: u32,
    /// How the sequences of one row ran beside each other.
    pub clients: Clients,
    /// Where constants come from that the table cannot tell, in proportion to those it can.
    pub like: Option<Profile>,
}

/// Where a constant comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The table.
    Fitted,
    /// The other profile, in proportion to this constant.
    InProportion(Term),
    /// Nowhere: the table cannot tell it, so it is 0.
    Missing,
}

/// One constant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Constant {
    /// Which.
    pub term: Term,
    /// Seconds.
    pub value: f64,
    /// Standard error, seconds; 0 where it is not fitted.
    pub error: f64,
    /// Where it comes from.
    pub source: Source,
}

/// One measurement and what the fit makes of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Line in the table.
    pub line: usize,
    /// `ttft_s` or `tpot_s`.
    pub column: &'static str,
    /// Seconds.
    pub measured: f64,
    /// Seconds.
    pub modelled: f64,
}

impl Point {
    /// Modelled over measured, less 1.
    pub fn error(&self) -> f64 {
        self.modelled / self.measured - 1.0
    }
}

/// A fitted profile and how good it is.
#[derive(Clone, Debug)]
pub struct Fit {
    /// The result.
    pub profile: Profile,
    /// Every constant, the overhead included.
    pub constants: Vec<Constant>,
    /// What somebody who uses the profile has to know.
    pub warnings: Vec<String>,
    /// All measurements that were used.
    pub points: Vec<Point>,
}

/// A table from which no profile follows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FitError {
    /// Only times to first token above concurrency 1.
    #[error(
        "no row can be used: give tpot_s, or ttft_s at concurrency 1 (above it the time to first \
         token depends on how the requests arrived)"
    )]
    NothingUsable,
    /// The constants explain the table without a floor, which no engine has.
    #[error(
        "the table leaves nothing for step_base_s, which every engine has: add tpot_s at \
         concurrency 1 and check the units (seconds, tokens)"
    )]
    NoBase,
    /// No chunk would ever be computed.
    #[error("batched_tokens is {0}, it must be at least 16")]
    BatchedTokens(u32),
}

/// Smallest number of batched tokens that is accepted.
const BATCHED_TOKENS_MIN: u32 = 16;
/// A larger share of error than this is worth a warning, of the points' median.
const MEDIAN_ERROR_MAX: f64 = 0.1;
/// A standard error above this share of the constant is worth a warning.
const CONSTANT_ERROR_MAX: f64 = 0.5;

/// Finds the profile that explains the rows best.
///
/// # Errors
/// [`FitError`] when they do not determine even the floor of a step.
pub fn fit(rows: &[Row], options: &FitOptions) -> Result<Fit, FitError> {
    if options.batched_tokens < BATCHED_TOKENS_MIN {
        return Err(FitError::BatchedTokens(options.batched_tokens));
    }
    let (points, factors) = measurements(rows, options);
    if points.is_empty() {
        return Err(FitError::NothingUsable);
    }
    let mut columns: Vec<Vec<f64>> = (0..TERMS.len())
        .map(|at| points.iter().zip(&factors).map(|(p, row)| row[at] / p.measured).collect())
        .collect();
    let told = least_squares::independent(&columns);
    let sources = sources(&told, options.like.as_ref());
    for (at, source) in sources.iter().enumerate() {
        if let (Source::InProportion(to), Some(like)) = (source, &options.like) {
            let ratio = TERMS[at].of(like) / to.of(like);
            let scaled: Vec<f64> = columns[at].iter().map(|value| ratio * value).collect();
            columns[place(*to)].iter_mut().zip(scaled).for_each(|(sum, value)| *sum += value);
        }
    }
    let kept: Vec<usize> = (0..TERMS.len()).filter(|&at| told[at]).collect();
    let chosen: Vec<Vec<f64>> = kept.iter().map(|&at| columns[at].clone()).collect();
    let solution = least_squares::solve(&chosen, &vec![1.0; points.len()]);
    let mut values = [0.0; TERMS.len()];
    let mut errors = [0.0; TERMS.len()];
    for (at, (value, error)) in kept.iter().zip(solution.values.iter().zip(&solution.errors)) {
        (values[*at], errors[*at]) = (*value, *error);
    }
    for (at, source) in sources.iter().enumerate() {
        if let (Source::InProportion(to), Some(like)) = (source, &options.like) {
            values[at] = values[place(*to)] * TERMS[at].of(like) / to.of(like);
        }
    }
    let constants: Vec<Constant> = (0..TERMS.len())
        .map(|at| {
            let (value, error) = (rounded(values[at]), rounded(errors[at]));
            Constant { term: TERMS[at], value, error, source: sources[at] }
        })
        .collect();
    finish(rows, options, constants, points, &factors)
}

fn finish(
    rows: &[Row],
    options: &FitOptions,
    constants: Vec<Constant>,
    mut points: Vec<Point>,
    factors: &[[f64; TERMS.len()]],
) -> Result<Fit, FitError> {
    for (point, row) in points.iter_mut().zip(factors) {
        point.modelled = constants.iter().zip(row).map(|(c, factor)| c.value * factor).sum();
    }
    let value = |term: Term| constants[place(term)].value;
    if value(Term::Base) <= 0.0 {
        return Err(FitError::NoBase);
    }
    let profile = Profile {
        name: options.name.clone(),
        step_base_s: value(Term::Base),
        step_per_seq_s: value(Term::Sequence),
        step_per_context_token_s: value(Term::Context),
        step_per_unique_token_s: value(Term::Unique),
        prefill_per_token_s: value(Term::Prefill),
        prefill_attention_s: value(Term::Attention),
    };
    let warnings = warnings(rows, options, &constants, &points);
    Ok(Fit { profile, constants, warnings, points })
}

fn place(term: Term) -> usize {
    TERMS.iter().position(|other| *other == term).unwrap_or(0)
}

/// Six digits are more than any measurement has.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

fn sources(told: &[bool], like: Option<&Profile>) -> Vec<Source> {
    let source = |at: usize| {
        if told[at] {
            return Source::Fitted;
        }
        let Some(like) = like else { return Source::Missing };
        let mut to = TERMS[at].relative();
        while let Some(term) = to {
            if told[place(term)] && term.of(like) > 0.0 {
                return Source::InProportion(term);
            }
            to = term.relative();
        }
        Source::Missing
    };
    (0..TERMS.len()).map(source).collect()
}

/// The measurements, and how often each constant is in each of them.
fn measurements(rows: &[Row], options: &FitOptions) -> (Vec<Point>, Vec<[f64; TERMS.len()]>) {
    let (mut points, mut factors) = (Vec::new(), Vec::new());
    for row in rows {
        let prompt = Prefill::of(row, options.batched_tokens);
        if let Some(measured) = row.ttft_s.filter(|_| row.concurrency == 1) {
            points.push(Point { line: row.line, column: "ttft_s", measured, modelled: 0.0 });
            factors.push(prompt.first_token());
        }
        if let Some(measured) = row.tpot_s {
            points.push(Point { line: row.line, column: "tpot_s", measured, modelled: 0.0 });
            factors.push(prompt.per_token(row, options.clients));
        }
    }
    (points, factors)
}

/// The work of computing one prompt alone.
#[derive(Clone, Copy, Debug, Default)]
struct Prefill {
    chunks: f64,
    tokens: f64,
    positions: f64,
    /// Context of a last chunk of one token, which an engine computes like a decode.
    context: f64,
    /// Sum over the chunks of what is resident.
    resident: f64,
}

impl Prefill {
    fn of(row: &Row, batched_tokens: u32) -> Prefill {
        let mut sum = Prefill::default();
        let mut start = row.cached_tokens;
        while start < row.prompt_tokens {
            let tokens = (row.prompt_tokens - start).min(batched_tokens);
            let end = f64::from(start) + f64::from(tokens);
            sum.chunks += 1.0;
            sum.resident += end;
            if tokens == 1 && start > 0 {
                sum.context += end;
            } else {
                let length = f64::from(tokens);
                sum.tokens += length;
                sum.positions += length * (f64::from(start) + length / 2.0);
            }
            start += tokens;
        }
        sum
    }

    fn first_token(&self) -> [f64; TERMS.len()] {
        TERMS.map(|term| match term {
            Term::Base | Term::Sequence => self.chunks,
            Term::Prefill => self.tokens,
            Term::Context => self.context,
            Term::Overhead => 1.0,
            Term::Attention => self.positions,
            Term::Unique => self.resident,
        })
    }

    fn per_token(&self, row: &Row, clients: Clients) -> [f64; TERMS.len()] {
        let count = f64::from(row.concurrency);
        let output = f64::from(row.output_tokens);
        let context = f64::from(row.prompt_tokens) + output / 2.0;
        let shared = f64::from(row.shared_tokens);
        let unique = shared + count * (context - shared);
        // Of the steps of another client, this share computes its prompt and the rest decodes.
        let steps = output - 1.0 + self.chunks;
        let (decoding, prefilling) = match clients {
            Clients::Together => (count, 0.0),
            Clients::Independent => {
                (1.0 + (count - 1.0) * (output - 1.0) / steps, (count - 1.0) / steps)
            }
        };
        TERMS.map(|term| match term {
            Term::Base => 1.0,
            Term::Sequence => count,
            Term::Prefill => prefilling * self.tokens,
            Term::Context => decoding * context + prefilling * self.context,
            Term::Overhead => 0.0,
            Term::Attention => prefilling * self.positions,
            Term::Unique => unique,
        })
    }
}

fn warnings(
    rows: &[Row],
    options: &FitOptions,
    constants: &[Constant],
    points: &[Point],
) -> Vec<String> {
    let mut all = Vec::new();
    for Constant { term, value, error, source } in constants {
        let (name, advice) = (term.name(), term.advice());
        match source {
            Source::InProportion(to) => all.push(format!(
                "{name}: the table cannot tell it ({advice}); taken from {}, in proportion to {}",
                options.like.as_ref().map_or("", |like| &like.name),
                to.name()
            )),
            Source::Missing => all.push(format!(
                "{name}: the table cannot tell it ({advice}{}); it is 0, and its effect is in the \
                 others",
                if *term == Term::Overhead { "" } else { ", or give --like PROFILE" }
            )),
            Source::Fitted if *value == 0.0 && *term != Term::Overhead => {
                all.push(format!("{name}: the table shows no such cost; it is 0 ({advice})"));
            }
            Source::Fitted if *error > CONSTANT_ERROR_MAX * value && *value > 0.0 => {
                all.push(format!("{name}: {value:e} is uncertain by {error:e} ({advice})"));
            }
            Source::Fitted => {}
        }
    }
    let unused = rows.iter().filter(|row| row.ttft_s.is_some() && row.concurrency > 1).count();
    if unused > 0 {
        all.push(format!(
            "ttft_s of {unused} rows above concurrency 1 is not used: it depends on how the \
             requests arrived"
        ));
    }
    let mut errors: Vec<f64> = points.iter().map(|point| point.error().abs()).collect();
    errors.sort_by(f64::total_cmp);
    let median = errors[errors.len() / 2];
    if median > MEDIAN_ERROR_MAX {
        all.push(format!(
            "half of the measurements are off by more than {:.0} %: check units, \
             --batched-tokens, --clients, cached_tokens and shared_tokens",
            median * 100.0
        ));
    }
    all
}
