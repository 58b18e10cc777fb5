//! `fcfs-ordering-policy`, `edf-ordering-policy` and `slo-deadline-ordering-policy`: which request
//! of a flow goes first?
//!
//! Each gives a key; the smallest goes first. The last part of a key is the number of the request
//! in order of arrival, so no two are equal and the order never depends on the queue.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Time;
use crate::decision::Headers;
use crate::produce::TTFT_HEADERS;
use crate::stage::Plugin;

/// The moment of those that have no deadline: after all others.
const NO_DEADLINE: Time = Time(u64::MAX);

/// A request in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Its number in order of arrival.
    pub number: u64,
    /// When its head was read.
    pub received: Time,
    /// When it entered the queue.
    pub enqueued: Time,
    /// How long it may wait there; `None` or zero: for ever.
    pub ttl: Option<Duration>,
    /// The client's limit for the first token.
    pub slo_ttft: Option<Duration>,
}

/// The smaller goes first: deadline, then arrival, then number.
pub type OrderKey = (Time, Time, u64);

/// The client's limit for the first token; `None`: none, or none that is a number of milliseconds
/// of 0 or more.
pub fn slo_ttft(headers: &Headers<'_>) -> Option<Duration> {
    let text = TTFT_HEADERS.iter().find_map(|name| headers.get(name))?.trim();
    let ms: i64 = text.parse().ok()?;
    u64::try_from(ms).ok().map(Duration::from_millis)
}

/// Parameters of `fcfs-ordering-policy`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fcfs {}

impl Fcfs {
    /// In order of arrival.
    pub fn key(self, request: &Queued) -> OrderKey {
        (Time::ZERO, Time::ZERO, request.number)
    }
}

/// Parameters of `edf-ordering-policy`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Edf {}

impl Edf {
    /// Whose wait ends first; those that may wait for ever last.
    pub fn key(self, request: &Queued) -> OrderKey {
        let ttl = request.ttl.filter(|ttl| !ttl.is_zero());
        let deadline = ttl.map_or(NO_DEADLINE, |ttl| request.enqueued + ttl);
        (deadline, request.enqueued, request.number)
    }
}

/// Parameters of `slo-deadline-ordering-policy`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SloDeadline {}

impl SloDeadline {
    /// Whose first token is due first; those without a limit last.
    pub fn key(self, request: &Queued) -> OrderKey {
        let deadline = request.slo_ttft.map_or(NO_DEADLINE, |ttft| request.received + ttft);
        (deadline, request.received, request.number)
    }
}

impl Plugin for Fcfs {}
impl Plugin for Edf {}

impl Plugin for SloDeadline {
    fn headers(&self) -> Vec<String> {
        TTFT_HEADERS.map(String::from).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn queued(number: u64, at_s: u64, ttl_s: Option<u64>, slo_ms: Option<u64>) -> Queued {
        let slo_ttft = slo_ms.map(Duration::from_millis);
        let ttl = ttl_s.map(Duration::from_secs);
        Queued { number, received: Time(at_s * S), enqueued: Time(at_s * S), ttl, slo_ttft }
    }

    fn order(requests: &[Queued], key: impl Fn(&Queued) -> OrderKey) -> Vec<u64> {
        let mut requests = requests.to_vec();
        requests.sort_by_key(key);
        requests.iter().map(|request| request.number).collect()
    }

    #[test]
    fn each_policy_orders_by_its_rule() {
        let requests = [
            queued(4, 1, Some(9), None),
            queued(1, 2, Some(5), Some(9_000)),
            queued(2, 3, None, Some(500)),
            queued(3, 0, Some(0), Some(u64::MAX)),
            queued(5, 2, Some(5), None),
        ];
        assert_eq!(order(&requests, |r| Fcfs {}.key(r)), [1, 2, 3, 4, 5]);
        // Due at 10, 7, never, never, 7; equal ones by arrival, then number.
        assert_eq!(order(&requests, |r| Edf {}.key(r)), [1, 5, 4, 3, 2]);
        // Due at never, 11, 3.5, beyond all time, never.
        assert_eq!(order(&requests, |r| SloDeadline {}.key(r)), [2, 1, 3, 4, 5]);
        assert_eq!(order(&[], |r| Edf {}.key(r)), [0; 0]);
    }

    #[test]
    fn the_limit_for_the_first_token_is_read_from_its_header() {
        let of = |pairs: &[(&str, &str)]| slo_ttft(&Headers(pairs)).map(|d| d.as_millis());
        let table: [(&[(&str, &str)], _); 8] = [
            (&[], None),
            (&[("x-llm-d-slo-ttft-ms", "250")], Some(250)),
            (&[("x-slo-ttft-ms", " 40 ")], Some(40)),
            (&[("x-slo-ttft-ms", "40"), ("X-LLM-D-SLO-TTFT-MS", "0")], Some(0)),
            (&[("x-llm-d-slo-ttft-ms", "-1")], None),
            (&[("x-llm-d-slo-ttft-ms", "1.5")], None),
            (&[("x-llm-d-slo-ttft-ms", "")], None),
            (&[("x-llm-d-slo-ttft-ms", "9223372036854775808")], None),
        ];
        for (pairs, ms) in table {
            assert_eq!(of(pairs), ms, "{pairs:?}");
        }
    }
}
