//! The durable log of the index: one RocksDB at `<store>/index`. Owns what must outlive the process: a row for every
//! record, how far each region is covered, the namespaces, small named values. Written in batches after the records
//! themselves are durable; read when the store opens. Never on the path of a lookup. It may lag behind the regions after
//! a power loss, which the marks say, and it may be deleted: the store rebuilds it.

mod database;
mod reclaimed;

use std::collections::HashMap;
use std::path::Path;

use rocksdb::properties::{
    BLOCK_CACHE_USAGE, ESTIMATE_NUM_KEYS, ESTIMATE_TABLE_READERS_MEM, PropName, SIZE_ALL_MEM_TABLES,
};
use rocksdb::{DB, FlushOptions, ReadOptions, WriteBatch, WriteOptions};

use self::database::{Family, rocks};
use self::reclaimed::Generations;
use super::row::{IndexRow, NamespaceRow, RegionMark, decode_id, encode_id};
use crate::block::RecordId;
use crate::error::{Error, ErrorKind, Result};

/// Read ahead during a scan of all rows.
const SCAN_READAHEAD_BYTES: usize = 4 << 20;
/// What a row takes in the files of the log, about: for how much a scan of some rows reads ahead.
const ROW_BYTES: usize = 128;
/// The longest name of a named value, in bytes.
const META_NAME_BYTES_MAX: usize = 256;
/// The largest named value, in bytes.
const META_VALUE_BYTES_MAX: usize = 1 << 20;

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
    database: DB,
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
        let database = database::open(path, &generations)?;
        let log = Self { database, generations };
        for mark in log.marks()? {
            log.generations.raise(mark.region, mark.generation);
        }
        Ok(log)
    }

    /// Opens the log to be read only: nothing on the drive changes. It must not be open elsewhere.
    ///
    /// # Errors
    /// As [`IndexLog::open`].
    pub fn open_read_only(path: &Path) -> Result<Self> {
        let generations = Generations::default();
        let database = database::open_read_only(path, &generations)?;
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
        let mut batch = WriteBatch::default();
        let records = self.family(Family::Records);
        let has_removals = changes.iter().any(|change| matches!(change, IndexChange::Remove { .. }));
        // The sequence of the rows of this batch, which RocksDB does not show yet; `None` for removed ones.
        let mut pending: HashMap<RecordId, Option<u64>> = HashMap::new();
        for change in changes {
            let (id, left) = match change {
                IndexChange::Put(row) => {
                    check_location(row)?;
                    batch.put_cf(records, encode_id(&row.id), row.encode());
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
                    batch.delete_cf(records, encode_id(id));
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
            batch.put_cf(self.family(Family::Regions), mark.encode_key(), mark.encode());
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.database.write_opt(batch, &WriteOptions::default()).map_err(rocks("committing to the index"))?;
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
        self.for_each(Family::Records, |key, value| {
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
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(limit.saturating_mul(ROW_BYTES).min(SCAN_READAHEAD_BYTES));
        let mut rows = self.database.raw_iterator_cf_opt(self.family(Family::Records), options);
        match after {
            None => rows.seek_to_first(),
            Some(id) => {
                rows.seek(encode_id(id));
                if rows.key() == Some(encode_id(id).as_slice()) {
                    rows.next();
                }
            }
        }
        let mut last = None;
        for _ in 0..limit {
            let Some((key, value)) = rows.item() else {
                rows.status().map_err(rocks("scanning the index"))?;
                return Ok(None);
            };
            let id = decode_id(key)?;
            let row = IndexRow::decode(id, value)?;
            last = Some(id);
            if generations.is_current(&row.location) {
                each(row);
            }
            rows.next();
        }
        Ok(last)
    }

    /// The rows of many records, in the order of `ids`, at once. Reads the drive: for lookups only while the table does
    /// not have everything.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn get_many(&self, ids: &[RecordId]) -> Result<Vec<Option<IndexRow>>> {
        let keys: Vec<_> = ids.iter().map(encode_id).collect();
        let found = self.database.batched_multi_get_cf(self.family(Family::Records), &keys, false);
        let decode = |(id, found): (&RecordId, std::result::Result<Option<rocksdb::DBPinnableSlice<'_>>, _>)| {
            let found = found.map_err(rocks("reading the index"))?;
            let row = found.map(|value| IndexRow::decode(*id, &value)).transpose()?;
            Ok(row.filter(|row| self.generations.is_current(&row.location)))
        };
        ids.iter().zip(found).map(decode).collect()
    }

    /// How many rows there are, about.
    pub fn rows_estimate(&self) -> u64 {
        let estimate = self.database.property_int_value_cf(self.family(Family::Records), ESTIMATE_NUM_KEYS);
        estimate.ok().flatten().unwrap_or(0)
    }

    /// How far each region is covered, in the order of their numbers.
    ///
    /// # Errors
    /// `Corrupt` or `NewerFormat` for a row that cannot be read, `Io`.
    pub fn marks(&self) -> Result<Vec<RegionMark>> {
        let mut marks = Vec::new();
        self.for_each(Family::Regions, |key, value| {
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
        self.for_each(Family::Namespaces, |key, value| {
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

    /// The value kept under a name.
    ///
    /// # Errors
    /// `Corrupt` or `Io`.
    pub fn meta_get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let found = self.database.get_pinned_cf(self.family(Family::Meta), name);
        Ok(found.map_err(rocks("reading the index"))?.map(|value| value.to_vec()))
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
        self.database.flush_wal(true).map_err(rocks("syncing the index"))
    }

    /// Writes to table files what only the write-ahead log has, so that the next open has nothing to replay.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; nothing is lost then.
    pub fn flush(&self) -> Result<()> {
        let families = database::handles(&self.database);
        self.database.flush_cfs_opt(&families, &FlushOptions::default()).map_err(rocks("flushing the index"))
    }

    /// Bytes of memory that RocksDB takes: rows that are not in table files yet, its cache, and what it knows of its files.
    pub fn memory_bytes(&self) -> u64 {
        let of_all = |name: &'static PropName| {
            let families = database::handles(&self.database).into_iter();
            let values = families.map(|family| self.database.property_int_value_cf(family, name).ok().flatten());
            values.map(Option::unwrap_or_default).sum::<u64>()
        };
        // The families share one cache.
        let records = self.family(Family::Records);
        let cache = self.database.property_int_value_cf(records, BLOCK_CACHE_USAGE).ok().flatten();
        of_all(SIZE_ALL_MEM_TABLES) + of_all(ESTIMATE_TABLE_READERS_MEM) + cache.unwrap_or_default()
    }

    /// Syncs, ends the work in the background and closes. A failure is logged only: the index is rebuilt from the regions
    /// as far as it is missing.
    pub fn close(self) {
        if let Err(error) = self.sync() {
            tracing::warn!(error = format!("{error:#}"), "the index was closed without a sync");
        }
        self.database.cancel_all_background_work(true);
    }

    /// The row as it stands, whether its region was reclaimed or not.
    fn row(&self, id: &RecordId) -> Result<Option<IndexRow>> {
        let found = self.database.get_pinned_cf(self.family(Family::Records), encode_id(id));
        let found = found.map_err(rocks("reading the index"))?;
        found.map(|value| IndexRow::decode(*id, &value)).transpose()
    }

    fn put_durably(&self, family: Family, key: &[u8], value: &[u8]) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.database.put_cf_opt(self.family(family), key, value, &options).map_err(rocks("writing to the index"))
    }

    /// Walks over a family in the order of its keys.
    fn for_each(&self, family: Family, mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(SCAN_READAHEAD_BYTES);
        let mut rows = self.database.raw_iterator_cf_opt(self.family(family), options);
        rows.seek_to_first();
        while let Some((key, value)) = rows.item() {
            each(key, value)?;
            rows.next();
        }
        rows.status().map_err(rocks("scanning the index"))
    }

    fn family(&self, family: Family) -> &rocksdb::ColumnFamily {
        database::handle(&self.database, family)
    }
}

impl std::fmt::Debug for IndexLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IndexLog").field("path", &self.database.path()).finish_non_exhaustive()
    }
}

/// Writes a row that cannot be read in the place of a record's.
#[cfg(test)]
pub(crate) fn spoil_row(path: &Path, id: &RecordId) {
    let log = IndexLog::open(path).expect("opens");
    log.database.put_cf(log.family(Family::Records), encode_id(id), [0; 80]).expect("written");
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
