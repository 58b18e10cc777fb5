//! Reads a file that a person wrote (YAML, or JSON, which is YAML too) into a type, strictly, with
//! errors that point at the place.

use serde::de::DeserializeOwned;
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::{MessageFormatter, UserMessageFormatter};
use thiserror::Error;

pub use crate::yaml_tree::Tree;

/// Deepest nesting of a file; each level takes some 40 KB of stack while it is read unoptimized.
pub const DEPTH_MAX: usize = 24;

/// Lines that an error shows before and after the one that is wrong.
const LINES_BEFORE: u64 = 2;
const LINES_AFTER: u64 = 1;

/// Width of what an error shows of a file, in characters.
const SHOWN_COLUMNS_MAX: usize = 100;

/// What usually causes a complaint of the parser.
const HINTS: [(&str, &str); 3] = [
    ("mapping values are not allowed", "is the line indented like those around it?"),
    ("tabs disallowed", "indent with spaces"),
    ("quoted scalar", "is a closing quote missing?"),
];

/// Why a file was refused. Its text holds file, line, column, the lines around and, where a name
/// is unknown, the valid ones.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{rendered}")]
pub struct YamlError {
    /// The file, as the caller names it.
    pub file: String,
    /// Line of the fault, from 1; `None` when it has no place.
    pub line: Option<u32>,
    /// Column of the fault, from 1.
    pub column: Option<u32>,
    /// What is wrong there, as `plugins[2].parameters.threshold`; empty where nothing has a name.
    pub path: Box<str>,
    /// What is wrong, without its place.
    pub message: String,
    /// The whole message, several lines.
    pub rendered: String,
}

impl YamlError {
    /// An error at no particular place.
    pub fn of_file(file: &str, message: &str) -> YamlError {
        YamlError {
            file: file.to_owned(),
            line: None,
            column: None,
            path: Box::default(),
            message: message.to_owned(),
            rendered: format!("error in {file}: {message}"),
        }
    }

    /// An error at a place (line and column) of a text, which is shown.
    pub fn at(text: &str, file: &str, (line, column): (u64, u64), message: &str) -> YamlError {
        let rendered = match snippet(text, line, column, message) {
            Some(shown) => format!("error in {file}\n --> {file}:{line}:{column}\n{shown}"),
            None => format!("error in {file}:{line}:{column}: {message}"),
        };
        let number = |value| Some(u32::try_from(value).unwrap_or(u32::MAX));
        let (line, column) = (number(line), number(column));
        YamlError { line, column, rendered, ..YamlError::of_file(file, message) }
    }

    /// The same about something with a name.
    pub fn of_path(self, path: &str) -> YamlError {
        YamlError { path: path.into(), ..self }
    }
}

/// Reads one document. Duplicate keys are errors; aliases and depth are bounded.
///
/// # Errors
/// What is wrong, with its place.
pub fn read<T: DeserializeOwned>(text: &str, file: &str, bytes_max: usize) -> Result<T, YamlError> {
    Tree::parse(text, file, bytes_max)?.read()
}

/// Refuses a text that is too long to be what it should be.
pub(crate) fn check_size(text: &str, file: &str, bytes_max: usize) -> Result<(), YamlError> {
    if text.len() <= bytes_max {
        return Ok(());
    }
    let message = format!("{} bytes, more than the limit of {bytes_max}", text.len());
    Err(YamlError::of_file(file, &message))
}

/// An error of the parser in our own form.
pub(crate) fn of_parser(text: &str, file: &str, error: &serde_saphyr::Error) -> YamlError {
    let message = match error.without_snippet() {
        serde_saphyr::Error::MultipleDocuments { .. } => {
            "a second document begins here (`---`); one file holds one configuration".into()
        }
        serde_saphyr::Error::Budget { breach, .. } => match breach {
            BudgetBreach::Depth { .. } => format!("nested deeper than {DEPTH_MAX} levels").into(),
            _ => "too large or too complex".into(),
        },
        plain => {
            let message = UserMessageFormatter.format_message(plain);
            let hint = HINTS.iter().find(|(part, _)| message.contains(part));
            hint.map_or(message.clone(), |(_, hint)| format!("{message}; {hint}").into())
        }
    };
    match error.location() {
        Some(place) if place.line() > 0 => {
            YamlError::at(text, file, (place.line(), place.column()), &message)
        }
        _ => YamlError::of_file(file, &message),
    }
}

/// The lines around a place, with the message under what it is about. `None` where the text has
/// no such line.
fn snippet(text: &str, line: u64, column: u64, message: &str) -> Option<String> {
    let first = line.saturating_sub(LINES_BEFORE).max(1);
    let skipped = usize::try_from(first - 1).ok()?;
    let lines: Vec<(u64, &str)> =
        (first..=line.saturating_add(LINES_AFTER)).zip(text.lines().skip(skipped)).collect();
    let wrong = lines.iter().find(|(number, _)| *number == line).map(|(_, text)| *text)?;
    let column = usize::try_from(column).ok()?.saturating_sub(1).min(wrong.chars().count());
    let left = if column + 20 < SHOWN_COLUMNS_MAX { 0 } else { column - SHOWN_COLUMNS_MAX / 3 };
    let shown = |line: &str| -> String {
        let visible = line.chars().skip(left).take(SHOWN_COLUMNS_MAX);
        let plain = visible.map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
        plain.trim_end().to_owned()
    };
    let margin = line.saturating_add(LINES_AFTER).to_string().len();
    let mut out = format!("{:margin$} |\n", "");
    for (number, text) in lines {
        let text = shown(text);
        if number > line && text.is_empty() {
            break;
        }
        out.push_str(format!("{number:margin$} | {text}").trim_end());
        out.push('\n');
        if number == line {
            let width = extent(wrong, column).min(SHOWN_COLUMNS_MAX - (column - left));
            let (before, carets) = (" ".repeat(column - left), "^".repeat(width));
            out.push_str(&format!("{:margin$} | {before}{carets}", ""));
            tell(&mut out, margin, column - left + width, message);
        }
    }
    Some(out.trim_end().to_owned())
}

/// The message beside the carets, or below them where it is too long.
fn tell(out: &mut String, margin: usize, used: usize, message: &str) {
    if used + message.chars().count() < SHOWN_COLUMNS_MAX && !message.contains('\n') {
        out.push_str(&format!(" {message}\n"));
        return;
    }
    let mut line = String::new();
    for word in message.split_whitespace() {
        if line.chars().count() + word.chars().count() >= SHOWN_COLUMNS_MAX {
            out.push_str(&format!("\n{:margin$} | {line}", ""));
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    out.push_str(&format!("\n{:margin$} | {line}\n", ""));
}

/// How many characters of a line belong to the key or value that begins at a column (from 0).
fn extent(line: &str, column: usize) -> usize {
    let rest: Vec<char> = line.chars().skip(column).collect();
    let end = match rest.first() {
        Some(quote @ ('"' | '\'')) => rest.iter().skip(1).position(|c| c == quote).map(|at| at + 2),
        Some('[' | '{') => Some(1),
        _ => (0..rest.len()).find(|&at| {
            let next = rest.get(at + 1);
            match rest[at] {
                ',' | ']' | '}' => true,
                ':' => next.is_none_or(|c| c.is_whitespace()),
                ' ' => next == Some(&'#'),
                _ => false,
            }
        }),
    };
    let text: String = rest.into_iter().take(end.unwrap_or(usize::MAX)).collect();
    text.trim_end().chars().count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(text: &str, line: u64, column: u64, message: &str) -> String {
        YamlError::at(text, "f", (line, column), message).rendered
    }

    #[test]
    fn the_caret_is_under_the_whole_name_or_value() {
        let table = [
            ("a: b", 0, 1),
            ("name: some text # why", 6, 9),
            ("{a: b, c: d}", 4, 1),
            ("x: \"a: b\" # c", 3, 6),
            ("x: 'open", 3, 5),
            ("- [1, 2]", 2, 1),
            ("url: http://a:1/b", 5, 12),
            ("", 0, 1),
            ("ö: größe", 3, 5),
        ];
        for (line, column, expected) in table {
            assert_eq!(extent(line, column), expected, "{line}");
        }
    }

    #[test]
    fn a_place_is_shown_with_its_neighbours() {
        let text = "one: 1\ntwo: 2\nthree: 3\nfour: 4\nfive: 5\n";
        let expected = "\
error in f
 --> f:4:7
  |
2 | two: 2
3 | three: 3
4 | four: 4
  |       ^ is not five
5 | five: 5";
        assert_eq!(rendered(text, 4, 7, "is not five"), expected);
        let long = "word ".repeat(40);
        let text = rendered("a: b", 1, 1, &long);
        assert!(text.lines().all(|line| line.len() < 110), "{text}");
        assert_eq!(text.matches("word").count(), 40, "{text}");
    }

    #[test]
    fn a_long_line_is_cut_around_the_place() {
        let line = format!("{{\"a\": \"{}\", \"b\": 1, \"c\": 2}}", "x".repeat(5_000));
        let column = line.find("\"b\"").unwrap() as u64 + 1;
        let text = rendered(&line, 1, column, "unknown");
        let lines: Vec<&str> = text.lines().collect();
        let at = lines[4].find("^^^").unwrap();
        assert_eq!(&lines[3][at..at + 3], "\"b\"", "{text}");
        assert!(text.len() < 400, "{text}");
    }

    #[test]
    fn places_that_a_text_has_not_do_no_harm() {
        for (text, line, column) in [("", 1, 1), ("a", 9, 9), ("a", 1, 90), ("a\u{7}\tb", 1, 2)] {
            let shown = rendered(text, line, column, "m");
            assert!(shown.contains('m') && !shown.contains('\u{7}'), "{shown}");
        }
        assert!(rendered("a", 0, 0, "m").contains('m'));
        assert!(rendered("a", u64::MAX, u64::MAX, "m").contains('m'));
    }
}
