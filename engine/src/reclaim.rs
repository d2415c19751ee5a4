//! Which region of the store leaves, and which of its records are written again before it does. Pure arithmetic over
//! what the store tells; moves nothing.
//!
//! The region: cost-benefit, as in log-structured file systems (Rosenblum and Ousterhout, "The Design and Implementation
//! of a Log-Structured File System", 1992): `(1 - u) * age / (1 + u)`. There `u` is the share of a segment that is alive
//! and has to be copied; here it is the share that is worth copying, because a cache may drop the rest. So regions of which
//! nothing was used go in the order of their age, a hot one waits until it has cooled down.
//!
//! The records: those that were used, ancestors before their descendants: a block without its ancestors is worthless. Those
//! first that the policy would keep, by what they are worth to it; then the others, most used first. Each time a record is written again half of its uses are forgotten, so it has to earn the next round, as
//! in S3-FIFO (Yang and others, 2023).

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use pegaflow_tiers::{ReclaimPolicy, RecordInfo, RegionInfo, ResidentBlock};

use crate::policy::PolicyBlock;
use crate::residency::Residency;
use crate::scheduler::DrivePolicy;

/// Epochs of [`RecordInfo::idle_epochs`] after which a use counts half: the time in which all of the store is written once.
const HALF_LIFE_EPOCHS: f64 = 16.0;
/// What was not used for so many half-lives is not written again.
const HALF_LIVES_MAX: f64 = 2.0;

/// Cost-benefit with re-insertion; see the module's documentation.
pub(crate) struct CostBenefit {
    /// Regions of the store: as many are opened while all of it is written once.
    regions: f64,
    /// Blocks that need not be read to be written again.
    residency: Option<Arc<Residency>>,
    /// What records are worth, where it knows.
    policy: Option<Arc<DrivePolicy>>,
}

impl CostBenefit {
    /// For a store of that many regions.
    pub(crate) fn new(regions: u64, residency: Option<Arc<Residency>>, policy: Option<Arc<DrivePolicy>>) -> Self {
        Self { regions: regions.max(1) as f64, residency, policy }
    }

    /// The rank of a record among those of its region.
    fn rank(&self, record: &RecordInfo) -> Rank {
        let uses = worth(record);
        let bytes = u32::try_from(record.bytes).unwrap_or(u32::MAX);
        let block = PolicyBlock { key: record.fingerprint, bytes };
        let kept = self.policy.as_ref().filter(|_| uses > 0.0).and_then(|policy| policy.worth(&block));
        kept.map_or(Rank { is_kept: false, worth: uses }, |worth| Rank { is_kept: true, worth: worth.into() })
    }

    /// The share of a region that is worth copying, as far as its own counters can say.
    fn wanted_share(&self, region: &RegionInfo) -> f64 {
        let share = |part: u64, of: u64| (part as f64 / of.max(1) as f64).min(1.0);
        let cooling = 0.5f64.powf(region.idle as f64 / self.regions);
        share(region.live_bytes, region.used_bytes) * share(region.used_records, region.records) * cooling
    }

    fn score(&self, region: &RegionInfo) -> f64 {
        let wanted = self.wanted_share(region);
        (1.0 - wanted) * (region.age + 1) as f64 / (1.0 + wanted)
    }
}

impl ReclaimPolicy for CostBenefit {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        // The oldest of equals.
        let better = |a: &&RegionInfo, b: &&RegionInfo| {
            self.score(a).total_cmp(&self.score(b)).then(b.first_sequence.cmp(&a.first_sequence))
        };
        candidates.iter().max_by(better).map(|region| region.region)
    }

    fn may_keep(&self, region: &RegionInfo) -> bool {
        region.used_records > 0
    }

    fn keep(&self, records: &[RecordInfo], budget_bytes: u64) -> Vec<usize> {
        let mut ranks: Vec<Rank> = records.iter().map(|record| self.rank(record)).collect();
        let places: HashMap<u32, usize> =
            records.iter().enumerate().map(|(place, record)| (record.fingerprint as u32, place)).collect();
        // From the end of the log, where descendants are: each passes its worth on to its parent.
        for (place, record) in records.iter().enumerate().rev() {
            let parent = places.get(&record.parent).filter(|parent| record.parent != 0 && **parent < place);
            let from = ranks.get(place).copied().unwrap_or_default();
            if let Some(to) = parent.and_then(|parent| ranks.get_mut(*parent))
                && to.order(&from).is_lt()
            {
                *to = from;
            }
        }
        let mut order: Vec<(usize, Rank)> =
            ranks.into_iter().enumerate().filter(|(_, rank)| rank.is_kept || rank.worth > 0.0).collect();
        // Stable: among equals ancestors stay first.
        order.sort_by(|(_, a), (_, b)| b.order(a));
        let mut left = budget_bytes;
        let fits = |(place, _): (usize, Rank)| {
            left = left.checked_sub(records.get(place)?.bytes)?;
            Some(place)
        };
        order.into_iter().map_while(fits).collect()
    }

    fn resident(&self, fingerprint: u64) -> Option<ResidentBlock> {
        self.residency.as_ref()?.stored_block(fingerprint)
    }
}

/// How much a record matters.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Rank {
    is_kept: bool,
    worth: f64,
}

impl Rank {
    fn order(&self, other: &Self) -> Ordering {
        self.is_kept.cmp(&other.is_kept).then(self.worth.total_cmp(&other.worth))
    }
}

/// What a record is worth by its own uses: as many as it had, halved with time.
fn worth(record: &RecordInfo) -> f64 {
    let half_lives = f64::from(record.idle_epochs) / HALF_LIFE_EPOCHS;
    if record.uses == 0 || half_lives > HALF_LIVES_MAX { 0.0 } else { f64::from(record.uses) * 0.5f64.powf(half_lives) }
}

#[cfg(test)]
mod tests;
