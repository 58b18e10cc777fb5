//! Which tokens did the engine see, and do ours agree?

use kvroute_tokens::Tokenizer;
use kvroute_wire::request::{Prompt, RequestBody};
use kvroute_wire::trace::RecordedRequest;

/// Our token ids of one request beside the recorded ones.
pub enum Comparison {
    /// No tokenizer was given, or the prompt is token ids already.
    NotAsked,
    /// The recording has no ids to compare with; ours may serve for the prediction.
    NotRecorded(Option<Vec<u32>>),
    /// The same ids.
    Equal,
    /// Not the same.
    Different {
        /// How many we have.
        ours: u32,
        /// How many were recorded.
        recorded: u32,
        /// Where they part, or why we have none.
        reason: String,
    },
}

/// Renders and tokenizes the prompt, and compares the ids.
pub fn compare(
    request: &RecordedRequest,
    body: &RequestBody<'_>,
    tokenizer: Option<&Tokenizer>,
) -> Comparison {
    let Some(tokenizer) = tokenizer else { return Comparison::NotAsked };
    if matches!(body.prompt, Prompt::TokenIds(_) | Prompt::None(_)) {
        return Comparison::NotAsked;
    }
    let ours = tokenizer.tokens_of(body);
    let recorded = recorded(request);
    if recorded.is_empty() {
        let single = ours.ok().filter(|prompts| prompts.len() == 1).and_then(|mut p| p.pop());
        return Comparison::NotRecorded(single);
    }
    let recorded_count = count(recorded.iter().map(Vec::len).sum());
    let ours = match ours {
        Ok(ours) => ours,
        Err(error) => {
            return Comparison::Different {
                ours: 0,
                recorded: recorded_count,
                reason: error.to_string(),
            };
        }
    };
    if ours == recorded {
        return Comparison::Equal;
    }
    Comparison::Different {
        ours: count(ours.iter().map(Vec::len).sum()),
        recorded: recorded_count,
        reason: parting(&ours, &recorded),
    }
}

/// The token ids of a request with one prompt: what it carries, what was recorded, what we made.
pub fn of<'a>(
    request: &'a RecordedRequest,
    body: &'a RequestBody<'_>,
    comparison: &'a Comparison,
) -> Option<&'a [u32]> {
    match &body.prompt {
        Prompt::TokenIds(prompts) => return single(prompts),
        Prompt::Texts(texts) if texts.len() != 1 => return None,
        _ => {}
    }
    if let Some(tokens) = &request.tokenize {
        return Some(tokens);
    }
    if let Some(tokens) = single(&request.render) {
        return Some(tokens);
    }
    match comparison {
        Comparison::NotRecorded(Some(tokens)) => Some(tokens),
        _ => None,
    }
}

fn single(prompts: &[Vec<u32>]) -> Option<&[u32]> {
    match prompts {
        [tokens] => Some(tokens),
        _ => None,
    }
}

fn recorded(request: &RecordedRequest) -> Vec<Vec<u32>> {
    match &request.tokenize {
        Some(tokens) => vec![tokens.clone()],
        None => request.render.clone(),
    }
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

fn parting(ours: &[Vec<u32>], recorded: &[Vec<u32>]) -> String {
    if ours.len() != recorded.len() {
        return format!("{} prompts, {} recorded", ours.len(), recorded.len());
    }
    for (prompt, (a, b)) in ours.iter().zip(recorded).enumerate() {
        let same = a.iter().zip(b).take_while(|(x, y)| x == y).count();
        if same < a.len().max(b.len()) {
            return format!(
                "prompt {prompt} parts at token {same}: {:?} instead of {:?}",
                a.get(same),
                b.get(same)
            );
        }
    }
    "equal".to_owned()
}
