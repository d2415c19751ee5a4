//! What a lookup found on the drive for a request that waits: it is fetched before the load asks for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use pegaflow_tiers::{Location, RecordId, Store};

use crate::api::{InstanceId, LookupRequest};
use crate::fetch::{FetchReason, FetchWish};
use crate::inner::Inner;
use crate::lease::Hit;

/// What is to be read, in the order of the chain, all shards of a block together. Not what the asker has itself.
pub(super) fn reads(request: &LookupRequest, shards: &HashMap<u16, Vec<Hit>>) -> Vec<(RecordId, Location)> {
    let first = request.question.as_ref().map_or(0, |question| question.first_block as usize);
    let found = shards.values().map(Vec::len).min().unwrap_or(0);
    let of_block = |index: usize| shards.values().filter_map(move |hits| hits.get(index));
    let on_drive = (first..found).flat_map(of_block);
    on_drive.filter_map(|hit| Some((hit.id(), hit.location()?))).collect()
}

/// Leaves the wish, if there is anything to read and none is left for this request already. Microseconds until all of it is
/// expected to be in DRAM; 0 if that is not known.
pub(super) fn fetch(
    inner: &Inner,
    instance: &InstanceId,
    store: &Arc<Store>,
    reads: Vec<(RecordId, Location)>,
    block_bytes: u64,
    (reason, asked): (FetchReason, u64),
    deadline: Instant,
) -> u64 {
    if reads.is_empty() {
        return 0;
    }
    // A repeated lookup must not send its request to the end of the queue.
    if inner.fetches.left_bytes(reason).is_none() {
        let (choice, instance) = (Arc::clone(&inner.load_choice), instance.clone());
        let wish = FetchWish {
            store: Arc::downgrade(store),
            reads,
            block_bytes,
            reason,
            asked,
            asked_at: Some(inner.residency.tick()),
            deadline,
            done: Some(Box::new(move |end| {
                if end.is_whole {
                    choice.was_fetched(&instance, end.bytes, end.beside_bytes, end.took);
                }
            })),
        };
        if let Err(error) = inner.fetches.push(wish) {
            tracing::debug!(%error, "nothing is fetched ahead");
        }
    }
    let drives = store.drive_speeds();
    let is_known = !drives.is_empty() && drives.iter().all(|drive| drive.read_bytes_per_second > 0);
    let bytes_per_second: u64 = drives.iter().map(|drive| drive.read_bytes_per_second).sum();
    // What loads still have to read goes first.
    let left = inner.fetches.left_bytes(reason).map(|left| left + inner.load_choice.queued_bytes());
    left.filter(|_| is_known).map_or(0, |left| (left as f64 / bytes_per_second as f64 * 1e6) as u64 + 1)
}
