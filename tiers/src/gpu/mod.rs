//! The device that holds the engine's KV cache, seen from here: memories that were registered, and copies of
//! whole blocks between them and arena slots. Two backends: host memory (vLLM on CPU, all tests) and CUDA.
//! A device never decides which blocks move, and never touches a slot before or after a copy.

mod host;

use std::sync::Arc;
use std::time::Instant;

pub use host::{HostDevice, HostMemory, RangeFragment};

use crate::block::MemoryLayout;
use crate::dram::Slot;
use crate::error::Result;

/// A memory that a device can copy blocks from and to. Dropping the last handle unmaps it, so whoever has a copy
/// in flight holds one.
pub trait DeviceMemory: Send + Sync {
    /// Where the blocks lie in it.
    fn layout(&self) -> &MemoryLayout;

    /// The memory itself if it is host memory.
    fn as_host(&self) -> Option<&HostMemory> {
        None
    }
}

/// Which way a copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CopyDirection {
    /// Out of the device into slots: a save.
    ToSlots,
    /// Out of slots into the device: a load.
    ToDevice,
}

/// One block to copy: its number in the device's memory, and the slot.
///
/// For [`CopyDirection::ToSlots`] the slot must not be shared with anybody else yet.
#[derive(Debug)]
pub struct BlockCopy {
    /// The block's number in the memory's layout.
    pub block: u32,
    /// The slot; its payload holds the fragments one after the other.
    pub slot: Arc<Slot>,
}

/// Copies in flight. The holder of a batch holds its memory and slots: fencing means waiting for this.
pub trait CopyBatch: Send {
    /// Waits until every copy has ended, well or not; then the memory and the slots may be reused.
    ///
    /// # Errors
    /// `Timeout` if copies are still running at `deadline`: then nothing of the batch may be reused yet. Other kinds
    /// mean that the copies have ended but the bytes are not to be trusted.
    fn wait(&mut self, deadline: Instant) -> Result<()>;
}

/// A backend that copies blocks.
pub trait Device: Send + Sync {
    /// Its name in logs and metrics: `host` or `cuda`.
    fn name(&self) -> &'static str;

    /// Starts copying `copies` in `direction`; whole blocks, every fragment.
    ///
    /// # Errors
    /// `InvalidInput` if a block is outside the layout or a slot is too small; nothing was started then.
    fn copy(
        &self,
        memory: &Arc<dyn DeviceMemory>,
        direction: CopyDirection,
        copies: Vec<BlockCopy>,
    ) -> Result<Box<dyn CopyBatch>>;
}
