//! In which order the blocks of one step are read. Pure.

use std::collections::BTreeMap;

use pegaflow_tiers::{Location, RecordId};

/// Neighbours on a drive are read one after another, up to so many bytes: the ring makes one request of them.
const RUN_BYTES: u64 = 1 << 20;

/// Neighbours together, up to [`RUN_BYTES`], and the regions in turn: they lie on different drives, all of which are to
/// be busy.
pub(super) fn in_turn(mut reads: Vec<(RecordId, Location)>) -> Vec<(RecordId, Location)> {
    reads.sort_unstable_by_key(|(_, location)| (location.region, location.page));
    let mut by_region: BTreeMap<u32, Vec<(RecordId, Location)>> = BTreeMap::new();
    for read in reads.into_iter().rev() {
        by_region.entry(read.1.region).or_default().push(read);
    }
    let mut ordered = Vec::with_capacity(by_region.values().map(Vec::len).sum());
    while !by_region.is_empty() {
        by_region.retain(|_, of_region| {
            let mut left = RUN_BYTES;
            while left > 0
                && let Some(read) = of_region.pop()
            {
                left = left.saturating_sub(read.1.bytes());
                ordered.push(read);
            }
            !of_region.is_empty()
        });
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_stay_together_and_regions_take_turns() {
        let read = |region: u32, page: u32| (RecordId::LEAST, Location { region, generation: 1, page, pages: 128 });
        // Runs of two, 1 MiB.
        let reads = vec![read(2, 128), read(1, 256), read(1, 0), read(2, 0), read(1, 128), read(3, 5)];
        let places: Vec<_> = in_turn(reads).iter().map(|(_, at)| (at.region, at.page)).collect();
        assert_eq!(places, [(1, 0), (1, 128), (2, 0), (2, 128), (3, 5), (1, 256)]);
        assert!(in_turn(Vec::new()).is_empty());
    }
}
