use super::*;
use crate::block::{BlockKey, GroupGeometry, NamespaceDescriptor, NamespaceHandle, RecordKind};
use crate::index::Location;
use rocksdb::properties::BLOCK_CACHE_USAGE;
use std::path::PathBuf;

fn id(number: u32) -> RecordId {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&number.to_be_bytes());
    RecordId { namespace: NamespaceHandle(number % 3), group: 1, shard: 2, key: BlockKey::from_bytes(key) }
}

fn row(number: u32, sequence: u64) -> IndexRow {
    IndexRow {
        id: id(number),
        parent: if number == 0 { BlockKey::ROOT } else { id(number - 1).key },
        depth: number,
        location: Location { region: number % 8, generation: 5, page: number, pages: 17 },
        payload_bytes: 65_000,
        sequence,
        kind: RecordKind::Kv,
    }
}

fn mark(region: u32, generation: u64, sequence: u64) -> RegionMark {
    RegionMark { region, generation, page: 99, sequence }
}

fn put(number: u32, sequence: u64) -> IndexChange {
    IndexChange::Put(row(number, sequence))
}

fn remove(number: u32, sequence: u64) -> IndexChange {
    IndexChange::Remove { id: id(number), sequence }
}

fn open(directory: &tempfile::TempDir) -> IndexLog {
    IndexLog::open(&directory.path().join("index")).expect("opens")
}

/// The log, and the database below it.
fn open_with_database(directory: &tempfile::TempDir) -> (IndexLog, Arc<Rocks>) {
    let generations = Generations::default();
    let database = Arc::new(Rocks::open(&directory.path().join("index"), &generations).expect("opens"));
    (IndexLog::over(Arc::<Rocks>::clone(&database), generations).expect("opens"), database)
}

fn kind_of_open(path: &Path) -> Option<ErrorKind> {
    IndexLog::open(path).err().map(|error| error.kind())
}

fn rows(log: &IndexLog) -> Vec<IndexRow> {
    let mut rows = Vec::new();
    let count = log.scan(&mut |row| {
        rows.push(row);
        Ok(())
    });
    assert_eq!(count.expect("scans"), rows.len() as u64);
    rows
}

/// The files of the log whose names end so, in the order of their numbers.
fn files(directory: &tempfile::TempDir, ending: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(directory.path().join("index"))
        .expect("a directory")
        .map(|file| file.expect("a file").path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(ending)))
        .collect();
    found.sort();
    found
}

#[test]
fn what_was_committed_is_read_again_also_after_reopening() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    let changes: Vec<_> = (0..100).map(|number| put(number, u64::from(number))).collect();
    log.commit(&changes, &[mark(3, 5, 99), mark(1, 5, 98)]).expect("commits");
    log.commit(&[], &[mark(3, 5, 120)]).expect("commits");
    log.commit(&[], &[]).expect("nothing to do");
    let check = |log: &IndexLog| {
        assert_eq!(log.get(&id(42)).expect("reads"), Some(row(42, 42)));
        assert_eq!(log.get(&id(100)).expect("reads"), None);
        assert_eq!(log.marks().expect("reads"), [mark(1, 5, 98), mark(3, 5, 120)]);
        let mut expected: Vec<IndexRow> = (0..100).map(|number| row(number, u64::from(number))).collect();
        expected.sort_by_key(|row| row.id);
        assert_eq!(rows(log), expected);
    };
    check(&log);
    log.close();
    let log = open(&directory);
    check(&log);
    // Without a close: as after a crash of the process.
    log.commit(&[put(200, 200)], &[]).expect("commits");
    drop(log);
    assert_eq!(open(&directory).get(&id(200)).expect("reads"), Some(row(200, 200)));
}

#[test]
fn a_removal_spares_newer_rows() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    log.commit(&[put(1, 10), put(2, 10), put(3, 10)], &[]).expect("commits");
    log.commit(&[remove(1, 9), remove(2, 10), remove(3, 11), remove(4, 1)], &[]).expect("commits");
    assert_eq!(rows(&log), [row(1, 10)]);
    // The same inside one batch, where RocksDB does not show the rows yet.
    log.commit(&[put(5, 20), remove(5, 19), put(6, 20), remove(6, 21), remove(6, 30), put(7, 20)], &[])
        .expect("commits");
    log.commit(&[remove(7, 21), put(7, 22), remove(1, 10), remove(1, 10)], &[]).expect("commits");
    let left: Vec<(RecordId, u64)> = rows(&log).into_iter().map(|row| (row.id, row.sequence)).collect();
    let mut expected = [(id(5), 20), (id(7), 22)];
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn a_scan_ends_with_the_first_error_of_its_caller() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    log.commit(&[put(1, 1), put(2, 2), put(4, 3)], &[]).expect("commits");
    let mut seen = 0;
    let result = log.scan(&mut |_| {
        seen += 1;
        if seen == 2 { Err(Error::new(ErrorKind::Cancelled, "enough")) } else { Ok(()) }
    });
    assert_eq!((seen, result.err().map(|error| error.kind())), (2, Some(ErrorKind::Cancelled)));
}

#[test]
fn rows_of_a_reclaimed_region_are_gone_at_once_and_from_disk_in_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    let changes: Vec<_> = (0..80).map(|number| put(number, 1)).collect();
    log.commit(&changes, &[]).expect("commits");
    log.commit(&[], &[mark(2, 6, 2)]).expect("commits");
    let is_left = |log: &IndexLog| {
        assert_eq!(log.get(&id(2)).expect("reads"), None);
        assert_eq!(log.get(&id(3)).expect("reads"), Some(row(3, 1)));
        let rows = rows(log);
        assert_eq!(rows.len(), 70);
        assert!(rows.iter().all(|row| row.location.region != 2));
    };
    let on_disk = |log: &IndexLog| {
        let mut count = 0;
        log.database
            .for_each(Family::Records, &mut |_, _| {
                count += 1;
                Ok(())
            })
            .expect("walks");
        count
    };
    is_left(&log);
    assert_eq!(on_disk(&log), 80);
    log.close();
    let (log, database) = open_with_database(&directory);
    is_left(&log);
    database.flush().expect("flushes");
    database.compact(Family::Records);
    is_left(&log);
    assert_eq!(on_disk(&log), 70);
    // The region's new life is not affected, and a mark of the past changes nothing.
    let reborn = IndexRow { location: Location { generation: 6, ..row(2, 3).location }, ..row(2, 3) };
    log.commit(&[IndexChange::Put(reborn.clone())], &[mark(2, 6, 3)]).expect("commits");
    assert_eq!(log.get(&id(2)).expect("reads"), Some(reborn));
}

#[test]
fn namespaces_and_named_values_are_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    let namespace = |handle: u32| {
        let descriptor = NamespaceDescriptor::new().with("model", format!("m{handle}"));
        let groups = vec![GroupGeometry { group: 0, block_bytes: 4096, shards: 2 }];
        NamespaceRow { handle: NamespaceHandle(handle), id: descriptor.id(), descriptor, groups }
    };
    assert_eq!(log.namespaces().expect("reads"), []);
    for handle in [300, 1, 2] {
        log.put_namespace(&namespace(handle)).expect("writes");
    }
    log.meta_put("clean", b"yes").expect("writes");
    log.meta_put("clean", b"no").expect("writes");
    drop(log);
    let log = open(&directory);
    assert_eq!(log.namespaces().expect("reads"), [namespace(1), namespace(2), namespace(300)]);
    assert_eq!(log.meta_get("clean").expect("reads").as_deref(), Some(b"no".as_slice()));
    assert_eq!(log.meta_get("other").expect("reads"), None);
}

#[test]
fn what_could_not_be_read_back_is_refused_as_a_whole() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    let kind = |result: Result<()>| result.err().map(|error| error.kind());
    let outside = IndexRow { location: Location { region: Location::REGIONS_MAX, ..row(1, 1).location }, ..row(1, 1) };
    let refused = log.commit(&[put(2, 2), IndexChange::Put(outside)], &[]);
    assert_eq!(kind(refused), Some(ErrorKind::InvalidInput));
    let refused = log.commit(&[put(2, 2)], &[mark(Location::REGIONS_MAX, 1, 1)]);
    assert_eq!(kind(refused), Some(ErrorKind::InvalidInput));
    assert_eq!(rows(&log), []);
    assert_eq!(log.marks().expect("reads"), []);
    let long = "n".repeat(META_NAME_BYTES_MAX + 1);
    assert_eq!(kind(log.meta_put(&long, b"")), Some(ErrorKind::InvalidInput));
    assert_eq!(kind(log.meta_put("n", &vec![0; META_VALUE_BYTES_MAX + 1])), Some(ErrorKind::InvalidInput));
}

#[test]
fn a_second_open_is_refused_as_locked() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    assert_eq!(kind_of_open(&directory.path().join("index")), Some(ErrorKind::Locked));
    drop(log);
    open(&directory);
}

#[test]
fn a_wiped_directory_is_an_empty_log() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    log.commit(&[put(1, 1)], &[mark(1, 1, 1)]).expect("commits");
    log.close();
    std::fs::remove_dir_all(directory.path().join("index")).expect("removed");
    let log = open(&directory);
    assert_eq!(rows(&log), []);
    assert_eq!(log.marks().expect("reads"), []);
    log.close();
    std::fs::remove_dir_all(directory.path().join("index")).expect("removed");
    std::fs::create_dir(directory.path().join("index")).expect("created");
    assert_eq!(rows(&open(&directory)), []);
}

/// So many that the write-ahead log has several of its 32 KiB blocks: recovery could go on behind a damaged one.
const COMMITS: u64 = 400;

/// Writes commits of three rows and a mark each, damages the write-ahead log, and expects the state after one of the
/// commits. Returns after which.
fn commits_left_after(damage: impl FnOnce(&mut Vec<u8>)) -> u64 {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    for sequence in 1..=COMMITS {
        let first = sequence as u32 * 3;
        let changes: Vec<_> = (first..first + 3).map(|number| put(number, sequence)).collect();
        log.commit(&changes, &[mark(0, 5, sequence)]).expect("commits");
    }
    drop(log);
    let wal = files(&directory, ".log").pop().expect("a write-ahead log");
    let mut bytes = std::fs::read(&wal).expect("readable");
    damage(&mut bytes);
    std::fs::write(&wal, bytes).expect("writable");

    let log = open(&directory);
    let left = log.marks().expect("reads").first().map_or(0, |mark| mark.sequence);
    let mut expected: Vec<IndexRow> =
        (3..(left as u32 + 1) * 3).map(|number| row(number, u64::from(number / 3))).collect();
    expected.sort_by_key(|row| row.id);
    assert_eq!(rows(&log), expected);
    // And it goes on from there.
    log.commit(&[put(7000, 7000)], &[]).expect("commits");
    drop(log);
    assert_eq!(rows(&open(&directory)).len(), expected.len() + 1);
    left
}

#[test]
fn a_log_that_lost_its_tail_opens_with_a_prefix_of_the_commits() {
    assert_eq!(commits_left_after(|_| ()), COMMITS);
    assert_eq!(commits_left_after(|bytes| bytes.truncate(bytes.len() - 1)), COMMITS - 1);
    let half = commits_left_after(|bytes| bytes.truncate(bytes.len() / 2));
    assert!((150..250).contains(&half), "{half}");
    assert_eq!(commits_left_after(|bytes| bytes.resize(bytes.len() + 5000, 0)), COMMITS);
}

#[test]
fn a_log_with_a_damaged_entry_opens_with_the_commits_before_it() {
    let flipped = commits_left_after(|bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
    });
    assert!((100..250).contains(&flipped), "{flipped}");
    let zeroed = commits_left_after(|bytes| {
        let tail = bytes.len() / 4 * 3;
        bytes[tail..].fill(0);
    });
    assert!((200..350).contains(&zeroed), "{zeroed}");
}

/// Opens after damage to the files of a good log with rows in tables, and says what the error was.
fn kind_after(damage: impl FnOnce(&tempfile::TempDir)) -> Option<ErrorKind> {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, database) = open_with_database(&directory);
    let changes: Vec<_> = (0..2000).map(|number| put(number, 1)).collect();
    log.commit(&changes, &[mark(1, 5, 1)]).expect("commits");
    database.flush().expect("flushes");
    drop(database);
    log.close();
    damage(&directory);
    let opened = IndexLog::open(&directory.path().join("index"));
    opened.and_then(|log| log.scan(&mut |_| Ok(()))).err().map(|error| error.kind())
}

#[test]
fn damage_is_told_so_that_the_caller_can_rebuild() {
    let overwrite = |path: &PathBuf, bytes: &[u8]| std::fs::write(path, bytes).expect("writable");
    assert_eq!(kind_after(|_| ()), None);
    let corrupt = Some(ErrorKind::Corrupt);
    assert_eq!(kind_after(|d| overwrite(&files(d, "CURRENT")[0], b"nonsense")), corrupt);
    assert_eq!(kind_after(|d| overwrite(&files(d, "CURRENT")[0], b"MANIFEST-999999\n")), corrupt);
    assert_eq!(kind_after(|d| overwrite(&files(d, "CURRENT")[0], b"")), corrupt);
    assert_eq!(kind_after(|d| std::fs::remove_file(&files(d, "CURRENT")[0]).expect("removed")), corrupt);
    let manifest = |d: &tempfile::TempDir| {
        let name = std::fs::read_to_string(&files(d, "CURRENT")[0]).expect("readable");
        d.path().join("index").join(name.trim())
    };
    assert_eq!(kind_after(|d| overwrite(&manifest(d), b"nonsense")), corrupt);
    assert_eq!(kind_after(|d| overwrite(&manifest(d), b"")), corrupt);
    assert_eq!(kind_after(|d| std::fs::remove_file(manifest(d)).expect("removed")), corrupt);
    let flip = |path: &PathBuf| {
        let mut bytes = std::fs::read(path).expect("readable");
        let third = bytes.len() / 3;
        bytes[third] ^= 1;
        overwrite(path, &bytes);
    };
    assert_eq!(kind_after(|d| flip(&manifest(d))), corrupt);
    assert_eq!(kind_after(|d| files(d, ".sst").iter().for_each(flip)), corrupt);
    assert_eq!(
        kind_after(|d| files(d, ".sst").iter().for_each(|f| std::fs::remove_file(f).expect("removed"))),
        corrupt
    );
}

#[test]
fn a_database_of_somebody_else_is_not_opened() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("index");
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    drop(rocksdb::DB::open(&options, &path).expect("created"));
    assert_eq!(kind_of_open(&path), Some(ErrorKind::Corrupt));

    let log = Rocks::open(&directory.path().join("ours"), &Generations::default()).expect("opens");
    log.raw().delete(b"format").expect("deletes");
    drop(log);
    assert_eq!(kind_of_open(&directory.path().join("ours")), Some(ErrorKind::Corrupt));

    let log = Rocks::open(&directory.path().join("newer"), &Generations::default()).expect("opens");
    log.raw().put(b"format", 2u32.to_le_bytes()).expect("puts");
    drop(log);
    assert_eq!(kind_of_open(&directory.path().join("newer")), Some(ErrorKind::NewerFormat));

    let mut log = Rocks::open(&directory.path().join("more"), &Generations::default()).expect("opens");
    log.raw_mut().create_cf("surprise", &rocksdb::Options::default()).expect("creates");
    drop(log);
    assert_eq!(kind_of_open(&directory.path().join("more")), Some(ErrorKind::Corrupt));

    let file = directory.path().join("file");
    std::fs::write(&file, b"").expect("writable");
    assert_eq!(kind_of_open(&file), Some(ErrorKind::Io));
}

#[test]
fn rows_of_another_version_are_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    let with_version = |version: u8| {
        let mut value = row(1, 1).encode();
        value[0] = version;
        let mut batch = Batch::default();
        batch.put(Family::Records, &encode_id(&id(1)), &value);
        log.database.write(batch, Durability::Process).expect("puts");
        let read = log.get(&id(1)).err().map(|error| error.kind());
        assert_eq!(log.scan(&mut |_| Ok(())).err().map(|error| error.kind()), read);
        read
    };
    assert_eq!(with_version(1), None);
    assert_eq!(with_version(2), Some(ErrorKind::NewerFormat));
    assert_eq!(with_version(0), Some(ErrorKind::Corrupt));
}

/// Of rows that are in table files after an open too, which are the most.
#[test]
fn rows_and_memory_are_estimated() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    assert_eq!(log.rows_estimate(), 0);
    let changes: Vec<_> = (0..100).map(|number| put(number, u64::from(number))).collect();
    log.commit(&changes, &[]).expect("commits");
    log.flush().expect("flushed");
    log.close();
    let log = open(&directory);
    log.commit(&[put(200, 200)], &[]).expect("commits");
    assert_eq!(log.rows_estimate(), 101);
    assert!((1..128 << 20).contains(&log.memory_bytes()), "{}", log.memory_bytes());
}

/// Else it fills up for hours with blocks of tables that compactions have replaced.
#[test]
fn single_reads_leave_nothing_in_the_cache() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, database) = open_with_database(&directory);
    let cached = || {
        let usage = database.raw().property_int_value_cf(database.family(Family::Records), BLOCK_CACHE_USAGE);
        usage.expect("a property").expect("a number")
    };
    let count = 10_000;
    let changes: Vec<_> = (0..count).map(|number| put(number, u64::from(number))).collect();
    log.commit(&changes, &[]).expect("commits");
    log.flush().expect("flushes");
    let before = cached();
    for number in (0..count).step_by(10) {
        assert_eq!(log.get(&id(number)).expect("reads"), Some(row(number, u64::from(number))));
    }
    assert_eq!(cached(), before);
    let ids: Vec<_> = (0..count).map(id).collect();
    assert_eq!(log.get_many(&ids).expect("reads").len(), ids.len());
    assert!(cached() > before, "blocks of tables are cached at all");
}

#[test]
fn a_scan_in_steps_sees_every_row_once_and_many_are_read_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let log = open(&directory);
    let changes: Vec<_> = (0..100).map(|number| put(number, u64::from(number))).collect();
    log.commit(&changes, &[]).expect("commits");
    for limit in [1, 7, 99, 100, 101] {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            after = log.scan_after(after.as_ref(), limit, &mut |row| seen.push(row)).expect("scans");
            if after.is_none() {
                break;
            }
        }
        assert_eq!(seen, rows(&log), "{limit} at once");
    }
    // The row that it goes on behind may be gone, and rows of an earlier life of their region are passed over.
    log.commit(&[remove(50, 50)], &[mark(1, 6, 300)]).expect("commits");
    let mut seen = Vec::new();
    log.scan_after(Some(&id(50)), 1000, &mut |row| seen.push(row)).expect("scans");
    let expected: Vec<IndexRow> = rows(&log).into_iter().filter(|row| row.id > id(50)).collect();
    assert_eq!(seen, expected);
    let asked = [id(1), id(49), id(50), id(2), id(1000)];
    let found: Vec<bool> = log.get_many(&asked).expect("reads").iter().map(Option::is_some).collect();
    let one_by_one: Vec<bool> = asked.iter().map(|id| log.get(id).expect("reads").is_some()).collect();
    assert_eq!(found, one_by_one);
    assert_eq!(log.get_many(&[id(2)]).expect("reads"), [log.get(&id(2)).expect("reads")]);
}
