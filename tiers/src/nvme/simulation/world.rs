//! One simulated machine: its drive, the store on it if one is open, and what both are asked to do, in lockstep. After
//! each request the store's threads run until all of them wait; only then does something else happen.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::model::Seen;
use super::{SimBacking, SimFailureKind};
use crate::block::{BlockKey, RecordId, RecordKind};
use crate::codec::CodecChoice;
use crate::dram::{Arena, Slot};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{Location, TwinIndex};
use crate::nvme::append::Append;
use crate::nvme::config::{DriveConfig, StoreConfig};
use crate::nvme::fill::FillPlan;
use crate::nvme::io::{IoPriority, SavedImages, SimCrash, SimDisk};
use crate::nvme::page::PAGE_BYTES;
use crate::nvme::policy::{ReclaimPolicy, RegionInfo};
use crate::nvme::recovery::RecoveryReport;
use crate::nvme::store::Store;
use crate::nvme::superblock::{SUPERBLOCK_COPIES, Superblock};
use crate::nvme::switches;

/// How long anything may take before it counts as a hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of every region: the fewest that there are.
pub(in crate::nvme) const REGION_BYTES: u64 = 64 << 10;
/// Payload bytes of every slot: the largest record of a region of 64 KiB.
pub(in crate::nvme) const PAYLOAD_BYTES_MAX: usize = 13 * 4096;

/// Gives up regions by a rule, and notes which it may have given up.
pub(in crate::nvme) struct SimPolicy {
    rule: Rule,
    disk: Arc<SimDisk>,
    random: Mutex<SmallRng>,
    /// What goes first, if it can.
    preferred: Mutex<Option<u32>>,
    chosen: Mutex<Vec<(u32, u64)>>,
}

/// Which region goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nvme) enum Rule {
    Oldest,
    Newest,
    LeastRecent,
    Random,
}

impl SimPolicy {
    pub(in crate::nvme) fn new(rule: Rule, disk: &Arc<SimDisk>) -> Arc<Self> {
        let random = Mutex::new(SmallRng::seed_from_u64(0));
        let (preferred, chosen) = (Mutex::default(), Mutex::default());
        Arc::new(Self { rule, disk: Arc::clone(disk), random, preferred, chosen })
    }

    /// Chance begins anew: what a store without power still asked for is forgotten.
    fn reseed(&self, seed: u64) {
        *self.random.lock() = SmallRng::seed_from_u64(seed);
    }

    /// From now on a region goes before all others.
    #[cfg(test)]
    pub(in crate::nvme) fn prefer(&self, region: Option<u32>) {
        *self.preferred.lock() = region;
    }

    /// The lives of regions that were chosen since this was last asked.
    pub(in crate::nvme) fn take_chosen(&self) -> Vec<(u32, u64)> {
        std::mem::take(&mut self.chosen.lock())
    }
}

impl ReclaimPolicy for SimPolicy {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        let oldest = candidates.iter().min_by_key(|info| info.first_sequence)?;
        let preferred = *self.preferred.lock();
        let preferred = candidates.iter().find(|info| Some(info.region) == preferred);
        let victim = match self.rule {
            _ if preferred.is_some() => preferred?,
            Rule::Oldest => oldest,
            Rule::Newest => candidates.iter().max_by_key(|info| info.first_sequence)?,
            Rule::LeastRecent => candidates.iter().min_by_key(|info| info.last_access)?,
            Rule::Random => candidates.get(self.random.lock().random_range(0..candidates.len()))?,
        };
        // The store takes the oldest where the chosen one can not go. Without power nothing goes.
        if self.disk.is_off() {
            return Some(victim.region);
        }
        self.chosen.lock().extend([victim, oldest].map(|info| (info.region, info.generation)));
        Some(victim.region)
    }
}

/// How an append ended: its number, and where it is or why not.
pub(in crate::nvme) type End = (u64, Result<Location>);

/// A drive and an index at one moment.
pub(in crate::nvme) struct Saved {
    images: SavedImages,
    pub(in crate::nvme) index: TwinIndex,
}

/// See the module.
pub(in crate::nvme) struct World {
    pub(in crate::nvme) backing: SimBacking,
    pub(in crate::nvme) config: StoreConfig,
    pub(in crate::nvme) policy: Arc<SimPolicy>,
    arena: Arc<Arena>,
    pub(in crate::nvme) store: Option<Arc<Store>>,
    ends: Arc<Mutex<Vec<End>>>,
}

impl World {
    /// A machine with empty drives of so many regions each, the home first; their names are in the directory `path`.
    pub(in crate::nvme) fn new(path: &Path, seed: u64, regions: &[u64], rule: Rule, arena: &Arc<Arena>) -> Self {
        let (home, more) = regions.split_first().unwrap_or((&0, &[]));
        let drive = |(number, regions): (u64, &u64)| DriveConfig {
            path: drive_path(path, number),
            capacity_bytes: regions * REGION_BYTES,
        };
        let config = StoreConfig {
            queue_depth: 8,
            // Encoders are threads with a timing of their own.
            codec: CodecChoice::None,
            // There is no clock: groups end when they are flushed, full, or when a region is wanted.
            commit_interval: Duration::from_secs(24 * 3600),
            more_drives: (1..).zip(more).map(drive).collect(),
            ..StoreConfig::new(path.join("store"), home * REGION_BYTES, REGION_BYTES)
        };
        let disk = SimDisk::new(seed);
        Self {
            policy: SimPolicy::new(rule, &disk),
            backing: SimBacking { disk, index: TwinIndex::default() },
            config,
            arena: Arc::clone(arena),
            store: None,
            ends: Arc::default(),
        }
    }

    pub(in crate::nvme) fn disk(&self) -> &SimDisk {
        &self.backing.disk
    }

    /// Everything on the drive and in the index, to be put back later.
    pub(in crate::nvme) fn save(&self) -> Saved {
        Saved { images: self.disk().save(), index: self.backing.index.copy() }
    }

    /// Puts it back. No store may be open.
    pub(in crate::nvme) fn load(&self, saved: &Saved) {
        self.disk().load(&saved.images);
        self.backing.index.restore(&saved.index);
        // Also where the index was lost meanwhile.
        drop(std::fs::create_dir(self.store_path().join("index")));
    }

    /// One of the store's files, which stands for its image.
    ///
    /// # Errors
    /// What the file system reports.
    pub(in crate::nvme) fn file(&self, name: &str) -> std::io::Result<File> {
        File::open(self.store_path().join(name))
    }

    /// Changes bytes of a file behind the store's back.
    pub(in crate::nvme) fn change(&self, name: &str, offset: u64, bytes: usize, change: impl FnOnce(&mut [u8])) {
        let changed = self.file(name).and_then(|file| {
            let mut found = self.disk().bytes_of(&file, offset, bytes)?;
            change(&mut found);
            self.disk().overwrite(&file, offset, &found)
        });
        assert!(changed.is_ok(), "a file of the simulation: {changed:?}");
    }

    /// Where the store is.
    pub(in crate::nvme) fn store_path(&self) -> PathBuf {
        self.config.path.clone()
    }

    /// The file of regions of a drive, which stands for its image; 0 is the home.
    ///
    /// # Errors
    /// What the file system reports.
    pub(in crate::nvme) fn regions_file(&self, drive: usize) -> std::io::Result<File> {
        let path = self.config.drives().nth(drive).map(|(path, _)| path.join("regions.0"));
        File::open(path.unwrap_or_default())
    }

    /// Regions of a lower generation are not taken when the index is made anew.
    pub(in crate::nvme) fn rebuild_floor(&self) -> u64 {
        let bytes = SUPERBLOCK_COPIES as usize * PAGE_BYTES;
        let copies = self.file("superblock").and_then(|file| self.disk().bytes_of(&file, 0, bytes)).unwrap_or_default();
        Superblock::newest(copies.chunks_exact(PAGE_BYTES)).map_or(0, |superblock| superblock.rebuild_floor)
    }

    /// Opens the store.
    ///
    /// # Errors
    /// What the store reports.
    pub(in crate::nvme) fn open(&mut self) -> Result<RecoveryReport> {
        let policy: Arc<dyn ReclaimPolicy> = Arc::<SimPolicy>::clone(&self.policy);
        let opened = switches::simulated(|| {
            let (config, filling) = (self.config.clone(), FillPlan::default());
            Store::open_on(&self.backing, config, &self.arena, policy, |io| io, filling)
        });
        let (store, report) = opened?;
        self.store = Some(store);
        Ok(report)
    }

    /// Lets the store's threads run until all of them wait.
    ///
    /// # Errors
    /// If they do not.
    pub(in crate::nvme) fn settle(&self) -> Result<(), (SimFailureKind, String)> {
        match &self.store {
            Some(store) if !store.wait_idle(Instant::now() + PATIENCE) => {
                Err((SimFailureKind::Hang, "the writer does not come to rest".to_owned()))
            }
            Some(store) => match store.poisoned().filter(|error| error.message().contains("panicked")) {
                Some(error) => Err((SimFailureKind::Panic, error.to_string())),
                None => Ok(()),
            },
            None => Ok(()),
        }
    }

    /// Asks for a record to be written; how it ended is told by [`World::take_ends`] under `operation`.
    ///
    /// # Errors
    /// What the store reports.
    pub(in crate::nvme) fn append(
        &self,
        id: RecordId,
        kind: RecordKind,
        payload: Option<&[u8]>,
        operation: u64,
    ) -> Result<()> {
        let store = self.store.as_ref().ok_or_else(closed)?;
        let slot = payload.map(|payload| -> Result<Arc<Slot>> {
            let mut slot = self.slot()?;
            slot.payload_mut()[..payload.len()].copy_from_slice(payload);
            Ok(Arc::new(slot))
        });
        let ends = Arc::clone(&self.ends);
        let append = Append {
            id,
            kind,
            parent: BlockKey::ROOT,
            depth: 0,
            slot: slot.transpose()?,
            payload_bytes: payload.map_or(0, |payload| payload.len() as u64),
            done: Box::new(move |result| ends.lock().push((operation, result))),
        };
        store.append(append).map_err(|(_, error)| error)
    }

    /// How appends ended since this was last asked.
    pub(in crate::nvme) fn take_ends(&self) -> Vec<End> {
        std::mem::take(&mut self.ends.lock())
    }

    /// Asks for everything before to become durable, without waiting.
    pub(in crate::nvme) fn flush_soon(&self) {
        if let Some(store) = &self.store {
            store.flush_soon(drop);
        }
    }

    /// Looks a record up and reads it. What can not be read is nothing.
    ///
    /// # Errors
    /// A hang.
    pub(in crate::nvme) fn look(&self, id: RecordId) -> Result<Seen, (SimFailureKind, String)> {
        let Some(location) = self.store.as_ref().and_then(|store| store.locate(&id)) else { return Ok(Seen::Nothing) };
        Ok(self.read(id, location)?.map_or(Seen::Nothing, |bytes| Seen::Bytes(location, bytes)))
    }

    /// Reads a record at a place; `Err` inside for what the store reports.
    ///
    /// # Errors
    /// A hang.
    pub(in crate::nvme) fn read(
        &self,
        id: RecordId,
        location: Location,
    ) -> Result<Result<Vec<u8>>, (SimFailureKind, String)> {
        let Some(store) = &self.store else { return Ok(Err(closed())) };
        let slot = match self.slot() {
            Ok(slot) => Arc::new(slot),
            Err(error) => return Ok(Err(error)),
        };
        let (sender, receiver) = bounded(1);
        let done = Box::new(move |result| drop(sender.try_send(result)));
        if let Err(error) = store.read(id, location, Arc::clone(&slot), IoPriority::Demand, done) {
            return Ok(Err(error));
        }
        match receiver.recv_timeout(PATIENCE) {
            Ok(Ok(verified)) => {
                let bytes = usize::try_from(verified.payload_bytes).unwrap_or(usize::MAX);
                Ok(Ok(slot.payload().get(..bytes).map(<[u8]>::to_vec).unwrap_or_default()))
            }
            Ok(Err(error)) => Ok(Err(error)),
            Err(RecvTimeoutError::Timeout) => Err((SimFailureKind::Hang, "a read does not end".to_owned())),
            Err(RecvTimeoutError::Disconnected) => {
                Err((SimFailureKind::Panic, "a read ended without its callback".to_owned()))
            }
        }
    }

    fn slot(&self) -> Result<Slot> {
        self.arena.alloc(PAYLOAD_BYTES_MAX).ok_or_else(|| Error::new(ErrorKind::Busy, "the arena is full"))
    }

    /// Ends everything that waits on the drive, and what follows from it.
    ///
    /// # Errors
    /// A hang.
    pub(in crate::nvme) fn drain(&self) -> Result<(), (SimFailureKind, String)> {
        self.settle()?;
        while self.disk().step() {
            self.settle()?;
        }
        Ok(())
    }

    /// Closes the store in order.
    ///
    /// # Errors
    /// What the store reports.
    pub(in crate::nvme) fn close(&mut self) -> Result<()> {
        if let Err((_, message)) = self.drain() {
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        let Some(store) = self.store.take() else { return Ok(()) };
        self.disk().set_inline(true);
        let closed = store.close(Instant::now() + PATIENCE);
        drop(store);
        self.disk().set_inline(false);
        closed
    }

    /// The process ends, with the power or without.
    pub(in crate::nvme) fn end(&mut self) {
        self.disk().cut_power();
        drop(self.store.take());
    }

    /// The machine starts again.
    pub(in crate::nvme) fn restart(&self, random: &mut SmallRng, after: SimCrash) {
        self.disk().restart(random.random(), after);
        self.policy.reseed(random.random());
        if after == SimCrash::PowerLoss {
            self.backing.index.lose_power(|batches| random.random_range(0..=batches));
        }
    }

    /// The index is lost.
    pub(in crate::nvme) fn wipe_index(&self) {
        drop(std::fs::remove_dir_all(self.store_path().join("index")));
    }
}

/// Where a further drive is.
pub(in crate::nvme) fn drive_path(path: &Path, number: u64) -> PathBuf {
    path.join(format!("drive{number}"))
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "no store is open")
}
