//! The PegaFlow servers of the engines, and what they hold. Each is asked once for a request, however many engines it has, and
//! waited for no longer than `ask_timeout`; one that does not answer counts as holding nothing, and is left alone for a while.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use pegaflow_engine::{Error, ErrorKind, HitTier, LocateRequest, NamespaceId, Whose};
use pegaflow_server::client::{Client, ClientConfig, Endpoint, Token};
use tokio::sync::Semaphore;

use crate::affinity::Beginning;
use crate::known_keys::{Held, Home, KnownKeys, Told};
use crate::metrics;

/// Questions to one server at a time; more are not asked.
const QUESTIONS_MAX: usize = 256;
/// A server that did not answer is not asked for so long, then once.
const PAUSE: Duration = Duration::from_secs(1);
/// vLLM's KV cache groups that the connector knows: one.
const GROUP: u16 = 0;

/// How servers are asked.
#[derive(Debug, Clone)]
pub(crate) struct ServerSettings {
    /// What they are shown over TCP.
    pub(crate) token: Option<Token>,
    /// The longest wait for an answer.
    pub(crate) ask_timeout: Duration,
}

struct Server {
    endpoint: Endpoint,
    name: String,
    client: Client,
    places: Semaphore,
    trouble: Mutex<Trouble>,
}

/// Since when a server has not answered, as far as it matters.
#[derive(Debug, Default)]
struct Trouble {
    has_failed: bool,
    asked_again_at: Option<Instant>,
}

impl Trouble {
    /// Whether a question may be asked now. After a pause one may; its answer decides about the next.
    fn may_ask(&mut self, now: Instant) -> bool {
        if self.asked_again_at.is_some_and(|at| now < at) {
            return false;
        }
        if self.has_failed {
            self.asked_again_at = Some(now + PAUSE);
        }
        true
    }

    /// What became of a question; whether that is news.
    fn note(&mut self, has_failed: bool, now: Instant) -> bool {
        self.asked_again_at = has_failed.then(|| now + PAUSE);
        std::mem::replace(&mut self.has_failed, has_failed) != has_failed
    }
}

/// All of them, and which is whose.
pub(crate) struct Servers {
    all: Vec<Server>,
    of_engine: Vec<Option<usize>>,
    keys: Mutex<KnownKeys>,
    ask_timeout: Duration,
}

impl std::fmt::Debug for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.all.iter().map(|server| &server.name)).finish()
    }
}

impl Servers {
    /// Of engines that have none.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        let (of_engine, keys) = (Vec::new(), Mutex::new(KnownKeys::new()));
        Self { all: Vec::new(), of_engine, keys, ask_timeout: Duration::ZERO }
    }

    /// Those of the engines, in their order. They are connected to in the background, now and whenever they come back. An error
    /// says what can not be had.
    pub(crate) fn start(of_engines: Vec<Option<Endpoint>>, settings: ServerSettings) -> Result<Self, String> {
        let mut all: Vec<Server> = Vec::new();
        let mut number_of = |endpoint: Endpoint| {
            if let Some(number) = all.iter().position(|server| server.endpoint == endpoint) {
                return Ok(number);
            }
            let mut config = ClientConfig::new(endpoint.clone(), "pegaflow-router");
            config.token.clone_from(&settings.token);
            let (name, client) = (endpoint.to_string(), Client::start(config)?);
            let (places, trouble) = (Semaphore::new(QUESTIONS_MAX), Mutex::default());
            all.push(Server { endpoint, name, client, places, trouble });
            Ok(all.len() - 1)
        };
        let of_engine = of_engines.into_iter().map(|endpoint| endpoint.map(&mut number_of).transpose());
        let of_engine = of_engine.collect::<Result<_, Error>>().map_err(|error| format!("{error:#}"))?;
        Ok(Self { all, of_engine, keys: Mutex::new(KnownKeys::new()), ask_timeout: settings.ask_timeout })
    }

    /// Whether there is any.
    pub(crate) fn are_there(&self) -> bool {
        !self.all.is_empty()
    }

    /// What the servers of these engines hold of a beginning, for each engine by its number.
    ///
    /// # Cancel safety
    /// Dropping it gives the question up.
    pub(crate) async fn held(&self, beginning: &Beginning, engines: &[usize]) -> Vec<Held> {
        let server_of = |engine: usize| self.of_engine.get(engine).copied().flatten();
        let mut asked: Vec<usize> = engines.iter().filter_map(|engine| server_of(*engine)).collect();
        asked.sort_unstable();
        asked.dedup();
        if asked.is_empty() {
            return Vec::new();
        }
        let Some(question) = self.keys.lock().question(beginning, Instant::now()) else { return Vec::new() };
        let request = LocateRequest {
            whose: Whose::Namespace(question.home.namespace),
            tenant: question.home.tenant.clone(),
            group: GROUP,
            keys: question.keys(),
        };
        let answers = join_all(asked.into_iter().map(|number| self.ask(number, &request)));
        let answers: Vec<(usize, Vec<Option<HitTier>>)> =
            answers.await.into_iter().flatten().map(|(number, (_, tiers))| (number, tiers)).collect();
        let held_by = |engine: usize| {
            let (_, tiers) = answers.iter().find(|(number, _)| server_of(engine) == Some(*number))?;
            Some(question.held(tiers, engine))
        };
        (0..self.of_engine.len()).map(|engine| held_by(engine).unwrap_or(Held::NOTHING)).collect()
    }

    /// An engine has told keys of a prompt with this beginning. Its server says in which namespace they are, which outlives the
    /// engine and is the same in other servers; what it does not know is not remembered.
    ///
    /// # Cancel safety
    /// Dropping it forgets what was told.
    pub(crate) async fn learn(&self, beginning: &Beginning, told: &Told, engine: usize) {
        let Some(number) = self.of_engine.get(engine).copied().flatten() else { return };
        let whose = Whose::Instance(told.instance.clone());
        let request = LocateRequest { whose, tenant: told.tenant.clone(), group: GROUP, keys: Vec::new() };
        let Some((_, (namespace, _))) = self.ask(number, &request).await else { return };
        let home = Arc::new(Home { namespace, tenant: told.tenant.clone() });
        self.keys.lock().note(beginning, told, &home, engine, Instant::now());
        metrics::learned();
    }

    async fn ask(
        &self,
        number: usize,
        request: &LocateRequest,
    ) -> Option<(usize, (NamespaceId, Vec<Option<HitTier>>))> {
        let server = self.all.get(number)?;
        let place = server.places.try_acquire();
        if place.is_err() || !server.trouble.lock().may_ask(Instant::now()) {
            metrics::asked(&server.name, "skipped");
            return None;
        }
        let answer = server.client.locate_soon(request, self.ask_timeout).await;
        // Who says that there is no such instance has answered.
        let failure = answer.as_ref().err().filter(|error| error.kind() != ErrorKind::NotFound);
        metrics::asked(&server.name, if failure.is_some() { "failed" } else { "answered" });
        let is_news = server.trouble.lock().note(failure.is_some(), Instant::now());
        match failure {
            Some(error) if is_news => {
                tracing::warn!(server = server.name, %error, "a PegaFlow server does not say what it holds");
            }
            None if is_news => tracing::info!(server = server.name, "a PegaFlow server says again what it holds"),
            _ => {}
        }
        Some((number, answer.ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_asked_again_once_after_a_pause() {
        let (mut trouble, now) = (Trouble::default(), Instant::now());
        assert!(trouble.may_ask(now) && trouble.may_ask(now));
        assert!(trouble.note(true, now) && !trouble.note(true, now));
        assert!(!trouble.may_ask(now) && !trouble.may_ask(now + PAUSE / 2));
        let later = now + PAUSE;
        assert!(trouble.may_ask(later), "one asks again");
        assert!(!trouble.may_ask(later), "the others do not wait with it");
        assert!(trouble.note(false, later));
        assert!(trouble.may_ask(later) && trouble.may_ask(later));
    }

    #[test]
    fn engines_of_one_server_share_its_client() {
        let endpoint = |name: &str| Some(Endpoint::Unix(format!("/nowhere/{name}").into()));
        let settings = ServerSettings { token: None, ask_timeout: Duration::from_millis(20) };
        let servers =
            Servers::start(vec![endpoint("a"), None, endpoint("b"), endpoint("a")], settings).expect("starts");
        assert_eq!(servers.of_engine, [Some(0), None, Some(1), Some(0)]);
    }
}
