//! A store of any number of keys without their payloads. Directory, superblock, regions, namespace and the database of the
//! index are real: an empty store was opened and a record was written to every region. The rows of the keys are not: they
//! go straight through the commit path of the index, and point to places in those regions where no such record lies.
//! Opens and lookups take the same way as with real records; a load would find out and be a miss.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pegaflow_tiers::{
    Append, Arena, ArenaConfig, BlockKey, IndexChange, IndexLog, IndexRow, Location, NamespaceHandle, ReclaimPolicy,
    RecordId, RecordKind, RegionInfo, RegionState, Store, StoreConfig,
};

use crate::prompts::{Prompts, spec};

/// Bytes of a region: the least that the server takes.
pub const REGION_BYTES: u64 = 4 << 20;
/// Keys whose rows point into one region.
const KEYS_PER_REGION: u64 = 16 << 10;
/// A record of the smallest block.
const PAGES: u32 = 2;
const PAGE_BYTES: u64 = 4096;
/// Two pages of a region are its header.
const FIRST_PAGE: u32 = 2;
/// More than half of a region, so that each goes to one of its own.
const OBJECT_BYTES: usize = (REGION_BYTES as usize) * 5 / 8;
/// Rows of one commit: what a group commit of 64 MiB of small blocks has.
const BATCH: usize = 4096;
/// Commits until the write-ahead log must have been cut.
const COMMITS_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(600);

/// No region may go.
struct KeepAll;

impl ReclaimPolicy for KeepAll {
    fn victim(&self, _candidates: &[RegionInfo]) -> Option<u32> {
        None
    }
}

/// A made-up store in a directory.
pub struct SyntheticStore {
    path: PathBuf,
    namespace: NamespaceHandle,
    /// Region and generation of the regions with records.
    regions: Vec<(u32, u64)>,
}

impl SyntheticStore {
    /// Bytes of all regions of a store of so many keys.
    pub fn capacity_bytes(keys: usize) -> u64 {
        (keys as u64).div_ceil(KEYS_PER_REGION).max(4) * REGION_BYTES + 4 * REGION_BYTES
    }

    /// Opens or makes the store without its keys, and closes it in order or, as a crash would, not at all.
    ///
    /// # Errors
    /// What the store reports.
    pub fn visit(path: &Path, keys: usize, closes: bool) -> Result<Self> {
        let arena = Arena::new(ArenaConfig::new(64 << 20))?;
        let config = StoreConfig::new(path, Self::capacity_bytes(keys), REGION_BYTES);
        let (store, _) = Store::open(config, Arc::clone(&arena), Arc::new(KeepAll))?;
        let spec = spec();
        let namespace = store.namespace(&spec.namespace, &spec.groups)?;
        let wanted = (keys as u64).div_ceil(KEYS_PER_REGION).max(4) as usize;
        for number in used(&store).len()..wanted {
            let slot = Arc::new(arena.alloc(OBJECT_BYTES).context("no room in the arena")?);
            let append = Append {
                id: RecordId {
                    namespace: NamespaceHandle(0),
                    group: 0,
                    shard: 0,
                    key: BlockKey::from_name(&(number as u64).to_le_bytes()),
                },
                kind: RecordKind::Object,
                parent: BlockKey::ROOT,
                depth: 0,
                slot: Some(slot),
                payload_bytes: OBJECT_BYTES as u64,
                done: Box::new(drop),
            };
            store.append(append).map_err(|(_, error)| error)?;
            if number % 16 == 15 {
                store.flush(Instant::now() + PATIENCE)?;
            }
        }
        store.flush(Instant::now() + PATIENCE)?;
        let regions = used(&store);
        ensure!(regions.len() == wanted, "{} regions have records, not {wanted}", regions.len());
        if closes {
            store.close(Instant::now() + PATIENCE)?;
        }
        Ok(Self { path: path.to_owned(), namespace, regions })
    }

    /// Opens the durable index, which nobody else may have open.
    ///
    /// # Errors
    /// What the index reports.
    pub fn log(&self) -> Result<IndexLog> {
        Ok(IndexLog::open(&self.path.join("index"))?)
    }

    /// Commits the rows of all prompts.
    ///
    /// # Errors
    /// What the index reports.
    pub fn commit_all(&self, prompts: &Prompts, mut progress: impl FnMut(usize)) -> Result<()> {
        let log = self.log()?;
        for number in 0..prompts.len() {
            self.commit(&log, prompts, number)?;
            if number % 256 == 0 {
                progress(number);
            }
        }
        log.close();
        Ok(())
    }

    /// Commits rows that are there already once more, until the write-ahead log is about as long as it ever gets: what
    /// the next open after a kill now has to read. Returns its bytes.
    ///
    /// # Errors
    /// What the index reports.
    pub fn lengthen_wal(&self, log: &IndexLog, prompts: &Prompts) -> Result<u64> {
        let (mut longest, mut was_cut, mut number) = (0, false, 0);
        loop {
            self.commit(log, prompts, number % prompts.len())?;
            number += 1;
            let bytes = self.wal_bytes()?;
            was_cut |= bytes < longest / 2;
            longest = longest.max(bytes);
            if was_cut && bytes >= longest / 10 * 9 {
                return Ok(bytes);
            }
            ensure!(number < COMMITS_MAX, "the write-ahead log of {longest} bytes was never cut");
        }
    }

    fn commit(&self, log: &IndexLog, prompts: &Prompts, number: usize) -> Result<()> {
        let rows = self.rows(prompts, number).map(IndexChange::Put);
        let changes: Vec<IndexChange> = rows.collect();
        for batch in changes.chunks(BATCH) {
            log.commit(batch, &[])?;
        }
        Ok(())
    }

    fn rows<'a>(&'a self, prompts: &'a Prompts, number: usize) -> impl Iterator<Item = IndexRow> + 'a {
        let places = (REGION_BYTES / PAGE_BYTES - u64::from(FIRST_PAGE)) / u64::from(PAGES);
        let first = (number * crate::PROMPT_BLOCKS) as u64;
        (0u32..).zip(prompts.chain(number)).map(move |(depth, (key, parent))| {
            let at = first + u64::from(depth);
            let (region, generation) = self.regions[(at / KEYS_PER_REGION) as usize % self.regions.len()];
            let page = FIRST_PAGE + (at % places) as u32 * PAGES;
            IndexRow {
                id: RecordId { namespace: self.namespace, group: 0, shard: 0, key },
                parent,
                depth,
                location: Location { region, generation, page, pages: PAGES },
                payload_bytes: crate::BLOCK_BYTES,
                sequence: at + 1,
                kind: RecordKind::Kv,
            }
        })
    }

    fn wal_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for file in std::fs::read_dir(self.path.join("index"))? {
            let file = file?;
            if file.file_name().to_string_lossy().ends_with(".log") {
                // A log may go meanwhile.
                bytes += file.metadata().map_or(0, |metadata| metadata.len());
            }
        }
        Ok(bytes)
    }
}

fn used(store: &Store) -> Vec<(u32, u64)> {
    let regions = store.regions().into_iter().filter(|info| info.state != RegionState::Free);
    regions.map(|info| (info.region, info.generation)).collect()
}
