use std::collections::HashMap;

use super::*;
use crate::policy::SplitMix;

fn tier(policy: PolicyChoice, capacity: u64) -> ReplayTier {
    ReplayTier { policy, capacity, config: PegaflowConfig::default() }
}

fn random_trace(seed: u64) -> Trace {
    let mut random = SplitMix::new(seed);
    let mut trace = Trace::default();
    for now in 0..400 {
        let first = 100 * random.below(12) as u64;
        trace.push(now * 1000, 0, (0..1 + random.below(9) as u64).map(|depth| first + depth));
    }
    trace
}

/// The best that can be had with any choice of what to keep, tried out in full. For tiny traces.
fn best(trace: &Trace, capacity: usize) -> u64 {
    let requests: Vec<_> = trace.requests().collect();
    let mut states: HashMap<Vec<u64>, u64> = HashMap::from([(Vec::new(), 0)]);
    for request in &requests {
        let mut after: HashMap<Vec<u64>, u64> = HashMap::new();
        for (here, hits) in states {
            let found = request.blocks.iter().take_while(|block| here.contains(&block.key)).count() as u64;
            let mut all = here.clone();
            all.extend(request.blocks.iter().map(|block| block.key));
            all.sort_unstable();
            all.dedup();
            for choice in 0u32..1 << all.len() {
                if choice.count_ones() as usize <= capacity {
                    let kept: Vec<u64> =
                        all.iter().enumerate().filter(|(at, _)| choice >> at & 1 == 1).map(|(_, key)| *key).collect();
                    let best = after.entry(kept).or_default();
                    *best = (*best).max(hits + found);
                }
            }
        }
        states = after;
    }
    states.values().copied().max().unwrap_or_default()
}

#[test]
fn nobody_beats_the_optimum_and_it_beats_no_exhaustive_search() {
    for seed in 1..30 {
        let mut random = SplitMix::new(seed);
        let mut trace = Trace::default();
        for now in 0..8 {
            let first = 10 * random.below(3) as u64;
            trace.push(now, 0, (0..1 + random.below(2) as u64).map(|depth| first + depth));
        }
        let optimum = replay_optimal(&trace, 3).tiers[0].hits;
        assert_eq!(optimum, best(&trace, 3), "seed {seed}");
    }
    for seed in 1..10 {
        let trace = random_trace(seed);
        let optimum = replay_optimal(&trace, 30);
        for policy in PolicyChoice::ALL {
            let outcome = replay(&trace, &[tier(policy, 30)], &mut |_| {});
            assert!(outcome.tiers[0].hits <= optimum.tiers[0].hits, "{policy}, seed {seed}");
            assert!(outcome.tiers[0].writes >= 30.min(trace.unique_blocks() as u64), "{policy}, seed {seed}");
        }
    }
}

#[test]
fn with_room_for_all_every_policy_finds_whatever_was_there() {
    let trace = random_trace(5);
    let unique = trace.unique_blocks() as u64;
    for policy in PolicyChoice::ALL {
        let outcome = replay(&trace, &[tier(policy, unique)], &mut |_| {});
        assert_eq!(outcome.tiers[0].hits, trace.references() as u64 - unique, "{policy}");
        assert_eq!(outcome.tiers[0].writes, unique, "{policy}");
    }
}

#[test]
fn a_second_tier_serves_what_the_first_has_lost() {
    let trace = random_trace(9);
    let unique = trace.unique_blocks() as u64;
    let alone = replay(&trace, &[tier(PolicyChoice::Lru, 20)], &mut |_| {});
    let both = replay(&trace, &[tier(PolicyChoice::Lru, 20), tier(PolicyChoice::Lru, unique)], &mut |_| {});
    assert_eq!(both.tiers[0].writes, alone.tiers[0].writes);
    assert_eq!(both.tiers[0].hits + both.tiers[1].hits, trace.references() as u64 - unique);
    assert_eq!(both.tiers[1].writes, unique);
}

#[test]
fn what_lies_behind_a_miss_is_of_no_use() {
    let mut trace = Trace::default();
    trace.push(0, 0, [1, 2, 3]);
    trace.push(1, 0, [9, 2, 3]);
    let outcome = replay(&trace, &[tier(PolicyChoice::Lru, 10)], &mut |_| {});
    assert_eq!(outcome.tiers[0].hits, 0);
    let best = replay_optimal(&trace, 10).tiers[0];
    assert_eq!((best.hits, best.writes), (0, 2), "what is never asked for again is not written");
}

#[test]
fn of_a_chain_that_does_not_fit_the_beginning_stays() {
    let mut trace = Trace::default();
    trace.push(0, 0, [1, 2, 3]);
    trace.push(1, 0, [1, 2, 3]);
    for policy in [PolicyChoice::Lru, PolicyChoice::Fifo, PolicyChoice::Pegaflow] {
        assert_eq!(replay(&trace, &[tier(policy, 2)], &mut |_| {}).tiers[0].hits, 2, "{policy}");
    }
    assert_eq!(replay_optimal(&trace, 2).tiers[0].hits, 2);
}

#[test]
fn a_replay_repeats_itself_and_seeds_differ() {
    for workload in Synthetic::ALL {
        let (trace, other) = (workload.trace(1), workload.trace(2));
        assert_eq!(workload.name().parse(), Ok(workload));
        assert!(trace.references() > 100_000, "{}: {}", workload.name(), trace.references());
        assert_ne!(trace.references(), other.references());
    }
    let trace = random_trace(3);
    let run = || replay(&trace, &[tier(PolicyChoice::Pegaflow, 25)], &mut |_| {});
    assert_eq!(run(), run());
}

#[test]
fn a_higher_hurdle_saves_writes() {
    let trace = Synthetic::Rag.trace(1);
    let writes = [0.0, 1.0, 4.0].map(|write_hurdle| {
        let config = PegaflowConfig { write_hurdle, ..PegaflowConfig::default() };
        replay(&trace, &[ReplayTier { config, ..tier(PolicyChoice::Pegaflow, 1000) }], &mut |_| {}).tiers[0].writes
    });
    assert!(writes[1] * 10 < writes[0] * 9 && writes[2] * 10 < writes[1] * 9, "{writes:?}");
    let lru = replay(&trace, &[tier(PolicyChoice::Lru, 1000)], &mut |_| {}).tiers[0].writes;
    assert!(writes[1] < lru, "{writes:?}, lru {lru}");
}
