//! What do Python's string methods and Jinja's filters and tests give, where the template engine
//! differs from them?
//!
//! The engine and its Python layer cover most; here is what they lack or see differently: Python's
//! idea of white space and of line ends, positions counted in characters, `json.dumps`, undefined
//! values that count as empty, and booleans that are numbers.

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use crate::python::{self, JsonStyle};

/// Adds methods, filters and tests to an environment.
pub(crate) fn install(env: &mut Environment<'_>) {
    env.set_unknown_method_callback(|state, value, method, args| {
        let ours = value.as_str().map_or(Ok(None), |text| string_method(text, method, args))?;
        ours.map_or_else(|| pycompat::unknown_method_callback(state, value, method, args), Ok)
    });
    env.set_formatter(|out, _: &mut State<'_, '_>, value| {
        let written = match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&str_of(value)?),
        };
        written.map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
    env.add_filter("tojson", to_json);
    env.add_filter("string", |value: &Value| str_of(value));
    env.add_filter("trim", |value: &Value, chars: Option<String>| {
        Ok::<_, Error>(strip(&str_of(value)?, chars.as_deref(), true, true).to_owned())
    });
    for name in ["length", "count"] {
        env.add_filter(name, |value: &Value| match value.kind() {
            ValueKind::Undefined => Ok(0),
            _ => value.len().ok_or_else(|| {
                let message = format!("object of type {} has no length", value.kind());
                Error::new(ErrorKind::InvalidOperation, message)
            }),
        });
    }
    // Jinja asks for Python's protocols, which strings, dicts and undefined values fulfil.
    for name in ["iterable", "sequence"] {
        env.add_test(name, move |value: &Value| match value.kind() {
            ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined => true,
            ValueKind::Iterable => name == "iterable",
            _ => false,
        });
    }
    env.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
}

fn str_of(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    python::write_str(&mut out, value).map_err(too_deep)?;
    Ok(out)
}

fn too_deep(_: python::TooDeep) -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply")
}

/// `json.dumps` with the arguments that transformers gives its filter.
fn to_json(value: &Value, first: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    // The first positional argument is `ensure_ascii`.
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let indent: Option<Value> = kwargs.get("indent")?;
    let separators: Option<Value> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let indent = indent.filter(|indent| !indent.is_none()).map(|indent| match indent.as_str() {
        Some(text) => text.to_owned(),
        // More than json.dumps would be asked for in earnest.
        None => " ".repeat(indent.as_usize().unwrap_or(0).min(64)),
    });
    let mut style = JsonStyle::new(indent);
    style.ensure_ascii = ensure_ascii.unwrap_or(first.is_some_and(|value| value.is_true()));
    style.sort_keys = sort_keys.unwrap_or(false);
    if let Some(pair) = separators.filter(|pair| !pair.is_none()) {
        style.item_separator = pair.get_item_by_index(0)?.to_string();
        style.key_separator = pair.get_item_by_index(1)?.to_string();
    }
    let mut out = String::new();
    python::write_json(&mut out, value, &style, 0).map_err(too_deep)?;
    Ok(Value::from(out))
}

/// `str.strip` and its kin: of Python's white space, or of the given characters.
pub(crate) fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let is_stripped =
        |c: char| chars.map_or_else(|| python::is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(is_stripped) } else { text };
    if end { text.trim_end_matches(is_stripped) } else { text }
}

/// The string methods that are done here; `None` leaves the method to the engine's Python layer.
fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, method != "rstrip", method != "lstrip"))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            partition(text, separator, method == "rpartition")?
        }
        "split" | "rsplit" => {
            let (separator, most, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let most: Option<i64> = kwargs.get::<Option<i64>>("maxsplit")?.or(most);
            let named: Option<String> = kwargs.get("sep")?;
            kwargs.assert_all_used()?;
            let most = usize::try_from(most.unwrap_or(-1)).unwrap_or(usize::MAX);
            split(text, separator.or(named.as_deref()), most, method == "rsplit")?
        }
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            split_lines(text, keep.unwrap_or(false))
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            let at = if method.starts_with('r') { text.rfind(what) } else { text.find(what) };
            match at.and_then(|at| text.get(..at)) {
                Some(before) => Value::from(before.chars().count()),
                None if method.ends_with("find") => Value::from(-1),
                None => {
                    return Err(Error::new(ErrorKind::InvalidOperation, "substring not found"));
                }
            }
        }
        _ => return Ok(None),
    }))
}

fn partition(text: &str, separator: &str, from_end: bool) -> Result<Value, Error> {
    not_empty(separator)?;
    let found = if from_end { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if from_end => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from).to_vec())))
}

fn not_empty(separator: &str) -> Result<(), Error> {
    match separator.is_empty() {
        true => Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        false => Ok(()),
    }
}

fn split(text: &str, separator: Option<&str>, most: usize, from_end: bool) -> Result<Value, Error> {
    let most = most.saturating_add(1);
    let mut parts: Vec<&str> = match (separator, from_end) {
        (Some(separator), _) if separator.is_empty() => {
            not_empty(separator)?;
            Vec::new()
        }
        (Some(separator), false) => text.splitn(most, separator).collect(),
        (Some(separator), true) => text.rsplitn(most, separator).collect(),
        (None, from_end) => split_space(text, most, from_end),
    };
    if from_end {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Splits at runs of white space; the last of `most` parts keeps what is inside it.
fn split_space(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = strip(rest, None, !from_end, from_end);
        if rest.is_empty() {
            return parts;
        }
        let cut = if from_end { rest.rfind(python::is_space) } else { rest.find(python::is_space) };
        let Some(cut) = cut.filter(|_| parts.len() + 1 < most) else {
            parts.push(strip(rest, None, from_end, !from_end));
            return parts;
        };
        if from_end {
            let width = rest.get(cut..).and_then(|s| s.chars().next()).map_or(1, char::len_utf8);
            parts.push(rest.get(cut + width..).unwrap_or_default());
            rest = rest.get(..cut).unwrap_or_default();
        } else {
            parts.push(rest.get(..cut).unwrap_or_default());
            rest = rest.get(cut..).unwrap_or_default();
        }
    }
}

fn split_lines(text: &str, keep: bool) -> Value {
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(python::is_line_end) else {
            lines.push(Value::from(rest));
            break;
        };
        let (line, tail) = rest.split_at(at);
        let width = match tail.starts_with("\r\n") {
            true => 2,
            false => tail.chars().next().map_or(1, char::len_utf8),
        };
        let end = at + width;
        lines.push(Value::from(if keep { rest.get(..end).unwrap_or(line) } else { line }));
        rest = rest.get(end..).unwrap_or_default();
    }
    Value::from(lines)
}
