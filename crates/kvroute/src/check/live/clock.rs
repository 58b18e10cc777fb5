//! Is an engine's clock right? By the `date` of its answers and the time of its events.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Check, Finding, Status};

/// Difference that is not worth a word: the date has whole seconds, and an answer takes its time.
const SKEW_S_MAX: f64 = 2.0;

/// Seconds since 1970, now.
pub(super) fn now_unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Seconds since 1970 of an HTTP date in its usual form, `Sun, 06 Nov 1994 08:49:37 GMT`
/// (RFC 9110, section 5.6.7).
pub(super) fn http_date_unix_s(text: &str) -> Option<f64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut parts = text.split_ascii_whitespace().skip(1);
    let day: i64 = parts.next()?.parse().ok()?;
    let month = parts.next()?;
    let month = MONTHS.iter().position(|name| *name == month)?;
    let year: i64 = parts.next()?.parse().ok().filter(|year| (1970..10_000).contains(year))?;
    let mut time = parts.next()?.split(':').map(|part| part.parse::<i64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    // Days since 1970-03-01 of a year that begins in March, so that leap days come last.
    let (year, month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) };
    let leaps = year / 4 - year / 100 + year / 400;
    let days = 365 * year + leaps + (153 * i64::try_from(month).ok()? + 2) / 5 + day - 1;
    let days = days - DAYS_TO_1970;
    Some((((days * 24 + hour) * 60 + minute) * 60 + second) as f64)
}

/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;

/// Seconds by which the engine's clock is ahead: by its answers, and by its events.
pub(super) fn finding(date_s: Option<f64>, event_s: Option<f64>) -> Finding {
    let asked = "the `date` of an answer and the time of an event";
    let worst = [date_s, event_s].into_iter().flatten().max_by(|a, b| a.abs().total_cmp(&b.abs()));
    let Some(skew) = worst else {
        let found = "its answers carry no date";
        return Finding::new((Check::Clock, Status::Unknown), asked, found);
    };
    if skew.abs() <= SKEW_S_MAX {
        let found = format!("within {SKEW_S_MAX} s of this machine's clock");
        return Finding::new((Check::Clock, Status::Ok), asked, found);
    }
    let side = if skew > 0.0 { "ahead of" } else { "behind" };
    let found = format!(
        "the engine's clock is {:.0} s {side} this machine's: ages of events and times in logs \
         cannot be compared",
        skew.abs()
    );
    Finding::new((Check::Clock, Status::Warning), asked, found)
        .change("synchronise both machines' clocks (NTP, chrony)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let table = [
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777.0)),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0.0)),
            ("Thu, 29 Feb 2024 23:59:59 GMT", Some(1_709_251_199.0)),
            ("Sun, 01 Mar 2026 00:00:01 GMT", Some(1_772_323_201.0)),
            ("Sun, 06 Nov", None),
            ("Sun, 06 Xxx 1994 08:49:37 GMT", None),
            ("Sun, 06 Nov 99999999999999999999 08:49:37 GMT", None),
            ("", None),
        ];
        for (text, seconds) in table {
            assert_eq!(http_date_unix_s(text), seconds, "{text}");
        }
    }

    #[test]
    fn a_wrong_clock_is_named_with_its_side() {
        let table = [
            (None, None, Status::Unknown, "no date"),
            (Some(0.4), Some(-0.1), Status::Ok, "within 2 s"),
            (Some(90.0), None, Status::Warning, "90 s ahead of"),
            (Some(1.0), Some(-7.2), Status::Warning, "7 s behind"),
        ];
        for (date, event, status, words) in table {
            let found = finding(date, event);
            assert_eq!(found.status, status, "{found:?}");
            assert!(found.found.contains(words), "{found:?}");
        }
    }
}
