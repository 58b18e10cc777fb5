//! What can go wrong between a prompt and its ids, and who can mend it.

use std::path::PathBuf;

use kvroute_wire::request::NoPrompt;
use thiserror::Error;

/// Why a tokenizer cannot be used. The operator's to mend; nothing is guessed in its place.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// A file is larger than any tokenizer.
    #[error("{} has {bytes} bytes, more than the limit of {bytes_max}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// A file is not the JSON it should be.
    #[error("{what} is not valid: {message}")]
    BadJson {
        /// Which file.
        what: String,
        /// What the parser says, with line and column.
        message: String,
    },
    /// A part of the tokenizer is of a kind that is not implemented.
    #[error(
        "this tokenizer.json needs what kvroute does not implement: {message}; route this model \
         without --tokenizer (approximate knowledge), or convert the tokenizer to a BPE model"
    )]
    Unsupported {
        /// Which part.
        message: String,
    },
    /// The chat template does not compile.
    #[error("chat template `{name}` does not compile: {message}")]
    BadTemplate {
        /// Its name; `default` for the only one.
        name: String,
        /// What the template engine says.
        message: String,
    },
    /// A probe text came back changed, so other texts may be mis-tokenized too.
    #[error(
        "the tokenizer failed its self-check: {message}; its ids would not be the engine's, so it \
         is refused"
    )]
    SelfCheck {
        /// Which probe, and what came back.
        message: String,
    },
}

/// Why a request has no exact token ids.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TokensError {
    /// The body has no prompt that could be tokenized.
    #[error("the request has no prompt to tokenize ({})", .0.as_str())]
    NoPrompt(NoPrompt),
    /// The conversation has images, audio or video: the engine inserts a number of tokens that
    /// only its processor knows.
    #[error("the conversation holds a part of type `{part}`, which only the engine can tokenize")]
    Multimodal {
        /// The type of the part.
        part: String,
    },
    /// The conversation is not what the API asks for. The client's fault; the engine answers.
    #[error("the conversation cannot be rendered: {message}")]
    BadMessages {
        /// What is wrong.
        message: String,
    },
    /// There is no chat template for this request.
    #[error("no chat template: {message}")]
    NoTemplate {
        /// What was looked for.
        message: String,
    },
    /// The request brings its own template, and the options do not allow that.
    #[error(
        "the request brings its own chat_template; engines refuse that unless they are started \
         with --trust-request-chat-template, and so does this tokenizer"
    )]
    RequestTemplate,
    /// The template raised an error or failed.
    #[error("the chat template failed: {message}")]
    Template {
        /// What the template or its engine says.
        message: String,
    },
    /// A limit was reached while rendering.
    #[error("rendering was stopped: {what} is over its limit of {limit}")]
    TooLarge {
        /// What grew.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The tokenizer itself failed on this text.
    #[error("the tokenizer failed: {message}")]
    Tokenizer {
        /// What it says.
        message: String,
    },
}

impl TokensError {
    /// Every value of [`TokensError::reason`].
    pub const REASONS: [&'static str; 8] = [
        "no_prompt",
        "multimodal",
        "bad_messages",
        "no_template",
        "request_template",
        "template_failed",
        "too_large",
        "tokenizer_failed",
    ];

    /// The name in metrics and logs: why a request has no exact ids.
    pub fn reason(&self) -> &'static str {
        match self {
            TokensError::NoPrompt(_) => "no_prompt",
            TokensError::Multimodal { .. } => "multimodal",
            TokensError::BadMessages { .. } => "bad_messages",
            TokensError::NoTemplate { .. } => "no_template",
            TokensError::RequestTemplate => "request_template",
            TokensError::Template { .. } => "template_failed",
            TokensError::TooLarge { .. } => "too_large",
            TokensError::Tokenizer { .. } => "tokenizer_failed",
        }
    }

    /// Whether another request of the same client could succeed while this one cannot: the fault
    /// lies in the request, not in the tokenizer or its template.
    pub fn is_clients_fault(&self) -> bool {
        !matches!(self, TokensError::Tokenizer { .. } | TokensError::NoTemplate { .. })
    }
}
