//! What the demo shows: a live view on a terminal, nothing in a pipe, and a table at the end.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kvroute_lab::load::Progress;
use kvroute_lab::summary::{Summary, SummaryFile};
use kvroute_router::RouterHandle;

use super::fleet::Fleet;
use crate::cli::say;

const REDRAW: Duration = Duration::from_millis(100);
const BAR: usize = 20;

/// The live view.
pub struct View {
    on: bool,
    engines: usize,
    name: &'static str,
    admin: Option<SocketAddr>,
    drawn: Option<Instant>,
}

impl View {
    /// A view of that many engines, if standard error is a terminal.
    pub fn new(engines: usize) -> View {
        let on = std::io::stderr().is_terminal();
        View { on, engines, name: "", admin: None, drawn: None }
    }

    /// Another run begins.
    pub fn begin(&mut self, name: &'static str, admin: SocketAddr) {
        self.name = name;
        self.admin = Some(admin);
        self.drawn = None;
    }

    /// Shows how far the run is, ten times a second at most.
    pub fn draw(&mut self, progress: Progress, fleet: &Fleet, router: &RouterHandle) {
        let last = progress.ended == progress.planned;
        let fresh = !last && self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW);
        if !self.on || fresh {
            return;
        }
        let mut text = String::new();
        if self.drawn.is_some() {
            text += &format!("\x1b[{}A", self.engines + 2);
        }
        self.drawn = Some(Instant::now());
        text += &self.head(progress, router);
        for (at, engine) in fleet.engines().iter().enumerate() {
            let stats = engine.stats();
            text += &format!(
                "\x1b[2K  engine {}  running {:>3}  waiting {:>3}  KV {} {:>3.0} %\n",
                at + 1,
                stats.running,
                stats.waiting,
                bar(stats.kv_usage, BAR / 2),
                stats.kv_usage * 100.0
            );
        }
        // A terminal that went away is no reason to stop measuring.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    fn head(&self, progress: Progress, router: &RouterHandle) -> String {
        let done = progress.ended as f64 / progress.planned.max(1) as f64;
        let account = *router.brain().ledger().total();
        let prompt_tokens = account.reported.prompt_tokens.max(1);
        let hit = account.delivered_tokens as f64 / prompt_tokens as f64;
        let admin = self.admin.map(|at| format!("http://{at}/index")).unwrap_or_default();
        format!(
            "\x1b[2K{:<11} [{}] {:>4} of {} answered, hit ratio {hit:.2}\n\
             \x1b[2K  look inside: {admin}\n",
            self.name,
            bar(done, BAR),
            progress.ended,
            progress.planned,
        )
    }

    /// The run is over: its last picture stays, the next begins below.
    pub fn end(&mut self) {
        self.drawn = None;
    }
}

fn bar(share: f64, width: usize) -> String {
    let full = ((share.clamp(0.0, 1.0) * width as f64).round()) as usize;
    format!("{}{}", "█".repeat(full), "░".repeat(width - full))
}

/// Title, value, digits after the point.
type Figure = (&'static str, fn(&Summary) -> f64, usize);

/// The closing table: a column for each run, and how the second compares with the first.
pub fn table(file: &SummaryFile) {
    let [_, after, ..] = file.runs.as_slice() else { return };
    say("");
    let names: String = file.runs.iter().map(|run| format!("{:>14}", run.name)).collect();
    say(&format!("{:<28}{names}{:>12}", "", "factor"));
    let rows: [Figure; 8] = [
        ("hit ratio", |s| s.hit_ratio, 3),
        ("TTFT p50, s", |s| s.ttft_s.p50, 3),
        ("TTFT p90, s", |s| s.ttft_s.p90, 3),
        ("time between tokens, s", |s| s.itl_s.mean, 4),
        ("output tokens/s", |s| s.output_tokens_per_s, 0),
        ("requests/s", |s| s.requests_per_s, 1),
        ("waiting per engine, mean", |s| s.wait_queue.mean, 2),
        ("waiting per engine, max", |s| s.wait_queue.max, 0),
    ];
    for (title, value, digits) in rows {
        let values: Vec<f64> = file.runs.iter().map(|run| value(&run.pooled.summary)).collect();
        say(&row(title, &values, digits));
    }
    say("");
    say(&format!(
        "{} requests each, {} failed; seed {}. Engines: Qwen3-32B on two H100, simulated\n\
         at double speed. Times are what a client measured.",
        after.summary.requests,
        file.runs.iter().map(|run| run.failed).sum::<u64>(),
        file.seed
    ));
}

fn row(title: &str, values: &[f64], digits: usize) -> String {
    let factor = match *values {
        [b, a, ..] if b > 0.0 && a >= b => format!("x {:.1}", a / b),
        [b, a, ..] if a > 0.0 && b > 0.0 => format!("/ {:.1}", b / a),
        _ => "-".to_owned(),
    };
    let columns: String = values.iter().map(|value| format!("{value:>14.digits$}")).collect();
    format!("{title:<28}{columns}{factor:>12}")
}
