//! The engine: one open cache, shared by everybody in the process.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use pegaflow_tiers::{
    Arena, ArenaConfig, ArenaId, ArenaView, DriveConfig, Error, ErrorKind, HugePages, IoChoice, NamespaceId, Result,
    Slot, Store, StoreConfig,
};

use crate::admission::{Admission, Admit, ByWorth, SeenBefore, SystemClock};
use crate::api::{
    DecisionRecord, HitTier, InstanceId, InstanceSpec, LatencyStats, LeaseId, LoadOutcome, LoadRequest, LocateRequest,
    LookupReply, LookupRequest, OperationId, SaveOutcome, SaveRequest, SessionId, Stats,
};
use crate::arbiter::LoadPolicy;
use crate::config::{ByteSize, EngineConfig, IoEngineChoice, NvmeConfig};
use crate::counters::Counters;
use crate::dram_shares;
use crate::drive_tier::{DriveTier, Source};
use crate::fetch::{FetchReason, Fetches};
use crate::hot_set::{WarmRuns, WarmStart};
use crate::inner::{Inner, Workers};
use crate::lease::{Hit, Leases};
use crate::load::LoadJob;
use crate::load_choice::LoadChoice;
use crate::namespace_uses::NamespaceUses;
use crate::operations::Operations;
use crate::policy::{PegaflowConfig, PolicyChoice};
use crate::reclaim::CostBenefit;
use crate::registry::Registry;
use crate::residency::{Residency, Resident};
use crate::save::SaveJob;
use crate::scheduler::{DrivePolicy, LiveCurve, Requests, SizePolicies};
use crate::scrub::Scrubs;
use crate::spill::{BUDGET_NOTE, offer_again};
use crate::write_budget::WriteBudget;
use crate::{hot_set, locate, lookup, objects, scheduler};

/// A group commit happens at the latest after this many bytes.
const COMMIT_BYTES: u64 = 64 << 20;
/// How often a registration looks whether its namespace has another number by now.
const REGISTER_ATTEMPTS: usize = 4;

/// One open cache. Cloning gives another handle to the same one; [`Engine::close`] or the last handle closes it.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// Who decides what stays, in DRAM and on the drive.
type Deciders = (Arc<Residency>, Option<Arc<DrivePolicy>>);

struct Shared {
    inner: Arc<Inner>,
    workers: RwLock<Workers>,
}

impl Engine {
    /// Opens the cache: takes the first of the DRAM (the rest is taken in the background), locks and recovers the store.
    ///
    /// # Errors
    /// `InvalidInput`, `Locked`, `ForeignFormat`, `NewerFormat`, `PermissionDenied`, `NoSpace`, `Unsupported` or `Io`.
    pub fn open(config: EngineConfig) -> Result<Self> {
        Self::open_with(config, source)
    }

    /// As [`Engine::open`], with a wrapper around the I/O engine of each store that it opens: for tests.
    ///
    /// # Errors
    /// As [`Engine::open`].
    #[cfg(feature = "fault-injection")]
    pub fn open_wrapped(
        config: EngineConfig,
        wrap: impl Fn(Arc<dyn pegaflow_tiers::BlockIo>) -> Arc<dyn pegaflow_tiers::BlockIo> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::open_with(config, |config, arena, deciders| {
            let nvme = config.nvme.as_ref()?;
            let (path, policy) = (nvme.path.clone(), policy(nvme, deciders));
            let (config, arena) = (store_config(config, nvme, arena), Arc::clone(arena));
            let open = move || Store::open_wrapped(config.clone(), &arena, policy(), &wrap);
            Some(Source { path, open: Box::new(open) })
        })
    }

    fn open_with(
        config: EngineConfig,
        source: impl FnOnce(&EngineConfig, &Arc<Arena>, &Deciders) -> Option<Source>,
    ) -> Result<Self> {
        config.validate()?;
        let huge_pages = if config.huge_pages { HugePages::Reserved } else { HugePages::Transparent };
        let start = Instant::now();
        let is_shared = config.shared_dram;
        let arena =
            Arena::new(ArenaConfig { huge_pages, is_shared, stays_small: true, ..ArenaConfig::new(config.dram.0) })?;
        let clock = || Box::new(move || start.elapsed().as_millis() as u64);
        let mut policies = SizePolicies::new(config.policy, PegaflowConfig::default(), config.dram.0, clock());
        policies.set_guaranteed_percent(config.guaranteed_percent);
        let residency = Arc::new(Residency::new(Arc::clone(&arena), policies));
        let learns = config.nvme.as_ref().filter(|_| config.policy == PolicyChoice::Pegaflow);
        let drive_policy = learns.map(|nvme| Arc::new(DrivePolicy::new(nvme.capacity_bytes(), clock())));
        let deciders = (residency, drive_policy);
        let mut recovered_records = 0;
        let drive = match source(&config, &arena, &deciders) {
            None => DriveTier::none(),
            Some(source) => {
                let (drive, report) = DriveTier::open(source)?;
                recovered_records = report.recovered_records;
                drive
            }
        };
        let admission = match (drive.store(), &config.nvme) {
            (Some(store), Some(nvme)) => Some(admission(&store, nvme, config.policy)?),
            _ => None,
        };
        let (residency, drive_policy) = deciders;
        if let Some(store) = drive.store() {
            restore_learned(&store, &residency, drive_policy.as_deref());
        }
        // Not before: taking memory holds up whoever maps some, and an open store does so hundreds of times.
        arena.grow_on()?;
        let fetches = Fetches::new(Arc::clone(&residency.fetched));
        let inner = Arc::new(Inner {
            admission,
            drive_policy,
            curve: LiveCurve::new(),
            wear: Arc::default(),
            residency,
            requests: Requests::default(),
            scrubs: Scrubs::default(),
            scrub_rate: Arc::new(AtomicU64::new(config.nvme.as_ref().map_or(0, |nvme| nvme.scrub.0))),
            arena,
            drive,
            leases: Leases::new(),
            load_choice: LoadChoice::new(config.load_policy),
            fetches,
            warm_runs: WarmRuns::default(),
            warm_start: WarmStart::new(start, config.nvme.as_ref().is_some_and(|nvme| nvme.warm_start)),
            operations: Operations::default(),
            registry: Registry::default(),
            counters: Counters::default(),
            object_order: Mutex::new(()),
            namespace_uses: NamespaceUses::default(),
            purging: Mutex::new(()),
            recovered_records,
            is_closed: AtomicBool::new(false),
            config,
        });
        let workers = RwLock::new(Workers::start(&inner)?);
        Ok(Self { shared: Arc::new(Shared { inner, workers }) })
    }

    pub(crate) fn inner(&self) -> Result<&Arc<Inner>> {
        let inner = &self.shared.inner;
        if inner.is_closed() { Err(Error::new(ErrorKind::Closed, "the engine is closed")) } else { Ok(inner) }
    }

    /// A new session; it lives until [`Engine::end_session`].
    pub fn start_session(&self) -> SessionId {
        self.shared.inner.registry.start_session()
    }

    /// Ends a session: its leases go, its queued operations are cancelled, its instances are forgotten when their last
    /// worker is gone. Returns only after its copies have ended, or after `timeout`.
    ///
    /// # Errors
    /// `Timeout` if copies were still running; the session's memory must then stay mapped.
    pub fn end_session(&self, session: SessionId, timeout: Duration) -> Result<()> {
        let inner = &self.shared.inner;
        inner.registry.end_session(session);
        inner.leases.end_session(session);
        inner.fetches.cancel_session(session);
        inner.residency.notify_room();
        inner.operations.cancel(session, None);
        inner.operations.wait_ended(Some(session), Instant::now() + timeout)
    }

    /// Registers a worker of an instance: once all shards of an instance have registered it can be looked up, and this
    /// session may load and save. Registering the same again is allowed.
    ///
    /// # Errors
    /// `GeometryMismatch` if the namespace or the instance is known with another geometry or descriptor, `InvalidInput`,
    /// `NotFound` for an unknown session.
    pub fn register(&self, session: SessionId, spec: InstanceSpec) -> Result<()> {
        let inner = self.inner()?;
        inner.registry.check(session, &spec)?;
        let (id, mut namespace) = (spec.namespace.id(), inner.drive.namespace(&spec.namespace, &spec.groups)?);
        inner.registry.add_worker(session, &spec, namespace);
        for _ in 0..REGISTER_ATTEMPTS {
            // The store may have come back in between, and the namespace may have got another number with it; or it was
            // purged, and has to be registered anew.
            match inner.drive.handle_of(&id).filter(|now| !inner.residency.is_purged(*now)) {
                Some(now) if now == namespace => return Ok(()),
                Some(now) => namespace = now,
                None => namespace = inner.drive.namespace(&spec.namespace, &spec.groups)?,
            }
            inner.registry.set_namespace(&id, namespace);
        }
        Ok(())
    }

    /// The longest prefix of the keys that is there in all shards, with a lease on it if asked for. In-memory only.
    /// An instance of which not all shards have registered finds nothing.
    ///
    /// # Errors
    /// `NotFound` for an unknown session, instance or group, `InvalidInput` for too many keys or too long a lease, `Busy`
    /// at the most leases.
    pub fn lookup(&self, session: SessionId, request: &LookupRequest) -> Result<LookupReply> {
        lookup::lookup(self.inner()?, session, request)
    }

    /// Where each of some blocks is: the tier from which all its shards can be had, `None` if one of them is nowhere. In
    /// memory only; takes no lease, and is no use of the blocks.
    ///
    /// # Errors
    /// `NotFound` for an unknown session, instance or group, `InvalidInput` for too many keys, `Busy` while not all workers
    /// of the instance have registered, or the index of the store is still being read.
    pub fn locate(&self, session: SessionId, request: &LocateRequest) -> Result<Vec<Option<HitTier>>> {
        locate::locate(self.inner()?, session, request)
    }

    /// The namespace that an instance looks up, loads and saves in.
    ///
    /// # Errors
    /// `NotFound` for an instance that is not registered.
    pub fn namespace_of(&self, instance: &InstanceId) -> Result<NamespaceId> {
        self.inner()?.registry.namespace_of(instance)
    }

    /// Whether what lookups find is loaded.
    pub fn load_policy(&self) -> LoadPolicy {
        self.shared.inner.load_choice.policy()
    }

    /// Changes that, from the next lookup on. `never` holds for every asker, the others only where it has no policy of its
    /// own.
    pub fn set_load_policy(&self, policy: LoadPolicy) {
        self.shared.inner.load_choice.set_policy(policy);
    }

    /// Changes how many bytes a second are scrubbed while the drives are idle, within a minute; 0: none.
    ///
    /// # Errors
    /// `InvalidInput` above the limit of [`NvmeConfig::scrub`], `NotFound` without a store.
    pub fn set_scrub(&self, bytes_per_second: ByteSize) -> Result<()> {
        self.change_store(|nvme| nvme.scrub = bytes_per_second)?;
        self.shared.inner.scrub_rate.store(bytes_per_second.0, Ordering::Relaxed);
        Ok(())
    }

    /// Changes what may be written to the drives, from the next block on; `None`: no bound. What was saved up of the old
    /// budget stays as far as the new one allows; a first budget begins with nothing.
    ///
    /// # Errors
    /// `InvalidInput` below the least budget, see [`NvmeConfig::write_budget`]; `NotFound` without a store.
    pub fn set_write_budget(&self, budget: Option<WriteBudget>) -> Result<()> {
        let nvme = self.change_store(|nvme| nvme.write_budget = budget)?;
        let inner = &self.shared.inner;
        if let Some(admission) = &inner.admission {
            admission.set_bytes_per_day(nvme.write_bytes_per_day(), inner.drive.write_volume());
        }
        Ok(())
    }

    /// The store's configuration with a change, if that is valid.
    fn change_store(&self, change: impl FnOnce(&mut NvmeConfig)) -> Result<NvmeConfig> {
        let mut config = self.shared.inner.config.clone();
        let Some(nvme) = &mut config.nvme else {
            return Err(Error::new(ErrorKind::NotFound, "there is no store; give a path for one"));
        };
        change(nvme);
        let changed = nvme.clone();
        config.validate().map(|()| changed)
    }

    /// The latest decisions whether to load, newest first, at most `limit`: of the requests with this name (or with it and
    /// a suffix behind a `-`), or of all. The last 1,024 of each instance are kept.
    pub fn explain(&self, request: Option<&str>, limit: usize) -> Vec<DecisionRecord> {
        self.shared.inner.load_choice.explain(request, limit)
    }

    /// Gives a lease back. Unknown leases are ignored: they may have run out.
    pub fn release(&self, lease: LeaseId) {
        let inner = &self.shared.inner;
        if let Some((session, tag)) = inner.leases.release(lease) {
            inner.fetches.cancel(session, tag);
            inner.residency.notify_room();
        }
    }

    /// Starts a load. `done` is called exactly once, on a thread of the engine, when no copy of the load can write any
    /// more, whatever happened. For an error that is returned here it is not called.
    ///
    /// # Errors
    /// `NotFound` for a lease that is over, `Busy` for a full queue, `InvalidInput` for a block outside lease or memory.
    pub fn load(&self, request: LoadRequest, done: Box<dyn FnOnce(LoadOutcome) + Send>) -> Result<()> {
        let job = LoadJob::new(self.inner()?, request, done)?;
        self.shared.workers.read().load(job)
    }

    /// A worker has copied its shard's blocks of a lease itself, at the places that the lookup told. An unknown lease is
    /// ignored.
    pub fn consume(&self, lease: LeaseId, shard: u16) {
        let inner = &self.shared.inner;
        if let Ok((_, taken)) = inner.leases.consume(lease, shard) {
            inner.counters.loaded_dram_blocks.add(taken.hits.len() as u64);
            let bytes = |hit: &Hit| match hit {
                Hit::Dram(resident) => resident.payload_bytes,
                Hit::Nvme(..) => 0,
            };
            inner.counters.loaded_dram_bytes.add(taken.hits.iter().map(bytes).sum());
            inner.requests.push_served(taken.asker, &taken.hits);
            inner.fetches.cancel(taken.asker.0, taken.asker.1);
            let slot_bytes = |hit: &Hit| match hit {
                Hit::Dram(resident) => resident.slot.bytes(),
                Hit::Nvme(..) => 0,
            };
            let used: Vec<_> = taken.hits.iter().map(|hit| (hit.id(), slot_bytes(hit))).collect();
            let in_dram = || {
                taken.hits.iter().filter_map(|hit| match hit {
                    Hit::Dram(resident) => Some(resident),
                    Hit::Nvme(..) => None,
                })
            };
            inner.residency.note_loaded(in_dram());
            offer_again(inner, in_dram());
            drop(taken);
            inner.note_uses(used.iter().map(|(id, _)| *id));
            if let Some((_, bytes)) = used.first() {
                inner.residency.touch_chain(used.iter().map(|(id, _)| (id, *bytes)));
            }
            inner.residency.notify_room();
        }
    }

    /// The DRAM that blocks lie in, for a worker in this process.
    pub fn arena(&self) -> Arc<ArenaView> {
        self.shared.inner.arena.view()
    }

    /// The descriptor by which another process can map the DRAM, its name and its length; `None` if it is not shared.
    pub fn shared_arena(&self) -> Option<(BorrowedFd<'_>, ArenaId, u64)> {
        let arena = &self.shared.inner.arena;
        arena.fd().map(|fd| (fd, arena.id(), arena.capacity_bytes()))
    }

    /// Starts a save. `done` is called exactly once, on a thread of the engine, when the device's blocks are no longer
    /// read. A block that was saved is visible when `done` is called, durable after at most the commit interval.
    ///
    /// # Errors
    /// `NotFound` for an unknown instance, `Busy` for a full queue (the blocks are counted as dropped), `InvalidInput`,
    /// `GeometryMismatch`. `done` is not called then.
    pub fn save(&self, request: SaveRequest, done: Box<dyn FnOnce(SaveOutcome) + Send>) -> Result<()> {
        let session = request.session;
        let job = SaveJob::new(self.inner()?, request, done)?;
        self.shared.workers.read().save(session, job)
    }

    /// Asks for a load or a save to end early: blocks not yet copied are skipped (a load reports them as failed). Its
    /// `done` is still called, after its copies have ended. Unknown operations are ignored.
    pub fn cancel(&self, session: SessionId, operation: OperationId) {
        self.shared.inner.operations.cancel(session, Some(operation));
    }

    /// Stores a named object and returns when it is visible; durable as any save. Replaces what has the name. Waits up to
    /// 30 s for room.
    ///
    /// # Errors
    /// `InvalidInput` for an object that is empty, larger than a quarter of DRAM or larger than half a region of the
    /// store, `Busy` if DRAM stays full of bytes not yet durable, `Closed`.
    pub fn put(&self, name: &[u8], bytes: &[u8]) -> Result<()> {
        objects::put(self.inner()?, name, bytes)
    }

    /// The bytes of a named object, or `None`. A read that fails its checks is a miss.
    ///
    /// # Errors
    /// `Closed`, `Busy` if DRAM has no room for it, `Timeout` if the drive does not answer.
    pub fn get(&self, name: &[u8]) -> Result<Option<ObjectBytes>> {
        objects::get(self.inner()?, name)
    }

    /// Gets many named objects, up to 64 of them at a time from the drives, and hands each to `each` as soon as it is
    /// there: its place among the names, and what [`Engine::get`] returns. Every place is handed on once, in any order.
    /// What `each` lets go of makes room for the next.
    ///
    /// # Errors
    /// `Closed`; those of the objects go to `each`.
    pub fn get_each(&self, names: &[&[u8]], each: &mut dyn FnMut(usize, Result<Option<ObjectBytes>>)) -> Result<()> {
        objects::get_each(self.inner()?, names, each);
        Ok(())
    }

    /// Removes a named object; whether it was there. Durable after the next commit or [`Engine::flush`].
    ///
    /// # Errors
    /// `Closed`, `Busy`, `Poisoned`.
    pub fn remove(&self, name: &[u8]) -> Result<bool> {
        objects::remove(self.inner()?, name)
    }

    /// Whether a named object is there.
    pub fn contains(&self, name: &[u8]) -> bool {
        objects::contains(&self.shared.inner, name)
    }

    /// Makes everything saved before durable.
    ///
    /// # Errors
    /// `Timeout` at `deadline`, `Poisoned` or `Io` if the store no longer takes writes. Without a store: nothing to do.
    pub fn flush(&self, deadline: Instant) -> Result<()> {
        let inner = self.inner()?;
        inner.operations.wait_saves(deadline)?;
        inner.drive.wait_renewed(deadline)?;
        match inner.drive.store() {
            Some(store) => store.flush(deadline),
            None => inner.drive.degraded().map_or(Ok(()), |degraded| Err(degraded.error)),
        }
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Stats {
        let inner = &self.shared.inner;
        let (dram_blocks, dram_dirty_bytes, evicted) = inner.residency.gauges();
        let pinned = inner.residency.pinned();
        let (loads_waiting, saves_waiting) = self.shared.workers.read().waiting();
        let (sessions, instances) = inner.registry.counts();
        let counters = &inner.counters;
        let mut stats = Stats {
            dram_capacity_bytes: inner.arena.capacity_bytes(),
            dram_ready_bytes: inner.arena.ready_bytes(),
            dram_used_bytes: inner.arena.used_bytes(),
            dram_dirty_bytes,
            dram_blocks,
            dram_pinned_blocks: pinned.blocks,
            dram_pinned_bytes: pinned.bytes,
            dram_pins: pinned.pins,
            io_engine: "none".into(),
            sessions,
            instances,
            leases: inner.leases.len() as u64,
            operations: inner.operations.len() as u64,
            lookup_blocks: counters.lookup_blocks.get(),
            lookup_hit_blocks: counters.lookup_hit_blocks.get(),
            load_policy: inner.load_choice.policy(),
            decided_loads: inner.load_choice.counters.loads.get(),
            decided_recomputes: inner.load_choice.counters.recomputes.get(),
            mistaken_loads: inner.load_choice.counters.mistaken_loads.get(),
            mistaken_recomputes: inner.load_choice.counters.mistaken_recomputes.get(),
            decision_read_bytes: inner.load_choice.counters.read_bytes.get(),
            fetched_look_aside: inner.fetches.totals(FetchReason::LookAside),
            fetched_request: inner.fetches.totals(FetchReason::REQUEST),
            fetched_hot_set: inner.fetches.totals(FetchReason::HotSet),
            warm_start: inner.warm_start.progress(),
            loaded_dram_blocks: counters.loaded_dram_blocks.get(),
            loaded_nvme_blocks: counters.loaded_nvme_blocks.get(),
            load_failed_blocks: counters.load_failed_blocks.get(),
            saved_blocks: counters.saved_blocks.get(),
            save_present_blocks: counters.save_present_blocks.get(),
            save_dropped_blocks: counters.save_dropped_blocks.get(),
            save_orphan_blocks: counters.save_orphan_blocks.get(),
            dram_evicted_blocks: evicted.room + evicted.other_size + evicted.colder,
            dram_evicted_room_blocks: evicted.room,
            dram_evicted_other_size_blocks: evicted.other_size,
            dram_evicted_colder_blocks: evicted.colder,
            loads_waiting,
            saves_waiting,
            fetch_waiting_bytes: inner.fetches.waiting_bytes(),
            lookup_hit_dram_blocks: counters.lookup_hit_dram_blocks.get(),
            loaded_dram_bytes: counters.loaded_dram_bytes.get(),
            loaded_nvme_bytes: counters.loaded_nvme_bytes.get(),
            saved_bytes: counters.saved_bytes.get(),
            save_dropped_room_blocks: counters.save_dropped_room.get(),
            save_dropped_queue_blocks: counters.save_dropped_queue.get(),
            save_dropped_copy_blocks: counters.save_dropped_copy.get(),
            save_dropped_cancelled_blocks: counters.save_dropped_cancelled.get(),
            latencies: LatencyStats {
                lookup: counters.times.lookup.read(),
                load_dram: counters.times.load_dram.read(),
                load_nvme: counters.times.load_nvme.read(),
                save: counters.times.save.read(),
                durable: counters.times.durable.read(),
                ..LatencyStats::default()
            },
            write_failed_records: counters.write_failed_records.get(),
            recovered_records: inner.recovered_records,
            policy: inner.config.policy.name().into(),
            policy_requests: inner.requests.counted.get(),
            policy_dropped_requests: inner.requests.dropped.get(),
            dram_estimates: inner.curve.estimates(inner.arena.capacity_bytes()),
            nvme_estimates: inner.curve.estimates(inner.store_payload_bytes()),
            drives: inner.wear.drives(),
            ..Stats::default()
        };
        add_drive(&mut stats, &inner.drive);
        dram_shares::add(&mut stats, inner);
        if let Some(admission) = &inner.admission {
            let budget = admission.status(inner.drive.write_volume());
            stats.write_budget_day_bytes = budget.bytes_per_day;
            stats.written_day_bytes = budget.spent_day_bytes;
            stats.refused_budget_blocks = admission.refused_budget.get();
            stats.refused_unproven_blocks = admission.refused_unproven.get();
            stats.refused_ancestor_blocks = admission.refused_ancestor.get();
            stats.refused_worth_blocks = admission.refused_worth.get();
        }
        stats
    }

    /// Whether it is fit to serve: `Ok`, or why it is degraded (for readiness).
    ///
    /// # Errors
    /// `Poisoned` when the store takes no more writes, `Closed` after [`Engine::close`].
    pub fn ready(&self) -> Result<()> {
        self.inner()?.drive.degraded().map_or(Ok(()), |degraded| {
            let (reason, error) = (degraded.reason.as_str(), degraded.error);
            let message = format!("degraded ({reason}), blocks live in DRAM only: {}", error.message());
            Err(Error::new(ErrorKind::Poisoned, message))
        })
    }

    /// Tries now to open a store again that is out of use, instead of at the next interval. With one that is in use
    /// there is nothing to do.
    ///
    /// # Errors
    /// `NotFound` without a store. Why it can not be opened; `Timeout` at `deadline` (it is tried further), `Closed`.
    pub fn reopen_store(&self, deadline: Instant) -> Result<()> {
        let inner = self.inner()?;
        if inner.config.nvme.is_none() {
            return Err(Error::new(
                ErrorKind::NotFound,
                "there is no store, blocks live in DRAM only; give a path for one",
            ));
        }
        inner.drive.reopen_now(deadline)
    }

    /// Whether an instance has registered all of its shards.
    pub fn is_registered(&self, instance: &InstanceId) -> bool {
        self.shared.inner.registry.is_complete(instance)
    }

    /// Flushes, ends every operation and closes the store; at most until `deadline`. Later calls get `Closed`.
    ///
    /// # Errors
    /// `Timeout` if something had not ended; what was reported durable is durable all the same.
    pub fn close(&self, deadline: Instant) -> Result<()> {
        let flushed = match self.flush(deadline) {
            Err(error) if error.kind() == ErrorKind::Closed => return Ok(()),
            flushed => flushed,
        };
        let stopped = self.shared.stop(deadline);
        flushed.and(stopped)
    }
}

impl Shared {
    fn stop(&self, deadline: Instant) -> Result<()> {
        let inner = &self.inner;
        if inner.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        inner.operations.cancel_all();
        let threads = self.workers.write().stop();
        inner.leases.close();
        inner.fetches.close();
        inner.residency.notify_room();
        inner.residency.close_pins();
        inner.wear.close();
        inner.requests.close();
        inner.operations.wait_ended(None, deadline)?;
        for thread in threads {
            // Every job has ended and the queues are gone: these end at once. A panic was caught inside.
            let _ = thread.join();
        }
        if let (Some(admission), Some(store)) = (&inner.admission, inner.drive.store())
            && let Err(error) = store.put_note(BUDGET_NOTE, &admission.last_note(inner.drive.write_volume()))
        {
            tracing::debug!(%error, "the ledger of the write budget stays as it was noted last");
        }
        scheduler::keep_learned(inner);
        hot_set::keep(inner);
        inner.drive.close(deadline)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Err(error) = self.stop(Instant::now() + Duration::from_secs(10)) {
            tracing::warn!(%error, "closing the engine");
        }
    }
}

fn store_config(config: &EngineConfig, nvme: &NvmeConfig, arena: &Arc<Arena>) -> StoreConfig {
    StoreConfig {
        path: nvme.path.clone(),
        capacity_bytes: nvme.capacity.0,
        more_drives: nvme
            .more_drives
            .iter()
            .map(|drive| DriveConfig { path: drive.path.clone(), capacity_bytes: drive.capacity.0 })
            .collect(),
        region_bytes: nvme.region_bytes(),
        keeps_region_bytes: nvme.region.is_none(),
        io: match nvme.io_engine {
            IoEngineChoice::Auto => IoChoice::Auto,
            IoEngineChoice::IoUring => IoChoice::IoUring,
            IoEngineChoice::Psync => IoChoice::Psync,
        },
        queue_depth: nvme.queue_depth as usize,
        commit_interval: Duration::from_millis(config.commit_interval_ms),
        commit_bytes: COMMIT_BYTES,
        // DRAM bounds what can be waiting: see the share of dirty bytes in `residency`.
        write_queue_bytes: arena.capacity_bytes(),
        codec: nvme.codec,
        reinsert_percent: nvme.reinsert_percent,
        // Asked for at every open.
        encryption: None,
    }
}

/// How the store is opened, now and whenever it has to be opened again.
fn source(config: &EngineConfig, arena: &Arc<Arena>, deciders: &Deciders) -> Option<Source> {
    let nvme = config.nvme.as_ref()?;
    let (path, policy) = (nvme.path.clone(), policy(nvme, deciders));
    let (nvme, config, arena) = (nvme.clone(), store_config(config, nvme, arena), Arc::clone(arena));
    let open = move || {
        let config = StoreConfig { encryption: nvme.encryption_key()?, ..config.clone() };
        Store::open(config, Arc::clone(&arena), policy())
    };
    Some(Source { path, open: Box::new(open) })
}

/// Makes the policy that a store asks, anew for each store.
fn policy(nvme: &NvmeConfig, (residency, drive): &Deciders) -> impl Fn() -> Arc<CostBenefit> + use<> {
    let regions = nvme.capacity_bytes() / nvme.region_bytes().max(1);
    let (residency, drive) = (Arc::clone(residency), drive.clone());
    move || Arc::new(CostBenefit::new(regions, Some(Arc::clone(&residency)), drive.clone()))
}

/// What the policies had learned when the store was used last. Without it they learn again.
fn restore_learned(store: &Store, residency: &Residency, drive: Option<&DrivePolicy>) {
    match store.note(scheduler::LEARNED_NOTE) {
        Ok(Some(note)) if residency.restore_learned(&note) => {
            if let (Some(drive), Some(of_one)) = (drive, scheduler::first_learned(&note)) {
                drive.restore(&of_one);
            }
            tracing::info!(bytes = note.len(), "the policy goes on with what it had learned");
        }
        Ok(None) => {}
        Ok(Some(note)) => {
            tracing::warn!(
                bytes = note.len(),
                "what the policy had learned is damaged or of another version; it begins anew"
            );
        }
        Err(error) => tracing::warn!(%error, "what the policy had learned can not be read; it begins anew"),
    }
}

/// The way to the drive, with what earlier runs have spent.
fn admission(store: &Store, nvme: &NvmeConfig, choice: PolicyChoice) -> Result<Admission> {
    let note = store.note(BUDGET_NOTE)?;
    let admit: Box<dyn Admit> = match choice {
        PolicyChoice::Pegaflow => Box::new(ByWorth::new()),
        _ => Box::new(SeenBefore::new()),
    };
    Ok(Admission::new(nvme.write_bytes_per_day(), note.as_deref(), admit, Box::new(SystemClock)))
}

fn add_drive(stats: &mut Stats, drive: &DriveTier) {
    let degraded = drive.degraded();
    stats.nvme_poisoned = degraded.is_some();
    stats.nvme_degraded = degraded.map(|degraded| degraded.reason);
    let (totals, reopens, failed_attempts) = drive.totals();
    (stats.nvme_reopens, stats.nvme_failed_reopens) = (reopens, failed_attempts);
    stats.durable_records = totals.appended_records;
    stats.appended_bytes = totals.appended_bytes;
    stats.reinserted_records = totals.reinserted_records;
    stats.reinserted_bytes = totals.reinserted_bytes;
    stats.cut_reinsertions = totals.cut_reinsertions;
    stats.quarantined_records = totals.bad_reads;
    stats.reclaimed_regions = totals.reclaimed_regions;
    stats.reclaimed_records = totals.reclaimed_records;
    stats.scrubbed_bytes = totals.scrubbed_bytes;
    stats.scrub_bad_records = totals.scrub_bad_records;
    stats.scrub_passes = totals.scrub_passes;
    stats.nvme_written_raw_bytes = totals.appended_payload_bytes;
    stats.nvme_written_stored_bytes = totals.appended_stored_bytes;
    stats.nvme_read_raw_bytes = totals.read_bytes;
    stats.nvme_read_stored_bytes = totals.read_stored_bytes;
    stats.codec_encoded_records = totals.encoded_records;
    stats.codec_encode_ns = totals.encode_ns;
    stats.codec_decode_ns = totals.decode_ns;
    (stats.seal_ns, stats.unseal_ns) = (totals.seal_ns, totals.unseal_ns);
    stats.codec_skipped_ratio = totals.codec_skipped_ratio;
    stats.codec_skipped_queue = totals.codec_skipped_queue;
    stats.codec_skipped_speed = totals.codec_skipped_speed;
    let Some(store) = drive.store() else { return };
    let of_store = store.stats();
    stats.nvme_is_direct = of_store.is_direct;
    stats.scrub_last_pass_unix_ms = of_store.scrub_last_pass_unix_ms;
    stats.nvme_capacity_bytes = of_store.capacity_bytes;
    stats.nvme_used_bytes = (of_store.regions - of_store.free_regions) * of_store.region_bytes;
    let index = of_store.index;
    stats.nvme_records = if index.is_full { of_store.records } else { of_store.records.max(index.rows_total) };
    (stats.index_bytes, stats.index_log_bytes) = (of_store.index_bytes, of_store.index_log_bytes);
    (stats.index_full, stats.index_filled_rows, stats.index_rows) = (index.is_full, index.rows, index.rows_total);
    stats.codec_decode_bytes_per_second = of_store.decode_bytes_per_second;
    stats.io_engine = of_store.io_engine.into();
    stats.drive_speeds = store.drive_speeds();
    stats.drive_uses = store.drive_uses();
    stats.nvme_queued_bytes = of_store.queued_bytes;
    let [read, write, sync] = store.drive_latencies();
    let latencies = &mut stats.latencies;
    (latencies.drive_read, latencies.drive_write, latencies.drive_sync) = (read, write, sync);
}

/// The bytes of an object, shared with the cache: no copy. Keeps its place in DRAM as long as it lives.
#[derive(Clone)]
pub struct ObjectBytes {
    slot: Arc<Slot>,
    length: usize,
}

impl ObjectBytes {
    pub(crate) fn new(resident: &Resident) -> Self {
        Self { slot: Arc::clone(&resident.slot), length: resident.payload_bytes as usize }
    }
}

impl std::ops::Deref for ObjectBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.slot.payload().get(..self.length).unwrap_or_default()
    }
}
