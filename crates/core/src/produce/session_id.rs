//! `session-id-producer`: which session does a request belong to?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::decision::Headers;
use crate::stage::Plugin;

/// `session-id-producer`: the session of a request, from a header or a cookie. Exactly one of the
/// two must be named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SessionId {
    /// The request header that holds it.
    pub header_name: Option<String>,
    /// The cookie that holds it.
    pub cookie_name: Option<String>,
}

/// What is left of an optional text without the space around it; `None` for nothing.
pub(crate) fn filled(text: &Option<String>) -> Option<&str> {
    text.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

impl SessionId {
    /// The session of a request with these headers; `None`: it has none.
    pub fn session(&self, headers: &Headers<'_>) -> Option<String> {
        let found = match (filled(&self.header_name), filled(&self.cookie_name)) {
            (Some(header), _) => headers.get(header),
            (None, Some(cookie)) => cookie_value(headers, cookie),
            (None, None) => None,
        };
        found.map(str::trim).filter(|id| !id.is_empty()).map(str::to_owned)
    }
}

/// The value of a cookie, as RFC 6265 section 4.2 writes it. HTTP/2 may split the cookies over
/// several headers.
fn cookie_value<'a>(headers: &Headers<'a>, name: &str) -> Option<&'a str> {
    let cookies = headers.0.iter().filter(|(key, _)| key.eq_ignore_ascii_case("cookie"));
    let mut pairs = cookies.flat_map(|(_, value)| value.split(';'));
    pairs.find_map(|pair| {
        let (key, value) = pair.trim().split_once('=')?;
        (key == name).then_some(value)
    })
}

impl Plugin for SessionId {
    fn check(&self) -> Result<(), String> {
        match (filled(&self.header_name), filled(&self.cookie_name)) {
            (Some(_), None) | (None, Some(_)) => Ok(()),
            (None, None) => {
                Err("headerName or cookieName is required: where the session's id is".into())
            }
            (Some(_), Some(_)) => Err("headerName and cookieName are both set; keep one".into()),
        }
    }

    fn headers(&self) -> Vec<String> {
        let header = filled(&self.header_name).map(str::to_ascii_lowercase);
        vec![header.unwrap_or_else(|| "cookie".into())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn producer(header: Option<&str>, cookie: Option<&str>) -> SessionId {
        let [header_name, cookie_name] = [header, cookie].map(|name| name.map(str::to_owned));
        SessionId { header_name, cookie_name }
    }

    #[test]
    fn a_header_or_one_cookie() {
        let by_header = producer(Some("X-Session"), None);
        let by_cookie = producer(None, Some("sid"));
        type Case<'a> = (&'a SessionId, &'a [(&'a str, &'a str)], Option<&'a str>);
        let table: [Case<'_>; 12] = [
            (&by_header, &[("x-session", "abc")], Some("abc")),
            (&by_header, &[("x-session", " abc ")], Some("abc")),
            (&by_header, &[("x-session", " ")], None),
            (&by_header, &[("x-other", "abc")], None),
            (&by_header, &[], None),
            (&by_cookie, &[("cookie", "a=1; sid=abc; b=2")], Some("abc")),
            (&by_cookie, &[("Cookie", "sid=a=b")], Some("a=b")),
            (&by_cookie, &[("cookie", "xsid=1;sid = 2")], None),
            (&by_cookie, &[("cookie", "SID=abc")], None),
            (&by_cookie, &[("cookie", "sid=")], None),
            (&by_cookie, &[("cookie", "a=1"), ("cookie", "sid=abc")], Some("abc")),
            (&by_cookie, &[("sid", "abc")], None),
        ];
        for (producer, headers, session) in table {
            assert_eq!(producer.session(&Headers(headers)).as_deref(), session, "{headers:?}");
        }
        assert_eq!(by_header.headers(), ["x-session"]);
        assert_eq!(by_cookie.headers(), ["cookie"]);
    }

    #[test]
    fn exactly_one_of_the_two() {
        let table = [
            (producer(Some("a"), None), true),
            (producer(None, Some("a")), true),
            (producer(None, None), false),
            (producer(Some(" "), None), false),
            (producer(Some("a"), Some("b")), false),
        ];
        for (producer, is_good) in table {
            assert_eq!(producer.check().is_ok(), is_good, "{producer:?}");
        }
    }
}
