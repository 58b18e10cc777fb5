//! `kvroute explain`: where does a request go, and why?
//!
//! A running router is asked over its admin address; without one, a snapshot is decided on by the
//! same code. Both answers have one form, which `--json` prints and a terminal shows as tables.

mod ask;
mod change;
mod offline;
mod render;
mod table;
mod view;

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use http::HeaderMap;
use serde_json::Value;

use crate::cli;
pub use table::Paint;
use view::Shown;

/// Longest request file that is read, in bytes.
const REQUEST_BYTES_MAX: u64 = 1 << 30;

/// Runs `kvroute explain`.
///
/// # Errors
/// A file cannot be read or is wrong, the router cannot be reached, or knows no such decision.
pub fn main(args: &cli::Explain) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if let Some(file) = &args.save_snapshot {
        let bytes = runtime.block_on(ask::snapshot(&args.admin))?;
        write_private(file, &bytes)?;
        let size = table::count(bytes.len() as u64);
        cli::say(&format!("Wrote {} ({size} bytes).", file.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let answer = runtime.block_on(answer(args))?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&answer)?,
        false => {
            let colour = std::io::stdout().is_terminal();
            text(&answer, if colour { Paint::Colour } else { Paint::Plain })?
        }
    };
    cli::say(&text);
    Ok(ExitCode::SUCCESS)
}

async fn answer(args: &cli::Explain) -> anyhow::Result<Value> {
    if let Some(id) = &args.decision {
        return ask::decision(&args.admin, id).await;
    }
    let file = args.request.as_deref().context("no request file")?;
    let question = Question {
        body: request(file)?,
        path: args.path.clone(),
        headers: headers(&args.headers)?,
        seed: args.seed.as_deref().map(seed).transpose()?,
    };
    match &args.snapshot {
        Some(snapshot) => offline::explain(args, snapshot, question).await,
        None => ask::explain(&args.admin, &question).await,
    }
}

/// A request as typed.
pub struct Question {
    body: Vec<u8>,
    path: Option<String>,
    headers: HeaderMap,
    seed: Option<u64>,
}

/// An answer of the admin address, or of [`kvroute_router::explain`], as a person reads it.
///
/// # Errors
/// It is no such answer.
pub fn text(answer: &Value, paint: Paint) -> anyhow::Result<String> {
    let shown: Shown = serde_json::from_value(answer.clone())
        .context("this is not the answer of a router of this version")?;
    Ok(render::lines(&shown, paint).join("\n"))
}

/// One decision as a person reads it.
pub fn decision_text(record: &kvroute_core::decision::DecisionRecord, paint: Paint) -> String {
    match Shown::of_record(record) {
        Ok(shown) => render::lines(&shown, paint).join("\n"),
        Err(error) => format!("the decision cannot be shown: {error}"),
    }
}

/// The body of a request, from a file or, as `-`, from standard input. It is checked to be JSON:
/// a router says no more than that about nonsense, and this says where.
fn request(file: &Path) -> anyhow::Result<Vec<u8>> {
    let mut body = Vec::new();
    let name = match file.as_os_str() == "-" {
        true => {
            std::io::stdin().lock().take(REQUEST_BYTES_MAX).read_to_end(&mut body)?;
            "standard input".to_owned()
        }
        false => {
            let name = file.display().to_string();
            let opened =
                std::fs::File::open(file).with_context(|| format!("cannot read {name}"))?;
            opened.take(REQUEST_BYTES_MAX).read_to_end(&mut body).with_context(|| name.clone())?;
            name
        }
    };
    let parsed = serde_json::from_slice::<Value>(&body).map_err(|error| {
        anyhow!("{name} is not JSON: {error}; give the body that a client would post")
    })?;
    if !parsed.is_object() {
        bail!("{name} is not a request: give the JSON object that a client would post");
    }
    Ok(body)
}

fn headers(flags: &[String]) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for flag in flags {
        let (name, value) =
            kvroute_router::explain::header(flag).map_err(|text| anyhow!("--header {text}"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn seed(text: &str) -> anyhow::Result<u64> {
    u64::from_str_radix(text, 16).map_err(|_| {
        anyhow!("--seed {text}: write the hexadecimal number that a decision shows as its seed")
    })
}

/// Readable by its owner alone: labels, models and session ids are nobody else's business.
fn write_private(file: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let write = || {
        let mut options = std::fs::OpenOptions::new();
        let mut opened = options.write(true).create(true).truncate(true).mode(0o600).open(file)?;
        // A file that was there keeps its mode when it is opened. What is no file (a pipe) is
        // left as it is.
        if opened.metadata()?.is_file() {
            opened.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        }
        opened.write_all(bytes)
    };
    write().with_context(|| format!("cannot write {}", file.display()))
}
