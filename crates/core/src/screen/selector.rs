//! What does a label selector written as one line mean?

use crate::filter::{LabelExpression, LabelOperator, LabelSelector};

/// Reads Kubernetes' short notation: conditions between commas, `key=value`, `key==value`,
/// `key!=value`, `key in (a, b)`, `key notin (a, b)`, `key`, `!key`. `Err`: what is wrong with it.
pub(crate) fn parse(text: &str) -> Result<LabelSelector, String> {
    let conditions = split(text)?;
    let match_expressions = conditions.into_iter().map(condition).collect::<Result<_, _>>()?;
    Ok(LabelSelector { match_expressions, ..LabelSelector::default() })
}

/// Splits at commas outside of brackets.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let mut parts = Vec::new();
    let (mut start, mut open) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            '(' | ')' if open == (c == '(') => return Err(format!("unexpected `{c}`")),
            '(' | ')' => open = c == '(',
            ',' if !open => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if open {
        return Err("`)` is missing".into());
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn condition(text: &str) -> Result<LabelExpression, String> {
    let text = text.trim();
    if let Some(key) = text.strip_prefix('!')
        && !key.contains('=')
    {
        return expression(key, LabelOperator::DoesNotExist, Vec::new());
    }
    let set = |operator, words: &str| {
        let (key, list) = text.split_once(words)?;
        let list = list.trim_start().strip_prefix('(')?.trim_end().strip_suffix(')')?;
        Some((key, operator, list))
    };
    let set = set(LabelOperator::NotIn, " notin").or_else(|| set(LabelOperator::In, " in"));
    if let Some((key, operator, list)) = set {
        return expression(key, operator, list.split(',').collect());
    }
    if let Some((key, value)) = text.split_once("!=") {
        return expression(key, LabelOperator::NotIn, vec![value]);
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return expression(key, LabelOperator::In, vec![value]);
    }
    if text.contains(['<', '>']) {
        return Err(format!("`{text}`: comparing values by size is not supported"));
    }
    expression(text, LabelOperator::Exists, Vec::new())
}

fn expression(
    key: &str,
    operator: LabelOperator,
    values: Vec<&str>,
) -> Result<LabelExpression, String> {
    let key = key.trim();
    let name = key.rsplit('/').next().unwrap_or(key);
    let good = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if name.is_empty() || !good(&key.replacen('/', "", 1)) {
        return Err(format!("`{key}` is not the name of a label"));
    }
    let values: Vec<String> = values.into_iter().map(|value| value.trim().to_owned()).collect();
    match values.iter().find(|value| !good(value)) {
        Some(value) => Err(format!("`{value}` is not the value of a label")),
        None => Ok(LabelExpression { key: key.to_owned(), operator, values }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn conditions_mean_what_kubernetes_means() {
        let labels: BTreeMap<String, String> =
            [("app.io/name", "llm"), ("tier", "fast"), ("empty", "")]
                .map(|(key, value)| (key.into(), value.into()))
                .into();
        let table = [
            ("app.io/name=llm", true),
            ("app.io/name==llm,tier = slow", false),
            ("tier!=slow", true),
            ("absent!=slow", true),
            ("tier!=fast", false),
            ("tier in (slow, fast),app.io/name", true),
            ("tier in(slow)", false),
            ("tier notin (slow,medium)", true),
            ("absent notin (slow)", true),
            ("tier notin (fast)", false),
            ("tier", true),
            ("absent", false),
            ("!absent", true),
            ("! tier", false),
            ("empty=", true),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text).unwrap().matches(&labels), expected, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let table = [
            ("", "`` is not the name"),
            ("a=b,", "`` is not the name"),
            ("a in (b", "`)` is missing"),
            ("a in b)", "unexpected `)`"),
            ("a in ((b))", "unexpected `(`"),
            ("a > 3", "by size"),
            ("a b=c", "`a b` is not the name"),
            ("a=b c", "`b c` is not the value"),
            ("a=b=c", "`b=c` is not the value"),
            ("x/y/z=1", "`x/y/z` is not the name"),
        ];
        for (text, expected) in table {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
