//! The order of the hot set: by worth, and no block before its ancestors. Pure.

use std::cmp::Reverse;
use std::collections::HashMap;

use pegaflow_tiers::{BlockKey, RecordId};

use super::HotBlock;
use crate::policy::{BlockMemory, Build};

/// A block in DRAM, as it was when it was looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    /// Shard 0 of it.
    pub(crate) id: RecordId,
    pub(crate) parent: BlockKey,
    /// Blocks before it in its chain.
    pub(crate) depth: u32,
    /// The more the better. Only the order counts.
    pub(crate) value: u64,
    pub(crate) memory: BlockMemory,
}

/// At most `most` blocks, most valuable first. A block is worth at least what those after it are, since without it they
/// are worth nothing; blocks of which an ancestor is missing are left out.
pub(super) fn rank(candidates: &[Candidate], most: usize) -> Vec<HotBlock> {
    let mut by_id: HashMap<RecordId, usize, Build> = HashMap::default();
    by_id.extend(candidates.iter().enumerate().map(|(at, candidate)| (candidate.id, at)));
    let mut by_depth: Vec<usize> = by_id.values().copied().collect();
    by_depth.sort_unstable_by_key(|at| candidates.get(*at).map(|candidate| (candidate.depth, candidate.id)));
    // Whoever tells the depth wrong has no parent here: each is less deep than those after it.
    let parent_of = |candidate: &Candidate| {
        let at = *by_id.get(&candidate.id.with_key(candidate.parent))?;
        candidates.get(at).filter(|parent| parent.depth < candidate.depth).map(|_| at)
    };
    let mut is_whole = vec![false; candidates.len()];
    let mut values: Vec<u64> = candidates.iter().map(|candidate| candidate.value).collect();
    for &at in &by_depth {
        let Some(candidate) = candidates.get(at) else { continue };
        let whole = candidate.parent.is_root()
            || parent_of(candidate).is_some_and(|parent| is_whole.get(parent).copied().unwrap_or(false));
        if let Some(is_whole) = is_whole.get_mut(at) {
            *is_whole = whole;
        }
    }
    for &at in by_depth.iter().rev() {
        let (Some(candidate), Some(value)) = (candidates.get(at), values.get(at).copied()) else { continue };
        if is_whole.get(at) == Some(&true)
            && let Some(of_parent) = parent_of(candidate).and_then(|parent| values.get_mut(parent))
        {
            *of_parent = value.max(*of_parent);
        }
    }
    let mut ranked = by_depth;
    ranked.retain(|at| is_whole.get(*at) == Some(&true));
    // Stable: of equal ones the less deep comes first, as they stand.
    ranked.sort_by_key(|at| Reverse(values.get(*at).copied()));
    ranked.truncate(most);
    let mut places = vec![None; candidates.len()];
    let mut blocks = Vec::with_capacity(ranked.len());
    for at in ranked {
        let Some(candidate) = candidates.get(at) else { continue };
        let parent = parent_of(candidate).and_then(|parent| places.get(parent).copied().flatten());
        if let Some(place) = places.get_mut(at) {
            *place = Some(blocks.len() as u32);
        }
        blocks.push(HotBlock { id: candidate.id, parent, memory: candidate.memory });
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::SplitMix;
    use pegaflow_tiers::{KeyChain, NamespaceHandle};

    fn id(key: BlockKey) -> RecordId {
        RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key }
    }

    fn chain(first: u32, values: &[u64]) -> Vec<Candidate> {
        let mut keys = KeyChain::new();
        let candidate = |(depth, value): (usize, &u64)| {
            let parent = keys.parent();
            let id = id(keys.next(&[first, depth as u32], b""));
            Candidate { id, parent, depth: depth as u32, value: *value, memory: BlockMemory::default() }
        };
        values.iter().enumerate().map(candidate).collect()
    }

    #[test]
    fn a_block_is_worth_what_those_after_it_are() {
        let (cold, hot, warm) = (chain(1, &[3, 3]), chain(2, &[1, 1, 9]), chain(3, &[5]));
        let all = [&cold[..], &hot, &warm].concat();
        let ids: Vec<RecordId> = rank(&all, 100).iter().map(|block| block.id).collect();
        let expected: Vec<RecordId> = [&hot[..], &warm, &cold].concat().iter().map(|block| block.id).collect();
        assert_eq!(ids, expected);
        let parents: Vec<_> = rank(&all, 100).iter().map(|block| block.parent).collect();
        assert_eq!(parents, [None, Some(0), Some(1), None, None, Some(4)]);
        assert_eq!(rank(&all, 4).len(), 4);
    }

    #[test]
    fn without_an_ancestor_nothing_counts() {
        let mut all = chain(1, &[9, 9, 9, 9]);
        all.remove(1);
        assert_eq!(rank(&all, 100).len(), 1);
        // One that says that it comes before its own ancestor, and the same block twice.
        let mut all = chain(1, &[9, 9, 9]);
        all[1].depth = 0;
        all.push(all[0]);
        assert_eq!(rank(&all, 100).len(), 1);
    }

    #[test]
    fn no_block_comes_before_its_parent() {
        for seed in 1..200 {
            let mut random = SplitMix::new(seed);
            let mut all = Vec::new();
            for first in 0..random.below(20) as u32 {
                let values: Vec<u64> = (0..random.below(12)).map(|_| random.below(5) as u64).collect();
                all.extend(chain(first, &values));
            }
            for _ in 0..random.below(4).min(all.len()) {
                all.swap_remove(random.below(all.len()));
            }
            let most = random.below(100);
            let blocks = rank(&all, most);
            assert!(blocks.len() <= most, "seed {seed}");
            for (at, block) in blocks.iter().enumerate() {
                let candidate = all.iter().find(|candidate| candidate.id == block.id).expect("one of them");
                match block.parent {
                    None => assert!(candidate.parent.is_root(), "seed {seed}"),
                    Some(parent) => {
                        assert!((parent as usize) < at, "seed {seed}");
                        assert_eq!(blocks[parent as usize].id.key, candidate.parent, "seed {seed}");
                    }
                }
            }
        }
    }
}
