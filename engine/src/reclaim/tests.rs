use std::collections::HashMap;

use pegaflow_tiers::RegionState;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const REGIONS: u64 = 32;
const REGION_BLOCKS: u64 = 64;
const BLOCK_BYTES: u64 = 1 << 20;

fn region(number: u32, age: u64) -> RegionInfo {
    RegionInfo {
        region: number,
        drive: 0,
        generation: 1000 - 2 * age,
        state: RegionState::Sealed,
        records: REGION_BLOCKS,
        live_bytes: REGION_BLOCKS * BLOCK_BYTES,
        used_bytes: REGION_BLOCKS * BLOCK_BYTES,
        first_sequence: 100_000 - age * REGION_BLOCKS,
        last_access: 0,
        pins: 0,
        used_records: 0,
        age,
        idle: age,
    }
}

fn record(fingerprint: u64, parent: u32, uses: u8, idle_epochs: u16) -> RecordInfo {
    RecordInfo { fingerprint, parent, bytes: BLOCK_BYTES, uses, idle_epochs }
}

#[test]
fn what_nobody_uses_goes_by_age_and_what_is_hot_waits_until_it_has_cooled_down() {
    let policy = CostBenefit::new(REGIONS, None, None);
    assert_eq!(policy.victim(&[]), None);
    let cold: Vec<RegionInfo> = (0..8).map(|number| region(number, u64::from(20 - number))).collect();
    assert_eq!(policy.victim(&cold), Some(0), "the oldest");
    let hot = RegionInfo { used_records: REGION_BLOCKS, idle: 0, ..cold[0] };
    assert_eq!(policy.victim(&[hot, cold[1], cold[2]]), Some(1), "the next");
    // A small part of it is hot: that can be written again, and the rest need not stay for it.
    let partly = RegionInfo { used_records: REGION_BLOCKS / 16, idle: 0, ..cold[0] };
    assert_eq!(policy.victim(&[partly, cold[7]]), Some(0));
    // Nothing of it is alive: there is nothing to copy and nothing to lose.
    let dead = RegionInfo { live_bytes: 0, records: 0, ..hot };
    assert_eq!(policy.victim(&[dead, cold[1]]), Some(0));
    let cooled = RegionInfo { age: 8 * REGIONS, idle: 8 * REGIONS, ..hot };
    assert_eq!(policy.victim(&[cooled, cold[1]]), Some(0), "long ago");
    let equals = [RegionInfo { first_sequence: 7, ..region(5, 3) }, region(6, 3)];
    assert_eq!(policy.victim(&equals), Some(5), "the oldest of equals");
}

#[test]
fn ancestors_come_before_their_descendants_and_the_budget_cuts_at_the_leaves() {
    let policy = CostBenefit::new(REGIONS, None, None);
    // Two chains, 1-2-3 and 11-12-13, interleaved; 12 and 13 are hot, 11 was only counted before; 20 is cold, 21 is stale.
    let records = [
        record(1, 0, 1, 0),
        record(11, 0, 0, 0),
        record(2, 1, 1, 0),
        record(12, 11, 9, 0),
        record(20, 0, 0, 0),
        record(13, 12, 9, 4),
        record(3, 2, 1, 0),
        record(21, 0, 15, 33),
    ];
    let keep = |blocks: u64| -> Vec<u64> {
        policy.keep(&records, blocks * BLOCK_BYTES).iter().map(|place| records[*place].fingerprint).collect()
    };
    assert_eq!(keep(100), [11, 12, 13, 1, 2, 3]);
    assert_eq!(keep(2), [11, 12]);
    assert_eq!(keep(5), [11, 12, 13, 1, 2]);
    assert!(keep(0).is_empty());
    // Parents that are elsewhere, in another order, or the block itself must not matter.
    let odd = [record(1, 1, 2, 0), record(2, 77, 3, 0), record(3, 4, 1, 0), record(4, 0, 0, 0)];
    assert_eq!(policy.keep(&odd, u64::MAX), [1, 0, 2]);
}

#[test]
fn what_the_policy_would_keep_comes_first_and_then_what_was_used_most() {
    let drive = Arc::new(DrivePolicy::new(2, Box::new(|| 0)));
    let block = |key| PolicyBlock { key, bytes: 1 };
    // It has room for two: 31, the oldest, has left.
    for (key, parent) in [(31, None), (41, None), (42, Some(41))] {
        drive.judge(&block(key), parent, true).expect("as good as any");
        drive.accept(&block(key), parent);
    }
    assert_eq!([31, 41, 42, 1].map(|key| drive.worth(&block(key)).is_some()), [false, true, true, false]);
    let policy = CostBenefit::new(REGIONS, None, Some(drive));
    let records =
        [record(1, 0, 15, 0), record(31, 0, 9, 0), record(41, 0, 1, 0), record(42, 41, 1, 0), record(2, 1, 14, 0)];
    let kept: Vec<u64> = policy.keep(&records, u64::MAX).iter().map(|place| records[*place].fingerprint).collect();
    assert_eq!(kept, [41, 42, 1, 2, 31]);
    let unused = [record(41, 0, 0, 0), record(42, 41, 0, 0)];
    assert!(policy.keep(&unused, u64::MAX).is_empty(), "of no use so far");
}

/// A store of blocks in regions, without bytes: what the real one does with a policy's answers.
struct Simulation<'a> {
    policy: &'a dyn ReclaimPolicy,
    reinsert_percent: u64,
    /// Where each block is, and how often it was used, in which epoch.
    blocks: HashMap<u64, Place>,
    regions: HashMap<u32, (u64, u64, u64, Vec<u64>)>,
    open: u32,
    next_region: u32,
    opened: u64,
    appended: u64,
    reinserted: u64,
}

#[derive(Clone, Copy)]
struct Place {
    region: u32,
    parent: u64,
    uses: u8,
    epoch: u64,
}

impl<'a> Simulation<'a> {
    fn new(policy: &'a dyn ReclaimPolicy, reinsert_percent: u64) -> Self {
        Self {
            policy,
            reinsert_percent,
            blocks: HashMap::new(),
            regions: HashMap::from([(0, (1, 0, 0, Vec::new()))]),
            open: 0,
            next_region: 1,
            opened: 1,
            appended: 0,
            reinserted: 0,
        }
    }

    fn epoch(&self) -> u64 {
        self.opened * 16 / REGIONS
    }

    fn use_if_there(&mut self, block: u64) -> bool {
        let (epoch, opened) = (self.epoch(), self.opened);
        let Some(place) = self.blocks.get_mut(&block) else { return false };
        let region = self.regions.get_mut(&place.region).expect("a region");
        (region.1, region.2) = (region.1 + u64::from(place.uses == 0), opened);
        (place.uses, place.epoch) = ((place.uses + 1).min(15), epoch);
        true
    }

    fn append(&mut self, block: u64, parent: u64) {
        if self.regions[&self.open].3.len() as u64 >= REGION_BLOCKS {
            (self.open, self.next_region) = (self.next_region, self.next_region + 1);
            self.opened += 1;
            self.regions.insert(self.open, (self.opened, 0, 0, Vec::new()));
            if self.regions.len() as u64 >= REGIONS {
                self.reclaim();
            }
        }
        self.put(block, Place { region: self.open, parent, uses: 0, epoch: 0 });
    }

    fn put(&mut self, block: u64, place: Place) {
        self.appended += 1;
        self.blocks.insert(block, place);
        self.regions.get_mut(&self.open).expect("open").3.push(block);
    }

    fn reclaim(&mut self) {
        let candidates: Vec<RegionInfo> = self
            .regions
            .iter()
            .filter(|(number, _)| **number != self.open)
            .collect::<Vec<_>>()
            .into_iter()
            .map(|(number, (opened, used_records, last_use, blocks))| {
                let records = blocks.iter().filter(|block| self.lies_in(**block, *number)).count() as u64;
                let (age, idle) = (self.opened - opened, self.opened - (*opened).max(*last_use));
                let (used_records, live_bytes) = (*used_records, records * BLOCK_BYTES);
                let first_sequence = *opened;
                RegionInfo { records, live_bytes, used_records, idle, first_sequence, ..region(*number, age) }
            })
            .collect();
        let victim = self.policy.victim(&candidates).expect("a victim");
        let info = candidates.iter().find(|info| info.region == victim).expect("a candidate");
        let there: Vec<u64> =
            self.regions[&victim].3.iter().copied().filter(|block| self.lies_in(*block, victim)).collect();
        let records: Vec<RecordInfo> = there
            .iter()
            .map(|block| {
                let place = self.blocks[block];
                record(*block, place.parent as u32, place.uses, (self.epoch() - place.epoch) as u16)
            })
            .collect();
        let budget = REGION_BLOCKS * BLOCK_BYTES / 100 * self.reinsert_percent;
        let kept = if self.policy.may_keep(info) { self.policy.keep(&records, budget) } else { Vec::new() };
        for block in kept.into_iter().filter_map(|place| there.get(place)).copied() {
            let place = self.blocks[&block];
            if place.parent == 0 || self.blocks.contains_key(&place.parent) {
                self.regions.get_mut(&self.open).expect("open").1 += 1;
                self.put(block, Place { region: self.open, uses: place.uses / 2, ..place });
                self.reinserted += 1;
            }
        }
        for block in there {
            if self.lies_in(block, victim) {
                self.blocks.remove(&block);
            }
        }
        self.regions.remove(&victim);
    }

    fn lies_in(&self, block: u64, region: u32) -> bool {
        self.blocks.get(&block).is_some_and(|place| place.region == region)
    }
}

struct Fifo;

impl ReclaimPolicy for Fifo {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        candidates.iter().min_by_key(|info| info.first_sequence).map(|info| info.region)
    }
}

/// Prompts of shared documents, some far more popular than others, each followed by text that nobody asks for again. In
/// the middle of it the popular documents change. Returns (hit ratio of the documents' blocks, bytes written for each new).
fn replay(policy: &dyn ReclaimPolicy, reinsert_percent: u64) -> (f64, f64) {
    const DOCUMENTS: u64 = 400;
    const DOCUMENT_BLOCKS: u64 = 6;
    let mut rng = SmallRng::seed_from_u64(4);
    let mut store = Simulation::new(policy, reinsert_percent);
    let (mut asked, mut hits, mut fresh) = (0u64, 0u64, 1u64 << 40);
    for request in 0..20_000u64 {
        // Popularity falls with the square of the rank.
        let rank = (DOCUMENTS as f64 * rng.random::<f64>().powi(3)) as u64;
        let document = rank + DOCUMENTS * (request / 10_000);
        let mut parent = 0;
        let mut is_prefix = true;
        for depth in 0..DOCUMENT_BLOCKS {
            // Fingerprints of which the low half is unique as well.
            let block = 1 + document * DOCUMENT_BLOCKS + depth;
            asked += 1;
            is_prefix = is_prefix && store.use_if_there(block);
            if is_prefix {
                hits += 1;
            } else if !store.blocks.contains_key(&block) {
                store.append(block, parent);
            }
            parent = block;
        }
        for _ in 0..8 {
            fresh += 1;
            store.append(fresh, parent);
            parent = fresh;
        }
    }
    (hits as f64 / asked as f64, store.appended as f64 / (store.appended - store.reinserted) as f64)
}

#[test]
fn hot_blocks_survive_churn() {
    let policy = CostBenefit::new(REGIONS, None, None);
    let (fifo, _) = replay(&Fifo, 0);
    let (choosing, _) = replay(&policy, 0);
    let (keeping, amplification) = replay(&policy, 25);
    println!(
        "hit ratio of a skewed trace under churn: oldest region {fifo:.4}, cost-benefit {choosing:.4}, with re-insertion \
         {keeping:.4} at a write amplification of {amplification:.3}"
    );
    assert!(keeping > fifo + 0.1, "{keeping} against {fifo}");
    assert!(keeping > choosing, "{keeping} against {choosing}");
    // Bounded by the share of a region that may be written again.
    assert!(amplification < 1.0 / (1.0 - 0.25) + 0.01, "{amplification}");
}
