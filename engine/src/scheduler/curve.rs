//! The live miss-ratio curve: what DRAM and drive of other sizes would serve of what is really asked for.

use parking_lot::Mutex;

use super::requests::Asked;
use crate::api::SizeEstimate;
use crate::miss_ratio::MissRatioCurve;
use crate::policy::PolicyBlock;

/// Blocks of which reuse distances are kept: less than 1 MiB.
const SAMPLES: usize = 8192;
/// What was asked for so long ago counts half.
const HALF_LIFE_MS: f64 = 6.0 * 3600.0 * 1000.0;
/// The past fades in steps of so long.
const FADE_MS: u64 = 60_000;
/// The sizes that are estimated, by what is there now.
const TIMES: [f64; 4] = [0.5, 1.0, 2.0, 4.0];

struct State {
    curve: MissRatioCurve,
    chain: Vec<PolicyBlock>,
    faded_ms: u64,
}

/// See the module.
pub(crate) struct LiveCurve {
    state: Mutex<State>,
}

impl LiveCurve {
    pub(crate) fn new() -> Self {
        let (curve, chain) = (MissRatioCurve::new(SAMPLES), Vec::new());
        Self { state: Mutex::new(State { curve, chain, faded_ms: 0 }) }
    }

    /// A request. Its shards are there together or not at all, so they count as one block.
    pub(crate) fn request(&self, asked: &Asked, now_ms: u64) {
        let mut state = self.state.lock();
        let State { curve, chain, faded_ms } = &mut *state;
        let steps = now_ms.saturating_sub(*faded_ms) / FADE_MS;
        if steps > 0 {
            *faded_ms += steps * FADE_MS;
            curve.fade(0.5f64.powf((steps * FADE_MS) as f64 / HALF_LIFE_MS));
        }
        let bytes = u32::try_from(asked.slot_bytes * usize::from(asked.shards)).unwrap_or(u32::MAX);
        chain.clear();
        let keys = asked.prefixes.iter().map(|prefix| asked.place.fingerprint_of(*prefix));
        chain.extend(keys.map(|key| PolicyBlock { key, bytes }));
        curve.request(chain);
    }

    /// What tiers of half to four times this size would serve; empty for none.
    pub(crate) fn estimates(&self, capacity_bytes: u64) -> Vec<SizeEstimate> {
        let state = self.state.lock();
        let sizes = TIMES.iter().filter(|_| capacity_bytes > 0);
        sizes
            .map(|times| {
                let capacity_bytes = (capacity_bytes as f64 * times) as u64;
                let permille = (state.curve.hit_ratio(capacity_bytes) * 1000.0).round() as u32;
                SizeEstimate { percent_of_present: (times * 100.0) as u32, capacity_bytes, hit_permille: permille }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::SessionId;
    use crate::policy::{PegaflowConfig, PolicyChoice};
    use crate::replay::{ReplayTier, Synthetic, replay};
    use pegaflow_tiers::{BlockKey, NamespaceHandle, RecordId};

    fn asked(prefixes: Vec<u64>, shards: u16) -> Asked {
        let place = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::ROOT };
        Asked { session: SessionId(1), tag: 0, place, shards, slot_bytes: 4096, prefixes }
    }

    #[test]
    fn the_estimates_are_those_of_replays_and_follow_what_is_asked_for() {
        let trace = Synthetic::Rag.trace(1);
        let live = LiveCurve::new();
        for request in trace.requests() {
            live.request(&asked(request.blocks.iter().map(|block| block.key).collect(), 2), 0);
        }
        let estimates = live.estimates(4000 * 2 * 4096);
        assert_eq!(estimates.iter().map(|at| at.percent_of_present).collect::<Vec<_>>(), [50, 100, 200, 400]);
        for estimate in &estimates {
            let capacity = estimate.capacity_bytes / (2 * 4096);
            let tier = ReplayTier { policy: PolicyChoice::Lru, capacity, config: PegaflowConfig::default() };
            let truth = replay(&trace, &[tier], &mut |_| {}).hit_ratio(0);
            let error = f64::from(estimate.hit_permille) / 1000.0 - truth;
            assert!(error.abs() < 0.03, "{estimate:?}, replayed {truth}");
        }
        assert!(live.estimates(0).is_empty());
        // Ten days later somebody asks for one thing only.
        (0..5000).for_each(|_| live.request(&asked(vec![7], 2), 240 * 3_600_000));
        assert!(live.estimates(4000)[0].hit_permille > 900, "{:?}", live.estimates(4000));
    }
}
