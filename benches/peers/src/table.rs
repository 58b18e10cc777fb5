//! Tables of Markdown, with a last line of ratios.

/// What a cell shows, and the number by which it is compared.
#[derive(Clone, Default)]
pub struct Cell {
    text: String,
    value: Option<f64>,
}

impl Cell {
    /// Compared by the number.
    pub fn new(value: f64, text: String) -> Cell {
        Cell { text, value: Some(value) }
    }

    /// Shown only.
    pub fn text(text: impl Into<String>) -> Cell {
        Cell { text: text.into(), value: None }
    }
}

/// Which numbers are better.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Lower,
    Higher,
}

/// One table: a row for each subject.
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<(String, Vec<Cell>)>,
    pub better: Better,
}

impl Table {
    /// A table without rows.
    pub fn new(title: impl Into<String>, better: Better) -> Table {
        Table { title: title.into(), columns: Vec::new(), rows: Vec::new(), better }
    }

    /// Puts a cell into the row of a subject, under a column; both come to be when they are new.
    pub fn put(&mut self, subject: &str, column: &str, cell: Cell) {
        let at = match self.columns.iter().position(|name| name == column) {
            Some(at) => at,
            None => {
                self.columns.push(column.to_owned());
                self.columns.len() - 1
            }
        };
        let row = match self.rows.iter().position(|(name, _)| name == subject) {
            Some(row) => row,
            None => {
                self.rows.push((subject.to_owned(), Vec::new()));
                self.rows.len() - 1
            }
        };
        let cells = &mut self.rows[row].1;
        cells.resize(cells.len().max(at + 1), Cell::default());
        cells[at] = cell;
    }

    /// Prints it. The last line compares the best row of ours with the best of the peers', the
    /// naive map and references left out, because they do not do the whole work.
    pub fn print(&self) {
        println!("\n### {}\n", self.title);
        println!("| | {} |", self.columns.join(" | "));
        println!("|---|{}", "---|".repeat(self.columns.len()));
        for (name, cells) in &self.rows {
            let text = |at: usize| match cells.get(at) {
                Some(cell) if !cell.text.is_empty() => cell.text.clone(),
                _ => "-".to_owned(),
            };
            let texts: Vec<String> = (0..self.columns.len()).map(text).collect();
            println!("| {name} | {} |", texts.join(" | "));
        }
        let ratios: Vec<String> = (0..self.columns.len()).map(|at| self.ratio(at)).collect();
        if ratios.iter().any(|ratio| ratio != "-") {
            println!("| **kvroute to the best peer** | {} |", ratios.join(" | "));
        }
    }

    fn ratio(&self, at: usize) -> String {
        let best = |ours: bool| {
            let of = |(name, _): &&(String, Vec<Cell>)| {
                name.starts_with("kvroute") == ours
                    && !name.starts_with("naive")
                    && !name.starts_with("reference")
            };
            let rows = self.rows.iter().filter(of);
            let values = rows.filter_map(|(_, cells)| cells.get(at)?.value);
            match self.better {
                Better::Lower => values.min_by(f64::total_cmp),
                Better::Higher => values.max_by(f64::total_cmp),
            }
        };
        match (best(true), best(false)) {
            (Some(ours), Some(peer)) if peer > 0.0 => format!("{:.2}", ours / peer),
            _ => "-".to_owned(),
        }
    }
}

/// 1,234,567 as it is read.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
