//! The thread that scrubs the store: reads every record once in a while and checks it, so that decay is found before
//! somebody wants the record. Slow, and only while nobody else asks anything of the drive; rests between two passes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use pegaflow_tiers::{ScrubPace, Store};

use crate::inner::Inner;

/// After an open the drive has other things to do.
const START_PAUSE: Duration = Duration::from_secs(5);
/// From the end of a pass to the beginning of the next one.
const PASS_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// While somebody uses the drive it is looked again after this time.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// A drive that is always in use is scrubbed all the same: one piece after so long.
const BUSY_MAX: Duration = Duration::from_secs(5);

/// While nothing is to be scrubbed it is looked so often whether that has changed.
const OFF_PAUSE: Duration = Duration::from_secs(60);

/// The body of the thread; see [`Inner::scrub_rate`].
pub(crate) fn scrub(inner: &Arc<Inner>) {
    let tier = &inner.drive;
    let mut rest = START_PAUSE;
    while tier.rest(rest) {
        rest = START_PAUSE;
        if inner.scrub_rate.load(Ordering::Relaxed) == 0 {
            rest = OFF_PAUSE;
            continue;
        }
        let Some(store) = tier.store().filter(|_| tier.degraded().is_none()) else { continue };
        let last = store.last_scrub_unix_ms().unwrap_or(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        // A clock that was set back must not put it off for ever.
        let due_in = (Duration::from_millis(last) + PASS_INTERVAL).saturating_sub(Duration::from_millis(now));
        if !due_in.is_zero() && last > 0 {
            rest = due_in.min(PASS_INTERVAL);
            continue;
        }
        tier.set_scrubbing(true);
        let scrubbed = store.scrub(&pace(inner, &store));
        tier.set_scrubbing(false);
        match scrubbed {
            Ok(report) if report.is_stopped => {}
            Ok(report) => tracing::info!(?report, "every record of the store was scrubbed"),
            Err(error) => {
                tracing::warn!(%error, "the scrub of the store ended");
                rest = PASS_INTERVAL / 24;
            }
        }
    }
    tier.end_helper();
}

/// Lets the next piece be read when it is due and nobody else uses the drive.
fn pace(inner: &Arc<Inner>, store: &Arc<Store>) -> ScrubPace {
    let (tier, store, rate) = (Arc::clone(&inner.drive), Arc::downgrade(store), Arc::clone(&inner.scrub_rate));
    let seen = Mutex::new(0);
    Arc::new(move |bytes| {
        let nanos = bytes.saturating_mul(1_000_000_000).checked_div(rate.load(Ordering::Relaxed));
        if !nanos.is_some_and(|nanos| tier.rest(Duration::from_nanos(nanos))) {
            return false;
        }
        let busy_until = Instant::now() + BUSY_MAX;
        let mut seen = seen.lock();
        loop {
            let Some(store) = store.upgrade().filter(|_| tier.degraded().is_none()) else { return false };
            let activity = store.activity();
            drop(store);
            if std::mem::replace(&mut *seen, activity) == activity || Instant::now() >= busy_until {
                return true;
            }
            if !tier.rest(BUSY_PAUSE) {
                return false;
            }
        }
    })
}
