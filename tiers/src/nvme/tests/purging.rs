//! Purging a namespace on real files: nothing of it is found again, whatever becomes of the process, of the index and of the
//! file that says so; what is registered again is empty, and others are left alone.

use super::*;
use crate::codec::CodecChoice;
use crate::nvme::encryption::EncryptionKey;

const LENGTH: u64 = 20_000;

fn groups() -> [GroupGeometry; 1] {
    [GroupGeometry { group: 0, block_bytes: LENGTH, shards: 1 }]
}

fn descriptor(tenant: &str) -> NamespaceDescriptor {
    NamespaceDescriptor::new().with("model", "m").with("tenant", tenant)
}

fn register(store: &Store, tenant: &str) -> NamespaceHandle {
    store.namespace(&descriptor(tenant), &groups()).expect("registered")
}

fn purge(store: &Store, tenant: &str) -> Option<PurgeReport> {
    store.purge(&descriptor(tenant).id(), soon()).expect("purged")
}

fn block_id(namespace: NamespaceHandle, name: u64) -> RecordId {
    RecordId { namespace, ..object_id(name) }
}

fn block(place: &Place, namespace: NamespaceHandle, name: u64, done: AppendDone) -> Append {
    let mut slot = place.slot(LENGTH as usize);
    slot.payload_mut()[..LENGTH as usize].copy_from_slice(&content(name, 9, LENGTH as usize));
    Append {
        id: block_id(namespace, name),
        kind: RecordKind::Kv,
        parent: BlockKey::ROOT,
        depth: 0,
        slot: Some(Arc::new(slot)),
        payload_bytes: LENGTH,
        done,
    }
}

fn save(place: &Place, store: &Store, namespace: NamespaceHandle, names: std::ops::Range<u64>) {
    let mut ends = Ends::new();
    for name in names {
        append(store, block(place, namespace, name, ends.done(name)));
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, result)| result.is_ok()));
}

fn found(place: &Place, store: &Store, namespace: NamespaceHandle, names: std::ops::Range<u64>) -> u64 {
    let mut found = 0;
    for name in names {
        let id = block_id(namespace, name);
        let Some(location) = store.locate(&id) else { continue };
        let bytes = read_at(place, store, id, location).expect("read");
        assert!(bytes == content(name, 9, LENGTH as usize), "block {name} has wrong bytes");
        found += 1;
    }
    found
}

fn verified(store: &Store) {
    assert_eq!(store.verify(&mut drop).expect("verified").corrupt, 0);
    assert_eq!(store.stats().bad_reads, 0);
}

fn checked(place: &Place) {
    let more_drives = place.config.more_drives.iter().map(|drive| drive.path.clone()).collect();
    let paths = StorePaths { home: place.store_path(), more_drives };
    let report = fsck_with_key(&paths, place.config.encryption.as_ref(), false, &mut drop).expect("checked");
    assert_eq!(report.problems, 0, "{report:?}");
}

/// After it was purged nothing of "theirs" is found, neither under the old number nor under a new one; "ours" is whole.
fn assert_purged(place: &Place, theirs: NamespaceHandle, handles_given: u32) {
    let (store, _) = place.open();
    assert_eq!(found(place, &store, theirs, 0..30), 0);
    assert!(store.namespaces().iter().all(|row| row.descriptor != descriptor("theirs")));
    let ours = register(&store, "ours");
    assert_eq!(found(place, &store, ours, 0..20), 20);
    let again = register(&store, "theirs");
    assert_eq!(again.0, handles_given + 1, "a number is given once");
    assert_eq!(found(place, &store, again, 0..30), 0);
    verified(&store);
    close(store);
    checked(place);
}

/// A store with 30 blocks of "theirs" and 20 of "ours", with small regions in between sealed.
fn filled(place: &Place) -> (Arc<Store>, NamespaceHandle, NamespaceHandle) {
    let (store, _) = place.open();
    let (theirs, ours) = (register(&store, "theirs"), register(&store, "ours"));
    for step in 0..10 {
        save(place, &store, theirs, step * 3..step * 3 + 3);
        save(place, &store, ours, step * 2..step * 2 + 2);
    }
    (store, theirs, ours)
}

fn what_was_purged_is_never_found_again(io: IoChoice) {
    let place = Place::new(io, 16);
    let (store, theirs, ours) = filled(&place);
    let live_before = store.stats().live_bytes;
    let usage = store.usage(theirs, u64::MAX).expect("counted");
    let report = purge(&store, "theirs").expect("there");
    assert_eq!((report.records, report.is_swept, report.destroyed_keys), (30, true, 0));
    assert_eq!((usage.records, usage.bytes, usage.is_complete), (report.records, report.bytes, true));
    assert_eq!(live_before - store.stats().live_bytes, report.bytes, "its regions are worth less");
    assert_eq!(store.usage(theirs, u64::MAX).expect("counted").records, 0);
    assert_eq!(found(&place, &store, theirs, 0..30), 0);
    assert_eq!(found(&place, &store, ours, 0..20), 20);
    assert_eq!(purge(&store, "theirs"), None, "there is no such namespace any more");
    let mut ends = Ends::new();
    let refused = store.append(block(&place, theirs, 1, ends.done(1))).expect_err("its number is over");
    assert_eq!(refused.1.kind(), ErrorKind::NotFound);
    drop(refused);
    drop(ends);
    let error = store.purge(&NamespaceDescriptor::objects().id(), soon()).expect_err("objects are not a namespace");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    // As a kill leaves it, and a kill that takes the index with it.
    let (killed, rebuilt) = (place.copy(), place.copy());
    rebuilt.wipe_index();
    // It goes on, and what it saves from now on stays.
    let again = register(&store, "theirs");
    assert_ne!(again, theirs);
    assert_eq!(found(&place, &store, again, 0..30), 0);
    save(&place, &store, again, 5..15);
    assert_eq!(found(&place, &store, again, 0..30), 10);
    verified(&store);
    let (killed_later, rebuilt_later) = (place.copy(), place.copy());
    rebuilt_later.wipe_index();
    close(store);
    checked(&place);
    for place in [&killed, &rebuilt] {
        assert_purged(place, theirs, 2);
    }
    for place in [&killed_later, &rebuilt_later, &place] {
        let (store, _) = place.open();
        assert_eq!(register(&store, "theirs"), again);
        assert_eq!((found(place, &store, theirs, 0..30), found(place, &store, again, 0..30)), (0, 10));
        assert_eq!(found(place, &store, again, 5..15), 10);
        assert_eq!(found(place, &store, ours, 0..20), 20);
        verified(&store);
        close(store);
        checked(place);
    }
}

/// Purged again and again, with saves between: each rebuild has what came after the last one.
fn a_namespace_may_be_purged_many_times(io: IoChoice) {
    let place = Place::new(io, 16);
    for round in 0..4 {
        let (store, _) = place.open();
        let now = register(&store, "theirs");
        assert_eq!(found(&place, &store, now, 0..30), if round == 0 { 0 } else { 3 });
        save(&place, &store, now, 0..4);
        assert_eq!(purge(&store, "theirs").map(|report| report.is_swept), Some(true));
        let next = register(&store, "theirs");
        save(&place, &store, next, 10 + round..13 + round);
        close(store);
        place.wipe_index();
    }
}

/// Saves go on while it is purged: none that ended well is found, none of what was in flight becomes visible.
fn what_is_on_its_way_does_not_become_visible(io: IoChoice) {
    for round in 0..8 {
        let place = Place::new(io, 16);
        let (store, _) = place.open();
        let (theirs, ours) = (register(&store, "theirs"), register(&store, "ours"));
        let mut ends = Ends::new();
        for name in 0..60 {
            append(&store, block(&place, ours, name, ends.done(1000 + name)));
            match store.append(block(&place, theirs, name, ends.done(name))) {
                Ok(()) => {}
                Err((refused, error)) => {
                    assert!(matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Busy), "{error}");
                    // Uncalled: it was never accepted.
                    ends.expected -= 1;
                    drop(refused);
                }
            }
            if name == 10 + round * 5 {
                assert!(purge(&store, "theirs").expect("there").is_swept);
            }
        }
        store.flush(soon()).expect("what was purged does not fail a flush");
        for (name, result) in ends.wait() {
            match result {
                Err(error) if name < 1000 => assert!(matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Closed)),
                result => assert!(result.is_ok(), "{name}: {result:?}"),
            }
        }
        assert_eq!((found(&place, &store, theirs, 0..60), found(&place, &store, ours, 0..60)), (0, 60));
        let again = register(&store, "theirs");
        assert_eq!(found(&place, &store, again, 0..60), 0);
        let rebuilt = place.copy();
        rebuilt.wipe_index();
        close(store);
        checked(&place);
        for place in [&rebuilt, &place] {
            let (store, _) = place.open();
            let again = register(&store, "theirs");
            assert_eq!((found(place, &store, theirs, 0..60), found(place, &store, again, 0..60)), (0, 0));
            assert_eq!(found(place, &store, ours, 0..60), 60);
            close(store);
        }
    }
}

/// Regions of dead records are reclaimed as others are, and nothing of them is written again.
fn its_space_is_given_back(io: IoChoice) {
    let place = Place::new(io, 8);
    let (store, theirs, ours) = filled(&place);
    assert!(purge(&store, "theirs").is_some());
    let again = register(&store, "theirs");
    for name in 100..500 {
        save(&place, &store, again, name..name + 1);
    }
    assert!(store.stats().reclaimed_regions > 8, "{:?}", store.stats());
    assert_eq!((found(&place, &store, theirs, 0..30), found(&place, &store, again, 0..30)), (0, 0));
    assert!(found(&place, &store, ours, 0..20) < 20, "its regions were the oldest");
    verified(&store);
    close(store);
    checked(&place);
}

fn the_end_of_a_namespace_outlives_its_entry(io: IoChoice) {
    let place = Place::new(io, 16);
    let (store, theirs, _) = filled(&place);
    assert!(purge(&store, "theirs").is_some());
    let torn = place.copy();
    close(store);
    // The entry decays: the index has it too.
    let path = place.store_path().join("namespaces");
    let good = std::fs::read(&path).expect("read");
    let end = good.chunks_exact(512).position(|entry| entry.starts_with(b"PEGANEND")).expect("there") * 512;
    assert_eq!(end, 1024, "it is appended");
    let mut bytes = good.clone();
    bytes[end + 73] ^= 1;
    std::fs::write(&path, &bytes).expect("written");
    checked(&place);
    assert_purged(&place, theirs, 2);
    // By now "theirs" is registered again, which says the end once more: neither entry alone is needed.
    let good = std::fs::read(&path).expect("read");
    let ends: Vec<usize> = (0..good.len()).step_by(512).filter(|at| good[*at..].starts_with(b"PEGANEND")).collect();
    assert_eq!(ends.len(), 2, "the damaged one is written over or behind, and said again with the next registration");
    for damaged in ends {
        let copy = place.copy();
        let mut bytes = good.clone();
        bytes[damaged + 41] ^= 4;
        std::fs::write(copy.store_path().join("namespaces"), &bytes).expect("written");
        copy.wipe_index();
        let (store, _) = copy.open();
        let again = register(&store, "theirs");
        assert_eq!((found(&copy, &store, theirs, 0..30), found(&copy, &store, again, 0..30)), (0, 0));
        close(store);
    }
    // Torn by a crash it counts for nothing: the purge was not reported.
    let path = torn.store_path().join("namespaces");
    let mut bytes = std::fs::read(&path).expect("read");
    bytes.truncate(end + 100);
    std::fs::write(&path, &bytes).expect("written");
    torn.wipe_index();
    let (store, _) = torn.open();
    assert_eq!(found(&torn, &store, theirs, 0..30), 30);
    assert!(purge(&store, "theirs").is_some());
    close(store);
    assert_purged(&torn, theirs, 2);
}

/// A crash after the end of the namespace and before anything else: the next open does the rest.
fn the_next_open_ends_what_a_crash_cut_off(io: IoChoice) {
    let mut place = Place::new(io, 16);
    place.config.encryption = Some(EncryptionKey::from_bytes([1; 32]));
    let (store, theirs, _) = filled(&place);
    let before = place.copy();
    assert!(purge(&store, "theirs").is_some());
    close(store);
    let after = std::fs::read(place.store_path().join("namespaces")).expect("read");
    std::fs::write(before.store_path().join("namespaces"), after).expect("written");
    let (store, report) = before.open();
    assert!(!report.index_rebuilt && report.dropped_rows >= 30, "{report:?}");
    assert_eq!(store.usage(theirs, u64::MAX).expect("counted").records, 0);
    close(store);
    for file in ["keys.0", "keys.1"] {
        let keys = std::fs::read(before.store_path().join(file)).expect("read");
        let is_theirs = |entry: &[u8]| entry[40..72] == *descriptor("theirs").id().as_bytes();
        let states: Vec<u8> = keys.chunks_exact(512).filter(|entry| is_theirs(entry)).map(|entry| entry[18]).collect();
        assert_eq!(states, [3], "the key of {file} is destroyed");
    }
    assert_purged(&before, theirs, 2);
}

fn its_key_goes_with_it(io: IoChoice) {
    let mut place = Place::new(io, 16);
    (place.config.encryption, place.config.codec) = (Some(EncryptionKey::from_bytes([1; 32])), CodecChoice::None);
    let (store, theirs, _) = filled(&place);
    let location = store.locate(&block_id(theirs, 3)).expect("there");
    let wrapped = |place: &Place| {
        let keys = std::fs::read(place.store_path().join("keys.0")).expect("read");
        let theirs = keys.chunks_exact(512).find(|entry| entry[40..72] == *descriptor("theirs").id().as_bytes());
        theirs.expect("there")[88..136].to_vec()
    };
    let key = wrapped(&place);
    assert_eq!(purge(&store, "theirs").map(|report| report.destroyed_keys), Some(1));
    let refused = read_at(&place, &store, block_id(theirs, 3), location).expect_err("purged");
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    close(store);
    let payload = content(3, 9, LENGTH as usize);
    for (path, bytes) in files(&place.store_path()) {
        let has = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(!has(&payload[..64]) && !has(&key), "{}", path.display());
    }
    assert_eq!(wrapped(&place), [0; 48]);
    // Who says that it was never purged gets no further: the key is gone.
    let path = place.store_path().join("namespaces");
    let forged = place.copy();
    let mut bytes = std::fs::read(&path).expect("read");
    bytes.truncate(1024);
    std::fs::write(forged.store_path().join("namespaces"), bytes).expect("written");
    forged.wipe_index();
    let (store, report) = forged.open();
    assert_eq!((report.recovered_records, found(&forged, &store, theirs, 0..30)), (20, 0));
    close(store);
    assert_purged(&place, theirs, 2);
}

fn files(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(path).expect("listed").map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![(path.clone(), std::fs::read(&path).expect("read"))],
        })
        .collect()
}

/// Writes that fail are written once more, with a sequence behind the purge: not those of what was purged.
fn a_write_that_fails_does_not_bring_it_back(io: IoChoice) {
    for failing in 3..12 {
        let place = Place::new(io, 16);
        let (store, _drive) =
            place.open_faulty(FaultPlan::default().fail(IoKind::Write, failing, FaultAction::Errno(libc::EIO)));
        let theirs = register(&store, "theirs");
        let mut ends = Ends::new();
        for name in 0..12 {
            append(&store, block(&place, theirs, name, ends.done(name)));
        }
        assert!(purge(&store, "theirs").is_some());
        let again = register(&store, "theirs");
        store.flush(soon()).expect("flushed");
        drop(ends.wait());
        assert_eq!((found(&place, &store, theirs, 0..12), found(&place, &store, again, 0..12)), (0, 0));
        // If it was not needed before, the fault may hit this.
        drop(store.close(soon()));
        drop(store);
        place.wipe_index();
        let (store, _) = place.open();
        assert_eq!(found(&place, &store, register(&store, "theirs"), 0..12), 0);
        close(store);
    }
}

/// One whose end could not be written is hidden, is not registered anew, and may be purged once more.
#[test]
fn a_purge_that_fails_can_be_tried_again() {
    let place = Place::new(IoChoice::Auto, 16);
    let (store, theirs, ours) = filled(&place);
    let late = store.purge(&descriptor("theirs").id(), Instant::now()).err().map(|error| error.kind());
    if late.is_some() {
        assert_eq!(late, Some(ErrorKind::Timeout));
        assert_eq!(found(&place, &store, theirs, 0..30), 0);
        let refused = store.namespace(&descriptor("theirs"), &groups()).map_err(|error| error.kind());
        assert_eq!(refused, Err(ErrorKind::Busy));
        assert!(store.namespaces().iter().any(|row| row.handle == theirs), "somebody has to end it");
        assert_eq!(purge(&store, "theirs").map(|report| report.records), Some(30));
    }
    assert_eq!(found(&place, &store, ours, 0..20), 20);
    assert_ne!(register(&store, "theirs"), theirs);
    close(store);
}

on_engines_and_drives!(
    what_was_purged_is_never_found_again,
    a_namespace_may_be_purged_many_times,
    what_is_on_its_way_does_not_become_visible,
    its_space_is_given_back,
    the_end_of_a_namespace_outlives_its_entry,
    the_next_open_ends_what_a_crash_cut_off,
    its_key_goes_with_it,
    a_write_that_fails_does_not_bring_it_back,
);
