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

/// The JSON body of an error answer. All APIs that are understood share OpenAI's shape, with the
/// status as `code` as vLLM has it; other paths get the same, so that one client code reads both.
pub fn render(api: Api, status: u16, kind: &str, message: &str) -> String {
    match api {
        Api::Completions
        | Api::ChatCompletions
        | Api::Responses
        | Api::Embeddings
        | Api::VllmGenerate
        | Api::Other => {
            let body = Body { error: Detail { message, kind, param: None, code: status } };
            serde_json::to_string(&body).unwrap_or_default()
        }
    }
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
}
