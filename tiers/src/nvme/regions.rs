//! The regions in memory: the state, the generation and the pins of each. Owns who may read a region and who may take
//! it; never does I/O. The generation of every region is an atomic of its own, so that lookups take no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::inbox::Inbox;
use super::page::PAGE_BYTES;
use super::policy::{RegionInfo, RegionState};
use super::switches::is_off;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// The lookup side of a region.
#[derive(Default)]
struct Gate {
    /// The generation whose records may be found; 0: none.
    generation: AtomicU64,
    last_access: AtomicU64,
    used_records: AtomicU64,
    /// The clock at the last use of a record.
    last_use: AtomicU64,
}

/// Epochs that pass while as many bytes are written as the store holds; see [`crate::index::Uses`].
const EPOCHS_PER_TURN: u64 = 16;

/// The rest of a region, behind the lock.
#[derive(Clone)]
struct Region {
    /// The drive that it lies on; `None` for a number that no drive has, which is free and never taken.
    drive: Option<usize>,
    state: RegionState,
    generation: u64,
    first_sequence: u64,
    records: u64,
    live_bytes: u64,
    used_pages: u32,
    pins: u32,
    /// Whether it holds records that hide older ones elsewhere.
    hides: bool,
    /// Whether everything in it is durable and in the index. To give up a region with records on their way would lose
    /// what was never found, and removals with it.
    is_settled: bool,
}

impl Region {
    fn may_go(&self) -> bool {
        self.state == RegionState::Sealed
            && (self.is_settled || is_off!(ReclaimUnsettled))
            && (self.pins == 0 || is_off!(IgnorePins))
    }
}

/// All regions of a store.
pub(super) struct Regions {
    gates: Vec<Gate>,
    regions: Mutex<Vec<Region>>,
    tick: AtomicU64,
    /// The highest generation of a region with records: it rises by two with every region that is opened.
    clock: AtomicU64,
    /// Set while the writer waits for pins to go.
    is_writer_starving: AtomicBool,
    inbox: Arc<Inbox>,
}

impl Regions {
    /// Free regions, by number: the drive that each lies on, `None` for numbers that no drive has.
    pub(super) fn new(drives: impl IntoIterator<Item = Option<usize>>, inbox: Arc<Inbox>) -> Self {
        let free = |drive| Region {
            drive,
            state: RegionState::Free,
            generation: 0,
            first_sequence: 0,
            records: 0,
            live_bytes: 0,
            used_pages: 0,
            pins: 0,
            hides: false,
            is_settled: false,
        };
        let regions: Vec<Region> = drives.into_iter().map(free).collect();
        Self {
            gates: regions.iter().map(|_| Gate::default()).collect(),
            regions: Mutex::new(regions),
            tick: AtomicU64::new(1),
            clock: AtomicU64::new(0),
            is_writer_starving: AtomicBool::new(false),
            inbox,
        }
    }

    /// How many numbers there are.
    pub(super) fn count(&self) -> u32 {
        self.gates.len() as u32
    }

    /// The location with its whole generation, if the region is still in the generation whose low 16 bits it carries.
    pub(super) fn resolve(&self, location: Location) -> Option<Location> {
        let generation = self.gates.get(location.region as usize)?.generation.load(Ordering::Acquire);
        (generation != 0 && generation & 0xffff == location.generation & 0xffff)
            .then_some(Location { generation, ..location })
    }

    /// Whether the region is in the location's generation, be it found by lookups or not: a region that is being
    /// reclaimed may yet be given back.
    pub(super) fn holds(&self, location: &Location) -> bool {
        self.regions
            .lock()
            .get(location.region as usize)
            .is_some_and(|region| region.state != RegionState::Free && region.generation == location.generation)
    }

    /// As [`Regions::holds`], of a location with the low 16 bits of a generation.
    pub(super) fn may_hold(&self, location: &Location) -> bool {
        self.regions.lock().get(location.region as usize).is_some_and(|region| {
            region.state != RegionState::Free && region.generation & 0xffff == location.generation & 0xffff
        })
    }

    /// A number for one access, for [`Regions::touch`].
    pub(super) fn next_tick(&self) -> u64 {
        self.tick.fetch_add(1, Ordering::Relaxed)
    }

    /// Notes an access to a region.
    pub(super) fn touch(&self, region: u32, tick: u64) {
        if let Some(gate) = self.gates.get(region as usize) {
            gate.last_access.fetch_max(tick, Ordering::Relaxed);
        }
    }

    /// The epoch in which a use falls.
    pub(super) fn epoch(&self) -> u16 {
        // Modulo 2^16, which is what epochs are compared by.
        (self.clock.load(Ordering::Relaxed) / 2 * EPOCHS_PER_TURN / self.gates.len().max(1) as u64) as u16
    }

    /// Notes that a record of a region was used, and whether for the first time.
    pub(super) fn note_use(&self, region: u32, is_first: bool) {
        if let Some(gate) = self.gates.get(region as usize) {
            gate.used_records.fetch_add(u64::from(is_first), Ordering::Relaxed);
            gate.last_use.fetch_max(self.clock.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Keeps the regions of `locations` from being reclaimed.
    ///
    /// # Errors
    /// `NotFound` if the generation of one of them is over; then none is pinned.
    pub(super) fn pin(self: &Arc<Self>, locations: &[Location]) -> Result<RegionPins> {
        let mut wanted: Vec<(u32, u64)> = locations.iter().map(|l| (l.region, l.generation)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut regions = self.regions.lock();
        for &(number, generation) in &wanted {
            let is_readable = |region: &&Region| {
                region.generation == generation && matches!(region.state, RegionState::Open | RegionState::Sealed)
            };
            if regions.get(number as usize).filter(is_readable).is_none() {
                let message =
                    format!("region {number} is no longer in generation {generation}; look the block up again");
                return Err(Error::new(ErrorKind::NotFound, message));
            }
        }
        for &(number, _) in &wanted {
            regions[number as usize].pins += 1;
        }
        drop(regions);
        Ok(RegionPins { regions: Arc::clone(self), pinned: wanted.into_iter().map(|(number, _)| number).collect() })
    }

    fn unpin(&self, pinned: &[u32]) {
        let mut regions = self.regions.lock();
        for &number in pinned {
            regions[number as usize].pins -= 1;
        }
        drop(regions);
        if self.is_writer_starving.load(Ordering::Acquire) {
            self.inbox.poke();
        }
    }

    /// Says whether the writer waits for pins to go.
    pub(super) fn set_writer_starving(&self, is_starving: bool) {
        self.is_writer_starving.store(is_starving, Ordering::Release);
    }

    /// A region begins to take records of a new generation.
    pub(super) fn open(&self, number: u32, generation: u64, first_sequence: u64) {
        let mut regions = self.regions.lock();
        let region = &mut regions[number as usize];
        assert_eq!(region.state, RegionState::Free, "invariant: only a free region is opened");
        *region = Region {
            state: RegionState::Open,
            generation,
            first_sequence,
            hides: false,
            is_settled: false,
            ..region.clone()
        };
        self.begin_life(number, generation);
        self.publish(number, generation);
    }

    fn begin_life(&self, number: u32, generation: u64) {
        let gate = &self.gates[number as usize];
        gate.used_records.store(0, Ordering::Relaxed);
        gate.last_use.store(0, Ordering::Relaxed);
        self.clock.fetch_max(generation, Ordering::Relaxed);
    }

    /// Takes up a region as recovery found it.
    pub(super) fn restore(&self, number: u32, generation: u64, first_sequence: u64, hides: bool) {
        let mut regions = self.regions.lock();
        let region = &mut regions[number as usize];
        *region = Region {
            drive: region.drive,
            state: RegionState::Sealed,
            generation,
            first_sequence,
            hides,
            records: 0,
            live_bytes: 0,
            used_pages: 0,
            pins: 0,
            is_settled: true,
        };
        self.begin_life(number, generation);
        self.publish(number, generation);
    }

    /// Recovery found that nothing in the region counts.
    pub(super) fn clear(&self, number: u32) {
        self.change(number, |region| {
            (region.state, region.generation, region.hides) = (RegionState::Free, 0, false);
            (region.records, region.live_bytes, region.used_pages) = (0, 0, 0);
        });
        self.publish(number, 0);
    }

    /// No drive has the region any more: nothing in it is found, and it is never taken.
    pub(super) fn withdraw(&self, number: u32) {
        self.clear(number);
        self.change(number, |region| region.drive = None);
    }

    /// Goes on with a region that recovery found to have room.
    pub(super) fn reopen(&self, number: u32) {
        self.change(number, |region| (region.state, region.is_settled) = (RegionState::Open, false));
    }

    /// No more records go to an open region.
    pub(super) fn seal(&self, number: u32) {
        self.change(number, |region| {
            assert_eq!(region.state, RegionState::Open, "invariant: only an open region is sealed");
            region.state = RegionState::Sealed;
        });
    }

    /// Everything in a sealed region is durable and in the index: from now on it may be given up.
    pub(super) fn settle(&self, number: u32) {
        self.change(number, |region| region.is_settled = true);
    }

    /// Pages up to `page` were written.
    pub(super) fn set_used(&self, number: u32, page: u32) {
        self.change(number, |region| region.used_pages = region.used_pages.max(page));
    }

    /// Notes that the region holds records that hide older ones; whether that is new.
    pub(super) fn set_hiding(&self, number: u32) -> bool {
        let mut is_new = false;
        self.change(number, |region| is_new = !std::mem::replace(&mut region.hides, true));
        is_new
    }

    /// The index points to a record.
    pub(super) fn count_in(&self, location: &Location) {
        self.count_one(location, |region, bytes| {
            region.records += 1;
            region.live_bytes += bytes;
        });
    }

    /// The index no longer points to a record.
    pub(super) fn count_out(&self, location: &Location) {
        self.count_one(location, |region, bytes| {
            region.records = region.records.saturating_sub(1);
            region.live_bytes = region.live_bytes.saturating_sub(bytes);
        });
    }

    fn count_one(&self, location: &Location, count: impl FnOnce(&mut Region, u64)) {
        if let Some(region) = self.regions.lock().get_mut(location.region as usize)
            && region.generation & 0xffff == location.generation & 0xffff
        {
            count(region, location.bytes());
        }
    }

    /// Takes a sealed region without pins away from the readers; `None` if it is pinned or in another state.
    pub(super) fn begin_reclaim(&self, number: u32) -> Option<RegionInfo> {
        let mut regions = self.regions.lock();
        let region = regions.get_mut(number as usize)?;
        if !region.may_go() {
            return None;
        }
        region.state = RegionState::Reclaiming;
        self.publish(number, 0);
        Some(self.info(number, region))
    }

    /// Gives a region back to the readers: it could not be reclaimed.
    pub(super) fn abort_reclaim(&self, number: u32) {
        let mut regions = self.regions.lock();
        let region = &mut regions[number as usize];
        assert_eq!(region.state, RegionState::Reclaiming, "invariant: only a region being reclaimed is given back");
        region.state = RegionState::Sealed;
        self.publish(number, region.generation);
    }

    /// The region is free, in a new generation that is durable; how many records the index still points to.
    pub(super) fn finish_reclaim(&self, number: u32, generation: u64) -> u64 {
        let mut regions = self.regions.lock();
        let region = &mut regions[number as usize];
        assert_eq!(region.state, RegionState::Reclaiming, "invariant: a region is reclaimed before it is free");
        assert!(region.pins == 0 || is_off!(IgnorePins), "invariant: a region that is reclaimed has no pins");
        let records = region.records;
        *region = Region {
            drive: region.drive,
            state: RegionState::Free,
            generation,
            first_sequence: 0,
            records: 0,
            live_bytes: 0,
            used_pages: 0,
            hides: false,
            pins: 0,
            is_settled: false,
        };
        records
    }

    /// The lowest sequence that a record in a region other than `number` can have; `None` if there is no such record.
    pub(super) fn oldest_sequence_besides(&self, number: u32) -> Option<u64> {
        let regions = self.regions.lock();
        let others = (0u32..)
            .zip(regions.iter())
            .filter(|(other, region)| *other != number && region.state != RegionState::Free);
        others.map(|(_, region)| region.first_sequence).min()
    }

    /// Whether the region holds records that hide older ones.
    pub(super) fn is_hiding(&self, number: u32) -> bool {
        self.regions.lock()[number as usize].hides
    }

    /// The regions of a drive that may be given up.
    pub(super) fn candidates(&self, drive: usize) -> Vec<RegionInfo> {
        let regions = self.regions.lock();
        let candidates =
            (0u32..).zip(regions.iter()).filter(|(_, region)| region.drive == Some(drive) && region.may_go());
        candidates.map(|(number, region)| self.info(number, region)).collect()
    }

    /// All regions that a drive has.
    pub(super) fn infos(&self) -> Vec<RegionInfo> {
        let regions = self.regions.lock();
        let there = (0u32..).zip(regions.iter()).filter(|(_, region)| region.drive.is_some());
        there.map(|(number, region)| self.info(number, region)).collect()
    }

    fn info(&self, number: u32, region: &Region) -> RegionInfo {
        let gate = &self.gates[number as usize];
        let opened_since = |clock: u64| self.clock.load(Ordering::Relaxed).saturating_sub(clock) / 2;
        RegionInfo {
            region: number,
            drive: region.drive.unwrap_or(0) as u32,
            generation: region.generation,
            state: region.state,
            records: region.records,
            live_bytes: region.live_bytes,
            used_bytes: u64::from(region.used_pages) * PAGE_BYTES as u64,
            first_sequence: region.first_sequence,
            last_access: gate.last_access.load(Ordering::Relaxed),
            pins: region.pins,
            used_records: gate.used_records.load(Ordering::Relaxed),
            age: opened_since(region.generation),
            idle: opened_since(region.generation.max(gate.last_use.load(Ordering::Relaxed))),
        }
    }

    fn change(&self, number: u32, change: impl FnOnce(&mut Region)) {
        change(&mut self.regions.lock()[number as usize]);
    }

    fn publish(&self, number: u32, generation: u64) {
        self.gates[number as usize].generation.store(generation, Ordering::Release);
        let tick = self.next_tick();
        self.touch(number, tick);
    }
}

/// Keeps regions from being reclaimed as long as it lives.
pub struct RegionPins {
    regions: Arc<Regions>,
    pinned: Vec<u32>,
}

impl Drop for RegionPins {
    fn drop(&mut self) {
        self.regions.unpin(&self.pinned);
    }
}

impl std::fmt::Debug for RegionPins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegionPins").field("pinned", &self.pinned).finish_non_exhaustive()
    }
}
