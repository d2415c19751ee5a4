//! The block store: regions in a preallocated file, written as a log with O_DIRECT, found through an index.
//! Owns the format, the data plane and recovery. Decides nothing: which region to reclaim is asked of a policy.

mod io;

pub use io::{
    BlockIo, FileId, IoBuffer, IoChoice, IoCompletion, IoDone, IoKind, IoPriority, IoRequest, Pages, open_direct,
    open_engine,
};
#[cfg(any(test, feature = "fault-injection"))]
pub use io::{Fault, FaultAction, FaultPlan, Faulty};
