//! What the store tells about its regions and their records, and the seat of whoever decides what is given up.

use std::sync::Arc;

use crate::block::RecordId;
use crate::dram::Slot;

/// What a region is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionState {
    /// It holds nothing that counts.
    Free,
    /// Records are appended to it.
    Open,
    /// It is full, or was closed early; it is only read.
    Sealed,
    /// It was chosen to be given up: nothing in it is found any more.
    Reclaiming,
}

/// What there is to know about one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionInfo {
    /// Its number.
    pub region: u32,
    /// The drive that it lies on, by place in the configuration; 0 is the home.
    pub drive: u32,
    /// Its generation; 0 if it was never used.
    pub generation: u64,
    /// Its state.
    pub state: RegionState,
    /// Records in it that the table points to; of a large store not all of them until the table is full.
    pub records: u64,
    /// Bytes of these records, headers and padding included.
    pub live_bytes: u64,
    /// Bytes that were written to it in this generation.
    pub used_bytes: u64,
    /// No record in it has a lower sequence.
    pub first_sequence: u64,
    /// When it was last read or looked up: a counter that rises with every access to the store.
    pub last_access: u64,
    /// Readers that keep it from being reclaimed.
    pub pins: u32,
    /// Records of it that were used at least once since it was opened, or the store was.
    pub used_records: u64,
    /// How many regions were opened since this one was.
    pub age: u64,
    /// How many regions were opened since one of its records was last used; `age` if none was.
    pub idle: u64,
}

/// What there is to know about one record of a region that is about to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordInfo {
    /// The fingerprint of its identity.
    pub fingerprint: u64,
    /// The low half of its parent's fingerprint; 0 for a first block and for objects.
    pub parent: u32,
    /// Bytes that it takes, header and padding included.
    pub bytes: u64,
    /// How often it was used: read from the drive, or from DRAM while it was on the drive too. Counted to 15; halved each
    /// time it is written again. Not known from before the store was opened.
    pub uses: u8,
    /// How long ago it was used last: as many sixteenths of the store's capacity were written since. Without meaning if it
    /// was never used.
    pub idle_epochs: u16,
}

/// A block that lies in DRAM too.
#[derive(Debug, Clone)]
pub struct ResidentBlock {
    /// Whose it is.
    pub id: RecordId,
    /// Its bytes. They do not change any more.
    pub slot: Arc<Slot>,
}

/// Decides which region is given up when the store needs one.
pub trait ReclaimPolicy: Send + Sync {
    /// One of `candidates` (sealed regions of one drive without pins of which everything is durable, by number), or
    /// `None` if none may go. Called on the store's writer thread, which waits for it: it must not call the store. The
    /// store itself takes the oldest region instead where giving up the chosen one would mean to copy more tombstones than
    /// the copy is worth.
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32>;

    /// Whether the region may hold records that are worth to be written again before it goes: then [`Self::keep`] is
    /// asked. Called as [`Self::victim`]. Default: no.
    fn may_keep(&self, _region: &RegionInfo) -> bool {
        false
    }

    /// Which of a region's records are written again, by their place in `records` (which are in the order of the log),
    /// those first that matter most. The store takes them in this order up to `budget_bytes`, leaves out what is no longer
    /// found or has lost its parent, and stops when room gets short. Called on a thread of the store that nobody waits for.
    /// Default: none.
    fn keep(&self, _records: &[RecordInfo], _budget_bytes: u64) -> Vec<usize> {
        Vec::new()
    }

    /// The block with this fingerprint, if it is in DRAM as the store has it: then it is written again from there, without
    /// a read. Called as [`Self::keep`]. Default: none.
    fn resident(&self, _fingerprint: u64) -> Option<ResidentBlock> {
        None
    }
}
