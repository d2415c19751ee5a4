//! What is worth a place on the drive: our policy over a tier as large as the store, which is filled and emptied block by
//! block as in a replay. The store itself is a log and loses whole regions; what the policy would keep is what is written,
//! and what is written again before a region goes. Blocks on the drive and blocks of the policy drift apart when regions go
//! and at a restart; each request brings those that it names in line.

use parking_lot::Mutex;

use super::requests::Asked;
use super::sizes::Clock;
use crate::admission::Refusal;
use crate::policy::{PegaflowConfig, PegaflowPolicy, Policy, PolicyBlock, PolicyRequest};
use pegaflow_tiers::RecordId;

/// Blocks that the policy follows, at most: 93 MB. In a larger store everything is worth a write.
const BLOCKS_MAX: usize = 1 << 20;
/// Who is as good as the one that would leave is written: in a store that was filled within a second all are alike.
const WRITE_HURDLE: f32 = 0.99;
/// Blocks that leave for one that comes, at most: blocks of other sizes may be much smaller.
const LEAVING_MAX: usize = 64;

struct State {
    policy: PegaflowPolicy,
    capacity_bytes: u64,
    clock: Clock,
    chain: Vec<PolicyBlock>,
}

/// See the module.
pub(crate) struct DrivePolicy {
    state: Mutex<State>,
}

impl DrivePolicy {
    /// An empty policy for a store of `capacity_bytes`.
    pub(crate) fn new(capacity_bytes: u64, clock: Clock) -> Self {
        let config = PegaflowConfig { write_hurdle: WRITE_HURDLE, ..PegaflowConfig::default() };
        let (policy, chain) = (PegaflowPolicy::new(config), Vec::new());
        Self { state: Mutex::new(State { policy, capacity_bytes, clock, chain }) }
    }

    /// Begins with what an earlier run had learned; see [`Policy::restore`].
    pub(crate) fn restore(&self, note: &[u8]) -> bool {
        self.state.lock().policy.restore(note)
    }

    /// Payloads of so many bytes fit into the store, as they are compressed.
    pub(crate) fn set_capacity(&self, capacity_bytes: u64) {
        self.state.lock().capacity_bytes = capacity_bytes;
    }

    /// A request; `fingerprint` tells by which one the store knows a block in the place of another, of whose key only the
    /// prefix is known; `is_stored` whether it has a block, if that is known.
    pub(crate) fn request(
        &self,
        asked: &Asked,
        fingerprint: &dyn Fn(&RecordId, u64) -> u64,
        is_stored: &dyn Fn(u64) -> Option<bool>,
    ) {
        for shard in 0..asked.shards {
            let place = RecordId { shard, ..asked.place };
            let mut state = self.state.lock();
            let bytes = u32::try_from(asked.slot_bytes).unwrap_or(u32::MAX);
            let mut chain = std::mem::take(&mut state.chain);
            chain.clear();
            let keys = asked.prefixes.iter().map(|prefix| fingerprint(&place, *prefix));
            chain.extend(keys.map(|key| PolicyBlock { key, bytes }));
            let now_ms = (state.clock)();
            state.policy.request(&PolicyRequest { chain: &chain, tenant: place.namespace.0.into(), now_ms });
            let mut parent = None;
            for block in &chain {
                match (is_stored(block.key), state.policy.contains(block.key)) {
                    (Some(true), false) => {
                        // It is there, but whether it is to stay is asked like that of any other.
                        let is_full = state.is_full(block);
                        if state.policy.admits(block, parent, is_full) {
                            state.take_in(block, parent);
                        }
                    }
                    (Some(false), true) => state.policy.remove(block.key),
                    _ => {}
                }
                parent = Some(block.key);
            }
            state.chain = chain;
        }
    }

    /// Whether a block is worth a write; what it is worth. `has_parent` says whether the block before it is in the store or
    /// on its way there, or there is none.
    ///
    /// # Errors
    /// `Worth` or `Ancestor`, both only when the store is full.
    pub(crate) fn judge(&self, block: &PolicyBlock, parent: Option<u64>, has_parent: bool) -> Result<f32, Refusal> {
        let mut state = self.state.lock();
        let now_ms = (state.clock)();
        state.policy.request(&PolicyRequest { chain: &[], tenant: 0, now_ms });
        state.policy.know(block, parent);
        let worth = state.policy.worth(block).unwrap_or_default();
        if !state.is_full(block) || state.policy.contains(block.key) {
            return Ok(worth);
        }
        if !has_parent {
            return Err(Refusal::Ancestor);
        }
        if let Some(parent) = parent.filter(|parent| !state.policy.contains(*parent)) {
            // The store has it all the same.
            state.take_in(&PolicyBlock { key: parent, bytes: block.bytes }, None);
        }
        if state.policy.admits(block, parent, true) { Ok(worth) } else { Err(Refusal::Worth) }
    }

    /// A block that was judged is written.
    pub(crate) fn accept(&self, block: &PolicyBlock, parent: Option<u64>) {
        self.state.lock().take_in(block, parent);
    }

    /// A block that was accepted could not be written.
    pub(crate) fn lose(&self, fingerprint: u64) {
        self.state.lock().policy.remove(fingerprint);
    }

    /// What a block is worth that the policy would keep.
    pub(crate) fn worth(&self, block: &PolicyBlock) -> Option<f32> {
        let policy = &mut self.state.lock().policy;
        if policy.contains(block.key) { policy.worth(block) } else { None }
    }
}

impl State {
    fn is_full(&self, block: &PolicyBlock) -> bool {
        let is_followed = self.capacity_bytes / u64::from(block.bytes.max(1)) <= BLOCKS_MAX as u64;
        is_followed && self.policy.here_bytes() + u64::from(block.bytes) > self.capacity_bytes
    }

    fn take_in(&mut self, block: &PolicyBlock, parent: Option<u64>) {
        for _ in 0..LEAVING_MAX {
            let is_over = self.policy.here_bytes() + u64::from(block.bytes) > self.capacity_bytes;
            if !is_over && self.policy.len() < BLOCKS_MAX {
                break;
            }
            let stays = [Some(block.key), parent];
            if self.policy.evict(&mut |key| !stays.contains(&Some(key))).is_none() {
                break;
            }
        }
        self.policy.insert(block, parent);
    }
}

#[cfg(test)]
mod tests;
