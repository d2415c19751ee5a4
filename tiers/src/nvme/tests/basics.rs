//! What a store does when nothing goes wrong.

use super::*;

on_both_engines!(
    records_of_many_sizes_come_back,
    a_clean_close_loses_nothing_and_recovers_nothing,
    blocks_are_found_by_prefix,
    removed_records_are_gone_and_can_come_back,
    the_queue_is_bounded_and_gives_back_what_it_refuses,
);

fn lengths(count: u64) -> impl Iterator<Item = (u64, u64, usize)> {
    (0..count).map(|name| (name, 1, 1 + (name * 7919 % 20_000) as usize))
}

fn records_of_many_sizes_come_back(io: IoChoice) {
    let place = Place::new(io, 200);
    let (store, report) = place.open();
    assert_eq!((report.records, report.index_rebuilt, report.clean), (0, true, true));
    put(&place, &store, lengths(2000));
    for (name, version, length) in lengths(2000) {
        assert_object(&place, &store, name, version, length);
    }
    assert_eq!(store.locate(&object_id(9999)), None);
    let stats = store.stats();
    assert_eq!((stats.records, stats.appended_records, stats.bad_reads, stats.queued_bytes), (2000, 2000, 0, 0));
    close(store);
}

fn a_clean_close_loses_nothing_and_recovers_nothing(io: IoChoice) {
    let place = Place::new(io, 100);
    for round in 0..4u64 {
        let (store, report) = place.open();
        assert_eq!((report.records, report.recovered_records, report.clean), (round * 200, 0, true));
        assert_eq!(report.index_rebuilt, round == 0);
        put(&place, &store, (0..200).map(|i| (round * 200 + i, round, 3000)));
        for name in 0..(round + 1) * 200 {
            assert_object(&place, &store, name, name / 200, 3000);
        }
        close(store);
    }
}

fn blocks_are_found_by_prefix(io: IoChoice) {
    let place = Place::new(io, 100);
    let (store, _) = place.open();
    let groups = [GroupGeometry { group: 0, block_bytes: 8192, shards: 2 }];
    let namespace = store.namespace(&NamespaceDescriptor::new().with("model", "m"), &groups).expect("registered");
    let ids: Vec<RecordId> = (0..64u64)
        .map(|block| RecordId { namespace, group: 0, shard: 1, key: BlockKey::from_name(&block.to_be_bytes()) })
        .collect();
    let mut ends = Ends::new();
    for (depth, id) in ids.iter().enumerate().filter(|(depth, _)| *depth != 40) {
        let mut slot = place.slot(8192);
        slot.payload_mut().copy_from_slice(&content(depth as u64, 0, 8192));
        let parent = depth.checked_sub(1).map_or(BlockKey::ROOT, |before| ids[before].key);
        append(
            &store,
            Append {
                id: *id,
                kind: RecordKind::Kv,
                parent,
                depth: depth as u32,
                slot: Some(Arc::new(slot)),
                payload_bytes: 8192,
                done: ends.done(depth as u64),
            },
        );
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    let mut found = Vec::new();
    store.locate_prefix(&ids, &mut found);
    assert_eq!(found.len(), 40);
    let pins = store.pin(&found).expect("pinned");
    for (depth, (id, location)) in ids.iter().zip(&found).enumerate() {
        assert_eq!(store.locate(id), Some(*location));
        assert!(read_at(&place, &store, *id, *location).expect("read") == content(depth as u64, 0, 8192));
    }
    drop(pins);
    let wrong_shard = RecordId { shard: 0, ..ids[3] };
    assert_eq!(store.locate(&wrong_shard), None);
    close(store);
    let (store, _) = place.open();
    assert_eq!(store.namespace(&NamespaceDescriptor::new().with("model", "m"), &groups).expect("known"), namespace);
    let others = [GroupGeometry { group: 0, block_bytes: 4096, shards: 2 }];
    let refused = store.namespace(&NamespaceDescriptor::new().with("model", "m"), &others);
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::GeometryMismatch));
    store.locate_prefix(&ids, &mut found);
    assert_eq!(found.len(), 40);
}

fn removed_records_are_gone_and_can_come_back(io: IoChoice) {
    let place = Place::new(io, 100);
    let (store, _) = place.open();
    put(&place, &store, (0..100).map(|name| (name, 1, 5000)));
    remove(&store, (0..100).filter(|name| name % 3 == 0));
    put(&place, &store, (0..100).filter(|name| name % 6 == 0).map(|name| (name, 2, 6000)));
    let check = |store: &Store| {
        for name in 0..100 {
            match name {
                _ if name % 6 == 0 => assert_object(&place, store, name, 2, 6000),
                _ if name % 3 == 0 => assert_eq!(get(&place, store, name), None),
                _ => assert_object(&place, store, name, 1, 5000),
            }
        }
    };
    check(&store);
    close(store);
    let (store, _) = place.open();
    check(&store);
    close(store);
    place.wipe_index();
    let (store, report) = place.open();
    assert!(report.index_rebuilt);
    check(&store);
}

fn the_queue_is_bounded_and_gives_back_what_it_refuses(io: IoChoice) {
    let mut place = Place::new(io, 100);
    place.config.write_queue_bytes = 64 * KIB;
    place.config.commit_interval = Duration::from_secs(3600);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    let held = Fault { kind: IoKind::Write, first: drive.seen(IoKind::Write) + 2, times: 8, action: FaultAction::Hold };
    drive.inject(held);
    let mut ends = Ends::new();
    let mut refused = 0;
    for name in 0..100 {
        if let Err((back, error)) = store.append(object(&place, name, 1, 12 * 1024, ends.done(name))) {
            assert_eq!((error.kind(), back.id), (ErrorKind::Busy, object_id(name)));
            refused += 1;
            drop(back);
            ends.expected -= 1;
        }
    }
    assert_eq!(refused, 96);
    assert_eq!(store.stats().queued_bytes, 64 * KIB);
    drive.release();
    store.flush(soon()).expect("flushed");
    assert_eq!(ends.wait().len(), 4);
    assert_eq!(store.stats().queued_bytes, 0);
    close(store);
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let place = Place::new(IoChoice::Psync, 4);
    let (store, _) = place.open();
    let groups = [GroupGeometry { group: 0, block_bytes: 8192, shards: 2 }];
    let namespace = store.namespace(&NamespaceDescriptor::new().with("model", "m"), &groups).expect("registered");
    let huge = [GroupGeometry { group: 0, block_bytes: REGION_BYTES, shards: 2 }];
    let refused = store.namespace(&NamespaceDescriptor::new().with("model", "huge"), &huge);
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    let kind = |change: &dyn Fn(&mut Append)| {
        let mut append = object(&place, 1, 1, 8192, Box::new(drop));
        change(&mut append);
        store.append(append).err().map(|(_, error)| error.kind())
    };
    let bad = Some(ErrorKind::InvalidInput);
    let block = |append: &mut Append| (append.kind, append.id.namespace) = (RecordKind::Kv, namespace);
    assert_eq!(kind(&|append| append.payload_bytes = 0), bad);
    assert_eq!(kind(&|append| append.payload_bytes = 8193), bad);
    assert_eq!(kind(&|append| append.slot = None), bad);
    assert_eq!(kind(&|append| append.kind = RecordKind::Tombstone), bad);
    assert_eq!(kind(&|append| append.kind = RecordKind::Kv), bad);
    assert_eq!(kind(&|append| append.id.namespace = namespace), bad);
    assert_eq!(kind(&|append| append.id.namespace = NamespaceHandle(77)), Some(ErrorKind::NotFound));
    assert_eq!(kind(&|append| (block(append), append.id.shard = 2).1), bad);
    assert_eq!(kind(&|append| (block(append), append.payload_bytes = 4096).1), bad);
    assert_eq!(kind(&|append| (block(append), append.id.group = 1).1), Some(ErrorKind::NotFound));
    assert_eq!(kind(&|append| *append = object(&place, 1, 1, REGION_BYTES as usize, Box::new(drop))), bad);
    assert_eq!(kind(&|append| block(append)), None);
    assert_eq!(kind(&|append| *append = object(&place, 1, 1, REGION_BYTES as usize - 12288, Box::new(drop))), None);
    store.flush(soon()).expect("flushed");
    let location = store.locate(&object_id(1)).expect("there");
    let small = Arc::new(place.slot(4096));
    let refused = store.read(object_id(1), location, small, IoPriority::Demand, Box::new(|_| unreachable!()));
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    store.close(soon()).expect("closed");
    assert_eq!(kind(&|_| ()), Some(ErrorKind::Closed));
    assert_eq!(store.flush(soon()).map_err(|error| error.kind()), Err(ErrorKind::Closed));
    let slot = Arc::new(place.slot(1 << 20));
    let refused = store.read(object_id(1), location, slot, IoPriority::Demand, Box::new(|_| unreachable!()));
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::Closed));
    store.close(soon()).expect("closing twice is allowed");
}

#[test]
fn a_store_is_opened_as_it_was_made_or_larger() {
    let mut place = Place::new(IoChoice::Psync, 8);
    let kind = |place: &Place| place.try_open().err().map(|error| error.kind());
    let (store, _) = place.open();
    put(&place, &store, (0..20).map(|name| (name, 1, 9000)));
    let error = place.try_open().expect_err("locked");
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.message().contains(&std::process::id().to_string()), "{error}");
    close(store);
    let good = place.config.clone();
    let changes: [fn(&mut StoreConfig); 6] = [
        |config| config.region_bytes *= 2,
        |config| config.region_bytes = 5000,
        |config| config.region_bytes = 0,
        |config| config.capacity_bytes = 3 * REGION_BYTES,
        |config| config.queue_depth = 0,
        |config| config.commit_bytes = 0,
    ];
    for change in changes {
        place.config = good.clone();
        change(&mut place.config);
        assert_eq!(kind(&place), Some(ErrorKind::InvalidInput), "{:?}", place.config);
    }
    place.config = StoreConfig { capacity_bytes: 1 << 60, region_bytes: 8 << 30, ..good.clone() };
    place.config.path = place.directory.path().join("huge");
    assert_eq!(kind(&place), Some(ErrorKind::InvalidInput), "more regions than there are numbers");
    place.config.capacity_bytes = 1 << 50;
    assert_eq!(kind(&place), Some(ErrorKind::NoSpace));
    assert!(!place.config.path.join("regions.0").exists(), "nothing is left of it");
    place.config = StoreConfig { capacity_bytes: 16 * REGION_BYTES, ..good };
    let (store, report) = place.open();
    assert_eq!((report.records, store.regions().len()), (20, 16));
    for name in 0..20 {
        assert_object(&place, &store, name, 1, 9000);
    }
    close(store);
    std::fs::write(place.store_path().join("VERSION"), "pegaflow-store 7\n").expect("written");
    assert_eq!(kind(&place), Some(ErrorKind::NewerFormat));
    std::fs::remove_file(place.store_path().join("VERSION")).expect("removed");
    assert_eq!(kind(&place), Some(ErrorKind::ForeignFormat));
    assert!(place.store_path().join("regions.0").exists(), "nothing is lost");
}

#[test]
fn on_tmpfs_it_works_through_the_page_cache() {
    let mut place = Place::new(IoChoice::Auto, 8);
    let memory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    place.config.path = memory.path().join("store");
    let (store, _) = place.open();
    put(&place, &store, (0..20).map(|name| (name, 1, 9000)));
    close(store);
    let (store, _) = place.open();
    for name in 0..20 {
        assert_object(&place, &store, name, 1, 9000);
    }
}

#[test]
fn the_last_handle_may_go_in_a_callback() {
    let place = Place::new(IoChoice::Auto, 8);
    let (store, _) = place.open();
    let (sender, receiver) = unbounded();
    let handle = Arc::clone(&store);
    let done = move |_| {
        drop(handle);
        sender.send(()).expect("listened to");
    };
    append(&store, object(&place, 1, 1, 4096, Box::new(done)));
    drop(store);
    receiver.recv_timeout(PATIENCE).expect("called");
    let until = soon();
    while place.try_open().is_err() {
        assert!(Instant::now() < until, "the lock is given up");
        std::thread::sleep(Duration::from_millis(5));
    }
}
