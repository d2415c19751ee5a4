//! Engines inside this process, one for each store: the scheduler's and the worker's side of vLLM, and every
//! `PegaEngine` on the same path, share one. The last to close it flushes it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pegaflow_engine::{
    ArenaId, ArenaView, BlockSave, CopyDirection, DeviceMemory, Engine, EngineConfig, Error, ErrorKind, HitTier,
    InstanceId, InstanceSpec, KvCache, LeaseId, LoadBlock, LoadOutcome, LoadRequest, LocalKvCache, LocateRequest,
    LookupReply, LookupRequest, OperationId, Place, PlacedCopy, PlacedLoads, Result, SaveOutcome, SaveRequest,
    SaveTarget, SessionId,
};

struct Opened {
    engine: Engine,
    config: EngineConfig,
    users: usize,
}

/// The engines of this process, by the real path of their store.
static ENGINES: LazyLock<Mutex<HashMap<PathBuf, Opened>>> = LazyLock::new(Mutex::default);

/// One use of an engine of this process.
pub(crate) struct SharedEngine {
    engine: Engine,
    /// Its place among the engines; `None` for an engine that nobody shares, and after the close.
    path: Mutex<Option<PathBuf>>,
}

/// Opens an engine that nobody else shares.
///
/// # Errors
/// Those of [`Engine::open`].
pub(crate) fn open_alone(config: EngineConfig) -> Result<SharedEngine> {
    Ok(SharedEngine { engine: Engine::open(config)?, path: Mutex::new(None) })
}

/// Opens an engine, or joins the one that this process has open at the same path. Without a store the path is only
/// the name under which the engine is shared.
///
/// # Errors
/// Those of [`Engine::open`]; `InvalidInput` if the path is open in this process with other sizes.
pub(crate) fn open(path: &Path, config: EngineConfig) -> Result<SharedEngine> {
    config.validate()?;
    let unresolved = |error| Error::from_io(format!("cannot resolve {}", path.display()), error);
    let path = if config.nvme.is_some() {
        std::fs::create_dir_all(path)
            .map_err(|error| Error::from_io(format!("cannot create {}", path.display()), error))?;
        path.canonicalize().map_err(unresolved)?
    } else {
        std::path::absolute(path).map_err(unresolved)?
    };
    // Held while the engine opens, so that two users of one store never race for its lock file.
    let mut engines = ENGINES.lock();
    let engine = match engines.entry(path.clone()) {
        Entry::Occupied(mut entry) => {
            let opened = entry.get_mut();
            let sizes = |config: &EngineConfig| (config.dram, config.nvme.as_ref().map(|nvme| nvme.capacity));
            if sizes(&opened.config) != sizes(&config) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "{} is open in this process with other sizes; give the same dram and nvme, or close it first",
                        path.display()
                    ),
                ));
            }
            opened.users += 1;
            opened.engine.clone()
        }
        Entry::Vacant(entry) => {
            let engine = Engine::open(config.clone())?;
            entry.insert(Opened { engine: engine.clone(), config, users: 1 });
            engine
        }
    };
    Ok(SharedEngine { engine, path: Mutex::new(Some(path)) })
}

impl SharedEngine {
    /// The engine.
    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Ends this use; the last one closes the engine. A second close does nothing.
    ///
    /// # Errors
    /// Those of [`Engine::close`].
    pub(crate) fn close(&self, deadline: Instant) -> Result<()> {
        let path = self.path.lock().take();
        match path {
            None => self.engine.close(deadline),
            Some(path) => {
                // Held while the engine closes: whoever opens the store next finds its lock file free.
                let mut engines = ENGINES.lock();
                let Some(opened) = engines.get_mut(&path) else { return Ok(()) };
                opened.users -= 1;
                if opened.users > 0 {
                    return Ok(());
                }
                engines.remove(&path);
                self.engine.close(deadline)
            }
        }
    }
}

impl Drop for SharedEngine {
    fn drop(&mut self) {
        if self.path.lock().is_some()
            && let Err(error) = self.close(Instant::now() + Duration::from_secs(5))
        {
            tracing::warn!(%error, "the engine was dropped without a close");
        }
    }
}

/// A load or a save that ended.
#[derive(Debug, Clone)]
pub(crate) enum Ended {
    /// A load.
    Load(OperationId, LoadOutcome),
    /// A save.
    Save(OperationId, SaveOutcome),
}

/// A load of blocks at the places that a lookup told.
pub(crate) struct PlacedLoad {
    pub(crate) operation: OperationId,
    pub(crate) lease: LeaseId,
    pub(crate) shard: u16,
    pub(crate) arena: ArenaId,
    /// Block of the worker's memory, place in the arena.
    pub(crate) blocks: Vec<(u32, Place)>,
    /// What is left of the lease.
    pub(crate) remaining: Duration,
    /// The device's stream of the model.
    pub(crate) stream: u64,
    /// Whether what is queued on the stream later waits for the load.
    pub(crate) before: bool,
}

/// What ended and was not asked for yet: at most one entry for each operation, which the engine's queue bounds.
#[derive(Default)]
struct EndedQueue {
    ended: Mutex<Vec<Ended>>,
    arrived: Condvar,
}

impl EndedQueue {
    fn push(&self, ended: Ended) {
        self.ended.lock().push(ended);
        self.arrived.notify_all();
    }

    fn take(&self, wait: Duration) -> Vec<Ended> {
        let mut ended = self.ended.lock();
        if ended.is_empty() && !wait.is_zero() {
            self.arrived.wait_for(&mut ended, wait);
        }
        std::mem::take(&mut *ended)
    }
}

/// How long the session of an earlier epoch is waited for.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(1);

/// A session with an engine of this process. A worker that registers under another name, for a new epoch, goes on with
/// a new session.
pub(crate) struct Embedded {
    shared: SharedEngine,
    session: Mutex<(SessionId, Option<InstanceId>)>,
    memory: Mutex<Option<Arc<dyn DeviceMemory>>>,
    arena: Arc<ArenaView>,
    placed: Arc<PlacedLoads>,
    ended: Arc<EndedQueue>,
}

impl Embedded {
    /// Opens the engine and starts a session.
    ///
    /// # Errors
    /// Those of [`open`].
    pub(crate) fn start(path: &Path, config: EngineConfig) -> Result<Self> {
        let shared = open(path, config)?;
        let session = shared.engine.start_session();
        let arena = shared.engine.arena();
        Ok(Self {
            shared,
            session: Mutex::new((session, None)),
            memory: Mutex::default(),
            arena,
            placed: Arc::default(),
            ended: Arc::default(),
        })
    }

    pub(crate) fn register(&self, spec: InstanceSpec, memory: Arc<dyn DeviceMemory>) -> Result<()> {
        let engine = &self.shared.engine;
        let instance = spec.instance.clone();
        let (earlier, registered) = self.session.lock().clone();
        let is_new_epoch = registered.is_some_and(|registered| registered != instance);
        let session = if is_new_epoch { engine.start_session() } else { earlier };
        engine.register(session, spec)?;
        memory.attach(&self.arena)?;
        *self.session.lock() = (session, Some(instance));
        if let Some(earlier) = self.memory.lock().replace(memory) {
            earlier.detach(&self.arena);
        }
        if is_new_epoch && let Err(error) = engine.end_session(earlier, RETIRE_TIMEOUT) {
            // Its copies hold their memory and end by themselves.
            tracing::warn!(%error, "the session of the earlier epoch has not ended yet");
        }
        Ok(())
    }

    fn session(&self) -> SessionId {
        self.session.lock().0
    }

    fn memory(&self) -> Result<Arc<dyn DeviceMemory>> {
        self.memory
            .lock()
            .clone()
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "no memory is registered; register the worker first"))
    }

    /// The worker's memory for one operation, behind what is queued on the stream.
    fn kv_cache(&self, stream: u64) -> Result<Arc<dyn KvCache>> {
        let memory = self.memory()?;
        let after = memory.fence(stream)?;
        Ok(Arc::new(LocalKvCache::new(memory, Arc::clone(&self.arena), after)))
    }

    pub(crate) fn arena(&self) -> Result<Option<ArenaId>> {
        let Ok(memory) = self.memory() else { return Ok(None) };
        Ok(memory.is_attached(&self.arena)?.then(|| self.arena.id()))
    }

    pub(crate) fn load_placed(&self, load: PlacedLoad) -> Result<()> {
        let PlacedLoad { operation, lease, shard, arena, blocks, remaining, stream, before } = load;
        let memory = self.memory()?;
        if arena != self.arena.id() {
            return Err(Error::new(ErrorKind::NotFound, "the blocks lie in another memory; look them up again"));
        }
        PlacedLoads::check_lease(remaining)?;
        if !memory.is_attached(&self.arena)? {
            return Err(Error::new(ErrorKind::Busy, "the device cannot reach all of the memory yet"));
        }
        let after = if before { None } else { memory.fence(stream)? };
        let cancelled = self.placed.start(operation);
        let numbers: Vec<u32> = blocks.iter().map(|(block, _)| *block).collect();
        let (engine, placed, ended) = (self.shared.engine.clone(), Arc::clone(&self.placed), Arc::clone(&self.ended));
        let done = Box::new(move |result: Result<()>| {
            let outcome = PlacedLoads::outcome(result, numbers);
            engine.consume(lease, shard);
            placed.end(operation);
            ended.push(Ended::Load(operation, outcome));
        });
        let direction = CopyDirection::ToDevice;
        let copy = PlacedCopy { arena: Arc::clone(&self.arena), direction, blocks, after, cancelled, done };
        if before {
            return memory.load_before(copy, stream).inspect_err(|_| self.placed.end(operation));
        }
        // Host memory is copied by whoever starts the copy: not by the model's thread.
        std::thread::Builder::new()
            .name("pega-placed".into())
            .spawn(move || memory.start(copy))
            .map(drop)
            .map_err(|error| Error::from_io("cannot start a copy thread", error))
            .inspect_err(|_| self.placed.end(operation))
    }

    pub(crate) fn lookup(&self, request: &LookupRequest) -> Result<LookupReply> {
        self.shared.engine.lookup(self.session(), request)
    }

    pub(crate) fn locate(&self, request: &LocateRequest) -> Result<Vec<Option<HitTier>>> {
        self.shared.engine.locate(self.session(), request)
    }

    pub(crate) fn release(&self, lease: LeaseId) {
        self.shared.engine.release(lease);
    }

    pub(crate) fn load(
        &self,
        operation: OperationId,
        lease: LeaseId,
        shard: u16,
        blocks: Vec<LoadBlock>,
        stream: u64,
    ) -> Result<()> {
        let memory = self.kv_cache(stream)?;
        let request = LoadRequest { session: self.session(), operation, lease, shard, memory, blocks };
        let ended = Arc::clone(&self.ended);
        self.shared.engine.load(request, Box::new(move |outcome| ended.push(Ended::Load(operation, outcome))))
    }

    pub(crate) fn save(
        &self,
        operation: OperationId,
        target: SaveTarget,
        blocks: Vec<BlockSave>,
        stream: u64,
    ) -> Result<()> {
        let memory = self.kv_cache(stream)?;
        let request = SaveRequest { session: self.session(), operation, target, memory, blocks };
        let ended = Arc::clone(&self.ended);
        self.shared.engine.save(request, Box::new(move |outcome| ended.push(Ended::Save(operation, outcome))))
    }

    pub(crate) fn cancel(&self, operation: OperationId) {
        self.placed.cancel(Some(operation));
        self.shared.engine.cancel(self.session(), operation);
    }

    pub(crate) fn poll(&self, wait: Duration) -> Vec<Ended> {
        self.ended.take(wait)
    }

    pub(crate) fn flush(&self, timeout: Duration) -> Result<()> {
        self.shared.engine.flush(Instant::now() + timeout)
    }

    pub(crate) fn stats(&self) -> pegaflow_engine::Stats {
        self.shared.engine.stats()
    }

    /// Ends the session once its copies have ended, then this use of the engine. A session whose copies still run keeps
    /// its memory for ever: an address that may be written is never given back.
    pub(crate) fn close(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let ended = self.shared.engine.end_session(self.session(), timeout);
        let has_placed_ended = self.placed.wait(deadline);
        let memory = self.memory.lock().take();
        if ended.is_err() || !has_placed_ended {
            std::mem::forget(memory);
        } else if let Some(memory) = memory {
            memory.detach(&self.arena);
        }
        let closed = self.shared.close(deadline.max(Instant::now() + Duration::from_millis(100)));
        ended.and(closed)
    }
}
