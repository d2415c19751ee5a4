//! Group commit: data, `fdatasync` of every drive that it lies on, index, lookups, callbacks, in this order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::lanes::hides_older;
use super::{BUSY_PAUSE, Pending, What, Write, Writer};
use crate::block::RecordKind;
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexChange, IndexRow, Location, RegionMark};
use crate::nvme::append::{Form, QueuedRecord};
use crate::nvme::drive::Drive;
use crate::nvme::io::{IoCompletion, IoKind, IoPriority, IoRequest};
use crate::nvme::page::PAGE_BYTES;
use crate::nvme::stats::add;
use crate::nvme::switches::is_off;

/// The name in the index under which a region's generation stands if it has records that hide older ones.
pub(in crate::nvme) fn hiding_name(region: u32) -> String {
    format!("hides/{region}")
}

/// The group that is becoming durable.
pub(super) struct Syncing {
    batch: Vec<Pending>,
    /// Drives whose sync was not started yet.
    to_start: Vec<usize>,
    /// Syncs in flight.
    running: usize,
    result: Result<()>,
}

impl Writer {
    /// Starts to sync the written prefix when it is time. Writes go on meanwhile, and belong to the next one.
    pub(super) fn sync_if_due(&mut self) {
        if self.busy_until.is_some() {
            return;
        }
        if self.syncing.is_none() {
            if !self.is_sync_due() {
                return;
            }
            let batch: Vec<Pending> = self.pending.drain(..self.written).collect();
            self.reset_written();
            self.advance_written();
            let to_start = self.drives_of(&batch);
            self.syncing = Some(Syncing { batch, to_start, running: 0, result: Ok(()) });
            if is_off!(CommitBeforeSync)
                && let Some(syncing) = &mut self.syncing
            {
                syncing.to_start.clear();
            }
        }
        self.start_syncs();
    }

    fn is_sync_due(&self) -> bool {
        if self.written == 0 || self.shared.poisoned().is_some() {
            return false;
        }
        let is_old = self.pending.front().is_some_and(|oldest| oldest.since.elapsed() >= self.config.commit_interval);
        let is_large = self.written_bytes >= self.config.commit_bytes;
        // A region can only be given up when all of it is durable.
        let is_starving = self.starving_since.is_some();
        let is_urgent = self.is_written_urgent || self.waits_for_copies();
        is_old || is_large || is_starving || is_urgent || self.ending.is_some()
    }

    /// The drives that records and headers of a group lie on; one if there are none, so that every group ends alike.
    fn drives_of(&self, batch: &[Pending]) -> Vec<usize> {
        let place = |pending: &Pending| self.shared.drive.place(pending.region()?);
        let drives: BTreeSet<usize> = batch.iter().filter_map(place).map(|place| place.drive).collect();
        if drives.is_empty() { vec![0] } else { drives.into_iter().collect() }
    }

    fn start_syncs(&mut self) {
        let Some(syncing) = &mut self.syncing else { return };
        while let Some(&drive) = syncing.to_start.last() {
            let inbox = Arc::clone(&self.shared.inbox);
            let request = IoRequest {
                file: Drive::file(drive),
                kind: IoKind::Sync,
                offset: 0,
                buffer: None,
                priority: IoPriority::Write,
                done: Box::new(move |completion: IoCompletion| inbox.push_synced(completion.result)),
            };
            match self.shared.drive.io().submit(request) {
                Ok(()) => {
                    syncing.running += 1;
                    syncing.to_start.pop();
                }
                Err((_, error)) if error.kind() == ErrorKind::Busy => {
                    self.busy_until = Some(Instant::now() + BUSY_PAUSE);
                    return;
                }
                Err((_, error)) => {
                    syncing.to_start.clear();
                    syncing.result = Err(error);
                }
            }
        }
        self.finish_sync_if_ended();
    }

    /// The sync of one drive ended.
    pub(super) fn note_synced(&mut self, result: Result<()>) {
        let Some(syncing) = &mut self.syncing else { return };
        syncing.running -= 1;
        if result.is_err() {
            syncing.to_start.clear();
            syncing.result = result;
        }
        self.finish_sync_if_ended();
    }

    pub(super) fn reset_written(&mut self) {
        (self.written, self.written_bytes, self.is_written_urgent) = (0, 0, false);
    }

    /// All drives are synced. A failed sync is never tried again: the kernel may have dropped the data and forgotten
    /// about it.
    fn finish_sync_if_ended(&mut self) {
        let ended = self.syncing.take_if(|syncing| syncing.running == 0 && syncing.to_start.is_empty());
        let Some(Syncing { batch, result, .. }) = ended else { return };
        // Another sync that failed meanwhile may have taken the data of this one with it, which then succeeds.
        let poison = self.shared.poisoned().filter(|_| !is_off!(BelieveSyncBesideFailed));
        let result = result.and_then(|()| poison.map_or(Ok(()), Err));
        let again = || (0..self.lanes.len()).try_for_each(|drive| self.shared.drive.sync(drive));
        let result = if is_off!(RetryFailedSync) { result.or_else(|_| again()) } else { result };
        let outcome = match result {
            Err(error) => {
                self.shared.poison("a sync of the store failed", &error);
                Err(())
            }
            Ok(()) => self.commit(&batch).map_err(|error| {
                self.shared.poison("the index took no commit", &error);
            }),
        };
        match (outcome, self.shared.poisoned()) {
            (Ok(()), _) => {
                add(&self.shared.counts.commits, 1);
                for pending in batch {
                    self.announce(pending);
                }
            }
            (Err(()), poison) => {
                let error = poison.unwrap_or_else(|| Error::new(ErrorKind::Poisoned, "the store is poisoned"));
                for pending in batch {
                    self.fail(pending, &error);
                }
            }
        }
    }

    /// What is durable goes into the index, and with that to lookups.
    fn commit(&mut self, batch: &[Pending]) -> Result<()> {
        self.note_hiding_regions(batch)?;
        // What was purged while it was on its way must not be found again.
        let is_live = |change: &IndexChange| match change {
            IndexChange::Put(row) => self.shared.namespaces.is_live(row.id.namespace) || is_off!(BelievePurged),
            IndexChange::Remove { .. } => true,
        };
        let changes: Vec<IndexChange> = batch.iter().filter_map(change_of).filter(is_live).collect();
        let marks: Vec<RegionMark> = self.marks.iter().copied().chain(self.marks_of(batch)).collect();
        // A drive may be gone at the next open, and with it the only other place that knows of a removal.
        let is_synced = self.lanes.len() > 1 && batch.iter().any(hides_older) && !is_off!(SkipIndexSync);
        self.shared.commit(&self.index, &changes, &marks, is_synced)?;
        self.marks.clear();
        Ok(())
    }

    /// A region that gets its first record that hides older ones is noted before the record is: whoever reclaims the
    /// region must know, also after a restart.
    fn note_hiding_regions(&self, batch: &[Pending]) -> Result<()> {
        for pending in batch {
            if let What::Record { location, .. } = &pending.what
                && hides_older(pending)
                && self.shared.regions.set_hiding(location.region)
                && !is_off!(ForgetHidingRegions)
            {
                self.index.meta_put(&hiding_name(location.region), &location.generation.to_le_bytes())?;
            }
        }
        Ok(())
    }

    /// How far each region of the batch is covered afterwards; a sealed one is to its end, if no write to it failed.
    fn marks_of(&self, batch: &[Pending]) -> impl Iterator<Item = RegionMark> + use<> {
        let mut marks = BTreeMap::new();
        for pending in batch {
            let mark = match &pending.what {
                What::Record { location: Location { region, generation, page, pages }, sequence, .. } => {
                    RegionMark { region: *region, generation: *generation, page: page + pages, sequence: *sequence }
                }
                What::Seal { region, generation, sequence, page } => {
                    RegionMark { region: *region, generation: *generation, page: *page, sequence: *sequence }
                }
                What::Opened { .. } | What::Freed { .. } | What::Forget { .. } | What::Flush(_) => continue,
            };
            marks.insert(mark.region, mark);
        }
        marks.into_values()
    }

    /// Whether the record's namespace was purged since it was accepted.
    pub(super) fn is_purged(&self, record: &QueuedRecord) -> bool {
        !self.shared.namespaces.is_live(record.id.namespace)
    }

    /// Tells whoever waits that it is durable.
    fn announce(&mut self, pending: Pending) {
        self.count_reinserted(&pending);
        match pending.what {
            What::Record { record, location, .. } => {
                add(&self.shared.counts.appended_records, 1);
                add(&self.shared.counts.appended_bytes, location.bytes());
                if record.kind.has_payload() {
                    add(&self.shared.counts.appended_payload_bytes, record.payload_bytes);
                    // An encoded payload is whole pages long.
                    let pages_bytes = location.bytes() - PAGE_BYTES as u64;
                    add(&self.shared.counts.appended_stored_bytes, pages_bytes.min(record.payload_bytes));
                }
                // What is compressed has fewer pages, whole ones.
                if matches!(record.form, Form::Sent(_)) && location.bytes() - (PAGE_BYTES as u64) < record.payload_bytes
                {
                    add(&self.shared.counts.encoded_records, 1);
                }
                let result = if self.is_purged(&record) { Err(purged()) } else { Ok(location) };
                self.resolve(record, result);
            }
            What::Flush(done) => done.call(Ok(())),
            What::Seal { region, .. } => {
                self.shared.regions.settle(region);
                // It may go: whatever drive waited for one to give up need not wait on.
                if let Some(place) = self.shared.drive.place(region) {
                    self.lanes[place.drive].reclaim_again_at = None;
                }
            }
            What::Opened { region, header, .. } => self.copy_header(region, &header),
            What::Freed { region, write: Write::Failed(error), .. } => self.fail_reclaim(region, &error),
            What::Freed { region, generation, .. } => self.free_region(region, generation),
            What::Forget { .. } => {}
        }
    }
}

/// Why a record is not written, or not found though it was.
pub(super) fn purged() -> Error {
    Error::new(ErrorKind::NotFound, "the namespace of the record was purged; register it again")
}

fn change_of(pending: &Pending) -> Option<IndexChange> {
    let (record, location, sequence) = match &pending.what {
        What::Record { record, location, sequence, .. } => (record, *location, *sequence),
        What::Forget { id, sequence } => return Some(IndexChange::Remove { id: *id, sequence: *sequence }),
        What::Opened { .. } | What::Freed { .. } | What::Seal { .. } | What::Flush(_) => return None,
    };
    match record.kind.record_kind()? {
        RecordKind::Tombstone => {
            Some(IndexChange::Remove { id: record.id, sequence: record.hides.unwrap_or(sequence) })
        }
        kind => Some(IndexChange::Put(IndexRow {
            id: record.id,
            parent: record.parent,
            depth: record.depth,
            location,
            payload_bytes: record.payload_bytes,
            sequence,
            kind,
        })),
    }
}
