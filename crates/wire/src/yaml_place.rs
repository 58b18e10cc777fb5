//! Where in the file does something stand? For faults that only a check of the whole finds.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use serde_saphyr::options::NonFiniteFloatPolicy;

/// A document with the place of every value; scalars have no content here.
enum Node {
    Scalar,
    List(Vec<Spanned<Node>>),
    Map(Vec<(String, Spanned<Node>)>),
}

/// Line and column, from 1, of what a path like `plugins[2].parameters` names; of the nearest
/// parent when it ends in a key that the file lacks. `None` when the text is no document or the
/// path begins with nothing that is there.
pub fn place(text: &str, path: &str) -> Option<(u64, u64)> {
    // A number that is none (`.nan`) has a place like any other.
    let options = serde_saphyr::options! {
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
    };
    let root: Spanned<Node> = serde_saphyr::from_str_with_options(text, options).ok()?;
    let mut node = &root;
    let mut found = None;
    for step in path.split(['.', '[', ']']).filter(|step| !step.is_empty()) {
        let next = match &node.value {
            Node::Scalar => None,
            Node::List(items) => step.parse().ok().and_then(|at: usize| items.get(at)),
            Node::Map(entries) => {
                entries.iter().find(|(key, _)| key == step).map(|(_, value)| value)
            }
        };
        let Some(next) = next else { break };
        found = Some((next.referenced.line(), next.referenced.column()));
        node = next;
    }
    found
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Node, D::Error> {
        from.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "plugins:\n  - type: a\n  - type: b\n    name: x\nprofiles:\n  - name: p\n";

    #[test]
    fn paths_lead_to_values_or_to_the_nearest_parent() {
        assert_eq!(place(TEXT, "plugins[1].name"), Some((4, 11)));
        assert_eq!(place(TEXT, "plugins[1]"), Some((3, 5)));
        assert_eq!(place(TEXT, "plugins[1].parameters"), Some((3, 5)));
        assert_eq!(place(TEXT, "profiles[0].name"), Some((6, 11)));
        assert_eq!(place(TEXT, "kvroute.retries_max"), None);
        assert_eq!(place("- [", "a"), None);
        assert_eq!(place("a: .nan\nb: -.inf", "b"), Some((2, 4)));
    }
}
