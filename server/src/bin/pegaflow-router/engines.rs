//! The engines behind the router: who is up, who has how much to do, and who gets the next request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use parking_lot::Mutex;

use crate::affinity::{Affinity, Beginning};
use crate::known_keys::Held;
use crate::metrics;
use crate::plan::to_be_sent;
use crate::servers::Servers;

/// One bit of a word stands for each.
const ENGINES_MAX: usize = 64;
/// An engine that has seen all of a prompt may have so many requests more to do than another.
const AFFINITY_REQUESTS: f64 = 4.0;
/// What a block in the server's DRAM or on its drive is worth beside one in the engine's own cache: it has to be loaded.
const DRAM_WORTH: f64 = 0.75;
const DRIVE_WORTH: f64 = 0.5;
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// A busy engine answers late. It counts as gone after so long, twice in a row.
const HEALTH_MAX: Duration = Duration::from_secs(5);
const FAILURES_MAX: usize = 2;

/// What an engine is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Roles {
    /// Computes prompts for others.
    pub(crate) computes_prompts: bool,
    /// Answers.
    pub(crate) answers: bool,
}

/// What a request needs of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its prompt computed.
    Prefill,
    /// The answer.
    Decode,
}

impl Stage {
    /// Its name in metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// An engine.
#[derive(Debug)]
pub(crate) struct Engine {
    number: usize,
    /// HOST:PORT.
    pub(crate) name: String,
    roles: Roles,
    is_up: AtomicBool,
    failures: AtomicUsize,
    in_flight: AtomicUsize,
}

impl Engine {
    fn serves(&self, stage: Stage) -> bool {
        match stage {
            Stage::Prefill => self.roles.computes_prompts,
            Stage::Decode => self.roles.answers,
        }
    }

    /// Its place in the list.
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    /// Whether it is believed to be there.
    pub(crate) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Relaxed)
    }
}

/// An engine with a request in flight.
#[derive(Debug)]
pub(crate) struct Chosen {
    engine: Arc<Engine>,
    /// What it has of the prompt, mostly: `seen`, `dram`, `drive`; or `load`.
    pub(crate) reason: &'static str,
}

impl std::ops::Deref for Chosen {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let before = self.engine.in_flight.fetch_sub(1, Ordering::Relaxed);
        metrics::in_flight(&self.engine.name, before - 1);
    }
}

/// What an engine has of a prompt is worth, 0 to 1, and where most of that is. What it has seen itself counts whole, up to
/// what its server shows that it can still have; what is beyond that in its server counts less.
fn worth(seen: f64, held: Held) -> (f64, &'static str) {
    let seen = seen.min(held.own_max);
    let dram = DRAM_WORTH * (held.dram - seen).max(0.0);
    let drive = DRIVE_WORTH * (held.stored - held.dram.max(seen)).max(0.0);
    let parts = [(seen, "seen"), (dram, "dram"), (drive, "drive")];
    let most = parts.into_iter().fold((0.0, "load"), |most, part| if part.0 > most.0 { part } else { most });
    (seen + dram + drive, most.1)
}

/// All of them, and the connections to them.
#[derive(Debug)]
pub(crate) struct Engines {
    all: Vec<Arc<Engine>>,
    /// Whether prompts are computed by other engines than those that answer.
    pub(crate) is_apart: bool,
    affinity: Mutex<Affinity>,
    pub(crate) servers: Servers,
    turn: AtomicUsize,
    client: Client<HttpConnector, Body>,
}

impl Engines {
    /// Engines at these addresses, with what they are for, and their servers. An error says which address is wrong.
    pub(crate) fn new(urls: Vec<(String, Roles)>, is_apart: bool, servers: Servers) -> Result<Self, String> {
        if urls.len() > ENGINES_MAX {
            return Err(format!("{} engines are given; at most {ENGINES_MAX} are served", urls.len()));
        }
        let mut all: Vec<Arc<Engine>> = Vec::with_capacity(urls.len());
        for (number, (url, roles)) in urls.into_iter().enumerate() {
            let name = authority(&url)?;
            if all.iter().any(|engine| engine.name == name) {
                return Err(format!("{url} is given twice; give it once, as --engine if it is for both"));
            }
            let is_up = AtomicBool::new(true);
            let (failures, in_flight) = (AtomicUsize::new(0), AtomicUsize::new(0));
            all.push(Arc::new(Engine { number, name, roles, is_up, failures, in_flight }));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_MAX));
        let client = Client::builder(TokioExecutor::new()).build(connector);
        let affinity = Mutex::new(Affinity::new());
        Ok(Self { all, is_apart, affinity, servers, turn: AtomicUsize::new(0), client })
    }

    /// All.
    pub(crate) fn all(&self) -> &[Arc<Engine>] {
        &self.all
    }

    /// What the servers of those engines hold that could serve this stage; nothing of anybody where there is no choice.
    ///
    /// # Cancel safety
    /// Dropping it gives the question up.
    pub(crate) async fn held(&self, stage: Stage, beginning: &Beginning) -> Vec<Held> {
        let could = |engine: &&Arc<Engine>| engine.serves(stage) && engine.is_up();
        let numbers: Vec<usize> = self.all.iter().filter(could).map(|engine| engine.number).collect();
        if numbers.len() < 2 { Vec::new() } else { self.servers.held(beginning, &numbers).await }
    }

    /// Who is to serve this stage of a request: of those that are up and were not tried yet, the one with the least to
    /// do, where having the prompt counts as much as a few requests. Who seems to be down is tried last. `held` is of
    /// [`Self::held`].
    pub(crate) fn choose(&self, stage: Stage, beginning: &Beginning, held: &[Held], tried: &[usize]) -> Option<Chosen> {
        let affinity = self.affinity.lock();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let worth_of = |engine: &Engine| {
            let held = held.get(engine.number).copied().unwrap_or(Held::NOTHING);
            worth(affinity.share(beginning, engine.number), held)
        };
        let cost = |engine: &Engine| {
            let down = if engine.is_up() { 0.0 } else { 1e9 };
            let busy = engine.in_flight.load(Ordering::Relaxed) as f64;
            down + busy - AFFINITY_REQUESTS * worth_of(engine).0
        };
        let is_fit = |engine: &&Arc<Engine>| engine.serves(stage) && !tried.contains(&engine.number);
        // Of equals another one each time.
        let order = |engine: &Engine| (engine.number + self.all.len() - turn % self.all.len()) % self.all.len();
        let best = self
            .all
            .iter()
            .filter(is_fit)
            .min_by(|one, other| cost(one).total_cmp(&cost(other)).then_with(|| order(one).cmp(&order(other))))?;
        let before = best.in_flight.fetch_add(1, Ordering::Relaxed);
        metrics::in_flight(&best.name, before + 1);
        Some(Chosen { engine: Arc::clone(best), reason: worth_of(best).1 })
    }

    /// An engine works on a prompt with this beginning.
    pub(crate) fn note(&self, beginning: &Beginning, engine: &Engine) {
        self.affinity.lock().note(beginning, engine.number);
    }

    /// An engine that can not be reached gets no more requests until its health is good again.
    pub(crate) fn is_lost(&self, engine: &Engine, why: &str) {
        if engine.is_up.swap(false, Ordering::Relaxed) {
            tracing::warn!(engine = engine.name, why, "engine is down");
            self.affinity.lock().forget(engine.number);
        }
        metrics::up(&engine.name, false);
    }

    /// Sends a request to an engine; the answer is without headers of the connection. Dropping the future, or the answer's body, ends the connection: the engine aborts.
    ///
    /// # Errors
    /// What went wrong, if no answer began.
    pub(crate) async fn send(
        &self,
        engine: &Engine,
        (method, path): (Method, &str),
        headers: &HeaderMap,
        body: Body,
    ) -> Result<Response<Body>, String> {
        let uri = Uri::builder().scheme("http").authority(engine.name.as_str()).path_and_query(path).build();
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = uri.map_err(|error| error.to_string())?;
        *request.headers_mut() = headers.clone();
        match self.client.request(request).await {
            Ok(response) => {
                let (mut parts, body) = response.into_parts();
                parts.headers = to_be_sent(&parts.headers);
                Ok(Response::from_parts(parts, Body::new(body)))
            }
            Err(error) => Err(with_sources(&error)),
        }
    }

    /// Asks an engine for its health, once.
    pub(crate) async fn look_at(&self, engine: &Engine) {
        let headers = HeaderMap::new();
        let answer = self.send(engine, (Method::GET, "/health"), &headers, Body::empty());
        let problem = match tokio::time::timeout(HEALTH_MAX, answer).await {
            Ok(Ok(response)) if response.status().is_success() => None,
            Ok(Ok(response)) => Some(format!("/health says {}", response.status())),
            Ok(Err(error)) => Some(error),
            Err(_) => Some(format!("/health says nothing for {HEALTH_MAX:?}")),
        };
        match problem {
            None => {
                engine.failures.store(0, Ordering::Relaxed);
                if !engine.is_up.swap(true, Ordering::Relaxed) {
                    tracing::info!(engine = engine.name, "engine is up");
                }
                metrics::up(&engine.name, true);
            }
            Some(why) if engine.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX => {
                self.is_lost(engine, &why);
            }
            Some(_) => {}
        }
    }

    /// Why requests can not be served, if they can not.
    pub(crate) fn problem(&self) -> Option<String> {
        // Without those that compute prompts, those that answer do that too.
        let is_answered = self.all.iter().any(|engine| engine.serves(Stage::Decode) && engine.is_up());
        (!is_answered).then(|| "no engine that answers is up".to_owned())
    }
}

/// HOST:PORT of `http://HOST:PORT`.
fn authority(url: &str) -> Result<String, String> {
    let wrong = |why: &str| format!("'{url}' is no address of an engine: {why}; give http://HOST:PORT");
    let uri: Uri = url.parse().map_err(|_| wrong("it can not be read"))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong("engines are reached by plain HTTP"));
    }
    if !matches!(uri.path_and_query().map(|path| path.as_str()), None | Some("/")) {
        return Err(wrong("it has a path"));
    }
    let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
    if authority.as_str().contains('@') {
        return Err(wrong("it has a password"));
    }
    Ok(authority.to_string())
}

/// An error with what caused it.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Roles = Roles { computes_prompts: true, answers: true };

    fn engines(count: usize) -> Engines {
        let urls = (0..count).map(|number| (format!("http://h:{}", 1000 + number), BOTH)).collect();
        Engines::new(urls, false, Servers::none()).expect("good")
    }

    #[test]
    fn wrong_addresses_are_named() {
        for url in ["https://h:1", "h:1", "http://h:1/v1", "http://u:p@h:1", "http://", "ftp://h"] {
            let problem = Engines::new(vec![(url.into(), BOTH)], false, Servers::none()).expect_err("refused");
            assert!(problem.contains(url), "{problem}");
        }
        let twice = vec![("http://h:1".into(), BOTH), ("http://h:1/".into(), BOTH)];
        assert!(Engines::new(twice, false, Servers::none()).expect_err("refused").contains("twice"));
        let many = (0..65).map(|number| (format!("http://h:{}", 1000 + number), BOTH)).collect();
        assert!(Engines::new(many, false, Servers::none()).expect_err("refused").contains("64"));
    }

    #[test]
    fn the_least_busy_serves_and_equals_take_turns() {
        let engines = engines(3);
        let none = Beginning::default();
        let chosen: Vec<Chosen> =
            (0..6).map(|_| engines.choose(Stage::Decode, &none, &[], &[]).expect("some")).collect();
        for engine in engines.all() {
            assert_eq!(engine.in_flight.load(Ordering::Relaxed), 2);
        }
        drop(chosen);
        let orders: Vec<usize> =
            (0..3).map(|_| engines.choose(Stage::Decode, &none, &[], &[]).expect("some").number()).collect();
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[1], orders[2]);
    }

    #[test]
    fn who_has_seen_the_prompt_serves_until_others_have_clearly_less_to_do() {
        let engines = engines(2);
        let beginning = Beginning::new("m", None, &[7; 4096]);
        engines.note(&beginning, &engines.all()[1]);
        let chosen: Vec<Chosen> =
            (0..4).map(|_| engines.choose(Stage::Decode, &beginning, &[], &[]).expect("some")).collect();
        assert!(chosen.iter().all(|engine| engine.number() == 1));
        // At five more it is no longer worth it.
        let more: Vec<Chosen> =
            (0..2).map(|_| engines.choose(Stage::Decode, &beginning, &[], &[]).expect("some")).collect();
        assert!(more.iter().any(|engine| engine.number() == 0));
    }

    #[test]
    fn the_own_cache_is_worth_more_than_dram_and_dram_more_than_the_drive() {
        let held = |dram, stored| Held { dram, stored, ..Held::NOTHING };
        let order = [worth(1.0, Held::NOTHING), worth(0.0, held(1.0, 1.0)), worth(0.0, held(0.0, 1.0))];
        assert_eq!(order.map(|(_, reason)| reason), ["seen", "dram", "drive"]);
        assert!(order.is_sorted_by(|(one, _), (other, _)| one > other), "{order:?}");
        assert_eq!(worth(0.0, Held::NOTHING), (0.0, "load"));
        assert_eq!(worth(1.0, held(1.0, 1.0)), (1.0, "seen"), "nothing counts twice");
        assert_eq!(worth(0.25, held(0.75, 1.0)), (0.25 + 0.75 * 0.5 + 0.5 * 0.25, "dram"));
        assert_eq!(worth(1.0, Held { dram: 0.0, stored: 0.0, own_max: 0.0 }), (0.0, "load"), "it has gone");
    }

    #[test]
    fn who_has_the_prompt_in_its_server_serves_until_others_have_clearly_less_to_do() {
        let engines = engines(2);
        let beginning = Beginning::new("m", None, &[7; 4096]);
        engines.note(&Beginning::new("m", None, &[7; 1024]), &engines.all()[0]);
        let held = [Held::NOTHING, Held { dram: 1.0, stored: 1.0, ..Held::NOTHING }];
        let choose = || engines.choose(Stage::Decode, &beginning, &held, &[]).expect("some");
        let first = choose();
        assert_eq!((first.number(), first.reason), (1, "dram"));
        assert_eq!(engines.choose(Stage::Decode, &beginning, &[], &[]).expect("some").reason, "seen");
        let more: Vec<Chosen> = (0..4).map(|_| choose()).collect();
        assert!(more.iter().any(|engine| engine.number() == 0), "it has four requests to do by now");
    }

    #[test]
    fn who_is_down_or_was_tried_comes_last_or_never() {
        let engines = engines(2);
        let none = Beginning::default();
        engines.is_lost(&engines.all()[0], "test");
        assert_eq!(engines.choose(Stage::Decode, &none, &[], &[]).expect("some").number(), 1);
        assert_eq!(engines.choose(Stage::Decode, &none, &[], &[1]).expect("the last resort").number(), 0);
        assert!(engines.choose(Stage::Decode, &none, &[], &[0, 1]).is_none());
        assert_eq!(engines.problem(), None);
        engines.is_lost(&engines.all()[1], "test");
        assert!(engines.problem().is_some());
    }
}
