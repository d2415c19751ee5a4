//! Engines inside this process, one for each store: the scheduler's and the worker's side of vLLM, and every
//! `PegaEngine` on the same path, share one. The last to close it flushes it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pegaflow_engine::{
    BlockSave, Engine, EngineConfig, Error, ErrorKind, InstanceId, InstanceSpec, LeaseId, LoadBlock, LoadOutcome,
    LoadRequest, LookupReply, LookupRequest, OperationId, Result, SaveOutcome, SaveRequest, SessionId,
};
use pegaflow_tiers::{DeviceMemory, HostMemory};

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
        Ok(Self { shared, session: Mutex::new((session, None)), memory: Mutex::default(), ended: Arc::default() })
    }

    pub(crate) fn register(&self, spec: InstanceSpec, memory: Arc<HostMemory>) -> Result<()> {
        let engine = &self.shared.engine;
        let instance = spec.instance.clone();
        let (earlier, registered) = self.session.lock().clone();
        let is_new_epoch = registered.is_some_and(|registered| registered != instance);
        let session = if is_new_epoch { engine.start_session() } else { earlier };
        engine.register(session, spec)?;
        *self.session.lock() = (session, Some(instance));
        *self.memory.lock() = Some(memory);
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

    pub(crate) fn lookup(&self, request: &LookupRequest) -> Result<LookupReply> {
        self.shared.engine.lookup(self.session(), request)
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
    ) -> Result<()> {
        let request = LoadRequest { session: self.session(), operation, lease, shard, memory: self.memory()?, blocks };
        let ended = Arc::clone(&self.ended);
        self.shared.engine.load(request, Box::new(move |outcome| ended.push(Ended::Load(operation, outcome))))
    }

    pub(crate) fn save(
        &self,
        operation: OperationId,
        instance: InstanceId,
        group: u16,
        shard: u16,
        blocks: Vec<BlockSave>,
    ) -> Result<()> {
        let request =
            SaveRequest { session: self.session(), operation, instance, group, shard, memory: self.memory()?, blocks };
        let ended = Arc::clone(&self.ended);
        self.shared.engine.save(request, Box::new(move |outcome| ended.push(Ended::Save(operation, outcome))))
    }

    pub(crate) fn cancel(&self, operation: OperationId) {
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
        let memory = self.memory.lock().take();
        if ended.is_err() {
            std::mem::forget(memory);
        }
        let closed = self.shared.close(deadline.max(Instant::now() + Duration::from_millis(100)));
        ended.and(closed)
    }
}
