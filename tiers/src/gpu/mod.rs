//! The device that holds an engine's KV cache: its memory, and copies of whole blocks between it and places in an arena.
//! Two backends: host memory (vLLM on CPU, all tests) and CUDA. Copies run in the process of the worker, whose memory it
//! is; the engine only sees a [`KvCache`], which may be that of another process.
//! A device never decides which blocks move, and never touches a slot before or after a copy.

mod cuda;
mod host;
mod local;
mod ranges;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

pub use cuda::{CudaMemory, CudaScratch, gpu_count};
pub use host::HostMemory;
pub use local::LocalKvCache;
pub use ranges::RangeFragment;

use crate::block::MemoryLayout;
use crate::dram::{ArenaView, Place, Slot};
use crate::error::{Error, ErrorKind, Result};

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

/// Copies in flight. The holder of a batch holds its slots: fencing means waiting for this.
pub trait CopyBatch: Send {
    /// Waits until every copy has ended, well or not; then the memory and the slots may be reused.
    ///
    /// # Errors
    /// `Timeout` if copies are still running at `deadline`: then nothing of the batch may be reused yet. Other kinds
    /// mean that the copies have ended but the bytes are not to be trusted.
    fn wait(&mut self, deadline: Instant) -> Result<()>;
}

/// A worker's KV cache as the engine sees it: blocks of one size, and somebody who copies them.
pub trait KvCache: Send + Sync {
    /// How many blocks, of how many bytes.
    fn layout(&self) -> &MemoryLayout;

    /// Starts copying `copies` in `direction`; whole blocks.
    ///
    /// # Errors
    /// `InvalidInput` if a block is outside the layout or a slot is too small, `Closed` if the worker is gone; nothing was
    /// started then.
    fn copy(self: Arc<Self>, direction: CopyDirection, copies: Vec<BlockCopy>) -> Result<Box<dyn CopyBatch>>;
}

/// A point in the work of a device that copies wait for: what was queued before it has run.
#[derive(Clone)]
pub struct Fence(pub Arc<dyn Any + Send + Sync>);

/// Called exactly once, when no copy can read or write any more.
pub type CopyDone = Box<dyn FnOnce(Result<()>) + Send>;

/// Blocks to copy between a device and an arena.
pub struct PlacedCopy {
    /// The arena; held until the copies have ended.
    pub arena: Arc<ArenaView>,
    /// Which way.
    pub direction: CopyDirection,
    /// Block of the device, place in the arena.
    pub blocks: Vec<(u32, Place)>,
    /// What has to have run before.
    pub after: Option<Fence>,
    /// Once true, what was not started is not; the copy then ends as `Cancelled`, within milliseconds.
    pub cancelled: Arc<AtomicBool>,
    /// Called at the end, on a thread of the device or on the caller's.
    pub done: CopyDone,
}

impl PlacedCopy {
    /// Checks every block and place, so that no address outside memory and arena is ever formed.
    ///
    /// # Errors
    /// `InvalidInput` with the first that is outside.
    pub fn check(&self, layout: &MemoryLayout) -> Result<()> {
        self.blocks.iter().try_for_each(|(block, place)| {
            if *block >= layout.blocks() {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("block {block} is outside the registered {}; give a lower one", layout.blocks()),
                ));
            }
            self.arena.payload(*place, layout.block_bytes()).map(drop)
        })
    }
}

/// A worker's KV cache on its device. Implementations hold whatever keeps the memory in place.
pub trait DeviceMemory: Send + Sync {
    /// The device in logs and metrics: `host` or `cuda`.
    fn device(&self) -> &'static str;

    /// Where the blocks lie in it.
    fn layout(&self) -> &MemoryLayout;

    /// Makes an arena reachable for the device, in the background where that takes long: copies of an arena that is not
    /// attached wait for it. May be repeated; each is undone by one `detach`.
    ///
    /// # Errors
    /// Those of the device.
    fn attach(&self, _arena: &Arc<ArenaView>) -> Result<()> {
        Ok(())
    }

    /// Whether all of the arena can be reached by now.
    ///
    /// # Errors
    /// Why it never will.
    fn is_attached(&self, _arena: &ArenaView) -> Result<bool> {
        Ok(true)
    }

    /// Undoes one `attach` once the copies in flight have ended; returns at once.
    fn detach(&self, _arena: &ArenaView) {}

    /// A fence behind everything queued on the device's stream `stream` (for CUDA a `CUstream`); `None` where work is never
    /// queued.
    ///
    /// # Errors
    /// Those of the device.
    fn fence(&self, _stream: u64) -> Result<Option<Fence>> {
        Ok(None)
    }

    /// Starts a copy; never waits for the device. Host memory copies before it returns.
    fn start(self: Arc<Self>, copy: PlacedCopy);

    /// Starts a load so that whatever is queued on `stream` from now on runs after it, and it after what is queued there
    /// already. The host does not wait.
    ///
    /// # Errors
    /// If it cannot be started; `done` is not called then, and nothing was copied.
    fn load_before(self: Arc<Self>, copy: PlacedCopy, stream: u64) -> Result<()>;
}
