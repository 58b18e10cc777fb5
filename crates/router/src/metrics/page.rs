//! In which format does a reader want the page of metrics? OpenMetrics where it is asked for, as
//! Prometheus does, and the older text format for everybody else.

use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue};

/// How a page is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageFormat {
    /// Prometheus' text format 0.0.4, which every reader knows.
    Text,
    OpenMetrics,
}

impl PageFormat {
    /// What these headers ask for.
    pub fn wanted(headers: &HeaderMap) -> PageFormat {
        let values = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let mut kinds = values.flat_map(|value| value.split(','));
        let is_open = |kind: &str| {
            let mut parts = kind.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let refused = |part: &str| {
                part.strip_prefix("q=").is_some_and(|q| q.parse().is_ok_and(|q: f32| q <= 0.0))
            };
            name.eq_ignore_ascii_case("application/openmetrics-text") && !parts.any(refused)
        };
        if kinds.any(is_open) { PageFormat::OpenMetrics } else { PageFormat::Text }
    }

    /// Value of `content-type`.
    pub fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            PageFormat::Text => "text/plain; version=0.0.4; charset=utf-8",
            PageFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        })
    }

    /// A page of OpenMetrics in this format. The older one names counters in what it declares as
    /// their samples are named, and knows neither units nor an end.
    pub fn of(self, open_metrics: String) -> String {
        if self == PageFormat::OpenMetrics {
            return open_metrics;
        }
        let mut page = String::with_capacity(open_metrics.len());
        let mut help = None;
        for line in open_metrics.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                help = rest.split_once(' ');
            } else if let Some((name, kind)) =
                line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
            {
                let suffix = if kind == "counter" { "_total" } else { "" };
                if let Some((_, text)) = help.take() {
                    page.extend(["# HELP ", name, suffix, " ", text, "\n"]);
                }
                page.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
            } else if !line.starts_with("# ") {
                page.extend([line, "\n"]);
            }
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_get_what_they_ask_for() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                          application/openmetrics-text;version=0.0.1;q=0.5,\
                          text/plain;version=1.0.0;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        let table: [(&[&str], PageFormat); 8] = [
            (&[], PageFormat::Text),
            (&["*/*"], PageFormat::Text),
            (&["text/plain"], PageFormat::Text),
            (&["application/json"], PageFormat::Text),
            (&[prometheus], PageFormat::OpenMetrics),
            (&["text/plain", "Application/OpenMetrics-Text"], PageFormat::OpenMetrics),
            (&["application/openmetrics-text; q=0"], PageFormat::Text),
            (&["application/openmetrics-text-of-my-own"], PageFormat::Text),
        ];
        for (accept, expected) in table {
            let mut headers = HeaderMap::new();
            for value in accept {
                headers.append(ACCEPT, HeaderValue::from_static(value));
            }
            assert_eq!(PageFormat::wanted(&headers), expected, "{accept:?}");
        }
    }

    #[test]
    fn counters_are_declared_as_they_are_named() {
        let open = "# HELP a Of a.\n# TYPE a counter\na_total{x=\"# HELP a\"} 1\n\
                    # HELP b_bytes Of b.\n# TYPE b_bytes gauge\n# UNIT b_bytes bytes\nb_bytes 2\n\
                    # EOF\n";
        let text = "# HELP a_total Of a.\n# TYPE a_total counter\na_total{x=\"# HELP a\"} 1\n\
                    # HELP b_bytes Of b.\n# TYPE b_bytes gauge\nb_bytes 2\n";
        assert_eq!(PageFormat::Text.of(open.to_owned()), text);
        assert_eq!(PageFormat::OpenMetrics.of(open.to_owned()), open);
    }
}
