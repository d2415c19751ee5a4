//! The policies of DRAM: one for each size of block, since a block makes room only for others of its size. Sizes beyond
//! the first few, and objects of sizes that no block has, have none: they leave least recently used first.

use std::collections::BTreeMap;

use crate::policy::{PegaflowConfig, Policy, PolicyBlock, PolicyChoice, PolicyRequest};

use super::learned;

/// Sizes that have a policy of their own, at most. A host serves a few models of a few groups each.
const SIZES_MAX: usize = 16;
/// Blocks that left and are remembered, of all sizes together; but of each size as many as memory holds, up to this
/// number. So what the policies take stays small beside the memory that they look after, and one size alone has all.
const REMEMBERED: usize = 1 << 16;
/// Time goes on for a policy without requests when something comes to it after so long.
const STILL_MS: u64 = 1000;

/// Ms since any fixed time.
pub(crate) type Clock = Box<dyn Fn() -> u64 + Send>;

struct OfSize {
    policy: Box<dyn Policy>,
    block_bytes: u32,
    now_ms: u64,
}

impl OfSize {
    fn block(&self, key: u64) -> PolicyBlock {
        PolicyBlock { key, bytes: self.block_bytes }
    }
}

/// See the module.
pub(crate) struct SizePolicies {
    choice: PolicyChoice,
    config: PegaflowConfig,
    capacity_bytes: u64,
    clock: Clock,
    by_size: BTreeMap<usize, OfSize>,
    /// What an earlier run had learned of each size.
    learned: Vec<(u32, Vec<u8>)>,
    chain: Vec<PolicyBlock>,
}

impl SizePolicies {
    /// Empty policies for a memory of `capacity_bytes`.
    pub(crate) fn new(choice: PolicyChoice, config: PegaflowConfig, capacity_bytes: u64, clock: Clock) -> Self {
        let (by_size, learned, chain) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { choice, config, capacity_bytes, clock, by_size, learned, chain }
    }

    /// Whether the policies take the blocks of a request from the last to the first.
    pub(crate) fn take_last_first(&self) -> bool {
        self.choice != PolicyChoice::Pegaflow
    }

    /// A request for a chain of blocks, by their fingerprints, each of which takes `slot_bytes`. Objects (`is_block` is
    /// false) make no policy for their size.
    pub(crate) fn request(&mut self, slot_bytes: usize, is_block: bool, tenant: u64, keys: impl Iterator<Item = u64>) {
        let now_ms = (self.clock)();
        if !is_block && !self.by_size.contains_key(&slot_bytes) {
            return;
        }
        let mut chain = std::mem::take(&mut self.chain);
        if let Some(of_size) = self.of_size(slot_bytes) {
            chain.clear();
            chain.extend(keys.map(|key| of_size.block(key)));
            of_size.now_ms = now_ms;
            of_size.policy.request(&PolicyRequest { chain: &chain, tenant, now_ms });
            if of_size.policy.takes_last_first() {
                let here = chain.iter().rev().filter(|block| of_size.policy.contains(block.key));
                let here: Vec<u64> = here.map(|block| block.key).collect();
                here.into_iter().for_each(|key| of_size.policy.touch(key));
            }
        }
        self.chain = chain;
    }

    /// A block is here and may leave from now on. As in [`SizePolicies::request`].
    pub(crate) fn enter(&mut self, slot_bytes: usize, key: u64, parent: Option<u64>, is_block: bool) {
        let now_ms = (self.clock)();
        if !is_block && !self.by_size.contains_key(&slot_bytes) {
            return;
        }
        let Some(of_size) = self.of_size(slot_bytes) else { return };
        if of_size.policy.contains(key) {
            return;
        }
        if now_ms >= of_size.now_ms + STILL_MS {
            of_size.now_ms = now_ms;
            of_size.policy.request(&PolicyRequest { chain: &[], tenant: 0, now_ms });
        }
        let block = of_size.block(key);
        // Some policies change their balance when they are asked.
        of_size.policy.admits(&block, parent, false);
        of_size.policy.insert(&block, parent);
    }

    /// A block has gone.
    pub(crate) fn leave(&mut self, slot_bytes: usize, key: u64) {
        if let Some(of_size) = self.by_size.get_mut(&slot_bytes)
            && of_size.policy.contains(key)
        {
            of_size.policy.remove(key);
        }
    }

    /// Takes out the block that is worth least among those of a size that `may_leave`.
    pub(crate) fn evict(&mut self, slot_bytes: usize, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        self.by_size.get_mut(&slot_bytes)?.policy.evict(may_leave)
    }

    /// Whether the policy of the size knows the block as one that is here.
    pub(crate) fn contains(&self, slot_bytes: usize, key: u64) -> bool {
        self.by_size.get(&slot_bytes).is_some_and(|of_size| of_size.policy.contains(key))
    }

    /// Blocks of all sizes that the policies know as here.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.by_size.values().map(|of_size| of_size.policy.len()).sum()
    }

    /// What was learned, to be kept for the next run; `None` if there is nothing.
    pub(crate) fn note(&self) -> Option<Vec<u8>> {
        let mut notes: Vec<(u32, Vec<u8>)> =
            self.by_size.iter().map(|(bytes, of_size)| (*bytes as u32, of_size.policy.note())).collect();
        notes.retain(|(_, note)| !note.is_empty());
        // What is known of sizes that did not come up again stays, as far as there is room.
        let is_new = |bytes: u32| notes.iter().all(|(of, _)| *of != bytes);
        let kept: Vec<_> = self.learned.iter().filter(|(bytes, _)| is_new(*bytes)).cloned().collect();
        notes.extend(kept);
        notes.truncate(SIZES_MAX);
        (!notes.is_empty()).then(|| learned::encode(&notes))
    }

    /// Begins with what an earlier run had learned; false if the note can not be read. Before the first request.
    pub(crate) fn restore(&mut self, note: &[u8]) -> bool {
        let Some(learned) = learned::decode(note) else { return false };
        self.learned = learned;
        true
    }

    fn share_memories(&mut self) {
        let sizes = self.by_size.len();
        for (slot_bytes, of_size) in &mut self.by_size {
            of_size.policy.remember_at_most(remembered(self.capacity_bytes, *slot_bytes, sizes));
        }
    }

    fn of_size(&mut self, slot_bytes: usize) -> Option<&mut OfSize> {
        if !self.by_size.contains_key(&slot_bytes) && self.by_size.len() < SIZES_MAX {
            let mut policy = self.choice.build(self.capacity_bytes, self.config);
            let block_bytes = u32::try_from(slot_bytes).unwrap_or(u32::MAX);
            // Of a size that is new, what was learned of another one is better than nothing.
            let of_it = self.learned.iter().find(|(bytes, _)| *bytes == block_bytes).or(self.learned.first());
            if let Some((_, note)) = of_it
                && !policy.restore(note)
            {
                tracing::warn!(slot_bytes, "what the policy had learned can not be used; it begins anew");
            }
            self.by_size.insert(slot_bytes, OfSize { policy, block_bytes, now_ms: 0 });
            self.share_memories();
        }
        self.by_size.get_mut(&slot_bytes)
    }
}

/// Blocks that one of `sizes` policies remembers.
fn remembered(capacity_bytes: u64, slot_bytes: usize, sizes: usize) -> usize {
    let held = capacity_bytes / slot_bytes.max(1) as u64;
    (held.min(REMEMBERED as u64) as usize).max(REMEMBERED / sizes.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memories_of_all_sizes_together_are_bounded_by_the_memory_that_they_look_after() {
        assert_eq!(remembered(256 << 20, 65_536, 1), REMEMBERED, "one size has all, however small memory is");
        let small: usize = (1..=4).map(|size| remembered(256 << 20, size * 65_536, 4)).sum();
        assert_eq!(small, REMEMBERED, "sizes share in a small memory");
        assert_eq!(remembered(1 << 40, 4096, 16), REMEMBERED, "as many as there are, in a large one");
        assert_eq!(remembered(256 << 20, 16_384, 16), 16_384);
    }
}
