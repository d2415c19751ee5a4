//! The block store: regions in a preallocated file, written as a log with O_DIRECT, found through an index.
//! Owns the format, the data plane and recovery. Decides nothing: which region to reclaim is asked of a policy.

mod io;

pub use io::{BlockIo, FileId, IoBuffer, IoCompletion, IoDone, IoKind, IoPriority, IoRequest};
mod store_stub;
pub use store_stub::*;
