//! What does an error look like to a client of each API?

use serde::Serialize;

use crate::api::Api;

#[derive(Serialize)]
struct Body<'a> {
    error: Detail<'a>,
}

#[derive(Serialize)]
struct Detail<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: u16,
}

#[derive(Serialize)]
struct AnthropicBody<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    error: AnthropicDetail<'a>,
}

#[derive(Serialize)]
struct AnthropicDetail<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    message: &'a str,
}

/// The JSON body of an error answer: Anthropic's shape for its APIs, OpenAI's for all others, with
/// the status as `code` as vLLM has it, so that one client code reads both. Answers of gRPC
/// methods have no body; see [`grpc_status`].
pub fn render(api: Api, status: u16, kind: &str, message: &str) -> String {
    let text = match api {
        Api::Messages | Api::CountTokens => {
            let error = AnthropicDetail { kind, message };
            serde_json::to_string(&AnthropicBody { kind: "error", error })
        }
        _ => {
            let error = Detail { message, kind, param: None, code: status };
            serde_json::to_string(&Body { error })
        }
    };
    text.unwrap_or_default()
}

/// The `grpc-status` that says what an HTTP status says.
pub fn grpc_status(status: u16) -> u8 {
    match status {
        413 | 429 | 431 => 8,
        400..=499 => 3,
        501 => 12,
        504 => 4,
        502 | 503 => 14,
        _ => 13,
    }
}

/// A text as `grpc-message` takes it: percent signs and what is not printable ASCII are encoded.
pub fn grpc_message(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_of_vllm() {
        // An answer of vLLM 0.32, white space left out.
        let recorded = concat!(
            r#"{"error":{"message":"n must be 1 when using greedy sampling, got 2.","#,
            r#""type":"BadRequestError","param":null,"code":400}}"#
        );
        let message = "n must be 1 when using greedy sampling, got 2.";
        assert_eq!(render(Api::Completions, 400, "BadRequestError", message), recorded);
        let quoted = render(Api::Other, 503, "x", "a \"b\"\n");
        assert!(quoted.contains(r#""message":"a \"b\"\n""#), "{quoted}");
    }

    #[test]
    fn the_shape_of_anthropic() {
        let shown = render(Api::Messages, 400, "invalid_request_error", "a \"b\"");
        let expected =
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"a \"b\""}}"#;
        assert_eq!(shown, expected);
    }

    #[test]
    fn the_shape_of_grpc() {
        let table = [(400, 3), (404, 3), (413, 8), (429, 8), (500, 13), (501, 12), (503, 14)];
        for (status, code) in table {
            assert_eq!(grpc_status(status), code, "{status}");
        }
        assert_eq!(grpc_message("50% \u{e4}\n"), "50%25 %C3%A4%0A");
    }
}
