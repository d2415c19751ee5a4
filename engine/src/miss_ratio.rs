//! What a tier of any other size would serve, while it runs: reuse distances of a sample of blocks (Waldspurger, Park,
//! Garthwaite and Ahmad, "Efficient MRC construction with SHARDS", FAST 2015, with a fixed number of samples and the
//! correction for what sampling missed).
//!
//! A reuse distance is how many bytes of other blocks were used since a block was used last; least recently used serves
//! those that are smaller than the tier. So the curve is that of least recently used, leaves first; a better policy lies
//! above it. A block is sampled by its key, so that all of its uses are seen or none; when there are too many the rate
//! falls. Memory is bounded by the number of samples.

use std::collections::BTreeMap;

use crate::policy::{PolicyBlock, SplitMix};

/// Buckets of distance to a doubling.
const BUCKETS_PER_DOUBLING: f64 = 16.0;
const BUCKETS: usize = 64 * 16;
/// Places in the order of use for each sample; when they are used up all move together.
const PLACES_PER_SAMPLE: usize = 4;

/// A curve of hits against size. With 8,192 samples it takes less than 1 MiB.
pub struct MissRatioCurve {
    samples_max: usize,
    /// A block is sampled if its hash is below this.
    threshold: u64,
    /// By hash the place in the order of use.
    samples: BTreeMap<u64, (usize, u32)>,
    order: Fenwick,
    next_place: usize,
    /// References by distance, as many as each sample stands for.
    distances: Vec<f64>,
    counted: f64,
    references: f64,
    /// Of the request at hand: hash, bytes.
    chain: Vec<(u64, u32)>,
}

impl MissRatioCurve {
    /// An empty curve of at most `samples_max` samples. Sensible: 8,192. Minimum: 16.
    pub fn new(samples_max: usize) -> Self {
        let samples_max = samples_max.max(16);
        Self {
            samples_max,
            threshold: u64::MAX,
            samples: BTreeMap::new(),
            order: Fenwick::new(samples_max * PLACES_PER_SAMPLE),
            next_place: 0,
            distances: vec![0.0; BUCKETS],
            counted: 0.0,
            references: 0.0,
            chain: Vec::new(),
        }
    }

    /// A request for a chain of blocks, first to last. Hits end at the first miss: no block counts as nearer than one
    /// before it.
    pub fn request(&mut self, chain: &[PolicyBlock]) {
        self.references += chain.len() as f64;
        self.chain.clear();
        let hashed = chain.iter().map(|block| (SplitMix::mix(block.key), block.bytes));
        self.chain.extend(hashed.filter(|(hash, _)| *hash < self.threshold));
        let scale = self.scale();
        let mut farthest = Some(0);
        for (hash, _) in &self.chain {
            self.counted += scale;
            let here = self.samples.get(hash).map(|(place, _)| self.order.sum_after(*place));
            farthest = farthest.zip(here).map(|(before, here)| before.max(here));
            if let Some(distance) = farthest {
                self.distances[bucket(distance as f64 * scale)] += scale;
            }
        }
        // Last to first, so that leaves are older than their ancestors.
        for at in (0..self.chain.len()).rev() {
            let (hash, bytes) = self.chain[at];
            self.touch(hash, bytes);
        }
        while self.samples.len() > self.samples_max
            && let Some((hash, (place, bytes))) = self.samples.pop_last()
        {
            self.order.subtract(place, bytes.into());
            self.threshold = hash;
        }
    }

    /// The share of references that a tier of `capacity_bytes` would have served.
    pub fn hit_ratio(&self, capacity_bytes: u64) -> f64 {
        if self.references <= 0.0 {
            return 0.0;
        }
        let end = bucket(capacity_bytes as f64);
        let hits = self.distances.iter().take(end).sum::<f64>();
        // What sampling saw too much or too little of are, most likely, the few blocks that everybody uses.
        let missed = self.references - self.counted;
        ((hits + missed) / self.references).clamp(0.0, 1.0)
    }

    /// Lets the past count for less: by a factor from 0 to 1.
    pub fn fade(&mut self, factor: f64) {
        self.distances.iter_mut().for_each(|references| *references *= factor);
        self.counted *= factor;
        self.references *= factor;
    }

    /// The share of blocks that are sampled.
    pub fn rate(&self) -> f64 {
        1.0 / self.scale()
    }

    fn scale(&self) -> f64 {
        u64::MAX as f64 / self.threshold.max(1) as f64
    }

    fn touch(&mut self, hash: u64, bytes: u32) {
        if let Some((place, bytes)) = self.samples.remove(&hash) {
            self.order.subtract(place, bytes.into());
        }
        if self.next_place == self.order.len() {
            self.close_up();
        }
        self.samples.insert(hash, (self.next_place, bytes));
        self.order.add(self.next_place, bytes.into());
        self.next_place += 1;
    }

    /// Moves all samples to the first places, in their order; makes room for more if a request was very long.
    fn close_up(&mut self) {
        let mut samples: Vec<&mut (usize, u32)> = self.samples.values_mut().collect();
        samples.sort_unstable_by_key(|(place, _)| *place);
        self.order = Fenwick::new(self.order.len().max(2 * samples.len()));
        self.next_place = samples.len();
        for (place, sample) in samples.into_iter().enumerate() {
            sample.0 = place;
            self.order.add(place, sample.1.into());
        }
    }
}

/// Bucket 0 ends at a distance of one.
fn bucket(distance: f64) -> usize {
    if distance < 1.0 { 0 } else { ((distance.log2() * BUCKETS_PER_DOUBLING) as usize + 1).min(BUCKETS - 1) }
}

/// Sums over places (Fenwick, "A new data structure for cumulative frequency tables", 1994).
struct Fenwick {
    sums: Vec<u64>,
    total: u64,
}

impl Fenwick {
    fn new(places: usize) -> Self {
        Self { sums: vec![0; places], total: 0 }
    }

    fn len(&self) -> usize {
        self.sums.len()
    }

    fn add(&mut self, place: usize, bytes: u64) {
        self.total += bytes;
        self.change(place, |sum| *sum += bytes);
    }

    fn subtract(&mut self, place: usize, bytes: u64) {
        self.total -= bytes;
        self.change(place, |sum| *sum -= bytes);
    }

    fn change(&mut self, mut place: usize, change: impl Fn(&mut u64)) {
        while let Some(sum) = self.sums.get_mut(place) {
            change(sum);
            place |= place + 1;
        }
    }

    fn sum_after(&self, place: usize) -> u64 {
        let mut end = place + 1;
        let mut before = 0;
        while end > 0 {
            before += self.sums[end - 1];
            end &= end - 1;
        }
        self.total - before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{PegaflowConfig, PolicyChoice};
    use crate::replay::{ReplayTier, Synthetic, Trace, replay};

    fn curve(trace: &Trace, samples_max: usize) -> MissRatioCurve {
        let mut curve = MissRatioCurve::new(samples_max);
        trace.requests().for_each(|request| curve.request(request.blocks));
        curve
    }

    fn replayed(trace: &Trace, capacity: u64) -> f64 {
        let tier = ReplayTier { policy: PolicyChoice::Lru, capacity, config: PegaflowConfig::default() };
        replay(trace, &[tier], &mut |_| {}).hit_ratio(0)
    }

    #[test]
    fn with_all_blocks_sampled_it_is_the_replay() {
        let trace = Synthetic::Rag.trace(1);
        let curve = curve(&trace, 1 << 20);
        assert_eq!(curve.rate(), 1.0);
        for capacity in [1 << 9, 1 << 11, 1 << 13, 1 << 15] {
            let (estimate, truth) = (curve.hit_ratio(capacity), replayed(&trace, capacity));
            assert!((estimate - truth).abs() < 0.005, "{capacity}: {estimate} for {truth}");
        }
    }

    #[test]
    fn a_sample_is_near_the_replay_and_stays_small() {
        for workload in Synthetic::ALL {
            let trace = workload.trace(1);
            let curve = curve(&trace, 8192);
            assert!(curve.samples.len() <= 8192 && curve.rate() < 0.5);
            for capacity in [2000, 5000, 10_000, 20_000] {
                let (estimate, truth) = (curve.hit_ratio(capacity), replayed(&trace, capacity));
                assert!((estimate - truth).abs() < 0.03, "{}, {capacity}: {estimate} for {truth}", workload.name());
            }
        }
    }

    #[test]
    fn sums_are_those_of_a_plain_list() {
        let mut random = SplitMix::new(1);
        let (mut tree, mut list) = (Fenwick::new(37), vec![0u64; 37]);
        for _ in 0..500 {
            let (place, bytes) = (random.below(37), random.below(1000) as u64);
            tree.add(place, bytes);
            list[place] += bytes;
            let place = random.below(37);
            assert_eq!(tree.sum_after(place), list[place + 1..].iter().sum::<u64>());
        }
    }

    #[test]
    fn the_past_fades() {
        let mut curve = MissRatioCurve::new(100);
        let chain = |first: u64| [PolicyBlock { key: first, bytes: 1 }];
        (0..50).for_each(|key| curve.request(&chain(key)));
        curve.fade(0.01);
        (0..50).for_each(|_| curve.request(&chain(7)));
        assert!(curve.hit_ratio(1000) > 0.9, "{}", curve.hit_ratio(1000));
        assert_eq!(MissRatioCurve::new(1).hit_ratio(10), 0.0);
    }
}
