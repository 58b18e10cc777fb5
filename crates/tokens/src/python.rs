//! How does Python write this value?
//!
//! Chat templates are run by Jinja on Python, so what they print is what `str()`, `repr()`,
//! `json.dumps()` and `strftime()` make of a value. One different space is another prompt.

use std::fmt::Write;

use minijinja::Value;
use minijinja::value::ValueKind;

/// Deepest nesting that is written. JSON that comes in is at most 128 deep; templates could build
/// deeper values.
const DEPTH_MAX: usize = 200;

/// A value is nested deeper than any request can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooDeep;

/// Whether Python's `str.isspace` holds: Unicode white space, and the four separators U+001C to
/// U+001F, which Unicode does not count.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Whether `str.splitlines` ends a line at this character.
pub(crate) fn is_line_end(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// Appends `str(value)`.
pub(crate) fn write_str(out: &mut String, value: &Value) -> Result<(), TooDeep> {
    match value.as_str() {
        Some(text) => out.push_str(text),
        None => write_repr(out, value, 0)?,
    }
    Ok(())
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), TooDeep> {
    if depth > DEPTH_MAX {
        return Err(TooDeep);
    }
    if let Some(text) = value.as_str() {
        write_quoted(out, text);
        return Ok(());
    }
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::Number => write_number(out, value, "inf", "nan"),
        ValueKind::Seq | ValueKind::Iterable => {
            let is_tuple = value.is_tuple();
            out.push(if is_tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter().into_iter().flatten() {
                separate(out, count, ", ");
                count += 1;
                write_repr(out, &item, depth + 1)?;
            }
            out.push_str(match (is_tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                separate(out, index, ", ");
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key).unwrap_or_default(), depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn separate(out: &mut String, index: usize, separator: &str) {
    if index > 0 {
        out.push_str(separator);
    }
}

/// `repr` of a string: single quotes unless only they occur inside, escapes for what does not
/// print.
fn write_quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => {
                out.push('\\');
                out.push(c);
            }
            ' ' => out.push(' '),
            _ if c.is_control() || c.is_whitespace() || is_invisible(c) => {
                let code = u32::from(c);
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
            _ => out.push(c),
        }
    }
    out.push(quote);
}

/// The format characters that `str.isprintable` refuses and that occur in real text: soft hyphen,
/// joiners, direction marks, byte order mark, private use.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{e000}'..='\u{f8ff}'
            | '\u{feff}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}'
            | '\u{f0000}'..='\u{10ffff}'
    )
}

/// An integer as it is, a float as `repr` writes it.
fn write_number(out: &mut String, value: &Value, infinite: &str, not_a_number: &str) {
    if value.is_integer() {
        out.push_str(&value.to_string());
        return;
    }
    let Ok(number) = f64::try_from(value.clone()) else {
        out.push_str(&value.to_string());
        return;
    };
    if number.is_nan() {
        out.push_str(not_a_number);
    } else if number.is_infinite() {
        out.push_str(if number < 0.0 { "-" } else { "" });
        out.push_str(infinite);
    } else {
        write_float(out, number);
    }
}

/// The shortest digits that read back as `number`, in plain notation from 1e-4 up to below 1e16
/// and with an exponent of at least two digits otherwise, as CPython's `float_repr_style`
/// `short` does.
fn write_float(out: &mut String, number: f64) {
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = number.to_string();
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        out.push_str(&format!("{digits}e{sign}{:02}", exponent.unsigned_abs()));
    }
}

/// How `json.dumps` is told to write.
#[derive(Clone, Debug)]
pub(crate) struct JsonStyle {
    /// The text of one level; `None` writes one line.
    pub(crate) indent: Option<String>,
    /// Between two items.
    pub(crate) item_separator: String,
    /// Between a key and its value.
    pub(crate) key_separator: String,
    /// Escape everything that is not ASCII.
    pub(crate) ensure_ascii: bool,
    /// Keys in the order of their code points.
    pub(crate) sort_keys: bool,
}

impl JsonStyle {
    /// The separators that `json.dumps` takes when none are given.
    pub(crate) fn new(indent: Option<String>) -> JsonStyle {
        let item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
        let key_separator = ": ".to_owned();
        JsonStyle { indent, item_separator, key_separator, ensure_ascii: false, sort_keys: false }
    }
}

/// Appends `json.dumps(value)`. An undefined value is written as `null`, where Python would raise.
pub(crate) fn write_json(
    out: &mut String,
    value: &Value,
    style: &JsonStyle,
    depth: usize,
) -> Result<(), TooDeep> {
    if depth > DEPTH_MAX {
        return Err(TooDeep);
    }
    if let Some(text) = value.as_str() {
        write_json_string(out, text, style.ensure_ascii);
        return Ok(());
    }
    match value.kind() {
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_number(out, value, "Infinity", "NaN"),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut count = 0;
            for item in value.try_iter().into_iter().flatten() {
                separate(out, count, &style.item_separator);
                count += 1;
                new_line(out, style, depth + 1);
                write_json(out, &item, style, depth + 1)?;
            }
            if count > 0 {
                new_line(out, style, depth);
            }
            out.push(']');
        }
        ValueKind::Map => write_json_map(out, value, style, depth)?,
        _ => out.push_str("null"),
    }
    Ok(())
}

fn write_json_map(
    out: &mut String,
    value: &Value,
    style: &JsonStyle,
    depth: usize,
) -> Result<(), TooDeep> {
    let mut keys: Vec<Value> = value.try_iter().into_iter().flatten().collect();
    if style.sort_keys {
        keys.sort();
    }
    out.push('{');
    for (index, key) in keys.iter().enumerate() {
        separate(out, index, &style.item_separator);
        new_line(out, style, depth + 1);
        match key.as_str() {
            Some(text) => write_json_string(out, text, style.ensure_ascii),
            None => {
                let mut text = String::new();
                write_json(&mut text, key, style, depth + 1)?;
                write_json_string(out, &text, style.ensure_ascii);
            }
        }
        out.push_str(&style.key_separator);
        write_json(out, &value.get_item(key).unwrap_or_default(), style, depth + 1)?;
    }
    if !keys.is_empty() {
        new_line(out, style, depth);
    }
    out.push('}');
    Ok(())
}

fn new_line(out: &mut String, style: &JsonStyle, depth: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        for _ in 0..depth {
            out.push_str(indent);
        }
    }
}

/// Appends a string as `json.dumps` does.
pub(crate) fn write_json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            // With ASCII only, DEL is escaped too: json's pattern is "not space to tilde".
            _ if c < ' ' || (ensure_ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// Appends `datetime.strftime(format)` in the C locale for a moment in seconds since 1970, with the
/// engine's offset from UTC already added. `None` for a code that is not implemented.
pub(crate) fn strftime(out: &mut String, format: &str, seconds: i64) -> Option<()> {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = (days + 3).rem_euclid(7) as usize;
    let day_of_year = days - days_from_civil(year, 1, 1) + 1;
    let month_name = MONTHS.get(month as usize - 1)?;
    let hour_12 = (hour + 11) % 12 + 1;
    let short_year = year.rem_euclid(100);
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next()?;
        let is_bare = code == '-';
        if is_bare {
            code = chars.next()?;
        }
        let mut number = |value: i64, width: usize| {
            let width = if is_bare { 0 } else { width };
            write!(out, "{value:0width$}")
        };
        let written = match code {
            'Y' => number(year, 0),
            'y' => number(short_year, 2),
            'm' => number(month, 2),
            'd' => number(day, 2),
            'e' => write!(out, "{day:2}"),
            'j' => number(day_of_year, 3),
            'H' => number(hour, 2),
            'I' => number(hour_12, 2),
            'M' => number(minute, 2),
            'S' => number(second, 2),
            'p' => out.write_str(if hour < 12 { "AM" } else { "PM" }),
            'B' => out.write_str(month_name),
            'b' | 'h' => out.write_str(month_name.get(..3)?),
            'A' => out.write_str(WEEKDAYS.get(weekday)?),
            'a' => out.write_str(WEEKDAYS.get(weekday)?.get(..3)?),
            'F' => write!(out, "{year}-{month:02}-{day:02}"),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            'D' => write!(out, "{month:02}/{day:02}/{short_year:02}"),
            'R' => write!(out, "{hour:02}:{minute:02}"),
            // A naive datetime has no zone.
            'Z' | 'z' => Ok(()),
            'f' => out.write_str("000000"),
            '%' => out.write_str("%"),
            _ => return None,
        };
        written.ok()?;
    }
    Some(())
}

/// Year, month and day of a day count since 1970 (H. Hinnant, "chrono-compatible low-level date
/// algorithms").
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn str_of(json: &str) -> String {
        let mut out = String::new();
        let value: Value = serde_json::from_str(json).unwrap();
        write_str(&mut out, &value).unwrap();
        out
    }

    #[test]
    fn values_print_as_python_prints_them() {
        let table = [
            ("null", "None"),
            ("true", "True"),
            ("false", "False"),
            ("1", "1"),
            ("-0.0", "-0.0"),
            ("1.0", "1.0"),
            ("1e15", "1000000000000000.0"),
            ("1e16", "1e+16"),
            ("123456789012345680.0", "1.2345678901234568e+17"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("1.5e-7", "1.5e-07"),
            ("1e300", "1e+300"),
            ("0.1", "0.1"),
            (r#""a'b""#, "a'b"),
            (r#"["a", 1, null, true, 2.0]"#, "['a', 1, None, True, 2.0]"),
            (r#"{"z": {"b": []}, "a": {}}"#, "{'z': {'b': []}, 'a': {}}"),
            (r#"["it's", "say \"hi\"", "both ' \""]"#, r#"["it's", 'say "hi"', 'both \' "']"#),
            (r#"["\n\t\u0001\u00a0\u00ad\u200b é你"]"#, r"['\n\t\x01\xa0\xad\u200b é你']"),
        ];
        for (json, want) in table {
            assert_eq!(str_of(json), want, "{json}");
        }
    }

    #[test]
    fn json_is_written_as_json_dumps_writes_it() {
        let json = r#"{"b":[1,2.50,{"x":null}],"a":"é\u0001\u007f😀<>&'"}"#;
        let value: Value = serde_json::from_str(json).unwrap();
        let dump = |style: &JsonStyle| {
            let mut out = String::new();
            write_json(&mut out, &value, style, 0).unwrap();
            out
        };
        assert_eq!(
            dump(&JsonStyle::new(None)),
            "{\"b\": [1, 2.5, {\"x\": null}], \"a\": \"é\\u0001\u{7f}😀<>&'\"}"
        );
        let sorted = JsonStyle { ensure_ascii: true, sort_keys: true, ..JsonStyle::new(None) };
        assert_eq!(
            dump(&sorted),
            r#"{"a": "\u00e9\u0001\u007f\ud83d\ude00<>&'", "b": [1, 2.5, {"x": null}]}"#
        );
        let indented = dump(&JsonStyle::new(Some("  ".to_owned())));
        assert!(
            indented.starts_with("{\n  \"b\": [\n    1,\n    2.5,\n    {\n      \"x\": null"),
            "{indented}"
        );
    }

    #[test]
    fn dates() {
        let table = [
            (0, "%Y-%m-%d %H:%M:%S %A %j", "1970-01-01 00:00:00 Thursday 001"),
            (1_795_363_978, "%d %b %Y", "22 Nov 2026"),
            (1_795_363_978, "%B %-d, %Y %I:%M %p %a", "November 22, 2026 04:12 PM Sun"),
            (951_782_400, "%F", "2000-02-29"),
            (-1, "%F %T", "1969-12-31 23:59:59"),
            (4_102_444_799, "%d/%m/%y%%", "31/12/99%"),
        ];
        for (seconds, format, want) in table {
            let mut got = String::new();
            assert_eq!(strftime(&mut got, format, seconds), Some(()));
            assert_eq!(got, want, "{format} at {seconds}");
        }
        assert_eq!(strftime(&mut String::new(), "%Q", 0), None);
        assert_eq!(strftime(&mut String::new(), "%", 0), None);
        for days in (-800_000..800_000).step_by(17) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }
}
