//! The HTTP side of an engine: connections, paths, and vLLM's error bodies.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use kvroute_core::Rng;
use kvroute_wire::api::Api;
use kvroute_wire::engine_api::{
    Counts, Detokenized, Embedding, Embeddings, ErrorBody, ErrorInfo, KvEventSource, ModelCard,
    ModelPermission, Models, Tokenized,
};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::answer::{ResponseBody, Running};
use super::publisher::{BUFFER_STEPS_MAX, SUBSCRIBER_QUEUE_MAX};
use super::runner::Command;
use super::{Shared, endpoint, generate};

/// Longest request body.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Requests in flight at most; vLLM has no such limit, but a test double must not eat the machine.
const IN_FLIGHT_MAX: usize = 65_536;

/// Length of the embeddings, which are noise.
const EMBEDDING_LENGTH: usize = 8;

/// The version whose behaviour is imitated.
const VERSION: &str = "0.32.0";

type Answer = Response<ResponseBody>;

/// An error in vLLM's shape.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(
        status: StatusCode,
        kind: &'static str,
        message: impl Into<String>,
        param: Option<&'static str>,
    ) -> Refusal {
        Refusal { status, kind, message: message.into(), param }
    }

    /// A body of the wrong shape: the type is the status phrase, as for every error that vLLM's
    /// HTTP layer finds itself.
    pub(super) fn validation(message: String, param: Option<&'static str>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, "Bad Request", message, param)
    }

    fn into_answer(self) -> Answer {
        let error = ErrorInfo {
            message: &self.message,
            kind: self.kind,
            param: self.param,
            code: self.status.as_u16(),
        };
        json(self.status, &ErrorBody { error })
    }
}

impl Shared {
    /// 16 hex digits for an id.
    pub(super) fn random_id(&self) -> String {
        let count = self.next_id.fetch_add(1, Ordering::Relaxed);
        let seed = self.config.seed ^ self.started_unix_s.to_bits() ^ count.rotate_left(32);
        format!("{:016x}", Rng::seeded(seed).next_u64())
    }
}

/// Accepts connections until `stop`, then lets those it has finish their requests and says so.
pub(super) async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(connection(shared.clone(), stream, stop.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
            () = stopped(&mut stop) => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    shared.drained.send_replace(true);
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the handle is gone, and soon this task.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn connection(shared: Arc<Shared>, stream: TcpStream, mut stop: watch::Receiver<bool>) {
    // Without it, small chunks wait for acknowledgements; an error only costs that.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(shared, request).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Answer {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let known_get = match path {
        "/health" | "/ping" => Some(Response::new(ResponseBody::Whole(None))),
        "/version" => Some(json(StatusCode::OK, &serde_json::json!({"version": VERSION}))),
        "/load" => {
            let load = shared.in_flight.load(Ordering::Relaxed);
            Some(json(StatusCode::OK, &serde_json::json!({"server_load": load})))
        }
        "/v1/models" => Some(models(&shared)),
        "/metrics" => Some(metrics(&shared)),
        "/kv_event_sources" => Some(kv_event_sources(&shared)),
        _ => None,
    };
    let post = matches!(
        path,
        "/v1/completions"
            | "/v1/chat/completions"
            | "/v1/embeddings"
            | "/inference/v1/generate"
            | "/tokenize"
            | "/detokenize"
            | "/reset_prefix_cache"
    );
    match known_get {
        Some(answer) if head.method == Method::GET => answer,
        None if post && head.method == Method::POST => {
            let answered = post_answer(&shared, &head.headers, path, body).await;
            answered.unwrap_or_else(Refusal::into_answer)
        }
        None if !post => wrong(StatusCode::NOT_FOUND, "Not Found"),
        _ => wrong(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"),
    }
}

fn wrong(status: StatusCode, phrase: &'static str) -> Answer {
    Refusal::new(status, phrase, phrase, None).into_answer()
}

async fn post_answer(
    shared: &Arc<Shared>,
    headers: &HeaderMap,
    path: &str,
    body: Incoming,
) -> Result<Answer, Refusal> {
    let body = Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(|error| {
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Refusal::new(status, "Request Entity Too Large", error.to_string(), None)
    })?;
    let body = body.to_bytes();
    match path {
        "/reset_prefix_cache" => {
            let (reply, done) = oneshot::channel();
            // A dead engine never answers; then nothing was reset.
            let _ = shared.commands.send(Command::Reset(reply));
            let success = done.await.unwrap_or(false);
            Ok(json(StatusCode::OK, &serde_json::json!({"success": success})))
        }
        "/tokenize" => off_reactor(shared, move |shared| tokenize(shared, &body)).await,
        "/detokenize" => off_reactor(shared, move |shared| detokenize(shared, &body)).await,
        _ => generation(shared, Api::from_path(path), headers, body).await,
    }
}

/// Runs tokenization where it does not hold up other connections.
async fn off_reactor<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Arc<Shared>) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let shared = shared.clone();
    tokio::task::spawn_blocking(move || work(&shared)).await.unwrap_or_else(|error| {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Err(Refusal::new(status, "InternalServerError", error.to_string(), None))
    })
}

async fn generation(
    shared: &Arc<Shared>,
    api: Api,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<Answer, Refusal> {
    if shared.in_flight.load(Ordering::Relaxed) >= IN_FLIGHT_MAX {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let message = format!("{IN_FLIGHT_MAX} requests are in flight already.");
        return Err(Refusal::new(status, "ServiceUnavailableError", message, None));
    }
    let headers = headers.clone();
    let prepared =
        off_reactor(shared, move |shared| generate::prepare(shared, api, &headers, &body)).await?;
    if api == Api::Embeddings {
        return Ok(embeddings(&prepared));
    }
    let stream = prepared.stream;
    let running = Running::start(shared.clone(), prepared);
    if stream {
        let mut answer = Response::new(ResponseBody::Events(Box::new(running)));
        let kind = header::HeaderValue::from_static("text/event-stream; charset=utf-8");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        return Ok(answer);
    }
    match running.whole().await {
        Some(bytes) => Ok(with_type("application/json", bytes)),
        None => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Err(Refusal::new(status, "InternalServerError", "EngineCore died.", None))
        }
    }
}

fn with_type(kind: &'static str, bytes: Bytes) -> Answer {
    let mut answer = Response::new(ResponseBody::Whole(Some(bytes)));
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    answer
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let bytes = serde_json::to_vec(value).expect("an answer has only string keys");
    let mut answer = with_type("application/json", bytes.into());
    *answer.status_mut() = status;
    answer
}

fn embeddings(prepared: &generate::Prepared) -> Answer {
    let data = prepared.prompts.iter().enumerate().map(|(i, prompt)| {
        let hash = prompt.iter().fold(7u32, |sum, &token| sum.wrapping_mul(31) ^ token);
        let value = |k: usize| (hash.rotate_left(k as u32 * 4) & 0xffff) as f32 / 65_536.0 - 0.5;
        let embedding = (0..EMBEDDING_LENGTH).map(value).collect();
        Embedding { index: i as u32, object: "embedding", embedding }
    });
    let answer = Embeddings {
        id: &prepared.id,
        object: "list",
        created: super::unix_s() as u64,
        model: &prepared.model,
        data: data.collect(),
        usage: Counts { prompt_tokens: prepared.prompt_tokens(), ..Counts::default() }.into(),
    };
    json(StatusCode::OK, &answer)
}

fn models(shared: &Shared) -> Answer {
    let created = shared.started_unix_s as u64;
    let base = &shared.config.model;
    let card = |id, root, parent, max_model_len| ModelCard {
        id,
        object: "model",
        created,
        owned_by: "vllm",
        root,
        parent,
        max_model_len,
        permission: [ModelPermission::new(format!("modelperm-{}", shared.random_id()), created)],
    };
    let mut data = vec![card(base, base, None, Some(shared.config.max_model_len))];
    for adapter in &shared.config.adapters {
        data.push(card(&adapter.name, &adapter.path, Some(base), None));
    }
    json(StatusCode::OK, &Models { object: "list", data })
}

fn metrics(shared: &Shared) -> Answer {
    let text = shared.metrics().render();
    with_type("text/plain; version=0.0.4; charset=utf-8", text.into())
}

fn kv_event_sources(shared: &Shared) -> Answer {
    let config = &shared.config;
    let Some(events) = config.events.or(config.events_to) else {
        return json(StatusCode::OK, &serde_json::json!({}));
    };
    let replay = config.replay.map(endpoint);
    let events = endpoint(events);
    let source = KvEventSource {
        enable_kv_cache_events: true,
        publisher: "zmq",
        endpoint: &events,
        replay_endpoint: replay.as_deref(),
        buffer_steps: BUFFER_STEPS_MAX,
        hwm: SUBSCRIBER_QUEUE_MAX,
        max_queue_size: SUBSCRIBER_QUEUE_MAX,
        topic: &config.topic,
    };
    json(StatusCode::OK, &std::collections::BTreeMap::from([("0", source)]))
}

#[derive(Deserialize)]
struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

fn tokenize(shared: &Arc<Shared>, body: &[u8]) -> Result<Answer, Refusal> {
    let invalid = |error: String| Refusal::validation(error, None);
    let request: TokenizeRequest =
        serde_json::from_slice(body).map_err(|error| invalid(error.to_string()))?;
    generate::served(shared, request.model.as_deref())?;
    let tokens = match &request.prompt {
        Some(prompt) => {
            let special = request.add_special_tokens.unwrap_or(true);
            shared.text.encode(prompt, special).map_err(|error| invalid(error.to_string()))?
        }
        None => {
            let parsed = kvroute_wire::request::parse(Api::ChatCompletions, body)
                .map_err(|error| invalid(error.to_string()))?;
            let prompts =
                shared.text.prompts(&parsed).map_err(|error| invalid(error.to_string()))?;
            prompts.into_iter().next().unwrap_or_default()
        }
    };
    let strings = request
        .return_token_strs
        .unwrap_or(false)
        .then(|| tokens.iter().map(|&id| shared.text.decode(&[id]).unwrap_or_default()).collect());
    let answer = Tokenized {
        count: tokens.len(),
        max_model_len: shared.config.max_model_len,
        tokens: &tokens,
        token_strs: strings,
    };
    Ok(json(StatusCode::OK, &answer))
}

#[derive(Deserialize)]
struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

fn detokenize(shared: &Arc<Shared>, body: &[u8]) -> Result<Answer, Refusal> {
    let invalid = |error: String| Refusal::validation(error, None);
    let request: DetokenizeRequest =
        serde_json::from_slice(body).map_err(|error| invalid(error.to_string()))?;
    generate::served(shared, request.model.as_deref())?;
    let prompt = shared.text.decode(&request.tokens).map_err(|error| invalid(error.to_string()))?;
    Ok(json(StatusCode::OK, &Detokenized { prompt: &prompt }))
}
