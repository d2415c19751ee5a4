//! What a block is: its key, the namespace under which its bytes are exchangeable, and where it lies in a
//! device's memory. Pure values; no I/O, no allocation of block memory.

mod geometry;
mod key;
mod namespace;
mod record_id;

pub use geometry::{Fragment, GroupGeometry, MemoryLayout};
pub use key::{BlockKey, KEY_CHAIN_VERSION, KeyChain};
pub use namespace::{NamespaceDescriptor, NamespaceHandle, NamespaceId};
pub use record_id::{RecordId, RecordKind};
