//! What is logged, and how does a line look? llm-d's levels (`-v`, `--zap-log-level`) and formats
//! (`--zap-encoder`) in terms of our own.

use super::flags::EppFlags;

/// The filter: `--zap-log-level` goes before `-v`, and both before `--zap-devel`.
/// llm-d's levels are 2 (default), 3 (verbose), 4 (debug) and 5 (trace).
pub(super) fn filter(flags: &EppFlags) -> &'static str {
    const DEBUG_OWN: &str = "info,kvroute=debug";
    let by_number = |v| match v {
        0..=2 => "info",
        3 => DEBUG_OWN,
        4 => "debug",
        _ => "trace",
    };
    match flags.zap_log_level.as_str() {
        "" if flags.zap_devel && !flags.given.contains("v") => DEBUG_OWN,
        "" => by_number(flags.v),
        "debug" => DEBUG_OWN,
        "info" => "info",
        "warn" => "warn",
        "error" => "error",
        "panic" => "off",
        number => by_number(number.parse().unwrap_or(flags.v)),
    }
}

/// Whether lines are JSON objects, as they are unless something else is said.
pub(super) fn is_json(flags: &EppFlags) -> bool {
    match flags.zap_encoder.as_str() {
        "" => !flags.zap_devel,
        encoder => encoder == "json",
    }
}

#[cfg(test)]
mod tests {
    use super::super::flags::tests::run;
    use super::*;

    #[test]
    fn levels_and_formats() {
        let table: [(&[&str], &str, bool); 16] = [
            (&[], "info", true),
            (&["-v", "0"], "info", true),
            (&["--v=2"], "info", true),
            (&["-v=3"], "info,kvroute=debug", true),
            (&["-v4"], "debug", true),
            (&["-v", "5"], "trace", true),
            (&["-v", "9"], "trace", true),
            (&["--zap-log-level=error", "-v=5"], "error", true),
            (&["--zap-log-level", "debug"], "info,kvroute=debug", true),
            (&["--zap-log-level", "4"], "debug", true),
            (&["--zap-devel"], "info,kvroute=debug", false),
            (&["--zap-devel", "-v=2"], "info", false),
            (&["--zap-devel", "--zap-encoder=json"], "info,kvroute=debug", true),
            (&["--zap-encoder", "console"], "info", false),
            (&["--zap-encoder=JSON", "--zap-log-level=INFO"], "info", true),
            (&["--zap-log-level=Warn", "--zap-encoder=Console"], "warn", false),
        ];
        for (args, expected, json) in table {
            let flags = run(args);
            assert_eq!((filter(&flags), is_json(&flags)), (expected, json), "{args:?}");
            assert!(tracing_subscriber::EnvFilter::try_new(expected).is_ok());
        }
    }
}
