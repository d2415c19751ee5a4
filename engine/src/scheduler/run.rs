//! The thread that hands requests to the policies, and keeps what they learned. It sleeps while nobody asks for anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_tiers::{NamespaceHandle, RecordId};

use super::requests::{Asked, Next, Repeats};
use crate::hot_set;
use crate::inner::Inner;

/// The name of what the policies have learned, in the store.
pub(crate) const LEARNED_NOTE: &str = "policy";
/// What was learned is kept so long after the first request that taught something.
const KEEP_INTERVAL: Duration = Duration::from_secs(300);

/// After so many requests it is looked how well blocks are compressed.
const CAPACITY_REQUESTS: u64 = 64;

/// The body of the thread.
pub(crate) fn run(inner: &Arc<Inner>) {
    let start = Instant::now();
    let mut repeats = Repeats::new();
    let hot_set_interval = inner.config.nvme.as_ref().map(|nvme| Duration::from_secs(nvme.hot_set_interval_s));
    let (mut keep_at, mut keep_hot_at) = (None, None);
    loop {
        let next_at = [keep_at, keep_hot_at].into_iter().flatten().min();
        match inner.requests.next(next_at) {
            Next::Closed => return,
            Next::Time => {}
            Next::Asked(asked) => {
                let now_ms = start.elapsed().as_millis() as u64;
                if !repeats.is_repeat(&asked, now_ms) {
                    if asked.place.namespace != NamespaceHandle(0) {
                        inner.curve.request(&asked, now_ms);
                    }
                    inner.residency.request(&asked);
                    tell_drive_policy(inner, &asked);
                    inner.requests.counted.add(1);
                    keep_at = keep_at.or(Some(Instant::now() + KEEP_INTERVAL));
                    keep_hot_at = keep_hot_at.or(hot_set_interval.map(|interval| Instant::now() + interval));
                }
                inner.requests.hand();
                inner.fetches.wake();
            }
        }
        let now = Instant::now();
        if keep_at.take_if(|at| *at <= now).is_some() {
            keep_learned(inner);
        }
        if keep_hot_at.take_if(|at| *at <= now).is_some() {
            hot_set::keep(inner);
        }
    }
}

fn tell_drive_policy(inner: &Inner, asked: &Asked) {
    let Some(policy) = &inner.drive_policy else { return };
    if inner.requests.counted.get().is_multiple_of(CAPACITY_REQUESTS) {
        policy.set_capacity(inner.store_payload_bytes());
    }
    let store = inner.drive.store();
    let fingerprint = |place: &RecordId, prefix| match &store {
        Some(store) => store.fingerprint_of(place, prefix),
        None => place.fingerprint_of(prefix),
    };
    policy.request(asked, &fingerprint, &|fingerprint| store.as_ref()?.has_fingerprint(fingerprint));
}

/// Keeps what was learned in the store, if there is one and anything was asked for. What can not be kept is learned again.
pub(crate) fn keep_learned(inner: &Inner) {
    if inner.requests.counted.get() == 0 {
        return;
    }
    let Some(store) = inner.drive.store().filter(|store| store.poison_reason().is_none()) else { return };
    let Some(note) = inner.residency.learned() else { return };
    if let Err(error) = store.put_note(LEARNED_NOTE, &note) {
        tracing::debug!(%error, "what the policy has learned could not be kept");
    }
}
