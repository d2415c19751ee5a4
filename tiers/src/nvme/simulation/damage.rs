//! Damage to what is on the drive, piece by piece: one bit of every byte of every structure, and a write that was cut at
//! every sector. What is damaged may be missing; it is never wrong, and takes nothing else with it.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::history::{BLOCK_BYTES, End, History, OBJECTS, Simulator, Step, id_of};
use super::model::{Fact, Seen, content};
use super::world::Saved;
use super::{SimFailure, SimFailureKind};
use crate::block::RecordKind;
use crate::error::ErrorKind;
use crate::index::Location;
use crate::nvme::encryption::KEY_FILES;

const PAGE_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;
/// The region of the torn write.
const TORN_REGION_BYTES: u64 = 1 << 20;
/// The files of a store with one drive.
const REGIONS: &str = "regions.0";
const SUPERBLOCK: &str = "superblock";
const NAMESPACES: &str = "namespaces";

/// What was damaged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DamageTally {
    /// Bits that were flipped, one at a time.
    pub flips: u64,
    /// Places at which the log of a region was cut.
    pub torn_cuts: u64,
    /// Records that were read afterwards and were right.
    pub right: u64,
    /// Records that were not there, as they should not be.
    pub missing: u64,
}

impl DamageTally {
    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        self.flips += other.flips;
        self.torn_cuts += other.torn_cuts;
        self.right += other.right;
        self.missing += other.missing;
    }
}

fn flip(bytes: &mut [u8], at: usize) {
    bytes[at] ^= 1 << (at % 8);
}

impl Simulator {
    /// Flips one bit of every `stride`th byte of each structure, and of `payload_bytes` bytes of payload.
    ///
    /// # Errors
    /// What was wrong; the seed is 0.
    pub fn flips(&self, stride: usize, payload_bytes: usize) -> Result<DamageTally, SimFailure> {
        self.guarded(0, |path, arena| {
            let mut damage = Damage::new(self.with_key(History::new(path, 0, arena, false)))?;
            damage.flip_record(stride, payload_bytes)?;
            damage.flip_region_headers(stride)?;
            damage.flip_superblocks(stride)?;
            damage.flip_namespace(stride)?;
            if self.is_encrypted() {
                damage.flip_keys(stride)?;
            }
            Ok(damage.tally)
        })
    }

    /// Cuts the log of a region of 1 MiB at every `stride`th sector.
    ///
    /// # Errors
    /// What was wrong; the seed is 0.
    pub fn tears(&self, stride: usize) -> Result<DamageTally, SimFailure> {
        self.guarded(0, |path, arena| {
            let mut history = self.with_key(History::new(path, 0, arena, false));
            history.world.config.region_bytes = TORN_REGION_BYTES;
            history.world.config.capacity_bytes = 4 * TORN_REGION_BYTES;
            let mut damage = Damage::new(history)?;
            damage.tear(stride.max(1))?;
            Ok(damage.tally)
        })
    }
}

/// A closed store of a few objects and blocks, and its drive and index as they then were.
struct Damage {
    history: History,
    saved: Saved,
    tally: DamageTally,
}

impl Damage {
    fn new(mut history: History) -> Step<Self> {
        history.world.config.capacity_bytes = history.world.config.capacity_bytes.max(6 << 16);
        history.open(false)?;
        for name in 0..OBJECTS + 3 {
            let (kind, version, bytes) = match name {
                0..OBJECTS => (RecordKind::Object, name + 1, 3000 + 1700 * name as usize),
                _ => (RecordKind::Kv, 0, BLOCK_BYTES),
            };
            history.append(name, kind, Fact::There { version, bytes })?;
            history.catch_up()?;
        }
        history.end(End::Close)?;
        let saved = history.world.save();
        Ok(Self { history, saved, tally: DamageTally::default() })
    }

    fn reset(&mut self) {
        self.history.world.store = None;
        self.history.world.load(&self.saved);
    }

    /// Opens the damaged store and reads everything: what is there is right. How many records there were; `None` if the
    /// store is refused as damaged.
    fn look(&mut self) -> Step<Option<u64>> {
        match self.history.world.open() {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NewerFormat) => return Ok(None),
            Err(error) => return Err((SimFailureKind::Refused, format!("the damaged store does not open: {error:#}"))),
        }
        let mut right = 0;
        for name in self.history.model.names() {
            let Some(id) = id_of(name, self.history.namespace) else { continue };
            let (seen, fact) = (self.history.world.look(id)?, self.history.model.sure(name));
            match (seen, fact) {
                (Seen::Nothing, _) => self.tally.missing += 1,
                (Seen::Bytes(_, found), Fact::There { version, bytes }) if found == content(name, version, bytes) => {
                    right += 1;
                }
                (Seen::Bytes(location, _), fact) => {
                    let message = format!("record {name} at {location:?} has other bytes than {fact:?}");
                    return Err((SimFailureKind::WrongBytes, message));
                }
            }
        }
        self.tally.right += right;
        self.history.world.settle()?;
        self.history.world.end();
        self.history.world.disk().restart(0, crate::nvme::io::SimCrash::Kill);
        Ok(Some(right))
    }

    fn expect(&self, what: &str, found: Option<u64>, expected: Option<u64>) -> Step {
        if found == expected {
            return Ok(());
        }
        Err((SimFailureKind::LostDurable, format!("{what}: {found:?} records, expected {expected:?}")))
    }

    /// A record with a flipped bit is a miss, wherever the bit is.
    fn flip_record(&mut self, stride: usize, payload_bytes: usize) -> Step {
        self.reset();
        self.history.open(false)?;
        let name = 5;
        let Some(id) = id_of(name, None) else { return Ok(()) };
        let Seen::Bytes(location, bytes) = self.history.world.look(id)? else {
            return Err((SimFailureKind::LostDurable, "the record to be damaged is not there".to_owned()));
        };
        let mut random = SmallRng::seed_from_u64(0);
        let header = (0..PAGE_BYTES).step_by(stride);
        let payload = (0..payload_bytes).map(|_| PAGE_BYTES + random.random_range(0..bytes.len()));
        for at in header.chain(payload) {
            let offset = self.offset_of(&location) + at as u64;
            self.history.world.change(REGIONS, offset, 1, |byte| byte[0] ^= 1 << (at % 8));
            let read = self.history.world.read(id, location)?;
            self.history.world.change(REGIONS, offset, 1, |byte| byte[0] ^= 1 << (at % 8));
            self.tally.flips += 1;
            match read {
                Err(error) if error.kind() == ErrorKind::Corrupt => self.tally.missing += 1,
                Err(error) => return Err((SimFailureKind::Refused, format!("a flipped bit at {at}: {error:#}"))),
                Ok(_) => return Err((SimFailureKind::WrongBytes, format!("a flipped bit at {at} went unnoticed"))),
            }
            self.history.world.settle()?;
        }
        self.history.end(End::PowerLoss)
    }

    fn offset_of(&self, location: &Location) -> u64 {
        u64::from(location.region) * self.history.world.config.region_bytes
            + u64::from(location.page) * PAGE_BYTES as u64
    }

    /// One damaged header of a region costs nothing, as its twin is there; both cost the region.
    fn flip_region_headers(&mut self, stride: usize) -> Step {
        self.reset();
        let all = self.look()?;
        for at in (0..PAGE_BYTES).step_by(stride) {
            for slots in [&[0][..], &[1], &[0, 1]] {
                self.reset();
                for slot in slots {
                    self.history.world.change(REGIONS, slot * PAGE_BYTES as u64, PAGE_BYTES, |page| flip(page, at));
                    self.tally.flips += 1;
                }
                let found = self.look()?;
                if slots.len() == 1 {
                    self.expect(&format!("byte {at} of header {slots:?}"), found, all)?;
                } else if found >= all {
                    let message = format!("byte {at} of both headers of a region went unnoticed");
                    return Err((SimFailureKind::WrongBytes, message));
                }
            }
        }
        Ok(())
    }

    /// One damaged superblock costs nothing; both are told.
    fn flip_superblocks(&mut self, stride: usize) -> Step {
        self.reset();
        let all = self.look()?;
        for at in (0..PAGE_BYTES).step_by(stride) {
            for copies in [&[0][..], &[1], &[0, 1]] {
                self.reset();
                for copy in copies {
                    self.history.world.change(SUPERBLOCK, copy * PAGE_BYTES as u64, PAGE_BYTES, |page| flip(page, at));
                    self.tally.flips += 1;
                }
                let found = self.look()?;
                let expected = if copies.len() == 1 { all } else { None };
                self.expect(&format!("byte {at} of superblocks {copies:?}"), found, expected)?;
            }
        }
        Ok(())
    }

    /// A damaged namespace is restored from the index; without that its blocks are misses.
    fn flip_namespace(&mut self, stride: usize) -> Step {
        self.reset();
        let all = self.look()?;
        for at in (0..SECTOR_BYTES).step_by(stride) {
            for has_index in [true, false] {
                self.reset();
                self.history.world.change(NAMESPACES, 0, SECTOR_BYTES, |entry| flip(entry, at));
                if !has_index {
                    self.history.world.wipe_index();
                }
                self.tally.flips += 1;
                let found = self.look()?;
                let expected = if has_index { all } else { all.map(|all| all - 3) };
                self.expect(&format!("byte {at} of a namespace, index {has_index}"), found, expected)?;
            }
        }
        Ok(())
    }

    /// One damaged entry of a key costs nothing, as its twin is there. Both of a data key cost what it sealed; both of the
    /// store's secret are told.
    fn flip_keys(&mut self, stride: usize) -> Step {
        self.reset();
        let all = self.look()?;
        for at in (0..SECTOR_BYTES).step_by(stride) {
            // Entry 1 is of the objects, 2 of the blocks.
            for (entry, left) in [(0, None), (1, Some(3)), (2, all.map(|all| all - 3))] {
                for files in [&KEY_FILES[..1], &KEY_FILES[1..], &KEY_FILES[..]] {
                    self.reset();
                    let offset = entry * SECTOR_BYTES as u64;
                    for name in files {
                        self.history.world.change(name, offset, SECTOR_BYTES, |entry| flip(entry, at));
                        self.tally.flips += 1;
                    }
                    let found = self.look()?;
                    let expected = if files.len() == 1 { all } else { left };
                    self.expect(&format!("byte {at} of key {entry} in {files:?}"), found, expected)?;
                }
            }
        }
        Ok(())
    }

    /// The log of a region, written and never synced, reaches the drive up to a sector: what is whole is found, the rest
    /// is a miss.
    fn tear(&mut self, stride: usize) -> Step {
        self.reset();
        let before = self.region_image()?;
        self.history.open(false)?;
        let mut random = SmallRng::seed_from_u64(1);
        let mut ends = Vec::new();
        for name in 100.. {
            let bytes = random.random_range(1..PAGE_BYTES * 12);
            self.history.append(name, RecordKind::Object, Fact::There { version: name, bytes })?;
            self.history.catch_up()?;
            while self.history.world.disk().step() {
                self.history.catch_up()?;
            }
            let used = self.history.world.store.as_ref().map_or(0, |store| store.regions()[0].used_bytes);
            if ends.last() == Some(&(name - 1, used)) || ends.last().is_some_and(|(_, last)| *last == used) {
                break;
            }
            ends.push((name, used));
        }
        let after = self.region_image()?;
        self.history.world.end();
        let facts: Vec<Fact> = ends.iter().map(|(name, _)| self.history.model.newest(*name)).collect();
        for cut in (0..=after.len() / SECTOR_BYTES).step_by(stride) {
            let cut = cut * SECTOR_BYTES;
            self.reset_power();
            let torn: Vec<u8> = after[..cut].iter().chain(&before[cut..]).copied().collect();
            self.history.world.change(REGIONS, 0, torn.len(), |image| image.copy_from_slice(&torn));
            self.tally.torn_cuts += 1;
            self.open_torn()?;
            for ((name, end), fact) in ends.iter().zip(&facts) {
                let Some(id) = id_of(*name, None) else { continue };
                let is_whole = *end <= cut as u64;
                match (self.history.world.look(id)?, fact) {
                    (Seen::Nothing, _) if !is_whole => self.tally.missing += 1,
                    (Seen::Bytes(_, found), Fact::There { version, bytes })
                        if found == content(*name, *version, *bytes) =>
                    {
                        self.tally.right += 1;
                    }
                    (Seen::Nothing, _) => {
                        let message = format!("cut at {cut}: record {name} ends at {end} and is not there");
                        return Err((SimFailureKind::LostDurable, message));
                    }
                    (Seen::Bytes(..), _) => {
                        let message = format!("cut at {cut}: record {name} has wrong bytes");
                        return Err((SimFailureKind::WrongBytes, message));
                    }
                }
            }
            // What was durable before is there whatever was cut behind it.
            if cut as u64 >= before.len() as u64 / 8 {
                let found = self.look_at_old()?;
                self.expect(&format!("cut at {cut}: what was durable"), Some(found), Some(OBJECTS + 3))?;
            }
            self.history.world.end();
        }
        self.reset_power();
        Ok(())
    }

    fn open_torn(&mut self) -> Step {
        let opened = self.history.world.open();
        opened.map(drop).map_err(|error| (SimFailureKind::Refused, format!("the torn store does not open: {error:#}")))
    }

    fn reset_power(&mut self) {
        self.history.world.disk().restart(0, crate::nvme::io::SimCrash::Kill);
        self.reset();
    }

    fn look_at_old(&mut self) -> Step<u64> {
        let mut right = 0;
        for name in 0..OBJECTS + 3 {
            let Some(id) = id_of(name, self.history.namespace) else { continue };
            if let (Seen::Bytes(_, found), Fact::There { version, bytes }) =
                (self.history.world.look(id)?, self.history.model.sure(name))
            {
                right += u64::from(found == content(name, version, bytes));
            }
        }
        Ok(right)
    }

    fn region_image(&self) -> Step<Vec<u8>> {
        let bytes = self.history.world.config.region_bytes as usize;
        let file = self.history.world.file(REGIONS);
        file.and_then(|file| self.history.world.disk().bytes_of(&file, 0, bytes))
            .map_err(|error| (SimFailureKind::Refused, format!("no image: {error}")))
    }
}
