//! Sessions: one per connected client, bounded in number. A session lives exactly as long as its event stream; its end
//! gives everything back once the worker's copies have ended. Completions are pushed through a queue in which every accepted operation has its place
//! reserved, so that the engine's threads never wait for a client.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use pegaflow_engine::{
    ArenaId, Engine, Error, ErrorKind, InstanceSpec, KvCache, LoadOutcome, MemoryLayout, Result, SaveOutcome, SessionId,
};
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Interval, MissedTickBehavior};
use tonic::Status;

use crate::limits::{BLOCKS_MAX, HEARTBEAT, MESSAGE_BYTES_MAX, OPERATIONS_MAX, SESSIONS_MAX};
use crate::memory_socket::{Grant, Token, Tokens};
use crate::peer::{Peer, PeerKvCache};
use crate::proto::session_event::Event;
use crate::proto::{Heartbeat, LoadEnded, SaveEnded, SessionEvent, SessionOpened};

/// How long one wait for the copies of an ended session lasts before it is logged and repeated.
const END_WAIT: Duration = Duration::from_secs(30);
/// How often that wait is repeated: the engine's own bound on an operation is below the product.
const END_WAITS_MAX: u32 = 40;

/// All sessions of a server.
pub(crate) struct Sessions {
    engine: Engine,
    open: Mutex<HashMap<u64, Arc<Session>>>,
    places: Arc<Semaphore>,
    tokens: Arc<Tokens>,
    in_flight: Arc<InFlight>,
}

/// Counts the loads and saves in flight in all sessions.
#[derive(Default)]
struct InFlight {
    count: AtomicUsize,
    none: Notify,
}

impl Sessions {
    pub(crate) fn new(engine: Engine) -> Arc<Self> {
        Arc::new(Self {
            engine,
            open: Mutex::default(),
            places: Arc::new(Semaphore::new(SESSIONS_MAX)),
            tokens: Arc::default(),
            in_flight: Arc::default(),
        })
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn tokens(&self) -> Arc<Tokens> {
        Arc::clone(&self.tokens)
    }

    /// Open sessions.
    pub(crate) fn count(&self) -> usize {
        self.open.lock().len()
    }

    /// Loads and saves in flight.
    pub(crate) fn operations(&self) -> usize {
        self.in_flight.count.load(Ordering::Acquire)
    }

    /// Opens a session; its first event is in the stream.
    ///
    /// # Errors
    /// `Busy` if there are as many as allowed, `Closed` when the server is stopping.
    pub(crate) fn open(self: &Arc<Self>, name: &str) -> Result<SessionEvents> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|error| match error {
            tokio::sync::TryAcquireError::NoPermits => Error::new(
                ErrorKind::Busy,
                format!("there are {SESSIONS_MAX} sessions, which is the limit; try again when others have ended"),
            ),
            tokio::sync::TryAcquireError::Closed => stopping(),
        })?;
        // Each operation has a place for its end and one for its order in flight; one more is for the first event.
        let (sender, receiver) = mpsc::channel(2 * OPERATIONS_MAX + 1);
        let engine_id = self.engine.start_session();
        let session = Arc::new(Session {
            engine_id,
            name: name.to_owned(),
            events: Mutex::new(Some(sender.clone())),
            operations: Mutex::default(),
            peer: Arc::new(Peer::new(sender.clone())),
            worker: Mutex::default(),
            in_flight: Arc::clone(&self.in_flight),
        });
        let id = loop {
            let id: u64 = rand::random();
            let mut open = self.open.lock();
            if id != 0 && !open.contains_key(&id) {
                open.insert(id, Arc::clone(&session));
                break id;
            }
        };
        let end = SessionEnd { sessions: Arc::clone(self), id, place: Some(place) };
        let opened = SessionOpened {
            session: id,
            server_version: env!("CARGO_PKG_VERSION").into(),
            message_bytes_max: MESSAGE_BYTES_MAX as u64,
            blocks_max: BLOCKS_MAX as u32,
            operations_max: OPERATIONS_MAX as u32,
            heartbeat_ms: u32::try_from(HEARTBEAT.as_millis()).unwrap_or(u32::MAX),
        };
        // The queue is new and empty, so this cannot fail.
        let _queued = sender.try_send(SessionEvent { event: Some(Event::Opened(opened)) });
        tracing::info!(client = name, session = engine_id.0, "session opened");
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        Ok(SessionEvents { events: receiver, heartbeat, _end: end })
    }

    /// The session of that name.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn get(&self, id: u64) -> Result<Arc<Session>> {
        self.open.lock().get(&id).cloned().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("no session {id:016x}; it ended with its event stream: call OpenSession and register again"),
            )
        })
    }

    /// Lets a session's worker map the arena; the token is good once on the second socket.
    ///
    /// # Errors
    /// `InvalidInput` if the session is no worker, `Unsupported` if the engine's DRAM is private, `NotFound` if the session has
    /// ended.
    pub(crate) fn share_arena(&self, id: u64) -> Result<SharedArena> {
        let session = self.get(id)?;
        session.layout()?;
        let (fd, arena, bytes) = self
            .engine
            .shared_arena()
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "this engine's DRAM cannot be mapped by workers"))?;
        let fd =
            fd.try_clone_to_owned().map_err(|error| Error::from_io("duplicating the arena's descriptor", error))?;
        let token = self.tokens.add(Grant { session: id, fd, peer: Arc::clone(&session.peer) });
        if self.get(id).is_err() {
            self.tokens.forget(id);
        }
        Ok(SharedArena { arena, bytes, token })
    }

    fn remove(&self, id: u64) -> Option<Arc<Session>> {
        let session = self.open.lock().remove(&id);
        self.tokens.forget(id);
        session
    }

    /// No more sessions from now on.
    pub(crate) fn refuse_new(&self) {
        self.places.close();
    }

    /// Waits until no load or save is in flight.
    ///
    /// # Cancel safety
    /// It only waits.
    pub(crate) async fn drained(&self) {
        loop {
            let none = self.in_flight.none.notified();
            if self.operations() == 0 {
                return;
            }
            none.await;
        }
    }

    /// Ends every event stream after what is queued in it, so that clients see the end and connections can close.
    pub(crate) fn end_streams(&self) {
        for session in self.open.lock().values() {
            session.events.lock().take();
            session.peer.session_ended();
        }
    }
}

fn stopping() -> Error {
    Error::new(ErrorKind::Closed, "the server is stopping; connect again later")
}

/// What a session got from [`Sessions::share_arena`].
pub(crate) struct SharedArena {
    pub(crate) arena: ArenaId,
    pub(crate) bytes: u64,
    pub(crate) token: Token,
}

/// One client.
pub(crate) struct Session {
    pub(crate) engine_id: SessionId,
    name: String,
    /// `None` when the stream is to end.
    events: Mutex<Option<mpsc::Sender<SessionEvent>>>,
    operations: Mutex<HashSet<u64>>,
    peer: Arc<Peer>,
    /// The blocks of the worker, once it has registered.
    worker: Mutex<Option<MemoryLayout>>,
    in_flight: Arc<InFlight>,
}

impl Session {
    /// Notes what the worker's KV cache looks like.
    ///
    /// # Errors
    /// `InvalidInput` for no blocks, or for groups of several block sizes.
    pub(crate) fn set_worker(&self, spec: &InstanceSpec, blocks: u32) -> Result<()> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        let Some(block_bytes) = spec.groups.first().map(|group| group.block_bytes) else {
            return bad("no groups; give at least one".into());
        };
        if let Some(other) = spec.groups.iter().find(|group| group.block_bytes != block_bytes) {
            return bad(format!(
                "groups with blocks of {block_bytes} and of {} bytes; a worker has one size",
                other.block_bytes
            ));
        }
        let bytes = block_bytes.saturating_mul(blocks.into());
        *self.worker.lock() = Some(MemoryLayout::contiguous(block_bytes, block_bytes, blocks, bytes)?);
        Ok(())
    }

    fn layout(&self) -> Result<MemoryLayout> {
        let known = self.worker.lock().clone();
        known.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the session is no worker; call Register first"))
    }

    /// The worker's KV cache, for one operation.
    ///
    /// # Errors
    /// `InvalidInput` if the session is no worker.
    pub(crate) fn kv_cache(&self, operation: u64) -> Result<Arc<dyn KvCache>> {
        Ok(Arc::new(PeerKvCache::new(Arc::clone(&self.peer), self.layout()?, operation)))
    }

    /// A copy that was ordered has ended.
    pub(crate) fn copy_ended(&self, order: u64, is_complete: bool) {
        self.peer.copy_ended(order, is_complete);
    }

    /// Reserves the place of an operation's completion.
    ///
    /// # Errors
    /// `InvalidInput` if an operation of that name is in flight, `Busy` if the bound is reached, `Closed`.
    pub(crate) fn begin(self: &Arc<Self>, operation: u64) -> Result<Operation> {
        let sender = self.events.lock().clone().ok_or_else(stopping)?;
        let place = sender.try_reserve_owned().map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::new(
                ErrorKind::Busy,
                format!(
                    "{OPERATIONS_MAX} operations are in flight or unread, which is the limit; wait for completions"
                ),
            ),
            mpsc::error::TrySendError::Closed(_) => stopping(),
        })?;
        if !self.operations.lock().insert(operation) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("operation {operation} is in flight in this session; give every operation its own number"),
            ));
        }
        self.in_flight.count.fetch_add(1, Ordering::AcqRel);
        Ok(Operation { session: Arc::clone(self), operation, place: Some(place) })
    }
}

/// A load or a save in flight, with the reserved place of its completion. Dropped without an outcome (the engine refused
/// it), it leaves no trace.
pub(crate) struct Operation {
    session: Arc<Session>,
    operation: u64,
    place: Option<OwnedPermit<SessionEvent>>,
}

impl Operation {
    pub(crate) fn load_ended(mut self, outcome: LoadOutcome) {
        let LoadOutcome { loaded_dram, loaded_nvme, failed } = outcome;
        self.end(Event::LoadEnded(LoadEnded { operation: self.operation, loaded_dram, loaded_nvme, failed }));
    }

    pub(crate) fn save_ended(mut self, outcome: SaveOutcome) {
        let SaveOutcome { saved, present, dropped } = outcome;
        self.end(Event::SaveEnded(SaveEnded { operation: self.operation, saved, present, dropped }));
    }

    fn end(&mut self, event: Event) {
        // The name is free before the client can hear of the end, so that it may use it again at once.
        self.session.operations.lock().remove(&self.operation);
        if let Some(place) = self.place.take() {
            place.send(SessionEvent { event: Some(event) });
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if self.place.is_some() {
            self.session.operations.lock().remove(&self.operation);
        }
        let in_flight = &self.session.in_flight;
        if in_flight.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            in_flight.none.notify_waiters();
        }
    }
}

/// Ends its session when dropped: with the event stream, that is when the client is gone.
struct SessionEnd {
    sessions: Arc<Sessions>,
    id: u64,
    place: Option<OwnedSemaphorePermit>,
}

impl Drop for SessionEnd {
    fn drop(&mut self) {
        let Some(session) = self.sessions.remove(self.id) else { return };
        session.events.lock().take();
        session.peer.session_ended();
        let (engine, place) = (self.sessions.engine.clone(), self.place.take());
        let end = move || {
            // The session's place is free for another client only when its copies have ended.
            let _place = place;
            end_session(&engine, &session);
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(end)),
            Err(_) => drop(std::thread::Builder::new().name("pegaflow-end".into()).spawn(end)),
        }
    }
}

fn end_session(engine: &Engine, session: &Session) {
    for _ in 0..END_WAITS_MAX {
        match engine.end_session(session.engine_id, END_WAIT) {
            Ok(()) => {
                tracing::info!(client = session.name, session = session.engine_id.0, "session ended");
                return;
            }
            Err(error) if error.kind() == ErrorKind::Timeout => {
                tracing::warn!(client = session.name, "an ended session still has copies running: {error:#}");
            }
            Err(error) => {
                tracing::warn!(client = session.name, "ending a session: {error:#}");
                return;
            }
        }
    }
    tracing::error!(client = session.name, "copies of an ended session never ended; what they may write stays in use");
}

/// The event stream of a session; the session ends when it is dropped.
pub(crate) struct SessionEvents {
    events: mpsc::Receiver<SessionEvent>,
    heartbeat: Interval,
    _end: SessionEnd,
}

impl Stream for SessionEvents {
    type Item = Result<SessionEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(event) = self.events.poll_recv(cx) {
            self.heartbeat.reset();
            return Poll::Ready(event.map(Ok));
        }
        std::task::ready!(self.heartbeat.poll_tick(cx));
        Poll::Ready(Some(Ok(SessionEvent { event: Some(Event::Heartbeat(Heartbeat {})) })))
    }
}
