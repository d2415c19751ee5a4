//! The policies of DRAM: one for each size of block, since a block makes room only for others of its size. Sizes beyond
//! the first few, and objects of sizes that no block has, have none: they leave least recently used first. Each tenant has
//! a policy of its own for each size: who gives way its shares say, which of its blocks its policy.

use std::collections::{BTreeMap, HashMap};

use crate::policy::{BlockMemory, Build, PegaflowConfig, Policy, PolicyBlock, PolicyChoice, PolicyRequest};

use super::learned;
use super::shares::Shares;

/// Sizes that have a policy of their own, at most. A host serves a few models of a few groups each.
const SIZES_MAX: usize = 16;
/// Blocks that left and are remembered, of all sizes together; but of each size as many as memory holds, up to this
/// number. So what the policies take stays small beside the memory that they look after, and one size alone has all.
const REMEMBERED: usize = 1 << 16;
/// Time goes on for a policy without requests when something comes to it after so long.
const STILL_MS: u64 = 1000;

/// Ms since any fixed time.
pub type Clock = Box<dyn Fn() -> u64 + Send>;

struct OfTenant {
    policy: Box<dyn Policy>,
    now_ms: u64,
}

/// The policies of a size, by account.
struct OfSize {
    block_bytes: u32,
    tenants: BTreeMap<u64, OfTenant>,
}

/// What stays in a memory that several tenants share, see the module.
pub struct SizePolicies {
    choice: PolicyChoice,
    config: PegaflowConfig,
    capacity_bytes: u64,
    clock: Clock,
    by_size: BTreeMap<usize, OfSize>,
    shares: Shares,
    /// What an earlier run had learned of each size.
    learned: Vec<(u32, Vec<u8>)>,
    /// The past of blocks that are about to come back from an earlier run.
    expected: HashMap<u64, BlockMemory, Build>,
    chain: Vec<PolicyBlock>,
}

impl SizePolicies {
    /// Empty policies for a memory of `capacity_bytes`.
    pub fn new(choice: PolicyChoice, config: PegaflowConfig, capacity_bytes: u64, clock: Clock) -> Self {
        let (by_size, learned, expected, chain) = (BTreeMap::new(), Vec::new(), HashMap::default(), Vec::new());
        let shares = Shares::new(capacity_bytes);
        Self { choice, config, capacity_bytes, clock, by_size, shares, learned, expected, chain }
    }

    /// Whether the policies take the blocks of a request from the last to the first.
    pub fn take_last_first(&self) -> bool {
        self.choice != PolicyChoice::Pegaflow
    }

    /// A request for a chain of blocks, by their fingerprints, each of which takes `slot_bytes`. Objects (`is_block` is
    /// false) make no policy for their size.
    pub fn request(&mut self, slot_bytes: usize, is_block: bool, tenant: u64, keys: impl Iterator<Item = u64>) {
        let now_ms = (self.clock)();
        if !is_block && !self.by_size.contains_key(&slot_bytes) {
            return;
        }
        let mut chain = std::mem::take(&mut self.chain);
        let account = self.shares.open(tenant);
        self.shares.ask(account, now_ms);
        if let Some(OfTenant { policy, now_ms: last_ms }) = self.of_tenant(slot_bytes, account) {
            chain.clear();
            chain.extend(keys.map(|key| block(key, slot_bytes)));
            *last_ms = now_ms;
            policy.request(&PolicyRequest { chain: &chain, tenant, now_ms });
            if policy.takes_last_first() {
                let here = chain.iter().rev().filter(|block| policy.contains(block.key));
                let here: Vec<u64> = here.map(|block| block.key).collect();
                here.into_iter().for_each(|key| policy.touch(key));
            }
        }
        self.chain = chain;
    }

    /// A tenant's block is here and may leave from now on; objects are those of tenant 0. As in [`SizePolicies::request`].
    pub fn enter(&mut self, slot_bytes: usize, key: u64, parent: Option<u64>, tenant: u64) {
        let now_ms = (self.clock)();
        if tenant == 0 && !self.by_size.contains_key(&slot_bytes) {
            return;
        }
        let past = self.expected.remove(&key);
        let account = self.shares.open(tenant);
        let Some(OfTenant { policy, now_ms: last_ms }) = self.of_tenant(slot_bytes, account) else { return };
        if policy.contains(key) {
            return;
        }
        if now_ms >= *last_ms + STILL_MS {
            *last_ms = now_ms;
            policy.request(&PolicyRequest { chain: &[], tenant: 0, now_ms });
        }
        let block = block(key, slot_bytes);
        // Some policies change their balance when they are asked.
        policy.admits(&block, parent, false);
        // What a request has said since the start is newer.
        let past = past.filter(|_| policy.memory(key).is_none());
        policy.insert(&block, parent);
        if let Some(past) = past {
            policy.recall(key, &past);
        }
        self.shares.enter(account, slot_bytes as u64);
    }

    /// The past of blocks that are about to come, by key.
    pub(crate) fn await_past(&mut self, memories: impl Iterator<Item = (u64, BlockMemory)>) {
        self.expected.extend(memories);
    }

    /// Those that have not come by now do not come.
    pub(crate) fn forget_past(&mut self) {
        self.expected = HashMap::default();
    }

    /// What a place is worth to a tenant's block, see [`Policy::worth`].
    pub(crate) fn worth(&mut self, slot_bytes: usize, key: u64, tenant: u64) -> Option<f32> {
        let account = self.shares.account(tenant);
        let of_tenant = self.by_size.get_mut(&slot_bytes)?.tenants.get_mut(&account)?;
        of_tenant.policy.worth(&block(key, slot_bytes))
    }

    /// The past of a tenant's block, see [`Policy::memory`].
    pub(crate) fn memory(&self, slot_bytes: usize, key: u64, tenant: u64) -> Option<BlockMemory> {
        let of_tenant = self.by_size.get(&slot_bytes)?.tenants.get(&self.shares.account(tenant))?;
        of_tenant.policy.memory(key)
    }

    /// A tenant's block has gone.
    pub(crate) fn leave(&mut self, slot_bytes: usize, key: u64, tenant: u64) {
        let account = self.shares.account(tenant);
        let of_size = self.by_size.get_mut(&slot_bytes);
        if let Some(of_tenant) = of_size.and_then(|of_size| of_size.tenants.get_mut(&account))
            && of_tenant.policy.contains(key)
        {
            of_tenant.policy.remove(key);
            self.shares.leave(account, slot_bytes as u64);
        }
    }

    /// Takes out the block that is worth least among those of a size that `may_leave`, of the tenant that is most above its
    /// guarantee and has one. Who is within its guarantee loses a block only if no other may leave.
    pub fn evict(&mut self, slot_bytes: usize, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let of_size = self.by_size.get_mut(&slot_bytes)?;
        let shares = &mut self.shares;
        let mut evict_of = |account: u64, shares: &mut Shares| {
            let victim = of_size.tenants.get_mut(&account)?.policy.evict(may_leave)?;
            shares.leave(account, slot_bytes as u64);
            Some(victim)
        };
        let now_ms = (self.clock)();
        // Most often it has one: the order of all is for when it has not.
        let first = shares.first_to_give_way(now_ms)?;
        evict_of(first, shares).or_else(|| {
            let order = shares.give_way(now_ms).into_iter().filter(|account| *account != first);
            order.into_iter().find_map(|account| evict_of(account, shares))
        })
    }

    /// Takes out the block that is worth least to the newcomer's own tenant, if that is less than the newcomer, see
    /// [`Policy::evict_for`].
    pub(crate) fn evict_for(
        &mut self,
        slot_bytes: usize,
        (newcomer, tenant): (u64, u64),
        least: f32,
        may_leave: &mut dyn FnMut(u64) -> bool,
    ) -> Option<u64> {
        let account = self.shares.account(tenant);
        let of_tenant = self.by_size.get_mut(&slot_bytes)?.tenants.get_mut(&account)?;
        let victim = of_tenant.policy.evict_for(&block(newcomer, slot_bytes), least, may_leave)?;
        self.shares.leave(account, slot_bytes as u64);
        Some(victim)
    }

    /// Whether the policy of the size knows a tenant's block as one that is here.
    pub fn contains(&self, slot_bytes: usize, key: u64, tenant: u64) -> bool {
        let of_tenant = self.by_size.get(&slot_bytes).and_then(|of| of.tenants.get(&self.shares.account(tenant)));
        of_tenant.is_some_and(|of_tenant| of_tenant.policy.contains(key))
    }

    /// Blocks of all sizes that the policies know as here.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.by_size.values().flat_map(|of_size| of_size.tenants.values()).map(|of| of.policy.len()).sum()
    }

    /// What was learned, to be kept for the next run; `None` if there is nothing.
    pub(crate) fn note(&self) -> Option<Vec<u8>> {
        let mut notes: Vec<(u32, Vec<u8>)> =
            self.by_size.iter().map(|(bytes, of_size)| (*bytes as u32, of_size.note())).collect();
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
        let policies = self.by_size.values().map(|of_size| of_size.tenants.len()).sum();
        for (slot_bytes, of_size) in &mut self.by_size {
            let of_each_bytes = self.capacity_bytes / of_size.tenants.len().max(1) as u64;
            let most = remembered(of_each_bytes, *slot_bytes, policies);
            of_size.tenants.values_mut().for_each(|of_tenant| of_tenant.policy.remember_at_most(most));
        }
    }

    fn of_tenant(&mut self, slot_bytes: usize, account: u64) -> Option<&mut OfTenant> {
        if !self.by_size.contains_key(&slot_bytes) && self.by_size.len() >= SIZES_MAX {
            return None;
        }
        let block_bytes = u32::try_from(slot_bytes).unwrap_or(u32::MAX);
        let fresh = || OfSize { block_bytes, tenants: BTreeMap::new() };
        let of_size = self.by_size.entry(slot_bytes).or_insert_with(fresh);
        if !of_size.tenants.contains_key(&account) {
            let mut policy = self.choice.build(self.capacity_bytes, self.config);
            // Of a size that is new, what was learned of another one is better than nothing.
            let of_it = self.learned.iter().find(|(bytes, _)| *bytes == of_size.block_bytes).or(self.learned.first());
            if let Some((_, note)) = of_it
                && !policy.restore(note)
            {
                tracing::warn!(slot_bytes, "what the policy had learned can not be used; it begins anew");
            }
            of_size.tenants.insert(account, OfTenant { policy, now_ms: 0 });
            self.share_memories();
        }
        self.by_size.get_mut(&slot_bytes)?.tenants.get_mut(&account)
    }
}

impl OfSize {
    /// What the policy learned whose tenant has most blocks.
    fn note(&self) -> Vec<u8> {
        let most = self.tenants.values().max_by_key(|of_tenant| of_tenant.policy.len());
        most.map(|of_tenant| of_tenant.policy.note()).unwrap_or_default()
    }
}

fn block(key: u64, slot_bytes: usize) -> PolicyBlock {
    PolicyBlock { key, bytes: u32::try_from(slot_bytes).unwrap_or(u32::MAX) }
}

/// Blocks that one of `policies` remembers, whose tenant may have so much of the memory.
fn remembered(capacity_bytes: u64, slot_bytes: usize, policies: usize) -> usize {
    let held = capacity_bytes / slot_bytes.max(1) as u64;
    (held.min(REMEMBERED as u64) as usize).max(REMEMBERED / policies.max(1))
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
