//! A drive that fails: what was reported durable stays, nothing wrong is ever returned, every callback runs once.

use super::*;

on_both_engines!(
    damage_is_a_miss_and_is_quarantined,
    records_that_changed_places_are_found_out,
    a_failed_write_is_made_again_elsewhere,
    a_failed_sync_ends_all_writing,
);

fn damage_is_a_miss_and_is_quarantined(io: IoChoice) {
    let place = Place::new(io, 20);
    let (store, _) = place.open();
    put(&place, &store, (0..30).map(|name| (name, 1, 10_000)));
    for (name, offset) in [(3u64, 0u64), (5, 100), (7, 4095), (11, 4096), (13, 4096 + 9_999), (17, 190)] {
        let location = store.locate(&object_id(name)).expect("there");
        let at = place.offset_of(&location) + offset;
        let mut byte = place.bytes_at(at, 1);
        byte[0] ^= 0x10;
        place.overwrite(at, &byte);
        let error = read_at(&place, &store, object_id(name), location).expect_err("found out");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(store.locate(&object_id(name)), None, "quarantined");
    }
    assert_eq!((store.stats().bad_reads, store.stats().records), (6, 24));
    store.flush(soon()).expect("flushed");
    let crashed = place.copy();
    close(store);
    for place in [&crashed, &place] {
        let (store, _) = place.open();
        for name in 0..30 {
            match name {
                3 | 5 | 7 | 11 | 13 | 17 => assert_eq!(store.locate(&object_id(name)), None),
                _ => assert_object(place, &store, name, 1, 10_000),
            }
        }
        put(place, &store, [(3, 2, 10_000)]);
        assert_object(place, &store, 3, 2, 10_000);
    }
}

fn records_that_changed_places_are_found_out(io: IoChoice) {
    let place = Place::new(io, 20);
    let (store, _) = place.open();
    put(&place, &store, (0..4).map(|name| (name, 1, 10_000)));
    let at = |name| store.locate(&object_id(name)).expect("there");
    let (one, two) = (at(1), at(2));
    let error = read_at(&place, &store, object_id(1), two).expect_err("another record");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("key"), "{error}");
    assert_eq!(store.locate(&object_id(1)), Some(one), "the record itself is not to blame");
    let length = one.pages as usize * 4096;
    let (first, second) =
        (place.bytes_at(place.offset_of(&one), length), place.bytes_at(place.offset_of(&two), length));
    place.overwrite(place.offset_of(&one), &second);
    place.overwrite(place.offset_of(&two), &first);
    assert_eq!((get(&place, &store, 1), get(&place, &store, 2)), (None, None));
    assert_object(&place, &store, 3, 1, 10_000);
    let stale = Location { generation: one.generation + 1, ..at(3) };
    let refused = read_at(&place, &store, object_id(3), stale).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::NotFound));
    let beside = Location { page: at(3).page + 1, pages: 1, ..at(3) };
    let refused = read_at(&place, &store, object_id(3), beside).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Corrupt));
    assert_object(&place, &store, 3, 1, 10_000);
}

fn a_failed_write_is_made_again_elsewhere(io: IoChoice) {
    for (nth, times) in [(1, 1), (3, 2), (20, 5)] {
        let place = Place::new(io, 50);
        let (store, drive) = place.open_faulty(FaultPlan::default());
        put(&place, &store, (0..10).map(|name| (name, 1, 10_000)));
        let first = drive.seen(IoKind::Write) + nth;
        drive.inject(Fault { kind: IoKind::Write, first, times, action: FaultAction::Torn { bytes: 8192 } });
        let mut ends = Ends::new();
        for name in 0..60 {
            append(&store, object(&place, name, 2, 10_000, ends.done(name)));
        }
        store.flush(soon()).expect("everything was made again");
        assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
        assert!(drive.fired() == times && store.poisoned().is_none());
        let crashed = place.copy();
        let wiped = place.copy();
        wiped.wipe_index();
        close(store);
        for place in [&crashed, &wiped, &place] {
            let (store, _) = place.open();
            for name in 0..60 {
                assert_object(place, &store, name, 2, 10_000);
            }
        }
    }
}

/// A record that can not be written at all fails, and what comes after it does not.
#[test]
fn a_record_whose_second_write_fails_too_is_reported() {
    let mut place = Place::new(IoChoice::Psync, 50);
    place.config.queue_depth = 1;
    let (store, drive) = place.open_faulty(FaultPlan::default());
    put(&place, &store, [(1, 1, 10_000)]);
    // The record, the header of the next region in between, the record again.
    let first = drive.seen(IoKind::Write) + 1;
    for nth in [first, first + 2] {
        drive.inject(Fault { kind: IoKind::Write, first: nth, times: 1, action: FaultAction::Errno(libc::EIO) });
    }
    let mut ends = Ends::new();
    append(&store, object(&place, 1, 2, 10_000, ends.done(1)));
    assert_eq!(store.flush(soon()).map_err(|error| error.kind()), Err(ErrorKind::Io));
    assert!(ends.wait().iter().all(|(_, end)| end.as_ref().is_err_and(|error| error.kind() == ErrorKind::Io)));
    put(&place, &store, [(2, 2, 10_000), (3, 2, 10_000)]);
    assert_object(&place, &store, 1, 1, 10_000);
    assert_object(&place, &store, 2, 2, 10_000);
    assert_object(&place, &store, 3, 2, 10_000);
    assert_eq!(store.stats().failed_appends, 1);
    close(store);
}

/// Records count by the header of their region: without it on the drive none of them may be promised.
#[test]
fn records_go_elsewhere_when_the_header_of_their_region_is_not_written() {
    for lost in [1, 2] {
        let place = Place::new(IoChoice::Psync, 50);
        let (store, drive) = place.open_faulty(FaultPlan::default());
        // Six fill a region.
        put(&place, &store, (0..6).map(|name| (name, 1, 30_000)));
        let first = drive.seen(IoKind::Write) + 1;
        drive.inject(Fault { kind: IoKind::Write, first, times: lost, action: FaultAction::Errno(libc::EIO) });
        put(&place, &store, [(6, 1, 30_000)]);
        put(&place, &store, [(7, 1, 30_000)]);
        assert_eq!(drive.fired(), lost);
        drop(store);
        std::fs::remove_dir_all(place.config.path.join("index")).expect("the index goes");
        let (store, _) = place.open();
        (0..8).for_each(|name| assert_object(&place, &store, name, 1, 30_000));
        close(store);
    }
}

/// A replacement whose write failed for good leaves the old version alone, also when the region goes that the failed
/// write reached.
#[test]
fn a_failed_replacement_leaves_the_old_version() {
    let mut place = Place::with_policy(IoChoice::Psync, 6, Arc::new(LeastRecent));
    place.config.queue_depth = 1;
    let (store, drive) = place.open_faulty(FaultPlan::default());
    put(&place, &store, [(1, 1, 10_000)]);
    // The failed write goes to the second region, which is searched for what it hides when it goes.
    put(&place, &store, (10..17).map(|name| (name, 1, 30_000)));
    put(&place, &store, [(2, 1, 100)]);
    put(&place, &store, [(2, 2, 100)]);
    let first = drive.seen(IoKind::Write) + 1;
    for nth in [first, first + 2] {
        let torn = FaultAction::Torn { bytes: 8192 };
        drive.inject(Fault { kind: IoKind::Write, first: nth, times: 1, action: torn });
    }
    let mut ends = Ends::new();
    append(&store, object(&place, 1, 2, 10_000, ends.done(1)));
    assert_eq!(store.flush(soon()).map_err(|error| error.kind()), Err(ErrorKind::Io));
    assert!(ends.wait().iter().all(|(_, end)| end.is_err()));
    for name in 100..160 {
        put(&place, &store, [(name, 1, 30_000)]);
        assert_object(&place, &store, 1, 1, 10_000);
    }
    assert!(store.stats().reclaimed_regions > 4);
    close(store);
    assert_object(&place, &place.open().0, 1, 1, 10_000);
}

fn a_failed_sync_ends_all_writing(io: IoChoice) {
    let mut place = Place::new(io, 50);
    place.config.commit_interval = Duration::from_secs(3600);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    put(&place, &store, (0..10).map(|name| (name, 1, 10_000)));
    let first = drive.seen(IoKind::Sync) + 1;
    drive.inject(Fault { kind: IoKind::Sync, first, times: 1, action: FaultAction::Errno(libc::EIO) });
    let mut ends = Ends::new();
    for name in 5..20 {
        append(&store, object(&place, name, 2, 10_000, ends.done(name)));
    }
    assert_eq!(store.flush(soon()).map_err(|error| error.kind()), Err(ErrorKind::Poisoned));
    let ends = ends.wait();
    assert!(ends.iter().all(|(_, end)| end.as_ref().is_err_and(|error| error.kind() == ErrorKind::Poisoned)));
    assert_eq!(drive.seen(IoKind::Sync), first, "a failed sync is not tried again");
    let refused = store.append(object(&place, 30, 1, 100, Box::new(|_| unreachable!()))).map_err(|(_, e)| e.kind());
    assert_eq!(refused, Err(ErrorKind::Poisoned));
    assert_eq!(store.poisoned().map(|error| error.kind()), Some(ErrorKind::Poisoned));
    for name in 0..10 {
        assert_object(&place, &store, name, 1, 10_000);
    }
    assert_eq!(store.stats().queued_bytes, 0);
    assert_eq!(store.close(soon()).map_err(|error| error.kind()), Err(ErrorKind::Poisoned));
    let (store, report) = place.open();
    assert!(!report.clean);
    for name in 0..10 {
        let bytes = get(&place, &store, name).expect("there");
        assert!(bytes == content(name, 1, 10_000) || (name >= 5 && bytes == content(name, 2, 10_000)));
    }
    put(&place, &store, [(1, 3, 100)]);
}

#[test]
fn a_drive_that_can_not_read_is_a_miss() {
    let place = Place::new(IoChoice::Psync, 20);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    put(&place, &store, (0..3).map(|name| (name, 1, 10_000)));
    let fault = |nth, action| {
        drive.inject(Fault { kind: IoKind::Read, first: drive.seen(IoKind::Read) + nth, times: 1, action });
    };
    fault(1, FaultAction::Errno(libc::EIO));
    fault(2, FaultAction::FlipBit { byte: 5000, bit: 3 });
    assert_eq!((get(&place, &store, 0), get(&place, &store, 1)), (None, None));
    assert_object(&place, &store, 2, 1, 10_000);
    assert_eq!(store.stats().bad_reads, 2);
    put(&place, &store, [(0, 2, 500)]);
    assert_object(&place, &store, 0, 2, 500);
    close(store);
}

/// Every single operation of a workload fails once: nothing wrong is read then or after the next open, and what was
/// reported durable is there.
pub(super) fn fail_each(kind: IoKind, action: FaultAction, regions: u64, versions: u64) {
    // With many regions none is given up, and nothing durable may be missing.
    let is_strict = regions > 20;
    for nth in 1.. {
        let mut place = Place::new(IoChoice::Psync, 1);
        (place.config.region_bytes, place.config.capacity_bytes) = (64 * KIB, regions * 64 * KIB);
        place.config.more_drives.iter_mut().for_each(|drive| drive.capacity_bytes = regions * 64 * KIB);
        let mut drive = None;
        let wrap = |io| -> Arc<dyn BlockIo> {
            let plan = FaultPlan::default().fail(kind, nth, action);
            let faulty = Arc::new(Faulty::new(io, plan).expect("a faulty drive"));
            drive = Some(Arc::clone(&faulty));
            faulty
        };
        let opened = Store::open_through(place.config.clone(), &place.arena, Arc::clone(&place.policy), wrap);
        let drive = drive.expect("wrapped");
        let mut durable = std::collections::HashMap::new();
        if let Ok((store, _)) = opened {
            for version in 0..versions {
                write_what_goes(&place, &store, version, &mut durable);
            }
            drop(store.close(soon()));
        }
        let (store, _) = place.open();
        for (&name, &durable) in &durable {
            let bytes = get(&place, &store, name);
            // A later version may be there too: its data had reached the drive when it failed.
            let is_right = |bytes: Vec<u8>| (durable..versions).any(|version| bytes == content(name, version, 12_000));
            assert!(bytes.map_or(!is_strict, is_right), "object {name} after {kind:?} {nth} failed");
        }
        if drive.fired() == 0 {
            println!("{} operations", nth - 1);
            return;
        }
    }
}

fn write_what_goes(place: &Place, store: &Store, version: u64, durable: &mut std::collections::HashMap<u64, u64>) {
    let mut ends = Ends::new();
    let mut refused = 0;
    for name in 0..4 {
        refused += usize::from(store.append(object(place, name, version, 12_000, ends.done(name))).is_err());
    }
    ends.expected -= refused;
    drop(store.flush(soon()));
    for (name, end) in ends.wait() {
        if end.is_ok() {
            durable.insert(name, version);
        }
        if let Some(bytes) = get(place, store, name) {
            assert!((0..=version).any(|version| bytes == content(name, version, 12_000)), "object {name}");
        }
    }
}

#[test]
fn each_write_may_fail() {
    fail_each(IoKind::Write, FaultAction::Errno(libc::EIO), 24, 2);
}

#[test]
fn each_write_may_fail_while_regions_are_given_up() {
    fail_each(IoKind::Write, FaultAction::Torn { bytes: 4096 }, 4, 4);
}

#[test]
fn each_write_may_be_torn() {
    fail_each(IoKind::Write, FaultAction::Torn { bytes: 8192 }, 24, 2);
}

#[test]
fn each_sync_may_fail() {
    fail_each(IoKind::Sync, FaultAction::Errno(libc::EIO), 24, 2);
}

#[test]
fn each_sync_may_fail_while_regions_are_given_up() {
    fail_each(IoKind::Sync, FaultAction::Errno(libc::EIO), 4, 4);
}

#[test]
fn a_verification_reads_everything_and_finds_every_damage() {
    let place = Place::new(IoChoice::Auto, 40);
    let (store, _) = place.open();
    put(&place, &store, (0..200).map(|name| (name, 1, 1 + (name as usize * 379) % 60_000)));
    let mut calls = 0;
    let report = store.verify(&mut |progress| calls += u64::from(progress.records_total == 200)).expect("verified");
    assert_eq!((report.records, report.corrupt), (200, 0));
    assert_eq!(report.bytes, store.stats().live_bytes);
    assert!(calls > 0 && ["tokio_uring", "blocking"].contains(&report.engine), "{report:?}");
    println!("{report:?}");
    for name in [3, 50, 199] {
        let location = store.locate(&object_id(name)).expect("there");
        place.overwrite(place.offset_of(&location) + u64::from(location.pages - 1) * 4096, &[0xee; 16]);
    }
    let report = store.verify(&mut drop).expect("verified");
    assert_eq!((report.records, report.corrupt), (200, 3));
    for name in 0..200 {
        assert_eq!(store.locate(&object_id(name)).is_none(), [3, 50, 199].contains(&name));
    }
    close(store);
    assert_eq!(place.open().0.verify(&mut drop).expect("verified").records, 197);
}

/// A scrub reads everything piece by piece, goes on where it was stopped, and finds damage within one pass.
#[test]
fn a_scrub_goes_on_where_it_was_and_finds_every_damage() {
    let place = Place::new(IoChoice::Auto, 60);
    let (store, _) = place.open();
    put(&place, &store, (0..300).map(|name| (name, 1, 1 + (name as usize * 379) % 60_000)));
    assert_eq!(store.last_scrub_unix_ms().expect("read"), 0);
    for name in [3, 150, 299] {
        let location = store.locate(&object_id(name)).expect("there");
        place.overwrite(place.offset_of(&location) + u64::from(location.pages - 1) * 4096, &[0xee; 16]);
    }
    let pieces = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let after = |most: u64| -> ScrubPace {
        let pieces = Arc::clone(&pieces);
        Arc::new(move |step| {
            assert!(step.bytes <= (1 << 20), "small pieces");
            assert!(step.region < step.regions_total && step.records <= step.records_total + step.corrupt, "{step:?}");
            pieces.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1 < most
        })
    };
    let first = store.scrub(ScrubFrom::WhereItWas, &after(5)).expect("stopped");
    assert!(first.is_stopped && first.records < 300 && store.stats().scrub_passes == 0);
    let report = store.scrub(ScrubFrom::WhereItWas, &after(u64::MAX)).expect("scrubbed");
    let stats = store.stats();
    assert!(!report.is_stopped && stats.scrub_bad_records == 3 && stats.scrub_passes == 1, "{report:?} {stats:?}");
    assert!(stats.scrubbed_bytes > 0 && stats.scrub_last_pass_unix_ms > 0);
    for name in 0..300 {
        assert_eq!(store.locate(&object_id(name)).is_none(), [3, 150, 299].contains(&name));
    }
    let ended = stats.scrub_last_pass_unix_ms;
    let again = store.scrub(ScrubFrom::Start, &after(u64::MAX)).expect("scrubbed");
    assert_eq!((again.records, again.corrupt, store.stats().scrub_passes), (297, 0, 2));
    let ended = ended.max(store.stats().scrub_last_pass_unix_ms);
    close(store);
    let (store, _) = place.open();
    assert_eq!(store.last_scrub_unix_ms().expect("read"), ended, "kept across opens");
}

/// A region whose header could not be read once is free for good: with it, what was removed meanwhile would come back.
#[test]
fn a_region_that_could_not_be_read_once_does_not_come_back() {
    let place = Place::new(IoChoice::Psync, 20);
    let (store, _) = place.open();
    put(&place, &store, (0..40).map(|name| (name, 1, 30_000)));
    let lost = store.locate(&object_id(0)).expect("there").region;
    close(store);
    // Reads of an open: one of the superblock, then one of each region's header.
    let plan = FaultPlan::default().fail(IoKind::Read, 2 + u64::from(lost), FaultAction::Errno(libc::EIO));
    let (store, drive) = place.open_faulty(plan);
    assert_eq!((drive.fired(), store.locate(&object_id(0))), (1, None));
    drop(store);
    place.wipe_index();
    let (store, _) = place.open();
    assert_eq!(store.locate(&object_id(0)), None);
    assert_object(&place, &store, 39, 1, 30_000);
}
