//! Which series of a metrics page are meant? `name` or `name{label=value,...}`.
//!
//! The part of PromQL's instant vector selector that llm-d uses, values with or without quotes.
//! Labels that a series has beyond the named ones do not matter.

/// Name and labels that a series must have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MetricSpec {
    /// Name of the family.
    pub name: String,
    /// Labels with their values, escapes resolved, by name.
    pub labels: Vec<(String, String)>,
}

impl MetricSpec {
    /// Reads a specification.
    ///
    /// # Errors
    /// What is wrong, with the text.
    pub fn parse(text: &str) -> Result<MetricSpec, String> {
        let wrong = |what: &str| format!("`{text}` is no metric specification: {what}");
        let trimmed = text.trim();
        let (name, braces) = match trimmed.find('{') {
            Some(at) => (trimmed[..at].trim_end(), Some(&trimmed[at + 1..])),
            None => (trimmed, None),
        };
        if !is_name(name, b":_") {
            return Err(wrong("it must begin with the name of a metric"));
        }
        let labels = match braces {
            Some(rest) => labels(rest).map_err(|what| wrong(&what))?,
            None => Vec::new(),
        };
        Ok(MetricSpec { name: name.to_owned(), labels })
    }
}

fn is_name(text: &str, also: &[u8]) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || also.contains(&byte);
    text.bytes().all(is_part) && text.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
}

/// What stands between the braces, and the closing one.
fn labels(mut rest: &str) -> Result<Vec<(String, String)>, String> {
    let mut labels: Vec<(String, String)> = Vec::new();
    loop {
        rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix('}') {
            labels.sort();
            return if after.is_empty() {
                Ok(labels)
            } else {
                Err(format!("`{after}` follows it"))
            };
        }
        let (name, after) =
            rest.split_once('=').ok_or("a label needs `=` and a value, then `}`")?;
        let name = name.trim_end();
        if name.ends_with('!') || after.starts_with('~') {
            return Err("labels are compared with `=` only".to_owned());
        }
        if !is_name(name, b"_") {
            return Err(format!("`{name}` is no name of a label"));
        }
        let (value, after) = value(after.trim_start())?;
        // Names like this one mean the series itself.
        if !name.starts_with("__") {
            labels.retain(|(other, _)| other != name);
            labels.push((name.to_owned(), value));
        }
        rest = after.trim_start();
        rest = match rest.strip_prefix(',') {
            Some(after) => after,
            None if rest.starts_with('}') => rest,
            None => return Err("a comma or `}` must follow a label".to_owned()),
        };
    }
}

/// A value and what follows it.
fn value(text: &str) -> Result<(String, &str), String> {
    let Some(quote) = text.chars().next().filter(|first| matches!(first, '"' | '\'')) else {
        let end = text.find(|c: char| matches!(c, '"' | ',' | '}') || c.is_whitespace());
        let (value, after) = text.split_at(end.unwrap_or(text.len()));
        return match value {
            "" => Err("a label has no value".to_owned()),
            _ if value.starts_with('=') => Err("labels are compared with `=` only".to_owned()),
            _ => Ok((value.to_owned(), after)),
        };
    };
    let mut value = String::new();
    let mut chars = text[1..].chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => value.push('\n'),
                Some(escaped @ ('\\' | '"' | '\'')) => value.push(escaped),
                _ => return Err("a backslash stands before n, a quote or a backslash".to_owned()),
            },
            _ if c == quote => return Ok((value, chars.as_str())),
            _ => value.push(c),
        }
    }
    Err("a quote is never closed".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels() {
        let two = [("label1", "value1"), ("label2", "value2")];
        let table: [(&str, &[(&str, &str)]); 12] = [
            ("my_metric", &[]),
            ("  my_metric  ", &[]),
            ("my_metric{}", &[]),
            ("my_metric{label1=value1}", &two[..1]),
            ("my_metric{label1=\"value1\"}", &two[..1]),
            ("my_metric{label1='value1',}", &two[..1]),
            ("my_metric{label2=value2,label1=value1}", &two),
            ("  my_metric  {  label1  =  value1  ,  label2  =  value2  }  ", &two),
            ("my_metric{label1=x, label1=value1}", &two[..1]),
            ("my_metric{__name__=\"x\",label1=value1}", &two[..1]),
            ("my_metric{a=\"1:fs, }{\\\\ \\\"q\\\"\\n\"}", &[("a", "1:fs, }{\\ \"q\"\n")]),
            ("my_metric{a=\"\"}", &[("a", "")]),
        ];
        for (text, expected) in table {
            let spec = MetricSpec::parse(text).unwrap();
            assert_eq!(spec.name, "my_metric", "{text}");
            let labels: Vec<(&str, &str)> =
                spec.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            assert_eq!(labels, expected, "{text}");
        }
        assert_eq!(MetricSpec::parse("vllm:a_b9").unwrap().name, "vllm:a_b9");
    }

    #[test]
    fn what_is_none_is_refused_with_its_text() {
        let table = [
            "",
            "  ",
            "9metric",
            "my metric",
            "m\u{e9}",
            "my_metric{label1=value1",
            "my_metriclabel1=value1}",
            "my_metric{label1}",
            "my_metric{=value1}",
            "my_metric{label1=}",
            "my_metric{  =  }",
            "my_metric{label=val}extra",
            "my_metric{a=b}{c=d}",
            "my_metric{a=b c=d}",
            "{label=val}",
            "my_metric{a=~b}",
            "my_metric{a=~\"b\"}",
            "my_metric{a!=\"b\"}",
            "my_metric{a==b}",
            "my_metric{a=\"b}",
            "my_metric{a=\"\\x\"}",
            "my_metric[5m]",
            "sum(my_metric)",
            "my_metric{,}",
        ];
        for text in table {
            let error = MetricSpec::parse(text).unwrap_err();
            assert!(error.starts_with(&format!("`{text}` is no metric spec")), "{error}");
        }
    }

    #[test]
    fn any_text_is_read_or_refused() {
        let mut rng = crate::Rng::seeded(7);
        let parts = ["m", "{", "}", "=", ",", "\"", "\\", "a", " ", "~", "\u{e9}", "'", "\n", "_"];
        for _ in 0..20_000 {
            let text: String = (0..rng.below(12)).map(|_| parts[rng.below(parts.len())]).collect();
            if let Ok(spec) = MetricSpec::parse(&text) {
                let quote = |v: &str| v.replace('\\', "\\\\").replace('"', "\\\"");
                let labels: Vec<String> = spec
                    .labels
                    .iter()
                    .map(|(k, v)| format!("{k}=\"{}\"", quote(v).replace('\n', "\\n")))
                    .collect();
                let again = format!("{}{{{}}}", spec.name, labels.join(","));
                assert_eq!(MetricSpec::parse(&again), Ok(spec), "{text:?}");
            }
        }
    }
}
