//! Blocks go from a worker's memory through the server's memory and the engine and come back bit for bit; whatever happens in
//! between, every accepted operation ends exactly once.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use pegaflow_engine::{ErrorKind, GroupGeometry, HitTier, LeaseId, LoadBlock, LoadOutcome, OperationId, SaveOutcome};
use pegaflow_server::ServerConfig;
use pegaflow_server::client::{ClientConfig, CompletionResult, Endpoint};
use support::{BLOCKS, Local, PATIENCE, Worker, until};

fn saved(saved: u32, present: u32) -> CompletionResult {
    CompletionResult::Save(SaveOutcome { saved, present, dropped: 0 })
}

fn loaded(count: u32) -> CompletionResult {
    CompletionResult::Load(LoadOutcome { loaded_dram: count, loaded_nvme: 0, failed: vec![] })
}

#[test]
fn what_was_saved_is_loaded_bit_for_bit() {
    let local = Local::start();
    let mut worker = local.worker();
    let count = BLOCKS / 2;
    (0..count).for_each(|block| worker.fill(block, block as u8));
    let operation = worker.start_save(count).expect("accepted");
    assert_eq!(worker.wait(operation), saved(count, 0));
    let operation = worker.start_save(count).expect("accepted");
    assert_eq!(worker.wait(operation), saved(0, count));
    let found = worker.lookup(count + 1).expect("answers");
    assert_eq!((found.hit_blocks, found.dram_blocks), (count, count));
    let told = worker.locate(&[count, 0, count - 1]).expect("answers");
    assert_eq!(told, [None, Some(HitTier::Dram), Some(HitTier::Dram)]);
    let operation = worker.start_load(count);
    assert_eq!(worker.wait(operation), loaded(count));
    for block in 0..count {
        assert!(worker.read(block) == worker.read(BLOCKS - count + block), "block {block}");
    }
    assert!(worker.client.poll().is_empty());
    worker.client.close(PATIENCE);
    until("everything is given back", || {
        let stats = local.engine.stats();
        (local.server().sessions(), stats.leases, stats.operations) == (0, 0, 0)
    });
}

#[test]
fn a_worker_loads_from_told_places_by_itself_even_when_the_server_has_just_gone() {
    for server_is_there in [true, false] {
        let mut local = Local::start();
        let mut worker = local.worker();
        let count = BLOCKS / 2;
        (0..count).for_each(|block| worker.fill(block, block as u8));
        let operation = worker.start_save(count).expect("accepted");
        assert_eq!(worker.wait(operation), saved(count, 0));
        let found = worker.lookup_with(count, true).expect("answers");
        let (lease, places) = (found.lease.expect("a lease"), found.places.expect("all are in DRAM"));
        assert_eq!(worker.client.arena().expect("reaches it"), Some(places.arena));
        if !server_is_there {
            local.stop().expect("stops");
            until("the session is lost", || !worker.client.is_connected());
        }
        let blocks: Vec<_> =
            places.places.iter().enumerate().map(|(i, place)| (BLOCKS - count + i as u32, *place)).collect();
        let load = |arena, blocks: &[_], remaining, before| {
            let operation = worker.operation();
            let remaining = Duration::from_secs(remaining);
            let started =
                worker.client.load_placed(operation, lease, 0, arena, blocks.to_vec(), remaining, (0, before));
            started.map(|()| operation).map_err(|error| error.kind())
        };
        assert_eq!(load(pegaflow_engine::ArenaId(1), &blocks, 60, true), Err(ErrorKind::NotFound), "another arena");
        assert_eq!(load(places.arena, &blocks, 1, true), Err(ErrorKind::Timeout), "a lease that is nearly over");
        let outside = [(0, pegaflow_engine::Place(u32::MAX))];
        assert_eq!(load(places.arena, &outside, 60, true), Err(ErrorKind::InvalidInput), "outside the arena");
        for before in [true, false] {
            (BLOCKS - count..BLOCKS).for_each(|block| worker.fill(block, 99));
            let operation = worker.operation();
            let remaining = Duration::from_secs(60);
            worker
                .client
                .load_placed(operation, lease, 0, places.arena, blocks.clone(), remaining, (0, before))
                .expect("started");
            assert_eq!(worker.wait(operation), loaded(count));
            for block in 0..count {
                assert!(worker.read(block) == worker.read(BLOCKS - count + block), "block {block}");
            }
        }
        if server_is_there {
            until("the lease is consumed", || local.engine.stats().leases == 0);
        }
    }
}

#[test]
fn bad_calls_are_refused_at_once_and_end_in_no_completion() {
    let local = Local::start();
    let worker = local.worker();
    let kind = |result: pegaflow_engine::Result<()>| result.map_err(|error| error.kind());
    let load =
        |operation, block| kind(worker.client.load(operation, LeaseId(1), 0, vec![LoadBlock { index: 0, block }], 0));
    assert_eq!(load(OperationId(1), BLOCKS), Err(ErrorKind::InvalidInput), "outside the memory");
    assert_eq!(load(OperationId(2), 0), Ok(()));
    assert_eq!(load(OperationId(2), 0), Err(ErrorKind::InvalidInput), "its number is in use until it is polled");
    // The lease is unknown: the load ends, and its block has failed.
    let failed = LoadOutcome { failed: vec![0], ..LoadOutcome::default() };
    assert_eq!(worker.wait(OperationId(2)), CompletionResult::Load(failed.clone()));
    assert_eq!(load(OperationId(2), 0), Ok(()));
    assert_eq!(worker.wait(OperationId(2)), CompletionResult::Load(failed));
    let operation = worker.operation();
    let unknown = pegaflow_engine::InstanceId("nobody".into());
    worker.client.save(operation, unknown.into(), Worker::saves(3), 0).expect("accepted");
    assert_eq!(
        worker.wait(operation),
        CompletionResult::Save(SaveOutcome { saved: 0, present: 0, dropped: 3 }),
        "an unknown instance"
    );
    let empty = worker.operation();
    worker.client.load(empty, LeaseId(1), 0, vec![], 0).expect("accepted");
    assert_eq!(worker.wait(empty), CompletionResult::Load(LoadOutcome::default()));
    worker.client.close(PATIENCE);
    assert_eq!(load(OperationId(9), 0), Err(ErrorKind::Closed));
    assert_eq!(worker.lookup(1).map_err(|error| error.kind()), Err(ErrorKind::Closed));
}

#[test]
fn another_geometry_for_the_same_instance_is_refused_for_good() {
    let local = Local::start();
    let first = local.worker();
    let second = Worker::new(Endpoint::Unix(local.socket.clone()));
    second.client.wait_connected(PATIENCE).expect("connects");
    let mut spec = Worker::spec();
    spec.groups = vec![GroupGeometry { shards: 2, ..spec.groups[0] }];
    let refused = second.client.register(spec.clone(), second.memory()).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::GeometryMismatch));
    assert_eq!(second.start_save(1).map(|_| ()).map_err(|error| error.kind()), Err(ErrorKind::GeometryMismatch));
    assert!(second.lookup(1).is_ok(), "the session itself is good");
    let mut wrong = Worker::spec();
    wrong.groups[0].block_bytes += 16;
    assert_eq!(
        second.client.register(wrong, second.memory()).map_err(|error| error.kind()),
        Err(ErrorKind::InvalidInput),
        "memory of another block size"
    );
    assert_eq!(first.client.register(Worker::spec(), first.memory()).map_err(|error| error.kind()), Ok(()), "again");
    let other = Worker::new(Endpoint::Unix(local.socket.clone()));
    assert_eq!(
        first.client.register(Worker::spec(), other.memory()).map_err(|error| error.kind()),
        Err(ErrorKind::InvalidInput),
        "one client is one worker"
    );
}

#[test]
fn a_client_over_tcp_looks_up_and_cannot_share_memory() {
    let local = Local::with(&ServerConfig::default(), Some("127.0.0.1:0".parse().expect("an address")));
    let mut worker = local.worker();
    worker.fill(0, 1);
    let operation = worker.start_save(1).expect("accepted");
    worker.wait(operation);
    let remote = Worker::new(Endpoint::Tcp(local.tcp.expect("listens")));
    remote.client.wait_connected(PATIENCE).expect("connects");
    assert_eq!(remote.lookup(1).expect("answers").hit_blocks, 1);
    let stats = remote.client.stats().expect("answers");
    assert_eq!(stats["engine"]["saved_blocks"], 1);
    assert_eq!(stats["sessions"], 2);
    remote.client.flush(PATIENCE).expect("nothing to do");
    let refused = remote.client.register(Worker::spec(), remote.memory()).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::Unsupported));
}

#[test]
fn without_a_server_nothing_waits() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut config = ClientConfig::new(Endpoint::Unix(directory.path().join("none.sock")), "test");
    config.lookup_timeout = Duration::from_secs(3600);
    let worker = Worker::with(config);
    worker.register();
    assert!(!worker.client.is_connected());
    assert_eq!(worker.lookup(1).map_err(|error| error.kind()), Err(ErrorKind::Closed));
    assert_eq!(worker.start_save(1).map_err(|error| error.kind()), Err(ErrorKind::Closed));
    assert_eq!(worker.client.flush(PATIENCE).map_err(|error| error.kind()), Err(ErrorKind::Closed));
    assert_eq!(
        worker.client.wait_connected(Duration::from_millis(10)).map_err(|error| error.kind()),
        Err(ErrorKind::Timeout)
    );
    assert!(!worker.client.wait_completion(Duration::from_millis(1)) && worker.client.poll().is_empty());
    worker.client.close(PATIENCE);
    let _kept: Arc<_> = worker.memory();
}
