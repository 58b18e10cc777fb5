//! `kvroute fit`: a hardware profile from times that somebody measured on an engine.

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use kvroute_lab::fit::{self, Clients, Fit, FitOptions, Source};

use crate::cli::{self, say, tell};
use crate::engine;

/// Runs `kvroute fit`.
///
/// # Errors
/// The table cannot be read, makes no sense, or does not determine a profile.
pub fn main(args: &cli::Fit) -> anyhow::Result<ExitCode> {
    let file = args.table.display().to_string();
    let rows = fit::parse(&read(&args.table)?, &file)?;
    let named_after = || args.table.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let options = FitOptions {
        name: args.name.clone().or_else(named_after).unwrap_or_default(),
        batched_tokens: args.batched_tokens,
        clients: match args.clients {
            cli::FitClients::Together => Clients::Together,
            cli::FitClients::Independent => Clients::Independent,
        },
        like: args.like.as_deref().map(engine::profile).transpose().context("--like")?,
    };
    let fit = fit::fit(&rows, &options).context(file)?;
    show(&fit);
    say(&serde_json::to_string_pretty(&fit.profile)?);
    Ok(ExitCode::SUCCESS)
}

fn read(path: &Path) -> anyhow::Result<String> {
    let context = || format!("cannot read the table {}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).with_context(context)?;
    // One byte more than allowed, so that the reader of the table sees that it is too large.
    let mut file = file.take(fit::TABLE_BYTES_MAX as u64 + 1);
    file.read_to_string(&mut text).with_context(context)?;
    Ok(text)
}

fn show(fit: &Fit) {
    tell("line column    measured s     fitted s    error");
    for point in &fit.points {
        let (measured, modelled) = (point.measured, point.modelled);
        let error = point.error() * 100.0;
        tell(&format!(
            "{:>4} {:<7}{measured:>13.5}{modelled:>13.5}{error:>7.1} %",
            point.line, point.column
        ));
    }
    tell("");
    for constant in &fit.constants {
        let from = match constant.source {
            Source::Fitted => format!("± {:.1e}", constant.error),
            Source::InProportion(to) => format!("in proportion to {}", to.name()),
            Source::Missing => "not in the table".to_owned(),
        };
        tell(&format!("{:<26}{:>12.4e}  {from}", constant.term.name(), constant.value));
    }
    for warning in &fit.warnings {
        tell(&format!("warning: {warning}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_fitted_and_a_bad_one_named() {
        let path = std::env::temp_dir().join(format!("kvroute-fit-{}.csv", std::process::id()));
        let args = cli::Fit {
            table: path.clone(),
            name: None,
            batched_tokens: 8192,
            like: Some("tiny".to_owned()),
            clients: cli::FitClients::Together,
        };
        let head = "concurrency,prompt_tokens,output_tokens,ttft_s,tpot_s\n";
        std::fs::write(&path, format!("{head}1,1000,100,0.1,0.02\n1,4000,100,0.3,0.02\n")).unwrap();
        assert_eq!(main(&args).unwrap(), ExitCode::SUCCESS);
        std::fs::write(&path, format!("{head}1,1000,100,0.1,fast\n")).unwrap();
        let error = format!("{:#}", main(&args).unwrap_err());
        assert!(error.contains(".csv:2: column 5 (tpot_s): \"fast\""), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(format!("{:#}", main(&args).unwrap_err()).contains("cannot read the table"));
    }
}
