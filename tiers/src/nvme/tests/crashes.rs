//! What is there after a crash. A copy of the directory stands for the drive after a power loss or a kill at that
//! moment; damage is added to the copy to stand for what a drive may do to writes that were never synced.

use std::collections::HashMap;

use rand::Rng;

use super::*;

on_engines_and_drives!(
    what_was_reported_durable_survives_a_crash_at_any_commit,
    a_store_that_was_dropped_keeps_what_was_durable,
    a_wiped_index_is_made_anew_with_the_same_content,
    an_older_index_is_made_anew,
);

/// What each object must be: its version and length, or nothing.
type Model = HashMap<u64, Option<(u64, usize)>>;

fn assert_model(place: &Place, store: &Store, model: &Model) {
    for (&name, expected) in model {
        match expected {
            Some((version, length)) => assert_object(place, store, name, *version, *length),
            None => assert!(get(place, store, name).is_none(), "object {name} was removed and is there"),
        }
    }
}

/// One random step that is durable when it returns.
fn step(place: &Place, store: &Store, rng: &mut SmallRng, model: &mut Model, version: u64, names: u64) {
    if rng.random_bool(0.25) {
        let gone: Vec<u64> = (0..5).map(|_| rng.random_range(0..names)).collect();
        remove(store, gone.iter().copied());
        model.extend(gone.into_iter().map(|name| (name, None)));
    } else {
        let new: Vec<(u64, u64, usize)> =
            (0..8).map(|_| (rng.random_range(0..names), version, rng.random_range(1..20_000))).collect();
        // One batch writes a name once: with two, which length counts would depend on the last.
        let mut seen = std::collections::HashSet::new();
        let new: Vec<_> = new.into_iter().filter(|(name, ..)| seen.insert(*name)).collect();
        put(place, store, new.iter().copied());
        model.extend(new.into_iter().map(|(name, version, length)| (name, Some((version, length)))));
    }
}

fn seeded() -> SmallRng {
    let seed = rand::random();
    println!("seed {seed}");
    SmallRng::seed_from_u64(seed)
}

fn what_was_reported_durable_survives_a_crash_at_any_commit(io: IoChoice) {
    let mut rng = seeded();
    let place = Place::new(io, 100);
    let (store, _) = place.open();
    let mut model = Model::new();
    for version in 0..24 {
        step(&place, &store, &mut rng, &mut model, version, 60);
        if version % 4 == 3 {
            // More that is not yet durable, and may or may not be there.
            let mut unsure = model.clone();
            let mut ends = Ends::new();
            for name in 0..10 {
                append(&store, object(&place, name, 1000 + version, 3000, ends.done(name)));
                unsure.remove(&name);
            }
            let crashed = place.copy();
            store.flush(soon()).expect("flushed");
            assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
            model.extend((0..10).map(|name| (name, Some((1000 + version, 3000)))));
            let (recovered, report) = crashed.open();
            assert!(!report.clean && !report.index_rebuilt);
            assert_model(&crashed, &recovered, &unsure);
            for name in 0..10 {
                // Old, new or gone, but never a mixture.
                if let Some(bytes) = get(&crashed, &recovered, name) {
                    let is_whole = (0..=version)
                        .flat_map(|version| [version, 1000 + version])
                        .any(|version| bytes == content(name, version, bytes.len()));
                    assert!(is_whole, "object {name} has bytes that were never written");
                }
            }
            // The recovered store takes writes, and survives another crash.
            put(&crashed, &recovered, (0..10).map(|name| (name, 5000, 2000)));
            unsure.extend((0..10).map(|name| (name, Some((5000, 2000)))));
            let again = crashed.copy();
            assert_model(&again, &again.open().0, &unsure);
        }
    }
    close(store);
}

fn a_store_that_was_dropped_keeps_what_was_durable(io: IoChoice) {
    let place = Place::new(io, 50);
    for round in 0..3 {
        let (store, report) = place.open();
        assert_eq!((report.records, report.clean), (round * 50, round == 0));
        put(&place, &store, (0..50).map(|i| (round * 50 + i, 7, 4000)));
        let mut ends = Ends::new();
        for name in 0..20 {
            append(&store, object(&place, 10_000 + round * 100 + name, 1, 2000, ends.done(name)));
        }
        drop(store);
        ends.wait();
        let (store, _) = place.open();
        for name in 0..(round + 1) * 50 {
            assert_object(&place, &store, name, 7, 4000);
        }
        for name in (0..20).map(|name| 10_000 + round * 100 + name) {
            assert!(get(&place, &store, name).is_none_or(|bytes| bytes == content(name, 1, 2000)));
        }
        remove(&store, (0..20).map(|name| 10_000 + round * 100 + name));
        drop(store);
    }
}

fn a_wiped_index_is_made_anew_with_the_same_content(io: IoChoice) {
    let mut rng = seeded();
    let place = Place::new(io, 100);
    let (store, _) = place.open();
    let namespace = NamespaceDescriptor::new().with("model", "m");
    let groups = [GroupGeometry { group: 0, block_bytes: 4096, shards: 1 }];
    let handle = store.namespace(&namespace, &groups).expect("registered");
    let block = RecordId { namespace: handle, group: 0, shard: 0, key: BlockKey::from_name(b"block") };
    let mut slot = place.slot(4096);
    slot.payload_mut().copy_from_slice(&content(1, 1, 4096));
    let mut ends = Ends::new();
    append(
        &store,
        Append {
            id: block,
            kind: RecordKind::Kv,
            parent: BlockKey::from_name(b"parent"),
            depth: 7,
            slot: Some(Arc::new(slot)),
            payload_bytes: 4096,
            done: ends.done(0),
        },
    );
    let mut model = Model::new();
    for version in 0..40 {
        step(&place, &store, &mut rng, &mut model, version, 60);
    }
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    let records = store.stats().records;
    let check = |place: &Place, is_clean: bool| {
        let (store, report) = place.open();
        assert_eq!((report.index_rebuilt, report.clean, report.records), (true, is_clean, records));
        assert_model(place, &store, &model);
        assert_eq!(store.namespace(&namespace, &groups).expect("known"), handle);
        let location = store.locate(&block).expect("there");
        assert!(read_at(place, &store, block, location).expect("read") == content(1, 1, 4096));
        close(store);
        let (store, report) = place.open();
        assert_eq!((report.index_rebuilt, report.clean, report.records), (false, true, records));
        assert_model(place, &store, &model);
    };
    // Wiped while it was in use, wiped after a close, damaged, another store's.
    let crashed = place.copy();
    crashed.wipe_index();
    check(&crashed, false);
    close(store);
    let damaged = place.copy();
    for entry in std::fs::read_dir(damaged.store_path().join("index")).expect("listed") {
        let path = entry.expect("an entry").path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("MANIFEST")) {
            std::fs::write(path, b"not a manifest").expect("written");
        }
    }
    check(&damaged, true);
    let other = Place::new(io, 10);
    let (other_store, _) = other.open();
    put(&other, &other_store, (0..20).map(|name| (name, 999, 4000)));
    close(other_store);
    let mixed = place.copy();
    mixed.wipe_index();
    copy_tree(&other.store_path().join("index"), &mixed.store_path().join("index"));
    check(&mixed, true);
    place.wipe_index();
    check(&place, true);
}

fn an_older_index_is_made_anew(io: IoChoice) {
    let mut rng = seeded();
    let place = Place::new(io, 12);
    let mut model = Model::new();
    let (store, _) = place.open();
    for version in 0..20 {
        step(&place, &store, &mut rng, &mut model, version, 30);
    }
    close(store);
    let older = place.copy();
    let (store, _) = place.open();
    for version in 20..60 {
        step(&place, &store, &mut rng, &mut model, version, 30);
    }
    assert!(store.stats().reclaimed_regions > 0, "regions were reused since the older index was made");
    // Regions may be reclaimed until the store is closed.
    close(Arc::clone(&store));
    let there: Model = model.into_iter().filter(|(name, _)| store.locate(&object_id(*name)).is_some()).collect();
    let gone: Vec<u64> = (0..30).filter(|name| !there.contains_key(name)).collect();
    drop(store);
    place.wipe_index();
    copy_tree(&older.store_path().join("index"), &place.store_path().join("index"));
    let (store, report) = place.open();
    assert!(report.index_rebuilt && report.recovered_records > 0);
    assert_model(&place, &store, &there);
    for name in gone {
        assert_eq!(get(&place, &store, name), None, "object {name} came back");
    }
    assert_eq!(store.stats().bad_reads, 0);
}

/// A damaged tail costs what was never reported durable, nothing else; and what a damaged tail leaves behind is never
/// taken for something newer.
#[test]
fn a_torn_tail_is_cut_off() {
    let mut rng = seeded();
    let place = Place::new(IoChoice::Psync, 20);
    let (store, _) = place.open();
    put(&place, &store, (0..5).map(|name| (name, 1, 9000)));
    let before = place.copy();
    // In the copies of the index these are not known: as if the power had gone before they were committed.
    put(&place, &store, (5..15).map(|name| (name, 1, 9000)));
    remove(&store, [0]);
    let locations: Vec<Location> = (5..15).map(|name| store.locate(&object_id(name)).expect("there")).collect();
    for case in 0..12 {
        let torn = place.copy();
        torn.wipe_index();
        copy_tree(&before.store_path().join("index"), &torn.store_path().join("index"));
        let hit = rng.random_range(0..locations.len());
        let location = locations[hit];
        let page = if case % 3 == 0 { 0 } else { rng.random_range(0..location.pages) };
        let mut junk = vec![0; 4096];
        if case % 2 == 0 {
            rng.fill_bytes(&mut junk);
        }
        torn.overwrite(torn.offset_of(&location) + u64::from(page) * 4096, &junk);
        let (store, report) = torn.open();
        assert!(!report.clean && !report.index_rebuilt);
        for name in 1..5 {
            assert_object(&torn, &store, name, 1, 9000);
        }
        for name in 5..15 {
            match (name - 5).cmp(&(hit as u64)) {
                std::cmp::Ordering::Less => assert_object(&torn, &store, name, 1, 9000),
                std::cmp::Ordering::Equal => assert_eq!(get(&torn, &store, name), None),
                // The log ends at the damage: what comes behind was not reported durable.
                std::cmp::Ordering::Greater => assert_eq!(get(&torn, &store, name), None),
            }
        }
        let lost: Vec<u64> = (5..15).filter(|name| get(&torn, &store, *name).is_none()).collect();
        assert_object(&torn, &store, 0, 1, 9000);
        // New records take the place of what was lost, and the lost ones never come back from behind them.
        put(&torn, &store, [(100, 1, 9000)]);
        close(store);
        torn.wipe_index();
        let (store, _) = torn.open();
        assert_object(&torn, &store, 100, 1, 9000);
        for name in lost {
            assert_eq!(get(&torn, &store, name), None, "object {name} came back from behind the end of the log");
        }
    }
}

/// A new version of an object that was cut off by the crash does not take the old one with it: not at the open, not when
/// its region goes, not with a new index.
#[test]
fn a_torn_replacement_leaves_the_old_version() {
    let place = Place::with_policy(IoChoice::Psync, 6, Arc::new(LeastRecent));
    let (store, _) = place.open();
    put(&place, &store, [(1, 1, 9000)]);
    put(&place, &store, (10..16).map(|name| (name, 1, 30_000)));
    let before = place.copy();
    put(&place, &store, [(1, 2, 9000)]);
    let replacement = store.locate(&object_id(1)).expect("there");
    let torn = place.copy();
    torn.wipe_index();
    copy_tree(&before.store_path().join("index"), &torn.store_path().join("index"));
    torn.overwrite(torn.offset_of(&replacement) + 8192, &[0; 4096]);
    let (store, _) = torn.open();
    assert_object(&torn, &store, 1, 1, 9000);
    for name in 100..160 {
        put(&torn, &store, [(name, 1, 30_000)]);
        // Looked at, so that its region stays.
        assert_object(&torn, &store, 1, 1, 9000);
    }
    assert!(store.stats().reclaimed_regions > 4);
    close(store);
    torn.wipe_index();
    assert_object(&torn, &torn.open().0, 1, 1, 9000);
}

/// The fence does it: what lies behind the end of a log stays out of it, though it is whole.
#[test]
fn what_a_crash_cut_off_never_comes_back() {
    let place = Place::new(IoChoice::Psync, 20);
    let (store, _) = place.open();
    put(&place, &store, [(1, 1, 3000)]);
    let before = place.copy();
    put(&place, &store, [(2, 1, 3000)]);
    put(&place, &store, [(1, 2, 3000), (3, 1, 3000)]);
    let cut = store.locate(&object_id(2)).expect("there");
    let crashed = place.copy();
    crashed.wipe_index();
    copy_tree(&before.store_path().join("index"), &crashed.store_path().join("index"));
    crashed.overwrite(crashed.offset_of(&cut), &[0; 4096]);
    let (store, _) = crashed.open();
    assert_object(&crashed, &store, 1, 1, 3000);
    close(store);
    crashed.wipe_index();
    let (store, report) = crashed.open();
    assert!(report.index_rebuilt);
    assert_object(&crashed, &store, 1, 1, 3000);
    assert_eq!(get(&crashed, &store, 3), None);
}

/// A rebuild goes past damage in a region: what stands behind it may be what hides something old.
#[test]
fn a_rebuild_finds_what_stands_behind_damage() {
    let place = Place::new(IoChoice::Psync, 20);
    let (store, _) = place.open();
    put(&place, &store, (0..10).map(|name| (name, 1, 5000)));
    put(&place, &store, (10..15).map(|name| (name, 1, 5000)));
    remove(&store, [0, 1]);
    put(&place, &store, [(2, 2, 5000)]);
    let hit = store.locate(&object_id(12)).expect("there");
    close(store);
    place.overwrite(place.offset_of(&hit), &[0xff; 4096]);
    place.wipe_index();
    let (store, _) = place.open();
    for name in [0, 1, 12] {
        assert_eq!(get(&place, &store, name), None);
    }
    assert_object(&place, &store, 2, 2, 5000);
    assert_object(&place, &store, 14, 1, 5000);
}

#[test]
fn decayed_superblocks_and_region_headers_are_survived() {
    let place = Place::new(IoChoice::Psync, 20);
    let (store, _) = place.open();
    put(&place, &store, (0..40).map(|name| (name, 1, 30_000)));
    close(store);
    // One copy of each is gone.
    let superblocks = place.store_path().join("superblock");
    let good = std::fs::read(&superblocks).expect("there");
    for copy in 0..2 {
        let mut bytes = good.clone();
        bytes[copy * 4096 + 100] ^= 1;
        std::fs::write(&superblocks, &bytes).expect("written");
        for region in 0..20 {
            let (at, length) = (region * REGION_BYTES + copy as u64 * 4096, 4096);
            let header = place.bytes_at(at, length);
            place.overwrite(at, &vec![0; length]);
            drop(header);
        }
        let (store, report) = place.open();
        assert_eq!(report.records, 40, "copy {copy}");
        for name in 0..40 {
            assert_object(&place, &store, name, 1, 30_000);
        }
        drop(store);
        // The other copies again, as they were.
        for region in 0..20 {
            let other = place.bytes_at(region * REGION_BYTES + (1 - copy as u64) * 4096, 4096);
            place.overwrite(region * REGION_BYTES + copy as u64 * 4096, &other);
        }
    }
    // Both headers of one region are gone: its records are misses, nothing else.
    let (store, _) = place.open();
    let lost = store.locate(&object_id(0)).expect("there").region;
    let kept: Vec<u64> =
        (0..40).filter(|name| store.locate(&object_id(*name)).is_some_and(|l| l.region != lost)).collect();
    drop(store);
    place.overwrite(u64::from(lost) * REGION_BYTES, &[0; 8192]);
    let (store, report) = place.open();
    assert_eq!((report.records, report.dropped_rows), (kept.len() as u64, 40 - kept.len() as u64));
    for name in kept {
        assert_object(&place, &store, name, 1, 30_000);
    }
    drop(store);
    std::fs::write(&superblocks, vec![0; 8192]).expect("written");
    assert_eq!(place.try_open().err().map(|error| error.kind()), Some(ErrorKind::Corrupt));
}
