//! What stands where in a file that a person wrote? A document with the place of every key and
//! value, from which types are read with errors that name both the path and the place.
//!
//! A map gives its entry `type` first, wherever it stands: what else may be written beside it
//! often depends on it, and tools that sort keys (Helm's `toYaml`) put it last.

use std::fmt::{self, Display};

use kvroute_core::plugin::known_names;
use serde::de::value::StrDeserializer;
use serde::de::{
    self, Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess,
    IntoDeserializer, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_saphyr::Spanned;
use serde_saphyr::options::NonFiniteFloatPolicy;

use crate::yaml::{self, DEPTH_MAX, YamlError};

/// Line and column, from 1.
type Place = (u64, u64);

/// One document.
#[derive(Debug)]
pub struct Tree<'a> {
    text: &'a str,
    file: &'a str,
    root: Spanned<Node>,
}

#[derive(Debug)]
enum Node {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'a> Tree<'a> {
    /// Reads a document; `file` names it in errors. Duplicate keys are errors; aliases and depth
    /// are bounded.
    ///
    /// # Errors
    /// The text is none, or too long.
    pub fn parse(text: &'a str, file: &'a str, bytes_max: usize) -> Result<Tree<'a>, YamlError> {
        yaml::check_size(text, file, bytes_max)?;
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! { max_depth: DEPTH_MAX },
            // A number that is none (`.nan`) has a place like any other.
            non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
            // Else a host called `y` would be a truth value.
            strict_booleans: true,
        };
        let root = serde_saphyr::from_str_with_options(text, options)
            .map_err(|error| yaml::of_parser(text, file, &error))?;
        Ok(Tree { text, file, root })
    }

    /// Reads a type. An empty document is an empty map.
    ///
    /// # Errors
    /// What is wrong, its place and its path.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, YamlError> {
        T::deserialize(&self.root.value).map_err(|fault| {
            let error = match fault.place {
                Some(place) => YamlError::at(self.text, self.file, place, &fault.message),
                None => YamlError::of_file(self.file, &fault.message),
            };
            error.of_path(&fault.path)
        })
    }

    /// Whether nothing is written.
    pub fn is_empty(&self) -> bool {
        matches!(self.root.value, Node::Null)
    }

    /// The text of a key at the top, if it has text.
    pub fn text_of(&self, key: &str) -> Option<&str> {
        let Node::Map(entries) = &self.root.value else { return None };
        match &entries.iter().find(|(name, _)| name.value == key)?.1.value {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// An error about what a path like `plugins[2].parameters` names.
    pub fn error(&self, path: &str, message: &str) -> YamlError {
        let error = match self.place(path) {
            Some(place) => YamlError::at(self.text, self.file, place, message),
            None => YamlError::of_file(self.file, message),
        };
        error.of_path(path)
    }

    /// Where the value of a path stands: a list or map at its key. The nearest parent when the
    /// path ends in a key that the file lacks, `None` when it begins with nothing that is there.
    pub fn place(&self, path: &str) -> Option<Place> {
        let (mut node, mut found) = (&self.root, None);
        for step in path.split(['.', '[', ']']).filter(|step| !step.is_empty()) {
            let (next, place) = match &node.value {
                Node::List(items) => match step.parse().ok().and_then(|at: usize| items.get(at)) {
                    Some(item) => (item, place_of(item)),
                    None => break,
                },
                Node::Map(entries) => match entries.iter().find(|(key, _)| key.value == step) {
                    Some((key, value)) => (value, place_of_entry(key, value)),
                    None => break,
                },
                _ => break,
            };
            (node, found) = (next, Some(place));
        }
        found
    }
}

fn place_of<T>(spanned: &Spanned<T>) -> Place {
    (spanned.referenced.line(), spanned.referenced.column())
}

/// A map's own place is that of its first key, which is not what is meant.
fn place_of_entry(key: &Spanned<String>, value: &Spanned<Node>) -> Place {
    match value.value {
        Node::List(_) | Node::Map(_) | Node::Null => place_of(key),
        _ => place_of(value),
    }
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

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(u64::try_from(value).map_or(Node::Signed(value), Node::Unsigned))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Unsigned(value))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Float(value as f64))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        Ok(Node::Float(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut entries: Vec<(Spanned<String>, Spanned<Node>)> = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Node::Null => visitor.visit_unit(),
            Node::Bool(value) => visitor.visit_bool(*value),
            Node::Signed(value) => visitor.visit_i64(*value),
            Node::Unsigned(value) => visitor.visit_u64(*value),
            Node::Float(value) => visitor.visit_f64(*value),
            Node::Text(value) => visitor.visit_borrowed_str(value),
            Node::List(items) => visitor.visit_seq(Items { items, at: 0 }),
            Node::Map(entries) => visitor.visit_map(Entries::new(entries)),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Node::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    /// The words of YAML 1.1, which llm-d takes, count where a truth value is wanted.
    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Node::Text(word) => match word.to_ascii_lowercase().as_str() {
                "yes" | "on" => visitor.visit_bool(true),
                "no" | "off" => visitor.visit_bool(false),
                _ => self.deserialize_any(visitor),
            },
            _ => self.deserialize_any(visitor),
        }
    }

    /// A key without a value is an empty list, as in Kubernetes.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Node::Null => visitor.visit_seq(Items { items: &[], at: 0 }),
            _ => self.deserialize_any(visitor),
        }
    }

    /// A key without a value is an empty map, as in Kubernetes.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self {
            Node::Null => visitor.visit_map(Entries::new(&[])),
            _ => self.deserialize_any(visitor),
        }
    }

    /// A field without a value is left out, as in Go: its default stays.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self {
            // Derived code would take a list as fields in their order.
            Node::List(_) => Err(de::Error::invalid_type(Unexpected::Seq, &MAP)),
            Node::Map(entries) => visitor.visit_map(Entries::of_fields(entries, fields)),
            _ => self.deserialize_map(visitor),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self {
            Node::Text(variant) => visitor.visit_enum(variant.as_str().into_deserializer()),
            Node::Map(entries) if entries.len() == 1 => visitor.visit_enum(Variant(&entries[0])),
            other => {
                let found = shown(other.unexpected());
                let wanted = known_names("", variants.iter().copied());
                Err(de::Error::custom(format!("expected one of {wanted}; found {found}")))
            }
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct tuple tuple_struct identifier ignored_any
    }
}

impl Node {
    fn unexpected(&self) -> Unexpected<'_> {
        match self {
            Node::Null => Unexpected::Unit,
            Node::Bool(value) => Unexpected::Bool(*value),
            Node::Signed(value) => Unexpected::Signed(*value),
            Node::Unsigned(value) => Unexpected::Unsigned(*value),
            Node::Float(value) => Unexpected::Float(*value),
            Node::Text(value) => Unexpected::Str(value),
            Node::List(_) => Unexpected::Seq,
            Node::Map(_) => Unexpected::Map,
        }
    }
}

struct Items<'t> {
    items: &'t [Spanned<Node>],
    at: usize,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        let Some(item) = self.items.get(self.at) else { return Ok(None) };
        let step = format!("[{}]", self.at);
        self.at += 1;
        seed.deserialize(&item.value).map(Some).map_err(|fault| fault.of(&step, place_of(item)))
    }
}

struct Entries<'t> {
    left: Vec<&'t (Spanned<String>, Spanned<Node>)>,
    value: Option<&'t (Spanned<String>, Spanned<Node>)>,
}

impl<'t> Entries<'t> {
    fn new(entries: &'t [(Spanned<String>, Spanned<Node>)]) -> Entries<'t> {
        let mut left: Vec<_> = entries.iter().collect();
        left.sort_by_key(|(key, _)| key.value != "type");
        left.reverse();
        Entries { left, value: None }
    }

    fn of_fields(entries: &'t [(Spanned<String>, Spanned<Node>)], fields: &[&str]) -> Entries<'t> {
        let mut all = Entries::new(entries);
        let is_left_out =
            |key: &str, value: &Node| matches!(value, Node::Null) && fields.contains(&key);
        all.left.retain(|(key, value)| !is_left_out(&key.value, &value.value));
        all
    }
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let Some(entry) = self.left.pop() else { return Ok(None) };
        self.value = Some(entry);
        let key = &entry.0;
        seed.deserialize(Key(&key.value))
            .map(Some)
            .map_err(|fault| fault.of(&key.value, place_of(key)))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let (key, value) =
            self.value.take().ok_or_else(|| Fault::new("a value was asked for before its key"))?;
        seed.deserialize(&value.value)
            .map_err(|fault| fault.of(&key.value, place_of_entry(key, value)))
    }
}

/// A key is text, or the number that a map from numbers wants.
struct Key<'t>(&'t str);

macro_rules! number_keys {
    ($($method:ident $visit:ident;)+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            match self.0.parse() {
                Ok(number) => visitor.$visit(number),
                Err(_) => visitor.visit_borrowed_str(self.0),
            }
        }
    )+};
}

impl<'de> Deserializer<'de> for Key<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_enum(self.0.into_deserializer())
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    number_keys! {
        deserialize_i8 visit_i64;
        deserialize_i16 visit_i64;
        deserialize_i32 visit_i64;
        deserialize_i64 visit_i64;
        deserialize_u8 visit_u64;
        deserialize_u16 visit_u64;
        deserialize_u32 visit_u64;
        deserialize_u64 visit_u64;
    }

    forward_to_deserialize_any! {
        bool i128 u128 f32 f64 char str string bytes byte_buf option unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

/// An enum's variant with content: a map of one entry.
struct Variant<'t>(&'t (Spanned<String>, Spanned<Node>));

impl<'de> EnumAccess<'de> for Variant<'de> {
    type Error = Fault;
    type Variant = Variant<'de>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Fault> {
        let (key, _) = self.0;
        let name: StrDeserializer<'_, Fault> = key.value.as_str().into_deserializer();
        let variant =
            seed.deserialize(name).map_err(|fault| fault.of(&key.value, place_of(key)))?;
        Ok((variant, self))
    }
}

impl<'de> Variant<'de> {
    fn at(&self, fault: Fault) -> Fault {
        let (key, value) = self.0;
        fault.of(&key.value, place_of_entry(key, value))
    }
}

impl<'de> VariantAccess<'de> for Variant<'de> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        match self.0.1.value {
            Node::Null => Ok(()),
            _ => Err(self.at(Fault::new("expected no value here"))),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Fault> {
        seed.deserialize(&self.0.1.value).map_err(|fault| self.at(fault))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Fault> {
        self.0.1.value.deserialize_seq(visitor).map_err(|fault| self.at(fault))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.0.1.value.deserialize_map(visitor).map_err(|fault| self.at(fault))
    }
}

/// Why a value does not fit its type.
#[derive(Debug)]
pub struct Fault {
    path: String,
    place: Option<Place>,
    message: String,
}

impl Fault {
    fn new(message: impl Into<String>) -> Fault {
        Fault { path: String::new(), place: None, message: message.into() }
    }

    /// The same fault, seen from the parent: the innermost place counts.
    fn of(self, step: &str, place: Place) -> Fault {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        let path = format!("{step}{dot}{}", self.path);
        Fault { path, place: self.place.or(Some(place)), ..self }
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: Display>(message: T) -> Fault {
        Fault::new(message.to_string())
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn de::Expected) -> Fault {
        let expected = expected.to_string();
        let quotes = match found {
            Unexpected::Unsigned(_)
            | Unexpected::Signed(_)
            | Unexpected::Float(_)
            | Unexpected::Bool(_)
                if expected == "a string" =>
            {
                "; put it in quotes"
            }
            _ => "",
        };
        Fault::new(format!("expected {}, found {}{quotes}", wanted(&expected), shown(found)))
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn de::Expected) -> Fault {
        let expected = expected.to_string();
        Fault::new(format!("expected {}, found {}", wanted(&expected), shown(found)))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Fault {
        let names = known_names(variant, expected.iter().copied());
        Fault::new(format!("`{variant}` is not known here; valid: {names}"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Fault {
        if expected.is_empty() {
            return Fault::new(format!("unknown field `{field}`; nothing can be set here"));
        }
        let names = known_names(field, expected.iter().copied());
        Fault::new(format!("unknown field `{field}`; valid: {names}"))
    }

    fn missing_field(field: &'static str) -> Fault {
        Fault::new(format!("`{field}` is missing here"))
    }
}

const MAP: &str = "a map (`key: value` lines)";

/// What serde calls a type, in a user's words.
fn wanted(expected: &str) -> String {
    let whole = |max: u64| format!("a whole number from 0 to {max}");
    match expected {
        "u8" => whole(u64::from(u8::MAX)),
        "u16" => whole(u64::from(u16::MAX)),
        "u32" => whole(u64::from(u32::MAX)),
        "u64" | "usize" => "a whole number that is not negative".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "text".to_owned(),
        "a sequence" => "a list".to_owned(),
        other if other.starts_with("struct ") => MAP.to_owned(),
        other => other.to_owned(),
    }
}

fn shown(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Bool(value) => value.to_string(),
        Unexpected::Unsigned(value) => value.to_string(),
        Unexpected::Signed(value) => value.to_string(),
        Unexpected::Float(value) => value.to_string(),
        Unexpected::Str(text) => {
            let short: String = text.chars().take(60).collect();
            format!("{short:?}")
        }
        Unexpected::Unit | Unexpected::Option => "nothing".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a map".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const TEXT: &str = "plugins:\n  - type: a\n  - type: b\n    name: x\n    parameters:\n      \
                        deep: {er: 1}\nprofiles:\n  - name: p\nnothing:\n";

    fn tree(text: &str) -> Tree<'_> {
        Tree::parse(text, "f", 1 << 20).unwrap()
    }

    #[test]
    fn paths_lead_to_values_or_to_the_nearest_parent() {
        let table = [
            ("plugins[1].name", Some((4, 11))),
            ("plugins[1]", Some((3, 5))),
            ("plugins[1].parameters", Some((5, 5))),
            ("plugins[1].parameters.deep", Some((6, 7))),
            ("plugins[1].parameters.deep.er", Some((6, 18))),
            ("plugins[1].parameters.missing", Some((5, 5))),
            ("plugins[9].name", Some((1, 1))),
            ("plugins", Some((1, 1))),
            ("profiles[0].name", Some((8, 11))),
            ("nothing", Some((9, 1))),
            ("nothing.at.all", Some((9, 1))),
            ("kvroute.retries_max", None),
            ("", None),
        ];
        for (path, place) in table {
            assert_eq!(tree(TEXT).place(path), place, "{path}");
        }
        assert_eq!(tree("a: .nan\nb: -.inf").place("b"), Some((2, 4)));
        assert!(Tree::parse("- [", "f", 99).is_err());
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(rename_all = "camelCase", default, deny_unknown_fields)]
    #[derive(Default)]
    struct All {
        text: String,
        small: u8,
        signed: i32,
        share: f64,
        flag: Option<bool>,
        list: Vec<u32>,
        map: BTreeMap<String, i32>,
        numbers: BTreeMap<u16, String>,
        choice: Option<Choice>,
        pair: Option<(u8, u8)>,
        inner: Option<Box<All>>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(rename_all = "snake_case", deny_unknown_fields)]
    enum Choice {
        Plain,
        One(u8),
        Fields { a: u8 },
    }

    #[test]
    fn every_kind_of_value_is_read() {
        let text = "text: a\nsmall: 7\nsigned: -3\nshare: 2\nflag: true\nlist: [1, 2]\nmap: {x: \
                    -1, 7: 2}\nnumbers: {8: eight}\nchoice: plain\npair: [1, 2]\ninner: {choice: \
                    {one: 3}, flag: null, inner: {choice: {fields: {a: 1}}, list: , map: }}\n";
        let read: All = tree(text).read().unwrap();
        let expected = All {
            text: "a".into(),
            small: 7,
            signed: -3,
            share: 2.0,
            flag: Some(true),
            list: vec![1, 2],
            map: [("x".to_owned(), -1), ("7".to_owned(), 2)].into(),
            numbers: [(8, "eight".to_owned())].into(),
            choice: Some(Choice::Plain),
            pair: Some((1, 2)),
            inner: Some(Box::new(All {
                choice: Some(Choice::One(3)),
                inner: Some(Box::new(All {
                    choice: Some(Choice::Fields { a: 1 }),
                    ..All::default()
                })),
                ..All::default()
            })),
        };
        assert_eq!(read, expected);
        let words = tree("text: yes\nflag: On").read::<All>().unwrap();
        assert_eq!((words.text.as_str(), words.flag), ("yes", Some(true)));
        let empty = tree("text:\nsmall: null\nshare: ~\nchoice:\npair:").read::<All>().unwrap();
        assert_eq!(empty, All::default());
        assert_eq!(tree("").read::<All>().unwrap(), All::default());
        assert_eq!(tree("# nothing\n").read::<All>().unwrap(), All::default());
    }

    #[test]
    fn what_does_not_fit_has_path_place_and_words() {
        let table = [
            ("flag: \"x\"", "flag", (1, 7), "expected true or false, found \"x\""),
            ("small: 300", "small", (1, 8), "a whole number from 0 to 255, found 300"),
            ("small: -1", "small", (1, 8), "found -1"),
            ("small: 1.5", "small", (1, 8), "found 1.5"),
            ("share: x", "share", (1, 8), "expected a number, found \"x\""),
            ("text: 5", "text", (1, 7), "expected text, found 5; put it in quotes"),
            ("text:\n- a", "text", (1, 1), "expected text, found a list"),
            ("list: 5", "list", (1, 7), "expected a list, found 5"),
            ("list:\n- 1\n- x", "list[1]", (3, 3), "found \"x\""),
            ("inner:\n  inner:\n    flg: 1", "inner.inner.flg", (3, 5), "valid: flag"),
            ("inner:\n  map: {k: x}", "inner.map.k", (2, 12), "a whole number"),
            ("choice: plin", "choice", (1, 9), "`plin` is not known here; valid: plain"),
            ("choice: 7", "choice", (1, 9), "one of plain, one, fields; found 7"),
            ("choice: {fields: {b: 1}}", "choice.fields.b", (1, 19), "unknown field `b`"),
            ("choice: {fields: {}}", "choice.fields", (1, 10), "`a` is missing"),
            ("choice: {plain: 1}", "choice.plain", (1, 17), "no value"),
            ("numbers: {x: a}", "numbers.x", (1, 11), "from 0 to 65535"),
            ("pair: [1]", "pair", (1, 1), "tuple"),
            ("- 1", "", (0, 0), "found a list"),
        ];
        for (text, path, place, message) in table {
            let error = tree(text).read::<All>().unwrap_err();
            assert_eq!(&*error.path, path, "{text}\n{error}");
            let found = (error.line.unwrap_or(0), error.column.unwrap_or(0));
            assert_eq!(found, place, "{text}\n{error}");
            assert!(error.message.contains(message), "{text}\n{error}");
        }
    }
}
