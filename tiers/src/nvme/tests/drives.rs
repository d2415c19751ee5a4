//! Stores on several drives, and drives that change between two opens: larger, smaller, more, fewer, swapped, somebody
//! else's, of the past.

use super::*;

/// Where each object went: the drive of its record.
fn drive_of(store: &Store, name: u64) -> Option<u32> {
    let location = store.locate(&object_id(name))?;
    store.regions().iter().find(|info| info.region == location.region).map(|info| info.drive)
}

fn found(store: &Store, names: impl IntoIterator<Item = u64>) -> Vec<u64> {
    names.into_iter().filter(|name| store.locate(&object_id(*name)).is_some()).collect()
}

fn length_of_drive(place: &Place, drive: usize) -> u64 {
    let path = place.config.drives().nth(drive).expect("listed").0.join("regions.0");
    std::fs::metadata(path).expect("there").len()
}

fn refused(place: &Place) -> crate::error::Error {
    place.try_open().expect_err("refused")
}

/// Puts one object after the other, so that they go to the drives by turns.
fn put_each(place: &Place, store: &Store, objects: impl IntoIterator<Item = (u64, u64, usize)>) {
    objects.into_iter().for_each(|object| put(place, store, [object]));
}

#[test]
fn records_go_to_all_drives_at_once_and_come_back() {
    let place = Place::new(IoChoice::Auto, 30).with_drive(20).with_drive(10);
    let (store, _) = place.open();
    assert_eq!((store.regions().len(), store.stats().capacity_bytes), (60, 60 * REGION_BYTES));
    put(&place, &store, (0..200).map(|name| (name, 1, 12_000)));
    let open = |store: &Store| {
        let mut open: Vec<u32> =
            store.regions().iter().filter(|info| info.state == RegionState::Open).map(|info| info.drive).collect();
        open.sort_unstable();
        open
    };
    assert_eq!(open(&store), [0, 1, 2], "one region is open on each drive");
    for drive in 0..3 {
        let used: u64 = store.regions().iter().filter(|info| info.drive == drive).map(|info| info.used_bytes).sum();
        assert!(used > 200 * 12_000 / 10, "drive {drive} has {used} bytes");
    }
    assert_eq!(store.verify(&mut drop).expect("verified").corrupt, 0);
    close(store);
    for name in 0..200 {
        let (store, report) = place.open();
        assert_eq!((report.records, report.recovered_records, report.clean), (200, 0, true));
        assert_eq!(open(&store), [0, 1, 2], "they are gone on with");
        assert_object(&place, &store, name, 1, 12_000);
        close(store);
        if name == 2 {
            break;
        }
    }
    place.wipe_index();
    let (store, report) = place.open();
    assert_eq!((report.records, report.index_rebuilt), (200, true));
    (0..200).for_each(|name| assert_object(&place, &store, name, 1, 12_000));
}

/// A group is durable when all drives that it lies on are synced, and not before.
#[test]
fn a_crash_between_the_syncs_of_two_drives() {
    // Held is the sync that is started first, then the other.
    for round in 0..2u64 {
        let mut place = Place::new(IoChoice::Auto, 20).with_drive(20);
        place.config.commit_interval = Duration::from_secs(3600);
        let (store, drive) = place.open_faulty(FaultPlan::default());
        put(&place, &store, (0..10).map(|name| (name, 1, 5000)));
        let names = 100 + round * 100..110 + round * 100;
        let first = drive.seen(IoKind::Sync) + 1;
        drive.inject(Fault { kind: IoKind::Sync, first: first + round, times: 1, action: FaultAction::Hold });
        let mut ends = Ends::new();
        for name in names.clone().chain(0..5) {
            append(&store, object(&place, name, 2 + round, 5000, ends.done(name)));
        }
        let (sender, flushed) = unbounded();
        let flushing = Arc::clone(&store);
        let thread = std::thread::spawn(move || drop(sender.send(flushing.flush(soon()))));
        let until = soon();
        while drive.seen(IoKind::Sync) < first + 1 {
            assert!(Instant::now() < until, "both drives are synced");
            std::thread::yield_now();
        }
        assert!(ends.receiver.is_empty() && flushed.is_empty(), "nothing is reported before both drives are synced");
        assert!(found(&store, names.clone()).is_empty(), "nor found");
        let crashed = place.copy();
        drive.release();
        thread.join().expect("flushed");
        assert!(flushed.recv().expect("ended").is_ok() && ends.wait().iter().all(|(_, end)| end.is_ok()));
        let (recovered, report) = crashed.open();
        assert!(!report.clean);
        for name in (0..10).chain(names) {
            let bytes = get(&crashed, &recovered, name);
            let is_right =
                bytes.is_none_or(|bytes| (1..=2 + round).any(|version| bytes == content(name, version, 5000)));
            assert!(is_right, "object {name}");
        }
        (5..10).for_each(|name| assert_object(&crashed, &recovered, name, 1, 5000));
    }
}

/// Which of two records came last is told by their sequences, not by their regions.
#[test]
fn versions_on_different_drives_are_taken_in_their_order() {
    let place = Place::new(IoChoice::Psync, 20).with_drive(20);
    let (store, _) = place.open();
    put_each(&place, &store, (0..6).map(|name| (name, 0, 3000)));
    let before = place.copy();
    for version in 1..8 {
        put_each(&place, &store, (0..6).map(|name| (name, version, 3000)));
        if version == 4 {
            remove(&store, [0]);
        }
        remove(&store, [5]);
    }
    remove(&store, [1]);
    let drives: std::collections::BTreeSet<_> = (0..5).filter_map(|name| drive_of(&store, name)).collect();
    assert_eq!(drives.len(), 2, "both drives have newest versions");
    let (late, wiped) = (place.copy(), place.copy());
    late.wipe_index();
    copy_tree(&before.store_path().join("index"), &late.store_path().join("index"));
    wiped.wipe_index();
    close(store);
    for (place, index_rebuilt) in [(&late, false), (&wiped, true), (&place, false)] {
        let (store, report) = place.open();
        assert_eq!(report.index_rebuilt, index_rebuilt);
        [0, 2, 3, 4].into_iter().for_each(|name| assert_object(place, &store, name, 7, 3000));
        assert_eq!((get(place, &store, 1), get(place, &store, 5)), (None, None));
    }
}

#[test]
fn writes_may_fail_on_two_drives() {
    on_drives(2, || faults::fail_each(IoKind::Write, FaultAction::Torn { bytes: 8192 }, 24, 2));
    on_drives(2, || faults::fail_each(IoKind::Write, FaultAction::Errno(libc::EIO), 8, 4));
}

#[test]
fn syncs_may_fail_on_two_drives() {
    on_drives(2, || faults::fail_each(IoKind::Sync, FaultAction::Errno(libc::EIO), 24, 2));
}

#[test]
fn a_larger_capacity_keeps_everything_and_is_used() {
    let mut place = Place::new(IoChoice::Auto, 4).with_drive(4);
    let (store, _) = place.open();
    put_each(&place, &store, (0..20).map(|name| (name, 1, 30_000)));
    close(store);
    for (home, more) in [(6, 4), (6, 10), (7, 11)] {
        place.config.capacity_bytes = home * REGION_BYTES;
        place.config.more_drives[0].capacity_bytes = more * REGION_BYTES + 4096;
        let (store, report) = place.open();
        assert_eq!((report.records, report.index_rebuilt), (20, false));
        assert_eq!(store.regions().len() as u64, home + more);
        assert_eq!(
            (length_of_drive(&place, 0), length_of_drive(&place, 1)),
            (home * REGION_BYTES, more * REGION_BYTES)
        );
        (0..20).for_each(|name| assert_object(&place, &store, name, 1, 30_000));
        close(store);
    }
    let (store, _) = place.open();
    put_each(&place, &store, (100..130).map(|name| (name, 1, 30_000)));
    assert_eq!(store.stats().reclaimed_regions, 0, "the new regions are used first");
    close(store);
    place.wipe_index();
    let (store, _) = place.open();
    (0..20).chain(100..130).for_each(|name| assert_object(&place, &store, name, 1, 30_000));
}

#[test]
fn a_smaller_capacity_gives_up_what_lies_behind() {
    let mut place = Place::new(IoChoice::Auto, 20).with_drive(20);
    let (store, _) = place.open();
    put(&place, &store, (0..120).map(|name| (name, 1, 30_000)));
    let kept: Vec<u64> = {
        let infos = store.regions();
        let place_of = |name: &u64| {
            let region = store.locate(&object_id(*name)).expect("there").region;
            let drive = infos.iter().find(|info| info.region == region).expect("there").drive;
            infos.iter().filter(|info| info.drive == drive && info.region < region).count()
        };
        (0..120).filter(|name| place_of(name) < 6).collect()
    };
    assert!(kept.len() > 30 && kept.len() < 110);
    // Not closed: what is in the logs alone is read before a region goes.
    drop(store);
    place.config.capacity_bytes = 6 * REGION_BYTES;
    place.config.more_drives[0].capacity_bytes = 6 * REGION_BYTES;
    let (store, report) = place.open();
    assert_eq!((report.records, report.index_rebuilt), (kept.len() as u64, false));
    assert_eq!((length_of_drive(&place, 0), length_of_drive(&place, 1)), (6 * REGION_BYTES, 6 * REGION_BYTES));
    assert_eq!((store.regions().len(), found(&store, 0..120)), (12, kept.clone()));
    kept.iter().for_each(|name| assert_object(&place, &store, *name, 1, 30_000));
    let crashed = place.copy();
    close(store);
    // Larger again: what was given up does not come back, whatever becomes of the index.
    place.config.capacity_bytes = 20 * REGION_BYTES;
    place.wipe_index();
    let (store, _) = place.open();
    assert_eq!(found(&store, 0..120), kept);
    put(&place, &store, (200..300).map(|name| (name, 1, 30_000)));
    (240..300).for_each(|name| assert_object(&place, &store, name, 1, 30_000));
    close(store);
    // In the copy the file is longer than the table says, as after a crash before it was cut.
    let file = std::fs::OpenOptions::new().write(true).open(crashed.store_path().join("regions.0")).expect("there");
    file.set_len(20 * REGION_BYTES).expect("longer");
    let (store, _) = crashed.open();
    assert_eq!((found(&store, 0..120), length_of_drive(&crashed, 0)), (kept, 6 * REGION_BYTES));
}

/// What is given up may hide older versions in what stays.
#[test]
fn nothing_old_comes_back_when_what_hides_it_is_given_up() {
    for is_retired in [false, true] {
        let mut place = Place::new(IoChoice::Psync, 20).with_drive(20);
        let (store, _) = place.open();
        put_each(&place, &store, (0..8).map(|name| (name, 1, 3000)));
        let at_home: Vec<u64> = (0..8).filter(|name| drive_of(&store, *name) == Some(0)).collect();
        assert!(at_home.len() >= 3);
        // On both drives the first region is sealed; then removals and replacements, each on both drives.
        put(&place, &store, (10..30).map(|name| (name, 1, 30_000)));
        for filler in [40, 41] {
            remove(&store, [at_home[0]]);
            put_each(&place, &store, [(at_home[1], 2, 3000), (filler, 1, 3000), (at_home[1], 3, 3000)]);
        }
        drop(store);
        if is_retired {
            place.config.more_drives.clear();
        } else {
            place.config.capacity_bytes = 4 * REGION_BYTES;
            place.config.more_drives[0].capacity_bytes = 4 * REGION_BYTES;
        }
        let check = |place: &Place, store: &Store| {
            assert_eq!(get(place, store, at_home[0]), None, "what was removed came back");
            let replaced = get(place, store, at_home[1]);
            assert!(replaced.is_none_or(|bytes| bytes == content(at_home[1], 3, 3000)), "an old version came back");
        };
        let (store, _) = place.open();
        check(&place, &store);
        assert_object(&place, &store, at_home[2], 1, 3000);
        put(&place, &store, (50..60).map(|name| (name, 1, 3000)));
        close(store);
        place.wipe_index();
        let (store, _) = place.open();
        check(&place, &store);
        (50..60).for_each(|name| assert_object(&place, &store, name, 1, 3000));
        close(store);
        check(&place, &place.open().0);
    }
}

/// Where a drive is gone only the index knows what had been removed there, so it must not be an old one.
#[test]
fn an_older_index_is_not_believed_where_a_drive_is_gone() {
    let mut place = Place::new(IoChoice::Psync, 20).with_drive(20);
    let (store, _) = place.open();
    put_each(&place, &store, (0..8).map(|name| (name, 1, 3000)));
    let at_home: Vec<u64> = (0..8).filter(|name| drive_of(&store, *name) == Some(0)).collect();
    close(store);
    let older = place.copy();
    let (store, _) = place.open();
    // By turns on both drives; the second drive's is the one that counts.
    remove(&store, [at_home[0]]);
    remove(&store, [at_home[1]]);
    close(store);
    place.config.more_drives.clear();
    place.wipe_index();
    copy_tree(&older.store_path().join("index"), &place.store_path().join("index"));
    let (store, report) = place.open();
    assert!(report.index_rebuilt);
    assert_eq!((get(&place, &store, at_home[0]), get(&place, &store, at_home[1])), (None, None));
}

#[test]
fn a_drive_is_added_and_retired_and_comes_back_empty() {
    let alone = Place::new(IoChoice::Auto, 20);
    let (store, _) = alone.open();
    put(&alone, &store, (0..20).map(|name| (name, 1, 10_000)));
    close(store);
    let mut place = alone.with_drive(12);
    let (store, report) = place.open();
    assert_eq!((report.records, report.index_rebuilt, store.regions().len()), (20, false, 32));
    put(&place, &store, (20..100).map(|name| (name, 1, 10_000)));
    put(&place, &store, (0..100).filter(|name: &u64| name.is_multiple_of(3)).map(|name| (name, 2, 10_000)));
    let version = |name: u64| if name.is_multiple_of(3) { 2 } else { 1 };
    let at_home: Vec<u64> = (0..100).filter(|name| drive_of(&store, *name) == Some(0)).collect();
    assert!(at_home.len() > 30 && at_home.len() < 90);
    let crashed = place.copy();
    close(store);
    let drive = place.config.more_drives.pop().expect("a drive");
    let (store, _) = place.open();
    assert_eq!((found(&store, 0..100), store.regions().len()), (at_home.clone(), 20));
    at_home.iter().for_each(|name| assert_object(&place, &store, *name, version(*name), 10_000));
    // While it is away its records change.
    put(&place, &store, (0..10).map(|name| (name, 3, 10_000)));
    remove(&store, [at_home[at_home.len() - 1]]);
    let there = found(&store, 0..100);
    close(store);
    place.config.more_drives.push(drive);
    for is_wiped in [false, true] {
        if is_wiped {
            place.wipe_index();
        }
        let (store, _) = place.open();
        // Made anew, the index has what was written since the drive was retired.
        let back = found(&store, 0..100);
        assert!(back.iter().all(|name| there.contains(name)), "records of the drive came back: {back:?}");
        assert!((is_wiped || back == there) && store.regions().len() == 32);
        for name in back {
            assert_object(&place, &store, name, if name < 10 { 3 } else { version(name) }, 10_000);
        }
        assert!(store.regions().iter().all(|info| info.drive == 0 || info.records == 0));
        close(store);
    }
    let (store, _) = place.open();
    put(&place, &store, (200..250).map(|name| (name, 1, 10_000)));
    assert!((200..250).any(|name| drive_of(&store, name) == Some(1)), "it is used again");
    // Without the index nobody knows what the drive that is gone had hidden: nothing is made of the rest.
    let mut crashed = crashed;
    crashed.config.more_drives.clear();
    crashed.wipe_index();
    let (store, report) = crashed.open();
    assert_eq!((report.records, found(&store, 0..100)), (0, vec![]));
    put(&crashed, &store, (0..20).map(|name| (name, 5, 10_000)));
    close(store);
    let (store, _) = crashed.open();
    (0..20).for_each(|name| assert_object(&crashed, &store, name, 5, 10_000));
}

/// With nothing hidden anywhere the index may be made anew from all regions; what lay on the drive stays away.
#[test]
fn what_lay_on_a_retired_drive_is_not_found_by_a_rebuild() {
    let mut place = Place::new(IoChoice::Psync, 20).with_drive(20);
    let (store, _) = place.open();
    put_each(&place, &store, (0..40).map(|name| (name, 1, 9000)));
    let at_home: Vec<u64> = (0..40).filter(|name| drive_of(&store, *name) == Some(0)).collect();
    close(store);
    let listed = std::mem::take(&mut place.config.more_drives);
    close(place.open().0);
    place.config.more_drives = listed;
    close(place.open().0);
    place.wipe_index();
    let (store, report) = place.open();
    assert!(report.index_rebuilt);
    assert_eq!(found(&store, 0..40), at_home);
}

#[test]
fn drives_in_another_place_or_of_another_store_are_refused() {
    let mut place = Place::new(IoChoice::Psync, 4).with_drive(4).with_drive(8);
    let (store, _) = place.open();
    put(&place, &store, (0..20).map(|name| (name, 1, 9000)));
    let error = refused(&place);
    assert_eq!(error.kind(), ErrorKind::Locked);
    close(store);
    let good = place.config.clone();
    let [one, two] = [0, 1].map(|index| good.more_drives[index].path.clone());
    let shown = |path: &Path| path.display().to_string();
    let empty = place.directory.path().join("empty");
    let other = Place::new(IoChoice::Psync, 4).with_drive(4);
    close(other.open().0);
    let foreign = other.config.more_drives[0].path.clone();
    let copied = place.directory.path().join("copied");
    copy_tree(&one, &copied);
    let cases: [(&[&Path], ErrorKind, &[&str]); 7] = [
        (&[&two, &one], ErrorKind::InvalidInput, &[&shown(&one), &shown(&two), "swapped", "order"]),
        (&[&one, &empty], ErrorKind::InvalidInput, &[&shown(&empty), "mount", "drive 2"]),
        (&[&empty, &one, &two], ErrorKind::InvalidInput, &["new drives last"]),
        (&[&one, &copied, &two], ErrorKind::InvalidInput, &["copies of one drive"]),
        (&[&one, &foreign], ErrorKind::ForeignFormat, &["another store", "empty the directory"]),
        (&[&one, &other.config.path], ErrorKind::ForeignFormat, &["home of a store"]),
        (&[&one, &one], ErrorKind::InvalidInput, &["twice"]),
    ];
    for (paths, kind, words) in cases {
        place.config.more_drives = paths
            .iter()
            .map(|path| DriveConfig { path: path.to_path_buf(), capacity_bytes: 8 * REGION_BYTES })
            .collect();
        let error = refused(&place);
        assert!(error.kind() == kind && words.iter().all(|word| error.message().contains(word)), "{error}");
        assert!(!empty.join("regions.0").exists() && !empty.join("drive").exists(), "nothing is left there");
    }
    place.config = StoreConfig { path: one, more_drives: vec![], ..good.clone() };
    let error = refused(&place);
    assert!(error.kind() == ErrorKind::ForeignFormat && error.message().contains("home first"), "{error}");
    place.config = good.clone();
    place.config.more_drives[1].capacity_bytes = 1 << 50;
    assert_eq!(refused(&place).kind(), ErrorKind::InvalidInput, "more regions than there are numbers");
    place.config.more_drives[1].capacity_bytes = 1 << 37;
    assert_eq!(refused(&place).kind(), ErrorKind::NoSpace);
    place.config.more_drives[1].capacity_bytes = 3 * REGION_BYTES;
    assert_eq!(refused(&place).kind(), ErrorKind::InvalidInput);
    place.config = good;
    let (store, report) = place.open();
    assert_eq!(report.records, 20);
    (0..20).for_each(|name| assert_object(&place, &store, name, 1, 9000));
}

/// A drive that was put back from a copy has generations that the store has given again since.
#[test]
fn a_drive_of_the_past_is_refused() {
    let place = Place::new(IoChoice::Psync, 8).with_drive(8);
    let (store, _) = place.open();
    put_each(&place, &store, (0..20).map(|name| (name, 1, 9000)));
    close(store);
    let old = place.copy();
    let (store, _) = place.open();
    put_each(&place, &store, (0..20).map(|name| (name, 2, 9000)));
    close(store);
    close(place.open().0);
    let mut mixed = place.copy();
    let drive = mixed.config.more_drives[0].path.clone();
    std::fs::remove_dir_all(&drive).expect("removed");
    copy_tree(&old.config.more_drives[0].path, &drive);
    let error = refused(&mixed);
    assert!(error.kind() == ErrorKind::Corrupt && error.message().contains("past"), "{error}");
    // The way out that the message names.
    let listed = std::mem::take(&mut mixed.config.more_drives);
    close(mixed.open().0);
    mixed.config.more_drives = listed;
    mixed.wipe_index();
    let (store, _) = mixed.open();
    for name in 0..20 {
        assert!(get(&mixed, &store, name).is_none_or(|bytes| bytes == content(name, 2, 9000)), "object {name}");
    }
    drop(store);
    // The home from the past, with a drive that went on.
    let mixed = old.copy();
    let drive = mixed.config.more_drives[0].path.clone();
    std::fs::remove_dir_all(&drive).expect("removed");
    copy_tree(&place.config.more_drives[0].path, &drive);
    let error = refused(&mixed);
    assert!(error.kind() == ErrorKind::Corrupt && error.message().contains("home"), "{error}");
}

/// Small regions full of removals on both drives: none can go without new ones, and reclaiming gets on all the same.
#[test]
fn regions_full_of_removals_do_not_stop_reclaiming() {
    let mut place = Place::new(IoChoice::Psync, 4).with_drive(4);
    let region = 64 * KIB;
    place.config.region_bytes = region;
    place.config.capacity_bytes = 4 * region;
    place.config.more_drives[0].capacity_bytes = 4 * region;
    let (store, _) = place.open();
    put(&place, &store, (0..6).map(|name| (name, 1, 9000)));
    for round in 0..40u64 {
        remove(&store, (0..30).map(|name| round * 7 + name));
        put(&place, &store, [(1000 + round, round, 3000)]);
        let live: Vec<u64> = found(&store, 0..400);
        assert_eq!(live, Vec::<u64>::new());
        assert_object(&place, &store, 1000 + round, round, 3000);
    }
    let stats = store.stats();
    assert!(stats.reclaimed_regions > 40 && stats.failed_appends == 0, "{stats:?}");
    println!("{} tombstones were kept for {} regions", stats.kept_tombstones, stats.reclaimed_regions);
    close(store);
    place.wipe_index();
    let (store, _) = place.open();
    assert_eq!(found(&store, 0..400), Vec::<u64>::new());
}
