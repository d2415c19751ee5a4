//! S3-FIFO: a small queue for newcomers, a main one for those that were used again while they were in it, and a memory of
//! who left the small one.

use std::collections::HashMap;

use lru::LruCache;

use super::least_recent::PINNED_MAX;
use super::{Build, Policy, PolicyBlock, PolicyRequest};

/// Uses are counted up to this.
const USES_MAX: u8 = 3;
/// The small queue's share of the capacity: one part of so many.
const SMALL_PART: u64 = 10;

type Queue = LruCache<u64, (), Build>;

#[derive(Clone, Copy)]
struct Entry {
    bytes: u32,
    uses: u8,
    is_small: bool,
}

pub(super) struct S3Fifo {
    entries: HashMap<u64, Entry, Build>,
    small: Queue,
    main: Queue,
    ghosts: LruCache<u64, u32, Build>,
    small_bytes: u64,
    ghost_bytes: u64,
    small_bytes_max: u64,
    ghost_bytes_max: u64,
}

impl S3Fifo {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        Self {
            entries: HashMap::default(),
            small: Queue::unbounded_with_hasher(Build::default()),
            main: Queue::unbounded_with_hasher(Build::default()),
            ghosts: LruCache::unbounded_with_hasher(Build::default()),
            small_bytes: 0,
            ghost_bytes: 0,
            small_bytes_max: (capacity_bytes / SMALL_PART).max(1),
            ghost_bytes_max: capacity_bytes,
        }
    }

    /// Moves along the small queue: who was used more than once goes to the main one; the first who was not leaves.
    fn evict_small(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let mut pinned = 0;
        for _ in 0..self.small.len() {
            if pinned == PINNED_MAX {
                break;
            }
            let (key, ()) = self.small.pop_lru()?;
            let entry = self.entries.get_mut(&key)?;
            if entry.uses > 1 {
                (entry.uses, entry.is_small) = (0, false);
                self.small_bytes -= u64::from(entry.bytes);
                self.main.put(key, ());
            } else if may_leave(key) {
                let bytes = entry.bytes;
                self.entries.remove(&key);
                self.small_bytes -= u64::from(bytes);
                self.remember(key, bytes);
                return Some(key);
            } else {
                pinned += 1;
                self.small.put(key, ());
            }
        }
        None
    }

    fn evict_main(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let mut pinned = 0;
        while pinned < PINNED_MAX {
            let (key, ()) = self.main.pop_lru()?;
            let entry = self.entries.get_mut(&key)?;
            if entry.uses > 0 {
                entry.uses -= 1;
            } else if may_leave(key) {
                self.entries.remove(&key);
                return Some(key);
            } else {
                pinned += 1;
            }
            self.main.put(key, ());
        }
        None
    }

    fn remember(&mut self, key: u64, bytes: u32) {
        if let Some(before) = self.ghosts.put(key, bytes) {
            self.ghost_bytes -= u64::from(before);
        }
        self.ghost_bytes += u64::from(bytes);
        while self.ghost_bytes > self.ghost_bytes_max {
            let Some((_, bytes)) = self.ghosts.pop_lru() else { break };
            self.ghost_bytes -= u64::from(bytes);
        }
    }
}

impl Policy for S3Fifo {
    fn request(&mut self, _request: &PolicyRequest<'_>) {}

    fn touch(&mut self, key: u64) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.uses = (entry.uses + 1).min(USES_MAX);
        }
    }

    fn insert(&mut self, block: &PolicyBlock, _parent: Option<u64>) {
        let was_here = self.ghosts.pop(&block.key);
        if let Some(bytes) = was_here {
            self.ghost_bytes -= u64::from(bytes);
            self.main.put(block.key, ());
        } else {
            self.small_bytes += u64::from(block.bytes);
            self.small.put(block.key, ());
        }
        self.entries.insert(block.key, Entry { bytes: block.bytes, uses: 0, is_small: was_here.is_none() });
    }

    fn evict(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        if self.small_bytes >= self.small_bytes_max || self.main.is_empty() {
            let victim = self.evict_small(may_leave);
            if victim.is_some() {
                return victim;
            }
        }
        self.evict_main(may_leave).or_else(|| self.evict_small(may_leave))
    }

    fn remove(&mut self, key: u64) {
        if let Some(entry) = self.entries.remove(&key) {
            if entry.is_small {
                self.small_bytes -= u64::from(entry.bytes);
                self.small.pop(&key);
            } else {
                self.main.pop(&key);
            }
        }
    }

    fn contains(&self, key: u64) -> bool {
        self.entries.contains_key(&key)
    }

    fn len(&self) -> usize {
        self.entries.len()
    }
}
