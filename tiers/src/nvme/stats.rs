//! Counters of a store.

use std::sync::atomic::{AtomicU64, Ordering};

use super::fill::IndexFill;
use crate::codec::Skip;

/// Counters and gauges of a store; counters start at zero when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct StoreStats {
    /// The I/O engine: `io_uring` or `psync`.
    pub io_engine: &'static str,
    /// Whether records go past the page cache.
    pub is_direct: bool,
    /// Bytes of all regions.
    pub capacity_bytes: u64,
    /// Bytes of a region.
    pub region_bytes: u64,
    /// Regions in all.
    pub regions: u64,
    /// Regions that hold nothing.
    pub free_regions: u64,
    /// Records that the table has, in small part stale entries of reclaimed regions that lookups do not find. Of a large
    /// store not all until the table is full.
    pub records: u64,
    /// Bytes of these records, headers and padding included.
    pub live_bytes: u64,
    /// Bytes of memory of the table.
    pub index_bytes: u64,
    /// Bytes of memory of RocksDB; 0 when the store is closed.
    pub index_log_bytes: u64,
    /// How far the table is filled.
    pub index: IndexFill,
    /// Bytes of records that are accepted and not durable.
    pub queued_bytes: u64,
    /// Records that became durable.
    pub appended_records: u64,
    /// Bytes of these, headers and padding included.
    pub appended_bytes: u64,
    /// Bytes of their payloads.
    pub appended_payload_bytes: u64,
    /// Bytes of their payloads as they were stored, without headers and padding.
    pub appended_stored_bytes: u64,
    /// Of these records, those that were encoded.
    pub encoded_records: u64,
    /// Nanoseconds that threads have spent encoding.
    pub encode_ns: u64,
    /// Nanoseconds that encrypting payloads took, checksums included; 0 in a store that is not encrypted.
    pub seal_ns: u64,
    /// Nanoseconds that decrypting payloads took.
    pub unseal_ns: u64,
    /// Nanoseconds that threads have spent decoding.
    pub decode_ns: u64,
    /// Bytes of payload per second that the store's threads decode together, measured at open; 0 without a codec.
    pub decode_bytes_per_second: u64,
    /// Blocks that were stored as they are because they, or those before them, hardly shrink.
    pub codec_skipped_ratio: u64,
    /// Blocks that were stored as they are because too many waited to be encoded.
    pub codec_skipped_queue: u64,
    /// Blocks that were stored as they are because the drive reads faster than this machine decodes.
    pub codec_skipped_speed: u64,
    /// Records that were accepted and failed.
    pub failed_appends: u64,
    /// Of these, records for which no region could be reclaimed.
    pub starved_appends: u64,
    /// Records that were written again because their first write failed.
    pub retried_appends: u64,
    /// Group commits.
    pub commits: u64,
    /// Reads that ended.
    pub reads: u64,
    /// Bytes of payload that were read and verified.
    pub read_bytes: u64,
    /// Bytes of these as they were stored.
    pub read_stored_bytes: u64,
    /// Reads whose data failed a check, or could not be read at all; their records are out of the index.
    pub bad_reads: u64,
    /// Regions that were reclaimed.
    pub reclaimed_regions: u64,
    /// Records that went with them.
    pub reclaimed_records: u64,
    /// Tombstones that were written again so that a region could be reclaimed.
    pub kept_tombstones: u64,
    /// Records that were written again because they were worth more than their region; also among the appended ones.
    pub reinserted_records: u64,
    /// Bytes of these. `appended_bytes / (appended_bytes - reinserted_bytes)` is the write amplification of the log.
    pub reinserted_bytes: u64,
    /// How often writing records again was cut short because the next region was needed.
    pub cut_reinsertions: u64,
    /// Bytes that scrubs have read.
    pub scrubbed_bytes: u64,
    /// Records that scrubs have found damaged; they are among the bad reads.
    pub scrub_bad_records: u64,
    /// Scrubs that have seen everything.
    pub scrub_passes: u64,
    /// When the last of them ended, in milliseconds since 1970; 0 for never. Kept across opens.
    pub scrub_last_pass_unix_ms: u64,
}

/// How much goes to the drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteVolume {
    /// Bytes of records that became durable since the store was opened: all of them, tombstones and what was written again
    /// included. Region headers and the index come to about a thousandth more.
    pub written_bytes: u64,
    /// Bytes of records that were accepted and are not durable.
    pub queued_bytes: u64,
}

/// The counters behind [`StoreStats`].
#[derive(Default)]
pub(super) struct Counts {
    pub(super) appended_records: AtomicU64,
    pub(super) appended_bytes: AtomicU64,
    pub(super) appended_payload_bytes: AtomicU64,
    pub(super) appended_stored_bytes: AtomicU64,
    pub(super) encoded_records: AtomicU64,
    pub(super) encode_ns: AtomicU64,
    pub(super) seal_ns: AtomicU64,
    pub(super) unseal_ns: AtomicU64,
    pub(super) decode_ns: AtomicU64,
    pub(super) codec_skipped_ratio: AtomicU64,
    pub(super) codec_skipped_queue: AtomicU64,
    pub(super) codec_skipped_speed: AtomicU64,
    pub(super) failed_appends: AtomicU64,
    pub(super) starved_appends: AtomicU64,
    pub(super) retried_appends: AtomicU64,
    pub(super) commits: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) read_stored_bytes: AtomicU64,
    pub(super) bad_reads: AtomicU64,
    pub(super) reclaimed_regions: AtomicU64,
    pub(super) reclaimed_records: AtomicU64,
    pub(super) kept_tombstones: AtomicU64,
    pub(super) scrubbed_bytes: AtomicU64,
    pub(super) scrub_bad_records: AtomicU64,
    pub(super) scrub_passes: AtomicU64,
    pub(super) scrub_last_pass_unix_ms: AtomicU64,
    pub(super) reinserted_records: AtomicU64,
    pub(super) reinserted_bytes: AtomicU64,
    pub(super) cut_reinsertions: AtomicU64,
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

impl Counts {
    /// A block was not encoded.
    pub(super) fn skip(&self, skip: Skip) {
        let counter = match skip {
            Skip::Ratio => &self.codec_skipped_ratio,
            Skip::Queue => &self.codec_skipped_queue,
            Skip::Speed => &self.codec_skipped_speed,
        };
        add(counter, 1);
    }

    /// The counters so far; gauges are zero.
    pub(super) fn snapshot(&self) -> StoreStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StoreStats {
            appended_records: get(&self.appended_records),
            appended_bytes: get(&self.appended_bytes),
            appended_payload_bytes: get(&self.appended_payload_bytes),
            appended_stored_bytes: get(&self.appended_stored_bytes),
            encoded_records: get(&self.encoded_records),
            encode_ns: get(&self.encode_ns),
            seal_ns: get(&self.seal_ns),
            unseal_ns: get(&self.unseal_ns),
            decode_ns: get(&self.decode_ns),
            codec_skipped_ratio: get(&self.codec_skipped_ratio),
            codec_skipped_queue: get(&self.codec_skipped_queue),
            codec_skipped_speed: get(&self.codec_skipped_speed),
            failed_appends: get(&self.failed_appends),
            starved_appends: get(&self.starved_appends),
            retried_appends: get(&self.retried_appends),
            commits: get(&self.commits),
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            read_stored_bytes: get(&self.read_stored_bytes),
            bad_reads: get(&self.bad_reads),
            reclaimed_regions: get(&self.reclaimed_regions),
            reclaimed_records: get(&self.reclaimed_records),
            kept_tombstones: get(&self.kept_tombstones),
            scrubbed_bytes: get(&self.scrubbed_bytes),
            scrub_bad_records: get(&self.scrub_bad_records),
            scrub_passes: get(&self.scrub_passes),
            scrub_last_pass_unix_ms: get(&self.scrub_last_pass_unix_ms),
            reinserted_records: get(&self.reinserted_records),
            reinserted_bytes: get(&self.reinserted_bytes),
            cut_reinsertions: get(&self.cut_reinsertions),
            ..StoreStats::default()
        }
    }
}
