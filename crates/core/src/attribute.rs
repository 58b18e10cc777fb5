//! Which number about an endpoint does a plugin read?

use crate::stage::{Row, View};

/// The number that was told under a key; `None`: nobody told it, or it is stale. Without a
/// producer, or with an empty one, the newest of any producer.
pub(crate) fn read(
    view: &View<'_>,
    row: &Row,
    key: &str,
    producer: &Option<String>,
) -> Option<f64> {
    let producer = producer.as_deref().filter(|name| !name.is_empty());
    view.endpoint(row)?.attribute(view.now, key, producer)
}

/// Why a key and a producer name no number; `field` is the parameter that holds the key. A key
/// with a slash is the older spelling of both in one, unless a producer stands beside it.
pub(crate) fn check(field: &str, key: &str, producer: &Option<String>) -> Result<(), String> {
    if key.is_empty() {
        return Err(format!("{field} is required: the name of the number"));
    }
    match key.rsplit_once('/') {
        Some((name, from)) if producer.is_none() => Err(format!(
            "{field} {key:?} holds a slash: write {field}: {name} and producer: {from}, or, if \
             the slash is part of the name, producer: \"\""
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_needs_a_producer() {
        let table = [
            ("a", None, true),
            ("a", Some(""), true),
            ("", Some("p"), false),
            ("a/p", None, false),
            ("llm-d.ai/multicluster-queue-size", Some(""), true),
        ];
        for (key, producer, is_good) in table {
            let producer = producer.map(str::to_owned);
            assert_eq!(check("attribute", key, &producer).is_ok(), is_good, "{key} {producer:?}");
        }
        let message = check("attribute", "a/p", &None).unwrap_err();
        assert!(message.contains("attribute: a and producer: p"), "{message}");
    }
}
