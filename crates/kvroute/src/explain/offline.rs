//! Where would a request have gone, by a snapshot of a router's fleet?

use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use kvroute_core::brain::{SNAPSHOT_FORMAT, Snapshot};
use kvroute_core::plan::{Experimental, Plan};
use kvroute_router::EventsSource;
use kvroute_router::RouterConfig;
use kvroute_router::explain::{Offline, Question as RouterQuestion};
use kvroute_tokens::TokenizerOptions;
use serde::Deserialize;
use serde_json::Value;

use super::Question;
use crate::{cli, config};

/// Longest snapshot that is read, in bytes: as long as the longest that is asked for.
const SNAPSHOT_BYTES_MAX: u64 = super::ask::SNAPSHOT_BYTES_MAX as u64;

/// What every format of a snapshot begins with.
#[derive(Deserialize)]
struct Head {
    format: Option<u32>,
}

/// Explains without a router.
///
/// # Errors
/// The snapshot, the configuration or a tokenizer cannot be used, or a router would refuse the
/// request before it routes it.
pub async fn explain(
    args: &cli::Explain,
    file: &Path,
    question: Question,
) -> anyhow::Result<Value> {
    let snapshot = read(file)?;
    let plan = plan(args, &snapshot)?;
    let notes = notes(args, &snapshot);
    let config = RouterConfig {
        plan,
        config: String::new(),
        seed: snapshot.next_seed,
        http: None,
        ext_proc: None,
        admin: None,
        endpoints: Vec::new(),
        endpoints_file: None,
        endpoints_missing: None,
        metrics: None,
        events: EventsSource::Off.into(),
        tokenizers: config::tokenizers(&args.tokenizers, &TokenizerOptions::default())?,
        default_model: snapshot.host.default_model.clone(),
        tls: None,
        record: None,
        upstream_metric_names: None,
    };
    let offline = Offline::new(config, snapshot)?;
    let Question { body, path, headers, seed } = question;
    let question = RouterQuestion { path, headers, body: body.into(), seed };
    let mut explained = offline.explain(question).await?;
    explained.left_out.splice(0..0, notes);
    Ok(serde_json::to_value(&explained)?)
}

fn read(file: &Path) -> anyhow::Result<Snapshot> {
    let name = file.display();
    let mut text = Vec::new();
    std::fs::File::open(file)
        // One byte more than the limit tells that the file is too long.
        .and_then(|open| open.take(SNAPSHOT_BYTES_MAX + 1).read_to_end(&mut text))
        .with_context(|| format!("cannot read {name}"))?;
    if text.len() as u64 > SNAPSHOT_BYTES_MAX {
        bail!("{name} is longer than {SNAPSHOT_BYTES_MAX} bytes, the limit of a snapshot");
    }
    let how = "write one with: kvroute explain --save-snapshot FILE --admin URL";
    let head: Head = serde_json::from_slice(&text)
        .map_err(|error| anyhow!("{name} is not a snapshot: {error}; {how}"))?;
    match head.format {
        Some(SNAPSHOT_FORMAT) => {}
        Some(found) => bail!(
            "{name} is a snapshot of format {found}, and this version reads {SNAPSHOT_FORMAT}; \
             take it again with this version"
        ),
        None => bail!("{name} is not a snapshot: it has no `format`; {how}"),
    }
    serde_json::from_slice(&text).map_err(|error| anyhow!("{name} is damaged: {error}; {how}"))
}

fn plan(args: &cli::Explain, snapshot: &Snapshot) -> anyhow::Result<Plan> {
    // Whoever ran it had allowed it.
    let experimental = Experimental::Allowed;
    match (&args.config, snapshot.host.config.as_str()) {
        (Some(file), _) => config::load(Some(file), experimental),
        (None, "") => Ok(Plan::least_cost()),
        (None, text) => config::load_text(text, "the snapshot's configuration", experimental),
    }
}

/// Where the answer may differ from the router's.
fn notes(args: &cli::Explain, snapshot: &Snapshot) -> Vec<String> {
    let host = &snapshot.host;
    let mut notes = Vec::new();
    if !host.tokenizers.is_empty() && args.tokenizers.is_empty() {
        notes.push(
            "the router's tokenizer: tokens are estimated here, and match no engine's blocks; \
             give --tokenizer"
                .to_owned(),
        );
    }
    let version = env!("CARGO_PKG_VERSION");
    if host.version != version {
        notes.push(format!("version {} of the router; this one is {version}", host.version));
    }
    notes
}
