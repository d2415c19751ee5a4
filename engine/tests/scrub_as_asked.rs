//! A scrub that an operator asks for: it sees every record and finds every damage, whatever the background scrub is doing or
//! is not allowed to do; one at a time, and it can be stopped.
#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCKS, Worker, keys};

const FAST: ByteSize = ByteSize::gib(1);
/// One piece a second or less.
const SLOW: ByteSize = ByteSize(64 << 10);
const PAGE: usize = 4096;

fn config(path: &Path, background: ByteSize) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        codec: CodecChoice::None,
        scrub: background,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(64))
    };
    EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), ..EngineConfig::default() }
}

/// A store of so many chains of `BLOCKS` blocks.
fn store_of(chains: u32, background: ByteSize) -> (tempfile::TempDir, Worker) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut worker = Worker::new(config(directory.path(), background));
    for seed in 0..chains {
        (0..BLOCKS).for_each(|block| worker.fill(block, seed as u8));
        worker.save(&keys(BLOCKS, seed), BlockKey::ROOT);
        worker.engine.flush(Instant::now() + Duration::from_secs(30)).expect("durable");
    }
    (directory, worker)
}

fn wait(engine: &Engine, what: &str, is_so: impl Fn(&ScrubProgress) -> bool) -> ScrubProgress {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let progress = engine.scrub_progress().expect("there is a store");
        if is_so(&progress) {
            return progress;
        }
        assert!(Instant::now() < deadline, "not in time: {what}: {progress:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn ended(engine: &Engine) -> ScrubProgress {
    wait(engine, "the end", |progress| progress.state != ScrubState::Running)
}

/// Writes into every page that begins with these bytes, and says how many those are.
fn damage(directory: &Path, record: &[u8]) -> u64 {
    let path = directory.join("store/regions.0");
    let bytes = std::fs::read(&path).expect("there");
    let file = std::fs::File::options().write(true).open(&path).expect("there");
    let places = (0..bytes.len()).step_by(PAGE).filter(|&at| bytes[at..].starts_with(record));
    places.map(|at| file.write_all_at(&[0xee; 8], at as u64 + 100).expect("written")).count() as u64
}

#[test]
fn every_record_is_seen_and_every_damage_found_with_the_background_scrub_off() {
    let (directory, worker) = store_of(4, ByteSize(0));
    let engine = &worker.engine;
    let none = engine.scrub_progress().expect("there is a store");
    assert_eq!((none.state, none.number, none.last_pass_unix_ms), (ScrubState::None, 0, 0));

    let begun = Instant::now();
    assert_eq!(engine.start_scrub(FAST).expect("begins").number, 1);
    let clean = ended(engine);
    assert!(begun.elapsed() < Duration::from_secs(4), "the thread rests for 5 s and more, and is woken");
    assert_eq!((clean.state, clean.records, clean.bad_records), (ScrubState::Done, u64::from(4 * BLOCKS), 0));
    assert!(clean.regions == clean.regions_total && clean.bytes > 0 && clean.last_pass_unix_ms > 0, "{clean:?}");

    // The payloads of chain 2 begin with its seed: see `Worker::fill`.
    let payload: Vec<u8> = (0..64u8).map(|i| i.wrapping_mul(31) ^ 2).collect();
    assert_eq!(damage(directory.path(), &payload), u64::from(2 * BLOCKS), "both pages of each block of one chain");
    engine.start_scrub(FAST).expect("begins");
    let found = ended(engine);
    assert_eq!((found.state, found.number, found.bad_records), (ScrubState::Done, 2, u64::from(BLOCKS)), "{found:?}");
    assert_eq!(engine.stats().scrub_passes, 2);
    assert_eq!(engine.scrub_progress().expect("kept"), ScrubProgress { ..found });
}

#[test]
fn one_runs_at_a_time_and_a_stopped_one_leaves_its_place_to_the_next() {
    let (_directory, worker) = store_of(8, ByteSize(0));
    let engine = &worker.engine;
    engine.start_scrub(SLOW).expect("begins");
    wait(engine, "the first piece", |progress| progress.records > 0);
    let error = engine.start_scrub(FAST).expect_err("one runs");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    engine.stop_scrub().expect("told");
    let stopped = ended(engine);
    assert!(stopped.state == ScrubState::Stopped && stopped.records < u64::from(8 * BLOCKS), "{stopped:?}");
    assert_eq!((stopped.last_pass_unix_ms, engine.stats().scrub_passes), (0, 0), "it has not seen all");
    // Not from where the last one was.
    engine.start_scrub(FAST).expect("begins");
    assert_eq!(ended(engine).records, u64::from(8 * BLOCKS));
    engine.stop_scrub().expect("none runs");
}

#[test]
fn the_background_scrub_gives_way_and_a_close_waits_for_neither() {
    let (_directory, worker) = store_of(8, SLOW);
    let engine = &worker.engine;
    let deadline = Instant::now() + Duration::from_secs(30);
    while engine.stats().scrubbed_bytes == 0 {
        assert!(Instant::now() < deadline, "the background scrub begins some seconds after the open");
        std::thread::sleep(Duration::from_millis(10));
    }
    engine.start_scrub(FAST).expect("begins");
    let progress = ended(engine);
    assert_eq!((progress.state, progress.records), (ScrubState::Done, u64::from(8 * BLOCKS)), "{progress:?}");
    engine.start_scrub(SLOW).expect("begins");
    wait(engine, "the first piece", |progress| progress.records > 0);
    let started = Instant::now();
    engine.close(started + Duration::from_secs(20)).expect("closes");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn what_can_not_be_scrubbed_is_said() {
    let without = Worker::new(EngineConfig { dram: ByteSize::mib(16), ..EngineConfig::default() });
    let kind = |told: Result<ScrubProgress>| told.expect_err("refused").kind();
    assert_eq!(kind(without.engine.start_scrub(FAST)), ErrorKind::NotFound);
    assert_eq!(kind(without.engine.scrub_progress()), ErrorKind::NotFound);
    let (_directory, worker) = store_of(1, ByteSize(0));
    for rate in [ByteSize(0), ByteSize(SLOW.0 - 1), ByteSize(ByteSize::gib(16).0 + 1)] {
        assert_eq!(kind(worker.engine.start_scrub(rate)), ErrorKind::InvalidInput, "{rate}");
    }
    assert_eq!(worker.engine.scrub_progress().expect("there").state, ScrubState::None);
}
