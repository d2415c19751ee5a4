//! The drives as the writer sees them: a lane each, with the region that is open on it and those that are free. Records
//! go to the drive with the fewest bytes in flight, so all drives work at once and a slow one gets less.

use std::collections::VecDeque;
use std::time::Instant;

use super::{OpenRegion, Pending, What, Write, Writer};
use crate::error::Result;
use crate::nvme::append::QueuedRecord;
use crate::nvme::record_header::HeaderKind;
use crate::nvme::region_header::{HEADER_SLOTS, RegionPurpose};

/// One drive.
#[derive(Default)]
pub(super) struct Lane {
    /// The region that records go to.
    pub(super) open: Option<OpenRegion>,
    pub(super) free: VecDeque<u32>,
    /// Writes on their way, and their bytes.
    pub(super) in_flight: usize,
    pub(super) in_flight_bytes: u64,
    /// Whether the last write that ended failed: other drives are preferred then.
    pub(super) has_failed: bool,
    /// When to try again to give a region up while there is no need yet.
    pub(super) reclaim_again_at: Option<Instant>,
}

/// Writes to one drive that the engine has at most, and their bytes unless one record is larger. More than the drive takes
/// at once, so that the engine has neighbours to write together, and something to do while the writer does something else.
const WRITES_MAX: usize = 1024;
const WRITE_BYTES_MAX: u64 = 64 << 20;

impl Lane {
    pub(super) fn takes_more(&self) -> bool {
        self.in_flight < WRITES_MAX && self.in_flight_bytes < WRITE_BYTES_MAX
    }

    fn has_region(&self) -> bool {
        self.open.is_some() || !self.free.is_empty()
    }
}

impl Writer {
    /// A drive and its open region, with room for a record; opens another one if need be. `None`: there is none now.
    pub(super) fn room_for(&mut self, record: &QueuedRecord) -> Option<(usize, OpenRegion)> {
        let mut tried = vec![false; self.lanes.len()];
        let mut is_any_busy = false;
        while let Some(number) = self.best_lane(&tried) {
            tried[number] = true;
            if !self.lanes[number].takes_more() {
                is_any_busy = true;
            } else if let Some(open) = self.room_on(number, record.pages) {
                self.next_lane = (number + 1) % self.lanes.len();
                if self.starving_since.is_some() {
                    self.set_starving(false);
                }
                return Some((number, open));
            } else if self.shared.poisoned().is_some() || (!record.is_for_reclaim && self.has_copies_queued()) {
                // The room that is left on other drives was counted for the copies, which go first.
                return None;
            }
        }
        if is_any_busy {
            return None;
        }
        let is_new = self.starving_since.is_none();
        self.set_starving(true);
        // Now that nothing else is left there is a last resort; see `start_reclaim`. Nothing else would wake the writer.
        if is_new && self.lanes.len() > 1 { self.room_for(record) } else { None }
    }

    /// Pages that are left in all open regions.
    pub(super) fn room_in_open_regions(&self) -> u32 {
        let region_pages = self.shared.drive.region_pages();
        self.lanes.iter().filter_map(|lane| lane.open).map(|open| region_pages - open.next_page).sum()
    }

    fn best_lane(&self, tried: &[bool]) -> Option<usize> {
        let count = self.lanes.len();
        let cost = |&number: &usize| {
            let lane = &self.lanes[number];
            let turn = (number + count - self.next_lane) % count;
            (lane.has_failed, !lane.has_region(), lane.in_flight_bytes, turn)
        };
        (0..count).filter(|&number| !tried[number]).min_by_key(cost)
    }

    fn room_on(&mut self, number: usize, pages: u32) -> Option<OpenRegion> {
        let region_pages = self.shared.drive.region_pages();
        if let Some(open) = self.lanes[number].open {
            if open.next_page + pages <= region_pages {
                return Some(open);
            }
            self.seal_open_region(number);
        }
        if self.lanes[number].free.is_empty() {
            self.try_reclaim(number);
        }
        while let Some(region) = self.lanes[number].free.pop_front() {
            match self.open_region(region) {
                Ok(open) => {
                    self.lanes[number].open = Some(open);
                    return Some(open);
                }
                Err(error) if self.shared.poisoned().is_some() => {
                    tracing::debug!(%error, "no region is opened");
                    return None;
                }
                // It stays out of use until the store is opened again.
                Err(error) => tracing::warn!(region, error = format!("{error:#}"), "a region could not be opened"),
            }
        }
        None
    }

    /// No more records go to the open region of a drive. The index learns it after the last of them.
    pub(super) fn seal_open_region(&mut self, number: usize) {
        if let Some(open) = self.lanes[number].open.take() {
            self.shared.regions.seal(open.region);
            let (region, generation, sequence) = (open.region, open.generation, self.last_sequence);
            let page = self.shared.drive.region_pages();
            self.pending.push_back(Pending::new(What::Seal { region, generation, sequence, page }));
        }
    }

    /// Starts to write the header with which the records of a region will count. Until that is durable the region is a
    /// free one to whoever opens the store, whatever was written to it.
    fn open_region(&mut self, region: u32) -> Result<OpenRegion> {
        let first_sequence = self.counters.sequence();
        let (header, sequence) = self.write_header(region, RegionPurpose::Records, first_sequence)?;
        let generation = header.generation;
        let header = Box::new(header.encode());
        self.pending.push_back(Pending::new(What::Opened { region, header, sequence, write: Write::InFlight }));
        self.shared.regions.open(region, generation, first_sequence);
        self.shared.regions.set_used(region, HEADER_SLOTS);
        Ok(OpenRegion { region, generation, next_page: HEADER_SLOTS })
    }

    /// Counts a write of so many bytes to a region in.
    pub(super) fn note_started(&mut self, number: usize, bytes: u64) {
        self.in_flight += 1;
        let lane = &mut self.lanes[number];
        lane.in_flight += 1;
        lane.in_flight_bytes += bytes;
    }

    /// Counts a write that ended out.
    pub(super) fn note_ended(&mut self, region: u32, bytes: u64, has_failed: bool) {
        let Some(place) = self.shared.drive.place(region) else { return };
        let lane = &mut self.lanes[place.drive];
        lane.in_flight -= 1;
        lane.in_flight_bytes -= bytes;
        lane.has_failed = has_failed;
    }
}

/// Whether a record on its way hides older ones of its identity.
pub(super) fn hides_older(pending: &Pending) -> bool {
    matches!(&pending.what, What::Record { record, replaces, .. }
        if *replaces || record.kind == HeaderKind::Tombstone)
}
