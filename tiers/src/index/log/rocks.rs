//! RocksDB itself, behind [`Database`]: its files and families, its settings, what its errors mean to us. Everything that must change with a
//! new version of RocksDB stands here.

use std::path::Path;

use rocksdb::properties::{
    BLOCK_CACHE_USAGE, ESTIMATE_NUM_KEYS, ESTIMATE_TABLE_READERS_MEM, PropName, SIZE_ALL_MEM_TABLES,
};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRawIterator,
    DBRecoveryMode, DataBlockIndexType, Env, FlushOptions, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::database::{Batch, Database, Durability, EachRow, EachUntil, Family};
use super::reclaimed::{Generations, ReclaimedFilterFactory};
use crate::error::{Error, ErrorKind, Result};

/// Blocks of tables that lookups have read. They come here only while the table in memory is filled; nothing else fills
/// this.
const CACHE_BYTES: usize = 64 << 20;
const BLOCK_BYTES: usize = 8 << 10;
const BLOOM_BITS_PER_KEY: f64 = 10.0;
/// The memtables of the family of records: so many of these at most. One holds 50,000 rows, which are flushed in a tenth
/// of a second: no commit waits for a flush unless hundreds of thousands of records become durable in a second.
const RECORDS_BUFFER_BYTES: usize = 8 << 20;
const RECORDS_BUFFERS: i32 = 4;
/// All memtables together.
const BUFFER_BYTES_MAX: usize = 40 << 20;
/// The other families hold a row for each region or namespace.
const SMALL_BUFFER_BYTES: usize = 1 << 20;
/// All write-ahead logs together, about. An open replays them, 2 to 3 microseconds a row: 8 MiB are 55,000 rows.
const WAL_BYTES_MAX: u64 = 8 << 20;
const TABLE_FILE_BYTES: u64 = 64 << 20;
const MANIFEST_BYTES_MAX: usize = 16 << 20;
const INFO_LOG_BYTES_MAX: usize = 4 << 20;
const INFO_LOGS: usize = 4;
/// File descriptors for table files.
const OPEN_FILES: i32 = 512;
/// Tables that wait for a compaction before commits are slowed down, and stopped: 2.5 and 5 million rows.
const L0_FILES_SLOW: i32 = 48;
const L0_FILES_STOP: i32 = 96;
/// Flushes and compactions at once, in all.
const BACKGROUND_JOBS: i32 = 2;
/// Written back to the drive as it comes, so that no sync has to wait for more.
const BYTES_PER_SYNC: u64 = 1 << 20;

/// Read ahead during a scan of all rows.
const SCAN_READAHEAD_BYTES: usize = 4 << 20;
/// What a row takes in the files of the log, about: for how much a scan of some rows reads ahead.
const ROW_BYTES: usize = 128;

/// The version of the families and of what stands in them; rows have a version of their own.
const FORMAT_VERSION: u32 = 1;
/// Where the version stands, in the default family, which holds nothing else.
const FORMAT_KEY: &[u8] = b"format";
/// The file that names the current manifest: with it, a database exists.
const CURRENT_FILE: &str = "CURRENT";

/// An open database.
pub(super) struct Rocks(DB);

impl Rocks {
    /// Opens the database at `path`; creates it if there is nothing.
    pub(super) fn open(path: &Path, generations: &Generations) -> Result<Self> {
        open(path, generations).map(Self)
    }

    /// Opens the database at `path` so that nothing in it changes.
    pub(super) fn open_read_only(path: &Path, generations: &Generations) -> Result<Self> {
        open_read_only(path, generations).map(Self)
    }

    #[cfg(test)]
    pub(super) fn raw(&self) -> &DB {
        &self.0
    }

    #[cfg(test)]
    pub(super) fn raw_mut(&mut self) -> &mut DB {
        &mut self.0
    }

    #[cfg(test)]
    pub(super) fn compact(&self, family: Family) {
        self.0.compact_range_cf(self.family(family), None::<&[u8]>, None::<&[u8]>);
    }

    fn families(&self) -> [&ColumnFamily; Family::ALL.len()] {
        Family::ALL.map(|family| self.family(family))
    }

    #[expect(clippy::expect_used, reason = "a database is opened with all families or not at all")]
    pub(super) fn family(&self, family: Family) -> &ColumnFamily {
        self.0.cf_handle(family.name()).expect("invariant: every family is open")
    }

    /// An iterator over a family that reads ahead.
    fn rows(&self, family: Family, readahead_bytes: usize) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(readahead_bytes);
        self.0.raw_iterator_cf_opt(self.family(family), options)
    }
}

impl Database for Rocks {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>> {
        // Compactions keep replacing the tables, and cached blocks of a table that is gone stay until the cache is full:
        // single reads, which are few and seldom ask for the same row twice, would fill it with those.
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        let found = self.0.get_pinned_cf_opt(self.family(family), key, &options);
        Ok(found.map_err(failed("reading the index"))?.map(|value| value.to_vec()))
    }

    fn get_many(&self, family: Family, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>> {
        let found = self.0.batched_multi_get_cf(self.family(family), keys, false);
        let copied = found.into_iter().map(|found| Ok(found?.map(|value| value.to_vec())));
        copied.collect::<std::result::Result<_, _>>().map_err(failed("reading the index"))
    }

    fn for_each(&self, family: Family, each: EachRow<'_>) -> Result<()> {
        let mut rows = self.rows(family, SCAN_READAHEAD_BYTES);
        rows.seek_to_first();
        while let Some((key, value)) = rows.item() {
            each(key, value)?;
            rows.next();
        }
        rows.status().map_err(failed("scanning the index"))
    }

    fn for_some(&self, family: Family, after: Option<&[u8]>, about: usize, each: EachUntil<'_>) -> Result<()> {
        let mut rows = self.rows(family, about.saturating_mul(ROW_BYTES).min(SCAN_READAHEAD_BYTES));
        match after {
            None => rows.seek_to_first(),
            Some(key) => {
                rows.seek(key);
                if rows.key() == Some(key) {
                    rows.next();
                }
            }
        }
        while let Some((key, value)) = rows.item() {
            if each(key, value)?.is_break() {
                return Ok(());
            }
            rows.next();
        }
        rows.status().map_err(failed("scanning the index"))
    }

    fn rows_estimate(&self, family: Family) -> u64 {
        self.0.property_int_value_cf(self.family(family), ESTIMATE_NUM_KEYS).ok().flatten().unwrap_or(0)
    }

    fn memory_bytes(&self) -> u64 {
        let of_all = |name: &'static PropName| {
            let values = self.families().into_iter().map(|family| self.0.property_int_value_cf(family, name).ok());
            values.map(|value| value.flatten().unwrap_or_default()).sum::<u64>()
        };
        // The families share one cache.
        let cache = self.0.property_int_value_cf(self.family(Family::Records), BLOCK_CACHE_USAGE).ok().flatten();
        of_all(SIZE_ALL_MEM_TABLES) + of_all(ESTIMATE_TABLE_READERS_MEM) + cache.unwrap_or_default()
    }

    fn write(&self, batch: Batch, durability: Durability) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(durability == Durability::Medium);
        let mut rows = WriteBatch::default();
        for (family, key, value) in batch.changes() {
            match value {
                Some(value) => rows.put_cf(self.family(family), key, value),
                None => rows.delete_cf(self.family(family), key),
            }
        }
        self.0.write_opt(rows, &options).map_err(failed("writing to the index"))
    }

    fn sync(&self) -> Result<()> {
        self.0.flush_wal(true).map_err(failed("syncing the index"))
    }

    fn flush(&self) -> Result<()> {
        self.0.flush_cfs_opt(&self.families(), &FlushOptions::default()).map_err(failed("flushing the index"))
    }

    fn end(&self) {
        self.0.cancel_all_background_work(true);
    }
}

/// Opens the database at `path`; creates it if there is nothing.
fn open(path: &Path, generations: &Generations) -> Result<DB> {
    let is_new = is_absent_or_empty(path)?;
    let options = database_options(is_new)?;
    if !is_new {
        check_families(path, &options)?;
    }
    let cache = Cache::new_lru_cache(CACHE_BYTES);
    let families = Family::ALL
        .map(|family| ColumnFamilyDescriptor::new(family.name(), family_options(family, &cache, generations)));
    let database = DB::open_cf_descriptors(&options, path, families)
        .map_err(|error| translate(error, Moment::Open, "opening the index"));
    let database = database.map_err(|error| error.with("path", path.display()))?;
    if is_new {
        write_format(&database)?
    } else {
        check_format(&database)?
    }
    Ok(database)
}

/// Opens the database at `path` so that nothing in it changes.
fn open_read_only(path: &Path, generations: &Generations) -> Result<DB> {
    if is_absent_or_empty(path)? {
        return Err(
            Error::new(ErrorKind::Corrupt, "the index is empty; it must be rebuilt").with("path", path.display())
        );
    }
    let options = database_options(false)?;
    check_families(path, &options)?;
    let cache = Cache::new_lru_cache(CACHE_BYTES);
    let families = Family::ALL
        .map(|family| ColumnFamilyDescriptor::new(family.name(), family_options(family, &cache, generations)));
    let database = DB::open_cf_descriptors_read_only(&options, path, families, false)
        .map_err(|error| translate(error, Moment::Open, "opening the index").with("path", path.display()))?;
    check_format(&database)?;
    Ok(database)
}

fn is_absent_or_empty(path: &Path) -> Result<bool> {
    let is_empty = match std::fs::read_dir(path) {
        Ok(mut files) => files.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return Err(Error::from_io(format!("reading the directory {}", path.display()), error)),
    };
    if !is_empty && !path.join(CURRENT_FILE).exists() {
        // A creation that a crash cut short, or half a directory. RocksDB would start an empty database among the rest.
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("the index has no file {CURRENT_FILE}; it must be rebuilt"),
        )
        .with("path", path.display()));
    }
    Ok(is_empty)
}

/// A database with other families is not ours, or its creation was cut short.
fn check_families(path: &Path, options: &Options) -> Result<()> {
    let listed = DB::list_cf(options, path).map_err(|error| translate(error, Moment::Open, "opening the index"));
    let mut found = listed.map_err(|error| error.with("path", path.display()))?;
    found.sort_unstable();
    let mut expected: Vec<&str> = Family::ALL.map(Family::name).into();
    expected.push(rocksdb::DEFAULT_COLUMN_FAMILY_NAME);
    expected.sort_unstable();
    if found == expected {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!("the index has the families {}, not {}; it must be rebuilt", found.join(" "), expected.join(" ")),
    )
    .with("path", path.display()))
}

fn write_format(database: &DB) -> Result<()> {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    database.put_opt(FORMAT_KEY, FORMAT_VERSION.to_le_bytes(), &options).map_err(failed("creating the index"))
}

fn check_format(database: &DB) -> Result<()> {
    let found = database.get(FORMAT_KEY).map_err(failed("opening the index"))?;
    match found.as_deref().map(|bytes| bytes.try_into().map(u32::from_le_bytes)) {
        Some(Ok(FORMAT_VERSION)) => Ok(()),
        Some(Ok(version)) if version > FORMAT_VERSION => Err(Error::new(
            ErrorKind::NewerFormat,
            format!("the index has version {version}; this build reads version {FORMAT_VERSION}: update it"),
        )),
        _ => Err(Error::new(ErrorKind::Corrupt, "the index does not say its version; it must be rebuilt")),
    }
}

fn database_options(is_new: bool) -> Result<Options> {
    let mut options = Options::default();
    // Compactions take the processor only when nobody else wants it.
    let mut environment = Env::new().map_err(failed("opening the index"))?;
    environment.lower_thread_pool_cpu_priority();
    options.set_env(&environment);
    options.create_if_missing(is_new);
    options.create_missing_column_families(is_new);
    options.set_paranoid_checks(true);
    // Recovery goes up to the first damaged entry: the state after one of the commits, never a mixture.
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    options.set_db_write_buffer_size(BUFFER_BYTES_MAX);
    options.set_max_background_jobs(BACKGROUND_JOBS);
    options.set_max_open_files(OPEN_FILES);
    // It looks at 20 tables at most, and without that there is no estimate of how many rows there are.
    options.set_skip_stats_update_on_db_open(false);
    options.set_bytes_per_sync(BYTES_PER_SYNC);
    options.set_wal_bytes_per_sync(BYTES_PER_SYNC);
    options.set_max_manifest_file_size(MANIFEST_BYTES_MAX);
    options.set_keep_log_file_num(INFO_LOGS);
    options.set_max_log_file_size(INFO_LOG_BYTES_MAX);
    options.set_log_level(LogLevel::Warn);
    // An idle store does nothing: no statistics are dumped or kept.
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    Ok(options)
}

fn family_options(family: Family, cache: &Cache, generations: &Generations) -> Options {
    let mut tables = BlockBasedOptions::default();
    tables.set_block_cache(cache);
    tables.set_block_size(BLOCK_BYTES);
    tables.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    tables.set_whole_key_filtering(true);
    tables.set_data_block_index_type(DataBlockIndexType::BinaryAndHash);
    // Two bytes a record (20 MiB for ten million), kept with the open table and gone with it. In the cache, those of tables that compactions have
    // replaced would stay until it is full.
    tables.set_cache_index_and_filter_blocks(false);

    let mut options = Options::default();
    options.set_block_based_table_factory(&tables);
    // Keys are hashes and rows are short: nothing to compress.
    options.set_compression_type(DBCompressionType::None);
    options.set_target_file_size_base(TABLE_FILE_BYTES);
    // Rather many small tables for a while than a commit that waits for a compaction.
    options.set_level_zero_slowdown_writes_trigger(L0_FILES_SLOW);
    options.set_level_zero_stop_writes_trigger(L0_FILES_STOP);
    if family == Family::Records {
        options.set_write_buffer_size(RECORDS_BUFFER_BYTES);
        options.set_max_write_buffer_number(RECORDS_BUFFERS);
        options.set_compaction_filter_factory(ReclaimedFilterFactory::new(generations.clone()));
    } else {
        options.set_write_buffer_size(SMALL_BUFFER_BYTES);
    }
    options
}

/// When an error came: while opening, what is missing or does not fit together is damage that a rebuild heals.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    Open,
    Running,
}

/// Translates the errors of a running database, for `map_err`.
fn failed(doing: &'static str) -> impl Fn(rocksdb::Error) -> Error {
    move |error| translate(error, Moment::Running, doing)
}

/// What an error of RocksDB means. Its C interface gives a kind and a text only, so the errors of the file system have to
/// be told by the texts of the C library that RocksDB appends.
fn translate(error: rocksdb::Error, moment: Moment, doing: &str) -> Error {
    let text = error.as_ref();
    let says = |part: &str| text.contains(part);
    let kind = match error.kind() {
        rocksdb::ErrorKind::IOError
            if says("/LOCK: ") && (says("No locks available") || says("temporarily unavailable")) =>
        {
            ErrorKind::Locked
        }
        rocksdb::ErrorKind::IOError if says("No space left on device") || says("Disk quota exceeded") => {
            ErrorKind::NoSpace
        }
        rocksdb::ErrorKind::IOError
            if says("Permission denied") || says("Operation not permitted") || says("Read-only file system") =>
        {
            ErrorKind::PermissionDenied
        }
        rocksdb::ErrorKind::IOError if moment == Moment::Open && says("No such file or directory") => {
            ErrorKind::Corrupt
        }
        rocksdb::ErrorKind::Corruption => ErrorKind::Corrupt,
        rocksdb::ErrorKind::InvalidArgument | rocksdb::ErrorKind::NotSupported if moment == Moment::Open => {
            ErrorKind::Corrupt
        }
        rocksdb::ErrorKind::ShutdownInProgress => ErrorKind::Closed,
        _ => ErrorKind::Io,
    };
    let remedy = match kind {
        ErrorKind::Locked => "; another process has it open: stop that one or use another directory",
        ErrorKind::NoSpace => "; free space on the file system of the store",
        ErrorKind::Corrupt => "; it must be rebuilt from the regions",
        _ => "",
    };
    Error::new(kind, format!("{doing}: {text}{remedy}"))
}
