//! The durable log of the index: one RocksDB at `<store>/index`. Owns what must outlive the process: a row for every
//! record, how far each region is covered, the namespaces, small named values. Written in batches after the records
//! themselves are durable; read when the store opens. Never on the path of a lookup. It may lag behind the regions after
//! a power loss, which the marks say, and it may be deleted: the store rebuilds it.
//!
//! What stands in it is decided here, where it stands is behind [`Database`]: RocksDB, or a simulated twin in tests of
//! power losses.

mod database;
mod reclaimed;
mod rocks;
#[cfg(any(test, feature = "fault-injection"))]
mod twin;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use self::database::{Batch, Database, Durability, Family};
use self::reclaimed::Generations;
use self::rocks::Rocks;
#[cfg(any(test, feature = "fault-injection"))]
pub(crate) use self::twin::{TwinEvents, TwinIndex};
use super::row::{IndexRow, NamespaceEnd, NamespaceRow, RegionMark, decode_id, encode_id};
use crate::block::RecordId;
use crate::error::{Error, ErrorKind, Result};

/// The longest name of a named value, in bytes.
const META_NAME_BYTES_MAX: usize = 256;
/// The largest named value, in bytes.
const META_VALUE_BYTES_MAX: usize = 1 << 20;

/// Ends of namespaces that are read together.
const ENDS_AT_ONCE: usize = 64;

/// One change of the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IndexChange {
    /// Says where a record lies, instead of what was said before. Changes are applied in their order.
    Put(IndexRow),
    /// Forgets a record, unless its row is newer than `sequence`.
    Remove {
        /// Which record.
        id: RecordId,
        /// The sequence of the removal: rows with a larger one stay.
        sequence: u64,
    },
}

/// The durable log of the index. Shared by reference; reading is possible from any thread, [`IndexLog::commit`] is meant
/// for one thread at a time.
pub struct IndexLog {
    database: Arc<dyn Database>,
    generations: Generations,
}

impl IndexLog {
    /// Opens the log in the directory `path`, and creates it if that does not exist or is empty. After a power loss the
    /// newest commits may be missing; what is there is the state after one of the commits.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged, incomplete or not of this engine: wipe the directory and rebuild the index from the
    /// regions. `Locked` if it is open elsewhere, `NewerFormat` if a newer version wrote it; `PermissionDenied`,
    /// `NoSpace` or `Io` if the file system fails.
    pub fn open(path: &Path) -> Result<Self> {
        let generations = Generations::default();
        let database = Rocks::open(path, &generations)?;
        Self::over(Arc::new(database), generations)
    }

    /// Opens the log to be read only: nothing on the drive changes. It must not be open elsewhere.
    ///
    /// # Errors
    /// As [`IndexLog::open`].
    pub fn open_read_only(path: &Path) -> Result<Self> {
        let generations = Generations::default();
        let database = Rocks::open_read_only(path, &generations)?;
        Self::over(Arc::new(database), generations)
    }

    fn over(database: Arc<dyn Database>, generations: Generations) -> Result<Self> {
        let log = Self { database, generations };
        for mark in log.marks()? {
            log.generations.raise(mark.region, mark.generation);
        }
        Ok(log)
    }

    /// Applies all changes and marks or none. They survive the end of the process; they survive a power loss only after
    /// [`IndexLog::sync`]. A mark with a larger generation ends all rows of its region with a smaller one: they are no
    /// longer returned, and are dropped from disk in time.
    ///
    /// # Errors
    /// `InvalidInput` for a location outside its limits, `NoSpace`, `Corrupt` or `Io`; then nothing was applied.
    pub fn commit(&self, changes: &[IndexChange], marks: &[RegionMark]) -> Result<()> {
        let mut batch = Batch::default();
        let has_removals = changes.iter().any(|change| matches!(change, IndexChange::Remove { .. }));
        // The sequence of the rows of this batch, which RocksDB does not show yet; `None` for removed ones.
        let mut pending: HashMap<RecordId, Option<u64>> = HashMap::new();
        for change in changes {
            let (id, left) = match change {
                IndexChange::Put(row) => {
                    check_location(row)?;
                    batch.put(Family::Records, &encode_id(&row.id), &row.encode());
                    (row.id, Some(row.sequence))
                }
                IndexChange::Remove { id, sequence } => {
                    let known = match pending.get(id) {
                        Some(known) => *known,
                        None => self.row(id)?.map(|row| row.sequence),
                    };
                    if known.is_none_or(|known| known > *sequence) {
                        continue;
                    }
                    batch.delete(Family::Records, &encode_id(id));
                    (*id, None)
                }
            };
            if has_removals {
                pending.insert(id, left);
            }
        }
        for mark in marks {
            // What is written must be readable: the same check as when it is read.
            RegionMark::decode(&mark.encode_key(), &mark.encode())
                .map_err(|error| Error::new(ErrorKind::InvalidInput, error.message()))?;
            batch.put(Family::Regions, &mark.encode_key(), &mark.encode());
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.database.write(batch, Durability::Process)?;
        for mark in marks {
            self.generations.raise(mark.region, mark.generation);
        }
        Ok(())
    }

    /// The row of a record, if there is one. Reads the drive: not for lookups.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn get(&self, id: &RecordId) -> Result<Option<IndexRow>> {
        Ok(self.row(id)?.filter(|row| self.generations.is_current(&row.location)))
    }

    /// Calls `each` with every row, in the order of their keys, and returns how many those were. Memory stays bounded.
    ///
    /// # Errors
    /// The first error of `each`; `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn scan(&self, each: &mut dyn FnMut(IndexRow) -> Result<()>) -> Result<u64> {
        let generations = self.generations.snapshot();
        let mut count = 0;
        self.database.for_each(Family::Records, &mut |key, value| {
            let row = IndexRow::decode(decode_id(key)?, value)?;
            if generations.is_current(&row.location) {
                each(row)?;
                count += 1;
            }
            Ok(())
        })?;
        Ok(count)
    }

    /// Calls `each` with the rows behind `after` (from the first on for `None`) in the order of their keys, after reading
    /// at most `limit`. Returns the last one read, to go on behind, or `None` if that were all. Each call sees what was
    /// committed before it began.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn scan_after(
        &self,
        after: Option<&RecordId>,
        limit: usize,
        each: &mut dyn FnMut(IndexRow),
    ) -> Result<Option<RecordId>> {
        let generations = self.generations.snapshot();
        let after_key = after.map(encode_id);
        let (mut last, mut count) = (None, 0);
        let after_key = after_key.as_ref().map(<[u8; _]>::as_slice);
        self.database.for_some(Family::Records, after_key, limit, &mut |key, value| {
            let id = decode_id(key)?;
            let row = IndexRow::decode(id, value)?;
            (last, count) = (Some(id), count + 1);
            if generations.is_current(&row.location) {
                each(row);
            }
            Ok(if count < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok(last.filter(|_| count == limit))
    }

    /// The rows of many records, in the order of `ids`, at once. Reads the drive: for lookups only while the table does
    /// not have everything.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn get_many(&self, ids: &[RecordId]) -> Result<Vec<Option<IndexRow>>> {
        let keys: Vec<_> = ids.iter().map(encode_id).collect();
        let keys: Vec<&[u8]> = keys.iter().map(<[u8; _]>::as_slice).collect();
        let found = self.database.get_many(Family::Records, &keys)?;
        let decode = |(id, found): (&RecordId, Option<Vec<u8>>)| {
            let row = found.map(|value| IndexRow::decode(*id, &value)).transpose()?;
            Ok(row.filter(|row| self.generations.is_current(&row.location)))
        };
        ids.iter().zip(found).map(decode).collect()
    }

    /// How many rows there are, about.
    pub fn rows_estimate(&self) -> u64 {
        self.database.rows_estimate(Family::Records)
    }

    /// How far each region is covered, in the order of their numbers.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn marks(&self) -> Result<Vec<RegionMark>> {
        let mut marks = Vec::new();
        self.database.for_each(Family::Regions, &mut |key, value| {
            marks.push(RegionMark::decode(key, value)?);
            Ok(())
        })?;
        Ok(marks)
    }

    /// All namespaces, in the order of their handles.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn namespaces(&self) -> Result<Vec<NamespaceRow>> {
        let mut namespaces = Vec::new();
        self.database.for_each(Family::Namespaces, &mut |key, value| {
            namespaces.push(NamespaceRow::decode(key, value)?);
            Ok(())
        })?;
        Ok(namespaces)
    }

    /// Keeps a namespace, instead of what its handle stood for. Durable when it returns, with all that was committed
    /// before.
    ///
    /// # Errors
    /// `InvalidInput` for a namespace outside the limits of [`NamespaceRow`]; `NoSpace` or `Io`.
    pub fn put_namespace(&self, row: &NamespaceRow) -> Result<()> {
        self.put_durably(Family::Namespaces, &row.encode_key(), &row.encode()?)
    }

    /// Notes the end of a namespace, and forgets what its handle stood for. Durable when it returns, with all that was
    /// committed before.
    ///
    /// # Errors
    /// `NoSpace` or `Io`.
    pub fn put_end(&self, end: &NamespaceEnd) -> Result<()> {
        let mut batch = Batch::default();
        batch.put(Family::Meta, &end.encode_key(), &end.encode());
        batch.delete(Family::Namespaces, &end.handle.0.to_be_bytes());
        self.database.write(batch, Durability::Medium)
    }

    /// The ends of all namespaces that were purged, in no particular order.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for one that cannot be read, `Io`.
    pub fn ends(&self) -> Result<Vec<NamespaceEnd>> {
        let mut ends = Vec::new();
        let first = Some(NamespaceEnd::NAMES);
        self.database.for_some(Family::Meta, first, ENDS_AT_ONCE, &mut |key, value| {
            if !key.starts_with(NamespaceEnd::NAMES) {
                return Ok(ControlFlow::Break(()));
            }
            ends.push(NamespaceEnd::decode(key, value)?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(ends)
    }

    /// The value kept under a name.
    ///
    /// # Errors
    /// `Corrupt` or `Io`.
    pub fn meta_get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.database.get(Family::Meta, name.as_bytes())
    }

    /// The number kept under a name; `None` also for a value that is none.
    ///
    /// # Errors
    /// As [`IndexLog::meta_get`].
    pub(crate) fn meta_number(&self, name: &str) -> Result<Option<u64>> {
        Ok(self.meta_get(name)?.and_then(|value| Some(u64::from_le_bytes(value.try_into().ok()?))))
    }

    /// Keeps a value under a name of at most 256 bytes; the value has at most 1 MiB. Durable when it returns.
    ///
    /// # Errors
    /// `InvalidInput` for a name or a value beyond its limit; `NoSpace` or `Io`.
    pub fn meta_put(&self, name: &str, value: &[u8]) -> Result<()> {
        let (name_bytes, value_bytes) = (name.len(), value.len());
        if name_bytes > META_NAME_BYTES_MAX || value_bytes > META_VALUE_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "a named value of {name_bytes} and {value_bytes} bytes; the limits are {META_NAME_BYTES_MAX} for the \
                     name and {META_VALUE_BYTES_MAX} for the value"
                ),
            ));
        }
        self.put_durably(Family::Meta, name.as_bytes(), value)
    }

    /// Makes everything committed before durable, with one `fdatasync`.
    ///
    /// # Errors
    /// `NoSpace` or `Io`.
    pub fn sync(&self) -> Result<()> {
        self.database.sync()
    }

    /// Writes to table files what only the write-ahead log has, so that the next open has nothing to replay.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; nothing is lost then.
    pub fn flush(&self) -> Result<()> {
        self.database.flush()
    }

    /// Bytes of memory that RocksDB takes: rows that are not in table files yet, its cache, and what it knows of its files.
    pub fn memory_bytes(&self) -> u64 {
        self.database.memory_bytes()
    }

    /// Syncs, ends the work in the background and closes. A failure is logged only: the index is rebuilt from the regions
    /// as far as it is missing.
    pub fn close(self) {
        if let Err(error) = self.sync() {
            tracing::warn!(error = format!("{error:#}"), "the index was closed without a sync");
        }
        self.database.end();
    }

    /// The row as it stands, whether its region was reclaimed or not.
    fn row(&self, id: &RecordId) -> Result<Option<IndexRow>> {
        let found = self.database.get(Family::Records, &encode_id(id))?;
        found.map(|value| IndexRow::decode(*id, &value)).transpose()
    }

    fn put_durably(&self, family: Family, key: &[u8], value: &[u8]) -> Result<()> {
        let mut batch = Batch::default();
        batch.put(family, key, value);
        self.database.write(batch, Durability::Medium)
    }
}

impl std::fmt::Debug for IndexLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IndexLog").finish_non_exhaustive()
    }
}

/// Writes a row that cannot be read in the place of a record's.
#[cfg(test)]
pub(crate) fn spoil_row(path: &Path, id: &RecordId) {
    let log = IndexLog::open(path).expect("opens");
    let mut batch = Batch::default();
    batch.put(Family::Records, &encode_id(id), &[0; 80]);
    log.database.write(batch, Durability::Process).expect("written");
    log.close();
}

/// What is written must be readable.
fn check_location(row: &IndexRow) -> Result<()> {
    if row.location.is_valid() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("the location of a record is outside its limits: {:?}", row.location),
    ))
}

#[cfg(test)]
mod tests;
