//! What the benches share: made-up prompts, bytes and the smallest blocks to save, a store under load, a drive without a
//! store, proof that the page cache had no part. Measures nothing itself.

mod arbiter_world;
mod decode_capacity;
mod kv_bytes;
mod page_cache;
mod prompts;
mod raw_drive;
mod records;
mod store_load;
mod synthetic;
mod usage;

pub use arbiter_world::{LENGTHS, Stretch, Told, World, WorldOutcome};
pub use decode_capacity::decode_capacity_gbps;
pub use kv_bytes::KvBytes;
pub use page_cache::{cached_bytes, drive_bytes};
pub use prompts::{BLOCK_BYTES, Prompts, block_memory, memory_of, spec};
pub use raw_drive::{DEPTH_MAX, RawDrive, Shape, Transfer};
pub use records::{PROMPT_BLOCKS, Records};
pub use store_load::{Content, Order, StoreLoad, TurnShape};
pub use synthetic::{REGION_BYTES, SyntheticStore};
pub use usage::cpu_time;
