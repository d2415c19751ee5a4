//! What the benches share: made-up prompts, bytes and the smallest blocks to save. Measures nothing itself.

mod kv_bytes;
mod prompts;
mod records;
mod synthetic;

pub use kv_bytes::KvBytes;
pub use prompts::{BLOCK_BYTES, Prompts, block_memory, spec};
pub use records::{PROMPT_BLOCKS, Records};
pub use synthetic::{REGION_BYTES, SyntheticStore};
