//! When the way that is not taken is tried, and what that may cost: each request may become 2 % slower by it; what
//! requests leave over of 1 % is saved up for those too short to hide a probe.

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
const HOPE: f64 = 12.0;
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

    /// Which of `parts`, from the largest to the smallest, each with the seconds that it would add, is to be tried.
    pub(super) fn choose(&mut self, rival: Rival, best_s: f64, parts: &[(u32, f64)], now_s: f64) -> Option<u32> {
        let age = now_s - rival.seen_s.max(self.born_s.unwrap_or(now_s));
        let never_seen = rival.seen_s == f64::NEG_INFINITY;
        // What is nearly as good is looked at more often: that costs less, and matters more.
        let nearness = (rival.seconds / best_s - 1.0).clamp(NEARNESS_MIN, 1.0);
        if !never_seen && !rival.is_in_doubt && age < INTERVAL_S * self.jitter * nearness {
            return None;
        }
        let own = parts.iter().find(|(_, added)| *added <= OWN_SHARE * best_s);
        let chosen = own.copied().or_else(|| self.spend(rival, best_s, parts, age, nearness));
        if chosen.is_some() {
            self.jitter = 0.75 + 0.5 * self.random.unit();
        }
        chosen.map(|(tokens, _)| tokens)
    }

    fn spend(
        &mut self,
        rival: Rival,
        best_s: f64,
        parts: &[(u32, f64)],
        age: f64,
        nearness: f64,
    ) -> Option<(u32, f64)> {
        let hope = HOPE * ((age - HOPE_FIXED_S) / 60.0).clamp(0.0, 30.0).exp2();
        let is_due = rival.is_in_doubt || age >= SAVINGS_INTERVAL_S * self.jitter * nearness;
        if !is_due || rival.seconds > hope * best_s {
            return None;
        }
        let cheapest = *parts.iter().min_by(|one, other| one.1.total_cmp(&other.1))?;
        let requests = cheapest.1 / best_s;
        // Long requests hide a probe best: the shorter one must be, the longer it waits for a better one.
        let share_max =
            SAVED_SHARE_FIRST * ((age / nearness - SAVINGS_INTERVAL_S) / SAVED_DOUBLING_S).clamp(0.0, 30.0).exp2();
        if requests > share_max || cheapest.1 > self.saved_seconds || requests > self.saved_requests {
            return None;
        }
        self.saved_seconds -= cheapest.1;
        self.saved_requests -= requests;
        Some(cheapest)
    }
}
