//! How long things take: a histogram that many threads add to and a few read. Adding costs two additions to atomics and no
//! search, since the bounds are powers of two; there is nothing to drain, so it costs nothing while nobody reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

/// Bounds of a histogram: 1 µs, 2 µs, 4 µs .. 33.6 s.
const BOUNDS: usize = 26;

/// A histogram of times since it was made.
#[derive(Debug)]
pub struct LatencyHistogram {
    /// The last one has no bound.
    counts: [AtomicU64; BOUNDS + 1],
    sum_ns: AtomicU64,
}

/// A copy of a [`LatencyHistogram`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Latencies {
    /// How many took at most 1 µs, how many more than that and at most 2 µs, and so on; the last: more than 33.6 s.
    /// Without trailing zeros.
    pub counts: Vec<u64>,
    /// All of them together, in nanoseconds.
    pub sum_ns: u64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; BOUNDS + 1], sum_ns: AtomicU64::new(0) }
    }
}

impl LatencyHistogram {
    /// Adds one.
    pub fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get(bucket(ns)) {
            count.fetch_add(1, Ordering::Relaxed);
            self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        }
    }

    /// What there is so far. Taken beside threads that add, it may have one without its time.
    pub fn read(&self) -> Latencies {
        let mut counts: Vec<u64> = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        counts.truncate(counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1));
        Latencies { counts, sum_ns: self.sum_ns.load(Ordering::Relaxed) }
    }
}

/// The first bound that is not below.
fn bucket(ns: u64) -> usize {
    let us = ns.div_ceil(1000);
    (us.max(1).next_power_of_two().trailing_zeros() as usize).min(BOUNDS)
}

impl Latencies {
    /// The bounds in seconds, rising. What took longer than the last of them is counted behind all.
    pub fn bounds() -> impl Iterator<Item = f64> {
        (0..BOUNDS).map(|power| (1u64 << power) as f64 / 1e6)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How many took no longer than each of the bounds.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut sum = 0;
        Self::bounds().enumerate().map(move |(index, bound)| {
            sum += self.counts.get(index).copied().unwrap_or(0);
            (bound, sum)
        })
    }

    /// The time in seconds below which that share of them lies, as Prometheus reckons it: evenly spread between bounds.
    /// Infinite if it is beyond the last bound, `None` if there are none.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let rank = share * self.count() as f64;
        let (mut low, mut before) = (0.0, 0);
        for (bound, sum) in self.cumulative() {
            if sum > before && sum as f64 >= rank {
                return Some(low + (bound - low) * (rank - before as f64) / (sum - before) as f64);
            }
            (low, before) = (bound, sum);
        }
        (self.count() > 0).then_some(f64::INFINITY)
    }

    /// These and those.
    pub fn add(&mut self, other: &Self) {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_at_the_first_bound_that_is_not_below() {
        for (ns, expected) in
            [(0, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (4000, 2), (33_554_432_000, 25), (33_554_432_001, 26)]
        {
            assert_eq!(bucket(ns), expected, "{ns} ns");
        }
        assert_eq!(bucket(u64::MAX), BOUNDS);
    }

    #[test]
    fn what_is_read_is_what_was_added() {
        let histogram = LatencyHistogram::default();
        assert_eq!((histogram.read(), histogram.read().quantile(0.5)), (Latencies::default(), None));
        for us in [1, 3, 3, 100] {
            histogram.record(Duration::from_micros(us));
        }
        let read = histogram.read();
        assert_eq!((read.counts.clone(), read.sum_ns), (vec![1, 0, 2, 0, 0, 0, 0, 1], 107_000));
        assert_eq!((read.quantile(0.5), read.quantile(1.0)), (Some(3e-6), Some(128e-6)));
        let last = read.cumulative().last();
        assert!(last.is_some_and(|(bound, count)| count == 4 && bound > 33.0));
        let mut both = Latencies { counts: vec![1], sum_ns: 5 };
        both.add(&read);
        assert_eq!((both.count(), both.counts[0], both.sum_ns), (5, 2, 107_005));
        histogram.record(Duration::from_secs(60));
        assert_eq!(histogram.read().quantile(1.0), Some(f64::INFINITY));
    }
}
