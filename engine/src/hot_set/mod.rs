//! The hot set: which blocks were in DRAM, kept in the store so that the next run can bring them back before anybody asks.
//!
//! Now and then, and at a close, the policies' thread goes through the blocks in DRAM ([`keep`]), puts them in the order of
//! what they are worth, ancestors first ([`rank`]), and keeps the list as notes of the store ([`piece`]). After an open a
//! thread of its own reads the list and fetches the blocks ([`warm`]), behind everything that somebody waits for. The list
//! names blocks and says nothing of their bytes: whatever stands in it, each block is checked as in any read.
//!
//! Whoever asks for namespaces to be brought to DRAM ([`asked`]) has a list made of the index, and the same way.

mod asked;
mod keep;
mod piece;
mod rank;
mod reads;
mod warm;

use pegaflow_tiers::{BlockKey, NamespaceHandle, RecordId};

use crate::policy::BlockMemory;

pub(crate) use asked::WarmRuns;
pub use asked::{WarmRun, WarmRunState};
pub(crate) use keep::keep;
pub(crate) use rank::Candidate;
pub(crate) use warm::{WarmStart, warm};

/// The most blocks that are kept: 9.8 MB. All shards of a block are one.
const BLOCKS_MAX: usize = piece::PIECES_MAX * piece::BLOCKS_PER_PIECE;

/// A block of the hot set, all of its shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct HotBlock {
    /// Shard 0 of it.
    id: RecordId,
    /// The one before it in its chain, by its place in the list, which is nearer to the front; `None` for a first one.
    parent: Option<u32>,
    memory: BlockMemory,
}

impl HotBlock {
    fn new(
        (namespace, group): (NamespaceHandle, u16),
        key: BlockKey,
        parent: Option<u32>,
        memory: BlockMemory,
    ) -> Self {
        Self { id: RecordId { namespace, group, shard: 0, key }, parent, memory }
    }
}

/// The list, most valuable first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct HotSet {
    /// When it was written, in ms since 1970. No two lists of a store have the same.
    written_unix_ms: u64,
    blocks: Vec<HotBlock>,
}
