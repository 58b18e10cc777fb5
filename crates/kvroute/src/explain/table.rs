//! Aligned columns for a terminal, and the little colour that it gets.

/// Columns of a line that is read without scrolling.
pub const WIDTH: usize = 100;

/// Whether to colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// Text alone.
    Plain,
    /// With ANSI escapes.
    Colour,
}

impl Paint {
    /// What stands out.
    pub fn strong(self, text: &str) -> String {
        self.wrap(text, "1")
    }

    /// What stands back.
    pub fn faint(self, text: &str) -> String {
        self.wrap(text, "2")
    }

    fn wrap(self, text: &str, code: &str) -> String {
        match self {
            Paint::Plain => text.to_owned(),
            Paint::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }
}

/// How a row looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Look {
    /// As all others.
    #[default]
    Usual,
    /// The chosen one.
    Strong,
    /// One that fell out.
    Faint,
}

/// Rows of cells; the first column is left-aligned, the others right-aligned.
#[derive(Debug, Default)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<(Look, Vec<String>)>,
}

impl Table {
    /// A table of these columns.
    pub fn new<S: Into<String>>(head: impl IntoIterator<Item = S>) -> Table {
        Table { head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, look: Look, cells: Vec<String>) {
        self.rows.push((look, cells));
    }

    /// The lines, indented by two; none when there are no rows. Columns after the first that do
    /// not fit into [`WIDTH`] go below, with the first column again.
    pub fn lines(&self, paint: Paint) -> Vec<String> {
        if self.rows.is_empty() {
            return Vec::new();
        }
        let all = || std::iter::once(&self.head).chain(self.rows.iter().map(|(_, row)| row));
        let width = |column: usize| {
            let cells = all().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let mut lines = Vec::new();
        for columns in self.parts(&widths) {
            let line = |row: &[String]| line(row, &columns, &widths);
            lines.push(paint.faint(&line(&self.head)));
            lines.extend(self.rows.iter().map(|(look, row)| match look {
                Look::Usual => line(row),
                Look::Strong => paint.strong(&line(row)),
                Look::Faint => paint.faint(&line(row)),
            }));
        }
        lines
    }

    /// Which columns stand side by side, the first one left out.
    fn parts(&self, widths: &[usize]) -> Vec<Vec<usize>> {
        let first = 2 + widths.first().copied().unwrap_or(0);
        let (mut parts, mut used) = (vec![Vec::new()], first);
        for (column, width) in widths.iter().enumerate().skip(1) {
            let full = used + 2 + width > WIDTH;
            if full && parts.last().is_some_and(|part: &Vec<usize>| !part.is_empty()) {
                parts.push(Vec::new());
                used = first;
            }
            used += 2 + width;
            if let Some(part) = parts.last_mut() {
                part.push(column);
            }
        }
        parts
    }
}

fn line(row: &[String], columns: &[usize], widths: &[usize]) -> String {
    let cell = |column: usize| row.get(column).map_or("", String::as_str);
    let mut line = format!("  {:<width$}", cell(0), width = widths.first().copied().unwrap_or(0));
    for column in columns {
        line += &format!("  {:>width$}", cell(*column), width = widths[*column]);
    }
    line.trim_end().to_owned()
}

/// A number with as many digits as one reads: four significant ones, no trailing zeros.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "-".to_owned();
    }
    let digits = match value.abs() {
        n if n >= 1000.0 => 0,
        n if n >= 100.0 => 1,
        n if n >= 10.0 => 2,
        n if n >= 1.0 || n == 0.0 => 3,
        n if n >= 0.01 => 4,
        _ => 6,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// A count with its thousands apart.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let table = [
            (0.0, "0"),
            (1.0, "1"),
            (0.5, "0.5"),
            (2.98765, "2.988"),
            (0.000_123_4, "0.000123"),
            (12_345.6, "12346"),
            (-0.25, "-0.25"),
            (f64::NAN, "-"),
        ];
        for (value, text) in table {
            assert_eq!(number(value), text);
        }
        assert_eq!(
            [count(0), count(999), count(1000), count(1_234_567)].join(" "),
            "0 999 1,000 1,234,567"
        );
    }

    #[test]
    fn columns_that_do_not_fit_go_below() {
        let long = "c".repeat(60);
        let mut table = Table::new(["name", long.as_str(), long.as_str()]);
        table.row(Look::Strong, vec!["a".into(), "1".into(), "2".into()]);
        let lines = table.lines(Paint::Plain);
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|line| line.len() <= WIDTH));
        assert!(lines[1].ends_with('1') && lines[3].ends_with('2'), "{lines:?}");
        assert!(table.lines(Paint::Colour)[1].starts_with("\x1b[1m"));
    }
}
