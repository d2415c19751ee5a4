//! Pinned DRAM: one arena, cut into slots of fixed sizes. Owns memory, never decides whose block leaves it.

mod arena;
mod slot;

pub use arena::{Arena, ArenaConfig, ClassUsage, HugePages};
pub use slot::{HEADER_BYTES, Slot};
