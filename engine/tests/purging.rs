//! A purge takes a namespace out of DRAM and off the drive for good; who uses it goes on with an empty one, and what a
//! request holds stays readable until it lets go.

#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCK, Worker, keys, spec};

const COUNT: u32 = 32;

fn config(path: &Path) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        encryption_key_command: Some(format!("echo {}", "5e".repeat(32))),
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(64))
    };
    EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), ..EngineConfig::default() }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn id() -> NamespaceId {
    spec(&InstanceId("any".into()), BLOCK, 1, 0).namespace.id()
}

/// A second worker, of another namespace, on the same engine.
fn other(engine: &Engine) -> Worker {
    let (engine, session) = (engine.clone(), engine.start_session());
    let instance = InstanceId("other".into());
    let mut other = spec(&instance, BLOCK, 1, 0);
    other.namespace = other.namespace.with("tenant", "other");
    engine.register(session, other).expect("registered");
    Worker::beside(engine, session, instance)
}

fn info(engine: &Engine, id: &NamespaceId) -> Option<NamespaceInfo> {
    let all = engine.list_namespaces(None, usize::MAX, u64::MAX).expect("open");
    all.into_iter().find(|info| info.id == *id)
}

#[test]
fn a_purged_namespace_is_empty_and_goes_on() {
    let directory = directory();
    let mut worker = Worker::new(config(directory.path()));
    let mut other = other(&worker.engine);
    let chain = keys(COUNT, 1);
    (0..COUNT).for_each(|block| worker.fill(block, block as u8));
    assert_eq!(worker.save(&chain, BlockKey::ROOT).saved, COUNT);
    assert_eq!(other.save(&chain, BlockKey::ROOT).saved, COUNT);
    let engine = worker.engine.clone();
    engine.flush(soon()).expect("durable");
    let held = worker.lookup(&chain);
    let before = info(&engine, &id()).expect("there");
    assert_eq!((before.instances, before.dram_blocks, before.dram_bytes), (1, 32, 32 * BLOCK));
    assert_eq!(before.drive.map(|drive| (drive.records, drive.is_complete)), Some((32, true)));
    assert_eq!((before.lookup_blocks, before.hit_blocks), (32, 32));
    assert!(before.idle.is_some_and(|idle| idle < Duration::from_secs(30)));
    let failed = engine.stats().write_failed_records;

    let outcome = engine.purge(&id(), soon()).expect("purged").expect("there");
    assert_eq!((outcome.dram_blocks, outcome.drive_blocks), (32, 32));
    assert_eq!((outcome.destroyed_keys, outcome.is_swept), (1, true));
    assert_eq!(worker.lookup(&chain[..1]).hit_blocks, 0);
    assert_eq!(other.lookup(&chain).hit_blocks, COUNT, "another namespace is left alone");
    let after = info(&engine, &id()).expect("it is registered still");
    assert_eq!((after.dram_blocks, after.drive.map(|drive| drive.records)), (0, Some(0)));

    // It goes on, empty.
    let next = keys(COUNT, 2);
    assert_eq!(worker.save(&next, BlockKey::ROOT).saved, COUNT);
    assert_eq!(worker.lookup(&next).hit_blocks, COUNT);
    engine.flush(soon()).expect("durable");
    assert_eq!(engine.stats().write_failed_records, failed);
    drop(held);
    engine.close(soon()).expect("closed");
    drop((worker, other, engine));

    let mut worker = Worker::new(config(directory.path()));
    assert_eq!((worker.lookup(&chain).hit_blocks, worker.lookup(&next).hit_blocks), (0, COUNT));
    assert_eq!(worker.save(&chain[..4], BlockKey::ROOT).saved, 4, "what was purged may be saved anew");
}

/// What a lease holds is readable until it is consumed, with its own bytes: its memory is not another block's meanwhile.
#[test]
fn what_a_request_holds_stays_readable() {
    let mut worker = Worker::new(EngineConfig { dram: ByteSize::mib(16), ..EngineConfig::default() });
    let chain = keys(COUNT, 1);
    (0..COUNT).for_each(|block| worker.fill(block, block as u8));
    assert_eq!(worker.save(&chain, BlockKey::ROOT).saved, COUNT);
    let before: Vec<Vec<u8>> = (0..COUNT).map(|block| worker.memory.block(block).to_vec()).collect();
    let lease = worker.lookup(&chain).lease.expect("found");
    let outcome = worker.engine.purge(&id(), soon()).expect("purged").expect("there");
    assert_eq!((outcome.dram_blocks, outcome.drive_blocks, outcome.destroyed_keys), (32, 0, 0));
    // Others take all of the memory that there is.
    for seed in 2..130 {
        (0..COUNT).for_each(|block| worker.fill(block, seed as u8 ^ 0x5a));
        worker.save(&keys(COUNT, seed), BlockKey::ROOT);
    }
    assert_eq!(worker.lookup(&chain[..1]).hit_blocks, 0);
    let loaded = worker.load(lease, (0..COUNT).map(|index| LoadBlock { index, block: index }).collect());
    assert_eq!((loaded.loaded_dram, loaded.failed.len()), (COUNT, 0));
    for (block, bytes) in (0..).zip(&before) {
        assert!(worker.memory.block(block) == &bytes[..], "block {block} has other bytes");
    }
    assert_eq!(worker.engine.stats().leases, 0);
}

#[test]
fn saves_and_loads_under_a_purge_end_and_leave_nothing_behind() {
    let directory = directory();
    let worker = Worker::new(config(directory.path()));
    let engine = worker.engine.clone();
    std::thread::scope(|scope| {
        let savers: Vec<_> = (0..2)
            .map(|number| {
                let mut mine =
                    Worker::beside(engine.clone(), engine.start_session(), InstanceId(format!("m{number}").into()));
                engine.register(mine.session, spec(&mine.instance, BLOCK, 1, 0)).expect("registered");
                scope.spawn(move || {
                    for round in 0..60 {
                        let chain = keys(COUNT, 1000 * number + round % 7);
                        mine.save(&chain, BlockKey::ROOT);
                        let found = mine.lookup(&chain);
                        if let Some(lease) = found.lease {
                            mine.load(
                                lease,
                                (0..found.hit_blocks).map(|index| LoadBlock { index, block: index }).collect(),
                            );
                        }
                    }
                })
            })
            .collect();
        for _ in 0..12 {
            engine.purge(&id(), soon()).expect("purged").expect("there");
            std::thread::sleep(Duration::from_millis(5));
        }
        savers.into_iter().for_each(|saver| saver.join().expect("ended"));
    });
    engine.purge(&id(), soon()).expect("purged").expect("there");
    engine.flush(soon()).expect("durable");
    let left = info(&engine, &id()).expect("registered");
    assert_eq!((left.dram_blocks, left.drive.map(|drive| drive.records)), (0, Some(0)));
    assert_eq!(engine.stats().dram_dirty_bytes, 0, "{:?}", engine.stats());
    for seed in (0..7).chain(1000..1007) {
        assert_eq!(worker.lookup(&keys(COUNT, seed)).hit_blocks, 0);
    }
    assert_eq!(engine.stats().dram_used_bytes, 0, "all memory came back");
}

#[test]
fn one_that_nobody_uses_is_gone_and_objects_are_refused() {
    let directory = directory();
    let mut worker = Worker::new(config(directory.path()));
    worker.save(&keys(4, 1), BlockKey::ROOT);
    worker.engine.put(b"name", b"bytes").expect("put");
    worker.engine.flush(soon()).expect("durable");
    worker.engine.close(soon()).expect("closed");
    let engine = Engine::open(config(directory.path())).expect("opens");
    let objects = NamespaceDescriptor::objects().id();
    assert_eq!(info(&engine, &objects).and_then(|info| info.drive).map(|drive| drive.records), Some(1));
    let refused = engine.purge(&objects, soon()).expect_err("they have no end");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    let pages: Vec<NamespaceId> = (0..3)
        .scan(None, |after, _| {
            let page = engine.list_namespaces(after.as_ref(), 1, u64::MAX).expect("open");
            *after = page.first().map(|info| info.id).or(*after);
            Some(page)
        })
        .flatten()
        .map(|info| info.id)
        .collect();
    assert!(pages.len() == 2 && pages[0] < pages[1], "one page after the other: {pages:?}");
    assert_eq!(engine.purge(&id(), soon()).expect("purged").expect("there").drive_blocks, 4);
    assert_eq!(info(&engine, &id()), None);
    assert_eq!(engine.purge(&id(), soon()).expect("nothing to do"), None);
    assert_eq!(engine.get(b"name").expect("read").as_deref(), Some(&b"bytes"[..]));
}

#[test]
fn a_cache_in_dram_only_is_purged_and_goes_on() {
    let mut worker = Worker::new(EngineConfig { dram: ByteSize::mib(16), nvme: None, ..EngineConfig::default() });
    let chain = keys(4, 1);
    (0..4).for_each(|block| worker.fill(block, 1));
    assert_eq!(worker.save(&chain, BlockKey::ROOT).saved, 4);
    let outcome = worker.engine.purge(&id(), soon()).expect("purged").expect("there");
    assert_eq!((outcome.dram_blocks, outcome.drive_blocks, outcome.is_swept), (4, 0, true));
    assert_eq!(worker.lookup(&chain).hit_blocks, 0);
    assert_eq!(worker.save(&chain, BlockKey::ROOT).saved, 4);
    assert_eq!(worker.lookup(&chain).hit_blocks, 4);
}
