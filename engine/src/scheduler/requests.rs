//! What lookups asked for, on its way to the policies. A lookup leaves it here and goes on: it never waits, and when too
//! much is waiting already what it asked for is forgotten, and counted.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::{Condvar, Mutex};
use pegaflow_tiers::RecordId;

use crate::api::SessionId;
use crate::counters::Counter;
use crate::lease::Hit;

/// Keys that wait at most: 8 MiB.
const WAITING_KEYS_MAX: usize = 1 << 20;
/// Requests that wait at most.
const WAITING_MAX: usize = 1024;
/// Requests that are remembered, so that they count once however often they are looked up while they wait.
const REPEATS_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("above zero");
/// The same again after so long without a lookup is another request.
const REPEAT_MS: u64 = 10_000;

/// A lookup's chain.
pub(crate) struct Asked {
    /// Who asked.
    pub(crate) session: SessionId,
    /// The asker's name for the request.
    pub(crate) tag: u64,
    /// Namespace and group; the key does not matter.
    pub(crate) place: RecordId,
    /// Shards that have the chain.
    pub(crate) shards: u16,
    /// What a block of it takes in DRAM.
    pub(crate) slot_bytes: usize,
    /// [`BlockKey::prefix`](pegaflow_tiers::BlockKey::prefix) of its keys, first to last; none if the request was served, and
    /// the next lookup is another one.
    pub(crate) prefixes: Vec<u64>,
}

/// After what waited was done the thread rests for so long: lookups that come meanwhile need not wake it.
const REST: Duration = Duration::from_millis(5);

/// What there is to do.
pub(super) enum Next {
    Asked(Asked),
    /// Nothing came until then.
    Time,
    Closed,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Asked>,
    waiting_keys: usize,
    /// How many were left here since the start.
    pushed: u64,
    /// Whether the thread has to be woken.
    is_asleep: bool,
    has_worked: bool,
    is_closed: bool,
}

/// The queue.
#[derive(Default)]
pub(crate) struct Requests {
    state: Mutex<State>,
    changed: Condvar,
    handed: AtomicU64,
    /// Requests that reached the policies.
    pub(crate) counted: Counter,
    /// Requests that found no room.
    pub(crate) dropped: Counter,
}

impl Requests {
    /// Leaves a request; never waits for anybody who does more than this. Its number, see [`Requests::handed`]; 0 if it
    /// found no room.
    pub(crate) fn push(&self, asked: Asked) -> u64 {
        let mut state = self.state.lock();
        let keys = state.waiting_keys + asked.prefixes.len();
        if state.is_closed || state.waiting.len() >= WAITING_MAX || keys > WAITING_KEYS_MAX {
            drop(state);
            self.dropped.add(1);
            return 0;
        }
        let is_asleep = std::mem::take(&mut state.is_asleep);
        state.waiting_keys = keys;
        state.waiting.push_back(asked);
        state.pushed += 1;
        let number = state.pushed;
        drop(state);
        if is_asleep {
            self.changed.notify_one();
        }
        number
    }

    /// The policies know all requests up to this number.
    pub(crate) fn handed(&self) -> u64 {
        self.handed.load(Ordering::Acquire)
    }

    /// Notes that they know one more.
    pub(super) fn hand(&self) {
        self.handed.fetch_add(1, Ordering::Release);
    }

    /// Notes that a request has got its blocks.
    pub(crate) fn push_served(&self, (session, tag): (SessionId, u64), hits: &[Hit]) {
        if let Some(place) = hits.first().map(Hit::id) {
            self.push(Asked { session, tag, place, shards: 1, slot_bytes: 0, prefixes: Vec::new() });
        }
    }

    /// The next thing to do, for the one thread that does it.
    pub(super) fn next(&self, until: Option<Instant>) -> Next {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return Next::Closed;
            }
            if let Some(asked) = state.waiting.pop_front() {
                state.waiting_keys -= asked.prefixes.len();
                state.has_worked = true;
                return Next::Asked(asked);
            }
            if std::mem::take(&mut state.has_worked) {
                self.changed.wait_for(&mut state, REST);
                continue;
            }
            state.is_asleep = true;
            let is_late = match until {
                None => {
                    self.changed.wait(&mut state);
                    false
                }
                Some(until) => self.changed.wait_until(&mut state, until).timed_out(),
            };
            state.is_asleep = false;
            if is_late && state.waiting.is_empty() && !state.is_closed {
                return Next::Time;
            }
        }
    }

    /// Ends the thread; what still waits is forgotten.
    pub(crate) fn close(&self) {
        self.state.lock().is_closed = true;
        self.changed.notify_all();
    }
}

/// Tells requests from their repetitions: a request that waits in the engine's queue is looked up again and again.
pub(super) struct Repeats {
    seen: LruCache<(SessionId, u64, u16), (u64, u64)>,
}

impl Repeats {
    pub(super) fn new() -> Self {
        Self { seen: LruCache::new(REPEATS_MAX) }
    }

    /// Whether this was asked for before by the same request, a moment ago and in vain; or is no request at all.
    pub(super) fn is_repeat(&mut self, asked: &Asked, now_ms: u64) -> bool {
        let request = (asked.session, asked.tag, asked.place.group);
        let Some(&last) = asked.prefixes.last() else {
            self.seen.pop(&request);
            return true;
        };
        let before = self.seen.put(request, (last, now_ms));
        before.is_some_and(|(before, at_ms)| before == last && now_ms.saturating_sub(at_ms) < REPEAT_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pegaflow_tiers::{BlockKey, NamespaceHandle};

    fn asked(tag: u64, prefixes: Vec<u64>) -> Asked {
        let place = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::ROOT };
        Asked { session: SessionId(1), tag, place, shards: 1, slot_bytes: 8192, prefixes }
    }

    #[test]
    fn a_request_counts_once_while_it_waits() {
        let mut repeats = Repeats::new();
        assert!(!repeats.is_repeat(&asked(1, vec![1, 2]), 0));
        assert!(repeats.is_repeat(&asked(1, vec![1, 2]), 9000));
        assert!(repeats.is_repeat(&asked(1, vec![1, 2]), 18_000), "it was looked up in between");
        assert!(!repeats.is_repeat(&asked(1, vec![1, 2, 3]), 18_001), "it has gone on");
        assert!(!repeats.is_repeat(&asked(2, vec![1, 2, 3]), 18_002), "somebody else");
        assert!(!repeats.is_repeat(&asked(2, vec![1, 2, 3]), 40_000), "long after");
        assert!(repeats.is_repeat(&asked(2, vec![]), 40_001), "it was served");
        assert!(!repeats.is_repeat(&asked(2, vec![1, 2, 3]), 40_002), "so this is another one");
        (10..10_000).for_each(|tag| assert!(!repeats.is_repeat(&asked(tag, vec![1]), 40_000)));
        assert_eq!(repeats.seen.len(), REPEATS_MAX.get());
    }

    #[test]
    fn what_waits_is_bounded() {
        let requests = Requests::default();
        assert!((0..WAITING_MAX as u64).all(|tag| requests.push(asked(tag, vec![tag])) == tag + 1));
        assert_eq!(requests.push(asked(9999, vec![9999])), 0, "too many");
        assert_eq!(requests.dropped.get(), 1);
        let Next::Asked(first) = requests.next(None) else { panic!("it waits") };
        assert_eq!(first.prefixes, [0]);
        requests.push(asked(5000, vec![0; WAITING_KEYS_MAX - 100]));
        assert_eq!(requests.dropped.get(), 2, "too many keys");
        requests.push(asked(5000, vec![0; 1000]));
        assert_eq!(requests.dropped.get(), 2);
        requests.close();
        assert!(matches!(requests.next(None), Next::Closed));
    }
}
