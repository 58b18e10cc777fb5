//! Numbers and names as people read them.

/// How a figure is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// Whole, thousands apart: 8,730.
    Whole,
    /// Seconds with three digits that matter: 0.542, 12.3.
    Seconds,
    /// Seconds, shown in milliseconds: 26.4.
    Millis,
    /// A small number: 27.3.
    Small,
    /// 0 to 1, shown in percent: 59.3.
    Percent,
}

impl Shown {
    /// The value, without its unit.
    pub fn text(self, value: f64) -> String {
        match self {
            Shown::Whole => grouped(value, 0),
            Shown::Seconds => significant(value),
            Shown::Millis => grouped(value * 1e3, 1),
            Shown::Small if value.abs() < 1.0 && value != 0.0 => grouped(value, 2),
            Shown::Small => grouped(value, 1),
            Shown::Percent => grouped(value * 100.0, 1),
        }
    }

    /// What to multiply a value with to have it in the unit shown.
    pub fn scale(self) -> f64 {
        match self {
            Shown::Millis => 1e3,
            Shown::Percent => 100.0,
            Shown::Whole | Shown::Seconds | Shown::Small => 1.0,
        }
    }

    /// The unit, as it stands behind a number.
    pub fn unit(self) -> &'static str {
        match self {
            Shown::Whole | Shown::Small => "",
            Shown::Seconds => " s",
            Shown::Millis => " ms",
            Shown::Percent => "%",
        }
    }
}

/// With so many decimals, thousands apart.
pub(super) fn grouped(value: f64, decimals: usize) -> String {
    let plain = format!("{:.decimals$}", value.abs());
    let (whole, rest) = plain.split_at(plain.find('.').unwrap_or(plain.len()));
    let mut text = String::new();
    if value < 0.0 && plain.bytes().any(|digit| (b'1'..=b'9').contains(&digit)) {
        text.push('-');
    }
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text + rest
}

fn significant(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    grouped(value, decimals)
}

/// Without zeros at the end: ticks of an axis, rates.
pub(super) fn plain(value: f64) -> String {
    let text = grouped(value, 4);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// How far a figure lies from a published one, in percent of it; nothing to say when that is 0.
pub(super) fn relative(here: f64, published: f64) -> Option<f64> {
    (published.abs() > 1e-9).then(|| (here - published) / published * 100.0)
}

/// Text for HTML and SVG, in elements and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() && c != '\n' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        let shown = [
            (Shown::Whole, 8730.4, "8,730"),
            (Shown::Whole, 1_234_567.0, "1,234,567"),
            (Shown::Seconds, 0.5421, "0.542"),
            (Shown::Seconds, 9.996, "10.0"),
            (Shown::Seconds, 92.551, "92.6"),
            (Shown::Seconds, 123.4, "123"),
            (Shown::Millis, 0.02641, "26.4"),
            (Shown::Small, 0.05, "0.05"),
            (Shown::Small, 27.34, "27.3"),
            (Shown::Small, 0.0, "0.0"),
            (Shown::Percent, 0.593, "59.3"),
        ];
        for (how, value, text) in shown {
            assert_eq!(how.text(value), text);
        }
        assert_eq!(
            (plain(0.5), plain(20.0), plain(12_000.0)),
            ("0.5".into(), "20".into(), "12,000".into())
        );
        assert_eq!((grouped(-0.001, 1), grouped(-1234.5, 1)), ("0.0".into(), "-1,234.5".into()));
        assert_eq!((relative(11.0, 10.0), relative(1.0, 0.0)), (Some(10.0), None));
    }

    #[test]
    fn nothing_breaks_out() {
        assert_eq!(
            escape("<a href='x'>\u{1b}&\""),
            "&lt;a href=&#39;x&#39;&gt;\u{fffd}&amp;&quot;"
        );
    }
}
