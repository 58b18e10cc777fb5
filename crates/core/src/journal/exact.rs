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
