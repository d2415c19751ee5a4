//! The thread that hands requests to the policies, and keeps what they learned. It sleeps while nobody asks for anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::requests::{Next, Repeats};
use crate::inner::Inner;

/// The name of what the policies have learned, in the store.
pub(crate) const LEARNED_NOTE: &str = "policy";
/// What was learned is kept so long after the first request that taught something.
const KEEP_INTERVAL: Duration = Duration::from_secs(300);

/// The body of the thread.
pub(crate) fn run(inner: &Arc<Inner>) {
    let start = Instant::now();
    let mut repeats = Repeats::new();
    let mut keep_at = None;
    loop {
        match inner.requests.next(keep_at) {
            Next::Closed => return,
            Next::Time => {
                keep_learned(inner);
                keep_at = None;
            }
            Next::Asked(asked) => {
                if !repeats.is_repeat(&asked, start.elapsed().as_millis() as u64) {
                    inner.residency.request(&asked);
                    inner.requests.counted.add(1);
                    keep_at = keep_at.or(Some(Instant::now() + KEEP_INTERVAL));
                }
                if keep_at.is_some_and(|at| at <= Instant::now()) {
                    keep_learned(inner);
                    keep_at = None;
                }
            }
        }
    }
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
