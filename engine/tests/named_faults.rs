//! What a drive can do to a running engine has a name: the reason in the metric `pegaflow_nvme_degraded`, the line in the log
//! and what is served meanwhile, as the table in `docs/operations.md` has them. Injected, one after the other in one process,
//! since all share its log.

#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use pegaflow_tiers::{BlockIo, Fault, FaultAction, FaultPlan, Faulty, IoKind};
use support::{BLOCKS, Worker, keys};
use tracing_subscriber::fmt::MakeWriter;

const DEGRADED: &str = "degraded: blocks live in DRAM only until the store can be opened again";
const BACK: &str = "the store is in use again";

/// What happens, and what the table says of it: what fails, with what, the reason, the line before *degraded*.
const FAULTS: [(&str, IoKind, i32, PoisonReason, &str); 8] = [
    ("disk full", IoKind::Write, libc::ENOSPC, PoisonReason::NoSpace, "the drive takes no writes"),
    ("quota", IoKind::Write, libc::EDQUOT, PoisonReason::NoSpace, "the drive takes no writes"),
    ("RLIMIT_FSIZE", IoKind::Write, libc::EFBIG, PoisonReason::NoSpace, "the drive takes no writes"),
    ("read-only remount", IoKind::Write, libc::EROFS, PoisonReason::ReadOnly, "the drive takes no writes"),
    ("device removed", IoKind::Write, libc::ENXIO, PoisonReason::DeviceGone, "the drive takes no writes"),
    (
        "device removed, seen by a read",
        IoKind::Read,
        libc::ENODEV,
        PoisonReason::DeviceGone,
        "the drive does not answer",
    ),
    ("all writes fail", IoKind::Write, libc::EIO, PoisonReason::DeviceGone, "many writes in a row have failed"),
    ("a sync fails", IoKind::Sync, libc::EIO, PoisonReason::IoError, "a sync of the store failed"),
];

/// The log of the process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("not poisoned").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Log {
    /// All of it since it was last asked for.
    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut self.0.lock().expect("not poisoned"))).expect("UTF-8")
    }
}

type FaultyIo = Faulty<Arc<dyn BlockIo>>;

/// What is wrong with the drive, also after the next open, and the engine that is open on it.
type Drive = Arc<Mutex<(FaultPlan, Option<Arc<FaultyIo>>)>>;

fn open(path: &Path, drive: &Drive) -> Engine {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(64))
    };
    let config =
        EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), commit_interval_ms: 20, ..EngineConfig::default() };
    let drive = Arc::clone(drive);
    let wrap = move |io| -> Arc<dyn BlockIo> {
        let mut drive = drive.lock().expect("not poisoned");
        let faulty = Arc::new(Faulty::new(io, drive.0.clone()).expect("a faulty drive"));
        drive.1 = Some(Arc::clone(&faulty));
        faulty
    };
    Engine::open_wrapped(config, wrap).expect("opens")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = soon();
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: never");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn each_fault_of_the_drive_has_its_reason_its_line_and_its_way_back() {
    let log = Log::default();
    tracing_subscriber::fmt().with_writer(log.clone()).with_ansi(false).init();
    for (name, kind, errno, reason, first_line) in FAULTS {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let drive = Drive::default();
        let (old, young) = (keys(BLOCKS, 1), keys(BLOCKS, 2));
        let mut worker = Worker::of(open(directory.path(), &drive));
        assert_eq!(worker.save(&old, BlockKey::ROOT).saved, BLOCKS);
        worker.engine.close(soon()).expect("durable");
        let mut worker = Worker::of(open(directory.path(), &drive));
        let reply = worker.lookup(&old);
        log.take();
        let fault = Fault { kind, first: 1, times: u64::MAX, action: FaultAction::Errno(errno) };
        {
            let mut drive = drive.lock().expect("not poisoned");
            drive.0 = FaultPlan::default().with(fault);
            drive.1.as_ref().expect("open").inject(fault);
        }
        if kind == IoKind::Read {
            let blocks = (0..BLOCKS).map(|index| LoadBlock { index, block: index }).collect();
            let outcome = worker.load(reply.lease.expect("found"), blocks);
            assert_eq!(outcome.failed.len(), BLOCKS as usize, "{name}: a miss each");
        }
        // Saves know nothing of it.
        assert_eq!(worker.save(&young, BlockKey::ROOT).saved, BLOCKS, "{name}");
        until(name, || worker.engine.stats().nvme_degraded.is_some());
        assert_eq!(worker.engine.stats().nvme_degraded, Some(reason), "{name}");
        let unready = worker.engine.ready().expect_err("not ready").to_string();
        assert!(unready.contains(reason.as_str()) && unready.contains("DRAM only"), "{name}: {unready}");
        assert_eq!(worker.lookup(&young).hit_blocks, BLOCKS, "{name}: DRAM serves");
        {
            let mut drive = drive.lock().expect("not poisoned");
            drive.0 = FaultPlan::default();
            drive.1.as_ref().expect("open").heal();
        }
        worker.engine.reopen_store(soon()).expect("back");
        let stats = worker.engine.stats();
        assert_eq!((stats.nvme_degraded, stats.nvme_reopens), (None, 1), "{name}");
        worker.engine.close(soon()).expect("closed in order");
        let said = log.take();
        let first_line = format!("{first_line}: the store takes no more writes");
        let lines = |words: &str| said.lines().filter(|line| line.contains(words)).count();
        assert_eq!((lines(&first_line), lines(DEGRADED), lines(BACK)), (1, 1, 1), "{name}:\n{said}");
        let place = |words: &str| said.lines().position(|line| line.contains(words));
        assert!(place(&first_line) < place(DEGRADED) && place(DEGRADED) < place(BACK), "{name}:\n{said}");
        let degraded = said.lines().find(|line| line.contains(DEGRADED)).expect("there");
        assert!(degraded.contains(&format!("reason=\"{}\"", reason.as_str())), "{name}: {degraded}");
    }
}
