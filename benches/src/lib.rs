//! What the benches share: made-up records that look like those of a cache. Measures nothing itself.

mod records;

pub use records::{PROMPT_BLOCKS, Records};
