//! How does a report look to a person? One table for each engine, and a line that counts.

use std::fmt::Write;

use super::{EndpointReport, Finding, Report, Status};

/// Columns of a table.
const COLUMNS: usize = 100;
/// Where the words begin: status, name of the check.
const INDENT: usize = 2 + 8 + 16;

/// All tables.
pub(super) fn table(report: &Report) -> String {
    let mut out = String::new();
    for endpoint in &report.endpoints {
        out += &endpoint_table(endpoint);
        out.push('\n');
    }
    let engines = report.endpoints.len();
    let counts = Status::ALL.iter().rev().filter_map(|status| {
        let count = report.count(*status);
        (count > 0).then(|| format!("{count} {}", status.as_str()))
    });
    let counts = counts.collect::<Vec<_>>().join(", ");
    let plural = if engines == 1 { "" } else { "s" };
    // A string takes everything that is written to it.
    let _ = write!(out, "{engines} engine{plural} asked: {counts}");
    out
}

fn endpoint_table(endpoint: &EndpointReport) -> String {
    let mut out = endpoint.endpoint.clone();
    if endpoint.endpoint != endpoint.address {
        out += &format!(" at {}", endpoint.address);
    }
    out.push('\n');
    for finding in &endpoint.findings {
        out += &rows(finding);
    }
    out
}

fn rows(finding: &Finding) -> String {
    let (status, check) = (finding.status.as_str(), finding.check.as_str());
    let mut out = format!("  {status:<8}{check:<16}");
    out += wrapped(&finding.found).trim_start();
    if let Some(change) = &finding.change {
        out += &wrapped(&format!("-> {change}"));
    }
    out
}

/// Lines of at most [`COLUMNS`], each indented and ended.
fn wrapped(text: &str) -> String {
    let (mut out, mut line) = (String::new(), " ".repeat(INDENT));
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            out += &line;
            out.push('\n');
            line = " ".repeat(INDENT);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line += word;
        empty = false;
    }
    out += &line;
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    #[test]
    fn a_table_is_aligned_and_counts() {
        let long = "it says so many words that they do not fit into one line of a terminal and \
                    have to be continued in the next one";
        let findings = vec![
            Finding::new((Check::Reachable, Status::Ok), "GET /", "yes"),
            Finding::new((Check::BlockSize, Status::Wrong), "GET /", long).change("that"),
        ];
        let endpoint = EndpointReport {
            endpoint: "a".into(),
            address: "1.2.3.4:5".into(),
            status: Status::Wrong,
            findings,
        };
        let report = Report { status: Status::Wrong, endpoints: vec![endpoint] };
        let text = report.table();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "a at 1.2.3.4:5");
        assert_eq!(lines[1], "  ok      reachable       yes");
        assert!(lines[2].starts_with("  wrong   block size      it says so"), "{text}");
        assert!(lines[3].starts_with(&" ".repeat(INDENT)), "{text}");
        assert_eq!(lines[4].trim(), "-> that");
        assert_eq!(lines[6], "1 engine asked: 1 wrong, 1 ok");
        assert!(lines.iter().all(|line| line.len() <= COLUMNS));
    }
}
