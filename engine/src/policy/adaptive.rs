//! ARC: one list of those seen once, one of those seen more often, and for each a memory of who left it, which says which
//! of the two deserves more room.

use lru::LruCache;

use super::least_recent::pop_oldest;
use super::{Build, Policy, PolicyBlock, PolicyRequest};

/// Keys with their bytes, in order of use.
struct List {
    order: LruCache<u64, u32, Build>,
    bytes: u64,
}

impl List {
    fn new() -> Self {
        Self { order: LruCache::unbounded_with_hasher(Build::default()), bytes: 0 }
    }

    fn put(&mut self, key: u64, bytes: u32) {
        self.pop(key);
        self.order.put(key, bytes);
        self.bytes += u64::from(bytes);
    }

    fn pop(&mut self, key: u64) -> Option<u32> {
        let bytes = self.order.pop(&key)?;
        self.bytes -= u64::from(bytes);
        Some(bytes)
    }

    fn pop_oldest(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<(u64, u32)> {
        let (key, bytes) = pop_oldest(&mut self.order, may_leave)?;
        self.bytes -= u64::from(bytes);
        Some((key, bytes))
    }
}

pub(super) struct Adaptive {
    once: List,
    often: List,
    once_gone: List,
    often_gone: List,
    capacity_bytes: u64,
    /// How many bytes those that were seen once may take.
    once_target: u64,
    /// Whether the block that is about to come was last in `often`.
    favours_once: bool,
}

impl Adaptive {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        let [once, often, once_gone, often_gone] = std::array::from_fn(|_| List::new());
        Self { once, often, once_gone, often_gone, capacity_bytes, once_target: 0, favours_once: false }
    }

    fn evict_once(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let (key, bytes) = self.once.pop_oldest(may_leave)?;
        self.once_gone.put(key, bytes);
        Some(key)
    }

    fn evict_often(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let (key, bytes) = self.often.pop_oldest(may_leave)?;
        self.often_gone.put(key, bytes);
        Some(key)
    }

    /// Keeps both memories within the bounds of the paper: once and its memory within the capacity, all within twice it.
    fn trim(&mut self) {
        while self.once.bytes + self.once_gone.bytes > self.capacity_bytes {
            if self.once_gone.pop_oldest(&mut |_| true).is_none() {
                break;
            }
        }
        while self.once.bytes + self.often.bytes + self.once_gone.bytes + self.often_gone.bytes
            > 2 * self.capacity_bytes
        {
            if self.often_gone.pop_oldest(&mut |_| true).is_none() {
                break;
            }
        }
    }
}

impl Policy for Adaptive {
    fn request(&mut self, _request: &PolicyRequest<'_>) {}

    fn touch(&mut self, key: u64) {
        if let Some(bytes) = self.once.pop(key).or_else(|| self.often.pop(key)) {
            self.often.put(key, bytes);
        }
    }

    /// Always; but the target moves here, before room is made.
    fn admits(&mut self, block: &PolicyBlock, _parent: Option<u64>, _is_full: bool) -> bool {
        let ratio = |a: u64, b: u64| a.checked_div(b).unwrap_or(1).max(1) * u64::from(block.bytes);
        self.favours_once = false;
        if self.once_gone.order.contains(&block.key) {
            let step = ratio(self.often_gone.bytes, self.once_gone.bytes);
            self.once_target = (self.once_target + step).min(self.capacity_bytes);
        } else if self.often_gone.order.contains(&block.key) {
            let step = ratio(self.once_gone.bytes, self.often_gone.bytes);
            self.once_target = self.once_target.saturating_sub(step);
            self.favours_once = true;
        }
        true
    }

    fn insert(&mut self, block: &PolicyBlock, _parent: Option<u64>) {
        let was_here = self.once_gone.pop(block.key).or_else(|| self.often_gone.pop(block.key)).is_some();
        let list = if was_here { &mut self.often } else { &mut self.once };
        list.put(block.key, block.bytes);
        self.trim();
    }

    fn evict(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let once = self.once.bytes;
        let from_once = once > self.once_target || (self.favours_once && once == self.once_target && once > 0);
        let victim = if from_once {
            self.evict_once(may_leave).or_else(|| self.evict_often(may_leave))
        } else {
            self.evict_often(may_leave).or_else(|| self.evict_once(may_leave))
        };
        self.trim();
        victim
    }

    fn remove(&mut self, key: u64) {
        self.once.pop(key);
        self.often.pop(key);
    }

    fn contains(&self, key: u64) -> bool {
        self.once.order.contains(&key) || self.often.order.contains(&key)
    }

    fn len(&self) -> usize {
        self.once.order.len() + self.often.order.len()
    }
}
