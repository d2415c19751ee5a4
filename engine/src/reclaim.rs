//! Which region of the store leaves: the one whose records were used longest ago.

use pegaflow_tiers::{ReclaimPolicy, RegionInfo};

/// Least recently used, by region.
#[derive(Debug, Default)]
pub(crate) struct LeastRecentlyUsed;

impl ReclaimPolicy for LeastRecentlyUsed {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        candidates.iter().min_by_key(|region| (region.last_access, region.first_sequence)).map(|region| region.region)
    }
}
