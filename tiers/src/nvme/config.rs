//! How a store is opened.

use std::path::PathBuf;
use std::time::Duration;

use super::io::IoChoice;
use super::page::PAGE_BYTES;
use crate::codec::CodecChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// Regions that a store has at least: one that is written, one that is spare, two that are read.
const REGIONS_MIN: u64 = 4;
const REGION_BYTES_MIN: u64 = 64 << 10;
const REGION_BYTES_MAX: u64 = 8 << 30;
const QUEUE_DEPTH_MAX: usize = 4096;

/// How a store is opened. Region size is fixed when the store is made; capacity may grow from open to open.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The directory, made if missing, with owner-only rights. On a local file system: ext4 or XFS.
    pub path: PathBuf,
    /// Bytes of all regions, taken from the file system when the store is made; rounded down to whole regions. At least
    /// four regions.
    pub capacity_bytes: u64,
    /// Bytes of a region. A multiple of 4096 from 64 KiB to 8 GiB.
    pub region_bytes: u64,
    /// Which I/O engine. Default: [`IoChoice::Auto`].
    pub io: IoChoice,
    /// Operations in flight on the drive. Default: 64. Limits: 1 to 4096.
    pub queue_depth: usize,
    /// How long after it was written a record becomes durable. Default: 1 s.
    pub commit_interval: Duration,
    /// Bytes of written records at which they become durable before that. Default: 64 MiB.
    pub commit_bytes: u64,
    /// Bytes of records that are accepted and not durable; beyond it appends are refused as busy. Default: 256 MiB.
    pub write_queue_bytes: u64,
    /// Whether blocks are compressed. Encoded copies take at most 256 MiB of memory until they are written, and 64 MiB of
    /// buffers are kept. Default: [`CodecChoice::Auto`].
    pub codec: CodecChoice,
}

impl StoreConfig {
    /// A store at `path`; everything else by default.
    pub fn new(path: impl Into<PathBuf>, capacity_bytes: u64, region_bytes: u64) -> Self {
        Self {
            path: path.into(),
            capacity_bytes,
            region_bytes,
            io: IoChoice::Auto,
            queue_depth: 64,
            commit_interval: Duration::from_secs(1),
            commit_bytes: 64 << 20,
            write_queue_bytes: 256 << 20,
            codec: CodecChoice::Auto,
        }
    }

    /// Regions that fit in the capacity.
    pub(super) fn region_count(&self) -> u32 {
        u32::try_from(self.capacity_bytes / self.region_bytes.max(1)).unwrap_or(u32::MAX)
    }

    /// Checks every field against its limits.
    ///
    /// # Errors
    /// `InvalidInput` with value, limit and remedy.
    pub(super) fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        let region = self.region_bytes;
        if !region.is_multiple_of(PAGE_BYTES as u64) || !(REGION_BYTES_MIN..=REGION_BYTES_MAX).contains(&region) {
            return bad(format!(
                "a region has {region} bytes; give a multiple of {PAGE_BYTES} from {REGION_BYTES_MIN} to {REGION_BYTES_MAX}"
            ));
        }
        let count = self.capacity_bytes / region;
        if count < REGIONS_MIN {
            return bad(format!(
                "a capacity of {} bytes holds {count} regions of {region}; give at least {} bytes",
                self.capacity_bytes,
                REGIONS_MIN * region
            ));
        }
        if count > u64::from(Location::REGIONS_MAX) {
            return bad(format!("{count} regions are more than {}; give larger regions", Location::REGIONS_MAX));
        }
        if self.queue_depth == 0 || self.queue_depth > QUEUE_DEPTH_MAX {
            return bad(format!("a queue depth of {}; give 1 to {QUEUE_DEPTH_MAX}", self.queue_depth));
        }
        if self.commit_interval.is_zero() || self.commit_bytes == 0 || self.write_queue_bytes == 0 {
            return bad("commit_interval, commit_bytes and write_queue_bytes must be above zero".into());
        }
        Ok(())
    }
}
