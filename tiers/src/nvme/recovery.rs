//! Opening what is there: from the files of a store to its state in memory, after a clean close, a kill or a power loss.
//!
//! The index says what it knows; the regions are believed over it. Rows of another generation than their region's are
//! dropped, and each region is read on from where the index ends. An index that is missing, damaged or another store's is
//! made anew from the regions. `docs/format.md` goes through the cases.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::Counters;
use super::directory::Directory;
use super::page::{PAGE_BYTES, get_u64};
use super::record_header::{CODEC_STORED, DiskIdentity, HeaderKind, RecordHeader};
use super::region_header::{HEADER_SLOTS, RegionHeader, RegionPurpose};
use super::scan::{AtDamage, Found, LogEnd, ScanRange, scan};
use super::shared::Shared;
use super::superblock::Superblock;
use super::writer::{Handover, OpenRegion, hiding_name};
use crate::block::{BlockKey, KEY_CHAIN_VERSION, NamespaceId, RecordId, RecordKind};
use crate::error::{ErrorKind, Result};
use crate::index::{IndexChange, IndexLog, IndexRow, Location, RegionMark};

/// Changes that go into the index at once.
const BATCH: usize = 4096;
/// The name in the index under which the store's identity stands once it is complete.
pub(super) const STORE_NAME: &str = "store";

/// What an open found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecoveryReport {
    /// Records that are found by lookups now.
    pub records: u64,
    /// Of these, records that were in the regions and not yet in the index.
    pub recovered_records: u64,
    /// Rows of the index that pointed to nothing any more.
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
}

/// Reads a store and gets it ready for the writer.
pub(super) fn recover(
    shared: &Arc<Shared>,
    directory: &Directory,
    superblock: Superblock,
) -> Result<(RecoveryReport, Handover)> {
    let started = Instant::now();
    let headers = read_region_headers(shared, &superblock)?;
    let mut counters = Counters::start(Arc::clone(&shared.drive), superblock)?;
    free_for_good(shared, &superblock, &mut counters, &headers.unreadable)?;
    let begin = |index: IndexLog, index_rebuilt| -> Result<(Recovery<'_>, Vec<Live>)> {
        let report = RecoveryReport { clean: superblock.is_clean, index_rebuilt, ..RecoveryReport::default() };
        let mut recovery = Recovery { shared, index: Arc::new(index), report, changes: Vec::new(), marks: Vec::new() };
        let live = recovery.restore_regions(&headers.found)?;
        if !index_rebuilt {
            recovery.load_rows()?;
        }
        Ok((recovery, live))
    };
    let begun = open_index(shared, directory)?.map(|index| begin(index, false)).transpose();
    let (mut recovery, mut live) = match begun {
        Ok(Some(begun)) => begun,
        Err(error) if error.kind() != ErrorKind::Corrupt => return Err(error),
        damaged => {
            let why = damaged.err().map_or("it is missing".to_owned(), |error| error.to_string());
            tracing::warn!(why, "the index is made anew from the regions");
            shared.table.retain(|_| false);
            begin(new_index(shared, directory)?, true)?
        }
    };
    recovery.read_on(&mut live)?;
    let open = recovery.end_logs(&live, &mut counters)?;
    recovery.commit()?;
    let (index, mut report) = (recovery.index, recovery.report);
    if report.index_rebuilt {
        index.meta_put(STORE_NAME, shared.uuid.as_bytes())?;
        index.sync()?;
    }
    let used: HashSet<u32> = live.iter().map(|live| live.header.region).collect();
    let free: VecDeque<u32> = (0..shared.regions.count()).filter(|region| !used.contains(region)).collect();
    (report.records, report.elapsed) = (shared.table.len() as u64, started.elapsed());
    Ok((report, Handover { counters, index, open, free, header_slots: headers.slots }))
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

fn read_region_headers(shared: &Shared, superblock: &Superblock) -> Result<Headers> {
    let mut headers = Headers::default();
    for region in 0..shared.regions.count() {
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
        headers.slots.push(found.map_or(0, |(slot, _)| slot));
        headers.found.push(found.map(|(_, header)| header));
    }
    Ok(headers)
}

/// A region that was taken as free once must not come back when the drive can read its header again: what was removed
/// meanwhile would come back with it.
fn free_for_good(shared: &Shared, superblock: &Superblock, counters: &mut Counters, regions: &[u32]) -> Result<()> {
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
    if regions.is_empty() { Ok(()) } else { shared.drive.sync() }
}

/// Opens the index; `None` if it has to be made anew, because it is missing, damaged, or not this store's.
fn open_index(shared: &Shared, directory: &Directory) -> Result<Option<IndexLog>> {
    let open = || -> Result<Option<IndexLog>> {
        let index = IndexLog::open(&directory.index())?;
        let is_ours = index.meta_get(STORE_NAME)?.is_some_and(|uuid| uuid == shared.uuid.as_bytes());
        if !is_ours {
            return Ok(None);
        }
        for row in index.namespaces()? {
            shared.namespaces.adopt(row)?;
        }
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

/// An empty index, for the first open and for a rebuild.
fn new_index(shared: &Shared, directory: &Directory) -> Result<IndexLog> {
    directory.wipe_index()?;
    let index = IndexLog::open(&directory.index())?;
    for row in shared.namespaces.rows() {
        index.put_namespace(&row)?;
    }
    Ok(index)
}

impl Recovery<'_> {
    /// Takes up the regions that hold records, in the order of their generations: that is the order of their sequences.
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
            let hides = self.index.meta_get(&hiding_name(header.region))?;
            let hides = hides.is_some_and(|value| value.len() == 8 && get_u64(&value, 0) == header.generation);
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

    /// Fills the table from the rows of the index.
    fn load_rows(&mut self) -> Result<()> {
        let region_pages = self.shared.drive.region_pages();
        let mut dropped = Vec::new();
        let mut dropped_rows = 0;
        self.index.scan(&mut |row| {
            let Location { region, generation, page, pages } = row.location;
            let is_there =
                self.shared.regions.resolve(row.location).is_some_and(|there| there.generation == generation)
                    && page >= HEADER_SLOTS
                    && page + pages <= region_pages;
            if is_there {
                self.shared.point_to(&row.id, row.parent, row.location);
                self.shared.regions.set_used(region, page + pages);
            } else {
                dropped_rows += 1;
                if dropped.len() < BATCH {
                    dropped.push(IndexChange::Remove { id: row.id, sequence: row.sequence });
                }
            }
            Ok(())
        })?;
        self.report.dropped_rows = dropped_rows;
        self.index.commit(&dropped, &[])
    }

    /// Reads every region on from where the index ends.
    fn read_on(&mut self, live: &mut [Live]) -> Result<()> {
        let rebuilding = self.report.index_rebuilt;
        for live in live {
            if live.end.page >= self.shared.drive.region_pages() {
                continue;
            }
            let range = ScanRange {
                store: self.shared.uuid,
                region: live.header.region,
                generation: live.header.generation,
                from_page: live.end.page,
                after_sequence: live.end.sequence,
                at_damage: if rebuilding { AtDamage::Search } else { AtDamage::Stop },
                checks_payloads: true,
            };
            let drive = Arc::clone(&self.shared.drive);
            live.end = scan(&drive, &range, &mut |found| self.take(&found))?;
            live.was_read = true;
            self.shared.regions.set_used(live.header.region, live.end.page);
            self.marks.push(RegionMark {
                region: live.header.region,
                generation: live.header.generation,
                page: live.end.page,
                sequence: live.end.sequence,
            });
            if !rebuilding {
                self.commit()?;
            }
        }
        Ok(())
    }

    /// Takes up one record. They come in the order of their sequences, so the last one of an identity stays.
    fn take(&mut self, found: &Found) -> Result<()> {
        let header = &found.header;
        let identity = &header.identity;
        let hides_older = header.replaces || header.kind == HeaderKind::Tombstone;
        if hides_older && self.shared.regions.set_hiding(header.location.region) {
            let name = hiding_name(header.location.region);
            self.index.meta_put(&name, &header.location.generation.to_le_bytes())?;
        }
        let Some(namespace) = self.shared.namespaces.handle_of(&identity.namespace) else { return Ok(()) };
        let id = RecordId { namespace, group: identity.group, shard: identity.shard, key: identity.key };
        match header.kind.record_kind() {
            Some(RecordKind::Tombstone) => {
                self.changes.push(IndexChange::Remove { id, sequence: header.hides });
            }
            // What replaced an older version and is damaged still hides it: a miss, not something stale.
            Some(_) if !found.is_intact => {
                tracing::warn!(?id, location = ?header.location, "a record is damaged; it is left out");
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

    /// Ends every log that a crash may have left open, and finds the region to go on with: the newest, if it has room.
    fn end_logs(&mut self, live: &[Live], counters: &mut Counters) -> Result<Option<OpenRegion>> {
        let region_pages = self.shared.drive.region_pages();
        let mut open = None;
        let mut has_fences = false;
        let newest = live.last().map(|live| live.header.region);
        for live in live {
            let RegionHeader { region, generation, .. } = live.header;
            let is_newest = newest == Some(region);
            let mut end = live.end;
            if live.was_read && !self.report.clean && end.page < region_pages {
                end.sequence = counters.next_sequence()?;
                self.shared.drive.write(region, end.page, &self.fence(live, end).encode())?;
                end.page += 1;
                has_fences = true;
                self.shared.regions.set_used(region, end.page);
            }
            if is_newest && end.page < region_pages {
                self.shared.regions.reopen(region);
                open = Some(OpenRegion { region, generation, next_page: end.page });
            } else {
                end.page = region_pages;
            }
            self.marks.push(RegionMark { region, generation, page: end.page, sequence: end.sequence });
        }
        if has_fences {
            self.shared.drive.sync()?;
        }
        Ok(open)
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
        }
    }

    fn commit(&mut self) -> Result<()> {
        self.commit_changes()?;
        self.index.commit(&[], &std::mem::take(&mut self.marks))
    }

    fn commit_changes(&mut self) -> Result<()> {
        let changes = std::mem::take(&mut self.changes);
        self.index.commit(&changes, &[])?;
        self.shared.publish(&self.index, &changes)
    }
}
