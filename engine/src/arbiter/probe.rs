//! When the way that is not taken is tried, and what that may cost. Reads beside a request cost nothing; a request that is
//! served the other way may become 2 % slower, and what requests leave over of 1 % is saved up for the rest.

use crate::policy::SplitMix;

/// A way that nobody has taken for so long is tried, give or take a quarter.
const INTERVAL_S: f64 = 10.0;
/// A way that is a tenth slower, or less, is looked at ten times as often.
const NEARNESS_MIN: f64 = 0.1;
/// Savings are spent only on ways not seen for so long.
const SAVINGS_INTERVAL_S: f64 = 15.0;
/// What a probe may add to its own request.
const OWN_SHARE: f64 = 0.02;
/// What each request adds to the savings: of its time, and of itself.
const SAVED_SHARE: f64 = 0.01;
const SAVED_SECONDS_MAX: f64 = 60.0;
const SAVED_REQUESTS_MAX: f64 = 12.0;
/// The first probe from savings may add this share to its request; that doubles in so long while none fits.
const SAVED_SHARE_FIRST: f64 = 0.1;
const SAVED_DOUBLING_S: f64 = 5.0;
/// Savings are spent on a way that looks so many times slower; it may have become ten times faster.
const HOPE: f64 = 3.0;
/// After so long without evidence hope doubles every minute: the estimate may be anything.
const HOPE_FIXED_S: f64 = 300.0;
/// After so long a probe that has not ended no longer keeps others back.
pub(super) const PROBE_PATIENCE_S: f64 = 10.0;

#[derive(Debug, Clone)]
pub(super) struct Prober {
    random: SplitMix,
    saved_seconds: f64,
    saved_requests: f64,
    born_s: Option<f64>,
    /// By how much this probe comes earlier or later than the rest.
    jitter: f64,
}

/// What is known of the way that would be probed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rival {
    /// When it was last seen or tried.
    pub(super) seen_s: f64,
    /// Whether its last sample was a surprise.
    pub(super) is_in_doubt: bool,
    /// How long all of the prefix would take that way.
    pub(super) seconds: f64,
}

impl Prober {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: SplitMix::new(seed), saved_seconds: 0.0, saved_requests: 0.0, born_s: None, jitter: 1.0 }
    }

    /// A request that takes `best_s` is served: it adds to the savings.
    pub(super) fn save_up(&mut self, best_s: f64, now_s: f64) {
        self.born_s.get_or_insert(now_s);
        self.saved_seconds = (self.saved_seconds + SAVED_SHARE * best_s).min(SAVED_SECONDS_MAX);
        self.saved_requests = (self.saved_requests + SAVED_SHARE).min(SAVED_REQUESTS_MAX);
    }

    /// A random number from 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        self.random.unit()
    }

    /// Whether the rival was not seen for so long, or so doubtful, that it is to be looked at where that costs nothing.
    pub(super) fn is_due(&mut self, rival: Rival, best_s: f64, now_s: f64) -> bool {
        let is_due = self.is_old(rival, best_s, now_s);
        if is_due {
            self.jitter = 0.75 + 0.5 * self.random.unit();
        }
        is_due
    }

    /// Whether a request that takes `best_s` is to be served by the rival.
    pub(super) fn pays(&mut self, rival: Rival, best_s: f64, now_s: f64) -> bool {
        if !self.is_old(rival, best_s, now_s) {
            return false;
        }
        let pays = rival.seconds - best_s <= OWN_SHARE * best_s || self.spend(rival, best_s, now_s);
        if pays {
            self.jitter = 0.75 + 0.5 * self.random.unit();
        }
        pays
    }

    fn is_old(&self, rival: Rival, best_s: f64, now_s: f64) -> bool {
        let age = self.age(rival, now_s);
        rival.seen_s == f64::NEG_INFINITY
            || rival.is_in_doubt
            || age >= INTERVAL_S * self.jitter * nearness(rival, best_s)
    }

    fn age(&self, rival: Rival, now_s: f64) -> f64 {
        now_s - rival.seen_s.max(self.born_s.unwrap_or(now_s))
    }

    /// Pays for it out of the savings, if they suffice.
    fn spend(&mut self, rival: Rival, best_s: f64, now_s: f64) -> bool {
        let (age, nearness) = (self.age(rival, now_s), nearness(rival, best_s));
        let hope = HOPE * ((age - HOPE_FIXED_S) / 60.0).clamp(0.0, 30.0).exp2();
        let is_due = rival.is_in_doubt || age >= SAVINGS_INTERVAL_S * self.jitter * nearness;
        if !is_due || rival.seconds > hope * best_s {
            return false;
        }
        let added = rival.seconds - best_s;
        let requests = added / best_s;
        // Long requests hide a probe best: the shorter one must be, the longer it waits for a better one.
        let share_max =
            SAVED_SHARE_FIRST * ((age / nearness - SAVINGS_INTERVAL_S) / SAVED_DOUBLING_S).clamp(0.0, 30.0).exp2();
        if requests > share_max || added > self.saved_seconds || requests > self.saved_requests {
            return false;
        }
        self.saved_seconds -= added;
        self.saved_requests -= requests;
        true
    }
}

/// What is nearly as good is looked at more often: that costs less, and matters more.
fn nearness(rival: Rival, best_s: f64) -> f64 {
    (rival.seconds / best_s - 1.0).clamp(NEARNESS_MIN, 1.0)
}
