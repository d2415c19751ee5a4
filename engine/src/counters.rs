//! The engine's counters, and the snapshot that users see.

use std::sync::atomic::{AtomicU64, Ordering};

use pegaflow_tiers::LatencyHistogram;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Monotonic since open.
        #[derive(Default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
            pub(crate) times: Times,
        }
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
    lookup_hit_dram_blocks, loaded_dram_bytes, loaded_nvme_bytes, saved_bytes,
    /// Of the dropped ones: for want of DRAM.
    save_dropped_room,
    /// For want of a place in the queue.
    save_dropped_queue,
    /// Copying them out of the device failed.
    save_dropped_copy,
    /// The client cancelled the save, or the engine closed.
    save_dropped_cancelled,
}

/// How long things took.
#[derive(Default)]
pub(crate) struct Times {
    /// Lookups, from the request to the answer.
    pub(crate) lookup: LatencyHistogram,
    /// Loads out of DRAM only, from when they were queued.
    pub(crate) load_dram: LatencyHistogram,
    /// Loads that read at least one block from the drive.
    pub(crate) load_nvme: LatencyHistogram,
    /// Saves until their blocks were visible, from when they were queued.
    pub(crate) save: LatencyHistogram,
    /// Blocks from when they were visible until they were durable.
    pub(crate) durable: LatencyHistogram,
}
