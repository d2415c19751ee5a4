//! Saves: blocks out of a device into DRAM, visible at once, then to the store. A save never waits for room: what does
//! not fit is dropped and counted, and its descendants with it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use pegaflow_tiers::{BlockCopy, BlockKey, CopyDirection, Error, ErrorKind, RecordId, RecordKind, Result, Slot};

use crate::api::{BlockSave, SaveOutcome, SaveRequest};
use crate::inner::{Inner, wait_copies};
use crate::operations::Operation;
use crate::registry::InstanceView;
use crate::residency::Resident;
use crate::spill::{spill, spill_for_sure};
use crate::tenants;

/// How much is copied out of the device in one batch.
const BATCH_BYTES: u64 = 128 << 20;

/// What the client is told at the end.
pub(crate) type SaveDone = Box<dyn FnOnce(SaveOutcome) + Send>;

/// A save in the queue.
pub(crate) struct SaveJob {
    inner: Arc<Inner>,
    request: SaveRequest,
    view: InstanceView,
    operation: Arc<Operation>,
    /// How many blocks were asked for; what is neither saved nor present at the end was dropped.
    asked: u32,
    outcome: SaveOutcome,
    dropped: Dropped,
    queued: Instant,
    done: Option<SaveDone>,
}

/// Blocks that were not saved, by the reason; what is in none of them was cancelled.
#[derive(Default)]
struct Dropped {
    orphans: u32,
    no_room: u32,
    not_copied: u32,
    is_refused: bool,
}

struct Prepared {
    block: BlockSave,
    slot: Arc<Slot>,
}

impl SaveJob {
    /// Checks a request against instance and memory.
    ///
    /// # Errors
    /// `NotFound`, `InvalidInput`, `GeometryMismatch`.
    pub(crate) fn new(inner: &Arc<Inner>, request: SaveRequest, done: SaveDone) -> Result<Self> {
        let view = inner.registry.view(&request.target.instance, request.target.group)?;
        let layout = request.memory.layout();
        if layout.block_bytes() != view.geometry.block_bytes {
            return Err(Error::new(
                ErrorKind::GeometryMismatch,
                format!(
                    "the memory has blocks of {} bytes, the instance of {}",
                    layout.block_bytes(),
                    view.geometry.block_bytes
                ),
            ));
        }
        if request.target.shard >= view.geometry.shards {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("shard {} is not below {}", request.target.shard, view.geometry.shards),
            ));
        }
        if let Some(outside) = request.blocks.iter().find(|block| block.block >= layout.blocks()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("block {} is not below the memory's {}", outside.block, layout.blocks()),
            ));
        }
        let operation = inner.operations.start(request.session, request.operation, true);
        let asked = request.blocks.len() as u32;
        let outcome = SaveOutcome::default();
        Ok(Self {
            inner: Arc::clone(inner),
            request,
            view,
            operation,
            asked,
            outcome,
            dropped: Dropped::default(),
            queued: Instant::now(),
            done: Some(done),
        })
    }

    /// Does it, on a save thread.
    pub(crate) fn run(self) {
        let span = tracing::info_span!(
            "save",
            instance = %self.request.target.instance,
            session = self.request.session.0,
            operation = self.request.operation.0,
            shard = self.request.target.shard,
        );
        span.in_scope(move || self.run_in_span());
    }

    fn run_in_span(mut self) {
        if let Some(tenant) = &self.request.target.tenant {
            let identity = &self.view.identity;
            let (drive, own_max) = (&self.inner.drive, tenants::OWN_MAX);
            match tenants::existing_or_new(drive, &identity.descriptor, &identity.groups, tenant, own_max) {
                Ok(namespace) => self.view.namespace = namespace,
                Err(error) => {
                    tracing::warn!(%tenant, %error, "nothing is saved: the tenant gets no namespace");
                    self.dropped.is_refused = true;
                    return;
                }
            }
        }
        self.inner.namespace_uses.note(self.view.namespace, 0, 0);
        let blocks = std::mem::take(&mut self.request.blocks);
        let per_batch = (BATCH_BYTES / self.view.geometry.block_bytes).max(1) as usize;
        // Blocks that this save has room for but that are not visible yet: good enough as ancestors of the next ones.
        let mut on_their_way = HashSet::new();
        let mut batch: Vec<Prepared> = Vec::new();
        for block in &blocks {
            if self.operation.is_cancelled() || self.inner.is_closed() {
                break;
            }
            batch.extend(self.prepare(*block, &mut on_their_way));
            if batch.len() >= per_batch {
                self.copy(std::mem::take(&mut batch));
            }
        }
        self.copy(batch);
        let ids: Vec<_> = blocks.iter().map(|block| self.id(block.key)).collect();
        let slot_bytes = pegaflow_tiers::Arena::slot_bytes(self.view.geometry.block_bytes as usize);
        self.inner.residency.touch_chain(ids.iter().map(|id| (id, slot_bytes)));
    }

    fn id(&self, key: BlockKey) -> RecordId {
        RecordId {
            namespace: self.view.namespace,
            group: self.request.target.group,
            shard: self.request.target.shard,
            key,
        }
    }

    /// A slot for a block that is worth saving; counts it otherwise.
    fn prepare(&mut self, block: BlockSave, on_their_way: &mut HashSet<BlockKey>) -> Option<Prepared> {
        if self.inner.is_present(&self.id(block.key)) {
            if self.view.keeps_all {
                self.keep(&self.id(block.key));
            }
            self.outcome.present += 1;
            return None;
        }
        let has_ancestor = block.parent.is_root()
            || on_their_way.contains(&block.parent)
            || self.inner.is_present(&self.id(block.parent));
        if !has_ancestor {
            self.dropped.orphans += 1;
            return None;
        }
        let bytes = self.view.geometry.block_bytes as usize;
        let Some(mut slot) = self.inner.residency.alloc_dirty(bytes) else {
            self.dropped.no_room += 1;
            return None;
        };
        // What an earlier block left behind the end must not reach the drive under this one's name.
        if let Some(padding) = slot.payload_mut().get_mut(bytes..) {
            padding.fill(0);
        }
        on_their_way.insert(block.key);
        Some(Prepared { block, slot: Arc::new(slot) })
    }

    /// A block that lies in DRAM only, because it was refused by admission, goes to the drive after all.
    fn keep(&self, id: &RecordId) {
        if let Some(block) = self.inner.residency.get(id).filter(|block| block.take_refused()) {
            self.inner.residency.mark_dirty(&block);
            spill_for_sure(&self.inner, &block);
        }
    }

    /// Copies a batch and makes it visible.
    fn copy(&mut self, batch: Vec<Prepared>) {
        if batch.is_empty() {
            return;
        }
        let batch_blocks = batch.len() as u32;
        let copies = batch.iter().map(|p| BlockCopy { block: p.block.block, slot: Arc::clone(&p.slot) }).collect();
        let block_bytes = self.view.geometry.block_bytes;
        let copied = tracing::debug_span!("copy", blocks = batch.len(), block_bytes).in_scope(|| {
            let mut running = Arc::clone(&self.request.memory).copy(CopyDirection::ToSlots, copies)?;
            wait_copies(running.as_mut())
        });
        if let Err(error) = copied {
            tracing::warn!(%error, blocks = batch.len(), "copying blocks out of the device failed; they are not saved");
            self.dropped.not_copied += batch_blocks;
            return;
        }
        let has_store = self.inner.drive.is_configured();
        for Prepared { block, slot } in batch {
            let bytes = self.view.geometry.block_bytes;
            let fresh = Resident::new(self.id(block.key), (block.parent, block.depth), slot, bytes, has_store);
            let visible = self.inner.residency.insert(Arc::clone(&fresh), false);
            if Arc::ptr_eq(&visible, &fresh) {
                self.outcome.saved += 1;
                drop(visible);
                if self.view.keeps_all {
                    spill_for_sure(&self.inner, &fresh);
                } else {
                    spill(&self.inner, &fresh, RecordKind::Kv);
                }
            } else {
                self.outcome.present += 1;
            }
        }
    }
}

impl Drop for SaveJob {
    /// Also when a thread panicked or the engine closed: the client is told exactly once.
    fn drop(&mut self) {
        self.outcome.dropped = self.asked - self.outcome.saved - self.outcome.present;
        let counters = &self.inner.counters;
        counters.saved_blocks.add(self.outcome.saved.into());
        counters.save_present_blocks.add(self.outcome.present.into());
        counters.saved_bytes.add(u64::from(self.outcome.saved) * self.view.geometry.block_bytes);
        let Dropped { orphans, no_room, not_copied, is_refused } = self.dropped;
        counters.save_dropped_blocks.add(u64::from(self.outcome.dropped - orphans));
        counters.save_orphan_blocks.add(orphans.into());
        counters.save_dropped_room.add(no_room.into());
        counters.save_dropped_copy.add(not_copied.into());
        let rest = u64::from(self.outcome.dropped.saturating_sub(orphans + no_room + not_copied));
        match is_refused {
            true => counters.save_dropped_queue.add(rest),
            false => {
                counters.save_dropped_cancelled.add(rest);
                let took = self.queued.elapsed();
                counters.times.save.record(took);
                let SaveOutcome { saved, present, dropped } = self.outcome;
                tracing::debug!(saved, present, dropped, took_ms = took.as_secs_f64() * 1e3, "save ended");
            }
        }
        self.inner.operations.end(&self.operation);
        if let Some(done) = self.done.take() {
            done(self.outcome);
        }
    }
}

impl SaveJob {
    /// Takes the callback back, for a job that could not be queued.
    pub(crate) fn forget(mut self) {
        self.dropped.is_refused = true;
        self.done = None;
    }
}
