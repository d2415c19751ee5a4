//! The one seam through which bytes reach a drive. Engines (io_uring, pread/pwrite) and wrappers (faults) stand
//! behind [`BlockIo`]. A request owns its buffer until its completion runs: dropping whoever asked for it never
//! frees memory that the kernel may still write.
#![expect(clippy::result_large_err, reason = "a refused request comes back whole to its caller")]

mod blocking;
mod buffer;
mod direct;
#[cfg(any(test, feature = "fault-injection"))]
mod faulty;
mod files;
mod meter;
mod operation;
mod probe;
mod psync;
mod queue;
#[cfg(any(test, feature = "fault-injection"))]
mod sim;
#[cfg(test)]
mod tests;
mod uring;

use std::sync::Arc;

pub(crate) use blocking::{sync_blocking, transfer_blocking};
pub use buffer::{IoBuffer, Pages};
pub use direct::open_direct;
#[cfg(any(test, feature = "fault-injection"))]
pub use faulty::{Fault, FaultAction, FaultPlan, Faulty};
pub(crate) use meter::{DirectionUse, Metered, Meters};
pub use probe::{IoChoice, open_engine};
#[cfg(any(test, feature = "fault-injection"))]
pub use sim::{SavedImages, SimCrash, SimDisk, SimIo, SimOperation};

use crate::error::{Error, Result};

/// What offsets, addresses and lengths of requests are multiples of, in bytes: fits every drive that [`open_direct`]
/// accepts.
pub(crate) const IO_ALIGN: usize = 4096;

/// A file opened for an engine, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId(pub u32);

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoKind {
    /// Fill the buffer from the file.
    Read,
    /// Write the buffer to the file.
    Write,
    /// `fdatasync`: what was completed before is on the medium afterwards. Has no buffer.
    Sync,
}

/// Who waits for it. Demand reads go before prefetch reads, those before writes; none is starved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IoPriority {
    /// A request of a user waits.
    Demand,
    /// Somebody may want it soon.
    Prefetch,
    /// Spill and sync.
    Write,
}

/// Called exactly once for every accepted request, on a thread of the engine: must be short and must not block. A panic
/// in it is caught and logged. It may submit, close and drop the engine.
pub type IoDone = Box<dyn FnOnce(IoCompletion) + Send>;

/// One operation. Offset, address and length are multiples of 4096.
pub struct IoRequest {
    /// The file.
    pub file: FileId,
    /// What to do.
    pub kind: IoKind,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// The bytes; `None` for [`IoKind::Sync`].
    pub buffer: Option<IoBuffer>,
    /// Who waits.
    pub priority: IoPriority,
    /// What to call at the end.
    pub done: IoDone,
}

/// How an operation ended.
pub struct IoCompletion {
    /// The buffer of the request, on success and on failure. `None` for [`IoKind::Sync`], and where the engine broke
    /// down (`Poisoned`) while the kernel may still have used the buffer: its memory is then never given back.
    pub buffer: Option<IoBuffer>,
    /// `Ok` only if every byte was transferred: short transfers are continued inside the engine, and a read that
    /// meets the end of the file is an error.
    pub result: Result<()>,
}

/// How reads of a drive are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadDepth {
    /// No more reads are started while so many bytes of reads are in flight, but for a second one.
    pub depth_bytes: usize,
    /// Neighbouring reads are made as one up to so many bytes.
    pub request_bytes: usize,
}

/// How reads of a drive are made of which nothing is known.
pub(crate) const READ_DEPTH_DEFAULT: ReadDepth = ReadDepth { depth_bytes: 32 << 20, request_bytes: 1 << 20 };

/// An I/O engine.
pub trait BlockIo: Send + Sync {
    /// Its name in logs and metrics: `io_uring` or `psync`.
    fn name(&self) -> &'static str;

    /// The most operations in flight on the drive.
    fn depth(&self) -> usize;

    /// Queues a request. Never waits for the drive.
    ///
    /// # Errors
    /// The request itself comes back, with `Busy` when the bounded queue of its priority is full, `Closed` after
    /// [`BlockIo::close`], `Poisoned` after the engine broke down, and `InvalidInput` for an unknown file, a missing
    /// buffer or an offset or length off the alignment; its `done` was not and will not be called by the engine.
    fn submit(&self, request: IoRequest) -> Result<(), (IoRequest, Error)>;

    /// Bounds the reads of a file that are in flight, from now on. Only a hint: an engine that has other bounds ignores it,
    /// which is the default.
    fn set_read_depth(&self, _file: FileId, _depth: ReadDepth) {}

    /// Ends the engine: what is queued completes with `Closed`, what is in flight is waited for, however long that
    /// takes, since its memory cannot be given back before. May be called again. Called from a completion it only
    /// marks the engine as closed.
    fn close(&self);
}

impl<T: BlockIo + ?Sized> BlockIo for Arc<T> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn depth(&self) -> usize {
        (**self).depth()
    }

    fn submit(&self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        (**self).submit(request)
    }

    fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        (**self).set_read_depth(file, depth);
    }

    fn close(&self) {
        (**self).close();
    }
}
