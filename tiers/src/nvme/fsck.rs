//! Checks a closed store, from both sides: every row of the index must point to an intact record that is what the row
//! says, and every record that the index covers must have a row, unless something newer hides it. Changes nothing, unless
//! it is asked to repair: then rows that disagree are dropped, and rows that are missing are put back.
//!
//! What a crash leaves and the next open mends by itself (rows of regions given up since, records behind the marks) is
//! counted apart and is no problem.

mod payload;
mod report;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

pub use report::{FsckFinding, FsckProblem, FsckProgress, FsckReport, IndexState};

use super::backing::{Backing, System};
use super::config::{DriveConfig, StoreConfig};
use super::counters::knows_floor;
use super::directory::{Directory, IDENTITY};
use super::drive::{Drive, Place};
use super::drive_directory::DriveDirectory;
use super::drive_identity::DriveIdentity;
use super::drive_table::Extent;
use super::encryption::{EncryptionKey, HeaderKey, Keyring};
use super::io::{IoChoice, open_direct, open_engine};
use super::namespaces::Namespaces;
use super::page::PAGE_BYTES;
use super::policy::{ReclaimPolicy, RegionInfo};
use super::record_header::{DiskIdentity, HeaderKind, RecordHeader};
use super::recovery::{STORE_NAME, last_open};
use super::region_header::{HEADER_SLOTS, RegionHeader, RegionPurpose};
use super::scan::{AtDamage, Found, ScanRange, scan};
use super::store::Store;
use super::superblock::{SUPERBLOCK_COPIES, Superblock};
use crate::block::{RecordId, RecordKind};
use crate::codec::Decoder;
use crate::dram::{Arena, ArenaConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexChange, IndexLog, IndexRow, Location, RegionMark};

/// Rows that are held in memory at once; the regions of a larger index are gone through in several passes.
const ROWS_AT_ONCE: u64 = 1 << 20;
/// Records that look like orphans, which are held in memory until all tombstones are known. More are no longer told one
/// by one: the index is then better made anew.
const ORPHANS_MAX: usize = 1 << 20;
/// How often a repair is followed by another one for what it has brought to light.
const REPAIRS_MAX: usize = 3;
/// Changes of the index at once.
const BATCH: usize = 4096;
/// DRAM of a store that is opened to be repaired.
const REPAIR_DRAM_BYTES: u64 = 64 << 20;
const REPAIR_PATIENCE: std::time::Duration = std::time::Duration::from_secs(300);

/// Where a store lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorePaths {
    /// Its home.
    pub home: PathBuf,
    /// Its further drives.
    pub more_drives: Vec<PathBuf>,
}

impl StorePaths {
    /// The stores of directories in any order: homes, and drives that belong to them. Reads only.
    ///
    /// # Errors
    /// `InvalidInput` for a directory that is neither or a drive without its home, `Corrupt`, `NewerFormat`, and what the
    /// file system reports.
    pub fn group(paths: &[PathBuf]) -> Result<Vec<Self>> {
        let read = |path: PathBuf| {
            std::fs::read(&path).map_err(|source| Error::from_io(format!("reading {}", path.display()), source))
        };
        let mut stores = Vec::new();
        for home in paths.iter().filter(|path| !path.join(IDENTITY).is_file()) {
            if !Directory::is_store(home) {
                return Err(no_store(home));
            }
            let superblock = Superblock::newest(read(Directory::superblock_of(home))?.chunks_exact(PAGE_BYTES))?;
            stores.push((superblock.store, Self { home: home.clone(), more_drives: Vec::new() }));
        }
        for drive in paths.iter().filter(|path| path.join(IDENTITY).is_file()) {
            let identity = DriveIdentity::decode(&read(drive.join(IDENTITY))?)?;
            match stores.iter_mut().find(|(store, _)| *store == identity.store) {
                Some((_, store)) => store.more_drives.push(drive.clone()),
                None => {
                    let message = format!("{} is a drive of a store; give the store's home too", drive.display());
                    return Err(Error::new(ErrorKind::InvalidInput, message));
                }
            }
        }
        Ok(stores.into_iter().map(|(_, paths)| paths).collect())
    }
}

/// Checks a store; nobody may have it open. `progress` is called after every region. With `repair` rows that
/// disagree are dropped and missing ones put back, and an index that cannot be used is removed: the next open makes it
/// anew.
///
/// # Errors
/// `Locked` naming who has it open, `InvalidInput` if there is no store or a drive of it is not given, `ForeignFormat`, `NewerFormat`, `PermissionDenied`,
/// `Corrupt` if both superblocks are unreadable, `Io`. What the check finds is no error: it is in the report.
pub fn fsck(paths: &StorePaths, repair: bool, progress: &mut dyn FnMut(FsckProgress)) -> Result<FsckReport> {
    fsck_with_key(paths, None, repair, progress)
}

/// As [`fsck`], of a store that may be encrypted.
///
/// # Errors
/// As [`fsck`]; `PermissionDenied` for an encrypted store without its key or with another one.
pub fn fsck_with_key(
    paths: &StorePaths,
    key: Option<&EncryptionKey>,
    repair: bool,
    progress: &mut dyn FnMut(FsckProgress),
) -> Result<FsckReport> {
    let started = Instant::now();
    let (mut report, mut fixes) = check_once(paths, key, progress)?;
    let mut left = report.problems;
    for _ in 0..REPAIRS_MAX {
        if !repair || left == 0 {
            break;
        }
        fixes.apply(paths, key)?;
        // What is no longer so, as the same check sees it. A record whose row said something wrong has none afterwards.
        let (after, more) = check_once(paths, key, progress)?;
        (left, fixes) = (after.problems, more);
    }
    report.repaired = report.problems.saturating_sub(left);
    report.elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(report)
}

fn check_once(
    paths: &StorePaths,
    key: Option<&EncryptionKey>,
    progress: &mut dyn FnMut(FsckProgress),
) -> Result<(FsckReport, Fixes)> {
    let directory = Directory::open_existing(&paths.home)?;
    let drives = paths.more_drives.iter().map(|path| Ok((path, DriveDirectory::open_existing(path)?)));
    let mut check = Check::open(&directory, drives.collect::<Result<_>>()?, key)?;
    check.regions(progress)?;
    let Check { report, rows, damaged_objects, superblock, more_drives, .. } = check;
    let drops_index = report.index != IndexState::Ok;
    Ok((report, Fixes { rows, damaged_objects, drops_index, superblock, more_drives }))
}

/// A record that has no row, as far as is known yet.
struct Candidate {
    id: RecordId,
    header: RecordHeader,
}

struct Check {
    drive: Drive,
    /// The directories of further drives, in the order of the store's table.
    more_drives: Vec<PathBuf>,
    /// Held until the check has ended.
    _locks: Vec<DriveDirectory>,
    superblock: Superblock,
    namespaces: Namespaces,
    keyring: Option<Keyring>,
    index: Option<IndexLog>,
    marks: HashMap<u32, RegionMark>,
    headers: Vec<Option<RegionHeader>>,
    report: FsckReport,
    /// Changes that would repair what was found.
    rows: Vec<IndexChange>,
    /// Objects whose newest record is damaged: an older one must stay hidden, which takes a tombstone.
    damaged_objects: Vec<(RecordId, Location)>,
    /// By identity, the largest sequence that a tombstone hides.
    tombstones: HashMap<RecordId, u64>,
    candidates: Vec<Candidate>,
    decoder: Decoder,
}

impl Check {
    fn open(
        directory: &Directory,
        drives: Vec<(&PathBuf, DriveDirectory)>,
        key: Option<&EncryptionKey>,
    ) -> Result<Self> {
        let mut report = FsckReport::default();
        let pages = std::fs::read(directory.superblock())
            .map_err(|source| Error::from_io(format!("reading {}", directory.superblock().display()), source))?;
        let superblock = read_superblock(&pages, &mut report)?;
        let keyring = Keyring::prepare(&System, key, directory, &superblock)?;
        let drives = in_order(&superblock, drives, &mut report)?;
        let mut files = vec![open_direct(&directory.superblock())?.0, open_direct(&directory.regions())?.0];
        for (_, drive) in &drives {
            files.push(open_direct(&drive.regions())?.0);
        }
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(4 << 20) })?;
        let io = open_engine(IoChoice::Psync, &files, &arena, 4)?;
        let region_pages = u32::try_from(superblock.region_bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX);
        let drive = Drive::new(io, region_pages, files.len() - 1, places(&superblock));
        let (more_drives, locks) = drives.into_iter().unzip();
        let namespaces = Namespaces::open(System.small_file(&directory.namespaces())?, superblock.store)?;
        report.is_clean = superblock.is_clean;
        report.regions = drive.places().iter().flatten().count() as u32;
        let (index, state) = open_index(directory, &superblock)?;
        report.index = state;
        if index.is_none() {
            let what = "the index is missing, damaged, too old or another store's; the next open makes it anew";
            report.note(FsckProblem::BadIndex, None, None, what.into());
        }
        let marks = index.as_ref().map_or(Ok(Vec::new()), IndexLog::marks)?;
        for end in index.as_ref().map_or(Ok(Vec::new()), IndexLog::ends)? {
            namespaces.adopt_end(end, true)?;
        }
        Ok(Self {
            drive,
            more_drives,
            _locks: locks,
            superblock,
            namespaces,
            keyring,
            index,
            marks: marks.into_iter().map(|mark| (mark.region, mark)).collect(),
            headers: Vec::new(),
            report,
            rows: Vec::new(),
            damaged_objects: Vec::new(),
            tombstones: HashMap::new(),
            candidates: Vec::new(),
            decoder: Decoder::new(),
        })
    }

    fn regions(&mut self, progress: &mut dyn FnMut(FsckProgress)) -> Result<()> {
        self.read_headers()?;
        let live: Vec<u32> = (0..).zip(&self.headers).filter(|(_, header)| header.is_some()).map(|(n, _)| n).collect();
        self.report.regions_in_use = live.len() as u32;
        self.report.rows = self.count_rows()?;
        let passes = u32::try_from(self.report.rows / ROWS_AT_ONCE + 1).unwrap_or(u32::MAX);
        let mut told = FsckProgress { regions: 0, regions_total: live.len() as u32 };
        for pass in 0..passes {
            let mut rows = self.rows_of(|region| region % passes == pass)?;
            for &region in live.iter().filter(|region| *region % passes == pass) {
                self.region(region, rows.remove(&region).unwrap_or_default())?;
                told.regions += 1;
                progress(told);
            }
        }
        self.settle_orphans();
        Ok(())
    }

    fn read_headers(&mut self) -> Result<()> {
        for (region, place) in (0u32..).zip(self.drive.places().to_vec()) {
            let Some(Place { since, .. }) = place else {
                self.headers.push(None);
                continue;
            };
            let header = match self.drive.read(region, 0, HEADER_SLOTS) {
                Ok(pages) => {
                    let slots = pages.as_slice().chunks_exact(PAGE_BYTES);
                    RegionHeader::newest(slots, self.superblock.store, region, self.superblock.region_bytes)
                }
                Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt) => {
                    self.report.note(FsckProblem::UnreadableRegion, Some(region), Some(0), error.to_string());
                    None
                }
                Err(error) => return Err(error),
            };
            let header = header.map(|(_, header)| header).filter(|header| header.generation >= since);
            if let Some(header) = header.filter(|header| header.generation >= self.superblock.generation_ceiling) {
                let what = format!("generation {} was never reserved", header.generation);
                self.report.note(FsckProblem::WrongCounter, Some(region), Some(0), what);
            }
            self.headers.push(header.filter(|header| header.purpose == RegionPurpose::Records));
        }
        Ok(())
    }

    /// Counts the rows; those that point into no region that holds records are dealt with here.
    fn count_rows(&mut self) -> Result<u64> {
        let Some(index) = &self.index else { return Ok(0) };
        let (headers, report, changes) = (&self.headers, &mut self.report, &mut self.rows);
        let (is_clean, namespaces) = (report.is_clean, &self.namespaces);
        index.scan(&mut |row| {
            // A purge that ran out of time, or a crash, leaves them.
            if namespaces.is_ended(row.id.namespace) {
                report.stale_rows += 1;
                return Ok(());
            }
            let header = headers.get(row.location.region as usize).copied().flatten();
            if header.is_some_and(|header| header.generation == row.location.generation) {
                return Ok(());
            }
            if is_clean {
                let Location { region, page, generation, .. } = row.location;
                let what = format!("a row of generation {generation}, which the region is not in");
                report.note(FsckProblem::RowWithoutRecord, Some(region), Some(page), what);
                changes.push(IndexChange::Remove { id: row.id, sequence: row.sequence });
            } else {
                report.stale_rows += 1;
            }
            Ok(())
        })
    }

    /// The rows of some regions, by region; only of the generation that the region is in.
    fn rows_of(&self, is_wanted: impl Fn(u32) -> bool) -> Result<HashMap<u32, Vec<IndexRow>>> {
        let mut rows: HashMap<u32, Vec<IndexRow>> = HashMap::new();
        let Some(index) = &self.index else { return Ok(rows) };
        index.scan(&mut |row| {
            let region = row.location.region;
            let header = self.headers.get(region as usize).copied().flatten();
            let is_purged = self.namespaces.is_ended(row.id.namespace);
            if is_wanted(region)
                && !is_purged
                && header.is_some_and(|header| header.generation == row.location.generation)
            {
                rows.entry(region).or_default().push(row);
            }
            Ok(())
        })?;
        Ok(rows)
    }

    /// The key that authenticates headers, if the store is encrypted.
    fn header_key(&self) -> Option<&HeaderKey> {
        self.keyring.as_ref().map(Keyring::header)
    }

    /// Reads a region whole and compares it with its rows.
    fn region(&mut self, region: u32, rows: Vec<IndexRow>) -> Result<()> {
        let Some(header) = self.headers.get(region as usize).copied().flatten() else { return Ok(()) };
        let range = ScanRange {
            store: self.superblock.store,
            region,
            generation: header.generation,
            from_page: HEADER_SLOTS,
            after_sequence: header.first_sequence.saturating_sub(1),
            at_damage: AtDamage::Search,
            checks_payloads: true,
            header_key: self.header_key().cloned(),
        };
        let mut found = HashMap::new();
        let end = scan(&self.drive, &range, &mut |record| {
            found.insert(record.header.location.page, record);
            Ok(())
        })?;
        let mark = self.marks.get(&region).filter(|mark| mark.generation == header.generation).copied();
        if end.sequence >= self.superblock.sequence_ceiling {
            let what = format!("sequence {} was never reserved", end.sequence);
            self.report.note(FsckProblem::WrongCounter, Some(region), Some(end.page), what);
        }
        if let Some(mark) = mark.filter(|mark| mark.sequence >= self.superblock.sequence_ceiling) {
            let what = format!("the index covers sequence {}, which was never reserved", mark.sequence);
            self.report.note(FsckProblem::WrongCounter, Some(region), Some(mark.page), what);
        }
        let undecodable = self.decode_all(found.values_mut())?;
        for row in &rows {
            self.row(row, found.get(&row.location.page), &undecodable);
        }
        let covered = mark.map_or(HEADER_SLOTS, |mark| mark.page);
        for record in found.values() {
            self.record(record, covered)?;
        }
        Ok(())
    }

    /// A row, and the record that a scan found in its place.
    fn row(&mut self, row: &IndexRow, found: Option<&Found>, undecodable: &HashMap<u32, String>) {
        let problem = match found {
            Some(found) => self.disagreement(row, found, undecodable.get(&row.location.page)),
            None => Some(self.what_lies_there(row)),
        };
        let Some((problem, what)) = problem else { return };
        self.report.note(problem, Some(row.location.region), Some(row.location.page), what);
        let is_damaged =
            matches!(problem, FsckProblem::BadChecksum | FsckProblem::Undecodable | FsckProblem::UnreadableRecord);
        match found.filter(|_| problem == FsckProblem::WrongRow) {
            Some(found) => self.rows.extend(
                [IndexChange::Remove { id: row.id, sequence: u64::MAX }].into_iter().chain(put(row.id, &found.header)),
            ),
            None if is_damaged && row.kind == RecordKind::Object => self.damaged_objects.push((row.id, row.location)),
            None => self.rows.push(IndexChange::Remove { id: row.id, sequence: u64::MAX }),
        }
    }

    fn disagreement(
        &self,
        row: &IndexRow,
        found: &Found,
        undecodable: Option<&String>,
    ) -> Option<(FsckProblem, String)> {
        let header = &found.header;
        let identity = self.namespaces.identity(&row.id);
        if identity.as_ref() != Some(&header.identity) {
            return Some((FsckProblem::WrongIdentity, "the record is somebody else's".into()));
        }
        if let Some(why) = undecodable {
            return Some((FsckProblem::Undecodable, why.clone()));
        }
        if !found.is_intact {
            return Some((FsckProblem::BadChecksum, "the payload does not match its checksum".into()));
        }
        let says = [
            ("pages", u64::from(row.location.pages), u64::from(header.location.pages)),
            ("bytes", row.payload_bytes, header.raw_bytes),
            ("sequence", row.sequence, header.sequence),
            ("depth", u64::from(row.depth), u64::from(header.depth)),
        ];
        let other = says.into_iter().find(|(_, row, record)| row != record);
        let what = other.map(|(name, row, record)| format!("the row says {name} {row}, the record {record}"));
        let is_same_kind = header.kind.record_kind() == Some(row.kind) && row.parent == header.parent;
        let what =
            what.or_else(|| (!is_same_kind).then(|| "the row has another kind or parent than the record".into()));
        what.map(|what| (FsckProblem::WrongRow, what))
    }

    /// Why a scan did not find what a row points to.
    fn what_lies_there(&self, row: &IndexRow) -> (FsckProblem, String) {
        let Location { region, page, .. } = row.location;
        let is_inside = page >= HEADER_SLOTS && page.saturating_add(row.location.pages) <= self.drive.region_pages();
        if !is_inside {
            return (FsckProblem::RowWithoutRecord, "the row points outside of its region".into());
        }
        match self.drive.read(region, page, 1) {
            Err(error) => (FsckProblem::UnreadableRecord, error.to_string()),
            Ok(bytes) => match RecordHeader::decode(bytes.as_slice(), self.header_key()) {
                Err(error) => (FsckProblem::RowWithoutRecord, format!("no record lies there: {error}")),
                Ok(_) => (FsckProblem::RowWithoutRecord, "what lies there is of another life or place".into()),
            },
        }
    }

    /// A record, which must have a row if the index covers it and nothing newer is there.
    fn record(&mut self, found: &Found, covered: u32) -> Result<()> {
        let header = &found.header;
        self.report.records += 1;
        self.report.bytes += header.location.bytes();
        let DiskIdentity { namespace, group, shard, key } = header.identity;
        // Without its namespace nobody can ask for it, nor once that was purged.
        let Some(namespace) = self.namespaces.handle_at(&namespace, header.sequence) else { return Ok(()) };
        let id = RecordId { namespace, group, shard, key };
        if header.kind == HeaderKind::Tombstone {
            let hides = self.tombstones.entry(id).or_default();
            *hides = header.hides.max(*hides);
            return Ok(());
        }
        let Some(index) = self.index.as_ref().filter(|_| found.is_intact) else { return Ok(()) };
        if index.get(&id)?.is_some_and(|row| row.sequence >= header.sequence) {
            return Ok(());
        }
        if header.location.page >= covered {
            self.report.unindexed_records += 1;
        } else if self.candidates.len() < ORPHANS_MAX {
            self.candidates.push(Candidate { id, header: *header });
        } else {
            self.report.note(FsckProblem::Orphan, None, None, "more records without rows than are told".into());
        }
        Ok(())
    }

    /// Now that all tombstones are known: what is not hidden by one, or by a newer version, is an orphan.
    fn settle_orphans(&mut self) {
        let mut newest: HashMap<RecordId, RecordHeader> = HashMap::new();
        for Candidate { id, header } in std::mem::take(&mut self.candidates) {
            let is_hidden = self.tombstones.get(&id).is_some_and(|hides| *hides >= header.sequence);
            if !is_hidden && newest.get(&id).is_none_or(|other| other.sequence < header.sequence) {
                newest.insert(id, header);
            }
        }
        for (id, header) in newest {
            let Location { region, page, .. } = header.location;
            let what = format!("a record of sequence {} has no row", header.sequence);
            self.report.note(FsckProblem::Orphan, Some(region), Some(page), what);
            self.rows.extend(put(id, &header));
        }
    }
}

/// The row that a record should have.
fn put(id: RecordId, header: &RecordHeader) -> Option<IndexChange> {
    Some(IndexChange::Put(IndexRow {
        id,
        parent: header.parent,
        depth: header.depth,
        location: header.location,
        payload_bytes: header.raw_bytes,
        sequence: header.sequence,
        kind: header.kind.record_kind()?,
    }))
}

/// The drives in the order of the store's table.
fn in_order(
    superblock: &Superblock,
    drives: Vec<(&PathBuf, DriveDirectory)>,
    report: &mut FsckReport,
) -> Result<Vec<(PathBuf, DriveDirectory)>> {
    let mut found: Vec<Option<(PathBuf, DriveDirectory)>> = superblock.table.more_drives.iter().map(|_| None).collect();
    for (path, drive) in drives {
        let place = drive.identity().and_then(|identity| Some((identity, superblock.table.find(identity.drive)?)));
        // One that was retired, or has not joined, holds nothing of the store.
        let Some((identity, place)) = place else { continue };
        if !(superblock.opens..=superblock.opens.saturating_add(1)).contains(&identity.opens) {
            let (of_drive, of_store) = (identity.opens, superblock.opens);
            let what = format!("{} was used last at open {of_drive}, the store at {of_store}", path.display());
            report.note(FsckProblem::WrongCounter, None, None, what);
        }
        if let Some(found) = found.get_mut(usize::from(place) - 1) {
            *found = Some((path.clone(), drive));
        }
    }
    let all: Option<Vec<_>> = found.into_iter().collect();
    all.ok_or_else(|| {
        let count = superblock.table.drives();
        let message = format!("the store has {count} drives; give the directories of all of them");
        Error::new(ErrorKind::InvalidInput, message)
    })
}

/// Where each region lies, by number.
fn places(superblock: &Superblock) -> Vec<Option<Place>> {
    let mut places = vec![None; superblock.table.numbers() as usize];
    for extent in &superblock.table.extents {
        for (region, place) in Extent::each(extent) {
            if let Some(found) = places.get_mut(region as usize) {
                *found = Some(Place { drive: extent.drive.into(), place, since: extent.since });
            }
        }
    }
    places
}

fn read_superblock(pages: &[u8], report: &mut FsckReport) -> Result<Superblock> {
    let copies = || pages.chunks_exact(PAGE_BYTES).take(SUPERBLOCK_COPIES as usize);
    let newest = Superblock::newest(copies())?;
    for (number, copy) in copies().enumerate() {
        if let Err(error) = Superblock::decode(copy)
            // A store that was just made has written one copy only.
            && newest.counter > 1
        {
            let what = format!("copy {number} of the superblock: {error}");
            report.note(FsckProblem::BadSuperblock, None, None, what);
        }
    }
    Ok(newest)
}

fn open_index(directory: &Directory, superblock: &Superblock) -> Result<(Option<IndexLog>, IndexState)> {
    let path = directory.index();
    if !path.exists() {
        return Ok((None, IndexState::Missing));
    }
    let open = || -> Result<(Option<IndexLog>, IndexState)> {
        let index = IndexLog::open_read_only(&path)?;
        if index.meta_get(STORE_NAME)?.is_none_or(|uuid| uuid != superblock.store.as_bytes()) {
            return Ok((None, IndexState::Foreign));
        }
        if last_open(&index)? < superblock.opens || !knows_floor(&index, superblock.rebuild_floor)? {
            return Ok((None, IndexState::Old));
        }
        Ok((Some(index), IndexState::Ok))
    };
    match open() {
        Err(error) if error.kind() == ErrorKind::Corrupt => Ok((None, IndexState::Damaged)),
        opened => opened,
    }
}

/// What repairs a store.
struct Fixes {
    rows: Vec<IndexChange>,
    damaged_objects: Vec<(RecordId, Location)>,
    drops_index: bool,
    superblock: Superblock,
    more_drives: Vec<PathBuf>,
}

impl Fixes {
    fn apply(self, paths: &StorePaths, key: Option<&EncryptionKey>) -> Result<()> {
        let directory = Directory::open_existing(&paths.home)?;
        let Superblock { region_bytes, table, .. } = self.superblock;
        if self.drops_index {
            directory.wipe_index()?;
        } else {
            let index = IndexLog::open(&directory.index())?;
            self.rows.chunks(BATCH).try_for_each(|batch| index.commit(batch, &[]))?;
            index.sync()?;
            index.close();
        }
        drop(directory);
        // An open and a close in order: takes up what a crash left, writes both superblocks, makes a lost index anew.
        let capacity_of = |drive: u16| region_bytes * u64::from(table.regions_of(drive));
        let drives = (1..).zip(self.more_drives);
        let more_drives =
            drives.map(|(drive, path)| DriveConfig { path, capacity_bytes: capacity_of(drive) }).collect();
        let encryption = key.cloned();
        let config =
            StoreConfig { more_drives, encryption, ..StoreConfig::new(&paths.home, capacity_of(0), region_bytes) };
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(REPAIR_DRAM_BYTES) })?;
        let (store, _) = Store::open(config, arena, Arc::new(KeepAll))?;
        for (id, location) in self.damaged_objects {
            store.quarantine(id, location);
        }
        store.flush(Instant::now() + REPAIR_PATIENCE)?;
        store.close(Instant::now() + REPAIR_PATIENCE)
    }
}

/// A repair gives no region up.
struct KeepAll;

impl ReclaimPolicy for KeepAll {
    fn victim(&self, _: &[RegionInfo]) -> Option<u32> {
        None
    }
}

/// The error for a directory without a store.
pub(super) fn no_store(path: &Path) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("there is no store in {}; give the directory of one", path.display()))
}
