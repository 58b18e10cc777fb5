//! What does a decision cost? The way of a request from its whole body to its decision, by the
//! live router's own code and without sockets: for benchmarks, and for tests of what it allocates.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use kvroute_core::brain::Brain;
use kvroute_core::decision::{Decision, DecisionRecord, Headers, Reject, ResponseEvent};
use kvroute_core::{EndpointId, Time};
use kvroute_wire::api::Api;
use parking_lot::MutexGuard;
use tokio::sync::{mpsc, watch};

use crate::StartError;
use crate::config::RouterConfig;
use crate::route::{self, Candidate, Chosen, Way};
use crate::shared::{Phase, Shared};
use crate::tokenize::{self, Asked};

/// Id of every request.
const REQUEST_ID: &str = "4bf92f35-77b3-4da6-a3ce-929d0e0e4736";

/// A router without sockets. What its brain knows it is told through [`Rehearsal::brain`].
pub struct Rehearsal {
    shared: Arc<Shared>,
    way: Way,
    headers: HeaderMap,
}

/// A body that was read: its tokens and chains.
pub struct Read(Asked);

/// A decision that was noted.
pub struct Decided(Chosen);

impl Rehearsal {
    /// Of a configuration, of which plan, tokenizers and model count.
    ///
    /// # Errors
    /// The recording that it asks for cannot be written.
    pub fn new(config: RouterConfig) -> Result<Rehearsal, StartError> {
        let (scraper, _) = mpsc::unbounded_channel();
        let (phase, _) = watch::channel(Phase::Serving);
        let way = Way {
            started: Instant::now(),
            request_id: REQUEST_ID.into(),
            id_value: HeaderValue::from_static(REQUEST_ID),
            api: Api::ChatCompletions,
        };
        let shared = Arc::new(crate::share(config, phase, scraper)?);
        Ok(Rehearsal { shared, way, headers: HeaderMap::new() })
    }

    /// The time as decisions see it.
    pub fn now(&self) -> Time {
        self.shared.clock.now()
    }

    /// The brain, locked.
    pub fn brain(&self) -> MutexGuard<'_, Brain> {
        self.shared.brain.lock()
    }

    /// The whole of it: a chat completion's body to its decision.
    ///
    /// # Errors
    /// Why there is no decision, in words.
    pub async fn decide(&self, body: &Bytes) -> Result<Decided, String> {
        let decided = route::decide(&self.shared, &self.way, &self.headers, Some(body), None).await;
        decided.map(Decided).map_err(|error| error.to_string())
    }

    /// The first part: tokens and chains.
    ///
    /// # Errors
    /// The body is none that is routed.
    pub async fn read(&self, body: &Bytes) -> Result<Read, String> {
        let hints = tokenize::Hints::of(&self.headers);
        let read = tokenize::read(&self.shared, self.way.api, body, hints).await;
        read.map(Read).map_err(|error| error.to_string())
    }

    /// The second part: decision and record.
    ///
    /// # Errors
    /// Why there is no decision, in words.
    pub fn choose(&self, read: &Read) -> Result<Decided, String> {
        let chosen = route::choose(&self.shared, &self.candidate(read), None, Instant::now());
        chosen.map(Decided).map_err(|error| error.to_string())
    }

    /// Of the second part the brain's share, on the brain that the caller has locked, in the memory
    /// of an older record.
    ///
    /// # Errors
    /// Why there is no decision.
    pub fn ask(
        &self,
        brain: &mut Brain,
        read: &Read,
        memory: DecisionRecord,
    ) -> Result<Decision, Reject> {
        let candidate = self.candidate(read);
        let seen = route::scheduling_headers(&self.shared, &self.headers, &read.0);
        let seen = Headers(&seen);
        let request = route::scheduled(&self.shared, &candidate, &seen, None);
        brain.decide_in(self.now(), &request, memory)
    }

    fn candidate<'a>(&'a self, read: &'a Read) -> Candidate<'a> {
        let request_id = self.way.request_id.as_str();
        Candidate { request_id, asked: &read.0, headers: &self.headers, allowed: None }
    }
}

impl Decided {
    /// Who serves the request.
    pub fn endpoint(&self) -> Option<EndpointId> {
        self.0.candidates.first().copied()
    }

    /// The request is answered.
    pub fn answer(mut self) {
        self.0.reservation.first_chunk();
        self.0.reservation.close(None, ResponseEvent::End { status: 200 });
    }
}
