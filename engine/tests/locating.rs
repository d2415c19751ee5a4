//! Where blocks are, told key by key: what left DRAM is told to have left it, with and without a drive, and asking changes
//! nothing.

#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCKS, Worker, keys, spec};

fn dram_only() -> EngineConfig {
    EngineConfig { dram: ByteSize::mib(16), ..EngineConfig::default() }
}

fn with_store(path: &Path) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(256))
    };
    EngineConfig { nvme: Some(nvme), ..dram_only() }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn locate(worker: &Worker, keys: &[BlockKey]) -> Result<Vec<Option<HitTier>>> {
    let (instance, tenant) = (worker.instance.clone(), worker.tenant.clone());
    let whose = Whose::Instance(instance);
    worker.engine.locate(worker.session, &LocateRequest { whose, tenant, group: 0, keys: keys.to_vec() })
}

fn locate_in(worker: &Worker, namespace: NamespaceId, keys: &[BlockKey]) -> Result<Vec<Option<HitTier>>> {
    let (whose, tenant) = (Whose::Namespace(namespace), worker.tenant.clone());
    worker.engine.locate(worker.session, &LocateRequest { whose, tenant, group: 0, keys: keys.to_vec() })
}

/// Saves chains until DRAM has been full at least once.
fn fill(worker: &mut Worker) -> Vec<BlockKey> {
    let mut all = Vec::new();
    for chain in 0..64 {
        let chain = keys(BLOCKS, 100 + chain);
        assert_eq!(worker.save(&chain, BlockKey::ROOT).dropped, 0);
        worker.engine.flush(soon()).expect("durable");
        all.extend(chain);
    }
    assert!(worker.engine.stats().dram_evicted_blocks > 0, "DRAM was never full");
    all
}

#[test]
fn each_block_is_told_of_by_itself_and_nobody_elses() {
    let mut worker = Worker::new(dram_only());
    let chain = keys(3, 1);
    worker.save(&chain, BlockKey::ROOT);
    let asked = [keys(1, 2)[0], chain[2], chain[0]];
    assert_eq!(locate(&worker, &asked).expect("told"), [None, Some(HitTier::Dram), Some(HitTier::Dram)]);
    worker.tenant = Some(TenantId::new("somebody").expect("a name"));
    assert_eq!(locate(&worker, &asked).expect("told"), [None; 3]);
}

#[test]
fn what_left_dram_is_nowhere_without_a_drive_and_asking_keeps_nothing() {
    let mut worker = Worker::new(dram_only());
    let first = keys(BLOCKS, 1);
    worker.save(&first, BlockKey::ROOT);
    for chain in 0..64 {
        assert_eq!(worker.save(&keys(BLOCKS, 100 + chain), BlockKey::ROOT).dropped, 0);
        locate(&worker, &first).expect("told");
    }
    assert_eq!(locate(&worker, &first).expect("told"), vec![None; first.len()]);
    let stats = worker.engine.stats();
    assert_eq!((stats.lookup_blocks, stats.leases), (0, 0));
}

#[test]
fn what_left_dram_is_on_the_drive() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut worker = Worker::new(with_store(directory.path()));
    let all = fill(&mut worker);
    let told = locate(&worker, &all).expect("told");
    let count = |tier| told.iter().filter(|told| **told == tier).count() as u64;
    assert_eq!(count(None), 0);
    assert_eq!(count(Some(HitTier::Dram)), worker.engine.stats().dram_blocks);
    assert!(count(Some(HitTier::Nvme)) > 0);
}

#[test]
fn a_block_is_as_far_away_as_its_farthest_shard() {
    let engine = Engine::open(dram_only()).expect("opens");
    let instance = InstanceId("test".into());
    let mut workers: Vec<_> = (0..2)
        .map(|shard| {
            let session = engine.start_session();
            let mut worker = Worker::beside(engine.clone(), session, instance.clone());
            worker.shard = shard;
            worker
        })
        .collect();
    let register = |worker: &Worker| {
        let spec = spec(&instance, support::BLOCK, 2, worker.shard);
        engine.register(worker.session, spec).expect("registered");
    };
    let chain = keys(2, 1);
    register(&workers[0]);
    let error = locate(&workers[0], &chain).expect_err("one worker is missing");
    assert_eq!(error.kind(), ErrorKind::Busy);
    register(&workers[1]);
    workers[0].save(&chain, BlockKey::ROOT);
    assert_eq!(locate(&workers[0], &chain).expect("told"), [None; 2], "one shard of two");
    workers[1].save(&chain[..1], BlockKey::ROOT);
    assert_eq!(locate(&workers[0], &chain).expect("told"), [Some(HitTier::Dram), None]);
}

#[test]
fn too_many_keys_and_strangers_are_refused() {
    let worker = Worker::new(dram_only());
    let error = locate(&worker, &vec![BlockKey::ROOT; 65_537]).expect_err("one too many");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let request =
        LocateRequest { whose: Whose::Instance(worker.instance.clone()), tenant: None, group: 0, keys: Vec::new() };
    let error = worker.engine.locate(SessionId(999), &request).expect_err("no such session");
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_namespace_is_asked_about_without_its_instance_and_after_a_restart() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut worker = Worker::new(with_store(directory.path()));
    let (chain, of_tenant) = (keys(3, 1), keys(2, 7));
    worker.save(&chain, BlockKey::ROOT);
    worker.tenant = Some(TenantId::new("somebody").expect("a name"));
    worker.save(&of_tenant, BlockKey::ROOT);
    worker.engine.flush(soon()).expect("durable");
    let namespace = worker.engine.namespace_of(&worker.instance).expect("registered");
    assert_eq!(locate_in(&worker, namespace, &of_tenant).expect("told"), [Some(HitTier::Dram); 2]);
    assert_eq!(locate_in(&worker, namespace, &chain).expect("told"), [None; 3], "those of nobody are not the tenant's");
    worker.engine.close(soon()).expect("closes");
    // An engine that no worker has registered with.
    let engine = Engine::open(with_store(directory.path())).expect("opens");
    let instance = worker.instance.clone();
    let mut stranger = Worker::beside(engine.clone(), engine.start_session(), instance.clone());
    let until = soon();
    let told = loop {
        match locate_in(&stranger, namespace, &chain) {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            told => break told.expect("told"),
        }
    };
    assert_eq!(told, [Some(HitTier::Nvme); 3]);
    stranger.tenant = Some(TenantId::new("somebody").expect("a name"));
    assert_eq!(locate_in(&stranger, namespace, &of_tenant).expect("told"), [Some(HitTier::Nvme); 2]);
    assert_eq!(locate_in(&stranger, NamespaceId::from_bytes([7; 32]), &chain).expect("told"), [None; 3]);
    assert_eq!(engine.namespace_of(&instance).expect_err("nobody").kind(), ErrorKind::NotFound);
}
