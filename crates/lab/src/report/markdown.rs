//! `report.md`.

use std::fmt::Write;

use super::Report;
use super::tables::Table;

pub(super) fn page(report: &Report) -> String {
    let mut page = format!("# {}\n\n", escape(&report.title()));
    if !report.about.description.is_empty() {
        let _ = write!(page, "{}\n\n", escape(&report.about.description));
    }
    for (what, value) in &report.about.facts {
        let _ = writeln!(page, "- {what}: {}", escape(value));
    }
    for warning in report.warnings() {
        let _ = write!(page, "\n**{}**\n", escape(&warning));
    }
    for table in report.tables() {
        write_table(&mut page, &table);
    }
    page
}

fn write_table(page: &mut String, table: &Table) {
    let _ = write!(page, "\n## {}\n\n", escape(&table.title));
    if !table.note.is_empty() {
        let _ = write!(page, "{}\n\n", escape(&table.note));
    }
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| escape(cell)).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    page.push_str(&line(&table.head));
    let rules = (0..table.head.len()).map(|at| if at == 0 { "---" } else { "---:" });
    let _ = writeln!(page, "| {} |", rules.collect::<Vec<_>>().join(" | "));
    for row in &table.rows {
        page.push_str(&line(row));
    }
}

/// Text that stays text, in one line and in one cell.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '\\' | '|' | '`' | '*' | '[' | ']' => escaped.extend(['\\', c]),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}
