//! What waits for a request in DRAM was read from the drive ahead of its load, bit for bit, and the load needs no drive. A
//! load that comes in the middle of that is no worse off.
#![cfg(feature = "fault-injection")]
#![allow(clippy::expect_used, clippy::allow_attributes, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use pegaflow_tiers::{BlockIo, Fault, FaultAction, FaultPlan, Faulty, IoKind};
use support::{BLOCKS, Worker, keys};

type Drive = Arc<Mutex<Option<Arc<Faulty<Arc<dyn BlockIo>>>>>>;

fn open(path: &Path, drive: &Drive) -> Worker {
    // The warm start would fetch the same blocks at the same time.
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(64))
    };
    let config = EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), ..EngineConfig::default() };
    let drive = Arc::clone(drive);
    let wrap = move |io| -> Arc<dyn BlockIo> {
        let faulty = Arc::new(Faulty::new(io, FaultPlan::default()).expect("a faulty drive"));
        *drive.lock().expect("not poisoned") = Some(Arc::clone(&faulty));
        faulty
    };
    Worker::of(Engine::open_wrapped(config, wrap).expect("opens"))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// A worker with some chains on the drive and none in DRAM.
fn restarted(path: &Path, drive: &Drive) -> Worker {
    let mut worker = open(path, drive);
    for chain in 1..=3 {
        (0..BLOCKS).for_each(|block| worker.fill(block, seed(chain, block)));
        assert_eq!(worker.save(&keys(BLOCKS, chain), BlockKey::ROOT).saved, BLOCKS);
    }
    worker.engine.close(soon()).expect("durable");
    open(path, drive)
}

fn seed(chain: u32, block: u32) -> u8 {
    (chain * 71 + block) as u8
}

fn ask(worker: &Worker, chain: u32) -> LookupReply {
    let request = LookupRequest {
        instance: worker.instance.clone(),
        tenant: None,
        group: 0,
        keys: keys(BLOCKS, chain),
        lease: Some(Duration::from_secs(60)),
        tag: chain.into(),
        with_places: false,
        question: Some(LoadQuestion { request: format!("r{chain}"), block_tokens: 16, ..LoadQuestion::default() }),
        prefetch: true,
    };
    worker.engine.lookup(worker.session, &request).expect("looked up")
}

/// Loads a chain and compares; from which tiers the blocks came.
fn load(worker: &mut Worker, chain: u32, reply: &LookupReply) -> (u32, u32) {
    (0..BLOCKS).for_each(|block| worker.memory.block(block).fill(0));
    let blocks = (0..BLOCKS).map(|index| LoadBlock { index, block: index }).collect();
    let outcome = worker.load(reply.lease.expect("leased"), blocks);
    assert_eq!(outcome.failed.len(), 0);
    for block in 0..BLOCKS {
        let wanted = (0..support::BLOCK).map(|i| (i as u8).wrapping_mul(31) ^ seed(chain, block));
        assert!(worker.memory.block(block).iter().copied().eq(wanted), "wrong bytes in block {block} of {chain}");
    }
    (outcome.loaded_dram, outcome.loaded_nvme)
}

fn fetched(worker: &Worker) -> FetchTotals {
    worker.engine.stats().fetched_request
}

#[test]
fn what_was_fetched_is_loaded_from_dram_with_the_right_bytes() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut worker = restarted(directory.path(), &Drive::default());
    let first = ask(&worker, 1);
    assert_eq!((first.hit_blocks, first.dram_blocks), (BLOCKS, 0));
    let deadline = soon();
    while fetched(&worker).blocks < BLOCKS.into() {
        assert!(Instant::now() < deadline, "nothing comes");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Also by the lease that was taken before.
    assert_eq!(load(&mut worker, 1, &first), (BLOCKS, 0));
    assert_eq!(fetched(&worker).used_blocks, u64::from(BLOCKS));
    let [decision] = worker.engine.explain(Some("r1"), 10).try_into().expect("one decision");
    assert_eq!(decision.decision.observed_load, None, "a load out of DRAM says nothing of the drive");
    let again = ask(&worker, 1);
    assert_eq!((again.dram_blocks, again.fetch_us), (BLOCKS, 0));
}

#[test]
fn a_load_in_the_middle_of_a_fetch_has_all_its_blocks() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let drive = Drive::default();
    let mut worker = restarted(directory.path(), &drive);
    let faulty = drive.lock().expect("not poisoned").clone().expect("open");
    let stall = FaultAction::Stall(Duration::from_millis(20));
    faulty.inject(Fault { kind: IoKind::Read, first: 1, times: u64::MAX, action: stall });
    for chain in 2..=3 {
        let reply = ask(&worker, chain);
        let (dram, nvme) = load(&mut worker, chain, &reply);
        assert_eq!(dram + nvme, BLOCKS);
        worker.engine.release(reply.lease.expect("leased"));
    }
    faulty.heal();
    let totals = fetched(&worker);
    assert_eq!((totals.failed_blocks, worker.engine.stats().quarantined_records), (0, 0), "{totals:?}");
    worker.engine.close(soon()).expect("closes");
}
