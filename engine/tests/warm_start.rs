//! What was in DRAM is there again after a restart, from the drive and before anybody asks; most valuable first, behind
//! what somebody waits for, and whatever has become of list and store meanwhile: never a wrong byte.
#![cfg(feature = "fault-injection")]
#![allow(clippy::expect_used, clippy::allow_attributes, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use pegaflow_tiers::{BlockIo, FileId, IndexLog, IoKind, IoPriority, IoRequest, ReadDepth};
use support::{BLOCK, BLOCKS, Worker, expected, keys, read, save, soon};

/// What a block of `BLOCK` takes in DRAM.
const SLOT: u64 = 12 << 10;

fn config(path: &Path, dram_mib: u64, policy: PolicyChoice) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        codec: CodecChoice::None,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(128))
    };
    EngineConfig { dram: ByteSize::mib(dram_mib), nvme: Some(nvme), policy, ..EngineConfig::default() }
}

fn with_nvme(mut config: EngineConfig, change: impl FnOnce(&mut NvmeConfig)) -> EngineConfig {
    config.nvme.as_mut().map(change);
    config
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn wait(what: &str, is_so: impl Fn() -> bool) {
    let deadline = soon();
    while !is_so() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn warmed(worker: &Worker) -> WarmProgress {
    wait("the warm start", || worker.engine.stats().warm_start.state != WarmState::Running);
    worker.engine.stats().warm_start
}

fn chains(numbers: std::ops::Range<u32>) -> Vec<Vec<BlockKey>> {
    numbers.map(|number| keys(BLOCKS, number)).collect()
}

/// A store with these chains in it, closed.
fn closed_with(config: &EngineConfig, chains: &[Vec<BlockKey>]) {
    let mut worker = Worker::new(config.clone());
    chains.iter().for_each(|chain| save(&mut worker, chain));
    worker.engine.close(soon()).expect("closed");
}

#[test]
fn what_was_in_dram_is_there_again_without_a_load() {
    for policy in PolicyChoice::ALL {
        let directory = directory();
        let config = config(directory.path(), 16, policy);
        let chains = chains(0..10);
        closed_with(&config, &chains);
        // Twice: what came back is kept as well, although nobody has asked for it.
        for _ in 0..2 {
            let mut worker = Worker::new(config.clone());
            let progress = warmed(&worker);
            let blocks = 10 * u64::from(BLOCKS);
            assert_eq!((progress.state, progress.listed_blocks), (WarmState::Done, blocks), "{policy}");
            assert_eq!((progress.read_blocks, progress.read_bytes), (blocks, blocks * BLOCK), "{policy}");
            let stats = worker.engine.stats();
            assert_eq!((stats.dram_blocks, stats.loaded_nvme_blocks, stats.dram_dirty_bytes), (blocks, 0, 0));
            for chain in &chains {
                assert_eq!(read(&mut worker, chain), (BLOCKS, 0), "{policy}");
            }
            let fetched = worker.engine.stats().fetched_hot_set;
            assert_eq!((fetched.used_blocks, fetched.wasted_blocks), (blocks, 0), "{policy}");
            worker.engine.close(soon()).expect("closed");
        }
    }
}

#[test]
fn off_means_off() {
    let directory = directory();
    let on = config(directory.path(), 16, PolicyChoice::Pegaflow);
    let off = with_nvme(on.clone(), |nvme| nvme.warm_start = false);
    closed_with(&off, &chains(0..2));
    let worker = Worker::new(on.clone());
    assert_eq!(warmed(&worker), WarmProgress { state: WarmState::Nothing, ..warmed(&worker) });
    worker.lookup(&keys(BLOCKS, 1));
    worker.engine.close(soon()).expect("closed");
    let worker = Worker::new(off);
    assert_eq!((warmed(&worker).state, worker.engine.stats().dram_blocks), (WarmState::Off, 0));
}

/// Of twice as much as DRAM takes, what is used comes back; the rest as far as there is room, and a bit stays free.
#[test]
fn the_most_valuable_come_first_and_whole_chains() {
    for policy in [PolicyChoice::Lru, PolicyChoice::Pegaflow] {
        let directory = directory();
        let config = |dram| config(directory.path(), dram, policy);
        let mut worker = Worker::new(config(32));
        let (cold, hot) = (chains(0..20), chains(100..104));
        hot.iter().for_each(|chain| save(&mut worker, chain));
        cold.iter().for_each(|chain| save(&mut worker, chain));
        for _ in 0..6 {
            for chain in &hot {
                assert_eq!(read(&mut worker, chain), (BLOCKS, 0));
            }
            std::thread::sleep(Duration::from_millis(40));
        }
        worker.engine.close(soon()).expect("closed");
        let worker = Worker::new(config(16));
        let progress = warmed(&worker);
        assert_eq!((progress.state, progress.listed_blocks), (WarmState::Full, 24 * u64::from(BLOCKS)), "{policy}");
        let stats = worker.engine.stats();
        assert!(
            stats.dram_used_bytes > 13 << 20 && stats.dram_used_bytes <= (16 << 20) / 10 * 9,
            "{policy}: {stats:?}"
        );
        assert_eq!((stats.dram_evicted_blocks, stats.fetched_hot_set.no_room_blocks), (0, 0), "{policy}");
        for chain in &hot {
            assert_eq!(worker.lookup(chain).dram_blocks, BLOCKS, "{policy}");
        }
        let whole: u64 = cold.iter().map(|chain| u64::from(worker.lookup(chain).dram_blocks)).sum();
        // All but those of the one step in which room ran out.
        assert!(whole + 4 * u64::from(BLOCKS) + 128 > stats.dram_blocks, "{policy}: {whole} of {}", stats.dram_blocks);
    }
}

/// What came back and nobody has used leaves first, the least valuable of it before the rest.
#[test]
fn who_came_back_makes_room_in_the_order_of_worth() {
    for policy in PolicyChoice::ALL {
        let directory = directory();
        let config = config(directory.path(), 16, policy);
        let old = chains(0..16);
        closed_with(&config, &old);
        let mut worker = Worker::new(config.clone());
        assert_eq!(warmed(&worker).state, WarmState::Done, "{policy}");
        let used = &old[7];
        assert_eq!(read(&mut worker, used), (BLOCKS, 0), "{policy}");
        // Half of DRAM is written anew.
        let new = chains(200..210);
        new.iter().for_each(|chain| save(&mut worker, chain));
        let stats = worker.engine.stats();
        assert!(stats.dram_evicted_blocks > 0, "{policy}");
        // Ours has an opinion of its own on what was used once.
        if policy != PolicyChoice::Pegaflow {
            assert_eq!(worker.lookup(used).dram_blocks, BLOCKS, "{policy}: what was used has left");
            // The policies that know an order only: last saved, last to leave.
            assert!(worker.lookup(&old[0]).dram_blocks < BLOCKS, "{policy}");
            assert_eq!(worker.lookup(&old[15]).dram_blocks, BLOCKS, "{policy}");
        }
    }
}

#[test]
fn all_shards_come_back() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Pegaflow);
    let open = || {
        let engine = Engine::open(config.clone()).expect("opens");
        let (session, instance) = (engine.start_session(), InstanceId("two".into()));
        for shard in 0..2 {
            let mut spec = support::spec(&instance, BLOCK, 2, shard);
            spec.namespace = spec.namespace.with("shards", "2");
            engine.register(session, spec).expect("registered");
        }
        let mut worker = Worker::of(engine);
        (worker.session, worker.instance) = (session, instance);
        worker
    };
    let mut worker = open();
    let chain = keys(BLOCKS, 1);
    worker.lookup(&chain);
    for shard in 0..2 {
        worker.shard = shard;
        assert_eq!(worker.save(&chain, BlockKey::ROOT).saved, BLOCKS);
    }
    worker.engine.close(soon()).expect("closed");
    let worker = open();
    let progress = warmed(&worker);
    assert_eq!((progress.listed_blocks, progress.read_blocks), (u64::from(BLOCKS), 2 * u64::from(BLOCKS)));
    assert_eq!(worker.lookup(&chain).dram_blocks, BLOCKS);
}

/// Changes the list of a closed store, as it lies in the index.
fn change_list(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let index = IndexLog::open(&path.join("store/index")).expect("opens");
    let mut note = index.meta_get("note/hot-set/0").expect("read").expect("a list");
    change(&mut note);
    index.meta_put("note/hot-set/0", &note).expect("written");
}

#[test]
fn a_damaged_list_costs_the_warmth_and_nothing_else() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Pegaflow);
    let chain = keys(BLOCKS, 1);
    closed_with(&config, std::slice::from_ref(&chain));
    change_list(directory.path(), |note| note[100] ^= 1);
    let mut worker = Worker::new(config);
    assert_eq!((warmed(&worker).state, worker.engine.stats().dram_blocks), (WarmState::Nothing, 0));
    assert_eq!(read(&mut worker, &chain), (0, BLOCKS));
}

/// A list whose checksum is right, and whose names are wrong: unknown blocks, unknown namespaces, objects.
#[test]
fn a_list_of_what_is_not_there_brings_nothing() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Pegaflow);
    let mut worker = Worker::new(config.clone());
    let chain = keys(BLOCKS, 1);
    save(&mut worker, &chain);
    worker.engine.put(b"name", b"bytes").expect("put");
    worker.engine.close(soon()).expect("closed");
    for namespace in [0u32, 1, 7, u32::MAX] {
        change_list(directory.path(), |note| {
            note[27..31].copy_from_slice(&namespace.to_le_bytes());
            // The second block of the chain is another one, so those after it are left out, too.
            note[33 + 49] ^= 1;
            let checksum = xxhash_rust::xxh3::xxh3_64(&note[9..]);
            note[1..9].copy_from_slice(&checksum.to_le_bytes());
        });
        let mut worker = Worker::new(config.clone());
        let progress = warmed(&worker);
        let came = u64::from(namespace == 1);
        assert_eq!((progress.state, progress.read_blocks), (WarmState::Done, came), "{namespace}");
        assert_eq!(progress.missing_blocks, u64::from(BLOCKS) - came, "{namespace}");
        assert_eq!(read(&mut worker, &chain), (came as u32, BLOCKS - came as u32), "{namespace}");
        // The list is written anew.
        worker.engine.close(soon()).expect("closed");
    }
}

/// Blocks of the list have gone, and others lie in their places.
#[test]
fn a_list_of_blocks_that_have_gone_brings_what_is_left() {
    let directory = directory();
    let config = with_nvme(config(directory.path(), 16, PolicyChoice::Lru), |nvme| nvme.capacity = ByteSize::mib(16));
    let old = chains(0..12);
    closed_with(&config, &old);
    // The list stays as it is while everything is written over.
    let off = with_nvme(config.clone(), |nvme| (nvme.warm_start, nvme.reinsert_percent) = (false, 0));
    closed_with(&off, &chains(100..125));
    let mut worker = Worker::new(config);
    let progress = warmed(&worker);
    assert_eq!((progress.state, progress.listed_blocks), (WarmState::Done, 12 * u64::from(BLOCKS)));
    assert!(progress.missing_blocks > 0, "{progress:?}");
    assert_eq!(progress.missing_blocks + progress.read_blocks, progress.listed_blocks, "{progress:?}");
    assert_eq!(worker.engine.stats().quarantined_records, 0);
    for chain in old.iter().chain(&chains(100..125)) {
        read(&mut worker, chain);
    }
}

#[test]
fn a_block_damaged_on_the_drive_does_not_come_back() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Pegaflow);
    let chain = keys(BLOCKS, 1);
    closed_with(&config, std::slice::from_ref(&chain));
    let regions = directory.path().join("store/regions.0");
    let mut bytes = std::fs::read(&regions).expect("the region file");
    let pattern = expected(&chain[20]);
    let at = bytes.windows(64).position(|window| window == &pattern[..64]).expect("on the drive");
    bytes[at] ^= 1;
    std::fs::write(&regions, bytes).expect("written");
    let mut worker = Worker::new(config);
    assert_eq!(warmed(&worker).read_blocks, u64::from(BLOCKS) - 1);
    assert_eq!(worker.engine.stats().quarantined_records, 1);
    assert_eq!(read(&mut worker, &chain), (20, 0), "what lies before it");
}

/// The store as a kill or a crash leaves it: a copy of its files while it is open, and not locked.
fn as_killed(from: &Path) -> tempfile::TempDir {
    let copy = directory();
    let status = Command::new("cp").arg("-a").arg(from.join("store")).arg(copy.path()).status().expect("cp");
    assert!(status.success());
    copy
}

/// Without a close the list of the last interval counts, and whatever came since is on the drive only.
#[test]
fn after_a_kill_the_list_of_the_last_interval_counts() {
    let directory = directory();
    let often = |path: &Path| with_nvme(config(path, 16, PolicyChoice::Pegaflow), |nvme| nvme.hot_set_interval_s = 1);
    let mut worker = Worker::new(often(directory.path()));
    let chains = chains(0..4);
    chains.iter().take(3).for_each(|chain| save(&mut worker, chain));
    wait("the list", || worker.engine.stats().warm_start.kept_blocks == 3 * u64::from(BLOCKS));
    save(&mut worker, &chains[3]);
    let copy = as_killed(directory.path());
    assert_eq!(worker.engine.stats().warm_start.kept_blocks, 3 * u64::from(BLOCKS), "the test was too slow");
    let mut worker = Worker::new(often(copy.path()));
    let progress = warmed(&worker);
    assert_eq!((progress.state, progress.read_blocks), (WarmState::Done, 3 * u64::from(BLOCKS)));
    for chain in chains.iter().take(3) {
        assert_eq!(read(&mut worker, chain), (BLOCKS, 0));
    }
    assert_eq!(read(&mut worker, &chains[3]), (0, BLOCKS));
}

/// Keeps what is read ahead from the drive while it is shut, and what is written if it is told so.
#[derive(Default)]
struct Gate(Mutex<GateState>);

#[derive(Default)]
struct GateState {
    is_shut: bool,
    holds_writes: bool,
    held: Vec<(Arc<dyn BlockIo>, IoRequest)>,
    /// Reads ahead so far.
    prefetches: u64,
}

struct Gated(Arc<dyn BlockIo>, Arc<Gate>);

impl Gate {
    fn held(&self) -> usize {
        self.0.lock().expect("not poisoned").held.len()
    }

    fn prefetches(&self) -> u64 {
        self.0.lock().expect("not poisoned").prefetches
    }

    fn hold_writes(&self) {
        self.0.lock().expect("not poisoned").holds_writes = true;
    }

    fn let_read(&self) {
        self.open_for(|kind| kind == IoKind::Read);
    }

    fn open(&self) {
        self.0.lock().expect("not poisoned").holds_writes = false;
        self.open_for(|_| true);
    }

    fn open_for(&self, is_meant: impl Fn(IoKind) -> bool) {
        let mut state = self.0.lock().expect("not poisoned");
        state.is_shut = false;
        let held = std::mem::take(&mut state.held);
        let (held, kept) = held.into_iter().partition(|(_, request)| is_meant(request.kind));
        let held: Vec<(Arc<dyn BlockIo>, IoRequest)> = held;
        state.held = kept;
        drop(state);
        held.into_iter().for_each(|(io, request)| assert!(io.submit(request).is_ok()));
    }
}

impl BlockIo for Gated {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn depth(&self) -> usize {
        self.0.depth()
    }

    fn submit(&self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        let mut state = self.1.0.lock().expect("not poisoned");
        let is_prefetch = request.kind == IoKind::Read && request.priority == IoPriority::Prefetch;
        state.prefetches += u64::from(is_prefetch);
        if (state.is_shut && is_prefetch) || (state.holds_writes && request.kind == IoKind::Write) {
            state.held.push((Arc::clone(&self.0), request));
            return Ok(());
        }
        drop(state);
        self.0.submit(request)
    }

    fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        self.0.set_read_depth(file, depth);
    }

    fn close(&self) {
        self.1.open();
        self.0.close();
    }
}

fn behind_a_gate(config: EngineConfig) -> (Worker, Arc<Gate>) {
    let gate = Arc::new(Gate(Mutex::new(GateState { is_shut: true, ..GateState::default() })));
    let of_io = Arc::clone(&gate);
    let wrap = move |io| -> Arc<dyn BlockIo> { Arc::new(Gated(io, Arc::clone(&of_io))) };
    (Worker::of(Engine::open_wrapped(config, wrap).expect("opens")), gate)
}

/// While the hot set is on its way loads, saves and lookups go on as if it were not, and what they bring stays.
#[test]
fn what_somebody_waits_for_comes_first() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Lru);
    let old = chains(0..15);
    closed_with(&config, &old);
    let (mut worker, gate) = behind_a_gate(config);
    wait("reads of the warm start", || gate.held() > 0);
    let in_flight = gate.held() as u64;
    assert!(in_flight * SLOT <= (16 << 20) / 8 + SLOT, "{in_flight} reads");
    assert_eq!(worker.engine.stats().warm_start.state, WarmState::Running);
    let loaded: u32 = old.iter().rev().take(3).map(|chain| read(&mut worker, chain).1).sum();
    assert!(loaded >= 2 * BLOCKS, "{loaded}");
    // DRAM is filled with what is new.
    let new = chains(100..120);
    new.iter().for_each(|chain| save(&mut worker, chain));
    let before = worker.engine.stats();
    let here: Vec<u32> = new.iter().map(|chain| worker.lookup(chain).dram_blocks).collect();
    assert!(here.iter().sum::<u32>() > 14 * BLOCKS, "{here:?}");
    gate.open();
    let progress = warmed(&worker);
    assert_eq!(progress.state, WarmState::Full, "{progress:?}");
    let stats = worker.engine.stats();
    assert!(progress.read_blocks <= in_flight + 4 * u64::from(BLOCKS), "{stats:?}");
    assert_eq!(stats.dram_evicted_blocks, before.dram_evicted_blocks, "somebody's block has left for it");
    let still: Vec<u32> = new.iter().map(|chain| worker.lookup(chain).dram_blocks).collect();
    assert_eq!(still, here);
}

#[test]
fn a_close_does_not_wait_for_it_and_leaves_the_list_as_it_was() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Pegaflow);
    let old = chains(0..15);
    closed_with(&config, &old);
    let (mut worker, gate) = behind_a_gate(config.clone());
    wait("reads of the warm start", || gate.held() > 0);
    read(&mut worker, &old[14]);
    // The drive never answers what was read ahead; only the close lets go of it.
    worker.engine.close(soon()).expect("closed");
    assert_ne!(worker.engine.stats().warm_start.state, WarmState::Done);
    let worker = Worker::new(config);
    let progress = warmed(&worker);
    assert_eq!((progress.state, progress.listed_blocks), (WarmState::Done, 15 * u64::from(BLOCKS)));
}

#[test]
fn while_the_writer_is_behind_no_more_is_read() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Pegaflow);
    closed_with(&config, &chains(0..12));
    let (mut worker, gate) = behind_a_gate(config);
    wait("reads of the warm start", || gate.held() > 0);
    gate.hold_writes();
    for chain in chains(100..104) {
        worker.lookup(&chain);
        assert_eq!(worker.save(&chain, BlockKey::ROOT).saved, BLOCKS);
    }
    assert!(worker.engine.stats().dram_dirty_bytes > (16 << 20) / 8);
    gate.let_read();
    // What was asked for before still comes.
    wait("the steps in flight", || worker.engine.stats().warm_start.read_blocks >= gate.prefetches());
    std::thread::sleep(Duration::from_millis(700));
    let progress = worker.engine.stats().warm_start;
    assert_eq!((progress.state, progress.read_blocks), (WarmState::Running, gate.prefetches()));
    assert!(progress.read_blocks < 4 * u64::from(BLOCKS), "{progress:?}");
    gate.open();
    assert_eq!(warmed(&worker).state, WarmState::Done);
}

/// What an operator asks for waits for the hot set, is alone, and ends when it is told to: see `warm_as_asked.rs`.
#[test]
fn a_run_that_was_asked_for_is_alone_and_can_be_stopped() {
    let directory = directory();
    let config = config(directory.path(), 16, PolicyChoice::Pegaflow);
    closed_with(&config, &chains(0..12));
    let busy = |worker: &Worker| worker.engine.start_warming(&[]).expect_err("one goes on").kind() == ErrorKind::Busy;
    let (worker, gate) = behind_a_gate(config.clone());
    wait("reads of the warm start", || gate.held() > 0);
    assert!(busy(&worker), "the hot set is on its way");
    gate.open();
    assert_eq!(warmed(&worker).state, WarmState::Done);
    worker.engine.close(soon()).expect("closed");

    let (worker, gate) = behind_a_gate(with_nvme(config, |nvme| nvme.warm_start = false));
    let run = || worker.engine.warming().expect("open");
    worker.engine.start_warming(&[]).expect("begins");
    wait("its first reads", || gate.held() > 0);
    assert!(busy(&worker), "another one goes on");
    assert_eq!(worker.engine.stop_warming().expect("told").state, WarmRunState::Running);
    gate.open();
    wait("its end", || run().state != WarmRunState::Running);
    let all = 12 * u64::from(BLOCKS);
    assert!(run().state == WarmRunState::Stopped && (1..all).contains(&run().read_blocks), "{:?}", run());
    assert_eq!(worker.engine.stats().dram_blocks, run().read_blocks);
    worker.engine.start_warming(&[]).expect("another one");
    wait("its end", || run().state == WarmRunState::Done);
    assert_eq!(worker.engine.stats().dram_blocks, all);
}
