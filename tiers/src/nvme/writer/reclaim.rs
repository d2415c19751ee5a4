//! The life of regions: free, open, sealed, given up, free. One free region is kept in reserve on each drive, so that
//! what has to be written before a region can be given up has a place.
//!
//! A region that is given up may hold records that hide older ones elsewhere (tombstones, and objects that replaced an
//! earlier version). As long as those may exist, they are hidden again by a new tombstone, durable before the region's
//! generation is raised. With one drive the oldest region never needs that; with several there is a last resort. So
//! reclaiming can not come to a standstill.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Pending, REGION_WAIT, What, Write, Writer};
use crate::block::RecordId;
use crate::error::{Error, ErrorKind, Result};
use crate::index::RegionMark;
use crate::nvme::append::QueuedRecord;
use crate::nvme::inbox::Entry;
use crate::nvme::io::IoCompletion;
use crate::nvme::page::Page;
use crate::nvme::policy::RegionInfo;
use crate::nvme::record_header::{HeaderKind, RecordHeader};
use crate::nvme::region_header::{HEADER_SLOTS, RegionHeader, RegionPurpose};
use crate::nvme::scan::{AtDamage, ScanRange, scan};
use crate::nvme::stats::add;
use crate::nvme::switches::{is_off, is_simulated};

/// Tombstones that are written again for one region at most, as a share of its pages; past that another region goes.
const KEPT_TOMBSTONES_SHARE: u32 = 8;
/// After a region could not be reclaimed, how long until it is tried again while there is no need yet.
const RECLAIM_PAUSE: Duration = Duration::from_millis(10);
/// Stale entries in the table are removed when they are more than one in so many.
const STALE_SHARE: u64 = 4;
/// Below this they do not matter.
const STALE_MIN: u64 = 4096;

/// Regions reclaimed between two removals at most. The table keeps 16 bits of a generation, a life takes two of them: a
/// stale entry must be gone before its bits come again.
const LIVES_MAX: u64 = 1 << 13;

/// A region on its way to being free.
pub(super) struct Reclaim {
    region: u32,
    /// Tombstones that are not durable yet.
    waits_for: usize,
    has_failed: bool,
    /// Whether the header that frees it is on its way.
    is_ending: bool,
}

impl Writer {
    /// Starts to write a region's header with a new generation. Returns that, and the number under which the end of the
    /// write is told.
    pub(super) fn write_header(
        &mut self,
        region: u32,
        purpose: RegionPurpose,
        first_sequence: u64,
    ) -> Result<(RegionHeader, u64)> {
        let generation = self.counters.next_generation();
        let numbers = generation.and_then(|generation| Ok((generation, self.counters.next_sequence()?)));
        let numbers = numbers.inspect_err(|error| self.shared.poison("reserving numbers failed", error));
        let (generation, sequence) = numbers?;
        let header = RegionHeader {
            store: self.shared.uuid,
            region,
            generation,
            purpose,
            first_sequence,
            region_bytes: u64::from(self.shared.drive.region_pages()) * crate::nvme::page::PAGE_BYTES as u64,
        };
        // The slot with the current header stays as it is, so that a torn write leaves that one.
        self.start_header(region, &header.encode(), sequence)?;
        Ok((header, sequence))
    }

    /// A header with which records count is durable: the other slot gets it too, against decay. Not earlier, since that
    /// slot has the header that made the region free; the next sync makes it durable.
    pub(super) fn copy_header(&mut self, region: u32, header: &Page) {
        let copied = self.counters.next_sequence().and_then(|sequence| {
            self.start_header(region, header, sequence)?;
            self.header_copies.insert(sequence, region);
            Ok(())
        });
        if let Err(error) = copied {
            tracing::warn!(region, %error, "a region's second header could not be written");
        }
    }

    /// Starts to write to the slot that does not hold the current header.
    fn start_header(&mut self, region: u32, header: &Page, sequence: u64) -> Result<()> {
        let slot = (self.header_slots[region as usize] + 1) % HEADER_SLOTS;
        let inbox = Arc::clone(&self.shared.inbox);
        let done = move |completion: IoCompletion| inbox.push_written(sequence, completion.result);
        self.shared.drive.start_write(region, slot, header, Box::new(done))?;
        if let Some(place) = self.shared.drive.place(region) {
            self.note_started(place.drive, 0);
        }
        Ok(())
    }

    pub(super) fn set_starving(&mut self, is_starving: bool) {
        self.shared.regions.set_writer_starving(is_starving);
        self.starving_since = is_starving.then(|| self.starving_since.unwrap_or_else(Instant::now));
    }

    /// Whether there will be a free region as soon as the drive has taken its header.
    pub(super) fn is_freeing_a_region(&self) -> bool {
        self.reclaim.as_ref().is_some_and(|reclaim| reclaim.is_ending)
    }

    /// Fails what is queued when no region could be had for too long: the cache is full of what readers hold.
    pub(super) fn fail_if_starved(&mut self) {
        let is_starved = self.starving_since.is_some_and(|since| since.elapsed() >= REGION_WAIT);
        if !is_starved || self.queue.is_empty() || self.has_failed_write || self.is_freeing_a_region() {
            return;
        }
        for entry in std::mem::take(&mut self.queue) {
            match entry {
                Entry::Record(record) => {
                    add(&self.shared.counts.starved_appends, 1);
                    let message = "no region could be reclaimed: readers hold all of them; try again later";
                    self.end(record, Err(Error::new(ErrorKind::Busy, message)));
                }
                Entry::Flush(done) => self.pending.push_back(Pending::new(What::Flush(done))),
            }
        }
        self.advance_written();
        self.sync_if_due();
    }

    /// Starts to reclaim a region of a drive when its last free one was taken: as soon as what is worth it was written
    /// again, and at the latest when another region is needed.
    pub(super) fn keep_a_spare_region(&mut self) {
        for number in 0..self.lanes.len() {
            let lane = &self.lanes[number];
            let is_too_soon = lane.reclaim_again_at.is_some_and(|at| Instant::now() < at);
            // A drive without any region is out of use; the others have the records.
            let is_in_use = lane.open.is_some() || self.lanes.len() > 1;
            let is_due = lane.free.is_empty() && is_in_use && !is_too_soon;
            if is_due && !self.is_reinserting(number) {
                self.try_reclaim(number);
            }
        }
    }

    /// Chooses a region of a drive to give up and starts, unless one is on its way.
    pub(super) fn try_reclaim(&mut self, number: usize) {
        if self.reclaim.is_some()
            || self.shared.poisoned().is_some()
            || self.ending.is_some_and(|_| self.queue.is_empty())
        {
            return;
        }
        self.lanes[number].reclaim_again_at = None;
        if !self.start_reclaim(number) {
            // Without a clock it is tried again with the next news.
            self.lanes[number].reclaim_again_at = (!is_simulated()).then(|| Instant::now() + RECLAIM_PAUSE);
        }
    }

    fn start_reclaim(&mut self, number: usize) -> bool {
        let prepared = self.end_reinsertion(number);
        let mut candidates = self.shared.regions.candidates(number);
        // Where the next header would go one is being written.
        candidates.retain(|info| !self.header_copies.values().any(|region| *region == info.region));
        let prepared = prepared.filter(|region| candidates.iter().any(|info| info.region == *region));
        let chosen = prepared.or_else(|| self.shared.policy.victim(&candidates));
        let chosen = chosen.and_then(|region| candidates.iter().find(|info| info.region == region));
        let Some(chosen) = chosen else { return false };
        let Some(oldest) = candidates.iter().min_by_key(|info| info.first_sequence) else { return false };
        let room = self.room_in_open_regions();
        let share = room.min(self.shared.drive.region_pages() / KEPT_TOMBSTONES_SHARE);
        self.start_reclaim_of(chosen, share as usize)
            || self.start_reclaim_of(oldest, room as usize)
            || (self.is_last_resort() && self.give_up_with_what_it_hides(oldest))
    }

    /// Whether nothing else is left. With one drive there always is: its oldest region hides nothing, and goes when it is
    /// settled and nobody holds it.
    fn is_last_resort(&self) -> bool {
        self.starving_since.is_some() && self.lanes.len() > 1
    }

    /// The last resort with several drives: not even the oldest region of this one can go, because there is no room for
    /// its tombstones. What it hides is hidden by the index alone afterwards, so the superblock notes that no index is
    /// made anew from the regions that there are.
    fn give_up_with_what_it_hides(&mut self, info: &RegionInfo) -> bool {
        if self.shared.regions.begin_reclaim(info.region).is_none() {
            return false;
        }
        if let Err(error) = self.counters.raise_rebuild_floor(Some(&self.index)) {
            self.shared.poison("noting the regions that no index is made from failed", &error);
            self.shared.regions.abort_reclaim(info.region);
            return false;
        }
        tracing::warn!(
            region = info.region,
            "no room for tombstones: older regions count only as long as the index does"
        );
        (0..self.lanes.len()).for_each(|number| self.seal_open_region(number));
        self.reclaim = Some(Reclaim { region: info.region, waits_for: 0, has_failed: false, is_ending: false });
        self.finish_reclaim_if_ready();
        true
    }

    /// Takes a region away from its readers and finds out what it hides; whether it is on its way to being free. At most
    /// `limit` tombstones are written for it.
    fn start_reclaim_of(&mut self, info: &RegionInfo, limit: usize) -> bool {
        if self.shared.regions.begin_reclaim(info.region).is_none() {
            return false;
        }
        match self.tombstones_to_keep(info, limit) {
            Ok(Some(tombstones)) => {
                self.reclaim = Some(Reclaim {
                    region: info.region,
                    waits_for: tombstones.len(),
                    has_failed: false,
                    is_ending: false,
                });
                add(&self.shared.counts.kept_tombstones, tombstones.len() as u64);
                for tombstone in tombstones {
                    self.queue.push_front(Entry::Record(Box::new(tombstone)));
                }
                self.finish_reclaim_if_ready();
                true
            }
            Ok(None) => {
                self.shared.regions.abort_reclaim(info.region);
                false
            }
            Err(error) => {
                tracing::warn!(region = info.region, error = format!("{error:#}"), "a region could not be reclaimed");
                self.shared.regions.abort_reclaim(info.region);
                false
            }
        }
    }

    /// The tombstones without which something older could come back; `None` if they are too many.
    fn tombstones_to_keep(&self, info: &RegionInfo, limit: usize) -> Result<Option<Vec<QueuedRecord>>> {
        let oldest = self.shared.regions.oldest_sequence_besides(info.region);
        let is_hiding = self.shared.regions.is_hiding(info.region) && !is_off!(DropTombstones);
        let Some(oldest) = oldest.filter(|_| is_hiding) else {
            return Ok(Some(Vec::new()));
        };
        let range = ScanRange {
            store: self.shared.uuid,
            region: info.region,
            generation: info.generation,
            from_page: HEADER_SLOTS,
            after_sequence: info.first_sequence.saturating_sub(1),
            at_damage: AtDamage::Search,
            checks_payloads: false,
            header_key: self.shared.header_key().cloned(),
        };
        let mut kept = Vec::new();
        scan(&self.shared.drive, &range, &mut |found| {
            let header = found.header;
            let hides = match header.kind {
                HeaderKind::Tombstone => header.hides,
                _ if header.replaces => header.sequence,
                _ => return Ok(()),
            };
            let identity = header.identity;
            // No namespace, or one that was purged since: nothing can come back.
            let namespace = self.shared.namespaces.handle_at(&identity.namespace, hides);
            let Some(namespace) = namespace.filter(|_| hides >= oldest && kept.len() <= limit) else { return Ok(()) };
            let id = RecordId { namespace, group: identity.group, shard: identity.shard, key: identity.key };
            if !self.was_never_committed(&id, &header, hides)? {
                kept.push(QueuedRecord::tombstone(id, identity, hides, true));
            }
            Ok(())
        })?;
        Ok((kept.len() <= limit).then_some(kept))
    }

    /// Whether an entry of the log that should hide what is older does not: its write was reported as failed, though it
    /// reached the drive. The older record is still the one that counts.
    fn was_never_committed(&self, id: &RecordId, header: &RecordHeader, hides: u64) -> Result<bool> {
        let row = self.index.get(id)?;
        Ok(row.is_some_and(|row| row.sequence <= hides && row.location != header.location))
    }

    /// A tombstone that a reclaim waits for is durable, or failed.
    pub(super) fn note_kept_tombstone(&mut self, is_durable: bool) {
        if let Some(reclaim) = &mut self.reclaim {
            reclaim.waits_for -= 1;
            reclaim.has_failed |= !is_durable;
        }
        self.finish_reclaim_if_ready();
    }

    fn finish_reclaim_if_ready(&mut self) {
        let Some(reclaim) = self.reclaim.take_if(|reclaim| reclaim.waits_for == 0 && !reclaim.is_ending) else {
            return;
        };
        let region = reclaim.region;
        if reclaim.has_failed || self.shared.poisoned().is_some() {
            return self.shared.regions.abort_reclaim(region);
        }
        match self.write_header(region, RegionPurpose::Free, 0) {
            Ok((RegionHeader { generation, .. }, sequence)) if is_off!(SkipFreeHeaderSync) => {
                self.header_copies.insert(sequence, region);
                self.free_region(region, generation);
            }
            Ok((RegionHeader { generation, .. }, sequence)) => {
                self.reclaim = Some(Reclaim { is_ending: true, ..reclaim });
                let what = What::Freed { region, generation, sequence, write: Write::InFlight };
                self.pending.push_back(Pending::new(what));
            }
            Err(error) => self.fail_reclaim(region, &error),
        }
    }

    pub(super) fn fail_reclaim(&mut self, region: u32, error: &Error) {
        tracing::warn!(region, error = format!("{error:#}"), "a region could not be reclaimed");
        self.reclaim = None;
        self.shared.regions.abort_reclaim(region);
    }

    /// The header that says so is durable.
    pub(super) fn free_region(&mut self, region: u32, generation: u64) {
        self.reclaim = None;
        let records = self.shared.regions.finish_reclaim(region, generation);
        if let Some(place) = self.shared.drive.place(region) {
            self.lanes[place.drive].free.push_back(region);
        }
        // The mark ends all rows of the region at once.
        self.marks.push(RegionMark { region, generation, page: 0, sequence: 0 });
        add(&self.shared.counts.reclaimed_regions, 1);
        add(&self.shared.counts.reclaimed_records, records);
        self.stale_records += records;
        self.lives_since_sweep += 1;
        let is_stale = self.stale_records >= STALE_MIN.max(self.shared.table.len() as u64 / STALE_SHARE);
        if is_stale || self.lives_since_sweep >= LIVES_MAX {
            (self.stale_records, self.lives_since_sweep) = (0, 0);
            let regions = &self.shared.regions;
            self.shared.table.retain(|location| regions.resolve(*location).is_some());
        }
    }
}
