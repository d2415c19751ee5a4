//! Keeping the hot set: a walk through the blocks in DRAM, some at a time, and a few notes in the store. On the thread of
//! the policies, or that which closes; lookups wait for neither.

use std::time::{SystemTime, UNIX_EPOCH};

use super::rank::rank;
use super::{BLOCKS_MAX, Candidate, HotSet, piece};
use crate::inner::Inner;
use crate::residency::Residency;

/// Blocks that are looked at under one lock.
const STEP_BLOCKS: usize = 512;
/// Blocks that are put in order at most: about 100 bytes each for that moment.
const CANDIDATES_MAX: usize = 2 * BLOCKS_MAX;
/// If there are more, so many of them tell from which value on.
const SAMPLES: usize = 4096;

/// Ms since 1970.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Keeps what is in DRAM now, if anything was asked for or saved since the last time. As long as the blocks of the list
/// before are still on their way to DRAM that one stays. What can not be kept is found out anew.
pub(crate) fn keep(inner: &Inner) {
    let activity = inner.requests.counted.get() + inner.counters.saved_blocks.get();
    if !inner.warm_start.may_keep(activity) {
        return;
    }
    let Some(store) = inner.drive.store().filter(|store| store.poison_reason().is_none()) else { return };
    let candidates = candidates(&inner.residency, CANDIDATES_MAX);
    let written_unix_ms = inner.warm_start.next_list(unix_ms());
    let set = HotSet { written_unix_ms, blocks: rank(&candidates, BLOCKS_MAX) };
    for (number, note) in piece::encode(&set).iter().enumerate() {
        if let Err(error) = store.put_note(&piece::name(number), note) {
            tracing::debug!(%error, "which blocks are hot could not be kept");
            return;
        }
    }
    inner.warm_start.kept(activity, set.blocks.len());
    tracing::debug!(blocks = set.blocks.len(), "which blocks are hot was kept");
}

/// At most `most` blocks in DRAM, the most valuable ones.
fn candidates(residency: &Residency, most: usize) -> Vec<Candidate> {
    let (blocks, ..) = residency.gauges();
    let least = if blocks as usize <= most { 0 } else { least_value(residency, blocks as usize, most) };
    let mut candidates = Vec::new();
    each(residency, |candidate| {
        if candidate.value >= least && candidates.len() < most {
            candidates.push(*candidate);
        }
    });
    candidates
}

/// About `most` blocks have at least this value.
fn least_value(residency: &Residency, blocks: usize, most: usize) -> u64 {
    let every = blocks.div_ceil(SAMPLES);
    let (mut values, mut number) = (Vec::with_capacity(SAMPLES), 0);
    each(residency, |candidate| {
        if number % every == 0 {
            values.push(candidate.value);
        }
        number += 1;
    });
    values.sort_unstable_by(|a, b| b.cmp(a));
    // The others are shards beyond the first.
    let share = most.min(number) * values.len() / number.max(1);
    values.get(share.saturating_sub(1)).copied().filter(|_| number > most).unwrap_or(0)
}

fn each(residency: &Residency, mut call: impl FnMut(&Candidate)) {
    let (mut after, mut step) = (None, Vec::with_capacity(STEP_BLOCKS));
    loop {
        step.clear();
        after = residency.survey(after, STEP_BLOCKS, &mut step);
        step.iter().for_each(&mut call);
        if after.is_none() {
            return;
        }
    }
}
