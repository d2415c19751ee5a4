//! A KV cache in the engine's own process: the engine's slots are places of its arena, and the device copies them itself.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use super::{BlockCopy, CopyBatch, CopyDirection, DeviceMemory, Fence, KvCache, PlacedCopy};
use crate::block::MemoryLayout;
use crate::dram::{ArenaView, Slot};
use crate::error::{Error, ErrorKind, Result};

/// A device's memory, for an engine in the same process.
pub struct LocalKvCache {
    memory: Arc<dyn DeviceMemory>,
    arena: Arc<ArenaView>,
    after: Option<Fence>,
    cancelled: Arc<AtomicBool>,
}

impl LocalKvCache {
    /// The memory with the view of the engine's arena. All copies wait for `after`.
    pub fn new(memory: Arc<dyn DeviceMemory>, arena: Arc<ArenaView>, after: Option<Fence>) -> Self {
        Self { memory, arena, after, cancelled: Arc::default() }
    }
}

struct Running {
    ended: Receiver<Result<()>>,
    /// The places that are copied are theirs.
    _slots: Vec<Arc<Slot>>,
}

impl CopyBatch for Running {
    fn wait(&mut self, deadline: Instant) -> Result<()> {
        match self.ended.recv_deadline(deadline) {
            Ok(ended) => ended,
            Err(RecvTimeoutError::Timeout) => Err(Error::new(ErrorKind::Timeout, "copies are still running")),
            Err(RecvTimeoutError::Disconnected) => Err(Error::new(ErrorKind::Io, "the device dropped a copy")),
        }
    }
}

impl KvCache for LocalKvCache {
    fn layout(&self) -> &MemoryLayout {
        self.memory.layout()
    }

    fn copy(self: Arc<Self>, direction: CopyDirection, copies: Vec<BlockCopy>) -> Result<Box<dyn CopyBatch>> {
        let (done, ended) = bounded(1);
        let copy = PlacedCopy {
            arena: Arc::clone(&self.arena),
            direction,
            blocks: copies.iter().map(|copy| (copy.block, copy.slot.place())).collect(),
            after: self.after.clone(),
            cancelled: Arc::clone(&self.cancelled),
            done: Box::new(move |result| drop(done.try_send(result))),
        };
        copy.check(self.memory.layout())?;
        Arc::clone(&self.memory).start(copy);
        Ok(Box::new(Running { ended, _slots: copies.into_iter().map(|copy| copy.slot).collect() }))
    }
}
