//! The residency as the hot set sees it: what is here and what it is worth, and blocks that come back from an earlier run.

use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use pegaflow_tiers::{NamespaceHandle, RecordId};

use super::{Residency, Resident};
use crate::fetch::FetchReason;
use crate::hot_set::Candidate;
use crate::known_namespaces::BESIDE_STORE;
use crate::policy::BlockMemory;

/// Where a survey goes on.
pub(crate) type SurveyPlace = (u32, RecordId);

impl Residency {
    /// Looks at the next blocks, at most `most` at a time, so that nobody waits long; `found` gets those that can be brought
    /// back after a restart, shard 0 of each. Returns where to go on, `None` after the last.
    pub(crate) fn survey(
        &self,
        after: Option<SurveyPlace>,
        most: usize,
        found: &mut Vec<Candidate>,
    ) -> Option<SurveyPlace> {
        let from = found.len();
        let mut slots = Vec::with_capacity(most);
        let state = self.state.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut last = None;
        for place in state.by_chunk.range((start, Bound::Unbounded)).take(most) {
            last = Some(*place);
            let id = place.1;
            // Numbers that are given beside the store are others after the next start.
            let is_meant = id.shard == 0 && id.namespace != NamespaceHandle(0) && id.namespace.0 < BESIDE_STORE;
            let Some(block) = state.blocks.get(&id).filter(|_| is_meant) else { continue };
            let slot_bytes = block.slot.bytes();
            let tick = state.order.get(&slot_bytes).and_then(|order| order.peek(&id)).copied().unwrap_or(0);
            // What somebody keeps here is to be the first that comes back.
            let value = if block.is_pinned() { u64::MAX } else { tick };
            let (parent, depth) = (block.parent, block.depth);
            found.push(Candidate { id, parent, depth, value, memory: BlockMemory::default() });
            slots.push(slot_bytes);
        }
        drop(state);
        if !self.is_ordered {
            let mut policies = self.policies.lock();
            for (candidate, slot_bytes) in found.iter_mut().skip(from).zip(slots) {
                let (key, tenant) = (candidate.id.fingerprint(), candidate.id.namespace.0.into());
                if candidate.value < u64::MAX {
                    let worth = policies.worth(slot_bytes, key, tenant);
                    candidate.value = worth.map_or(0, |worth| worth.max(0.0).to_bits().into());
                }
                candidate.memory = policies.memory(slot_bytes, key, tenant).unwrap_or_default();
            }
        }
        last
    }

    /// The past of blocks that are about to come, by fingerprint: the policies get to know it with them.
    pub(crate) fn recall(&self, memories: impl Iterator<Item = (u64, BlockMemory)>) {
        self.policies.lock().await_past(memories);
    }

    /// Nobody comes any more whose past was told.
    pub(crate) fn end_recall(&self) {
        self.policies.lock().forget_past();
    }

    /// These blocks have come back, most valuable first: as long as nobody uses them they are colder than all that was
    /// used, the last one coldest.
    pub(crate) fn settle<'a>(&self, ids: impl Iterator<Item = &'a RecordId>) {
        let mut state = self.state.lock();
        for id in ids {
            let is_meant = |block: &&Arc<Resident>| block.is_fetched_for(FetchReason::HotSet) && !block.is_pinned();
            if let Some(block) = state.blocks.get(id).filter(is_meant) {
                let slot_bytes = block.slot.bytes();
                state.put_coldest(id, slot_bytes);
            }
        }
        drop(state);
        while self.enter(&mut self.policies.lock()) {}
    }

    /// How often there may have come to be room; to be asked before looking for it.
    pub(crate) fn room_changes(&self) -> u64 {
        self.room.changes()
    }

    /// Waits until there may be more room than at that moment, at most until `deadline`.
    pub(crate) fn wait_for_room(&self, seen: u64, deadline: Instant) {
        self.room.wait(seen, deadline);
    }
}
