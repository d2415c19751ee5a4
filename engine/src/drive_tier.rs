//! The store behind the engine: there, out of use, there again. Everybody asks here for the store of the moment, at the
//! cost of a read lock; who holds locations holds the store that they are of, so none is ever used with another one.
//!
//! When the store takes no more writes the engine goes on in DRAM only, and `store_keeper` sees to it that the store is
//! opened again. What it does is told here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use pegaflow_tiers::{
    Error, ErrorKind, GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId, PoisonReason, RecoveryReport,
    Result, Store, WriteVolume,
};

use crate::known_namespaces::{Known, KnownNamespaces};
use crate::store_totals::StoreTotals;

/// How often a registration looks for the store again that comes back under it.
const REGISTER_ATTEMPTS: usize = 4;

/// Opens the store; called again whenever it has to be opened anew.
pub(crate) type Opener = Box<dyn Fn() -> Result<(Arc<Store>, RecoveryReport)> + Send + Sync>;

/// How the store is opened, and where it lies.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) open: Opener,
}

/// Why the store is out of use.
#[derive(Debug, Clone)]
pub(crate) struct Degraded {
    pub(crate) reason: PoisonReason,
    pub(crate) error: Error,
}

#[derive(Default)]
pub(crate) struct State {
    /// Rises with every store: what an earlier one still reports is ignored.
    epoch: u64,
    pub(crate) degraded: Option<Degraded>,
    /// The store that is out of use, not closed yet, and hidden from readers.
    pub(crate) retired: Option<Arc<Store>>,
    pub(crate) uuid: Option<[u8; 16]>,
    /// Somebody wants an attempt now.
    pub(crate) is_wanted: bool,
    pub(crate) failed_attempts: u64,
    pub(crate) last_failure: Option<Error>,
    pub(crate) is_closing: bool,
    pub(crate) is_scrubbing: bool,
    /// What came while the store was away is being handed to it.
    is_renewing: bool,
    /// Threads that use the store on their own: the keeper, the scrub.
    pub(crate) helpers: u32,
    /// What the stores that were closed have counted.
    pub(crate) past: StoreTotals,
}

/// See the module.
pub(crate) struct DriveTier {
    pub(crate) source: Option<Source>,
    current: RwLock<Option<Arc<Store>>>,
    pub(crate) namespaces: KnownNamespaces,
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Condvar,
}

impl DriveTier {
    /// An engine in DRAM only.
    pub(crate) fn none() -> Arc<Self> {
        Self::new(None, KnownNamespaces::without_store())
    }

    /// Opens the store for the first time.
    ///
    /// # Errors
    /// What opening reports.
    pub(crate) fn open(source: Source) -> Result<(Arc<Self>, RecoveryReport)> {
        let (store, report) = (source.open)()?;
        let tier = Self::new(Some(source), KnownNamespaces::beside_store());
        tier.attach(store);
        Ok((tier, report))
    }

    fn new(source: Option<Source>, namespaces: KnownNamespaces) -> Arc<Self> {
        let (current, state, changed) = (RwLock::new(None), Mutex::default(), Condvar::new());
        Arc::new(Self { source, current, namespaces, state, changed })
    }

    /// Whether the engine has a store, in use or not.
    pub(crate) fn is_configured(&self) -> bool {
        self.source.is_some()
    }

    /// The store of the moment. It may take no more writes; its reads go on where they can.
    pub(crate) fn store(&self) -> Option<Arc<Store>> {
        self.current.read().clone()
    }

    /// The store, for whoever can do nothing without it.
    ///
    /// # Errors
    /// `NotFound` if there is none, `Poisoned` while it is out of use.
    pub(crate) fn usable(&self) -> Result<Arc<Store>> {
        if !self.is_configured() {
            return Err(Error::new(ErrorKind::NotFound, "there is no store; give a path for one"));
        }
        let out_of_use = |why: &str| Error::new(ErrorKind::Poisoned, format!("the store is out of use: {why}"));
        match (self.degraded(), self.store()) {
            (Some(degraded), _) => Err(out_of_use(&format!("{:#}", degraded.error))),
            (None, store) => store.ok_or_else(|| out_of_use("it is being opened again; try again")),
        }
    }

    /// Whether this is the store of the moment.
    pub(crate) fn is_current(&self, store: &Arc<Store>) -> bool {
        self.current.read().as_ref().is_some_and(|current| Arc::ptr_eq(current, store))
    }

    /// Why the store is out of use, if so.
    pub(crate) fn degraded(&self) -> Option<Degraded> {
        self.state.lock().degraded.clone()
    }

    /// What all stores of this engine have counted, and (times that the store was opened again, attempts that failed).
    pub(crate) fn totals(&self) -> (StoreTotals, u64, u64) {
        let current = self.store().map(|store| store.stats());
        let state = self.state.lock();
        let totals = current.map_or(state.past, |stats| state.past.plus(&stats));
        (totals, state.epoch - u64::from(state.epoch > 0), state.failed_attempts)
    }

    /// What went to the drive since the engine was opened, through all stores that it has had.
    pub(crate) fn write_volume(&self) -> WriteVolume {
        let current = self.store().map(|store| store.write_volume()).unwrap_or_default();
        let past = self.state.lock().past.appended_bytes;
        WriteVolume { written_bytes: past + current.written_bytes, ..current }
    }

    /// The number of a namespace: the store's, or while it is out of use one that no store gives.
    ///
    /// # Errors
    /// `GeometryMismatch`, `InvalidInput`, `Busy`.
    pub(crate) fn namespace(
        &self,
        descriptor: &NamespaceDescriptor,
        groups: &[GroupGeometry],
    ) -> Result<NamespaceHandle> {
        let mut own = None;
        for _ in 0..REGISTER_ATTEMPTS {
            // Looked for again after a number was given here: if the store has come back since, it has seen that number or
            // is seen here.
            let Some(store) = self.store().filter(|store| store.poison_reason().is_none()) else {
                match own {
                    Some(handle) => return Ok(handle),
                    None => own = Some(self.namespaces.register(descriptor, groups)?),
                }
                continue;
            };
            match store.namespace(descriptor, groups) {
                Ok(handle) => {
                    self.namespaces.note(descriptor, groups, handle);
                    return Ok(handle);
                }
                Err(error) if !is_of_drive(&error) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "the store takes no namespace; its blocks live in DRAM only for now");
                    own = Some(self.namespaces.register(descriptor, groups)?);
                }
            }
        }
        own.ok_or_else(|| Error::new(ErrorKind::Busy, "the store comes and goes; try again"))
    }

    /// The number under which a namespace is known now: it may be another one after the store has come back.
    pub(crate) fn handle_of(&self, id: &NamespaceId) -> Option<NamespaceHandle> {
        self.namespaces.handle_of(id)
    }

    /// What is known of a namespace: of this run, or by the store of an earlier one.
    pub(crate) fn known(&self, id: &NamespaceId) -> Option<Known> {
        if let Some(known) = self.namespaces.get(id) {
            return Some(known);
        }
        let store = self.store()?;
        store.handle_of(id)?;
        let row = store.namespaces().into_iter().find(|row| row.id == *id && !row.groups.is_empty())?;
        // The store writes nothing to hear of it again; from now on it is known.
        let heard = self.namespace(&row.descriptor, &row.groups);
        heard.inspect_err(|error| tracing::debug!(namespace = %id, %error, "a namespace cannot be used")).ok()?;
        self.namespaces.get(id)
    }

    /// How many namespaces there are of a kind.
    pub(crate) fn count_namespaces(&self, is_counted: &dyn Fn(&NamespaceDescriptor) -> bool) -> usize {
        let of_store = self.store().map_or(0, |store| store.count_namespaces(is_counted));
        // Those here are the store's but for those of the time without it.
        of_store.max(self.namespaces.count(is_counted))
    }

    /// Asks for an attempt to open the store again now, and waits for it. Nothing to do is no error.
    ///
    /// # Errors
    /// Why it did not succeed; `Timeout` at the deadline: it is tried further then.
    pub(crate) fn reopen_now(&self, deadline: Instant) -> Result<()> {
        let mut state = self.state.lock();
        let failed_before = state.failed_attempts;
        while state.degraded.is_some() && !state.is_closing {
            if state.failed_attempts > failed_before {
                return state.last_failure.clone().map_or(Ok(()), Err);
            }
            state.is_wanted = true;
            self.changed.notify_all();
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                let message = "the store was not opened again in time; it is tried further";
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
        Ok(())
    }

    /// Ends the helpers and closes the store.
    ///
    /// # Errors
    /// `Timeout`, and what closing reports.
    pub(crate) fn close(&self, deadline: Instant) -> Result<()> {
        let mut state = self.state.lock();
        state.is_closing = true;
        self.changed.notify_all();
        while state.helpers > 0 {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                let message = "the store is being opened again or scrubbed, which did not end in time";
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
        let retired = state.retired.take();
        drop(state);
        // It stays the one that readers see: what is asked afterwards is told that it is closed.
        let store = self.store().or(retired);
        store.map_or(Ok(()), |store| store.close(deadline))
    }

    /// Does nothing for so long, or until the store goes out of use or comes back, or this is so ([`DriveTier::wake`] has it
    /// looked at); false when the engine closes.
    pub(crate) fn rest(&self, time: Duration, is_over: &dyn Fn() -> bool) -> bool {
        let until = Instant::now() + time;
        let mut state = self.state.lock();
        let was_degraded = state.degraded.is_some();
        while !state.is_closing && state.degraded.is_some() == was_degraded && !is_over() {
            if self.changed.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        !state.is_closing
    }

    /// Has everybody who rests look whether that is over.
    pub(crate) fn wake(&self) {
        // Under the lock: nobody is between looking and resting.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Says whether a scrub uses the store, which is not closed under it.
    pub(crate) fn set_scrubbing(&self, is_scrubbing: bool) {
        self.state.lock().is_scrubbing = is_scrubbing;
        self.changed.notify_all();
    }

    /// Says whether what came while the store was away is still to be handed to it.
    pub(crate) fn set_renewing(&self, is_renewing: bool) {
        self.state.lock().is_renewing = is_renewing;
        self.changed.notify_all();
    }

    /// Waits until the store has been handed what came while it was away.
    ///
    /// # Errors
    /// `Timeout`.
    pub(crate) fn wait_renewed(&self, deadline: Instant) -> Result<()> {
        let mut state = self.state.lock();
        while state.is_renewing {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                let message = "what came while the store was out of use is not written yet; try again with more time";
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
        Ok(())
    }

    /// Waits until no scrub uses the store: it stops by itself when the store is out of use.
    ///
    /// # Errors
    /// `Timeout`.
    pub(crate) fn wait_scrub_ended(&self, deadline: Instant) -> Result<()> {
        let mut state = self.state.lock();
        while state.is_scrubbing {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return Err(Error::new(ErrorKind::Timeout, "the scrub of the old store has not ended yet"));
            }
        }
        Ok(())
    }

    /// Starts a thread that uses the store; [`DriveTier::close`] waits for it. It calls [`DriveTier::end_helper`] last.
    ///
    /// # Errors
    /// `Io` if the system gives no thread.
    pub(crate) fn start_helper(&self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        self.state.lock().helpers += 1;
        // Not joined: it may be held up by a drive, and whoever closes waits to a deadline.
        let started = std::thread::Builder::new().name(name.into()).spawn(work).map(drop);
        started.map_err(|source| {
            self.end_helper();
            Error::from_io("starting a thread", source)
        })
    }

    /// A helper has ended.
    pub(crate) fn end_helper(&self) {
        self.state.lock().helpers -= 1;
        self.changed.notify_all();
    }

    /// From now on this is the store.
    pub(crate) fn attach(self: &Arc<Self>, store: Arc<Store>) {
        let uuid = store.uuid();
        *self.current.write() = Some(Arc::clone(&store));
        let mut state = self.state.lock();
        state.epoch += 1;
        (state.uuid, state.degraded, state.last_failure) = (Some(uuid), None, None);
        let epoch = state.epoch;
        drop(state);
        self.changed.notify_all();
        let tier = Arc::downgrade(self);
        // Last: it is called at once if the store has failed by now.
        store.on_poison(Box::new(move |reason, error| {
            if let Some(tier) = tier.upgrade() {
                let mut state = tier.state.lock();
                if state.epoch == epoch && state.degraded.is_none() {
                    state.degraded = Some(Degraded { reason, error: error.clone() });
                    tier.changed.notify_all();
                }
            }
        }));
    }

    /// Takes the store away from readers; it waits to be closed.
    pub(crate) fn detach(&self) {
        let taken = self.current.write().take();
        let mut state = self.state.lock();
        state.retired = taken.or_else(|| state.retired.take());
    }
}

/// Whether an error says that the drive fails, not that the request is bad.
fn is_of_drive(error: &Error) -> bool {
    use ErrorKind::{Closed, Corrupt, Io, NoSpace, PermissionDenied, Poisoned};
    matches!(error.kind(), NoSpace | PermissionDenied | Io | Poisoned | Closed | Corrupt)
}
