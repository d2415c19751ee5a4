//! Blocks go from a worker's memory through shared memory and the engine and come back bit for bit; whatever happens in
//! between, every accepted operation ends exactly once.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use pegaflow_engine::{ErrorKind, GroupGeometry, LeaseId, LoadBlock, LoadOutcome, OperationId, SaveOutcome};
use pegaflow_server::ServerConfig;
use pegaflow_server::client::{ClientConfig, CompletionResult, Endpoint};
use support::{BLOCK_BYTES, BLOCKS, Local, PATIENCE, Worker, until};

fn saved(saved: u32, present: u32) -> CompletionResult {
    CompletionResult::Save(SaveOutcome { saved, present, dropped: 0 })
}

fn loaded(count: u32) -> CompletionResult {
    CompletionResult::Load(LoadOutcome { loaded_dram: count, loaded_nvme: 0, failed: vec![] })
}

#[test]
fn what_was_saved_is_loaded_bit_for_bit_whatever_the_size_of_staging() {
    // Staging of 1, 3 and all blocks: one chunk a block, a few, and one in all.
    for staging in [1, 3 * BLOCK_BYTES, 1 << 20] {
        let local = Local::start();
        let mut worker = Worker::new(Endpoint::Unix(local.socket.clone()), staging);
        worker.register();
        worker.client.wait_connected(PATIENCE).expect("connects");
        let count = BLOCKS / 2;
        (0..count).for_each(|block| worker.fill(block, block as u8));
        let operation = worker.start_save(count).expect("accepted");
        assert_eq!(worker.wait(operation), saved(count, 0), "staging of {staging} bytes");
        let operation = worker.start_save(count).expect("accepted");
        assert_eq!(worker.wait(operation), saved(0, count));
        let found = worker.lookup(count + 1).expect("answers");
        assert_eq!((found.hit_blocks, found.dram_blocks), (count, count));
        let operation = worker.start_load(count);
        assert_eq!(worker.wait(operation), loaded(count), "staging of {staging} bytes");
        for block in 0..count {
            assert!(worker.read(block) == worker.read(BLOCKS - count + block), "block {block}, staging {staging}");
        }
        assert!(worker.client.poll().is_empty());
        worker.client.close(PATIENCE);
        until("everything is given back", || {
            let stats = local.engine.stats();
            (local.server().sessions(), local.server().shared_bytes(), stats.leases, stats.operations) == (0, 0, 0, 0)
        });
    }
}

#[test]
fn bad_calls_are_refused_at_once_and_end_in_no_completion() {
    let local = Local::start();
    let worker = local.worker();
    let kind = |result: pegaflow_engine::Result<()>| result.map_err(|error| error.kind());
    let load =
        |operation, block| kind(worker.client.load(operation, LeaseId(1), 0, vec![LoadBlock { index: 0, block }]));
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
    worker.client.save(operation, unknown, 0, 0, Worker::saves(3)).expect("accepted");
    assert_eq!(
        worker.wait(operation),
        CompletionResult::Save(SaveOutcome { saved: 0, present: 0, dropped: 3 }),
        "an unknown instance"
    );
    let empty = worker.operation();
    worker.client.load(empty, LeaseId(1), 0, vec![]).expect("accepted");
    assert_eq!(worker.wait(empty), CompletionResult::Load(LoadOutcome::default()));
    worker.client.close(PATIENCE);
    assert_eq!(load(OperationId(9), 0), Err(ErrorKind::Closed));
    assert_eq!(worker.lookup(1).map_err(|error| error.kind()), Err(ErrorKind::Closed));
}

#[test]
fn another_geometry_for_the_same_instance_is_refused_for_good() {
    let local = Local::start();
    let first = local.worker();
    let second = Worker::new(Endpoint::Unix(local.socket.clone()), 1 << 20);
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
    let other = Worker::new(Endpoint::Unix(local.socket.clone()), 1 << 20);
    assert_eq!(
        first.client.register(Worker::spec(), other.memory()).map_err(|error| error.kind()),
        Err(ErrorKind::InvalidInput),
        "one client is one worker"
    );
}

#[test]
fn shared_memory_is_bounded_and_comes_back_with_the_session() {
    let config =
        ServerConfig { session_shared_memory: pegaflow_engine::ByteSize(3 * BLOCK_BYTES), ..ServerConfig::default() };
    let local = Local::with(&config, None);
    let worker = Worker::new(Endpoint::Unix(local.socket.clone()), 64 * BLOCK_BYTES);
    worker.client.wait_connected(PATIENCE).expect("connects");
    let refused = worker.client.register(Worker::spec(), worker.memory()).map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::InvalidInput), "more than a session may have");
    drop(worker);
    until("the session is gone", || local.server().sessions() == 0);
    let small = Worker::new(Endpoint::Unix(local.socket.clone()), 2 * BLOCK_BYTES);
    small.register();
    small.client.wait_connected(PATIENCE).expect("fits");
    assert!(local.server().shared_bytes() > 0);
    drop(small);
    until("its memory is unmapped", || local.server().shared_bytes() == 0);
}

#[test]
fn a_client_over_tcp_looks_up_and_cannot_share_memory() {
    let local = Local::with(&ServerConfig::default(), Some("127.0.0.1:0".parse().expect("an address")));
    let mut worker = local.worker();
    worker.fill(0, 1);
    let operation = worker.start_save(1).expect("accepted");
    worker.wait(operation);
    let remote = Worker::new(Endpoint::Tcp(local.tcp.expect("listens")), 1 << 20);
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
