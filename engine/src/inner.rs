//! What the threads of an engine share, and the threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;
use pegaflow_tiers::{Arena, CopyBatch, Error, ErrorKind, RecordId, Result};

use crate::admission::Admission;
use crate::api::SessionId;
use crate::config::EngineConfig;
use crate::counters::Counters;
use crate::drive_tier::DriveTier;
use crate::fetch::Fetches;
use crate::hot_set::{WarmRuns, WarmStart};
use crate::lease::Leases;
use crate::load::LoadJob;
use crate::load_choice::LoadChoice;
use crate::namespace_uses::NamespaceUses;
use crate::operations::Operations;
use crate::registry::Registry;
use crate::residency::Residency;
use crate::save::SaveJob;
use crate::scheduler::{DrivePolicy, LiveCurve, Requests};
use crate::scrub::Scrubs;
use crate::wear::Wear;
use crate::{hot_set, scheduler, scrub, spares, store_keeper};

/// How long a thread waits for copies before another takes its place.
const SPARE_PATIENCE: Duration = Duration::from_secs(1);
/// How long one wait for copies lasts before the log says that it goes on.
const COPY_PATIENCE: Duration = Duration::from_secs(10);

/// The shared state. Locks inside are never held across I/O or callbacks, and never two at a time but for
/// `object_order` and `purging`, which come first, and the three of the residency.
pub(crate) struct Inner {
    pub(crate) config: EngineConfig,
    pub(crate) arena: Arc<Arena>,
    pub(crate) residency: Arc<Residency>,
    /// What was asked for, on its way to the policies of the residency.
    pub(crate) requests: Requests,
    /// The store, if there is one at the moment.
    pub(crate) drive: Arc<DriveTier>,
    /// Which blocks go to the store, if there is one.
    pub(crate) admission: Option<Admission>,
    /// What tiers of other sizes would serve.
    pub(crate) curve: LiveCurve,
    /// What a place on the drive is worth, if the policy can tell.
    pub(crate) drive_policy: Option<Arc<DrivePolicy>>,
    pub(crate) wear: Arc<Wear>,
    pub(crate) leases: Leases,
    /// Whether what is found is loaded.
    pub(crate) load_choice: Arc<LoadChoice>,
    /// Bytes a second that are scrubbed; 0: none.
    pub(crate) scrub_rate: Arc<AtomicU64>,
    /// Scrubs that somebody asks for.
    pub(crate) scrubs: Scrubs,
    /// What is read beside everything else.
    pub(crate) fetches: Fetches,
    /// The hot set of the run before, on its way back.
    pub(crate) warm_start: WarmStart,
    /// Namespaces that somebody wants in DRAM.
    pub(crate) warm_runs: WarmRuns,
    pub(crate) operations: Operations,
    pub(crate) registry: Registry,
    pub(crate) counters: Counters,
    pub(crate) object_order: Mutex<()>,
    /// What was asked of each namespace.
    pub(crate) namespace_uses: NamespaceUses,
    /// Held by whoever purges, through all of it: nobody else takes it, and lookups never wait for it.
    pub(crate) purging: Mutex<()>,
    pub(crate) recovered_records: u64,
    pub(crate) is_closed: AtomicBool,
}

impl Inner {
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Whether a record is in DRAM or in the store.
    pub(crate) fn is_present(&self, id: &RecordId) -> bool {
        self.residency.contains(id) || self.drive.store().is_some_and(|store| store.locate(id).is_some())
    }

    /// Counts a use of blocks that were found in DRAM, for the store's own decisions.
    pub(crate) fn note_uses(&self, ids: impl IntoIterator<Item = RecordId>) {
        if let Some(store) = self.drive.store() {
            store.note_uses(ids);
        }
    }

    /// Bytes of payloads that fit into the store, as blocks are compressed; 0 without a store.
    pub(crate) fn store_payload_bytes(&self) -> u64 {
        let (totals, ..) = self.drive.totals();
        let (raw, stored) = (totals.appended_payload_bytes as f64, totals.appended_stored_bytes as f64);
        let ratio = if stored > 0.0 { (raw / stored).max(1.0) } else { 1.0 };
        self.config.nvme.as_ref().map_or(0, |nvme| (nvme.capacity_bytes() as f64 * ratio) as u64)
    }

    pub(crate) fn object_bytes_max(&self) -> u64 {
        let region = self.config.nvme.as_ref().map_or(u64::MAX, |nvme| nvme.region_bytes() / 2);
        region.min(self.arena.capacity_bytes() / 4)
    }
}

/// Waits until copies have ended. Memory that a copy may still write is never given back, so this has no deadline of
/// its own: it says in the log that it goes on waiting. A worker that is stopped must not stop the others: the thread is
/// replaced meanwhile.
pub(crate) fn wait_copies(running: &mut dyn CopyBatch) -> Result<()> {
    match running.wait(Instant::now() + SPARE_PATIENCE) {
        Err(error) if error.kind() == ErrorKind::Timeout => {}
        ended => return ended,
    }
    let _spare = spares::replace_this_thread();
    loop {
        match running.wait(Instant::now() + COPY_PATIENCE) {
            Err(error) if error.kind() == ErrorKind::Timeout => {
                tracing::warn!(%error, "copies have not ended; waiting on")
            }
            ended => return ended,
        }
    }
}

/// The engine's threads and their queues.
pub(crate) struct Workers {
    loads: Option<Sender<LoadJob>>,
    saves: Vec<Sender<SaveJob>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(crate) fn start(inner: &Arc<Inner>) -> Result<Self> {
        let bound = inner.config.queue_operations as usize;
        let mut workers = Self { loads: None, saves: Vec::new(), threads: Vec::new() };
        let (loads, load_jobs) = bounded::<LoadJob>(bound);
        let spares = Arc::default();
        for number in 0..inner.config.load_threads {
            let (jobs, spares) = (load_jobs.clone(), Arc::clone(&spares));
            workers.spawn(format!("pega-load-{number}"), move || spares::serve(jobs, LoadJob::run, spares))?;
        }
        workers.loads = Some(loads);
        for number in 0..inner.config.save_threads {
            let (saves, jobs) = bounded::<SaveJob>(bound.div_ceil(inner.config.save_threads as usize));
            let spares = Arc::clone(&spares);
            workers.spawn(format!("pega-save-{number}"), move || spares::serve(jobs, SaveJob::run, spares))?;
            workers.saves.push(saves);
        }
        let keeper = Arc::clone(inner);
        workers.spawn("pega-leases".into(), move || keeper.leases.keep_time(|| keeper.residency.notify_room()))?;
        let keeper = Arc::clone(inner);
        workers.spawn("pega-pins".into(), move || keeper.residency.keep_pins())?;
        let scheduler = Arc::clone(inner);
        workers.spawn("pega-policy".into(), move || scheduler::run(&scheduler))?;
        if inner.drive.is_configured() {
            let fetcher = Arc::clone(inner);
            workers.spawn("pega-fetch".into(), move || fetcher.fetches.serve(&fetcher))?;
            let keeper = Arc::clone(inner);
            inner.drive.start_helper("pega-store", move || store_keeper::keep(&keeper))?;
            if inner.warm_start.is_on() {
                let warmer = Arc::clone(inner);
                inner.drive.start_helper("pega-warm", move || hot_set::warm(&warmer))?;
            }
            let scrubber = Arc::clone(inner);
            inner.drive.start_helper("pega-scrub", move || scrub::scrub(&scrubber))?;
        }
        if let Some(nvme) = inner.config.nvme.as_ref().filter(|nvme| nvme.health_interval_s > 0) {
            let interval = Duration::from_secs(nvme.health_interval_s);
            workers.threads.extend(inner.wear.watch(&nvme.paths(), interval)?);
        }
        Ok(workers)
    }

    fn spawn(&mut self, name: String, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(work)
            .map_err(|source| Error::from_io("starting a thread", source))?;
        self.threads.push(thread);
        Ok(())
    }

    /// # Errors
    /// `Busy` for a full queue, `Closed`. The job's callback is not called then.
    pub(crate) fn load(&self, job: LoadJob) -> Result<()> {
        let queue = self.loads.as_ref().ok_or_else(closed)?;
        queue.try_send(job).map_err(|refused| {
            refused.into_inner().forget();
            busy("loads")
        })
    }

    /// As `load`. The saves of one session stay in order: ancestors come before their descendants.
    pub(crate) fn save(&self, session: SessionId, job: SaveJob) -> Result<()> {
        let index = session.0.checked_rem(self.saves.len() as u64).unwrap_or(0) as usize;
        let queue = self.saves.get(index).ok_or_else(closed)?;
        queue.try_send(job).map_err(|refused| {
            refused.into_inner().forget();
            busy("saves")
        })
    }

    /// Loads and saves that wait for a thread.
    pub(crate) fn waiting(&self) -> (u64, u64) {
        let saves: usize = self.saves.iter().map(Sender::len).sum();
        (self.loads.as_ref().map_or(0, Sender::len) as u64, saves as u64)
    }

    /// Lets the threads end; those of them.
    pub(crate) fn stop(&mut self) -> Vec<JoinHandle<()>> {
        self.loads = None;
        self.saves.clear();
        std::mem::take(&mut self.threads)
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the engine is closed")
}

fn busy(what: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("the queue of {what} is full; nothing was queued"))
}
