//! What callers see of a client without asking its task: whether there is a session, under which number, why not, and the
//! arena with the copies that callers have started in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pegaflow_engine::{Error, ErrorKind, PlacedLoads, Result};

use super::arena::SessionArena;
use super::completions::Completions;
use super::link::{Link, Rpc};

#[derive(Default)]
pub(super) struct Shared {
    pub(super) completions: Arc<Completions>,
    state: Mutex<State>,
    changed: Condvar,
    epoch: AtomicU64,
    arena: Mutex<Option<Arc<SessionArena>>>,
    /// Loads that callers copy themselves.
    pub(super) placed: PlacedLoads,
}

#[derive(Default)]
struct State {
    session: Option<(Rpc, u64)>,
    /// A worker is remembered that the session does not have yet.
    must_register: bool,
    /// Why the server will not have the worker.
    refusal: Option<Error>,
    /// Why there is no session.
    failure: Option<Error>,
    is_closed: bool,
}

impl State {
    fn is_connected(&self) -> bool {
        self.session.is_some() && !self.must_register
    }

    fn why_not(&self) -> Error {
        if self.is_closed {
            return Error::new(ErrorKind::Closed, "the client is closed; start another");
        }
        match (&self.refusal, &self.failure) {
            (Some(refusal), _) => refusal.clone(),
            (None, Some(failure)) => Error::new(ErrorKind::Closed, format!("not connected: {failure}")),
            (None, None) => Error::new(ErrorKind::Closed, "not connected yet; call wait_connected or try again later"),
        }
    }
}

impl Shared {
    pub(super) fn is_connected(&self) -> bool {
        self.state.lock().is_connected()
    }

    /// How many sessions there have been.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The session, even if the worker is not registered with it.
    ///
    /// # Errors
    /// `Closed`, at once.
    pub(super) fn session(&self) -> Result<(Rpc, u64)> {
        let state = self.state.lock();
        state.session.clone().ok_or_else(|| state.why_not())
    }

    /// Whether loads and saves can be started.
    ///
    /// # Errors
    /// `Closed`, or the server's refusal.
    pub(super) fn check_working(&self) -> Result<()> {
        let state = self.state.lock();
        if state.is_connected() && state.refusal.is_none() { Ok(()) } else { Err(state.why_not()) }
    }

    pub(super) fn wait_connected(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        loop {
            if state.refusal.is_some() || state.is_closed {
                return Err(state.why_not());
            }
            if state.is_connected() {
                return Ok(());
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() && !state.is_connected() {
                let why = state.why_not();
                // That will not be better with more time.
                let is_denied =
                    state.failure.as_ref().is_some_and(|failure| failure.kind() == ErrorKind::PermissionDenied);
                let kind = if is_denied { ErrorKind::PermissionDenied } else { ErrorKind::Timeout };
                return Err(Error::new(kind, format!("not connected within {timeout:?}: {why}")));
            }
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().is_closed
    }

    /// The arena, also for a moment after the session with its server was lost.
    pub(super) fn arena(&self) -> Option<Arc<SessionArena>> {
        self.arena.lock().clone()
    }

    pub(super) fn set_arena(&self, arena: Arc<SessionArena>) {
        let earlier = self.arena.lock().replace(arena);
        drop(earlier);
    }

    /// Lets the arena go if it is still that one.
    pub(super) fn leave_arena(&self, left: &Arc<SessionArena>) {
        let mut arena = self.arena.lock();
        let is_it = arena.as_ref().is_some_and(|arena| Arc::ptr_eq(arena, left));
        let earlier = if is_it { arena.take() } else { None };
        parking_lot::MutexGuard::unlocked(&mut arena, || drop(earlier));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    /// There is a session; a worker is connected only when it is registered.
    pub(super) fn linked(&self, link: &Link, must_register: bool) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.change(|state| {
            state.session = Some((link.rpc.clone(), link.session));
            state.must_register = must_register;
            state.failure = None;
        });
    }

    pub(super) fn must_register(&self) {
        self.change(|state| {
            state.must_register = true;
            state.refusal = None;
        });
    }

    pub(super) fn registered(&self) {
        self.change(|state| state.must_register = false);
    }

    pub(super) fn refused(&self, error: &Error) {
        self.change(|state| {
            state.must_register = false;
            state.refusal = Some(error.clone());
        });
    }

    pub(super) fn unlinked(&self) {
        self.change(|state| state.session = None);
    }

    /// Notes why there is no session; whether that is news.
    pub(super) fn failed(&self, error: &Error) -> bool {
        let mut is_news = false;
        self.change(|state| {
            is_news = state.failure.as_ref().is_none_or(|known| known.kind() != error.kind());
            state.failure = Some(error.clone());
        });
        is_news
    }

    pub(super) fn close(&self) {
        self.change(|state| {
            state.is_closed = true;
            state.session = None;
        });
    }
}
