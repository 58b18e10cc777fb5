//! The table of measurements: CSV or TSV with a header.

/// Largest table, in bytes.
pub const TABLE_BYTES_MAX: usize = 16 << 20;
/// Most rows of a table.
pub const TABLE_ROWS_MAX: usize = 10_000;
/// Largest number of tokens or sequences in a row.
const COUNT_MAX: u32 = 10_000_000;

/// The columns that are known; any other name is an error, so that a slip is not ignored.
const COLUMNS: [&str; 7] = [
    "concurrency",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "shared_tokens",
    "ttft_s",
    "tpot_s",
];

/// One measurement: equal requests at one concurrency.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Row {
    /// Line in the file, from 1.
    pub line: usize,
    /// Sequences that ran at the same time.
    pub concurrency: u32,
    /// Prompt of each.
    pub prompt_tokens: u32,
    /// Of the prompt, found in the engine's cache.
    pub cached_tokens: u32,
    /// Answer of each.
    pub output_tokens: u32,
    /// Tokens at the start of the prompt that all of them share.
    pub shared_tokens: u32,
    /// From sending to the first token.
    pub ttft_s: Option<f64>,
    /// From the first token to the last, over the tokens after the first.
    pub tpot_s: Option<f64>,
}

/// A table that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Too large.
    #[error("{table}: more than {TABLE_BYTES_MAX} bytes or {TABLE_ROWS_MAX} rows")]
    TooLarge {
        /// Name of the file.
        table: String,
    },
    /// No header.
    #[error("{table}: empty; the first line names the columns: {}", COLUMNS.join(","))]
    Empty {
        /// Name of the file.
        table: String,
    },
    /// A cell that makes no sense.
    #[error("{table}:{line}: column {column} ({name}): {message}")]
    Cell {
        /// Name of the file.
        table: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// Its name.
        name: String,
        /// What is wrong and what is expected.
        message: String,
    },
    /// A line that makes no sense as a whole.
    #[error("{table}:{line}: {message}")]
    Line {
        /// Name of the file.
        table: String,
        /// Line, from 1.
        line: usize,
        /// What is wrong and what is expected.
        message: String,
    },
}

/// Reads a table. Empty lines and lines that start with `#` are skipped; columns may come in any
/// order, separated by tabs if the header has one, else by commas.
///
/// # Errors
/// [`TableError`], with line and column.
pub fn parse(text: &str, table: &str) -> Result<Vec<Row>, TableError> {
    let too_large = || TableError::TooLarge { table: table.to_owned() };
    if text.len() > TABLE_BYTES_MAX {
        return Err(too_large());
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(at, line)| (at + 1, line))
        .filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let (line, head) = lines.next().ok_or_else(|| TableError::Empty { table: table.to_owned() })?;
    let reader = Reader::new(table, line, head)?;
    let mut rows = Vec::new();
    for (line, text) in lines {
        if rows.len() == TABLE_ROWS_MAX {
            return Err(too_large());
        }
        rows.push(reader.row(line, text)?);
    }
    match rows.is_empty() {
        true => Err(reader.line(line, "no measurement follows the header".to_owned())),
        false => Ok(rows),
    }
}

/// The header, understood.
struct Reader<'a> {
    table: &'a str,
    separator: char,
    columns: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    fn new(table: &'a str, line: usize, head: &str) -> Result<Reader<'a>, TableError> {
        let separator = if head.contains('\t') { '\t' } else { ',' };
        let mut reader = Reader { table, separator, columns: Vec::new() };
        for (at, name) in head.split(separator).map(bare).enumerate() {
            let known = COLUMNS.iter().find(|known| **known == name).copied();
            let wrong = match known {
                None => Some(format!("not a column; there are: {}", COLUMNS.join(", "))),
                Some(known) if reader.columns.contains(&known) => Some("twice".to_owned()),
                Some(_) => None,
            };
            if let Some(message) = wrong {
                return Err(reader.cell(line, at, name, message));
            }
            reader.columns.extend(known);
        }
        let has = |name: &str| reader.columns.contains(&name);
        if !has("concurrency") || !has("prompt_tokens") || !(has("ttft_s") || has("tpot_s")) {
            let message = "the header needs concurrency, prompt_tokens, and ttft_s or tpot_s";
            return Err(reader.line(line, message.to_owned()));
        }
        Ok(reader)
    }

    fn cell(&self, line: usize, at: usize, name: &str, message: String) -> TableError {
        let (table, name) = (self.table.to_owned(), name.to_owned());
        TableError::Cell { table, line, column: at + 1, name, message }
    }

    fn line(&self, line: usize, message: String) -> TableError {
        TableError::Line { table: self.table.to_owned(), line, message }
    }

    fn row(&self, line: usize, text: &str) -> Result<Row, TableError> {
        let cells: Vec<&str> = text.split(self.separator).map(bare).collect();
        if cells.len() != self.columns.len() {
            let (found, expected) = (cells.len(), self.columns.len());
            return Err(self.line(line, format!("{found} columns, the header has {expected}")));
        }
        let mut row = Row { line, output_tokens: 1, ..Row::default() };
        for (at, (&name, cell)) in self.columns.iter().zip(cells).enumerate() {
            let wrong = |message| self.cell(line, at, name, message);
            match name {
                "ttft_s" => row.ttft_s = seconds(cell).map_err(wrong)?,
                "tpot_s" => row.tpot_s = seconds(cell).map_err(wrong)?,
                _ => {
                    let count = count(cell).map_err(wrong)?;
                    match (name, count) {
                        ("concurrency" | "prompt_tokens", None | Some(0)) => {
                            return Err(wrong("at least 1 is needed".to_owned()));
                        }
                        ("concurrency", Some(count)) => row.concurrency = count,
                        ("prompt_tokens", Some(count)) => row.prompt_tokens = count,
                        ("cached_tokens", Some(count)) => row.cached_tokens = count,
                        ("output_tokens", Some(count)) => row.output_tokens = count,
                        ("shared_tokens", Some(count)) => row.shared_tokens = count,
                        _ => {}
                    }
                }
            }
        }
        self.check(row)
    }

    fn check(&self, row: Row) -> Result<Row, TableError> {
        let message = if row.ttft_s.is_none() && row.tpot_s.is_none() {
            "neither ttft_s nor tpot_s: nothing was measured"
        } else if row.cached_tokens >= row.prompt_tokens {
            "cached_tokens must be below prompt_tokens: an engine computes at least one token"
        } else if row.shared_tokens > row.prompt_tokens {
            "shared_tokens is more than prompt_tokens"
        } else if row.tpot_s.is_some() && row.output_tokens < 2 {
            "tpot_s needs output_tokens of at least 2"
        } else {
            return Ok(row);
        };
        Err(self.line(row.line, message.to_owned()))
    }
}

fn bare(cell: &str) -> &str {
    let cell = cell.trim();
    cell.strip_prefix('"').and_then(|cell| cell.strip_suffix('"')).unwrap_or(cell).trim()
}

fn seconds(cell: &str) -> Result<Option<f64>, String> {
    match cell.parse::<f64>() {
        _ if cell.is_empty() => Ok(None),
        Ok(value) if value.is_finite() && value > 0.0 => Ok(Some(value)),
        _ => Err(format!("{cell:?} is not a number of seconds above 0 (or empty)")),
    }
}

fn count(cell: &str) -> Result<Option<u32>, String> {
    // Load tools print means: 512.0.
    match cell.parse::<f64>() {
        _ if cell.is_empty() => Ok(None),
        Ok(value) if (0.0..=f64::from(COUNT_MAX)).contains(&value) => {
            Ok(Some(value.round() as u32))
        }
        _ => Err(format!("{cell:?} is not a count of 0 to {COUNT_MAX}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_read_with_commas_or_tabs_in_any_order() {
        let csv = "# mine\nconcurrency,prompt_tokens,ttft_s\n\n1,\"100\",0.25\n 4 , 7.0 ,0.5\n";
        let rows = parse(csv, "t").unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].line, rows[0].prompt_tokens, rows[0].ttft_s), (4, 100, Some(0.25)));
        assert_eq!((rows[1].concurrency, rows[1].prompt_tokens, rows[1].tpot_s), (4, 7, None));
        let tsv = "tpot_s\toutput_tokens\tprompt_tokens\tconcurrency\tttft_s\n0.02\t9\t50\t2\t\n";
        let expected = Row {
            line: 2,
            concurrency: 2,
            prompt_tokens: 50,
            output_tokens: 9,
            tpot_s: Some(0.02),
            ..Row::default()
        };
        assert_eq!(parse(tsv, "t").unwrap(), [expected]);
    }

    #[test]
    fn bad_tables_are_refused_with_line_and_column() {
        let head = "concurrency,prompt_tokens,cached_tokens,output_tokens,tpot_s\n";
        for (text, expected) in [
            ("", "t: empty"),
            ("a,b\n", "t:1: column 1 (a): not a column"),
            ("concurrency,concurrency\n", "t:1: column 2 (concurrency): twice"),
            ("concurrency,ttft_s\n1,2\n", "t:1: the header needs"),
            (head, "t:1: no measurement"),
            (&format!("{head}1,2\n"), "t:2: 2 columns, the header has 5"),
            (&format!("{head}\n1,100,0,10,x\n"), "t:3: column 5 (tpot_s): \"x\""),
            (&format!("{head}1,100,0,10,-1\n"), "column 5"),
            (&format!("{head}1,100,0,10,inf\n"), "column 5"),
            (&format!("{head}0,100,0,10,1\n"), "column 1 (concurrency): at least 1"),
            (&format!("{head}1,,0,10,1\n"), "column 2 (prompt_tokens): at least 1"),
            (&format!("{head}1,1e9,0,10,1\n"), "column 2"),
            (&format!("{head}1,100,100,10,1\n"), "cached_tokens must be below"),
            (&format!("{head}1,100,0,1,1\n"), "output_tokens of at least 2"),
            (&format!("{head}1,100,0,10,\n"), "neither"),
        ] {
            let error = parse(text, "t").unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
