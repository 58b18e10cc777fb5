//! `report.html`: one file, no script, nothing fetched.

use std::fmt::Write;

use super::tables::Table;
use super::text::escape;
use super::{Report, plots};

const STYLE: &str = include_str!("page.css");

pub(super) fn page(report: &Report) -> String {
    let title = escape(&report.title());
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n"
    );
    if !report.about.description.is_empty() {
        let _ = writeln!(page, "<p class=\"lead\">{}</p>", escape(&report.about.description));
    }
    page.push_str("<dl>\n");
    for (what, value) in &report.about.facts {
        let _ = writeln!(page, "<dt>{what}</dt><dd>{}</dd>", escape(value));
    }
    page.push_str("</dl>\n");
    for warning in report.warnings() {
        let _ = writeln!(page, "<p class=\"warning\">{}</p>", escape(&warning));
    }
    page.push_str("</header>\n<main>\n");
    by_stage(&mut page, report);
    over_time(&mut page, report);
    for table in report.tables() {
        write_table(&mut page, &table);
    }
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn by_stage(page: &mut String, report: &Report) {
    let plots = plots::by_stage(report);
    if plots.is_empty() {
        return;
    }
    let mut note = String::from("Each stage alone, requests that got no answer left out.");
    if report.file.seeds > 1 {
        let _ = write!(note, " Lines are means of {} seeds, bands their range.", report.file.seeds);
    }
    let pictures: Vec<String> = plots.iter().map(super::plot::Plot::svg).collect();
    section(page, "By stage", &note, &pictures);
}

fn over_time(page: &mut String, report: &Report) {
    let pictures: Vec<String> =
        plots::over_time(report).iter().map(super::plot::Strips::svg).collect();
    if pictures.is_empty() {
        return;
    }
    let seed = report.timelines.first().map_or(0, |timeline| timeline.seed);
    let mut note = String::from("Vertical lines are starts of stages, labelled with their rate.");
    if report.file.seeds > 1 {
        let _ = write!(note, " Seed {seed} only.");
    }
    section(page, "Over time", &note, &pictures);
}

fn section(page: &mut String, title: &str, note: &str, pictures: &[String]) {
    let (title, note) = (escape(title), escape(note));
    let _ = writeln!(page, "<section>\n<h2>{title}</h2>\n<p class=\"note\">{note}</p>");
    page.push_str("<div class=\"plots\">\n");
    for picture in pictures {
        let _ = writeln!(page, "<figure>{picture}</figure>");
    }
    page.push_str("</div>\n</section>\n");
}

fn write_table(page: &mut String, table: &Table) {
    let _ = writeln!(page, "<section>\n<h2>{}</h2>", escape(&table.title));
    if !table.note.is_empty() {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(&table.note));
    }
    page.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    for cell in &table.head {
        let _ = write!(page, "<th>{}</th>", escape(cell));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for cell in row {
            // A range of seeds stands below its mean.
            let _ = match cell.split_once(" [") {
                Some((mean, range)) => {
                    let (mean, range) = (escape(mean), escape(range));
                    write!(page, "<td>{mean}<br><small>[{range}</small></td>")
                }
                None => write!(page, "<td>{}</td>", escape(cell)),
            };
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n</section>\n");
}
