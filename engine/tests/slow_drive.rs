//! A drive that becomes slower than computing: what is found on it is not loaded, until it is seen to be fast again.
#![cfg(feature = "fault-injection")]
#![allow(clippy::expect_used, clippy::allow_attributes, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use pegaflow_tiers::{BlockIo, Fault, FaultAction, FaultPlan, Faulty, IoKind};
use support::{BLOCKS, Worker, keys};

/// Each read takes so long, which is the shortest time of a load.
const STALL: Duration = Duration::from_secs(3);
/// What the inference engine says of computing as much.
const COMPUTED: Duration = Duration::from_secs(1);
const TOKENS: u32 = 16;

type FaultyIo = Faulty<Arc<dyn BlockIo>>;

fn open(path: &Path, drive: &Arc<Mutex<Option<Arc<FaultyIo>>>>) -> Engine {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(64))
    };
    let config =
        EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), commit_interval_ms: 20, ..EngineConfig::default() };
    let drive = Arc::clone(drive);
    let wrap = move |io| -> Arc<dyn BlockIo> {
        let faulty = Arc::new(Faulty::new(io, FaultPlan::default()).expect("a faulty drive"));
        *drive.lock().expect("not poisoned") = Some(Arc::clone(&faulty));
        faulty
    };
    Engine::open_wrapped(config, wrap).expect("opens")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Looks a chain up for a request of this name; computing is told to be known.
fn ask(worker: &Worker, chain: u32, request: &str) -> LookupReply {
    let end_token = BLOCKS * TOKENS;
    let computed = ComputedTokens { decision: 0, first_token: 0, end_token, load_share: 0.0, took: COMPUTED };
    let question = LoadQuestion {
        request: request.into(),
        block_tokens: TOKENS,
        computed: vec![computed],
        ..LoadQuestion::default()
    };
    let request = LookupRequest {
        instance: worker.instance.clone(),
        tenant: None,
        group: 0,
        keys: keys(BLOCKS, chain),
        lease: Some(Duration::from_secs(60)),
        tag: chain.into(),
        with_places: false,
        question: Some(question),
        prefetch: false,
    };
    worker.engine.lookup(worker.session, &request).expect("looked up")
}

fn load(worker: &mut Worker, reply: &LookupReply) {
    let blocks = (0..BLOCKS).map(|index| LoadBlock { index, block: index }).collect();
    let outcome = worker.load(reply.lease.expect("leased"), blocks);
    assert_eq!((outcome.failed.len(), outcome.loaded_nvme), (0, BLOCKS));
}

#[test]
fn a_slow_drive_is_not_waited_for_until_it_is_fast_again() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let drive = Arc::default();
    let mut worker = Worker::of(open(directory.path(), &drive));
    for chain in 1..=6 {
        assert_eq!(worker.save(&keys(BLOCKS, chain), BlockKey::ROOT).saved, BLOCKS);
    }
    worker.engine.close(soon()).expect("durable");
    let mut worker = Worker::of(open(directory.path(), &drive));
    let faulty = drive.lock().expect("not poisoned").clone().expect("open");
    faulty.inject(Fault { kind: IoKind::Read, first: 1, times: u64::MAX, action: FaultAction::Stall(STALL) });

    // Nothing is known: loaded, and learned from.
    let first = ask(&worker, 1, "first");
    assert!(first.decision > 0);
    load(&mut worker, &first);
    let second = ask(&worker, 2, "second");
    assert_eq!((second.hit_blocks, second.lease), (BLOCKS, None), "found, but computed");
    assert_eq!(worker.engine.stats().leases, 0);
    let explained = worker.engine.explain(Some("second"), 10);
    assert_eq!(explained.len(), 1);
    assert!(explained[0].text.starts_with("recompute: it is faster"), "{}", explained[0].text);
    assert!(worker.engine.explain(Some("first"), 1)[0].decision.observed_load.is_some_and(|took| took >= STALL));

    // What is in DRAM by now is loaded all the same.
    assert!(ask(&worker, 1, "again").lease.is_some());

    // Never, always and shadow, while it runs.
    worker.engine.set_load_policy(LoadPolicy::Never);
    assert_eq!(ask(&worker, 1, "never").lease, None);
    worker.engine.set_load_policy(LoadPolicy::Shadow);
    assert!(ask(&worker, 2, "shadow").lease.is_some());
    assert_eq!(worker.engine.explain(Some("shadow"), 1)[0].decision.preferred, Choice::Recompute);

    // Fast again: a load that shows it raises a doubt, a few blocks are read beside the next request, and that decides.
    faulty.heal();
    worker.engine.set_load_policy(LoadPolicy::Always);
    let fast = ask(&worker, 3, "always");
    load(&mut worker, &fast);
    worker.engine.set_load_policy(LoadPolicy::Auto);
    let doubtful = ask(&worker, 4, "doubtful");
    assert_eq!(doubtful.lease, None);
    let deadline = soon();
    while worker.engine.stats().decision_read_bytes == 0 {
        assert!(Instant::now() < deadline, "nothing was read beside it");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(ask(&worker, 5, "sure").lease.is_some(), "{}", worker.engine.explain(Some("sure"), 1)[0].text);
    let stats = worker.engine.stats();
    assert_eq!(stats.load_policy, LoadPolicy::Auto);
    assert!(stats.decided_loads >= 5 && stats.decided_recomputes == 3, "{stats:?}");
    worker.engine.close(soon()).expect("closes");
}
