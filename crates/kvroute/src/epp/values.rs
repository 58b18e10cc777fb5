//! What is a valid value of a flag? Each function reads one kind as Go's `strconv`, `time` and
//! Kubernetes' quantities do, and says what is valid otherwise.

use std::time::Duration;

use kvroute_core::config::{GoDuration, Quantity};

/// Go's `strconv.ParseBool`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

/// A port to listen on; 0 picks a free one.
pub(super) fn port(text: &str) -> Result<u16, String> {
    let number = integer(text).and_then(|number| u16::try_from(number).ok());
    number.ok_or_else(|| "write a port, 0 to 65535 (0 picks a free one)".to_owned())
}

/// A port of another process.
pub(super) fn remote_port(text: &str) -> Result<u16, String> {
    let number = integer(text).and_then(|number| u16::try_from(number).ok());
    number.filter(|port| *port > 0).ok_or_else(|| "write a port, 1 to 65535".to_owned())
}

/// Ports between commas, without blanks; adds to those before, as pflag's lists do.
pub(super) fn ports(list: &mut Vec<u16>, text: &str) -> Result<(), String> {
    let wrong = |_| "write ports between commas without blanks, for example 8000,8001".to_owned();
    for item in text.split(',') {
        let port = remote_port(item).map_err(wrong)?;
        if !list.contains(&port) {
            list.push(port);
        }
    }
    Ok(())
}

/// A whole number that is not negative, as `verbosity` takes it.
pub(super) fn count(text: &str) -> Result<u32, String> {
    let number = integer(text).and_then(|number| u32::try_from(number).ok());
    number.ok_or_else(|| "write a whole number, 0 or more".to_owned())
}

/// A whole number of 64 bits.
pub(super) fn seed(text: &str) -> Result<u64, String> {
    integer(text).ok_or_else(|| "write a whole number, 0 or more".to_owned())
}

/// Go's literals: decimal, or with a prefix of another base.
fn integer(text: &str) -> Option<u64> {
    let bare = text.strip_prefix('+').unwrap_or(text);
    let lower = bare.to_ascii_lowercase();
    let (digits, base) = match lower.get(..2) {
        Some("0x") => (&lower[2..], 16),
        Some("0o") => (&lower[2..], 8),
        Some("0b") => (&lower[2..], 2),
        _ => (lower.as_str(), 10),
    };
    if digits.starts_with('+') { None } else { u64::from_str_radix(digits, base).ok() }
}

/// Go's `time.ParseDuration`, not negative.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let found = GoDuration::parse(text).map(|duration| duration.0);
    let opposite = text.strip_prefix('-').and_then(GoDuration::parse);
    found.ok_or_else(|| match opposite {
        Some(_) => "write a duration that is not negative".to_owned(),
        None => "write a duration with its unit, for example 50ms, 30s or 1m30s".to_owned(),
    })
}

/// A size in bytes: a Kubernetes quantity with or without a `B` behind it. `MB` is a million
/// bytes, `MiB` is 2^20. `None` for 0 and for nothing: the default.
pub(super) fn size(text: &str) -> Result<Option<usize>, String> {
    let text = text.trim();
    let bare = match text.strip_suffix(['B', 'b']) {
        Some(rest) if !rest.is_empty() => rest,
        _ => text,
    };
    if bare.is_empty() {
        return Ok(None);
    }
    let bytes = Quantity::parse(bare).and_then(|quantity| usize::try_from(quantity.0).ok());
    match bytes {
        // Quantities beyond 64 bits end at their largest value.
        Some(bytes) if bytes < usize::MAX >> 1 => Ok(Some(bytes).filter(|bytes| *bytes > 0)),
        _ => Err("write a size in bytes, for example 10MiB, 25MB or 4194304".to_owned()),
    }
}

/// One of a few words, in small or large letters.
pub(super) fn one_of(words: &[&str], text: &str) -> Result<String, String> {
    let found = words.iter().find(|word| word.eq_ignore_ascii_case(text));
    found.map(|word| (*word).to_owned()).ok_or_else(|| format!("write one of {}", words.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans_are_those_of_go() {
        for text in ["1", "t", "T", "true", "TRUE", "True"] {
            assert_eq!(boolean(text), Ok(true), "{text}");
        }
        for text in ["0", "f", "F", "false", "FALSE", "False"] {
            assert_eq!(boolean(text), Ok(false), "{text}");
        }
        for text in ["", "yes", "no", "tRUE", "2", " true", "on"] {
            assert!(boolean(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_go_literals() {
        let table = [
            ("0", Some(0)),
            ("9002", Some(9002)),
            ("+1", Some(1)),
            ("65535", Some(65535)),
            ("0x10", Some(16)),
            ("0o17", Some(15)),
            ("0B11", Some(3)),
            ("65536", None),
            ("-1", None),
            ("", None),
            ("++1", None),
            ("0x+1", None),
            ("1.0", None),
            ("\u{e9}\u{e9}", None),
            (" 1", None),
        ];
        for (text, expected) in table {
            assert_eq!(port(text).ok(), expected, "{text}");
        }
        assert!(remote_port("0").is_err());
    }

    #[test]
    fn lists_of_ports_grow_without_duplicates() {
        let mut list = Vec::new();
        assert_eq!(ports(&mut list, "3000,3001,3000"), Ok(()));
        assert_eq!(ports(&mut list, "3002,3001"), Ok(()));
        assert_eq!(list, [3000, 3001, 3002]);
        for text in ["", "3000,", "3000, 3001", "0", "70000", "a"] {
            assert!(ports(&mut Vec::new(), text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        let table = [
            ("50ms", Some(50)),
            ("30s", Some(30_000)),
            ("1m30s", Some(90_000)),
            ("1.5s", Some(1_500)),
            ("0", Some(0)),
            ("30", None),
            ("", None),
            ("-5s", None),
            ("5 s", None),
            ("1d", None),
        ];
        for (text, expected) in table {
            let expected = expected.map(Duration::from_millis);
            assert_eq!(duration(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_negative_duration_is_called_one() {
        assert!(duration("-5s").unwrap_err().contains("not negative"));
        assert!(duration("-5").unwrap_err().contains("unit"));
    }

    #[test]
    fn words_have_small_or_large_letters() {
        for text in ["json", "JSON", "Json"] {
            assert_eq!(one_of(&["json", "console"], text).as_deref(), Ok("json"));
        }
        assert!(one_of(&["json"], "jsonl").is_err());
    }

    #[test]
    fn sizes_are_quantities_with_or_without_bytes() {
        let table = [
            ("10MiB", Ok(Some(10 << 20))),
            ("25MB", Ok(Some(25_000_000))),
            ("4194304", Ok(Some(4 << 20))),
            ("4Mi", Ok(Some(4 << 20))),
            ("1kB", Ok(Some(1_000))),
            (" 64KiB ", Ok(Some(64 << 10))),
            ("", Ok(None)),
            ("0", Ok(None)),
        ];
        for (text, expected) in table {
            assert_eq!(size(text), expected, "{text}");
        }
        for text in ["B", "10MIB", "1KB", "-1", "ten", "1e40", "999999999999EiB", "10 MiB", "NaN"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
