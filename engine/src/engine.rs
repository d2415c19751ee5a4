//! The engine: one open cache, shared by everybody in the process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_tiers::{Error, ErrorKind, Result};

use crate::api::{
    InstanceId, InstanceSpec, LeaseId, LoadOutcome, LoadRequest, LookupReply, LookupRequest, OperationId, SaveOutcome,
    SaveRequest, SessionId, Stats,
};
use crate::config::EngineConfig;

/// One open cache. Cloning gives another handle to the same one; the last handle closes it.
#[derive(Clone)]
pub struct Engine {
    _inner: Arc<()>,
}

fn stub<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Closed, "not built yet"))
}

impl Engine {
    /// Opens the cache: takes the DRAM, locks and recovers the store.
    ///
    /// # Errors
    /// `InvalidInput`, `Locked`, `ForeignFormat`, `NewerFormat`, `PermissionDenied`, `NoSpace`, `Unsupported` or `Io`.
    pub fn open(_config: EngineConfig) -> Result<Self> {
        stub()
    }

    /// A new session; it lives until [`Engine::end_session`].
    pub fn start_session(&self) -> SessionId {
        SessionId(0)
    }

    /// Ends a session: its leases go, its queued operations are cancelled, its instances are forgotten when their last
    /// worker is gone. Returns only after its copies have ended, or after `timeout`.
    ///
    /// # Errors
    /// `Timeout` if copies were still running; the session's memory must then stay mapped.
    pub fn end_session(&self, _session: SessionId, _timeout: Duration) -> Result<()> {
        stub()
    }

    /// Registers a worker of an instance: afterwards the instance can be looked up, and this session may load and save.
    /// Registering the same again is allowed.
    ///
    /// # Errors
    /// `GeometryMismatch` if the namespace or the instance is known with another geometry or descriptor, `InvalidInput`.
    pub fn register(&self, _session: SessionId, _spec: InstanceSpec) -> Result<()> {
        stub()
    }

    /// The longest prefix of the keys that is there in all shards, with a lease on it if asked for. In-memory only.
    /// An instance of which not all shards have registered finds nothing.
    ///
    /// # Errors
    /// `NotFound` for an unknown instance, `InvalidInput` for too many keys or an unknown group.
    pub fn lookup(&self, _session: SessionId, _request: &LookupRequest) -> Result<LookupReply> {
        stub()
    }

    /// Gives a lease back. Unknown leases are ignored: they may have run out.
    pub fn release(&self, _lease: LeaseId) {}

    /// Starts a load. `done` is called exactly once, on a thread of the engine, when no copy of the load can write any
    /// more, whatever happened; also for an error that is returned here it is not called.
    ///
    /// # Errors
    /// `NotFound` for a lease that ran out, `Busy` for a full queue, `InvalidInput` for a block outside lease or memory.
    pub fn load(&self, _request: LoadRequest, _done: Box<dyn FnOnce(LoadOutcome) + Send>) -> Result<()> {
        stub()
    }

    /// Starts a save. `done` is called exactly once, on a thread of the engine, when the device's blocks are no longer
    /// read. A save that was accepted is visible when `done` is called, durable after at most the commit interval.
    ///
    /// # Errors
    /// `NotFound` for an unknown instance, `Busy` for a full queue (the blocks are counted as dropped), `InvalidInput`.
    pub fn save(&self, _request: SaveRequest, _done: Box<dyn FnOnce(SaveOutcome) + Send>) -> Result<()> {
        stub()
    }

    /// Asks for a load or a save to end early: blocks not yet copied are skipped (a load reports them as failed). Its
    /// `done` is still called, after its copies have ended. Unknown operations are ignored.
    pub fn cancel(&self, _session: SessionId, _operation: OperationId) {}

    /// Stores a named object and returns when it is visible; durable as any save. Replaces what has the name.
    ///
    /// # Errors
    /// `InvalidInput` for an object that is empty or larger than the limit, `Busy` if DRAM is full of bytes not yet durable.
    pub fn put(&self, _name: &[u8], _bytes: &[u8]) -> Result<()> {
        stub()
    }

    /// The bytes of a named object, or `None`.
    ///
    /// # Errors
    /// `Closed`. A read that fails its checks is a miss.
    pub fn get(&self, _name: &[u8]) -> Result<Option<ObjectBytes>> {
        stub()
    }

    /// Removes a named object; whether it was there. Durable after the next commit or [`Engine::flush`].
    ///
    /// # Errors
    /// `Closed`, `Busy`.
    pub fn remove(&self, _name: &[u8]) -> Result<bool> {
        stub()
    }

    /// Whether a named object is there.
    pub fn contains(&self, _name: &[u8]) -> bool {
        false
    }

    /// Makes everything saved before durable.
    ///
    /// # Errors
    /// `Timeout` at `deadline`, `Poisoned` or `Io` if the store no longer takes writes. Without a store: nothing to do.
    pub fn flush(&self, _deadline: Instant) -> Result<()> {
        stub()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Whether it is fit to serve: `Ok`, or why it is degraded (for readiness).
    ///
    /// # Errors
    /// `Poisoned` when the store takes no more writes, `Closed` after [`Engine::close`].
    pub fn ready(&self) -> Result<()> {
        stub()
    }

    /// Whether an instance has registered all of its shards.
    pub fn is_registered(&self, _instance: &InstanceId) -> bool {
        false
    }

    /// Flushes, ends every operation and closes the store; at most until `deadline`. Later calls get `Closed`.
    ///
    /// # Errors
    /// `Timeout` if something had not ended; what was reported durable is durable all the same.
    pub fn close(&self, _deadline: Instant) -> Result<()> {
        stub()
    }
}

/// The bytes of an object, shared with the cache: no copy. Keeps its place in DRAM as long as it lives.
#[derive(Clone)]
pub struct ObjectBytes {
    slot: Arc<pegaflow_tiers::Slot>,
    length: usize,
}

impl std::ops::Deref for ObjectBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.slot.payload().get(..self.length).unwrap_or_default()
    }
}
