//! The residency as a purge sees it: a namespace is given up at once, and what of it is in use goes when it is let go. And as
//! an eviction does: what may leave leaves.

use std::collections::HashMap;
use std::ops::Bound;

use pegaflow_tiers::{NamespaceHandle, RecordId};

use super::{Meant, Residency, Resident, State};

/// How many blocks are looked at, or given up, under one lock.
pub(super) const BLOCKS_AT_ONCE: usize = 1024;

/// Blocks of a namespace in DRAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct InDram {
    pub(crate) blocks: u64,
    /// Bytes of their payloads.
    pub(crate) bytes: u64,
    /// Those of them that are pinned.
    pub(crate) pinned_blocks: u64,
    pub(crate) pinned_bytes: u64,
}

impl Residency {
    /// Gives up all blocks under a number: from the beginning nobody finds them, and none comes. Whoever holds one keeps its
    /// bytes as long as he does.
    pub(crate) fn purge(&self, namespace: NamespaceHandle) -> InDram {
        self.state.lock().purged.insert(namespace);
        self.unpin(|_, block| block.id.namespace == namespace);
        self.take_out(|block| block.id.namespace == namespace, |_, _| true).0
    }

    /// Has all blocks leave that are meant and may: not those that the store does not have yet, and not those that somebody
    /// holds, which are counted second.
    pub(crate) fn evict(&self, meant: &Meant) -> (InDram, u64) {
        self.take_out(|block| meant.is(block), State::may_leave)
    }

    /// Takes out those of such blocks that may go; what they had, and how many stay.
    fn take_out(
        &self,
        is_meant: impl Fn(&Resident) -> bool,
        may_go: impl Fn(&State, &RecordId) -> bool,
    ) -> (InDram, u64) {
        let (mut dropped, mut kept, mut after) = (InDram::default(), 0, None);
        loop {
            let mut policies = self.policies.lock();
            let mut state = self.state.lock();
            let (mut ids, last) = state.piece(after, &is_meant);
            let found = ids.len();
            ids.retain(|id| may_go(&state, id));
            kept += (found - ids.len()) as u64;
            let gone: Vec<_> = ids.iter().filter_map(|id| state.detach(id, &mut policies)).collect();
            drop((state, policies));
            dropped.blocks += gone.len() as u64;
            dropped.bytes += gone.iter().map(|block| block.payload_bytes).sum::<u64>();
            // Slots go back to the arena here, outside of the locks.
            drop(gone);
            after = last;
            if after.is_none() {
                self.notify_room();
                return (dropped, kept);
            }
        }
    }

    /// A number is in use again: its purge had not become durable when the store was opened anew.
    pub(crate) fn revive(&self, namespace: NamespaceHandle) {
        self.state.lock().purged.remove(&namespace);
    }

    /// Whether a number was purged.
    pub(crate) fn is_purged(&self, namespace: NamespaceHandle) -> bool {
        self.state.lock().is_purged(namespace)
    }

    /// What is here of each namespace.
    pub(crate) fn by_namespace(&self) -> HashMap<NamespaceHandle, InDram> {
        let mut counted: HashMap<NamespaceHandle, InDram> = HashMap::new();
        let mut after: Option<(u32, RecordId)> = None;
        loop {
            let state = self.state.lock();
            let places = state.by_chunk.range((after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded));
            let places: Vec<_> = places.take(BLOCKS_AT_ONCE).copied().collect();
            for block in places.iter().filter_map(|(_, id)| state.find(id)) {
                let here = counted.entry(block.id.namespace).or_default();
                here.blocks += 1;
                here.bytes += block.payload_bytes;
                if block.is_pinned() {
                    here.pinned_blocks += 1;
                    here.pinned_bytes += block.payload_bytes;
                }
            }
            drop(state);
            after = places.last().copied();
            if places.len() < BLOCKS_AT_ONCE {
                return counted;
            }
        }
    }
}

impl State {
    /// Whether a number was purged.
    pub(super) fn is_purged(&self, namespace: NamespaceHandle) -> bool {
        !self.purged.is_empty() && self.purged.contains(&namespace)
    }

    /// Those of the next blocks that are meant, and where to go on; `None` after the last.
    pub(super) fn piece(
        &self,
        after: Option<(u32, RecordId)>,
        is_meant: impl Fn(&Resident) -> bool,
    ) -> (Vec<RecordId>, Option<(u32, RecordId)>) {
        let places = self.by_chunk.range((after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded));
        let places: Vec<_> = places.take(BLOCKS_AT_ONCE).copied().collect();
        let last = places.last().copied().filter(|_| places.len() == BLOCKS_AT_ONCE);
        let is_meant = |id: &RecordId| self.blocks.get(id).is_some_and(|block| is_meant(block));
        (places.into_iter().map(|(_, id)| id).filter(is_meant).collect(), last)
    }
}
