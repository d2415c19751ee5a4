//! What is queued on the device next: loads before saves, each within its bound, so that a cancel takes effect within a
//! millisecond. Knows nothing of CUDA.

use std::collections::VecDeque;

use super::method::BACKGROUND_BYTES_MAX;

/// A copy in the queue.
pub(super) trait Work {
    fn is_load(&self) -> bool;
    /// Whether its next piece could go to the device now.
    fn is_ready(&self) -> bool;
    /// Bytes that the device has of it.
    fn in_flight_bytes(&self) -> u64;
}

/// Copies that have not ended, in the order in which they came.
pub(super) struct Queue<W> {
    loads: VecDeque<W>,
    saves: VecDeque<W>,
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Self { loads: VecDeque::new(), saves: VecDeque::new() }
    }
}

impl<W: Work> Queue<W> {
    pub(super) fn push(&mut self, work: W) {
        let side = if work.is_load() { &mut self.loads } else { &mut self.saves };
        side.push_back(work);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.loads.is_empty() && self.saves.is_empty()
    }

    /// The copy whose next piece goes to the device now: the first load that is ready. A save only while no load could
    /// go: saves must not delay loads, but may use the other direction of the link beside those in flight.
    pub(super) fn next(&mut self) -> Option<&mut W> {
        for side in [&mut self.loads, &mut self.saves] {
            let in_flight: u64 = side.iter().map(Work::in_flight_bytes).sum();
            if in_flight < BACKGROUND_BYTES_MAX
                && let Some(work) = side.iter_mut().find(|work| work.is_ready())
            {
                return Some(work);
            }
        }
        None
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut W> {
        self.loads.iter_mut().chain(&mut self.saves)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &W> {
        self.loads.iter().chain(&self.saves)
    }

    /// Takes out what has ended.
    pub(super) fn take_ended(&mut self, mut has_ended: impl FnMut(&W) -> bool) -> Vec<W> {
        let mut ended = Vec::new();
        for side in [&mut self.loads, &mut self.saves] {
            for _ in 0..side.len() {
                match side.pop_front() {
                    Some(work) if has_ended(&work) => ended.push(work),
                    Some(work) => side.push_back(work),
                    None => break,
                }
            }
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fake {
        name: &'static str,
        is_load: bool,
        is_ready: bool,
        in_flight: u64,
    }

    impl Work for Fake {
        fn is_load(&self) -> bool {
            self.is_load
        }
        fn is_ready(&self) -> bool {
            self.is_ready
        }
        fn in_flight_bytes(&self) -> u64 {
            self.in_flight
        }
    }

    fn queue(works: &[(&'static str, bool, bool, u64)]) -> Queue<Fake> {
        let mut queue = Queue::default();
        for &(name, is_load, is_ready, in_flight) in works {
            queue.push(Fake { name, is_load, is_ready, in_flight });
        }
        queue
    }

    #[test]
    fn loads_go_before_saves() {
        let next = |works: &[_]| queue(works).next().map(|work| work.name);
        assert_eq!(next(&[("save", false, true, 0), ("load", true, true, 0)]), Some("load"));
        assert_eq!(next(&[("save", false, true, 0), ("waits", true, false, 0)]), Some("save"));
        assert_eq!(next(&[("first", true, true, 0), ("second", true, true, 0)]), Some("first"));
        assert_eq!(next(&[("waits", true, false, 0), ("second", true, true, 0)]), Some("second"));
        assert_eq!(next(&[]), None);
    }

    #[test]
    fn the_device_never_has_more_than_the_bounds() {
        let next = |works: &[_]| queue(works).next().map(|work| work.name);
        assert_eq!(next(&[("load", true, true, BACKGROUND_BYTES_MAX), ("save", false, true, 0)]), Some("save"));
        assert_eq!(next(&[("load", true, true, 1), ("ended", true, false, BACKGROUND_BYTES_MAX)]), None);
        assert_eq!(next(&[("save", false, true, BACKGROUND_BYTES_MAX), ("load", true, false, 0)]), None);
    }

    #[test]
    fn what_has_ended_leaves_and_the_rest_stays_in_order() {
        let mut queue =
            queue(&[("a", true, true, 0), ("b", true, false, 0), ("c", true, true, 0), ("d", false, true, 0)]);
        let ended = queue.take_ended(|work| !work.is_ready || !work.is_load);
        assert_eq!(ended.iter().map(|work| work.name).collect::<Vec<_>>(), ["b", "d"]);
        assert_eq!(queue.iter().map(|work| work.name).collect::<Vec<_>>(), ["a", "c"]);
        assert!(!queue.is_empty());
    }
}
