//! Pinned DRAM: one arena, cut into slots of fixed sizes. Owns memory, never decides whose block leaves it.

mod arena;
mod growth;
mod mapping;
mod memory;
mod numa;
mod slot;
mod view;

pub use arena::{Arena, ArenaConfig, ClassUsage, HugePages};
pub use slot::{HEADER_BYTES, Slot};
pub use view::{ArenaId, ArenaView, Place};
