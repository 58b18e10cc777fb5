//! Do kvroute and an engine make the same tokens of the same prompts?

use kvroute_tokens::{Tokenizer, TokensError};
use kvroute_wire::api::Api;
use kvroute_wire::engine_api::{TextRead, TokensRead};
use kvroute_wire::request;
use serde_json::{Value, json};

use super::endpoint::{About, Asker, shown};
use super::{Check, Finding, Status};

/// Texts that tokenizers differ in: letters beyond ASCII, digits, spaces, line ends, code.
const TEXTS: [&str; 3] = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it?",
    "Gr\u{fc}\u{df}e aus M\u{fc}nchen, \u{4f60}\u{597d}\u{4e16}\u{754c} \u{1f980}, caf\u{e9}!",
    "fn main() {\n\tlet x = 3.14159;\n\n    if x >= 2 { println!(\"{x}\"); }\n}\n",
];

/// How a prompt compares.
enum Compared {
    /// So many tokens, all equal.
    Same(usize),
    /// The first difference, in words.
    Differs(String),
    /// Neither side makes anything of it.
    Neither,
    /// kvroute cannot, the engine can.
    NotHere(String),
    /// The engine does not say.
    NotThere(String),
}

/// Compares texts, then conversations.
pub(super) async fn check(asker: &mut Asker<'_>, about: &About) {
    let asked = "POST /tokenize with three texts";
    let tokenizers = &asker.question.tokenizers;
    let ours = tokenizers.by_model.get(&about.model).or(tokenizers.default.as_ref());
    let Some(ours) = ours else {
        let status = (Check::Tokenizer, Status::Warning);
        asker.push(match asker.question.expected.wants_tokens {
            true => Finding::new(
                status,
                "nothing",
                "no tokenizer is given: prompts are estimated, and routing will be approximate, \
                 by history",
            )
            .change(
                "give kvroute --tokenizer FILE, the model's tokenizer.json with \
                     tokenizer_config.json and chat template beside it",
            ),
            false => Finding::new(
                (Check::Tokenizer, Status::Ok),
                "nothing",
                "not asked: no plugin of the configuration reads exact tokens",
            ),
        });
        return;
    };
    let ours = ours.clone();
    let mut equal = 0;
    for text in TEXTS {
        let body = json!({"model": about.model, "prompt": text});
        match compare(asker, &ours, Api::Completions, &body).await {
            Compared::Same(tokens) => equal += tokens,
            Compared::NotThere(reason) => {
                let found = format!("the engine's tokens cannot be had: {reason}");
                asker.push(Finding::new((Check::Tokenizer, Status::Unknown), asked, found));
                return;
            }
            Compared::Differs(difference) | Compared::NotHere(difference) => {
                asker.push(other_tokenizer(asked, text, &difference));
                let found = "cannot be told while the tokenizers differ";
                asker.push(Finding::new((Check::Template, Status::Unknown), asked, found));
                return;
            }
            Compared::Neither => {}
        }
    }
    let found = format!("equal: the same {equal} tokens of {} texts", TEXTS.len());
    asker.push(Finding::new((Check::Tokenizer, Status::Ok), asked, found));
    let finding = template(asker, &ours, about).await;
    asker.push(finding);
}

fn other_tokenizer(asked: &str, text: &str, difference: &str) -> Finding {
    let begin: String = text.chars().take(24).collect();
    let found = format!(
        "the tokenizer differs: of the text `{}...`, {difference}. No block of this engine will \
         match",
        begin.escape_debug()
    );
    Finding::new((Check::Tokenizer, Status::Wrong), asked, found).change(
        "give --tokenizer the tokenizer.json of the model that this engine serves (for several \
         models --tokenizer MODEL=FILE)",
    )
}

async fn template(asker: &Asker<'_>, ours: &Tokenizer, about: &About) -> Finding {
    let asked = "POST /tokenize with conversations, without and with tools";
    let finding = |status, found: String| Finding::new((Check::Template, status), asked, found);
    let mut equal = Vec::new();
    for (what, body) in conversations(&about.model) {
        match compare(asker, ours, Api::ChatCompletions, &body).await {
            Compared::Same(tokens) => equal.push(format!("{tokens} tokens of {what}")),
            Compared::Neither => {}
            Compared::NotThere(reason) => {
                let found = format!("of {what}, the engine's tokens cannot be had: {reason}");
                return finding(Status::Unknown, found);
            }
            Compared::NotHere(reason) => {
                let found = format!(
                    "the engine renders {what}, kvroute cannot: {reason}. Such requests are \
                     routed by load"
                );
                return finding(Status::Wrong, found).change(CHANGE);
            }
            Compared::Differs(difference) => {
                let found = format!(
                    "the chat template differs (texts are tokenized alike): of {what}, \
                     {difference}. Blocks of conversations will not match"
                );
                return finding(Status::Wrong, found).change(CHANGE);
            }
        }
    }
    match equal.is_empty() {
        true => finding(Status::Ok, "none on either side: the model takes no chats".to_owned()),
        false => finding(Status::Ok, format!("equal: the same {}", equal.join(" and "))),
    }
}

const CHANGE: &str = "put the engine's chat template beside kvroute's tokenizer.json as \
    chat_template.jinja (vLLM: the file of --chat-template, or the model's own), or start the \
    engine with --chat-template and kvroute's file";

fn conversations(model: &str) -> [(&'static str, Value); 2] {
    let messages = json!([
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "How warm is it in Oslo?"}
    ]);
    let parameters = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"]
    });
    let function =
        json!({"name": "weather", "description": "The weather.", "parameters": parameters});
    let tools = json!([{"type": "function", "function": function}]);
    let body = |tools: Option<Value>| {
        let mut body = json!({
            "model": model, "messages": messages, "add_generation_prompt": true
        });
        if let Some(tools) = tools {
            body["tools"] = tools;
        }
        body
    };
    [("a conversation", body(None)), ("one with tools", body(Some(tools)))]
}

/// One prompt on both sides, read here as the router reads requests.
async fn compare(asker: &Asker<'_>, ours: &Tokenizer, api: Api, body: &Value) -> Compared {
    let text = body.to_string();
    let here = match request::parse(api, text.as_bytes()) {
        Ok(parsed) => ours.tokens_of(&parsed),
        Err(error) => Err(TokensError::BadMessages { message: error.to_string() }),
    };
    let here = here.map(|prompts| prompts.into_iter().next().unwrap_or_default());
    let there = match asker.post("/tokenize", body).await {
        Ok(answer) if answer.status == 200 => {
            serde_json::from_slice::<TokensRead>(&answer.body).map_err(|e| (None, e.to_string()))
        }
        Ok(answer) => {
            Err((Some(answer.status), format!("status {}{}", answer.status, shown(&answer.body))))
        }
        Err(error) => Err((None, error.to_string())),
    };
    match (here, there) {
        (Ok(here), Ok(TokensRead { tokens })) => match first_difference(&here, &tokens) {
            None => Compared::Same(here.len()),
            Some((at, here, there)) => {
                let here = here.map(|id| (id, ours.decode(&[id]).ok()));
                let there = match there {
                    Some(id) => Some((id, piece(asker, body, id).await)),
                    None => None,
                };
                let (here, there) = (in_words(here), in_words(there));
                Compared::Differs(format!(
                    "token {at} (from 0) is {here} here and {there} at the engine"
                ))
            }
        },
        (Err(error), Ok(_)) => Compared::NotHere(error.to_string()),
        // An engine without a template refuses conversations, and so does kvroute.
        (Err(_), Err((Some(400), _))) => Compared::Neither,
        (_, Err((_, reason))) => Compared::NotThere(reason),
    }
}

/// Where two lists differ first, and what either has there; nothing at its end.
fn first_difference(a: &[u32], b: &[u32]) -> Option<(usize, Option<u32>, Option<u32>)> {
    let at = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let (a, b) = (a.get(at).copied(), b.get(at).copied());
    (a != b).then_some((at, a, b))
}

/// The text of one token as the engine reads it.
async fn piece(asker: &Asker<'_>, body: &Value, id: u32) -> Option<String> {
    let body = json!({"model": body["model"], "tokens": [id]});
    let answer = asker.post("/detokenize", &body).await.ok()?;
    serde_json::from_slice::<TextRead>(&answer.body).ok().map(|read| read.prompt)
}

fn in_words(token: Option<(u32, Option<String>)>) -> String {
    match token {
        Some((id, Some(text))) => format!("{id} `{}`", text.escape_debug()),
        Some((id, None)) => id.to_string(),
        None => "the end".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_up_to_the_end() {
        let table: [(&[u32], &[u32], _); 5] = [
            (&[1, 2], &[1, 2], None),
            (&[], &[], None),
            (&[1, 2, 3], &[1, 4, 3], Some((1, Some(2), Some(4)))),
            (&[1, 2], &[1, 2, 3], Some((2, None, Some(3)))),
            (&[1], &[], Some((0, Some(1), None))),
        ];
        for (a, b, difference) in table {
            assert_eq!(first_difference(a, b), difference, "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_token_in_words() {
        assert_eq!(in_words(Some((7, Some("a\n".to_owned())))), "7 `a\\n`");
        assert_eq!(in_words(Some((7, None))), "7");
        assert_eq!(in_words(None), "the end");
    }
}
