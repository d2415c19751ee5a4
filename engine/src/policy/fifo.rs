//! First in, first out.

use lru::LruCache;

use super::least_recent::pop_oldest;
use super::{Build, Policy, PolicyBlock, PolicyRequest};

pub(super) struct Fifo {
    order: LruCache<u64, (), Build>,
}

impl Fifo {
    pub(super) fn new() -> Self {
        Self { order: LruCache::unbounded_with_hasher(Build::default()) }
    }
}

impl Policy for Fifo {
    fn request(&mut self, _request: &PolicyRequest<'_>) {}

    fn insert(&mut self, block: &PolicyBlock, _parent: Option<u64>) {
        if !self.order.contains(&block.key) {
            self.order.put(block.key, ());
        }
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
