//! Looks: while found blocks are computed because the drives look slow, a few of them are fetched now and then to see
//! whether they still are. What is read stays in DRAM, where the next lookup finds it.

use std::sync::{Arc, Weak};
use std::time::Instant;

use pegaflow_tiers::{Location, RecordId, Store};

use crate::api::InstanceId;
use crate::fetch::{FetchReason, FetchWish};
use crate::inner::Inner;
use crate::lease::Hit;

/// The most reads of one look.
const READS_MAX: usize = 64;

/// Fetches at least one and about `bytes` (of blocks of `block_bytes`) of what was found on the drive. How that ended the instance's arbiter is told in
/// any case.
pub(crate) fn look(
    inner: &Inner,
    instance: &InstanceId,
    (bytes, block_bytes): (u64, u64),
    hits: impl Iterator<Item = Hit>,
    store: Option<&Arc<Store>>,
) {
    let mut left = bytes;
    let on_drive = hits.filter_map(|hit| hit.location().map(|location| (hit.id(), location)));
    let wanted = |(_, location): &(RecordId, Location)| {
        let is_wanted = left > 0;
        left = left.saturating_sub(location.bytes());
        is_wanted
    };
    let (choice, instance) = (Arc::clone(&inner.load_choice), instance.clone());
    let wish = FetchWish {
        store: store.map_or_else(Weak::new, Arc::downgrade),
        reads: on_drive.take_while(wanted).take(READS_MAX).collect(),
        block_bytes,
        reason: FetchReason::LookAside,
        asked: 0,
        asked_at: Some(inner.residency.tick()),
        deadline: Instant::now() + inner.config.load_timeout(),
        done: Some(Box::new(move |end| {
            let took = Some(end.took).filter(|_| end.is_whole && end.bytes > 0);
            choice.was_read(&instance, took.map_or(0, |_| end.bytes), end.beside_bytes, took);
        })),
    };
    if let Err(error) = inner.fetches.push(wish) {
        tracing::debug!(%error, "no look at the drive");
    }
}
