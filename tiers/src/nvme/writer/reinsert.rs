//! Records that are worth more than their region, the writer's side: before a region is given up its most used records
//! are written again, as ordinary records with a new sequence, and are durable when the region goes.
//!
//! It happens while the region can still be read and the open one still has room, so nothing waits for it. When the next
//! region is needed sooner it is cut short: what was not written again is a miss. Re-insertion never opens a region, takes
//! at most a share of one, and so can neither starve what is new nor keep a region from going.

use super::reinserter::{Job, Permit, Reinserter, Window};
use super::{Arc, JoinHandle, Location, OpenRegion, Pending, QueuedRecord, Result, What, Writer};
use crate::error::{Error, ErrorKind};
use crate::nvme::inbox::Copied;
use crate::nvme::page::PAGE_BYTES;
use crate::nvme::policy::RegionInfo;
use crate::nvme::stats::add;

/// Of the room in the open regions, what re-insertion leaves to what is new: one part in so many.
const ROOM_SHARE: u64 = 2;

/// What a record that is written again is a copy of.
pub(in crate::nvme) struct Reinsert {
    /// Where it lies. It is written again only if lookups would still find it there.
    pub(in crate::nvme) from: Location,
    /// Its share of the memory for re-insertion, given back when the write has ended.
    pub(in crate::nvme) permit: Option<Permit>,
}

/// Where a copy may go.
pub(super) enum CopyRoom {
    /// To this drive's open region.
    Here(usize, OpenRegion),
    /// Its drives have too many writes in flight.
    Later,
    /// Nowhere: it is no longer worth it, or would need a region of its own.
    Never,
}

/// A region whose records are written again before it goes.
pub(super) struct Reinsertion {
    drive: usize,
    region: u32,
    generation: u64,
    window: Arc<Window>,
    /// How many copies there are in all, once that is known.
    copies: Option<u64>,
    /// Copies that are durable, failed or were not worth it after all.
    ended: u64,
}

impl Reinsertion {
    fn is_done(&self) -> bool {
        self.copies == Some(self.ended)
    }
}

impl Drop for Reinsertion {
    /// Also when the writer ends: the thread must not wait for writes that nobody makes.
    fn drop(&mut self) {
        self.window.cancel();
    }
}

impl Writer {
    /// Starts the thread that finds out what to write again.
    ///
    /// # Errors
    /// `Io` if the system gives no thread.
    pub(in crate::nvme) fn start_reinserter(&mut self) -> Result<JoinHandle<()>> {
        let (reinserter, thread) = Reinserter::start(&self.shared, &self.index)?;
        self.reinserter = Some(reinserter);
        Ok(thread)
    }

    /// Whether the next region of a drive to go waits until its best records are written again, or until another drive's
    /// are. Asked when the drive has no free region.
    pub(super) fn is_reinserting(&mut self, drive: usize) -> bool {
        match &self.reinsertion {
            Some(reinsertion) => !reinsertion.is_done(),
            None => self.start_reinsertion(drive),
        }
    }

    fn start_reinsertion(&mut self, drive: usize) -> bool {
        let page_bytes = PAGE_BYTES as u64;
        let region_bytes = u64::from(self.shared.drive.region_pages()) * page_bytes;
        let room_bytes = u64::from(self.room_in_open_regions()) * page_bytes;
        let share_bytes = region_bytes / 100 * u64::from(self.config.reinsert_percent);
        let budget_bytes = share_bytes.min(room_bytes / ROOM_SHARE);
        let may_start = budget_bytes > 0
            && self.reclaim.is_none()
            && self.ending.is_none()
            && self.shared.poisoned().is_none()
            // What is not in the table yet would be left out.
            && self.shared.fill.progress().is_full;
        if !may_start {
            return false;
        }
        let candidates = self.shared.regions.candidates(drive);
        let chosen = self.shared.policy.victim(&candidates);
        let chosen = chosen.and_then(|region| candidates.iter().find(|info| info.region == region));
        // Once for each life of a region: what is left of it then may go.
        let chosen = chosen.filter(|info| self.reinserted_last[drive] != Some((info.region, info.generation)));
        let Some(info) = chosen.filter(|info| self.shared.policy.may_keep(info)) else { return false };
        let window = Arc::new(Window::default());
        let RegionInfo { region, generation, .. } = *info;
        let job = Job { region, generation, budget_bytes, window: Arc::clone(&window) };
        let is_started = self.reinserter.as_ref().is_some_and(|reinserter| reinserter.start_job(job));
        if is_started {
            self.reinserted_last[drive] = Some((region, generation));
            self.reinsertion = Some(Reinsertion { drive, region, generation, window, copies: None, ended: 0 });
        }
        is_started
    }

    /// No more copies of a region come.
    pub(super) fn note_copied(&mut self, copied: Copied) {
        if let Some(reinsertion) = self.reinsertion_of(copied.region, copied.generation) {
            reinsertion.copies = Some(copied.copies);
        }
    }

    /// A copy has ended, whichever way.
    pub(super) fn note_copy_ended(&mut self, from: Location) {
        if let Some(reinsertion) = self.reinsertion_of(from.region, from.generation) {
            reinsertion.ended += 1;
        }
    }

    fn reinsertion_of(&mut self, region: u32, generation: u64) -> Option<&mut Reinsertion> {
        self.reinsertion.as_mut().filter(|r| (r.region, r.generation) == (region, generation))
    }

    /// Whether a region waits for copies to become durable, and for nothing else.
    pub(super) fn waits_for_copies(&self) -> bool {
        self.reinsertion.as_ref().is_some_and(|reinsertion| reinsertion.copies.is_some() && !reinsertion.is_done())
    }

    /// Ends the re-insertion of a drive, finished or not; the region that it was for.
    pub(super) fn end_reinsertion(&mut self, drive: usize) -> Option<u32> {
        let reinsertion = self.reinsertion.take_if(|reinsertion| reinsertion.drive == drive)?;
        if !reinsertion.is_done() {
            add(&self.shared.counts.cut_reinsertions, 1);
        }
        Some(reinsertion.region)
    }

    /// Whether and where a record may still be written again: lookups find it where it was read, nothing newer of its
    /// identity is on its way (the copy would hide it), and it needs no region of its own.
    pub(super) fn room_for_copy(&self, record: &QueuedRecord, reinsert: &Reinsert) -> CopyRoom {
        let fingerprint = record.id.fingerprint();
        let found = self.shared.table.get(fingerprint).and_then(|location| self.shared.regions.resolve(location));
        if found != Some(reinsert.from) || self.changes_pending.contains_key(&fingerprint) {
            return CopyRoom::Never;
        }
        let region_pages = self.shared.drive.region_pages();
        let open = self.lanes.iter().enumerate().filter_map(|(drive, lane)| Some((drive, lane, lane.open?)));
        let fitting = open.filter(|(_, _, open)| open.next_page + record.pages <= region_pages);
        match fitting.min_by_key(|(_, lane, _)| (lane.has_failed, lane.in_flight_bytes)) {
            None => CopyRoom::Never,
            Some((_, lane, _)) if !lane.takes_more() => CopyRoom::Later,
            Some((drive, _, open)) => CopyRoom::Here(drive, open),
        }
    }

    /// Ends a record that is not written again after all. Nobody was promised anything.
    pub(super) fn drop_copy(&mut self, record: Box<QueuedRecord>) {
        self.end(record, Err(Error::new(ErrorKind::Cancelled, "the record is not written again")));
    }

    pub(super) fn count_reinserted(&self, pending: &Pending) {
        if let What::Record { record, location, .. } = &pending.what
            && record.reinsert.is_some()
        {
            // It is there because it is used.
            self.shared.regions.note_use(location.region, true);
            add(&self.shared.counts.reinserted_records, 1);
            add(&self.shared.counts.reinserted_bytes, location.bytes());
        }
    }
}
