//! What a check of a closed store found. Values only; the names are the keys of its JSON.

use serde::Serialize;

/// The most findings that are told one by one; all are counted.
const DETAILS_MAX: usize = 1000;

/// The state of the index of a checked store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum IndexState {
    /// It can be read and is this store's.
    #[default]
    Ok,
    /// There is none: the next open makes it from the regions.
    Missing,
    /// It cannot be read: the next open makes it anew.
    Damaged,
    /// It is of another store: the next open makes it anew.
    Foreign,
    /// It is a copy from before the last open, or from before the rebuild floor was raised, so it may lack what hid older
    /// versions, or know what a power loss has undone: the next open makes it anew.
    Old,
}

/// What disagrees, to match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FsckProblem {
    /// A row of the index where no record lies.
    RowWithoutRecord,
    /// A record, covered by the index, that has no row.
    Orphan,
    /// A record whose payload does not match its checksum.
    BadChecksum,
    /// A record whose payload is as it was written, and can not be decoded to what its header says.
    Undecodable,
    /// A row that points to the record of somebody else.
    WrongIdentity,
    /// A row with other lengths, another sequence or another parent than its record.
    WrongRow,
    /// A record that the drive can not read.
    UnreadableRecord,
    /// A region whose header the drive can not read.
    UnreadableRegion,
    /// A copy of the superblock that can not be used; the other one is in use.
    BadSuperblock,
    /// A generation or sequence that was not reserved, or an index that covers more than there is.
    WrongCounter,
    /// The index as a whole can not be used.
    BadIndex,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FsckFinding {
    /// What disagrees.
    pub problem: FsckProblem,
    /// In which region, if it is in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<u32>,
    /// At which page of the region, if at one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page: Option<u32>,
    /// One sentence for people.
    pub what: String,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct FsckReport {
    /// Whether the store had been closed in order. If not, what the next open will find is no problem.
    pub is_clean: bool,
    /// Regions of the store.
    pub regions: u32,
    /// Of these, regions that hold records.
    pub regions_in_use: u32,
    /// The state of the index.
    pub index: IndexState,
    /// Rows of the index.
    pub rows: u64,
    /// Records in the regions, tombstones and older versions included.
    pub records: u64,
    /// Bytes of these, headers and padding included.
    pub bytes: u64,
    /// Rows of regions that were given up since, or of namespaces that were purged: normal after a crash, the next open drops
    /// them.
    pub stale_rows: u64,
    /// Records that the index does not cover yet: normal after a crash, the next open takes them up.
    pub unindexed_records: u64,
    /// Rows where no record lies.
    pub rows_without_record: u64,
    /// Records without a row.
    pub orphans: u64,
    /// Records whose payload does not match its checksum.
    pub bad_checksums: u64,
    /// Records whose payload matches its checksum and can not be decoded.
    pub undecodable: u64,
    /// Rows that point to somebody else's record.
    pub wrong_identities: u64,
    /// Rows that say something else than their record.
    pub wrong_rows: u64,
    /// Records that the drive can not read.
    pub unreadable_records: u64,
    /// Regions whose header the drive can not read.
    pub unreadable_regions: u64,
    /// Unusable copies of the superblock.
    pub bad_superblocks: u64,
    /// Counters that are beyond what was reserved.
    pub wrong_counters: u64,
    /// 1 if the index as a whole can not be used.
    pub bad_indexes: u64,
    /// All problems together.
    pub problems: u64,
    /// Problems that are no more.
    pub repaired: u64,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
    /// The first 1,000 problems, one by one.
    pub findings: Vec<FsckFinding>,
}

impl FsckReport {
    /// Whether nothing disagrees, or nothing any more.
    pub fn is_good(&self) -> bool {
        self.problems == self.repaired
    }

    /// Notes a problem.
    pub(super) fn note(&mut self, problem: FsckProblem, region: Option<u32>, page: Option<u32>, what: String) {
        self.problems += 1;
        *match problem {
            FsckProblem::RowWithoutRecord => &mut self.rows_without_record,
            FsckProblem::Orphan => &mut self.orphans,
            FsckProblem::BadChecksum => &mut self.bad_checksums,
            FsckProblem::Undecodable => &mut self.undecodable,
            FsckProblem::WrongIdentity => &mut self.wrong_identities,
            FsckProblem::WrongRow => &mut self.wrong_rows,
            FsckProblem::UnreadableRecord => &mut self.unreadable_records,
            FsckProblem::UnreadableRegion => &mut self.unreadable_regions,
            FsckProblem::BadSuperblock => &mut self.bad_superblocks,
            FsckProblem::WrongCounter => &mut self.wrong_counters,
            FsckProblem::BadIndex => &mut self.bad_indexes,
        } += 1;
        if self.findings.len() < DETAILS_MAX {
            self.findings.push(FsckFinding { problem, region, page, what });
        }
    }
}

/// How far a check has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct FsckProgress {
    /// Regions that were read.
    pub regions: u32,
    /// Regions that hold records.
    pub regions_total: u32,
}
