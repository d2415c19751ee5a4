//! What was asked of each namespace since the engine was opened: lookups, hits, and when it was used last. Nothing of it is
//! kept beyond that.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pegaflow_tiers::NamespaceHandle;

/// What was asked of one namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NamespaceUse {
    pub(crate) lookup_blocks: u64,
    pub(crate) hit_blocks: u64,
    last: Instant,
}

impl NamespaceUse {
    /// How long ago the last lookup or save was.
    pub(crate) fn idle(&self) -> Duration {
        self.last.elapsed()
    }
}

/// Of all namespaces, by number. As many as instances register: bounded by what a store has.
#[derive(Default)]
pub(crate) struct NamespaceUses(Mutex<HashMap<NamespaceHandle, NamespaceUse>>);

impl NamespaceUses {
    /// A lookup, or a save, which looks nothing up.
    pub(crate) fn note(&self, namespace: NamespaceHandle, lookup_blocks: u64, hit_blocks: u64) {
        let mut uses = self.0.lock();
        let fresh = || NamespaceUse { lookup_blocks: 0, hit_blocks: 0, last: Instant::now() };
        let known = uses.entry(namespace).or_insert_with(fresh);
        known.lookup_blocks += lookup_blocks;
        known.hit_blocks += hit_blocks;
        known.last = Instant::now();
    }

    /// What was asked of a namespace; `None`: nothing.
    pub(crate) fn get(&self, namespace: NamespaceHandle) -> Option<NamespaceUse> {
        self.0.lock().get(&namespace).copied()
    }

    /// The number is over.
    pub(crate) fn forget(&self, namespace: NamespaceHandle) {
        self.0.lock().remove(&namespace);
    }
}
