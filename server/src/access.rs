//! Who may do what over TCP: roles, the table of which RPC needs which, tokens and where they come from. Over the Unix
//! socket there is nothing of it: whoever can connect there is the server's own user.

mod gate;
mod layer;
mod token;

pub(crate) use gate::{Gate, Peer, Place};
pub(crate) use layer::{AccessLayer, Caller};
pub use token::{NewToken, Tokens};

use std::str::FromStr;
use std::sync::Arc;

use parking_lot::RwLock;
use pegaflow_engine::{Error, ErrorKind, Result};

use crate::limits::{REQUESTS_BURST_MAX, REQUESTS_PER_SECOND_MAX, SESSIONS_PER_CLIENT_MAX};

/// What a client is for. None includes another: the table says what each may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Counters, and nothing that names a block or a request.
    ReadOnly,
    /// Runs the server: flush, reopen, purge, scrub, warm, evict, pin, load policy, explanations.
    Operator,
    /// Looks up, loads and saves.
    Engine,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::ReadOnly, Self::Operator, Self::Engine];

    /// Its name in files and flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only",
            Self::Operator => "operator",
            Self::Engine => "engine",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, format!("'{text}' is no role; give engine, operator or read-only"))
        })
    }
}

/// Which roles an RPC is open to. An RPC that is not here is open to nobody; a test holds the table to the protocol.
/// `docs/security.md` has the same table.
const TABLE: &[(&str, &[Role])] = &[
    // A session is a name and a stream of heartbeats: every client has one.
    ("OpenSession", &[Role::ReadOnly, Role::Operator, Role::Engine]),
    ("Stats", &[Role::ReadOnly, Role::Operator, Role::Engine]),
    // Says whether a text was cached: no counter.
    ("Lookup", &[Role::Engine]),
    ("Locate", &[Role::Engine]),
    ("Register", &[Role::Engine]),
    ("ShareArena", &[Role::Engine]),
    ("Load", &[Role::Engine]),
    ("Save", &[Role::Engine]),
    ("CopyEnded", &[Role::Engine]),
    ("Consume", &[Role::Engine]),
    ("Cancel", &[Role::Engine]),
    ("Release", &[Role::Engine]),
    ("Flush", &[Role::Operator, Role::Engine]),
    ("ReopenStore", &[Role::Operator]),
    // Names models and tenants; no block and no request.
    ("ListNamespaces", &[Role::ReadOnly, Role::Operator]),
    ("Purge", &[Role::Operator]),
    ("Scrub", &[Role::Operator]),
    ("Warm", &[Role::Operator]),
    ("Evict", &[Role::Operator]),
    ("Pin", &[Role::Operator]),
    ("Unpin", &[Role::Operator]),
    // Both name blocks.
    ("ListPins", &[Role::Operator]),
    ("ListPrefixes", &[Role::Operator]),
    ("LoadPolicy", &[Role::Operator]),
    // Names requests.
    ("Explain", &[Role::Operator]),
];

const SERVICE: &str = "/pegaflow.v1.PegaFlow/";

/// Whether a role may call the RPC with this path.
pub(crate) fn may_call(role: Role, path: &str) -> bool {
    let name = path.strip_prefix(SERVICE).unwrap_or_default();
    TABLE.iter().any(|(rpc, roles)| *rpc == name && roles.contains(&role))
}

/// Who may do what, and with which bounds.
#[derive(Debug)]
pub struct Access {
    rule: RwLock<Rule>,
}

#[derive(Debug, Clone)]
enum Rule {
    /// Everybody is this one.
    Everybody(Arc<Client>),
    /// Whoever has a token.
    Tokens(Arc<Tokens>),
}

/// One client as the server knows it, by its token, with what it uses of its bounds.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) sessions: Arc<tokio::sync::Semaphore>,
    rate: parking_lot::Mutex<Rate>,
}

#[derive(Debug)]
struct Rate {
    left: f64,
    since: std::time::Instant,
}

impl Client {
    pub(crate) fn new(role: Role, name: String) -> Arc<Self> {
        let rate = Rate { left: REQUESTS_BURST_MAX, since: std::time::Instant::now() };
        let sessions = Arc::new(tokio::sync::Semaphore::new(SESSIONS_PER_CLIENT_MAX));
        Arc::new(Self { role, name, sessions, rate: parking_lot::Mutex::new(rate) })
    }

    /// A place for one more session; it is free again when dropped.
    ///
    /// # Errors
    /// `Busy` when the client has as many as it may.
    pub(crate) fn session(&self) -> Result<tokio::sync::OwnedSemaphorePermit> {
        Arc::clone(&self.sessions).try_acquire_owned().map_err(|_| {
            let message = format!("{} has {SESSIONS_PER_CLIENT_MAX} sessions, the limit; close some", self.name);
            Error::new(ErrorKind::Busy, message)
        })
    }

    /// Counts a request; false if there were too many.
    pub(crate) fn may_ask(&self, now: std::time::Instant) -> bool {
        let mut rate = self.rate.lock();
        let elapsed = now.saturating_duration_since(rate.since).as_secs_f64();
        rate.left = (rate.left + elapsed * REQUESTS_PER_SECOND_MAX).min(REQUESTS_BURST_MAX);
        rate.since = now;
        let has_room = rate.left >= 1.0;
        rate.left -= if has_room { 1.0 } else { 0.0 };
        has_room
    }
}

impl Access {
    /// Everybody who can connect has this role.
    pub fn everybody(role: Role) -> Self {
        Self { rule: RwLock::new(Rule::Everybody(Client::new(role, "loopback".into()))) }
    }

    /// Whoever has one of these tokens.
    pub fn tokens(tokens: Tokens) -> Self {
        Self { rule: RwLock::new(Rule::Tokens(Arc::new(tokens))) }
    }

    /// From now on other tokens hold; each request is checked against them. Open streams go on until they end.
    pub fn replace(&self, tokens: Tokens) {
        *self.rule.write() = Rule::Tokens(Arc::new(tokens));
    }

    /// Who it is that sends this value of the header `authorization`.
    pub(crate) fn identify(&self, authorization: Option<&[u8]>) -> Option<Arc<Client>> {
        match &*self.rule.read() {
            Rule::Everybody(client) => Some(Arc::clone(client)),
            Rule::Tokens(tokens) => tokens.find(authorization?.strip_prefix(b"Bearer ")?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn the_table_has_every_rpc_of_the_protocol_once() {
        let proto = include_str!("../proto/pegaflow.proto");
        let rpcs = proto.lines().filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next());
        let mut rpcs: Vec<&str> = rpcs.collect();
        let mut table: Vec<&str> = TABLE.iter().map(|(rpc, _)| *rpc).collect();
        rpcs.sort_unstable();
        table.sort_unstable();
        assert_eq!(table, rpcs, "give each RPC its roles");
        let docs = include_str!("../../docs/security.md");
        for (rpc, roles) in TABLE {
            let marks = [Role::Engine, Role::Operator, Role::ReadOnly]
                .map(|role| if roles.contains(&role) { "yes" } else { "" });
            let row = format!("| `{rpc}` | {} |", marks.join(" | "));
            assert!(docs.contains(&row), "docs/security.md lacks: {row}");
        }
    }

    #[test]
    fn what_is_not_in_the_table_is_open_to_nobody() {
        for role in Role::ALL {
            assert!(may_call(role, "/pegaflow.v1.PegaFlow/Stats"));
            for path in ["/pegaflow.v1.PegaFlow/Other", "/other.PegaFlow/Stats", "Stats", "/pegaflow.v1.PegaFlow/", ""]
            {
                assert!(!may_call(role, path), "{path}");
            }
        }
        assert!(!may_call(Role::Engine, "/pegaflow.v1.PegaFlow/ReopenStore"));
        assert!(!may_call(Role::Engine, "/pegaflow.v1.PegaFlow/Purge"));
        assert!(!may_call(Role::ReadOnly, "/pegaflow.v1.PegaFlow/Purge"));
        assert!(!may_call(Role::Operator, "/pegaflow.v1.PegaFlow/Lookup"));
        assert!(!may_call(Role::ReadOnly, "/pegaflow.v1.PegaFlow/Lookup"));
    }

    #[test]
    fn a_client_that_asks_too_often_is_held_back_alone() {
        let (fast, other) = (Client::new(Role::Engine, "a".into()), Client::new(Role::Engine, "b".into()));
        let now = Instant::now();
        assert!((0..REQUESTS_BURST_MAX as u32).all(|_| fast.may_ask(now)));
        assert!(!fast.may_ask(now) && other.may_ask(now));
        let later = now + Duration::from_millis(100);
        let refilled = (0..).take_while(|_| fast.may_ask(later)).count();
        assert_eq!(refilled, (REQUESTS_PER_SECOND_MAX / 10.0) as usize);
    }
}
