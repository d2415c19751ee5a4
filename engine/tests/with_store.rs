//! The engine over a store: what is durable is there after a restart, from the drive, bit for bit; bounds hold; nothing
//! that fails a check reaches a device.

#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCK, BLOCKS, Worker, keys};

const MIB: u64 = 1 << 20;

fn config(path: &Path, capacity_mib: u64, io_engine: IoEngineChoice) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        io_engine,
        // What comes from the drive is to come from there.
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(capacity_mib))
    };
    EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), ..EngineConfig::default() }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Fills the worker's blocks with bytes that depend on key and place.
fn write(worker: &mut Worker, keys: &[BlockKey]) {
    for (block, key) in keys.iter().enumerate() {
        let pattern = expected(key);
        worker.memory.block(block as u32).copy_from_slice(&pattern);
    }
}

fn expected(key: &BlockKey) -> Vec<u8> {
    key.as_bytes()
        .iter()
        .copied()
        .cycle()
        .enumerate()
        .map(|(i, byte)| byte ^ (i / 32) as u8)
        .take(BLOCK as usize)
        .collect()
}

/// Looks the keys up, loads what is found, compares; returns (from DRAM, from the drive, failed).
fn read(worker: &mut Worker, keys: &[BlockKey]) -> (u32, u32, usize) {
    let reply = worker.lookup(keys);
    let Some(lease) = reply.lease else { return (0, 0, 0) };
    (0..BLOCKS).for_each(|block| worker.memory.block(block).fill(0xa5));
    let blocks = (0..reply.hit_blocks).map(|index| LoadBlock { index, block: index }).collect();
    let outcome = worker.load(lease, blocks);
    for (index, key) in keys.iter().enumerate().take(reply.hit_blocks as usize) {
        if !outcome.failed.contains(&(index as u32)) {
            assert!(worker.memory.block(index as u32) == expected(key), "wrong bytes in block {index}");
        }
    }
    (outcome.loaded_dram, outcome.loaded_nvme, outcome.failed.len())
}

fn survives_a_restart(io_engine: IoEngineChoice) {
    let directory = directory();
    let chains: Vec<Vec<BlockKey>> = (0..8).map(|seed| keys(BLOCKS / 2, seed)).collect();
    let mut worker = Worker::new(config(directory.path(), 64, io_engine));
    for chain in &chains {
        write(&mut worker, chain);
        assert_eq!(worker.save(chain, BlockKey::ROOT).saved, BLOCKS / 2);
    }
    worker.engine.flush(soon()).expect("durable");
    let stats = worker.engine.stats();
    assert_eq!((stats.dram_dirty_bytes, stats.nvme_queued_bytes), (0, 0));
    assert_eq!(stats.latencies.durable.count(), u64::from(8 * BLOCKS / 2), "one for each block");
    assert!(stats.latencies.drive_write.count() > 0 && stats.latencies.drive_sync.count() > 0, "{:?}", stats.latencies);
    let drive = &stats.drive_uses[0];
    assert!(drive.write_bytes >= stats.appended_bytes && drive.failed_writes == 0, "{drive:?}");
    worker.engine.close(soon()).expect("closed");
    drop(worker);
    let mut worker = Worker::new(config(directory.path(), 64, io_engine));
    for chain in &chains {
        assert_eq!(read(&mut worker, chain), (0, BLOCKS / 2, 0));
        assert_eq!(read(&mut worker, chain), (BLOCKS / 2, 0, 0));
    }
    let stats = worker.engine.stats();
    assert_eq!((stats.leases, stats.operations, stats.quarantined_records), (0, 0, 0));
    let blocks = u64::from(8 * BLOCKS / 2);
    assert_eq!((stats.lookup_hit_blocks, stats.lookup_hit_dram_blocks), (2 * blocks, blocks));
    assert_eq!((stats.loaded_nvme_bytes, stats.loaded_dram_bytes), (blocks * BLOCK, blocks * BLOCK));
    assert_eq!((stats.latencies.load_nvme.count(), stats.latencies.load_dram.count()), (8, 8));
    assert!(stats.latencies.drive_read.count() > 0 && stats.drive_uses[0].read_bytes >= blocks * BLOCK);
}

#[test]
fn what_is_durable_is_there_after_a_restart_io_uring() {
    survives_a_restart(IoEngineChoice::Auto);
}

#[test]
fn what_is_durable_is_there_after_a_restart_psync() {
    survives_a_restart(IoEngineChoice::Psync);
}

/// An encrypted store: chains come back by their own keys, from DRAM, from the drive, and from the hot set that was noted.
#[test]
fn an_encrypted_store_is_the_same_to_its_users() {
    let directory = directory();
    let encrypted = |warm_start, command: &str| {
        let mut config = config(directory.path(), 64, IoEngineChoice::Auto);
        if let Some(nvme) = &mut config.nvme {
            nvme.encryption_key_command = Some(command.into());
            nvme.warm_start = warm_start;
        }
        config
    };
    let right = "printf '%064d' 7";
    let chains: Vec<Vec<BlockKey>> = (0..4).map(|seed| keys(BLOCKS / 2, seed)).collect();
    let mut worker = Worker::new(encrypted(false, right));
    for chain in &chains {
        write(&mut worker, chain);
        assert_eq!(worker.save(chain, BlockKey::ROOT).saved, BLOCKS / 2);
    }
    worker.engine.put(b"k", b"kept").expect("room");
    worker.engine.flush(soon()).expect("durable");
    worker.engine.close(soon()).expect("closed");
    drop(worker);
    for command in ["printf '%064d' 8", "echo nothing"] {
        let refused = Engine::open(encrypted(false, command)).map(drop).map_err(|error| error.kind());
        assert!(matches!(refused, Err(ErrorKind::PermissionDenied | ErrorKind::InvalidInput)), "{refused:?}");
    }
    for warm_start in [false, true] {
        let mut worker = Worker::new(encrypted(warm_start, right));
        for chain in &chains {
            let (dram, drive, failed) = read(&mut worker, chain);
            assert_eq!((dram + drive, failed), (BLOCKS / 2, 0));
            assert_eq!(read(&mut worker, chain), (BLOCKS / 2, 0, 0));
        }
        assert_eq!(worker.engine.get(b"k").expect("open").as_deref(), Some(&b"kept"[..]));
        assert_eq!(worker.engine.stats().quarantined_records, 0);
        worker.engine.close(soon()).expect("closed");
    }
}

#[test]
fn the_bound_holds_and_what_is_left_is_right() {
    let directory = directory();
    let mut worker = Worker::new(config(directory.path(), 16, IoEngineChoice::Auto));
    let chains: Vec<Vec<BlockKey>> = (0..120).map(|seed| keys(BLOCKS, seed)).collect();
    let mut left = 0;
    for chain in &chains {
        write(&mut worker, chain);
        worker.save(chain, BlockKey::ROOT);
        worker.engine.flush(soon()).expect("durable");
    }
    for chain in &chains {
        let (dram, nvme, _) = read(&mut worker, chain);
        left += dram + nvme;
    }
    let stats = worker.engine.stats();
    assert!(stats.reclaimed_regions > 0, "{stats:?}");
    assert!(stats.nvme_used_bytes <= 16 * MIB, "{stats:?}");
    assert!(left > 0 && u64::from(left) * BLOCK <= 32 * MIB, "{left}");
}

#[test]
fn a_store_is_opened_once_and_by_its_own_shape() {
    let directory = directory();
    let first = Engine::open(config(directory.path(), 64, IoEngineChoice::Auto)).expect("opens");
    let kind = |config| Engine::open(config).map(|_| ()).map_err(|error| error.kind());
    assert_eq!(kind(config(directory.path(), 64, IoEngineChoice::Auto)), Err(ErrorKind::Locked));
    first.put(b"k", b"kept").expect("room");
    first.close(soon()).expect("closed");
    let mut other_region = config(directory.path(), 64, IoEngineChoice::Auto);
    if let Some(nvme) = &mut other_region.nvme {
        nvme.region = Some(ByteSize::mib(8));
    }
    assert_eq!(kind(other_region), Err(ErrorKind::InvalidInput));
    let again = Engine::open(config(directory.path(), 64, IoEngineChoice::Auto)).expect("opens");
    assert_eq!(again.get(b"k").expect("open").as_deref(), Some(&b"kept"[..]));
}

#[test]
fn a_namespace_keeps_its_geometry_across_restarts() {
    let directory = directory();
    let worker = Worker::new(config(directory.path(), 64, IoEngineChoice::Auto));
    worker.engine.close(soon()).expect("closed");
    let engine = Engine::open(config(directory.path(), 64, IoEngineChoice::Auto)).expect("opens");
    let session = engine.start_session();
    let other = support::spec(&worker.instance, BLOCK * 2, 1, 0);
    assert_eq!(engine.register(session, other).map_err(|error| error.kind()), Err(ErrorKind::GeometryMismatch));
    engine.register(session, support::spec(&worker.instance, BLOCK, 1, 0)).expect("the same as before");
    support::assert_geometry_is_kept(&engine, session);
}

#[test]
fn objects_keep_their_newest_version_and_their_removal_across_restarts() {
    let directory = directory();
    let engine = Engine::open(config(directory.path(), 64, IoEngineChoice::Auto)).expect("opens");
    for version in 0..20u8 {
        engine.put(b"versions", &[version; 10_000]).expect("room");
        engine.put(format!("other-{version}").as_bytes(), &vec![version; 1 << 20]).expect("room");
        if version == 10 {
            engine.flush(soon()).expect("durable");
        }
    }
    assert!(engine.remove(b"other-3").expect("open"));
    assert!(engine.remove(b"other-19").expect("open"));
    engine.close(soon()).expect("closed");
    drop(engine);
    let engine = Engine::open(config(directory.path(), 64, IoEngineChoice::Auto)).expect("opens");
    assert_eq!(engine.get(b"versions").expect("open").as_deref(), Some(&[19; 10_000][..]));
    assert!(engine.get(b"other-3").expect("open").is_none() && !engine.contains(b"other-19"));
    for version in [0u8, 4, 18] {
        let name = format!("other-{version}");
        assert_eq!(engine.get(name.as_bytes()).expect("open").as_deref(), Some(&vec![version; 1 << 20][..]));
    }
}

#[test]
fn a_block_damaged_on_the_drive_is_a_miss_and_is_quarantined() {
    let directory = directory();
    let chain = keys(8, 1);
    let mut worker = Worker::new(config(directory.path(), 16, IoEngineChoice::Auto));
    write(&mut worker, &chain);
    worker.save(&chain, BlockKey::ROOT);
    worker.engine.close(soon()).expect("closed");
    drop(worker);
    // Every byte of one payload's copy on the drive is turned over.
    let regions = directory.path().join("store/regions.0");
    let mut bytes = std::fs::read(&regions).expect("the region file");
    let pattern = expected(&chain[5]);
    let at = bytes.windows(64).position(|window| window == &pattern[..64]).expect("the payload is on the drive");
    bytes[at..at + 64].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&regions, bytes).expect("written");
    let mut worker = Worker::new(config(directory.path(), 16, IoEngineChoice::Auto));
    assert_eq!(read(&mut worker, &chain), (0, 7, 1));
    assert_eq!(worker.lookup(&chain).hit_blocks, 5);
    assert_eq!(worker.engine.stats().quarantined_records, 1);
}

/// Blocks that are used outlive the regions that they were written to.
#[test]
fn what_is_used_is_still_there_after_everything_was_written_over() {
    let stats = write_everything_over(PolicyChoice::Lru);
    assert!(stats.reclaimed_regions >= 8 && stats.reinserted_records >= u64::from(BLOCKS), "{stats:?}");
    write_everything_over(PolicyChoice::Pegaflow);
}

fn write_everything_over(policy: PolicyChoice) -> Stats {
    let directory = directory();
    let config = EngineConfig { policy, ..config(directory.path(), 16, IoEngineChoice::Auto) };
    let mut worker = Worker::new(config.clone());
    let (used, unused) = (keys(BLOCKS, 1000), keys(BLOCKS, 1001));
    for chain in [&used, &unused] {
        write(&mut worker, chain);
        assert_eq!(worker.save(chain, BlockKey::ROOT).saved, BLOCKS);
    }
    worker.engine.flush(soon()).expect("durable");
    for seed in 0..60 {
        assert_eq!(read(&mut worker, &used).2, 0);
        let chain = keys(BLOCKS, seed);
        write(&mut worker, &chain);
        worker.save(&chain, BlockKey::ROOT);
        worker.engine.flush(soon()).expect("durable");
        while worker.engine.stats().nvme_used_bytes == 16 * MIB {
            std::thread::yield_now();
        }
    }
    let stats = worker.engine.stats();
    assert!(stats.reinserted_bytes * 4 <= stats.appended_bytes, "{stats:?}");
    worker.engine.close(soon()).expect("closed");
    drop(worker);
    let mut worker = Worker::new(config.clone());
    assert_eq!(read(&mut worker, &unused), (0, 0, 0));
    assert_eq!(read(&mut worker, &used), (0, BLOCKS, 0));
    stats
}

#[test]
fn budget_and_scrub_change_while_it_runs_within_their_limits() {
    let directory = directory();
    let worker = Worker::new(config(directory.path(), 64, IoEngineChoice::Auto));
    let budget = |text: &str| Some(text.parse().expect("a budget"));
    worker.engine.set_write_budget(budget("1GiB/day")).expect("above the least");
    assert_eq!(worker.engine.stats().write_budget_day_bytes, 1 << 30);
    let refused = worker.engine.set_write_budget(budget("1MiB/day")).expect_err("too little");
    assert!(refused.message().contains("give at least 64 MiB"), "{refused}");
    assert_eq!(worker.engine.stats().write_budget_day_bytes, 1 << 30, "nothing has changed");
    worker.engine.set_write_budget(None).expect("no bound");
    assert_eq!(worker.engine.stats().write_budget_day_bytes, 0);
    worker.engine.set_scrub(ByteSize(0)).expect("none");
    worker.engine.set_scrub(ByteSize::gib(17)).expect_err("above the limit");
}

/// A budget of 64 MiB a day, all of which may be saved up, and 90 MiB of blocks.
#[test]
fn the_write_budget_holds_and_goes_to_what_is_used_again() {
    let directory = directory();
    let mut config = config(directory.path(), 256, IoEngineChoice::Auto);
    if let Some(nvme) = &mut config.nvme {
        nvme.write_budget = Some("64MiB/day".parse().expect("a budget"));
    }
    let mut worker = Worker::new(config.clone());
    let chains: Vec<Vec<BlockKey>> = (0..120).map(|seed| keys(BLOCKS, seed)).collect();
    for chain in &chains {
        write(&mut worker, chain);
        assert_eq!(worker.save(chain, BlockKey::ROOT).saved, BLOCKS, "saved in DRAM, whatever the budget");
        worker.engine.flush(soon()).expect("durable");
    }
    let stats = worker.engine.stats();
    assert_eq!((stats.write_budget_day_bytes, stats.dram_dirty_bytes), (64 * MIB, 0), "{stats:?}");
    assert!((31 * MIB..33 * MIB).contains(&stats.written_day_bytes), "half of it to what is new: {stats:?}");
    assert!(stats.refused_unproven_blocks > 0 && stats.refused_ancestor_blocks > 0, "{stats:?}");
    assert_eq!(
        stats.durable_records + stats.refused_unproven_blocks + stats.refused_ancestor_blocks,
        120 * u64::from(BLOCKS)
    );
    // A refused chain that is used has been seen twice. One that is not stays unwritten.
    let (used, unused) = (&chains[119], &chains[118]);
    assert_eq!(read(&mut worker, used), (BLOCKS, 0, 0));
    worker.engine.flush(soon()).expect("durable");
    assert_eq!(worker.engine.stats().durable_records, stats.durable_records + u64::from(BLOCKS));
    worker.engine.close(soon()).expect("closed");
    drop(worker);
    let mut worker = Worker::new(config);
    let reopened = worker.engine.stats();
    assert!(reopened.written_day_bytes > stats.written_day_bytes, "what was written before the restart counts");
    assert_eq!(read(&mut worker, unused), (0, 0, 0));
    assert_eq!(read(&mut worker, used), (0, BLOCKS, 0));
    // And nothing was filled up.
    let fresh = keys(BLOCKS, 1000);
    write(&mut worker, &fresh);
    worker.save(&fresh, BlockKey::ROOT);
    let stats = worker.engine.stats();
    assert_eq!((stats.refused_unproven_blocks, stats.refused_ancestor_blocks), (1, u64::from(BLOCKS) - 1), "{stats:?}");
}

/// An instance that keeps all is not refused, neither new blocks nor those that others saved and that lie in DRAM only; what it
/// writes counts.
#[test]
fn what_is_to_be_kept_passes_the_write_budget() {
    let directory = directory();
    let mut config = config(directory.path(), 256, IoEngineChoice::Auto);
    if let Some(nvme) = &mut config.nvme {
        nvme.write_budget = Some("64MiB/day".parse().expect("a budget"));
    }
    let mut worker = Worker::new(config.clone());
    let chains: Vec<Vec<BlockKey>> = (0..130).map(|seed| keys(BLOCKS, seed)).collect();
    let (others, own) = chains.split_at(120);
    for chain in others {
        write(&mut worker, chain);
        worker.save(chain, BlockKey::ROOT);
        worker.engine.flush(soon()).expect("durable");
    }
    let before = worker.engine.stats();
    assert!(before.refused_unproven_blocks > 0, "the budget is short: {before:?}");
    let keeper = InstanceId("keeper".into());
    let spec = InstanceSpec { keeps_all: true, ..support::spec(&keeper, BLOCK, 1, 0) };
    worker.engine.register(worker.session, spec).expect("registered");
    worker.instance = keeper;
    let refused = &others[119];
    assert_eq!(worker.save(refused, BlockKey::ROOT).present, BLOCKS);
    for chain in own {
        write(&mut worker, chain);
        assert_eq!(worker.save(chain, BlockKey::ROOT).saved, BLOCKS);
        worker.engine.flush(soon()).expect("durable");
    }
    let stats = worker.engine.stats();
    assert_eq!(stats.durable_records - before.durable_records, 11 * u64::from(BLOCKS));
    assert!(stats.written_day_bytes > before.written_day_bytes, "it counts: {stats:?}");
    worker.engine.close(soon()).expect("closed");
    drop(worker);
    let mut worker = Worker::new(config);
    for chain in own.iter().chain([refused]) {
        assert_eq!(read(&mut worker, chain), (0, BLOCKS, 0));
    }
}

#[test]
fn many_objects_keep_their_places_and_need_no_more_room_than_there_is() {
    let directory = directory();
    let bytes = |number: u8| vec![number; MIB as usize];
    let names: Vec<[u8; 1]> = (0..40).map(|number| [number]).collect();
    let engine = Engine::open(config(directory.path(), 64, IoEngineChoice::Auto)).expect("open");
    for name in names.iter().filter(|name| !name[0].is_multiple_of(3)) {
        engine.put(name, &bytes(name[0])).expect("put");
    }
    engine.close(soon()).expect("close");

    let engine = Engine::open(config(directory.path(), 64, IoEngineChoice::Auto)).expect("open");
    let names: Vec<&[u8]> = names.iter().map(|name| &name[..]).collect();
    let mut seen = vec![0; names.len()];
    let take = &mut |place: usize, got: Result<Option<ObjectBytes>>| {
        seen[place] += 1;
        let expected = (!place.is_multiple_of(3)).then(|| bytes(place as u8));
        assert!(got.expect("no error").as_deref() == expected.as_deref(), "object {place}");
    };
    engine.get_each(&names, take).expect("get");
    assert_eq!(seen, vec![1; names.len()]);

    // Whoever keeps them all has as many as there is room for, and waits once for more.
    let timeout = Duration::from_secs(1);
    engine.close(soon()).expect("close");
    let short = EngineConfig { load_timeout_ms: 1_000, ..config(directory.path(), 64, IoEngineChoice::Auto) };
    let engine = Engine::open(short).expect("open");
    let (mut kept, mut busy, start) = (Vec::new(), 0, Instant::now());
    let keep = &mut |_, got: Result<Option<ObjectBytes>>| match got {
        Ok(found) => kept.extend(found),
        Err(error) => busy += usize::from(error.kind() == ErrorKind::Busy),
    };
    engine.get_each(&names, keep).expect("get");
    assert!(busy > 5 && kept.len() > 5, "{busy} without room, {} kept", kept.len());
    assert_eq!(busy + kept.len(), names.iter().filter(|name| !name[0].is_multiple_of(3)).count());
    assert!(start.elapsed() < timeout * 4, "{:?}", start.elapsed());
}
