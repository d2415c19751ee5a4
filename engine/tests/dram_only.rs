//! The engine without a store: what is saved is found, loaded bit for bit, and nothing is promised that is not there.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCK, BLOCKS, Worker, keys, spec};

fn dram(mib: u64) -> EngineConfig {
    EngineConfig { dram: ByteSize::mib(mib), ..EngineConfig::default() }
}

#[test]
fn what_was_saved_is_found_and_comes_back_bit_for_bit() {
    let mut worker = Worker::new(dram(16));
    let keys = keys(8, 1);
    (0..8).for_each(|block| worker.fill(block, block as u8));
    assert_eq!(worker.save(&keys, BlockKey::ROOT), SaveOutcome { saved: 8, present: 0, dropped: 0 });
    assert_eq!(worker.save(&keys, BlockKey::ROOT), SaveOutcome { saved: 0, present: 8, dropped: 0 });
    let reply = worker.lookup(&[&keys[..], &support::keys(1, 2)[..]].concat());
    assert_eq!((reply.hit_blocks, reply.dram_blocks), (8, 8));
    let blocks = (0..8).map(|i| LoadBlock { index: i, block: 63 - i }).collect();
    let outcome = worker.load(reply.lease.expect("a lease"), blocks);
    assert_eq!(outcome, LoadOutcome { loaded_dram: 8, loaded_nvme: 0, failed: vec![] });
    for block in 0..8 {
        let saved = worker.memory.block(block).to_vec();
        assert_eq!(worker.memory.block(63 - block), saved);
    }
    let stats = worker.engine.stats();
    assert_eq!((stats.leases, stats.operations, stats.dram_dirty_bytes), (0, 0, 0));
    assert_eq!((stats.lookup_hit_blocks, stats.lookup_hit_dram_blocks), (8, 8));
    assert_eq!((stats.saved_bytes, stats.loaded_dram_bytes, stats.loaded_nvme_bytes), (8 * BLOCK, 8 * BLOCK, 0));
    let times = &stats.latencies;
    assert_eq!((times.lookup.count(), times.save.count(), times.load_dram.count()), (1, 2, 1));
    assert_eq!((times.load_nvme.count(), times.drive_read.count()), (0, 0), "there is no drive");
}

#[test]
fn a_block_whose_ancestor_is_missing_is_dropped_with_its_descendants() {
    let mut worker = Worker::new(dram(16));
    let keys = keys(8, 1);
    let outcome = worker.save(&keys[1..], keys[0]);
    assert_eq!(outcome, SaveOutcome { saved: 0, present: 0, dropped: 7 });
    assert_eq!(worker.engine.stats().save_orphan_blocks, 7);
    assert_eq!(worker.lookup(&keys).hit_blocks, 0);
}

#[test]
fn a_lease_is_consumed_once_and_a_lost_one_is_refused() {
    let mut worker = Worker::new(dram(16));
    let keys = keys(2, 1);
    worker.save(&keys, BlockKey::ROOT);
    let lease = worker.lookup(&keys).lease.expect("a lease");
    let replaced_by = worker.lookup(&keys).lease.expect("a lease");
    let request = |lease, worker: &Worker| LoadRequest {
        session: worker.session,
        operation: OperationId(9),
        lease,
        shard: 0,
        memory: worker.kv_cache(),
        blocks: vec![LoadBlock { index: 0, block: 0 }],
    };
    let refused = worker.engine.load(request(lease, &worker), Box::new(|_| panic!("not to be called")));
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::NotFound));
    assert_eq!(worker.load(replaced_by, vec![LoadBlock { index: 1, block: 5 }]).loaded_dram, 1);
}

#[test]
fn whoever_is_told_the_places_finds_the_bytes_there_until_it_says_that_it_has_them() {
    let mut worker = Worker::new(dram(16));
    let keys = keys(3, 1);
    (0..3).for_each(|block| worker.fill(block, block as u8));
    worker.save(&keys, BlockKey::ROOT);
    let request = LookupRequest {
        instance: worker.instance.clone(),
        tenant: None,
        group: 0,
        keys: keys.clone(),
        lease: Some(Duration::from_secs(60)),
        tag: 1,
        with_places: true,
        question: None,
        prefetch: false,
    };
    let reply = worker.engine.lookup(worker.session, &request).expect("looked up");
    let places = reply.places.expect("all are in DRAM");
    let arena = worker.engine.arena();
    assert_eq!((places.arena, places.places.len()), (arena.id(), 3));
    let blocks = places.places.into_iter().enumerate().map(|(i, place)| (10 + i as u32, place)).collect();
    let copy = PlacedCopy {
        arena,
        direction: CopyDirection::ToDevice,
        blocks,
        after: None,
        cancelled: Arc::default(),
        done: Box::new(|result| result.expect("copied")),
    };
    worker.memory.device.clone().load_before(copy, 0).expect("copied");
    for block in 0..3 {
        let saved = worker.memory.block(block).to_vec();
        assert_eq!(worker.memory.block(10 + block), saved);
    }
    let lease = reply.lease.expect("a lease");
    assert_eq!(worker.engine.stats().leases, 1);
    worker.engine.consume(lease, 0);
    worker.engine.consume(lease, 0);
    let stats = worker.engine.stats();
    assert_eq!((stats.leases, stats.loaded_dram_blocks), (0, 3));
}

#[test]
fn an_instance_is_found_only_when_all_of_its_shards_are_there() {
    let engine = Engine::open(dram(16)).expect("opens");
    let instance = InstanceId("tp2".into());
    let (first, second) = (engine.start_session(), engine.start_session());
    engine.register(first, spec(&instance, BLOCK, 2, 0)).expect("registered");
    assert!(!engine.is_registered(&instance));
    let other = engine.register(second, spec(&instance, BLOCK * 2, 2, 1));
    assert_eq!(other.map_err(|error| error.kind()), Err(ErrorKind::GeometryMismatch));
    engine.register(second, spec(&instance, BLOCK, 2, 1)).expect("registered");
    assert!(engine.is_registered(&instance));
    engine.end_session(second, Duration::from_secs(1)).expect("ended");
    assert!(!engine.is_registered(&instance));
    engine.end_session(first, Duration::from_secs(1)).expect("ended");
    assert_eq!(engine.stats().instances, 0);
}

#[test]
fn a_worker_that_comes_and_goes_does_not_take_the_shard_of_another() {
    let worker = Worker::new(dram(16));
    let second = worker.engine.start_session();
    worker.engine.register(second, spec(&worker.instance, BLOCK, 1, 0)).expect("the same worker, started again");
    worker.engine.end_session(second, Duration::from_secs(1)).expect("ended");
    assert!(worker.engine.is_registered(&worker.instance), "the first is still there");
    worker.engine.end_session(worker.session, Duration::from_secs(1)).expect("ended");
    assert!(!worker.engine.is_registered(&worker.instance));
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let worker = Worker::new(dram(16));
    let kind = |spec| worker.engine.register(worker.session, spec).map_err(|error| error.kind());
    assert_eq!(kind(spec(&InstanceId("a".into()), 0, 1, 0)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(spec(&InstanceId("a".into()), 17, 1, 0)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(spec(&InstanceId("a".into()), BLOCK, 1, 1)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(spec(&InstanceId("".into()), BLOCK, 1, 0)), Err(ErrorKind::InvalidInput));
    let objects = InstanceSpec { namespace: NamespaceDescriptor::objects(), ..spec(&worker.instance, BLOCK, 1, 0) };
    assert_eq!(kind(objects), Err(ErrorKind::InvalidInput));
    let stranger = worker.engine.register(SessionId(999), spec(&InstanceId("a".into()), BLOCK, 1, 0));
    assert_eq!(stranger.map_err(|error| error.kind()), Err(ErrorKind::NotFound));
    let request = LookupRequest {
        instance: InstanceId("nobody".into()),
        tenant: None,
        group: 0,
        keys: keys(1, 1),
        lease: None,
        tag: 0,
        with_places: false,
        question: None,
        prefetch: false,
    };
    assert_eq!(worker.engine.lookup(worker.session, &request).map_err(|e| e.kind()), Err(ErrorKind::NotFound));
    assert_eq!(worker.engine.stats().instances, 1);
}

#[test]
fn dram_that_is_full_of_leased_blocks_drops_saves_and_serves_again_afterwards() {
    let mut worker = Worker::new(dram(16));
    let mut leases = Vec::new();
    let mut dropped = 0;
    for seed in 0..64 {
        let keys = keys(BLOCKS, seed);
        dropped += worker.save(&keys, BlockKey::ROOT).dropped;
        let request = LookupRequest {
            instance: worker.instance.clone(),
            tenant: None,
            group: 0,
            keys,
            lease: Some(Duration::from_secs(60)),
            tag: seed.into(),
            with_places: false,
            question: None,
            prefetch: false,
        };
        leases.extend(worker.engine.lookup(worker.session, &request).expect("looked up").lease);
    }
    assert!(dropped > 0);
    let stats = worker.engine.stats();
    assert_eq!(stats.save_dropped_blocks + stats.save_orphan_blocks, u64::from(dropped));
    assert_eq!((stats.save_dropped_room_blocks, stats.save_dropped_copy_blocks), (stats.save_dropped_blocks, 0));
    assert_eq!((stats.save_dropped_queue_blocks, stats.save_dropped_cancelled_blocks), (0, 0));
    leases.into_iter().for_each(|lease| worker.engine.release(lease));
    assert_eq!(worker.save(&keys(BLOCKS, 1000), BlockKey::ROOT).saved, BLOCKS);
}

#[test]
fn objects_are_put_replaced_and_removed() {
    let engine = Engine::open(dram(16)).expect("opens");
    assert!(engine.get(b"a").expect("open").is_none());
    engine.put(b"a", b"one").expect("room");
    let one = engine.get(b"a").expect("open").expect("there");
    engine.put(b"a", &[2; 100_000]).expect("room");
    assert_eq!(&*one, b"one");
    assert_eq!(engine.get(b"a").expect("open").as_deref(), Some(&[2; 100_000][..]));
    assert!(engine.contains(b"a") && engine.remove(b"a").expect("open"));
    assert!(!engine.contains(b"a") && !engine.remove(b"a").expect("open"));
    assert_eq!(engine.put(b"b", b"").map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    assert_eq!(engine.put(b"b", &vec![0; 5 << 20]).map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    engine.close(Instant::now() + Duration::from_secs(5)).expect("closed");
    assert_eq!(engine.put(b"a", b"x").map_err(|error| error.kind()), Err(ErrorKind::Closed));
    assert_eq!(engine.get(b"a").map(|_| ()).map_err(|error| error.kind()), Err(ErrorKind::Closed));
}

#[test]
fn a_namespace_keeps_its_geometry_as_long_as_the_engine_lives() {
    let worker = Worker::new(dram(16));
    support::assert_geometry_is_kept(&worker.engine, worker.session);
}

#[test]
fn saves_are_taken_while_a_large_dram_is_still_growing() {
    let mut worker = Worker::new(dram(2048));
    let (mut ready, keys) = (worker.engine.stats().dram_ready_bytes, keys(8, 1));
    assert!(ready >= 256 << 20, "{ready} bytes are ready when the engine is open");
    assert_eq!(worker.save(&keys, BlockKey::ROOT).saved, 8);
    assert_eq!(worker.lookup(&keys).hit_blocks, 8);
    let deadline = Instant::now() + Duration::from_secs(60);
    while ready < 2048 << 20 {
        assert!(Instant::now() < deadline, "{ready} bytes are ready");
        std::thread::sleep(Duration::from_millis(1));
        let stats = worker.engine.stats();
        assert!(stats.dram_ready_bytes >= ready && stats.dram_capacity_bytes == 2048 << 20);
        ready = stats.dram_ready_bytes;
    }
    assert_eq!(worker.lookup(&keys).hit_blocks, 8);
}
