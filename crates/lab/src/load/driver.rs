//! Which request leaves when, and what is noted about it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{Answer, Client, Ready};
use super::prompt::{Prompts, Said};
use super::{Load, LoadConfig, Looks, Measured, Progress};
use crate::record::{Ending, Lag, Moment, RequestRecord, RunRecord, StageRecord};
use crate::sim::timeline::Timeline;
use crate::summary::percentile;
use crate::traffic::{Arrival, Call, Traffic};

/// Between the end of a stage's last request and the start of the next stage, inference-perf waits
/// for the end of the second in which it looks, and two seconds more.
const STAGE_PAUSE_S: f64 = 2.0;

/// How often the timeline is looked after.
const TICK: Duration = Duration::from_millis(100);

/// The timeline of a run has a moment each second, of one shorter than a minute each of these.
const MOMENT_SHORT_S: f64 = 0.1;

/// After a failure a client waits this long before it goes on: a server that is gone must not be
/// asked as fast as it can refuse.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// Different endpoints that answers may name.
const ENDPOINTS_MAX: usize = u16::MAX as usize;

/// A request that waits for its time.
struct Departure {
    stage: usize,
    call: Call,
    said: Vec<Said>,
    ready: Ready,
}

/// What is due.
enum Due {
    Stage(usize),
    Arrive(usize),
    Follow(Box<Departure>),
}

/// A request on its way.
struct Flight {
    stage: usize,
    call: Call,
    said: Vec<Said>,
}

/// What comes back of a request.
struct Ended {
    /// Position in the record.
    at: usize,
    sent: Instant,
    answer: Answer,
}

#[derive(Default)]
struct StageState {
    begin: Option<Instant>,
    next: Option<Box<Departure>>,
    exhausted: bool,
    /// Requests that have not ended, those that are planned included.
    open: u64,
    over: bool,
}

/// One load on its way.
pub(super) struct Driver {
    config: LoadConfig,
    traffic: Traffic,
    prompts: Prompts,
    in_flight_max: usize,
    drain_between_stages: bool,
    client: Arc<Client>,
    looks: Option<Looks>,
    origin: Instant,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    due: FxHashMap<u64, Due>,
    queued: u64,
    tasks: JoinSet<Ended>,
    flights: FxHashMap<usize, Flight>,
    stages: Vec<StageState>,
    measured: Measured,
    lags: Vec<f64>,
    ended: Vec<bool>,
    timeline: Timeline,
    progress: Progress,
}

impl Driver {
    /// A load whose first stage begins at `origin`; one in the past makes it late.
    pub(super) fn new(load: Load, looks: Option<Looks>, origin: Instant) -> Driver {
        let Load { config, traffic, prompts, client, in_flight_max, drain_between_stages } = load;
        let stages = traffic.stages();
        let mut record =
            RunRecord { name: config.name.clone(), seed: config.seed, ..RunRecord::default() };
        record.stages.extend(stages.iter().map(|stage| StageRecord {
            rate: stage.rate * config.speed,
            duration_s: stage.duration_s / config.speed,
            warmup: stage.warmup,
            ..StageRecord::default()
        }));
        let progress = Progress {
            planned: stages.iter().map(|stage| stage.arrivals).sum(),
            planned_s: record.stages.iter().map(|stage| stage.duration_s).sum(),
            stages: stages.len(),
            ..Progress::default()
        };
        Driver {
            client: Arc::new(client),
            looks,
            origin,
            queue: BinaryHeap::new(),
            due: FxHashMap::default(),
            queued: 0,
            tasks: JoinSet::new(),
            flights: FxHashMap::default(),
            stages: stages.iter().map(|_| StageState::default()).collect(),
            config,
            traffic,
            prompts,
            in_flight_max,
            drain_between_stages,
            measured: Measured { record, ..Measured::default() },
            lags: Vec::new(),
            ended: Vec::new(),
            timeline: Timeline::every(if progress.planned_s < 60.0 { MOMENT_SHORT_S } else { 1.0 }),
            progress,
        }
    }

    pub(super) async fn run(
        mut self,
        stop: impl Future<Output = ()>,
        mut progress: impl FnMut(Progress),
    ) -> Measured {
        tokio::pin!(stop);
        let mut tick = tokio::time::interval(TICK);
        self.plan(self.origin, Due::Stage(0));
        while !self.queue.is_empty() || !self.tasks.is_empty() {
            let next = self.queue.peek().map(|Reverse((at, _))| *at);
            let departure = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = departure => self.pass(Instant::now()),
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(ended) => self.end(ended),
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                _ = tick.tick() => {}
                () = &mut stop => {
                    self.measured.partial = true;
                    break;
                }
            }
            self.note_moment();
            self.progress.at_s = self.origin.elapsed().as_secs_f64();
            progress(self.progress);
        }
        self.finish()
    }

    fn seconds(&self, scenario_s: f64) -> Duration {
        Duration::try_from_secs_f64(scenario_s / self.config.speed).unwrap_or(Duration::MAX)
    }

    fn plan(&mut self, at: Instant, due: Due) {
        self.queued += 1;
        self.queue.push(Reverse((at, self.queued)));
        self.due.insert(self.queued, due);
    }

    /// Does everything that is due.
    fn pass(&mut self, now: Instant) {
        while let Some(Reverse((at, number))) = self.queue.peek().copied() {
            if at > now {
                break;
            }
            self.queue.pop();
            match self.due.remove(&number) {
                Some(Due::Stage(stage)) => self.begin_stage(stage, at),
                Some(Due::Arrive(stage)) => {
                    if let Some(departure) = self.stages[stage].next.take() {
                        self.stages[stage].open += 1;
                        self.send(*departure, at);
                        self.plan_arrival(stage);
                    }
                }
                Some(Due::Follow(departure)) => self.send(*departure, at),
                None => {}
            }
        }
    }

    fn begin_stage(&mut self, stage: usize, now: Instant) {
        let Some(&spec) = self.traffic.stages().get(stage) else { return };
        self.progress.stage = stage;
        self.stages[stage].begin = Some(now);
        self.measured.record.stages[stage].begin_s =
            now.saturating_duration_since(self.origin).as_secs_f64();
        if spec.clients > 0 {
            while let Some(arrival) = self.traffic.next(stage) {
                self.follow(stage, arrival, Vec::new(), now);
            }
            self.stages[stage].exhausted = true;
        } else {
            self.plan_arrival(stage);
        }
        if !self.drain_between_stages && stage + 1 < self.stages.len() {
            self.plan(now + self.seconds(spec.duration_s), Due::Stage(stage + 1));
        }
        self.check_stage(stage);
    }

    fn plan_arrival(&mut self, stage: usize) {
        match self.traffic.next(stage) {
            Some(arrival) => {
                let due = self.due_at(stage, arrival.at_s);
                let departure = self.departure(stage, arrival.call, Vec::new());
                self.stages[stage].next = Some(Box::new(departure));
                self.plan(due, Due::Arrive(stage));
            }
            None => {
                self.stages[stage].exhausted = true;
                self.check_stage(stage);
            }
        }
    }

    fn follow(&mut self, stage: usize, arrival: Arrival, said: Vec<Said>, earliest: Instant) {
        self.stages[stage].open += 1;
        let due = self.due_at(stage, arrival.at_s).max(earliest);
        let departure = self.departure(stage, arrival.call, said);
        self.plan(due, Due::Follow(Box::new(departure)));
    }

    fn due_at(&self, stage: usize, at_s: f64) -> Instant {
        let begin = self.stages[stage].begin.unwrap_or(self.origin);
        begin.checked_add(self.seconds(at_s)).unwrap_or(begin)
    }

    /// Makes the body before it is due.
    fn departure(&self, stage: usize, call: Call, said: Vec<Said>) -> Departure {
        let mut body = json!({
            "model": self.config.model,
            "max_tokens": call.output_tokens,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        self.prompts.put(&mut body, &call.tokens, &said);
        let ready = Ready {
            body: Bytes::from(body.to_string()),
            session: call.session,
            keep_text: !call.output.is_empty(),
        };
        Departure { stage, call, said, ready }
    }

    /// Sends, unless too many are in flight already.
    fn send(&mut self, departure: Departure, due: Instant) {
        let Departure { stage, call, said, ready } = departure;
        let at = self.measured.record.requests.len();
        let sent = Instant::now();
        let refused = self.flights.len() >= self.in_flight_max;
        self.measured.record.requests.push(RequestRecord {
            stage: stage as u32,
            endpoint: u16::MAX,
            ending: if refused { Ending::Refused } else { Ending::Failed },
            sent_s: sent.saturating_duration_since(self.origin).as_secs_f64(),
            prompt_tokens: call.tokens.len() as u32,
            ..RequestRecord::default()
        });
        self.progress.sent += 1;
        self.ended.push(refused);
        self.lags.push(sent.saturating_duration_since(due).as_secs_f64());
        if refused {
            self.progress.ended += 1;
            self.fail("too many in flight", "the scenario's client.in_flight_max");
            self.stages[stage].open -= 1;
            return self.check_stage(stage);
        }
        self.note_signals(stage);
        self.flights.insert(at, Flight { stage, call, said });
        let client = self.client.clone();
        self.tasks.spawn(async move {
            let sent = Instant::now();
            let answer = client.send(ready).await;
            Ended { at, sent, answer }
        });
    }

    /// How loaded the engines are as a request leaves.
    fn note_signals(&mut self, stage: usize) {
        let Some(looks) = &self.looks else { return };
        let record = &mut self.measured.record.stages[stage];
        for look in looks() {
            record.waiting.add(look.waiting, 1);
            record.kv_usage.add(look.kv_usage, 1);
        }
    }

    fn note_moment(&mut self) {
        let now_s = self.origin.elapsed().as_secs_f64();
        if !self.timeline.is_due(now_s) {
            return;
        }
        self.timeline.sums.output_tokens += self.client.emitted.swap(0, Ordering::Relaxed);
        let looks = self.looks.as_ref().map(|looks| looks()).unwrap_or_default();
        let mut moment = Moment { in_flight: self.flights.len() as u32, ..Moment::default() };
        let count = looks.len().max(1) as f32;
        for look in looks {
            moment.waiting += look.waiting as f32 / count;
            moment.waiting_max = moment.waiting_max.max(look.waiting as f32);
            moment.running += look.running as f32 / count;
            moment.kv_usage += look.kv_usage as f32 / count;
        }
        self.timeline.note(now_s, || moment);
    }

    fn fail(&mut self, kind: &str, message: &str) {
        self.progress.failed += 1;
        let failure = self.measured.failures.entry(kind.to_owned()).or_default();
        failure.count += 1;
        if failure.count == 1 {
            failure.example = message.to_owned();
        }
    }

    fn end(&mut self, ended: Ended) {
        let Ended { at, sent, answer } = ended;
        let Some(mut flight) = self.flights.remove(&at) else { return };
        let (stage, now) = (flight.stage, Instant::now());
        // Between the decision to send and the sending lies the scheduler of the runtime.
        let sent_s = sent.saturating_duration_since(self.origin).as_secs_f64();
        self.lags[at] += sent_s - self.measured.record.requests[at].sent_s;
        self.measured.record.requests[at].sent_s = sent_s;
        self.ended[at] = true;
        self.progress.ended += 1;
        self.note_answer(at, stage, &answer);
        let mut earliest = now;
        match &answer.failed {
            Some(failed) => {
                self.fail(&failed.kind, &failed.message);
                earliest += FAILURE_PAUSE;
            }
            None if !flight.call.output.is_empty() => flight.said.push(Said {
                at: flight.call.tokens.len(),
                tokens: flight.call.output.len(),
                text: answer.text.into(),
            }),
            None => {}
        }
        let begin = self.stages[stage].begin.unwrap_or(self.origin);
        let at_s = now.saturating_duration_since(begin).as_secs_f64() * self.config.speed;
        if let Some(arrival) = self.traffic.follow_up(stage, &flight.call, at_s) {
            // Another session's prompt repeats nothing of this one.
            let same =
                arrival.call.session.is_some() && arrival.call.session == flight.call.session;
            let said = if same { flight.said } else { Vec::new() };
            self.follow(stage, arrival, said, earliest);
        }
        self.stages[stage].open -= 1;
        self.check_stage(stage);
    }

    fn note_answer(&mut self, at: usize, stage: usize, answer: &Answer) {
        let endpoint = answer.endpoint.as_deref().map_or(u16::MAX, |name| self.endpoint(name));
        let record = &mut self.measured.record.requests[at];
        record.endpoint = endpoint;
        record.total_s = answer.total.as_secs_f32();
        if let Some(failed) = &answer.failed {
            record.ending = failed.ending;
            return;
        }
        record.ending = Ending::Answered;
        record.ttft_s = answer.first.unwrap_or_default().as_secs_f32();
        record.output_tokens = answer.tokens;
        record.counted_tokens = answer.tokens as f32;
        match answer.usage {
            None => self.measured.without_usage += 1,
            Some(usage) => {
                record.prompt_tokens = usage.prompt_tokens;
                record.cached_tokens = usage.cached_tokens.unwrap_or(0);
                self.measured.without_cached += u64::from(usage.cached_tokens.is_none());
            }
        }
        self.timeline.sums.prompt_tokens += u64::from(record.prompt_tokens);
        self.timeline.sums.cached_tokens += u64::from(record.cached_tokens);
        let gaps = &mut self.measured.record.stages[stage].gaps_s;
        answer.gaps_s.iter().for_each(|&gap| gaps.add(f64::from(gap), 1));
    }

    /// The position of an endpoint in the fleet.
    fn endpoint(&mut self, name: &str) -> u16 {
        let known = &mut self.config.endpoints;
        let at = known.iter().position(|endpoint| endpoint == name).unwrap_or_else(|| {
            if known.len() < ENDPOINTS_MAX {
                known.push(name.to_owned());
            }
            known.len() - 1
        });
        at as u16
    }

    fn check_stage(&mut self, stage: usize) {
        let state = &mut self.stages[stage];
        if state.over || !state.exhausted || state.open > 0 {
            return;
        }
        state.over = true;
        if self.drain_between_stages && stage + 1 < self.stages.len() {
            let begin = self.stages[stage].begin.unwrap_or(self.origin);
            let passed = begin.elapsed().as_secs_f64() * self.config.speed;
            let due = begin + self.seconds(passed.ceil() + STAGE_PAUSE_S);
            self.plan(due, Due::Stage(stage + 1));
        }
    }

    fn finish(mut self) -> Measured {
        let mut measured = self.measured;
        let mut ended = self.ended.into_iter();
        measured.record.requests.retain(|_| ended.next().unwrap_or(false));
        if measured.partial {
            measured.record.name += " (stopped early)";
        }
        self.lags.sort_by(f64::total_cmp);
        let lag = Lag {
            p50: percentile(&self.lags, 50.0),
            p99: percentile(&self.lags, 99.0),
            max: self.lags.last().copied().unwrap_or(0.0),
        };
        measured.record.lag = Some(lag);
        measured.valid = lag.p99 <= self.config.lag_p99_max_s;
        measured.record.timeline = self.timeline.into_moments();
        measured
    }
}
