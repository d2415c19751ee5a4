//! A store that fails under a running engine: blocks live on in DRAM, readiness says why, nothing wrong is ever loaded, and
//! when the drive is well again the store comes back, with what came meanwhile.

#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use pegaflow_tiers::{BlockIo, Fault, FaultAction, FaultPlan, Faulty, IoKind};
use support::{BLOCK, BLOCKS, Worker, keys, spec};

const KINDS: [IoKind; 3] = [IoKind::Read, IoKind::Write, IoKind::Sync];

fn config(path: &Path) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(64))
    };
    EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), commit_interval_ms: 20, ..EngineConfig::default() }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

type FaultyIo = Faulty<Arc<dyn BlockIo>>;

/// A drive that can be broken and mended, across opens of the store.
#[derive(Clone, Default)]
struct Drive {
    state: Arc<Mutex<(FaultPlan, Option<Arc<FaultyIo>>)>>,
}

impl Drive {
    fn engine(&self, path: &Path) -> Engine {
        let state = Arc::clone(&self.state);
        let wrap = move |io| -> Arc<dyn BlockIo> {
            let mut state = state.lock().expect("not poisoned");
            let faulty = Arc::new(Faulty::new(io, state.0.clone()).expect("a faulty drive"));
            state.1 = Some(Arc::clone(&faulty));
            faulty
        };
        Engine::open_wrapped(config(path), wrap).expect("opens")
    }

    fn worker(&self, path: &Path) -> Worker {
        Worker::of(self.engine(path))
    }

    /// Everything of these kinds fails from now on, also after the next open.
    fn fail(&self, kinds: &[IoKind], errno: i32) {
        let mut state = self.state.lock().expect("not poisoned");
        for &kind in kinds {
            let fault = Fault { kind, first: 1, times: u64::MAX, action: FaultAction::Errno(errno) };
            state.0 = std::mem::take(&mut state.0).with(fault);
            state.1.as_ref().expect("open").inject(fault);
        }
    }

    fn mend(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        state.0 = FaultPlan::default();
        state.1.as_ref().expect("open").heal();
    }

    fn syncs(&self) -> u64 {
        self.state.lock().expect("not poisoned").1.as_ref().expect("open").seen(IoKind::Sync)
    }
}

fn pattern(key: &BlockKey) -> Vec<u8> {
    let bytes = key.as_bytes().iter().copied().cycle().enumerate().map(|(i, byte)| byte ^ (i / 32) as u8);
    bytes.take(BLOCK as usize).collect()
}

fn save(worker: &mut Worker, keys: &[BlockKey]) -> SaveOutcome {
    for (block, key) in keys.iter().enumerate() {
        worker.memory.block(block as u32).copy_from_slice(&pattern(key));
    }
    worker.save(keys, BlockKey::ROOT)
}

/// Looks up and loads; returns (from DRAM, from the drive, failed). What was loaded is right.
fn load(worker: &mut Worker, keys: &[BlockKey]) -> (u32, u32, usize) {
    let reply = worker.lookup(keys);
    reply.lease.map_or((0, 0, 0), |lease| load_leased(worker, lease, keys, reply.hit_blocks))
}

fn load_leased(worker: &mut Worker, lease: LeaseId, keys: &[BlockKey], count: u32) -> (u32, u32, usize) {
    (0..BLOCKS).for_each(|block| worker.memory.block(block).fill(0xa5));
    let outcome = worker.load(lease, (0..count).map(|index| LoadBlock { index, block: index }).collect());
    for (index, key) in (0..count).zip(keys) {
        if !outcome.failed.contains(&index) {
            assert!(worker.memory.block(index) == pattern(key), "wrong bytes in block {index}");
        }
    }
    (outcome.loaded_dram, outcome.loaded_nvme, outcome.failed.len())
}

fn reason(engine: &Engine) -> Option<PoisonReason> {
    engine.stats().nvme_degraded
}

/// Waits until the engine has noticed: the store tells it on a thread of its own.
fn wait_degraded(engine: &Engine, expected: PoisonReason) {
    let deadline = soon();
    while reason(engine).is_none() {
        assert!(Instant::now() < deadline, "never degraded");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(reason(engine), Some(expected));
    let error = engine.ready().expect_err("not ready");
    assert_eq!(error.kind(), ErrorKind::Poisoned);
    assert!(error.message().contains(expected.as_str()) && error.message().contains("DRAM only"), "{error}");
}

/// The store of `path` with `old` on it, durable, and nothing in DRAM.
fn with_old(drive: &Drive, path: &Path, old: &[BlockKey]) -> Worker {
    let mut worker = drive.worker(path);
    save(&mut worker, old);
    worker.engine.close(soon()).expect("closed");
    drop(worker);
    drive.worker(path)
}

#[test]
fn after_a_failed_sync_blocks_live_in_dram_until_the_store_is_back() {
    let (directory, drive) = (directory(), Drive::default());
    let (old, young, late) = (keys(BLOCKS / 2, 1), keys(BLOCKS / 2, 2), keys(BLOCKS / 2, 3));
    let mut worker = with_old(&drive, directory.path(), &old);
    drive.fail(&[IoKind::Sync], libc::EIO);
    let before = drive.syncs();
    assert_eq!(save(&mut worker, &young).saved, BLOCKS / 2, "a save knows nothing of the drive");
    assert!(worker.engine.flush(soon()).is_err());
    wait_degraded(&worker.engine, PoisonReason::IoError);
    assert_eq!(drive.syncs(), before + 1, "a failed sync is not repeated");
    assert_eq!(load(&mut worker, &young), (BLOCKS / 2, 0, 0), "out of DRAM");
    assert_eq!(load(&mut worker, &old), (0, BLOCKS / 2, 0), "the store can still be read");
    assert_eq!(save(&mut worker, &late).saved, BLOCKS / 2, "saves go on");
    // More than DRAM holds: what is not durable can leave.
    for seed in 100..200 {
        assert_eq!(save(&mut worker, &keys(BLOCKS, seed)).saved, BLOCKS);
    }
    let stats = worker.engine.stats();
    assert!(stats.dram_dirty_bytes == 0 && stats.dram_evicted_blocks > 0, "{stats:?}");
    save(&mut worker, &late);
    let failed = worker.engine.reopen_store(soon()).expect_err("the drive is as bad as before");
    assert_eq!(failed.kind(), ErrorKind::Io, "{failed}");
    assert_eq!(load(&mut worker, &late), (BLOCKS / 2, 0, 0));
    drive.mend();
    worker.engine.reopen_store(soon()).expect("back");
    let stats = worker.engine.stats();
    assert!(worker.engine.ready().is_ok() && stats.nvme_reopens == 1 && stats.nvme_failed_reopens >= 1, "{stats:?}");
    let again = save(&mut worker, &young);
    assert_eq!((again.present + again.saved, again.dropped), (BLOCKS / 2, 0));
    worker.engine.close(soon()).expect("closed in order");
    drop(worker);
    let mut worker = drive.worker(directory.path());
    for chain in [&old, &young, &late] {
        assert_eq!(
            load(&mut worker, chain),
            (0, BLOCKS / 2, 0),
            "what was in DRAM when the store came back is durable"
        );
    }
}

#[test]
fn a_drive_that_is_gone_is_not_asked_and_its_records_are_not_blamed() {
    let (directory, drive) = (directory(), Drive::default());
    let (old, young) = (keys(BLOCKS, 1), keys(BLOCKS, 2));
    for errno in [libc::EIO, libc::ENXIO] {
        let path = directory.path().join(errno.to_string());
        let mut worker = with_old(&drive, &path, &old);
        let reply = worker.lookup(&old);
        drive.fail(&KINDS, errno);
        let lease = reply.lease.expect("found");
        assert_eq!(load_leased(&mut worker, lease, &old, BLOCKS), (0, 0, BLOCKS as usize), "recomputed");
        wait_degraded(&worker.engine, PoisonReason::DeviceGone);
        let deadline = soon();
        while worker.lookup(&old).hit_blocks > 0 {
            assert!(Instant::now() < deadline, "blocks of a drive that is gone are still promised");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(save(&mut worker, &young).saved, BLOCKS);
        assert_eq!(load(&mut worker, &young), (BLOCKS, 0, 0));
        worker.engine.reopen_store(soon()).expect_err("still gone");
        drive.mend();
        worker.engine.reopen_store(soon()).expect("back");
        let (_, from_drive, failed) = load(&mut worker, &old);
        // With EIO the first few failures can not be told from bad pages.
        let blamed = worker.engine.stats().quarantined_records;
        assert!(blamed < 16 && (errno == libc::EIO || (blamed, from_drive) == (0, BLOCKS)), "{blamed} {from_drive}");
        assert_eq!(failed, 0);
        worker.engine.close(soon()).expect("closed in order");
    }
}

#[test]
fn writes_that_all_fail_end_in_dram_only_and_name_the_reason() {
    let cases = [
        (libc::EROFS, PoisonReason::ReadOnly),
        (libc::ENOSPC, PoisonReason::NoSpace),
        (libc::EFBIG, PoisonReason::NoSpace),
        (libc::ENXIO, PoisonReason::DeviceGone),
        (libc::EIO, PoisonReason::DeviceGone),
    ];
    for (errno, expected) in cases {
        let (directory, drive) = (directory(), Drive::default());
        let mut worker = drive.worker(directory.path());
        drive.fail(&[IoKind::Write], errno);
        assert_eq!(save(&mut worker, &keys(BLOCKS, 7)).saved, BLOCKS);
        wait_degraded(&worker.engine, expected);
        assert_eq!(load(&mut worker, &keys(BLOCKS, 7)), (BLOCKS, 0, 0));
        drive.mend();
        worker.engine.reopen_store(soon()).expect("back");
        worker.engine.close(soon()).expect("everything is durable");
        drop(worker);
        assert_eq!(load(&mut drive.worker(directory.path()), &keys(BLOCKS, 7)), (0, BLOCKS, 0));
    }
}

#[test]
fn a_lease_of_the_old_store_is_no_lease_on_the_new_one() {
    let (directory, drive) = (directory(), Drive::default());
    let old = keys(BLOCKS, 1);
    let mut worker = with_old(&drive, directory.path(), &old);
    let lease = worker.lookup(&old).lease.expect("found");
    drive.fail(&[IoKind::Sync], libc::EIO);
    worker.engine.put(b"object", b"bytes").expect("room");
    assert!(worker.engine.flush(soon()).is_err());
    drive.mend();
    worker.engine.reopen_store(soon()).expect("back");
    assert_eq!(load_leased(&mut worker, lease, &old, BLOCKS), (0, 0, BLOCKS as usize));
    assert_eq!(load(&mut worker, &old), (0, BLOCKS, 0), "a new lease");
}

#[test]
fn objects_that_are_put_and_removed_meanwhile_are_so_afterwards() {
    let (directory, drive) = (directory(), Drive::default());
    let engine = drive.engine(directory.path());
    for name in [&b"kept"[..], b"replaced", b"removed", b"evicted"] {
        engine.put(name, b"first").expect("room");
    }
    engine.flush(soon()).expect("durable");
    drive.fail(&[IoKind::Sync], libc::EIO);
    engine.put(b"replaced", b"second").expect("room");
    assert!(engine.flush(soon()).is_err());
    wait_degraded(&engine, PoisonReason::IoError);
    engine.put(b"evicted", b"second").expect("room");
    drop(engine.remove(b"removed"));
    // The newer version leaves DRAM; the older one in the store must not come forth.
    for number in 0..64u32 {
        engine.put(&number.to_le_bytes(), &vec![1; 1 << 20]).expect("room");
    }
    for name in [&b"replaced"[..], b"evicted", b"removed"] {
        assert!(engine.get(name).expect("open").is_none_or(|bytes| &*bytes == b"second"), "an older version");
    }
    engine.put(b"replaced", b"third").expect("room");
    drive.mend();
    engine.reopen_store(soon()).expect("back");
    let check = |engine: &Engine| {
        let get = |name: &[u8]| engine.get(name).expect("open").map(|bytes| bytes.to_vec());
        assert_eq!(get(b"kept").as_deref(), Some(&b"first"[..]));
        assert_eq!(get(b"replaced").as_deref(), Some(&b"third"[..]));
        assert_eq!(get(b"removed"), None);
        assert!(get(b"evicted").is_none_or(|bytes| bytes == b"second"), "an older version");
    };
    check(&engine);
    engine.close(soon()).expect("closed in order");
    drop(engine);
    check(&drive.engine(directory.path()));
}

#[test]
fn a_namespace_of_the_time_without_a_store_gets_its_number_from_the_store() {
    let (directory, drive) = (directory(), Drive::default());
    let old = keys(BLOCKS, 1);
    let mut worker = with_old(&drive, directory.path(), &old);
    drive.fail(&KINDS, libc::ENXIO);
    worker.engine.put(b"object", b"bytes").expect("room");
    wait_degraded(&worker.engine, PoisonReason::DeviceGone);
    let mut other = spec(&InstanceId("other".into()), BLOCK, 1, 0);
    other.namespace = NamespaceDescriptor::new().with("model", "another");
    worker.engine.register(worker.session, other.clone()).expect("registered in DRAM only");
    let first = std::mem::replace(&mut worker.instance, other.instance.clone());
    assert_eq!(worker.lookup(&old).hit_blocks, 0, "nobody else's blocks");
    assert_eq!(save(&mut worker, &old).saved, BLOCKS);
    assert_eq!(load(&mut worker, &old), (BLOCKS, 0, 0));
    drive.mend();
    worker.engine.reopen_store(soon()).expect("back");
    assert_eq!(save(&mut worker, &keys(BLOCKS, 2)).saved, BLOCKS, "under its new number");
    assert_eq!(save(&mut worker, &old).saved, BLOCKS, "what had the old number is a miss");
    worker.instance = first;
    assert_eq!(load(&mut worker, &old), (0, BLOCKS, 0));
    worker.engine.close(soon()).expect("closed in order");
    drop(worker);
    let mut worker = drive.worker(directory.path());
    worker.engine.register(worker.session, other.clone()).expect("known");
    worker.instance = other.instance;
    assert_eq!(load(&mut worker, &keys(BLOCKS, 2)), (0, BLOCKS, 0));
}

#[test]
fn another_store_in_its_place_is_refused() {
    let (directory, drive) = (directory(), Drive::default());
    let mut worker = with_old(&drive, directory.path(), &keys(BLOCKS, 1));
    drive.fail(&[IoKind::Sync], libc::EIO);
    worker.engine.put(b"object", b"bytes").expect("room");
    wait_degraded(&worker.engine, PoisonReason::IoError);
    drive.mend();
    let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    drop(Engine::open(config(other.path())).expect("a new store"));
    std::fs::rename(directory.path().join("store"), directory.path().join("aside")).expect("moved");
    std::fs::rename(other.path().join("store"), directory.path().join("store")).expect("moved");
    let error = worker.engine.reopen_store(soon()).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::ForeignFormat, "{error}");
    assert_eq!(save(&mut worker, &keys(BLOCKS, 2)).saved, BLOCKS, "DRAM goes on");
    std::fs::remove_dir_all(directory.path().join("store")).expect("removed");
    std::fs::rename(directory.path().join("aside"), directory.path().join("store")).expect("moved back");
    worker.engine.reopen_store(soon()).expect("back");
    assert_eq!(load(&mut worker, &keys(BLOCKS, 1)), (0, BLOCKS, 0));
}

#[test]
fn the_store_comes_back_by_itself() {
    let (directory, drive) = (directory(), Drive::default());
    let mut worker = with_old(&drive, directory.path(), &keys(BLOCKS, 1));
    drive.fail(&[IoKind::Sync], libc::EIO);
    save(&mut worker, &keys(BLOCKS, 2));
    assert!(worker.engine.flush(soon()).is_err());
    drive.mend();
    let deadline = soon();
    while worker.engine.stats().nvme_reopens == 0 {
        assert!(Instant::now() < deadline, "never opened again");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(worker.engine.ready().is_ok());
    worker.engine.close(soon()).expect("closed in order");
}
