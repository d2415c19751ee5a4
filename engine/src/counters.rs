//! The engine's counters, and the snapshot that users see.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Monotonic since open.
        #[derive(Default)]
        pub(crate) struct Counters { $($(#[$doc])* pub(crate) $name: Counter,)* }
    };
}

/// A number that only grows.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    lookup_blocks, lookup_hit_blocks, loaded_dram_blocks, loaded_nvme_blocks, load_failed_blocks,
    saved_blocks, save_present_blocks, save_dropped_blocks, save_orphan_blocks, write_failed_records,
}
