//! Least recently used; as blocks come last to first, leaves of a chain are older than their ancestors and leave first.

use lru::LruCache;

use super::{Build, Policy, PolicyBlock, PolicyRequest};

/// How many pinned blocks a search for a victim passes before it gives up.
pub(super) const PINNED_MAX: usize = 1024;

/// Takes out the oldest of a list that may leave. Who may not gets another round, so that the next search does not meet
/// the same ones.
pub(super) fn pop_oldest<V>(
    order: &mut LruCache<u64, V, Build>,
    may_leave: &mut dyn FnMut(u64) -> bool,
) -> Option<(u64, V)> {
    for _ in 0..PINNED_MAX.min(order.len()) {
        let key = *order.peek_lru()?.0;
        if may_leave(key) {
            return order.pop_lru();
        }
        order.promote(&key);
    }
    None
}

pub(super) struct LeastRecent {
    order: LruCache<u64, (), Build>,
}

impl LeastRecent {
    pub(super) fn new() -> Self {
        Self { order: LruCache::unbounded_with_hasher(Build::default()) }
    }
}

impl Policy for LeastRecent {
    fn request(&mut self, _request: &PolicyRequest<'_>) {}

    fn touch(&mut self, key: u64) {
        self.order.promote(&key);
    }

    fn insert(&mut self, block: &PolicyBlock, _parent: Option<u64>) {
        self.order.put(block.key, ());
    }

    fn evict(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        pop_oldest(&mut self.order, may_leave).map(|(key, ())| key)
    }

    fn remove(&mut self, key: u64) {
        self.order.pop(&key);
    }

    fn contains(&self, key: u64) -> bool {
        self.order.contains(&key)
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}
