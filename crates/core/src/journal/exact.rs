//! How does a floating-point number survive being written as text? As its shortest decimal form in
//! a string, because readers of JSON numbers may round; what is not a number by its bits.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

const NAN: &str = "nan:";

pub(crate) fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match number.is_nan() {
        true => serializer.collect_str(&format_args!("{NAN}{:016x}", number.to_bits())),
        false => serializer.collect_str(number),
    }
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let number = match text.strip_prefix(NAN) {
        Some(bits) => u64::from_str_radix(bits, 16).ok().map(f64::from_bits),
        None => text.parse().ok(),
    };
    number.ok_or_else(|| D::Error::custom(format_args!("`{text}` is not a number")))
}

/// Names with numbers, each number as above.
pub(crate) mod pairs {
    use std::borrow::Cow;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize)]
    struct Written<'a>(&'a str, #[serde(with = "super")] f64);

    #[derive(Deserialize)]
    struct Read(String, #[serde(with = "super")] f64);

    pub(crate) fn serialize<S: Serializer>(
        pairs: &[(String, f64)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(pairs.iter().map(|(name, number)| Written(name, *number)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Cow<'static, [(String, f64)]>, D::Error> {
        let read = Vec::<Read>::deserialize(deserializer)?;
        Ok(read.into_iter().map(|Read(name, number)| (name, number)).collect())
    }
}
