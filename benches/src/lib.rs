//! What the benches share: made-up prompts and the smallest blocks to save. Measures nothing itself.

mod prompts;
mod records;
mod synthetic;

pub use prompts::{BLOCK_BYTES, Prompts, block_memory, spec};
pub use records::{PROMPT_BLOCKS, Records};
pub use synthetic::{REGION_BYTES, SyntheticStore};
