//! Loads: leased blocks into a device. Blocks on the drive are read with a deep queue while blocks in DRAM are copied;
//! each is checked before it can reach the device. Nothing is reported before the last copy has ended, and what has not
//! arrived by then has failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use pegaflow_tiers::{
    Arena, BlockCopy, CopyDirection, Error, ErrorKind, IoPriority, Location, RecordId, Result, Slot, Verified,
};

use crate::api::{InstanceId, LoadOutcome, LoadRequest};
use crate::inner::{Inner, wait_copies};
use crate::lease::{Hit, ShardLease};
use crate::load_choice::QueuedReads;
use crate::operations::Operation;
use crate::residency::Resident;
use crate::spill::offer_again;

/// How many reads of one load are in flight at the most.
const READS_MAX: usize = 64;
/// How many bytes of reads of one load are in flight at the most (but always one read).
const READ_BYTES_MAX: usize = 128 << 20;
/// How much is copied to the device in one batch.
const BATCH_BYTES: u64 = 256 << 20;
/// How long a load waits for a slot before it gives a block up.
const SLOT_PATIENCE: Duration = Duration::from_secs(2);

/// What the client is told at the end.
pub(crate) type LoadDone = Box<dyn FnOnce(LoadOutcome) + Send>;

/// A load in the queue.
pub(crate) struct LoadJob {
    inner: Arc<Inner>,
    request: LoadRequest,
    lease: ShardLease,
    block_bytes: u64,
    operation: Arc<Operation>,
    queued: QueuedReads,
    /// By position in the request: whether the block is in the device.
    arrived: Vec<bool>,
    outcome: LoadOutcome,
    /// Whether a block that the lookup found on the drive was in DRAM: then the time that the load took says nothing of
    /// what was predicted.
    is_ahead: bool,
    /// When it was queued; `None` for a job that could not be.
    queued_at: Option<Instant>,
    instance: InstanceId,
    done: Option<LoadDone>,
}

/// A block of the load by its position in the request, and its record on the drive.
type OnDrive = (usize, RecordId, Location);

struct ReadEnd {
    position: usize,
    id: RecordId,
    slot: Arc<Slot>,
    result: Result<Verified>,
}

impl LoadJob {
    /// Checks a request against lease and memory, and consumes the lease.
    ///
    /// # Errors
    /// `NotFound` for a lease that is over, `InvalidInput`.
    pub(crate) fn new(inner: &Arc<Inner>, request: LoadRequest, done: LoadDone) -> Result<Self> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        let layout = request.memory.layout();
        if let Some(outside) = request.blocks.iter().find(|block| block.block >= layout.blocks()) {
            return bad(format!("block {} is not below the memory's {}", outside.block, layout.blocks()));
        }
        let (instance, lease) = inner.leases.consume(request.lease, request.shard)?;
        if let Some(outside) = request.blocks.iter().find(|block| block.index as usize >= lease.hits.len()) {
            return bad(format!("index {} is not below the lease's {} blocks", outside.index, lease.hits.len()));
        }
        inner.requests.push_served(lease.asker, &lease.hits);
        // What is left to fetch for it is read by the load.
        inner.fetches.cancel(lease.asker.0, lease.asker.1);
        let block_bytes = layout.block_bytes();
        if let Some(watch) = &lease.watch {
            watch.began();
        }
        let hits = request.blocks.iter().filter_map(|block| lease.hits.get(block.index as usize));
        let sizes: Vec<u64> = hits.filter_map(Hit::location).map(|location| location.bytes()).collect();
        let queued = QueuedReads::new(&inner.load_choice, sizes.iter().sum(), sizes.len() as u64);
        let operation = inner.operations.start(request.session, request.operation, false);
        let arrived = vec![false; request.blocks.len()];
        let outcome = LoadOutcome::default();
        Ok(Self {
            inner: Arc::clone(inner),
            request,
            lease,
            block_bytes,
            operation,
            queued,
            arrived,
            outcome,
            is_ahead: false,
            queued_at: Some(Instant::now()),
            instance,
            done: Some(done),
        })
    }

    /// Does it, on a load thread.
    pub(crate) fn run(self) {
        let span = tracing::info_span!(
            "load",
            instance = %self.instance,
            session = self.request.session.0,
            operation = self.request.operation.0,
            shard = self.request.shard,
            decision = self.lease.watch.as_ref().map_or(0, |watch| watch.decision()),
        );
        span.in_scope(move || self.run_in_span());
    }

    fn run_in_span(mut self) {
        let deadline = Instant::now() + self.inner.config.load_timeout();
        let hits = std::mem::take(&mut self.lease.hits);
        let mut in_dram = Vec::new();
        let mut on_drive: Vec<OnDrive> = Vec::new();
        let mut used = Vec::with_capacity(self.request.blocks.len());
        for (position, block) in self.request.blocks.iter().enumerate() {
            match hits.get(block.index as usize) {
                Some(Hit::Dram(resident)) => in_dram.push((position, Arc::clone(resident))),
                // Somebody else may have read it since the lookup.
                Some(Hit::Nvme(id, location)) => match self.inner.residency.get(id) {
                    Some(resident) => {
                        self.is_ahead = true;
                        in_dram.push((position, resident));
                    }
                    None => on_drive.push((position, *id, *location)),
                },
                None => continue,
            }
            used.extend(hits.get(block.index as usize).map(Hit::id));
        }
        drop(hits);
        if !on_drive.is_empty() {
            // What is being fetched comes last: it may be in DRAM by then.
            let fetching = self.inner.fetches.reading();
            on_drive.sort_by_key(|(_, id, _)| fetching.contains(id));
        }
        let window = READS_MAX.min(READ_BYTES_MAX / self.block_bytes.max(1) as usize).max(1);
        let (sender, receiver) = bounded(window);
        let mut waiting = on_drive.into_iter();
        let mut running = self.start_reads(&mut waiting, window, &sender, deadline);
        self.load_resident(&in_dram);
        drop(in_dram);
        while running > 0 {
            let ended = self.finish_reads(&receiver, deadline);
            if ended == 0 {
                // The drive does not answer. Its reads own their slots and touch nothing of the device.
                tracing::warn!(running, "reads did not end in time; their blocks are recomputed");
                break;
            }
            running = running - ended + self.start_reads(&mut waiting, window - (running - ended), &sender, deadline);
        }
        let slot_bytes = Arena::slot_bytes(self.block_bytes as usize);
        self.inner.residency.touch_chain(used.iter().map(|id| (id, slot_bytes)));
    }

    /// Copies blocks that were in DRAM.
    fn load_resident(&mut self, blocks: &[(usize, Arc<Resident>)]) {
        let residents = || blocks.iter().map(|(_, resident)| resident);
        // What is read counts by itself.
        self.inner.note_uses(residents().map(|resident| resident.id));
        self.inner.residency.note_loaded(residents());
        offer_again(&self.inner, residents());
        self.outcome.loaded_dram += self.copy(blocks);
    }

    /// Starts up to `free` reads; returns how many were started. What has come to DRAM meanwhile is copied instead.
    fn start_reads(
        &mut self,
        waiting: &mut impl Iterator<Item = OnDrive>,
        free: usize,
        sender: &Sender<ReadEnd>,
        deadline: Instant,
    ) -> usize {
        let (mut started, mut came) = (0, Vec::new());
        while started < free && !self.is_stopped() {
            let Some((position, id, location)) = waiting.next() else { break };
            if let Some(resident) = self.inner.residency.get(&id) {
                came.push((position, resident));
                self.is_ahead = true;
                self.queued.not_needed(1);
                continue;
            }
            match self.start_read(position, id, location, sender, deadline) {
                Ok(()) => started += 1,
                Err(error) => tracing::debug!(%error, "a block could not be read"),
            }
        }
        if !came.is_empty() {
            self.load_resident(&came);
        }
        started
    }

    fn start_read(
        &self,
        position: usize,
        id: RecordId,
        location: Location,
        sender: &Sender<ReadEnd>,
        deadline: Instant,
    ) -> Result<()> {
        // The store that the location is of, and no other.
        let store = self.lease.pinned.as_ref().and_then(|pinned| pinned.store());
        let store = store.ok_or_else(|| Error::new(ErrorKind::Closed, "the store of the block is out of use"))?;
        let patience = deadline.min(Instant::now() + SLOT_PATIENCE);
        let slot = self.inner.residency.alloc_until(self.block_bytes as usize, false, patience);
        let slot = Arc::new(slot.ok_or_else(|| Error::new(ErrorKind::Busy, "all of DRAM is in use"))?);
        let (sender, kept) = (sender.clone(), Arc::clone(&slot));
        let done = Box::new(move |result| {
            // The channel holds as many as there are reads in flight; a receiver that has gone needs no answer.
            let _ = sender.try_send(ReadEnd { position, id, slot: kept, result });
        });
        store.read(id, location, slot, IoPriority::Demand, done)
    }

    /// Waits for at least one read to end; what came well goes to DRAM and to the device. Returns how many ended, 0 at
    /// the deadline.
    fn finish_reads(&mut self, receiver: &Receiver<ReadEnd>, deadline: Instant) -> usize {
        let span = tracing::debug_span!("read", blocks = tracing::field::Empty);
        let waited = span.in_scope(|| receiver.recv_deadline(deadline));
        let Ok(first) = waited else { return 0 };
        let ends: Vec<ReadEnd> = std::iter::once(first).chain(receiver.try_iter()).collect();
        let ended = ends.len();
        span.record("blocks", ended);
        drop(span);
        self.queued.ended(ended);
        let mut good = Vec::new();
        for ReadEnd { position, id, slot, result } in ends {
            match result {
                Ok(verified) if verified.payload_bytes == self.block_bytes => {
                    let block =
                        Resident::new(id, (verified.parent, verified.depth), slot, verified.payload_bytes, false);
                    good.push((position, self.inner.residency.insert(block, false)));
                }
                Ok(verified) => {
                    tracing::warn!(bytes = verified.payload_bytes, "a record of another size; it is not loaded")
                }
                Err(error) => tracing::debug!(%error, "a block did not come back from the drive"),
            }
        }
        self.outcome.loaded_nvme += self.copy(&good);
        ended
    }

    /// Copies blocks to the device; returns how many arrived.
    fn copy(&mut self, blocks: &[(usize, Arc<Resident>)]) -> u32 {
        let per_batch = (BATCH_BYTES / self.block_bytes.max(1)).max(1) as usize;
        let mut arrived = 0;
        for batch in blocks.chunks(per_batch) {
            if self.is_stopped() || batch.iter().any(|(_, resident)| resident.payload_bytes != self.block_bytes) {
                continue;
            }
            match self.copy_batch(batch) {
                Ok(()) => {
                    batch
                        .iter()
                        .filter_map(|(position, _)| self.arrived.get_mut(*position).map(|flag| *flag = true))
                        .for_each(drop);
                    arrived += batch.len() as u32;
                }
                Err(error) => {
                    tracing::warn!(%error, blocks = batch.len(), "copying blocks to the device failed; they are recomputed")
                }
            }
        }
        arrived
    }

    fn copy_batch(&self, batch: &[(usize, Arc<Resident>)]) -> Result<()> {
        let to = |position: usize| self.request.blocks.get(position).map(|block| block.block);
        let copies = batch
            .iter()
            .filter_map(|(position, resident)| {
                to(*position).map(|block| BlockCopy { block, slot: Arc::clone(&resident.slot) })
            })
            .collect();
        let _span = tracing::debug_span!("copy", blocks = batch.len(), block_bytes = self.block_bytes).entered();
        let mut running = Arc::clone(&self.request.memory).copy(CopyDirection::ToDevice, copies)?;
        wait_copies(running.as_mut())
    }

    fn is_stopped(&self) -> bool {
        self.operation.is_cancelled() || self.inner.is_closed()
    }

    /// Takes the callback back, for a job that could not be queued.
    pub(crate) fn forget(mut self) {
        (self.done, self.queued_at) = (None, None);
    }
}

impl Drop for LoadJob {
    /// Also when a thread panicked or the engine closed: the client is told exactly once, and all that did not arrive
    /// has failed.
    fn drop(&mut self) {
        let missing = self.request.blocks.iter().zip(&self.arrived).filter(|(_, arrived)| !**arrived);
        self.outcome.failed = missing.map(|(block, _)| block.block).collect();
        let counters = &self.inner.counters;
        counters.loaded_dram_blocks.add(self.outcome.loaded_dram.into());
        counters.loaded_nvme_blocks.add(self.outcome.loaded_nvme.into());
        counters.loaded_dram_bytes.add(u64::from(self.outcome.loaded_dram) * self.block_bytes);
        counters.loaded_nvme_bytes.add(u64::from(self.outcome.loaded_nvme) * self.block_bytes);
        counters.load_failed_blocks.add(self.outcome.failed.len() as u64);
        if let Some(queued_at) = self.queued_at {
            let times = &counters.times;
            let of_tier = if self.outcome.loaded_nvme > 0 { &times.load_nvme } else { &times.load_dram };
            let took = queued_at.elapsed();
            of_tier.record(took);
            tracing::debug!(
                dram_blocks = self.outcome.loaded_dram,
                nvme_blocks = self.outcome.loaded_nvme,
                failed_blocks = self.outcome.failed.len(),
                took_ms = took.as_secs_f64() * 1e3,
                "load ended"
            );
        }
        if let Some(watch) = self.lease.watch.take() {
            let loaded = self.arrived.iter().filter(|arrived| **arrived).count();
            watch.shard_ended(if self.outcome.failed.is_empty() && !self.is_ahead { loaded } else { 0 });
        }
        self.lease.hits.clear();
        self.lease.pinned = None;
        self.inner.residency.notify_room();
        self.inner.operations.end(&self.operation);
        if let Some(done) = self.done.take() {
            done(std::mem::take(&mut self.outcome));
        }
    }
}
