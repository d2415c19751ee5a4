//! Opening what is there: from the files of a store to its state in memory, after a clean close, a kill or a power loss.
//!
//! The index says what it knows; the regions are believed over it. Rows of another generation than their region's are
//! dropped, and the regions are read on from where the index ends, all at once, in the order of sequences. An index that is missing, damaged or another store's is
//! made anew from the regions. `docs/format.md` goes through the cases.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backing::Backing;
use super::counters::{Counters, knows_floor, note_floor};
use super::directory::Directory;
use super::fill;
use super::membership::Plan;
use super::page::PAGE_BYTES;
use super::record_header::{CODEC_STORED, DiskIdentity, HeaderKind, RecordHeader};
use super::region_header::{HEADER_SLOTS, RegionHeader, RegionPurpose};
use super::scan::{AtDamage, Found, LogEnd, Scan, ScanRange};
use super::shared::Shared;
use super::superblock::Superblock;
use super::switches::is_off;
use super::writer::{Handover, OpenRegion, hiding_name};
use crate::block::{BlockKey, KEY_CHAIN_VERSION, NamespaceId, RecordId, RecordKind};
use crate::error::{ErrorKind, Result};
use crate::index::{IndexChange, IndexLog, IndexRow, Location, RegionMark};

/// Changes that go into the index at once.
const BATCH: usize = 4096;
/// The name in the index under which the store's identity stands once it is complete.
pub(super) const STORE_NAME: &str = "store";
/// The name under which the number of the store's open stands that used the index last.
const OPENS_NAME: &str = "opens";

/// What an open found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecoveryReport {
    /// Records that are found by lookups now; an estimate unless `is_index_full`.
    pub records: u64,
    /// Whether the table in memory has all of them. If not, it is being filled; see [`super::StoreStats::index`].
    pub is_index_full: bool,
    /// Of these, records that were in the regions and not yet in the index.
    pub recovered_records: u64,
    /// Rows of the index that pointed to nothing any more, as far as they were read.
    pub dropped_rows: u64,
    /// Whether the index was made anew from the regions.
    pub index_rebuilt: bool,
    /// Whether the store had been closed in order.
    pub clean: bool,
    /// How long it took.
    pub elapsed: Duration,
}

/// A region that holds records.
#[derive(Debug, Clone, Copy)]
struct Live {
    header: RegionHeader,
    end: LogEnd,
    /// Whether the log was read on behind what the index covers.
    was_read: bool,
}

struct Recovery<'a> {
    shared: &'a Arc<Shared>,
    index: Arc<IndexLog>,
    report: RecoveryReport,
    changes: Vec<IndexChange>,
    marks: Vec<RegionMark>,
    /// Whether something was found behind the marks that hides older records.
    found_hiding: bool,
}

/// Reads a store and gets it ready for the writer, with the drives that it has from now on.
pub(super) fn recover(
    shared: &Arc<Shared>,
    backing: &dyn Backing,
    directory: &Directory,
    superblock: Superblock,
    plan: &Plan,
) -> Result<(RecoveryReport, Handover)> {
    let started = Instant::now();
    // What a process that was killed has written is read here, and goes into the index: it must not vanish afterwards.
    if !superblock.is_clean && !is_off!(SkipFirstSync) {
        (0..shared.drive.drives()).try_for_each(|drive| shared.drive.sync(drive))?;
    }
    let index = open_index(shared, backing, directory, &superblock)?;
    destroy_purged_keys(shared)?;
    let mut counters = Counters::start(Arc::clone(&shared.drive), superblock.clone())?;
    let mut headers = read_region_headers(shared, &superblock)?;
    free_for_good(shared, &superblock, &mut counters, &headers.unreadable)?;
    let begin = |index: IndexLog, index_rebuilt, headers: &Headers| -> Result<(Recovery<'_>, Vec<Live>)> {
        let report = RecoveryReport { clean: superblock.is_clean, index_rebuilt, ..RecoveryReport::default() };
        let mut recovery = Recovery {
            shared,
            index: Arc::new(index),
            report,
            changes: Vec::new(),
            marks: Vec::new(),
            found_hiding: false,
        };
        let live = recovery.restore_regions(&headers.found)?;
        if !index_rebuilt {
            fill::begin(shared, &recovery.index)?;
        }
        Ok((recovery, live))
    };
    let begun = index.map(|index| begin(index, false, &headers)).transpose();
    let (mut recovery, mut live) = match begun {
        Ok(Some(begun)) => begun,
        Err(error) if error.kind() != ErrorKind::Corrupt => return Err(error),
        damaged => {
            let is_new = damaged.is_ok() && superblock.opens <= 1 && headers.hold_nothing();
            if is_new {
                tracing::info!("the store is new");
            } else {
                let why = damaged.err().map_or("it can not be used".to_owned(), |error| error.to_string());
                tracing::warn!(why, "the index is made anew from the regions");
            }
            shared.table.retain(|_| false);
            if !plan.lost_regions.is_empty() {
                // Only the index could tell what the drives that are gone hid.
                counters.raise_rebuild_floor(None)?;
            }
            let refused = headers.take_below(counters.rebuild_floor());
            refused.iter().for_each(|region| shared.regions.clear(*region));
            free_for_good(shared, &superblock, &mut counters, &refused)?;
            begin(new_index(shared, backing, directory, &superblock)?, true, &headers)?
        }
    };
    recovery.read_on(&mut live)?;
    let may_reopen = !recovery.note_what_goes(plan, &mut counters)?;
    let mut open = recovery.end_logs(&live, &mut counters, |region| may_reopen && plan.after.has(region))?;
    recovery.commit()?;
    // As the writer does: the drive that has it may be gone at the next open, and readers have seen what it says. So may
    // a region that goes now.
    let may_be_gone = shared.drive.drives() > 1 || plan.during != plan.after;
    if recovery.found_hiding && may_be_gone && !is_off!(SkipIndexSync) {
        recovery.index.sync()?;
    }
    recovery.drop_what_goes(plan, &mut counters)?;
    let (index, mut report) = (recovery.index, recovery.report);
    if report.index_rebuilt {
        note_floor(&index, counters.rebuild_floor())?;
        index.meta_put(STORE_NAME, shared.uuid.as_bytes())?;
        index.sync()?;
    }
    let used: HashSet<u32> = live.iter().map(|live| live.header.region).collect();
    let free_on = |drive: usize| {
        let is_free = |region: &u32| {
            shared.drive.place(*region).is_some_and(|place| place.drive == drive)
                && !used.contains(region)
                && plan.after.has(*region)
        };
        (0..shared.regions.count()).filter(is_free).collect()
    };
    let lanes = (0..shared.drive.drives()).map(|drive| (open.remove(&drive), free_on(drive))).collect();
    let filled = shared.fill.progress();
    report.records = if filled.is_full { shared.table.len() as u64 } else { index.rows_estimate() };
    (report.is_index_full, report.dropped_rows) = (filled.is_full, filled.dropped_rows);
    report.elapsed = started.elapsed();
    Ok((report, Handover { counters, index, lanes, header_slots: headers.slots }))
}

/// What the regions' headers say, by region.
#[derive(Default)]
struct Headers {
    /// The header that counts.
    found: Vec<Option<RegionHeader>>,
    /// The slot that it is in.
    slots: Vec<u32>,
    /// Regions whose headers the drive can not read.
    unreadable: Vec<u32>,
}

impl Headers {
    /// Whether no region has records, as in a store that was just made.
    fn hold_nothing(&self) -> bool {
        self.unreadable.is_empty() && self.found.iter().flatten().all(|header| header.purpose == RegionPurpose::Free)
    }

    /// Forgets the regions with records whose generation is below `floor`, and says which those are.
    fn take_below(&mut self, floor: u64) -> Vec<u32> {
        let is_below =
            |header: &mut RegionHeader| header.purpose == RegionPurpose::Records && header.generation < floor;
        self.found.iter_mut().filter_map(|found| found.take_if(is_below)).map(|header| header.region).collect()
    }
}

fn read_region_headers(shared: &Shared, superblock: &Superblock) -> Result<Headers> {
    let mut headers = Headers::default();
    for (region, place) in (0u32..).zip(shared.drive.places()) {
        let Some(place) = place else {
            headers.slots.push(0);
            headers.found.push(None);
            continue;
        };
        let found = match shared.drive.read(region, 0, HEADER_SLOTS) {
            Ok(pages) => RegionHeader::newest(
                pages.as_slice().chunks_exact(PAGE_BYTES),
                shared.uuid,
                region,
                superblock.region_bytes,
            ),
            Err(error) if error.kind() == ErrorKind::Io => {
                tracing::warn!(region, %error, "a region's header can not be read; the region is given up");
                headers.unreadable.push(region);
                None
            }
            Err(error) => return Err(error),
        };
        let found = found.filter(|(_, header)| header.generation >= place.since);
        headers.slots.push(found.map_or(0, |(slot, _)| slot));
        headers.found.push(found.map(|(_, header)| header));
    }
    Ok(headers)
}

/// A region that was taken as free once must not come back when the drive can read its header again: what was removed
/// meanwhile would come back with it.
fn free_for_good(shared: &Shared, superblock: &Superblock, counters: &mut Counters, regions: &[u32]) -> Result<()> {
    if is_off!(KeepUnreadableRegion) {
        return Ok(());
    }
    for &region in regions {
        let header = RegionHeader {
            store: shared.uuid,
            region,
            generation: counters.next_generation()?,
            purpose: RegionPurpose::Free,
            first_sequence: 0,
            region_bytes: superblock.region_bytes,
        };
        for slot in 0..HEADER_SLOTS {
            shared.drive.write(region, slot, &header.encode())?;
        }
    }
    shared.drive.sync_regions(regions.iter().copied())
}

/// Opens the index; `None` if it has to be made anew, because it is missing, damaged, not this store's, a copy from before
/// the rebuild floor was raised, or one of an earlier open. Such a copy may know what a power loss has undone since, and
/// be believed where the regions went another way: that a log ends where it has gone on.
fn open_index(
    shared: &Shared,
    backing: &dyn Backing,
    directory: &Directory,
    superblock: &Superblock,
) -> Result<Option<IndexLog>> {
    let open = || -> Result<Option<IndexLog>> {
        let index = backing.index(&directory.index())?;
        let is_ours = index
            .meta_get(STORE_NAME)?
            .is_some_and(|uuid| uuid == shared.uuid.as_bytes() || is_off!(BelieveForeignIndex));
        let is_of_last_open = last_open(&index)?.saturating_add(1) >= superblock.opens || is_off!(BelieveOldIndex);
        if !is_ours || !is_of_last_open || !knows_floor(&index, superblock.rebuild_floor)? {
            return Ok(None);
        }
        // Durable, before the superblock says that there was this open.
        index.meta_put(OPENS_NAME, &superblock.opens.to_le_bytes())?;
        agree_on_namespaces(shared, &index)?;
        Ok(Some(index))
    };
    match open() {
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            tracing::warn!(%error, "the index is damaged");
            Ok(None)
        }
        opened => opened,
    }
}

/// Brings the index and the file of namespaces to say the same of what there is and what has ended.
fn agree_on_namespaces(shared: &Shared, index: &IndexLog) -> Result<()> {
    let of_index = index.ends()?;
    of_index.iter().try_for_each(|end| shared.namespaces.adopt_end(*end, false))?;
    let known: HashSet<_> = of_index.into_iter().map(|end| end.handle).collect();
    for end in shared.namespaces.ends().iter().filter(|end| !known.contains(&end.handle)) {
        index.put_end(end)?;
    }
    for row in index.namespaces()? {
        shared.namespaces.adopt(row)?;
    }
    Ok(())
}

/// Ends purges that a crash has cut off before the key was destroyed.
fn destroy_purged_keys(shared: &Shared) -> Result<()> {
    let Some(keyring) = &shared.keyring else { return Ok(()) };
    for namespace in shared.namespaces.purged() {
        if keyring.destroy(&namespace)? {
            tracing::info!(%namespace, "the key of a namespace was destroyed that had been purged");
        }
    }
    Ok(())
}

/// An empty index, for the first open and for a rebuild.
fn new_index(
    shared: &Shared,
    backing: &dyn Backing,
    directory: &Directory,
    superblock: &Superblock,
) -> Result<IndexLog> {
    directory.wipe_index()?;
    let index = backing.index(&directory.index())?;
    index.meta_put(OPENS_NAME, &superblock.opens.to_le_bytes())?;
    for row in shared.namespaces.rows() {
        index.put_namespace(&row)?;
    }
    for end in shared.namespaces.ends() {
        index.put_end(&end)?;
    }
    Ok(index)
}

/// The open of the store that used an index last.
///
/// # Errors
/// What the index reports.
pub(super) fn last_open(index: &IndexLog) -> Result<u64> {
    Ok(index.meta_number(OPENS_NAME)?.unwrap_or(0))
}

/// A part of the index can not be read: the next open makes it anew.
///
/// # Errors
/// `NoSpace` or `Io`.
pub(super) fn distrust(index: &IndexLog) -> Result<()> {
    index.meta_put(STORE_NAME, &[])
}

impl Recovery<'_> {
    /// Takes up the regions that hold records, in the order of their generations: on each drive that is the order of their
    /// sequences.
    fn restore_regions(&mut self, headers: &[Option<RegionHeader>]) -> Result<Vec<Live>> {
        let marks: HashMap<u32, RegionMark> = self.index.marks()?.into_iter().map(|mark| (mark.region, mark)).collect();
        let mut live = Vec::new();
        for header in headers.iter().flatten() {
            let mark = marks.get(&header.region);
            let is_over = mark.is_some_and(|mark| mark.generation > header.generation);
            if header.purpose == RegionPurpose::Free || is_over {
                if mark.is_some_and(|mark| mark.generation < header.generation) {
                    self.marks.push(RegionMark {
                        region: header.region,
                        generation: header.generation,
                        page: 0,
                        sequence: 0,
                    });
                }
                continue;
            }
            let hides = self.index.meta_number(&hiding_name(header.region))? == Some(header.generation);
            self.shared.regions.restore(header.region, header.generation, header.first_sequence, hides);
            let known = mark.filter(|mark| mark.generation == header.generation && mark.page >= HEADER_SLOTS);
            let end = match known {
                Some(mark) => LogEnd { page: mark.page, sequence: mark.sequence },
                None => LogEnd { page: HEADER_SLOTS, sequence: header.first_sequence.saturating_sub(1) },
            };
            live.push(Live { header: *header, end, was_read: false });
        }
        live.sort_by_key(|live| live.header.generation);
        Ok(live)
    }

    /// Reads the regions on from where the index ends. Several grow at a time, one on each drive, so their records are
    /// taken in the order of sequences, across regions: only that says which of two came last.
    fn read_on(&mut self, live: &mut [Live]) -> Result<()> {
        let drive = Arc::clone(&self.shared.drive);
        let mut waiting: Vec<usize> = (0..live.len()).filter(|&i| live[i].end.page < drive.region_pages()).collect();
        if is_off!(SkipReadingOn) && !self.report.index_rebuilt {
            waiting.clear();
        }
        waiting.sort_by_key(|&index| std::cmp::Reverse(live[index].end.sequence));
        // The next record of each region that is being read, by its sequence.
        let mut reading: BTreeMap<(u64, usize), (Found, Scan<'_>)> = BTreeMap::new();
        loop {
            let next = reading.keys().next().map(|(sequence, _)| *sequence);
            // A region is read as soon as one of its records could be the next.
            let joins = waiting.pop_if(|index| next.is_none_or(|next| live[*index].end.sequence < next));
            let (index, mut scan) = if let Some(index) = joins {
                (index, Scan::new(&drive, self.range_of(&live[index])))
            } else if let Some(((_, index), (found, scan))) = reading.pop_first() {
                self.take(&found)?;
                (index, scan)
            } else {
                return Ok(());
            };
            match scan.next()? {
                Some(found) => drop(reading.insert((found.header.sequence, index), (found, scan))),
                None => self.end_reading(&mut live[index], scan.end()),
            }
        }
    }

    fn range_of(&self, live: &Live) -> ScanRange {
        ScanRange {
            store: self.shared.uuid,
            region: live.header.region,
            generation: live.header.generation,
            from_page: live.end.page,
            after_sequence: live.end.sequence,
            at_damage: if self.report.index_rebuilt && !is_off!(StopRebuildAtDamage) {
                AtDamage::Search
            } else {
                AtDamage::Stop
            },
            checks_payloads: !is_off!(TrustTornTail),
            header_key: self.shared.header_key().cloned(),
        }
    }

    /// The marks go into the index with or after the last of the records that they speak of.
    fn end_reading(&mut self, live: &mut Live, end: LogEnd) {
        (live.end, live.was_read) = (end, true);
        let RegionHeader { region, generation, .. } = live.header;
        self.shared.regions.set_used(region, end.page);
        self.marks.push(RegionMark { region, generation, page: end.page, sequence: end.sequence });
    }

    /// Takes up one record. They come in the order of their sequences, so the last one of an identity stays.
    fn take(&mut self, found: &Found) -> Result<()> {
        let header = &found.header;
        let identity = &header.identity;
        let hides_older = header.replaces || header.kind == HeaderKind::Tombstone;
        self.found_hiding |= hides_older;
        if hides_older && self.shared.regions.set_hiding(header.location.region) {
            let name = hiding_name(header.location.region);
            self.index.meta_put(&name, &header.location.generation.to_le_bytes())?;
        }
        let namespace = self.shared.namespaces.handle_at(&identity.namespace, header.sequence);
        let Some(namespace) = namespace else { return Ok(()) };
        let id = RecordId { namespace, group: identity.group, shard: identity.shard, key: identity.key };
        match header.kind.record_kind() {
            Some(RecordKind::Tombstone) => {
                self.changes.push(IndexChange::Remove { id, sequence: header.hides });
            }
            // What replaced an older version and is damaged still hides it: a miss, not something stale. Sealed with a key
            // that is gone it is worth as much.
            Some(_) if !found.is_intact || !self.can_be_opened(header) => {
                tracing::warn!(?id, location = ?header.location, "a record is damaged, or its key is gone; it is left out");
                if header.replaces {
                    self.changes.push(IndexChange::Remove { id, sequence: header.sequence });
                }
            }
            Some(kind) => {
                self.report.recovered_records += 1;
                self.changes.push(IndexChange::Put(IndexRow {
                    id,
                    parent: header.parent,
                    depth: header.depth,
                    location: header.location,
                    payload_bytes: header.raw_bytes,
                    sequence: header.sequence,
                    kind,
                }));
            }
            None => {}
        }
        if self.changes.len() >= BATCH { self.commit_changes() } else { Ok(()) }
    }

    /// Whether the key of a record is there, if it needs one.
    fn can_be_opened(&self, header: &RecordHeader) -> bool {
        let (Some(keyring), Some(seal)) = (&self.shared.keyring, &header.seal) else { return true };
        keyring.numbered(seal.key).is_ok()
    }

    /// Ends every log that a crash may have left open, and finds the regions to go on with, by drive: the newest of each,
    /// if it has room.
    fn end_logs(
        &mut self,
        live: &[Live],
        counters: &mut Counters,
        may_reopen: impl Fn(u32) -> bool,
    ) -> Result<HashMap<usize, OpenRegion>> {
        let region_pages = self.shared.drive.region_pages();
        let drive_of = |live: &Live| self.shared.drive.place(live.header.region).map_or(0, |place| place.drive);
        let newest: HashMap<usize, u32> = live.iter().map(|live| (drive_of(live), live.header.region)).collect();
        let mut open = HashMap::new();
        let mut fenced = Vec::new();
        for live in live {
            let RegionHeader { region, generation, .. } = live.header;
            let is_newest = newest.get(&drive_of(live)) == Some(&region);
            let mut end = live.end;
            // Also after an orderly close: behind a failed write may stand what must never count.
            let may_have_more = !self.report.clean || !is_newest;
            if live.was_read && may_have_more && end.page < region_pages && !is_off!(SkipFence) {
                end.sequence = counters.next_sequence()?;
                self.shared.drive.write(region, end.page, &self.fence(live, end).encode(self.shared.header_key()))?;
                end.page += 1;
                fenced.push(region);
                self.shared.regions.set_used(region, end.page);
            }
            // What is written from now on lies above the rebuild floor; the seal of when it was raised may be lost.
            let is_above = generation >= counters.rebuild_floor() || is_off!(WriteBelowFloor);
            if is_newest && end.page < region_pages && is_above && may_reopen(region) {
                self.shared.regions.reopen(region);
                open.insert(drive_of(live), OpenRegion { region, generation, next_page: end.page });
            } else {
                end.page = region_pages;
            }
            self.marks.push(RegionMark { region, generation, page: end.page, sequence: end.sequence });
        }
        self.shared.drive.sync_regions(fenced)?;
        Ok(open)
    }

    /// Whether regions that go hold records that hide older ones in others. From then on those are hidden by the index
    /// alone: if that is lost too, nothing is made of them, and nothing more is written to them.
    fn note_what_goes(&self, plan: &Plan, counters: &mut Counters) -> Result<bool> {
        let mut hides = self.leaving(plan).any(|region| self.shared.regions.is_hiding(region));
        if !self.report.index_rebuilt {
            let marks: HashMap<u32, u64> =
                self.index.marks()?.into_iter().map(|mark| (mark.region, mark.generation)).collect();
            for region in &plan.lost_regions {
                let over = marks.get(region).copied().unwrap_or(0);
                hides |= self.index.meta_number(&hiding_name(*region))?.is_some_and(|hidden| hidden >= over);
            }
        }
        if hides {
            counters.raise_rebuild_floor(Some(&self.index))?;
        }
        Ok(hides)
    }

    /// Regions of drives that are there which the store has no longer afterwards.
    fn leaving(&self, plan: &Plan) -> impl Iterator<Item = u32> {
        let drive = &self.shared.drive;
        (0..self.shared.regions.count()).filter(|region| drive.place(*region).is_some() && !plan.after.has(*region))
    }

    /// Ends the regions that go: for lookups, in the index, in the superblock.
    fn drop_what_goes(&mut self, plan: &Plan, counters: &mut Counters) -> Result<()> {
        if plan.during == plan.after {
            return Ok(());
        }
        let leaving: Vec<u32> = self.leaving(plan).collect();
        // Before the index is told: else a crash could leave regions that are over in the index, and come back without it.
        counters.set_table(plan.after.clone())?;
        for &region in leaving.iter().chain(&plan.lost_regions) {
            self.shared.regions.withdraw(region);
            let generation = counters.next_generation()?;
            self.marks.push(RegionMark { region, generation, page: 0, sequence: 0 });
        }
        let regions = &self.shared.regions;
        self.shared.table.retain(|location| regions.resolve(*location).is_some());
        tracing::info!(given_up = leaving.len(), lost = plan.lost_regions.len(), "the store has fewer regions");
        self.commit()
    }

    /// See [`HeaderKind::Fence`].
    fn fence(&self, live: &Live, end: LogEnd) -> RecordHeader {
        RecordHeader {
            kind: HeaderKind::Fence,
            replaces: false,
            store: self.shared.uuid,
            location: Location {
                region: live.header.region,
                generation: live.header.generation,
                page: end.page,
                pages: 1,
            },
            sequence: end.sequence,
            hides: 0,
            identity: DiskIdentity {
                namespace: NamespaceId::from_bytes([0; 32]),
                group: 0,
                shard: 0,
                key: BlockKey::ROOT,
            },
            shards: 0,
            codec: CODEC_STORED,
            key_version: KEY_CHAIN_VERSION,
            parent: BlockKey::ROOT,
            depth: 0,
            raw_bytes: 0,
            stored_bytes: 0,
            stored_xxh3: 0,
            raw_xxh3: 0,
            created_unix_ms: 0,
            seal: None,
        }
    }

    fn commit(&mut self) -> Result<()> {
        self.commit_changes()?;
        self.index.commit(&[], &std::mem::take(&mut self.marks))
    }

    fn commit_changes(&mut self) -> Result<()> {
        let changes = std::mem::take(&mut self.changes);
        self.shared.commit(&self.index, &changes, &[], false)
    }
}
