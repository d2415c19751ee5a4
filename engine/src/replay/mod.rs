//! Replays requests through the policies, one tier or several, and says what was found and what was written. No bytes move
//! and no clock runs: time is the trace's own, and the same trace gives the same result.
//!
//! A request is served as far as its blocks are there from the first one on: what lies behind a miss is of no use.

mod optimal;
mod prefetch;
mod synthetic;
mod trace;

pub use optimal::replay_optimal;
pub use prefetch::{PrefetchModel, PrefetchOutcome, replay_prefetch};
pub use synthetic::Synthetic;
pub use trace::{Trace, TraceRequest};

use crate::policy::{PegaflowConfig, Policy, PolicyBlock, PolicyChoice, PolicyRequest};

/// One tier of a replay.
#[derive(Debug, Clone, Copy)]
pub struct ReplayTier {
    /// Who decides.
    pub policy: PolicyChoice,
    /// Blocks that it holds. At least 1.
    pub capacity: u64,
    /// Of our policy.
    pub config: PegaflowConfig,
}

/// What one tier did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierOutcome {
    /// References to blocks that it served.
    pub hits: u64,
    /// Blocks that were written to it.
    pub writes: u64,
}

/// What a replay came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReplayOutcome {
    /// References to blocks.
    pub references: u64,
    /// In the order of the tiers. A block that is in several is served by the first.
    pub tiers: Vec<TierOutcome>,
}

impl ReplayOutcome {
    /// The share of references that tier `tier` served.
    pub fn hit_ratio(&self, tier: usize) -> f64 {
        self.tiers.get(tier).map_or(0.0, |tier| tier.hits as f64 / self.references.max(1) as f64)
    }
}

/// Replays a trace. `progress` is called with the number of requests done, now and then.
pub fn replay(trace: &Trace, tiers: &[ReplayTier], progress: &mut dyn FnMut(usize)) -> ReplayOutcome {
    let mut outcome = ReplayOutcome { references: 0, tiers: vec![TierOutcome::default(); tiers.len()] };
    let mut policies: Vec<Box<dyn Policy>> =
        tiers.iter().map(|tier| tier.policy.build(tier.capacity, tier.config)).collect();
    for (done, request) in trace.requests().enumerate() {
        let chain = request.blocks;
        outcome.references += chain.len() as u64;
        for block in chain {
            let Some(tier) = policies.iter().position(|policy| policy.contains(block.key)) else { break };
            outcome.tiers[tier].hits += 1;
        }
        let asked = PolicyRequest { chain, tenant: request.tenant, now_ms: request.now_ms };
        for ((policy, tier), outcome) in policies.iter_mut().zip(tiers).zip(&mut outcome.tiers) {
            policy.request(&asked);
            outcome.writes += bring_in(policy.as_mut(), chain, tier.capacity as usize, &mut |_| true);
        }
        if done % 256 == 0 {
            progress(done);
        }
    }
    outcome
}

/// Uses what is there, and writes what is not and is admitted; returns how many blocks that were.
fn bring_in(
    policy: &mut dyn Policy,
    chain: &[PolicyBlock],
    capacity: usize,
    may_leave: &mut dyn FnMut(u64) -> bool,
) -> u64 {
    let last_first = policy.takes_last_first();
    let mut writes = 0;
    for step in 0..chain.len() {
        let place = if last_first { chain.len() - 1 - step } else { step };
        let block = &chain[place];
        let parent = place.checked_sub(1).map(|before| chain[before].key);
        if policy.contains(block.key) {
            policy.touch(block.key);
            continue;
        }
        let is_full = policy.len() >= capacity;
        if policy.admits(block, parent, is_full) && (!is_full || policy.evict(may_leave).is_some()) {
            policy.insert(block, parent);
            writes += 1;
        }
    }
    writes
}

#[cfg(test)]
mod tests;
