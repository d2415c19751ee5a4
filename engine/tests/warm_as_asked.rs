//! An operator has namespaces brought to DRAM: those that are meant, the most used blocks first and none without its
//! ancestors, within the free room; never a wrong byte, and nobody who is there already is driven out.
#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCK, BLOCKS, Worker, keys, read, save, soon};

fn config(path: &Path, dram_mib: u64) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        codec: CodecChoice::None,
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(128))
    };
    EngineConfig { dram: ByteSize::mib(dram_mib), nvme: Some(nvme), ..EngineConfig::default() }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn namespace(model: &str) -> NamespaceDescriptor {
    NamespaceDescriptor::new().with("model", model)
}

/// A worker of another model on the same engine.
fn of_model(engine: &Engine, model: &str) -> Worker {
    let session = engine.start_session();
    let instance = InstanceId(model.into());
    let groups = vec![GroupGeometry { group: 0, block_bytes: BLOCK, shards: 1 }];
    let spec =
        InstanceSpec { instance: instance.clone(), namespace: namespace(model), groups, shard: 0, keeps_all: false };
    engine.register(session, spec).expect("registered");
    Worker::beside(engine.clone(), session, instance)
}

fn ended(engine: &Engine) -> WarmRun {
    let deadline = soon();
    loop {
        let run = engine.warming().expect("open");
        if run.state != WarmRunState::Running {
            return run;
        }
        assert!(Instant::now() < deadline, "not in time: {run:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_namespace_that_is_meant_comes_and_no_other() {
    let directory = directory();
    let mut worker = of_model(&Engine::open(config(directory.path(), 32)).expect("opens"), "a");
    (0..4).for_each(|number| save(&mut worker, &keys(BLOCKS, number)));
    let mut other = of_model(&worker.engine, "b");
    save(&mut other, &keys(BLOCKS, 50));
    worker.engine.close(soon()).expect("closed");

    let mut worker = of_model(&Engine::open(config(directory.path(), 32)).expect("opens"), "a");
    let engine = worker.engine.clone();
    let mut other = of_model(&engine, "b");
    assert_eq!(engine.warming().expect("open"), WarmRun::default());
    assert_eq!(engine.stats().dram_blocks, 0);
    assert_eq!(engine.start_warming(&[namespace("a").id()]).expect("begins").number, 1);
    let run = ended(&engine);
    let blocks = 4 * u64::from(BLOCKS);
    assert_eq!((run.state, run.namespaces, run.listed_blocks), (WarmRunState::Done, 1, blocks), "{run:?}");
    assert_eq!((run.seen_blocks, run.missing_blocks), (blocks, 0), "{run:?}");
    assert_eq!((run.read_blocks, run.read_bytes), (blocks, blocks * BLOCK), "{run:?}");
    assert_eq!(engine.stats().dram_blocks, blocks);
    (0..4).for_each(|number| assert_eq!(read(&mut worker, &keys(BLOCKS, number)), (BLOCKS, 0)));
    assert_eq!(other.lookup(&keys(BLOCKS, 50)).dram_blocks, 0);

    engine.start_warming(&[]).expect("all");
    let run = ended(&engine);
    assert_eq!((run.state, run.number, run.read_blocks), (WarmRunState::Done, 2, u64::from(BLOCKS)), "{run:?}");
    assert_eq!(read(&mut other, &keys(BLOCKS, 50)), (BLOCKS, 0));
    // And out again, but for what a request holds. What the drive has is read from there.
    let lease = worker.lookup(&keys(BLOCKS, 0)).lease.expect("found");
    let evict = || {
        let EvictOutcome { namespaces, dram_blocks, dram_bytes, kept_blocks } =
            engine.evict(&BlockChoice::of(&[namespace("a").id()])).expect("known");
        assert_eq!((namespaces, dram_bytes), (1, dram_blocks * BLOCK));
        (dram_blocks, kept_blocks)
    };
    assert_eq!(evict(), (3 * u64::from(BLOCKS), u64::from(BLOCKS)));
    engine.release(lease);
    assert_eq!(evict(), (u64::from(BLOCKS), 0));
    (0..4).for_each(|number| assert_eq!(read(&mut worker, &keys(BLOCKS, number)), (0, BLOCKS)));
    assert_eq!(read(&mut other, &keys(BLOCKS, 50)), (BLOCKS, 0));
    assert_eq!(engine.evict(&BlockChoice::default()).expect("all").dram_blocks, 5 * u64::from(BLOCKS));
    assert_eq!(
        engine.evict(&BlockChoice::of(&[namespace("c").id()])).expect_err("unknown").kind(),
        ErrorKind::NotFound
    );
    let unknown = engine.start_warming(&[namespace("c").id()]).expect_err("unknown");
    assert_eq!(unknown.kind(), ErrorKind::NotFound, "{unknown}");
}

/// Three times as much as DRAM takes.
#[test]
fn the_most_used_come_first_whole_chains_and_only_into_free_room() {
    let directory = directory();
    let config = EngineConfig { policy: PolicyChoice::Lru, ..config(directory.path(), 16) };
    let mut worker = Worker::new(config.clone());
    let chains: Vec<_> = (0..48).map(|number| keys(BLOCKS, number)).collect();
    chains.iter().for_each(|chain| save(&mut worker, chain));
    worker.engine.close(soon()).expect("closed");

    // Uses are counted from the open on: two old chains are used more than others, and then driven out by
    // some that are purged.
    let mut worker = Worker::new(config);
    let engine = worker.engine.clone();
    let used = [&chains[3], &chains[11]];
    for _ in 0..3 {
        for chain in used {
            read(&mut worker, chain);
        }
    }
    chains[20..34].iter().for_each(|chain| assert_eq!(read(&mut worker, chain), (0, BLOCKS)));
    let mut other = of_model(&engine, "other");
    (100..126).for_each(|number| save(&mut other, &keys(BLOCKS, number)));
    assert!(used.iter().all(|chain| worker.lookup(chain).dram_blocks == 0), "driven out");
    engine.purge(&namespace("other").id(), soon()).expect("purged");
    let before = engine.stats();
    engine.start_warming(&[]).expect("begins");
    let run = ended(&engine);
    assert_eq!(run.state, WarmRunState::Full, "{run:?}");
    let stats = engine.stats();
    assert!(stats.dram_used_bytes > 13 << 20 && stats.dram_used_bytes <= (16 << 20) / 10 * 9, "{stats:?}");
    let evicted = stats.dram_evicted_blocks - before.dram_evicted_blocks;
    assert_eq!((evicted, stats.fetched_hot_set.no_room_blocks), (0, 0), "nobody is driven out");
    assert_eq!(run.read_blocks + before.dram_blocks, stats.dram_blocks);
    assert!(run.listed_blocks < 48 * u64::from(BLOCKS), "no more than DRAM could take: {run:?}");
    for chain in used {
        assert_eq!(worker.lookup(chain).dram_blocks, BLOCKS, "used ones are there");
    }
    assert_eq!(worker.lookup(&chains[47]).dram_blocks, BLOCKS, "the youngest is");
    assert_eq!(worker.lookup(&chains[0]).dram_blocks, 0, "the oldest is not");
    let whole: u64 = chains.iter().map(|chain| u64::from(worker.lookup(chain).dram_blocks)).sum();
    assert!(whole + 2 * u64::from(BLOCKS) > stats.dram_blocks, "{whole} of {} have their ancestors", stats.dram_blocks);
}

#[test]
fn what_can_not_be_done_is_said() {
    let without = Worker::new(EngineConfig { dram: ByteSize::mib(16), ..EngineConfig::default() });
    let kind = |told: Result<WarmRun>| told.expect_err("refused").kind();
    assert_eq!(kind(without.engine.start_warming(&[])), ErrorKind::NotFound);
    let directory = directory();
    let key = directory.path().join("key");
    std::fs::write(&key, "11".repeat(32)).expect("written");
    std::process::Command::new("chmod").arg("600").arg(&key).status().expect("chmod");
    let mut config = config(directory.path(), 16);
    config.nvme.iter_mut().for_each(|nvme| nvme.encryption_key_file = Some(key.clone()));
    let sealed = Worker::new(config);
    assert_eq!(kind(sealed.engine.start_warming(&[])), ErrorKind::Unsupported);
    assert_eq!(sealed.engine.stop_warming().expect("none goes on").state, WarmRunState::None);
}
