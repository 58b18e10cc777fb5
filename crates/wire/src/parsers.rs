//! Which parser claims a request, and for which API?
//!
//! Parsers claim paths by their ends, because gateways mount APIs under prefixes of their own, and
//! gRPC puts a package before the service. The longest claim wins; of equal ones, the parser that
//! is listed first. `passthrough-parser` claims nothing and takes what is left over.

use kvroute_core::parse::ParserKind;
use thiserror::Error;

use crate::api::Api;

/// Headers in which gateways keep the path of a request that they rewrote, lower case, in the
/// order in which they are asked when a request has none.
const PATH_HEADERS: [&str; 2] = ["x-original-path", "x-forwarded-path"];

/// The path of a request that names none anywhere.
const PATH_WITHOUT_ANY: &str = "/v1/completions";

/// A path that no parser claims, while none takes what is left over. The fault is the client's,
/// or the operator's: status 400.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "no parser claims the path `{path}`; this router has {parsers} (to forward other requests \
     unread, list passthrough-parser last under requestHandler.parsers)"
)]
pub struct Unclaimed {
    /// The path, without its query.
    pub path: String,
    /// The parsers in use.
    pub parsers: String,
}

/// The parsers of a router, in order.
#[derive(Clone, Debug)]
pub struct Parsers {
    kinds: Vec<ParserKind>,
    /// Longest first.
    claims: Vec<Claim>,
}

#[derive(Clone, Copy, Debug)]
struct Claim {
    end: &'static str,
    api: Api,
}

impl Default for Parsers {
    fn default() -> Parsers {
        Parsers::new(&ParserKind::DEFAULTS)
    }
}

/// The ends of paths that a parser claims.
fn claims_of(kind: ParserKind) -> &'static [(&'static str, Api)] {
    match kind {
        ParserKind::Openai => &[
            ("chat/completions", Api::ChatCompletions),
            ("completions", Api::Completions),
            ("embeddings", Api::Embeddings),
            ("responses", Api::Responses),
            ("conversations", Api::Conversations),
            ("render", Api::Render),
            ("images/generations", Api::Images),
        ],
        ParserKind::Anthropic => {
            &[("messages", Api::Messages), ("messages/count_tokens", Api::CountTokens)]
        }
        ParserKind::VllmHttp => &[("inference/v1/generate", Api::VllmGenerate)],
        ParserKind::SglangHttp => &[("generate", Api::SglangGenerate)],
        ParserKind::VllmGrpc => {
            &[("VllmEngine/Generate", Api::GrpcGenerate), ("VllmEngine/Embed", Api::GrpcEmbed)]
        }
        ParserKind::Vertex => &[
            ("PredictionService/ChatCompletions", Api::VertexChat),
            ("PredictionService/StreamRawPredict", Api::VertexStreamRaw),
            ("PredictionService/RawPredict", Api::VertexRaw),
        ],
        ParserKind::Passthrough => &[],
    }
}

impl Parsers {
    /// The parsers that count of this list: a kind that was there before, and what stands behind
    /// `passthrough-parser`, never gets a request.
    pub fn new(listed: &[ParserKind]) -> Parsers {
        let mut kinds = Vec::new();
        for kind in listed {
            if kinds.contains(&ParserKind::Passthrough) {
                break;
            }
            if !kinds.contains(kind) {
                kinds.push(*kind);
            }
        }
        let claimed = kinds.iter().flat_map(|kind| claims_of(*kind));
        let mut claims: Vec<Claim> = claimed.map(|(end, api)| Claim { end, api: *api }).collect();
        // A stable sort: of equal claims the parser that is listed first.
        claims.sort_by_key(|claim| std::cmp::Reverse(claim.end.len()));
        Parsers { kinds, claims }
    }

    /// The parsers in use.
    pub fn kinds(&self) -> &[ParserKind] {
        &self.kinds
    }

    /// The API of a request path, whose query does not count; [`Api::Other`] for what is left over.
    ///
    /// # Errors
    /// [`Unclaimed`], where nothing takes what is left over.
    pub fn resolve(&self, path: &str) -> Result<Api, Unclaimed> {
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let ended = path.strip_suffix('/').unwrap_or(path);
        if let Some(claim) = self.claims.iter().find(|claim| claim.holds_for(ended)) {
            return Ok(claim.api);
        }
        if self.kinds.contains(&ParserKind::Passthrough) {
            return Ok(Api::Other);
        }
        let names: Vec<&str> = self.kinds.iter().map(|kind| kind.plugin_type()).collect();
        let parsers = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Err(Unclaimed { path: path.to_owned(), parsers })
    }
}

impl Claim {
    /// Whole segments only; a gRPC service may stand behind its package.
    fn holds_for(&self, path: &str) -> bool {
        let Some(before) = path.strip_suffix(self.end) else { return false };
        match before.as_bytes().last() {
            None | Some(b'/') => true,
            Some(b'.') => self.api.is_grpc(),
            Some(_) => false,
        }
    }
}

/// The path that decides about the parser: the request's own, or what a gateway keeps in a
/// header. `header` is asked for names in lower case.
pub fn request_path<'a>(path: &'a str, header: impl Fn(&str) -> Option<&'a str>) -> &'a str {
    let candidates =
        std::iter::once(Some(path)).chain(PATH_HEADERS.iter().map(|name| header(name)));
    candidates.flatten().find(|path| !path.is_empty()).unwrap_or(PATH_WITHOUT_ANY)
}

#[cfg(test)]
mod tests {
    use kvroute_core::Rng;
    use kvroute_core::parse::ParserKind::{self, *};

    use super::*;

    fn api(kinds: &[ParserKind], path: &str) -> Option<Api> {
        Parsers::new(kinds).resolve(path).ok()
    }

    #[test]
    fn every_claim_of_every_parser() {
        let table: &[(ParserKind, &str, Api)] = &[
            (Openai, "/v1/chat/completions", Api::ChatCompletions),
            (Openai, "/v1/completions", Api::Completions),
            (Openai, "/v1/embeddings", Api::Embeddings),
            (Openai, "/v1/responses", Api::Responses),
            (Openai, "/v1/conversations", Api::Conversations),
            (Openai, "/v1/completions/render", Api::Render),
            (Openai, "/v1/chat/completions/render", Api::Render),
            (Openai, "/v1/images/generations", Api::Images),
            (Anthropic, "/v1/messages", Api::Messages),
            (Anthropic, "/anthropic/v1/messages/", Api::Messages),
            (Anthropic, "/v1/messages/count_tokens?beta=true", Api::CountTokens),
            (VllmHttp, "/inference/v1/generate", Api::VllmGenerate),
            (SglangHttp, "/generate", Api::SglangGenerate),
            (SglangHttp, "generate", Api::SglangGenerate),
            (VllmGrpc, "/vllm.grpc.engine.VllmEngine/Generate", Api::GrpcGenerate),
            (VllmGrpc, "/VllmEngine/Embed", Api::GrpcEmbed),
            (
                Vertex,
                "/google.cloud.aiplatform.v1beta1.PredictionService/ChatCompletions",
                Api::VertexChat,
            ),
            (
                Vertex,
                "/google.cloud.aiplatform.v1.PredictionService/StreamRawPredict",
                Api::VertexStreamRaw,
            ),
            (Vertex, "/google.cloud.aiplatform.v1.PredictionService/RawPredict", Api::VertexRaw),
        ];
        for (kind, path, expected) in table {
            assert_eq!(api(&[*kind], path), Some(*expected), "{path}");
            assert_eq!(api(&[Passthrough], path), Some(Api::Other), "{path}");
            let others: Vec<ParserKind> = ParserKind::ALL
                .into_iter()
                .filter(|other| other != kind && *other != Passthrough)
                .collect();
            let without = api(&others, path);
            assert!(without.is_none() || *expected == Api::VllmGenerate, "{path} {without:?}");
        }
        for path in ["/v1/models", "/v1/xmessages", "/v1/x.generate", "/", "", "*"] {
            assert_eq!(api(&ParserKind::ALL, path), Some(Api::Other), "{path}");
            assert_eq!(api(&ParserKind::ALL[..6], path), None, "{path}");
        }
    }

    #[test]
    fn the_longest_claim_wins_in_any_order() {
        for kinds in [[SglangHttp, VllmHttp], [VllmHttp, SglangHttp]] {
            assert_eq!(api(&kinds, "/inference/v1/generate"), Some(Api::VllmGenerate));
            assert_eq!(api(&kinds, "/generate"), Some(Api::SglangGenerate));
        }
    }

    #[test]
    fn duplicates_and_what_follows_a_fallback_do_not_count() {
        let parsers = Parsers::new(&[Openai, Openai, Passthrough, Anthropic, Openai]);
        assert_eq!(parsers.kinds(), [Openai, Passthrough]);
        assert_eq!(parsers.resolve("/v1/messages"), Ok(Api::Other));
        assert_eq!(parsers.resolve("/v1/embeddings"), Ok(Api::Embeddings));
    }

    #[test]
    fn nobody_claims_it() {
        let error = Parsers::new(&[Openai, VllmGrpc]).resolve("/v1/messages?key=secret");
        let text = error.unwrap_err().to_string();
        assert!(text.contains("`/v1/messages`; this router has openai-parser, vllmgrpc"), "{text}");
        let text = Parsers::new(&[]).resolve("/x").unwrap_err().to_string();
        assert!(text.contains("this router has none"), "{text}");
    }

    #[test]
    fn the_path_of_a_request_that_a_gateway_rewrote() {
        let table = [
            ("/a", Some("/b"), Some("/c"), "/a"),
            ("", Some("/b"), Some("/c"), "/b"),
            ("", Some(""), Some("/c"), "/c"),
            ("", None, Some("/c"), "/c"),
            ("", None, None, "/v1/completions"),
        ];
        for (path, original, forwarded, expected) in table {
            let header = |name: &str| match name {
                "x-original-path" => original,
                "x-forwarded-path" => forwarded,
                _ => panic!("asked for {name}"),
            };
            assert_eq!(request_path(path, header), expected);
        }
    }

    #[test]
    fn like_a_search_over_all_claims() {
        let pieces =
            ["", "/", "v1", "chat", "completions", "messages", "render", "generate", "x.", "?a=b"];
        for seed in 0..2000 {
            let mut rng = Rng::seeded(seed);
            let count = rng.below(6);
            let path: String =
                (0..count).map(|_| format!("/{}", pieces[rng.below(pieces.len())])).collect();
            let kinds: Vec<ParserKind> =
                (0..rng.below(5)).map(|_| ParserKind::ALL[rng.below(7)]).collect();
            let bare = path.split('?').next().unwrap_or_default();
            let bare = bare.strip_suffix('/').unwrap_or(bare);
            let listed = kinds.iter().position(|kind| *kind == Passthrough);
            let counted = &kinds[..listed.unwrap_or(kinds.len())];
            let mut best: Option<(&str, Api)> = None;
            for (end, api) in counted.iter().flat_map(|kind| claims_of(*kind)) {
                let slash = format!("/{end}");
                let fits = bare == *end || bare.ends_with(&slash);
                if fits && best.is_none_or(|(longest, _)| end.len() > longest.len()) {
                    best = Some((end, *api));
                }
            }
            let expected = best.map(|(_, api)| api).or(listed.map(|_| Api::Other));
            assert_eq!(api(&kinds, &path), expected, "seed {seed}: {path} {kinds:?}");
        }
    }
}
