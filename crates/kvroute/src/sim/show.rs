//! What a person sees of a simulation: how far it is, and how it went.

use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kvroute_lab::sim;
use kvroute_lab::summary::{Run, SummaryFile};

use crate::cli::{say, tell};

/// How often the line is drawn.
const REDRAW: Duration = Duration::from_millis(100);
const BAR: usize = 30;

/// A bar on a terminal; nothing in a pipe.
pub struct Progress {
    state: Option<Mutex<State>>,
}

struct State {
    shares: Vec<f64>,
    begun: Instant,
    drawn: Option<Instant>,
}

impl Progress {
    /// Of so many runs.
    pub fn new(runs: usize) -> Progress {
        let state = State { shares: vec![0.0; runs], begun: Instant::now(), drawn: None };
        Progress { state: std::io::stderr().is_terminal().then(|| Mutex::new(state)) }
    }

    /// One run is here.
    pub fn at(&self, run: usize, now: sim::Progress) {
        self.set(run, (now.sent as f64 / now.planned.max(1) as f64).min(0.99));
    }

    /// One run is over.
    pub fn done(&self, run: usize) {
        self.set(run, 1.0);
    }

    fn set(&self, run: usize, share: f64) {
        let Some(state) = &self.state else { return };
        let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(known) = state.shares.get_mut(run) {
            *known = share;
        }
        if state.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW) {
            return;
        }
        state.drawn = Some(Instant::now());
        let runs = state.shares.len().max(1);
        let all = state.shares.iter().sum::<f64>() / runs as f64;
        let filled = (all * BAR as f64) as usize;
        let over = state.shares.iter().filter(|share| **share >= 1.0).count();
        draw(&format!(
            "\r[{}{}] {:3.0} %  run {over} of {runs}  {:.0} s ",
            "=".repeat(filled),
            " ".repeat(BAR - filled.min(BAR)),
            all * 100.0,
            state.begun.elapsed().as_secs_f64()
        ));
    }

    /// Clears the line.
    pub fn end(&self) {
        if self.state.is_some() {
            draw("\r\x1b[2K");
        }
    }
}

#[expect(clippy::print_stderr, reason = "a line that is drawn again and again")]
fn draw(text: &str) {
    eprint!("{text}");
}

/// The figures of all runs, and how they compare with published ones.
pub fn table(file: &SummaryFile, out: Option<&Path>) {
    let seeds = match file.seeds {
        1 => format!("seed {}", file.seed),
        n => format!("mean of {n} seeds from {}", file.seed),
    };
    say(&format!("{}, {seeds}; times in seconds", file.scenario));
    say(&format!(
        "{:<14}{:>10}{:>10}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}",
        "", "tokens/s", "TTFT mean", "TTFT p90", "p99 all", "TPOT", "hit", "queue", "lost"
    ));
    for run in &file.runs {
        say(&line(run));
        if let Some(published) = &run.published {
            let cell = |value: Option<f64>, digits: usize| match value {
                Some(value) => format!("{value:.digits$}"),
                None => "-".to_owned(),
            };
            let figures = &published.summary;
            say(&format!(
                "{:<14}{:>10}{:>10}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}",
                "  published",
                cell(figures.output_tokens_per_s, 0),
                cell(figures.ttft_mean_s, 3),
                cell(figures.ttft_p90_s, 3),
                "-",
                "-",
                "-",
                cell(figures.wait_queue_mean, 1),
                "-"
            ));
        }
    }
    if let Some(dir) = out {
        tell(&format!("report: {}", dir.join("report.html").display()));
    }
}

fn line(run: &Run) -> String {
    let (summary, pooled) = (&run.summary, &run.pooled);
    format!(
        "{:<14}{:>10.0}{:>10.3}{:>10.3}{:>10.3}{:>10.4}{:>9.3}{:>9.1}{:>8.1}%",
        run.name,
        summary.output_tokens_per_s,
        summary.ttft_s.mean,
        summary.ttft_s.p90,
        pooled.summary.ttft_s.p99,
        pooled.summary.itl_s.mean,
        summary.hit_ratio,
        summary.wait_queue.mean,
        pooled.failed_ratio * 100.0
    )
}
