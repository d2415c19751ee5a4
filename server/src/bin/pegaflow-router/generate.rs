//! Requests that generate: a prompt computed apart where that is wanted, an engine that answers, another one where it
//! fails, and answers that go on with another one.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, BodyDataStream, Bytes, to_bytes};
use axum::http::{HeaderValue, Method, Response, StatusCode, header};
use futures::StreamExt;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::answer::{Answer, Broken};
use crate::engines::{Chosen, Engines, Stage};
use crate::known_keys::{Held, Told};
use crate::metrics::{self, End};
use crate::plan::Plan;

/// An answer without streaming may have so many bytes.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// Between rounds through all engines.
const ROUND_PAUSE: Duration = Duration::from_millis(200);

/// How requests are treated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) prefill_from: usize,
    pub(crate) tries: u32,
    pub(crate) timeout: Duration,
    pub(crate) pause: Duration,
    pub(crate) requests_max: usize,
}

/// What all requests share.
#[derive(Debug, Clone)]
pub(crate) struct Generator {
    pub(crate) engines: Arc<Engines>,
    pub(crate) settings: Settings,
    places: Arc<Semaphore>,
}

/// Says how a request ended, unless that was said: then its client has gone.
struct Counted {
    is_told: bool,
    _place: OwnedSemaphorePermit,
}

impl Counted {
    fn end(&mut self, how: End) {
        if !std::mem::replace(&mut self.is_told, true) {
            metrics::ended(how);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.end(End::Abandoned);
    }
}

/// An engine's answer has begun.
struct Begun {
    engine: Chosen,
    response: Response<Body>,
}

/// Why a try came to nothing.
enum Failure {
    /// Said by the engine, and to be passed on if nobody says better.
    Status(Response<Body>),
    Lost(String),
}

/// Tries of one stage of a request that are left, and engines that have failed in it.
struct Tries {
    stage: Stage,
    left: u32,
    failed: Vec<usize>,
    deadline: Instant,
    /// What the engines' servers hold of the prompt.
    held: Vec<Held>,
    /// Whether engines are asked for keys of the prompt's blocks. Streams carry none.
    asks_keys: bool,
}

impl Generator {
    pub(crate) fn new(engines: Arc<Engines>, settings: Settings) -> Self {
        Self { engines, settings, places: Arc::new(Semaphore::new(settings.requests_max)) }
    }

    /// Answers a request that generates. Dropping the future or the answer's body ends what engines do for it.
    pub(crate) async fn generate(self, plan: Result<Plan, String>, began: Instant) -> Response<Body> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            metrics::ended(End::Refused);
            let mut refused = error(
                StatusCode::SERVICE_UNAVAILABLE,
                "overloaded",
                &format!("{} requests are being answered already; try again later", self.settings.requests_max),
            );
            refused.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            return refused;
        };
        let mut counted = Counted { is_told: false, _place: place };
        let plan = match plan {
            Ok(plan) => Arc::new(plan),
            Err(problem) => {
                counted.end(End::Refused);
                return error(StatusCode::BAD_REQUEST, "invalid_request_error", &problem);
            }
        };
        let tokens = self.hand_off(&plan, began).await;
        let mut tries = self.tries(Stage::Decode, &plan, began).await;
        let body = Bytes::from(plan.decode(tokens, tries.asks_keys));
        if !plan.is_stream {
            let (response, how) = self.whole(&plan, &body, &mut tries).await;
            metrics::first_byte(began.elapsed());
            counted.end(how);
            return response;
        }
        match self.begin(&plan, &body, &mut tries).await {
            Ok(Begun { engine, response }) => {
                let (parts, answer_body) = response.into_parts();
                let is_stream = parts
                    .headers
                    .get(header::CONTENT_TYPE)
                    .is_some_and(|kind| kind.to_str().is_ok_and(|kind| kind.starts_with("text/event-stream")));
                let relay = Relay {
                    generator: self,
                    answer: Answer::new(plan.kind, is_stream && parts.status.is_success() && plan.can_be_resumed),
                    is_stream,
                    plan,
                    body,
                    engine: Some(engine),
                    upstream: answer_body.into_data_stream(),
                    tries,
                    counted,
                    began: Some(began),
                    is_over: false,
                };
                let stream = futures::stream::unfold(relay, Relay::next);
                Response::from_parts(parts, Body::from_stream(stream))
            }
            Err(failure) => {
                counted.end(End::Unanswered);
                failure.response()
            }
        }
    }

    async fn tries(&self, stage: Stage, plan: &Plan, began: Instant) -> Tries {
        let is_told = stage == Stage::Prefill || !plan.is_stream;
        Tries {
            stage,
            left: self.settings.tries,
            failed: Vec::new(),
            deadline: began + self.settings.timeout,
            held: self.engines.held(stage, &plan.beginning).await,
            asks_keys: is_told && plan.has_one_prompt && self.engines.servers.are_there(),
        }
    }

    /// Has the prompt computed by an engine for that. How many of its tokens the cache has then, or nothing: then the
    /// engine that answers computes them itself.
    async fn hand_off(&self, plan: &Plan, began: Instant) -> Option<u64> {
        if !self.engines.is_apart || !plan.is_worth_a_handoff(self.settings.prefill_from) {
            return None;
        }
        let since = Instant::now();
        let mut tries = self.tries(Stage::Prefill, plan, began).await;
        // Who answers can compute the prompt as well: not worth waiting for engines that are down.
        tries.left = tries.left.min(2);
        let body = Bytes::from(plan.prefill(tries.asks_keys));
        let (response, how) = self.whole(plan, &body, &mut tries).await;
        let tokens = match to_bytes(response.into_body(), ANSWER_BYTES_MAX).await {
            Ok(answer) if matches!(how, End::Answered) => Plan::tokens_handed_off(&answer),
            _ => None,
        };
        metrics::handed_off(tokens.map(|_| since.elapsed()));
        if tokens.is_none() {
            tracing::debug!("a prompt was not handed off; the engine that answers computes it");
        }
        tokens
    }

    /// An answer as a whole.
    async fn whole(&self, plan: &Plan, body: &Bytes, tries: &mut Tries) -> (Response<Body>, End) {
        loop {
            let begun = match self.begin(plan, body, tries).await {
                Ok(begun) => begun,
                Err(failure) => return (failure.response(), End::Unanswered),
            };
            let (parts, answer) = begun.response.into_parts();
            let all = tokio::time::timeout_at(tries.deadline.into(), to_bytes(answer, ANSWER_BYTES_MAX)).await;
            match all {
                Ok(Ok(all)) => {
                    let is_told = tries.asks_keys && parts.status.is_success();
                    let all = if is_told { self.learn(plan, &begun.engine, tries.stage, all).await } else { all };
                    return (Response::from_parts(parts, Body::from(all)), End::Answered);
                }
                Ok(Err(lost)) => self.failed(&begun.engine, tries, &lost.to_string()),
                Err(_) => self.failed(&begun.engine, tries, "the answer took too long"),
            }
        }
    }

    /// Takes what an engine tells of the prompt's blocks out of its answer, which is returned without it.
    async fn learn(&self, plan: &Plan, engine: &Chosen, stage: Stage, answer: Bytes) -> Bytes {
        let (told, left) = Told::take(&answer, plan.wants_keys);
        if let Some(told) = told {
            let (engines, beginning, engine) = (Arc::clone(&self.engines), plan.beginning.clone(), engine.number());
            let learning = async move { engines.servers.learn(&beginning, &told, engine).await };
            // Who answers next is chosen by it; nobody waits for it otherwise.
            match stage {
                Stage::Prefill => learning.await,
                Stage::Decode => drop(tokio::spawn(learning)),
            }
        }
        left.map_or(answer, Bytes::from)
    }

    fn failed(&self, engine: &Chosen, tries: &mut Tries, why: &str) {
        metrics::failed(&engine.name, tries.stage.as_str());
        tracing::warn!(engine = engine.name, stage = tries.stage.as_str(), why, "a try failed");
        tries.failed.push(engine.number());
    }

    /// The beginning of an answer, from the first engine that gives one.
    async fn begin(&self, plan: &Plan, body: &Bytes, tries: &mut Tries) -> Result<Begun, Failure> {
        let mut worst = None;
        let nobody = || Failure::Lost("no engine answers".into());
        while tries.left > 0 && Instant::now() < tries.deadline {
            tries.left -= 1;
            let chosen = self.engines.choose(tries.stage, &plan.beginning, &tries.held, &tries.failed);
            let Some(engine) = chosen else {
                // All have failed once; perhaps one is back.
                if tries.failed.is_empty() {
                    break;
                }
                tries.failed.clear();
                tokio::time::sleep(ROUND_PAUSE).await;
                continue;
            };
            metrics::chosen(tries.stage.as_str(), engine.reason);
            match self.try_one(&engine, plan, body, tries).await {
                Ok(response) => return Ok(Begun { engine, response }),
                // What an engine says tells more than that another one is gone.
                Err(failure) if !matches!(worst, Some(Failure::Status(_))) => worst = Some(failure),
                Err(_) => {}
            }
        }
        Err(worst.unwrap_or_else(nobody))
    }

    async fn try_one(
        &self,
        engine: &Chosen,
        plan: &Plan,
        body: &Bytes,
        tries: &mut Tries,
    ) -> Result<Response<Body>, Failure> {
        metrics::tried(&engine.name, tries.stage.as_str());
        let sent = self.engines.send(engine, (Method::POST, &plan.path), &plan.headers, Body::from(body.clone()));
        match tokio::time::timeout_at(tries.deadline.into(), sent).await {
            Ok(Ok(response)) if response.status().is_server_error() => {
                self.failed(engine, tries, response.status().as_str());
                Err(Failure::Status(response))
            }
            Ok(Ok(response)) => {
                self.engines.note(&plan.beginning, engine);
                Ok(response)
            }
            Ok(Err(why)) => {
                self.engines.is_lost(engine, &why);
                self.failed(engine, tries, &why);
                Err(Failure::Lost(why))
            }
            Err(_) => {
                self.failed(engine, tries, "no answer in time");
                Err(Failure::Lost(format!("no answer within {:?}", self.settings.timeout)))
            }
        }
    }
}

impl Failure {
    fn response(self) -> Response<Body> {
        match self {
            Self::Status(response) => response,
            Self::Lost(why) => {
                error(StatusCode::BAD_GATEWAY, "engine_unavailable", &format!("no engine answers: {why}"))
            }
        }
    }
}

/// A streamed answer on its way.
struct Relay {
    generator: Generator,
    plan: Arc<Plan>,
    body: Bytes,
    answer: Answer,
    /// Events, and not an answer of another kind, which is passed on as it is.
    is_stream: bool,
    engine: Option<Chosen>,
    upstream: BodyDataStream,
    tries: Tries,
    counted: Counted,
    /// Until its first byte.
    began: Option<Instant>,
    is_over: bool,
}

impl Relay {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        while !self.is_over {
            let pause = self.generator.settings.pause;
            let why = match tokio::time::timeout(pause, self.upstream.next()).await {
                Ok(Some(Ok(bytes))) => match self.take(&bytes) {
                    Ok(out) if out.is_empty() => continue,
                    Ok(out) => return Some(self.give(out)),
                    Err(broken) => return Some(self.break_off(broken_why(broken))),
                },
                Ok(None) if !self.is_stream => {
                    self.counted.end(End::Answered);
                    return None;
                }
                Ok(None) => "the engine ended in the middle of its answer".to_owned(),
                Ok(Some(Err(lost))) => lost.to_string(),
                Err(_) => format!("the engine said nothing for {pause:?}"),
            };
            if self.answer.is_done {
                // However the connection ended, nothing is missing.
                self.counted.end(End::Answered);
                return None;
            }
            if let Some(engine) = self.engine.take() {
                self.generator.failed(&engine, &mut self.tries, &why);
            }
            if !self.resume().await {
                return Some(self.break_off(&why));
            }
        }
        None
    }

    fn take(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Broken> {
        if self.is_stream { self.answer.take(bytes) } else { Ok(bytes.to_vec()) }
    }

    fn give(mut self, out: Vec<u8>) -> (Result<Bytes, Infallible>, Self) {
        if let Some(began) = self.began.take() {
            metrics::first_byte(began.elapsed());
        }
        (Ok(Bytes::from(out)), self)
    }

    /// Has another engine begin from the start; whether one did.
    async fn resume(&mut self) -> bool {
        if !self.answer.can_be_resumed() {
            return false;
        }
        // The tries of an answer that has begun are its own.
        self.tries.deadline = Instant::now() + self.generator.settings.timeout;
        let begun = self.generator.begin(&self.plan, &self.body, &mut self.tries).await;
        let Ok(Begun { engine, response }) = begun else { return false };
        if !response.status().is_success() {
            return false;
        }
        tracing::info!(engine = engine.name, "goes on with an answer");
        metrics::resumed();
        self.answer.resume();
        self.engine = Some(engine);
        self.upstream = response.into_body().into_data_stream();
        true
    }

    /// Tells the client that its answer is not whole.
    fn break_off(mut self, why: &str) -> (Result<Bytes, Infallible>, Self) {
        self.counted.end(End::BrokenOff);
        self.is_over = true;
        tracing::warn!(why, "an answer was broken off");
        let value = json!({ "error": { "message": why, "type": "engine_lost", "code": 502 } });
        (Ok(Bytes::from(format!("data: {value}\n\n"))), self)
    }
}

fn broken_why(broken: Broken) -> &'static str {
    match broken {
        Broken::Differs => "the engine was lost, and another one answers differently",
        Broken::TooLong => "an event of the answer is too long",
    }
}

/// An error as the OpenAI API has them.
pub(crate) fn error(status: StatusCode, kind: &str, message: &str) -> Response<Body> {
    let value = json!({ "error": { "message": message, "type": kind, "code": status.as_u16() } });
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
