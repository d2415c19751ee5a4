//! The check of a closed store: quiet about everything that is right, also after a crash, and exact about what is not.

use super::*;
use crate::index::{IndexChange, IndexLog};
use crate::nvme::page::PAGE_BYTES;
use crate::nvme::superblock::Superblock;

fn paths(place: &Place) -> StorePaths {
    let more_drives = place.config.more_drives.iter().map(|drive| drive.path.clone()).collect();
    StorePaths { home: place.store_path(), more_drives }
}

fn check(place: &Place) -> FsckReport {
    fsck(&paths(place), false, &mut drop).expect("checked")
}

/// A repair, after which nothing is left to find.
fn repair(place: &Place) -> FsckReport {
    let report = fsck(&paths(place), true, &mut drop).expect("repaired");
    assert!(report.is_good() && report.repaired > 0, "{report:?}");
    let left = check(place);
    assert_eq!((left.problems, left.is_clean), (0, true), "{left:?}");
    report
}

/// A closed store with 30 objects.
fn closed() -> Place {
    let place = Place::new(IoChoice::Auto, 20);
    let (store, _) = place.open();
    put(&place, &store, (0..30).map(|name| (name, 1, 10_000)));
    close(store);
    place
}

fn location(place: &Place, name: u64) -> Location {
    let index = IndexLog::open_read_only(&place.store_path().join("index")).expect("opened");
    index.get(&object_id(name)).expect("read").expect("there").location
}

fn change_row(place: &Place, name: u64, change: impl FnOnce(crate::index::IndexRow) -> IndexChange) {
    let index = IndexLog::open(&place.store_path().join("index")).expect("opened");
    let row = index.get(&object_id(name)).expect("read").expect("there");
    index.commit(&[change(row)], &[]).expect("committed");
    index.close();
}

#[test]
fn a_store_that_is_right_has_no_problems_also_after_a_crash() {
    let place = Place::new(IoChoice::Auto, 8);
    let (store, _) = place.open();
    for version in 0..8 {
        put(&place, &store, (0..30).map(|name| (name, version, 10_000 + name as usize * 100)));
        remove(&store, [version, version + 20]);
        let crashed = place.copy();
        let report = check(&crashed);
        assert_eq!((report.problems, report.is_clean), (0, false), "{report:?}");
    }
    assert!(store.stats().reclaimed_regions > 0);
    let records = store.stats().records;
    close(store);
    let mut told = FsckProgress::default();
    let report = fsck(&paths(&place), false, &mut |progress| told = progress).expect("checked");
    assert_eq!((report.problems, report.is_clean, report.index), (0, true, IndexState::Ok), "{report:?}");
    assert!(report.rows <= records && report.records >= report.rows && report.rows > 0, "{report:?}");
    assert_eq!((told.regions, told.regions_total), (report.regions_in_use, report.regions_in_use));
}

#[test]
fn a_check_changes_nothing() {
    let place = closed();
    let at = location(&place, 3);
    place.overwrite(place.offset_of(&at) + 5000, &[0xee; 64]);
    let before = place.bytes_at(0, 8 * REGION_BYTES as usize);
    let superblock = std::fs::read(place.store_path().join("superblock")).expect("read");
    assert_eq!(check(&place).bad_checksums, 1);
    assert_eq!(check(&place).bad_checksums, 1, "as before");
    assert!(before == place.bytes_at(0, 8 * REGION_BYTES as usize));
    assert!(superblock == std::fs::read(place.store_path().join("superblock")).expect("read"));
}

#[test]
fn damaged_and_misplaced_records_are_found_and_dropped() {
    let place = closed();
    let at: Vec<Location> = (0..6).map(|name| location(&place, name)).collect();
    place.overwrite(place.offset_of(&at[1]) + 5000, &[0xee; 64]);
    place.overwrite(place.offset_of(&at[2]), &[0; 4096]);
    change_row(&place, 3, |row| IndexChange::Put(crate::index::IndexRow { location: at[4], ..row }));
    let report = check(&place);
    assert_eq!((report.bad_checksums, report.rows_without_record, report.wrong_identities), (1, 1, 1), "{report:?}");
    assert_eq!((report.orphans, report.problems), (0, 3), "the newest row of object 3 lies elsewhere: {report:?}");
    assert!(report.findings.iter().any(|finding| finding.page == Some(at[1].page)), "{report:?}");
    repair(&place);
    let (store, _) = place.open();
    assert_eq!([1, 2].map(|name| get(&place, &store, name)), [None, None]);
    for name in (4..30).chain([0]) {
        assert_object(&place, &store, name, 1, 10_000);
    }
}

#[test]
fn records_without_rows_are_found_and_come_back() {
    let place = closed();
    for name in [5, 6] {
        change_row(&place, name, |row| IndexChange::Remove { id: row.id, sequence: row.sequence });
    }
    let report = check(&place);
    assert_eq!((report.orphans, report.problems), (2, 2), "{report:?}");
    repair(&place);
    let (store, _) = place.open();
    (0..30).for_each(|name| assert_object(&place, &store, name, 1, 10_000));
    remove(&store, [5]);
    close(store);
    assert_eq!(check(&place).problems, 0, "what a tombstone hides is no orphan");
}

#[test]
fn rows_that_say_something_else_are_found_and_corrected() {
    let place = closed();
    change_row(&place, 7, |row| IndexChange::Put(crate::index::IndexRow { payload_bytes: 9_999, ..row }));
    change_row(&place, 8, |row| IndexChange::Put(crate::index::IndexRow { sequence: row.sequence + 9, ..row }));
    change_row(&place, 9, |row| {
        let location = Location { generation: row.location.generation + 1, ..row.location };
        IndexChange::Put(crate::index::IndexRow { location, ..row })
    });
    let report = check(&place);
    assert_eq!((report.wrong_rows, report.rows_without_record, report.problems), (2, 1, 3), "{report:?}");
    repair(&place);
    let (store, _) = place.open();
    (0..30).filter(|name| *name != 9).for_each(|name| assert_object(&place, &store, name, 1, 10_000));
}

/// An object's older version does not come back when its newest is damaged, whatever is lost afterwards.
#[test]
fn a_damaged_object_does_not_bring_its_older_version_back() {
    let place = Place::new(IoChoice::Auto, 20);
    let (store, _) = place.open();
    put(&place, &store, [(1, 1, 10_000), (2, 1, 10_000)]);
    put(&place, &store, [(1, 2, 10_000)]);
    close(store);
    let at = location(&place, 1);
    place.overwrite(place.offset_of(&at) + 5000, &[0xee; 64]);
    assert_eq!(repair(&place).bad_checksums, 1);
    place.overwrite(place.offset_of(&at), &[0; 4096]);
    place.wipe_index();
    let (store, report) = place.open();
    assert!(report.index_rebuilt);
    assert_eq!(get(&place, &store, 1), None);
    assert_object(&place, &store, 2, 1, 10_000);
}

#[test]
fn a_lost_index_and_a_torn_superblock_are_found_and_made_anew() {
    let place = closed();
    std::fs::remove_file(place.store_path().join("index/CURRENT")).expect("removed");
    let report = check(&place);
    assert_eq!((report.index, report.problems), (IndexState::Damaged, 1), "{report:?}");
    repair(&place);
    place.wipe_index();
    assert_eq!(repair(&place).index, IndexState::Missing);
    let path = place.store_path().join("superblock");
    let bytes = std::fs::read(&path).expect("read");
    for copy in 0..2 {
        let mut torn = bytes.clone();
        torn[copy * 4096 + 2048..(copy + 1) * 4096].fill(0xee);
        std::fs::write(&path, &torn).expect("written");
        assert_eq!(check(&place).bad_superblocks, 1);
    }
    assert_eq!(repair(&place).bad_superblocks, 1);
    (0..30).for_each(|name| assert_object(&place, &place.open().0, name, 1, 10_000));
}

/// An index that does not know of the rebuild floor lacks what hid older versions: no row of it is believed.
#[test]
fn an_index_older_than_the_rebuild_floor_is_found_and_made_anew() {
    let place = closed();
    let path = place.store_path().join("superblock");
    let pages = std::fs::read(&path).expect("read");
    let mut superblock = Superblock::newest(pages.chunks_exact(PAGE_BYTES)).expect("one is whole");
    superblock.rebuild_floor = 1;
    let copies: Vec<u8> = (0..2).flat_map(|_| superblock.encode().to_vec()).collect();
    std::fs::write(&path, copies).expect("written");
    assert_eq!((check(&place).index, check(&place).problems), (IndexState::Old, 1));
    assert_eq!(repair(&place).index, IndexState::Old);
    (0..30).for_each(|name| assert_object(&place, &place.open().0, name, 1, 10_000));
}

#[test]
fn an_open_store_and_what_is_none_are_refused() {
    let place = closed();
    let kind = |path: &Path| {
        let paths = StorePaths { home: path.to_owned(), more_drives: Vec::new() };
        fsck(&paths, true, &mut drop).map(drop).map_err(|error| error.kind())
    };
    let (store, _) = place.open();
    assert_eq!(kind(&place.store_path()), Err(ErrorKind::Locked));
    close(store);
    assert_eq!(kind(place.directory.path()), Err(ErrorKind::InvalidInput));
    assert_eq!(std::fs::read_dir(place.directory.path()).expect("read").count(), 1, "nothing is made");
    assert_eq!(kind(&place.directory.path().join("nowhere")), Err(ErrorKind::InvalidInput));
}

#[test]
fn a_store_on_several_drives_is_checked_on_all_of_them() {
    let mut place = Place::new(IoChoice::Auto, 10);
    let second = place.directory.path().join("second");
    place.config.more_drives = vec![DriveConfig { path: second.clone(), capacity_bytes: 10 * REGION_BYTES }];
    let (store, _) = place.open();
    put(&place, &store, (0..60).map(|name| (name, 1, 30_000)));
    close(store);
    let report = check(&place);
    assert_eq!((report.problems, report.rows, report.regions), (0, 60, 20), "{report:?}");
    let bytes = std::fs::read(second.join("regions.0")).expect("read");
    let at = bytes.chunks(4096).position(|page| page.starts_with(b"PEGARECD")).expect("a record on the second drive");
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(second.join("regions.0")).expect("there");
    file.write_all_at(&[0xee; 64], (at as u64 + 1) * 4096).expect("written");
    assert_eq!(check(&place).bad_checksums, 1);
    repair(&place);
    let alone = StorePaths { home: place.store_path(), more_drives: Vec::new() };
    assert_eq!(fsck(&alone, false, &mut drop).map_err(|error| error.kind()).map(drop), Err(ErrorKind::InvalidInput));
    let grouped = StorePaths::group(&[second.clone(), place.store_path()]).expect("grouped");
    assert_eq!(grouped, [paths(&place)]);
    assert_eq!(StorePaths::group(&[second]).map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
}
