//! Rows of reclaimed regions. Reclaiming a region ends thousands of rows by one number, its generation; nobody deletes
//! them. They are left out of every answer at once, and compactions drop them from disk, so that the index stays
//! proportional to the store and does not grow with all that was ever written.

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::Arc;

use parking_lot::RwLock;
use rocksdb::CompactionDecision;
use rocksdb::compaction_filter::CompactionFilter;
use rocksdb::compaction_filter_factory::{CompactionFilterContext, CompactionFilterFactory};

use crate::index::Location;
use crate::index::row::{IndexRow, decode_id};

/// The generation of every region that has a mark. Generations only rise. Cloning shares.
#[derive(Clone, Default)]
pub(super) struct Generations(Arc<RwLock<HashMap<u32, u64>>>);

/// The generations at one moment: a row that they call dead stays dead.
pub(super) struct Snapshot(HashMap<u32, u64>);

impl Generations {
    pub(super) fn raise(&self, region: u32, generation: u64) {
        let mut all = self.0.write();
        let known = all.entry(region).or_insert(generation);
        *known = generation.max(*known);
    }

    /// Whether the location is not of a life of its region that is over.
    pub(super) fn is_current(&self, location: &Location) -> bool {
        is_current(&self.0.read(), location)
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot(self.0.read().clone())
    }
}

impl Snapshot {
    pub(super) fn is_current(&self, location: &Location) -> bool {
        is_current(&self.0, location)
    }
}

fn is_current(generations: &HashMap<u32, u64>, location: &Location) -> bool {
    generations.get(&location.region).is_none_or(|&generation| location.generation >= generation)
}

/// Makes a filter for each compaction.
pub(super) struct ReclaimedFilterFactory {
    generations: Generations,
}

impl ReclaimedFilterFactory {
    pub(super) fn new(generations: Generations) -> Self {
        Self { generations }
    }
}

impl CompactionFilterFactory for ReclaimedFilterFactory {
    type Filter = ReclaimedFilter;

    fn create(&mut self, _context: CompactionFilterContext) -> ReclaimedFilter {
        ReclaimedFilter { generations: self.generations.snapshot() }
    }

    fn name(&self) -> &CStr {
        c"pegaflow.reclaimed"
    }
}

/// Drops the rows of reclaimed regions from one compaction.
pub(super) struct ReclaimedFilter {
    generations: Snapshot,
}

impl CompactionFilter for ReclaimedFilter {
    /// Keeps what it cannot read: whoever reads the row says that it is damaged.
    fn filter(&mut self, _level: u32, key: &[u8], value: &[u8]) -> CompactionDecision {
        match decode_id(key).and_then(|id| IndexRow::decode(id, value)) {
            Ok(row) if !self.generations.is_current(&row.location) => CompactionDecision::Remove,
            Ok(_) | Err(_) => CompactionDecision::Keep,
        }
    }

    fn name(&self) -> &CStr {
        c"pegaflow.reclaimed"
    }
}
