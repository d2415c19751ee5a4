//! How a store is opened.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::drive_table::DRIVES_MAX;
use super::encryption::EncryptionKey;
use super::io::IoChoice;
use super::page::PAGE_BYTES;
use crate::codec::CodecChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// Regions of each drive at least: one that is written, one that is spare, two that are read.
const REGIONS_MIN: u64 = 4;
const REGION_BYTES_MIN: u64 = 64 << 10;
const REGION_BYTES_MAX: u64 = 8 << 30;
const QUEUE_DEPTH_MAX: usize = 4096;
/// More would leave too little of each region for what is new.
const REINSERT_PERCENT_MAX: u32 = 50;

/// A drive besides the home: a directory on it, and how much of it the store takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveConfig {
    /// The directory, made if missing, with owner-only rights. On a local file system: ext4 or XFS.
    pub path: PathBuf,
    /// Bytes of its regions, taken from the file system when it joins; rounded down to whole regions. At least four.
    pub capacity_bytes: u64,
}

/// How a store is opened. Region size is fixed when the store is made; drives and their capacities may change from open
/// to open.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The home: the directory with everything but the regions of further drives. Made if missing, with owner-only
    /// rights. On a local file system: ext4 or XFS.
    pub path: PathBuf,
    /// Bytes of the regions in the home, taken from the file system when the store is made; rounded down to whole
    /// regions. At least four regions. Less than the store has: what lies behind is given up.
    pub capacity_bytes: u64,
    /// The drives besides the home, in the order in which they joined; new ones go to the end. Records are spread over
    /// all drives. One that is no longer listed is retired: its records are misses, and if it is listed again it comes
    /// back empty. Default: none. Limit: 31.
    pub more_drives: Vec<DriveConfig>,
    /// Bytes of a region. A multiple of 4096 from 64 KiB to 8 GiB.
    pub region_bytes: u64,
    /// Whether `region_bytes` is meant for a store that is made, and one that exists keeps its own. Default: false.
    pub keeps_region_bytes: bool,
    /// Which I/O engine. Default: [`IoChoice::Auto`].
    pub io: IoChoice,
    /// Operations in flight on each drive. Default: 64. Limits: 1 to 4096.
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
    /// How much of a region may be written again elsewhere before it is given up, in percent of its size: what its most
    /// used records take. 0: nothing. Default: 25. Limit: 50.
    pub reinsert_percent: u32,
    /// The key with which the store's own keys are wrapped, for a store whose payloads are encrypted. Decided when the
    /// store is made: one that was made with a key is opened with that key only, and one that was not without. Default:
    /// none.
    pub encryption: Option<EncryptionKey>,
}

impl StoreConfig {
    /// A store at `path`; everything else by default.
    pub fn new(path: impl Into<PathBuf>, capacity_bytes: u64, region_bytes: u64) -> Self {
        Self {
            path: path.into(),
            capacity_bytes,
            more_drives: Vec::new(),
            region_bytes,
            keeps_region_bytes: false,
            io: IoChoice::Auto,
            queue_depth: 64,
            commit_interval: Duration::from_secs(1),
            commit_bytes: 64 << 20,
            write_queue_bytes: 256 << 20,
            codec: CodecChoice::Auto,
            reinsert_percent: 25,
            encryption: None,
        }
    }

    /// All drives, the home first: directory and capacity.
    pub(super) fn drives(&self) -> impl Iterator<Item = (&Path, u64)> {
        let more = self.more_drives.iter().map(|drive| (drive.path.as_path(), drive.capacity_bytes));
        std::iter::once((self.path.as_path(), self.capacity_bytes)).chain(more)
    }

    /// Operations in flight on all drives together.
    pub(super) fn depth_of_all(&self) -> usize {
        (self.queue_depth * (1 + self.more_drives.len())).min(QUEUE_DEPTH_MAX)
    }

    /// How many regions of a size each drive gets.
    ///
    /// # Errors
    /// `InvalidInput` for a drive that is too small, or more regions than there are numbers.
    pub(super) fn regions_of_drives(&self, region_bytes: u64) -> Result<Vec<u32>> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        let mut regions = Vec::new();
        for (path, capacity) in self.drives() {
            let count = capacity / region_bytes;
            if count < REGIONS_MIN {
                return bad(format!(
                    "a capacity of {capacity} bytes in {} holds {count} regions of {region_bytes}; give at least {} bytes",
                    path.display(),
                    REGIONS_MIN * region_bytes
                ));
            }
            regions.push(u32::try_from(count).unwrap_or(u32::MAX));
        }
        let count: u64 = regions.iter().copied().map(u64::from).sum();
        if count > u64::from(Location::REGIONS_MAX) {
            return bad(format!("{count} regions are more than {}; give larger regions", Location::REGIONS_MAX));
        }
        Ok(regions)
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
        self.regions_of_drives(region)?;
        if self.more_drives.len() >= DRIVES_MAX {
            let count = self.more_drives.len() + 1;
            return bad(format!("{count} drives; give at most {DRIVES_MAX}, the home included"));
        }
        let mut paths: Vec<&Path> = self.drives().map(|(path, _)| path).collect();
        paths.sort_unstable();
        if let Some(pair) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
            return bad(format!("{} is listed twice; give each drive a directory of its own", pair[0].display()));
        }
        if self.queue_depth == 0 || self.queue_depth > QUEUE_DEPTH_MAX {
            return bad(format!("a queue depth of {}; give 1 to {QUEUE_DEPTH_MAX}", self.queue_depth));
        }
        if self.reinsert_percent > REINSERT_PERCENT_MAX {
            let percent = self.reinsert_percent;
            return bad(format!("a reinsert_percent of {percent}; give 0 to {REINSERT_PERCENT_MAX}"));
        }
        if self.commit_interval.is_zero() || self.commit_bytes == 0 || self.write_queue_bytes == 0 {
            return bad("commit_interval, commit_bytes and write_queue_bytes must be above zero".into());
        }
        Ok(())
    }
}
