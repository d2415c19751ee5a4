//! Counters of the store that must not start over when the store is opened again.

use pegaflow_tiers::StoreStats;

macro_rules! totals {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Sums over all stores that an engine has had.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub(crate) struct StoreTotals { $($(#[$doc])* pub(crate) $name: u64,)* }

        impl StoreTotals {
            /// These, and what one store has counted.
            pub(crate) fn plus(&self, stats: &StoreStats) -> Self {
                Self { $($name: self.$name + stats.$name,)* }
            }
        }
    };
}

totals! {
    appended_records, appended_bytes, reinserted_records, reinserted_bytes, cut_reinsertions,
    appended_payload_bytes, appended_stored_bytes, read_bytes, read_stored_bytes, bad_reads,
    reclaimed_regions, reclaimed_records, scrubbed_bytes, scrub_bad_records, scrub_passes, encoded_records, encode_ns, decode_ns, seal_ns, unseal_ns,
    codec_skipped_ratio, codec_skipped_queue, codec_skipped_speed,
}
