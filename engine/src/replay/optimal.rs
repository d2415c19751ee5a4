//! What a policy could do that knew the future: the block that is asked for last leaves first (Belady, "A study of
//! replacement algorithms for a virtual-storage computer", 1966), of equals the deepest, so that ancestors stay; and what
//! is never asked for again is not written.

use std::collections::{BinaryHeap, HashMap};

use super::{ReplayOutcome, TierOutcome, Trace};
use crate::policy::Build;

const NEVER: usize = usize::MAX;

/// Replays a trace with knowledge of its future, in one tier of `capacity` blocks.
pub fn replay_optimal(trace: &Trace, capacity: u64) -> ReplayOutcome {
    let next_uses = next_uses(trace);
    let mut here: HashMap<u64, usize, Build> = HashMap::default();
    let mut order = BinaryHeap::new();
    let (mut hits, mut writes) = (0, 0);
    let mut uses = next_uses.iter();
    for request in trace.requests() {
        hits += request.blocks.iter().take_while(|block| here.contains_key(&block.key)).count() as u64;
        for (depth, (block, &next)) in request.blocks.iter().zip(uses.by_ref()).enumerate() {
            let is_here = here.contains_key(&block.key);
            if !is_here && next == NEVER {
                continue;
            }
            writes += u64::from(!is_here);
            here.insert(block.key, next);
            order.push((next, depth, block.key));
        }
        while here.len() as u64 > capacity {
            let Some((next, _, key)) = order.pop() else { break };
            if here.get(&key) == Some(&next) {
                here.remove(&key);
            }
        }
    }
    ReplayOutcome { references: trace.references() as u64, tiers: vec![TierOutcome { hits, writes }] }
}

/// For each reference the number of the next request for the same block.
fn next_uses(trace: &Trace) -> Vec<usize> {
    let mut next: HashMap<u64, usize, Build> = HashMap::default();
    let mut uses = vec![NEVER; trace.references()];
    let requests: Vec<_> = trace.requests().collect();
    let mut at = uses.len();
    for (number, request) in requests.iter().enumerate().rev() {
        for block in request.blocks.iter().rev() {
            at -= 1;
            uses[at] = next.insert(block.key, number).unwrap_or(NEVER);
        }
    }
    uses
}
