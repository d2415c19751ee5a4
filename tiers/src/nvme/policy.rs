//! What the store tells about its regions, and the seat of whoever decides which one is given up.

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
}

/// Decides which region is given up when the store needs one.
pub trait ReclaimPolicy: Send + Sync {
    /// One of `candidates` (sealed regions of one drive without pins of which everything is durable, by number), or
    /// `None` if none may go. Called on the store's writer thread, which waits for it: it must not call the store. The
    /// store itself takes the oldest region instead where giving up the chosen one would mean to copy more tombstones than the
    /// copy is worth.
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32>;
}
