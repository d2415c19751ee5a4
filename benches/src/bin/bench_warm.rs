//! How soon after an open the blocks that were in DRAM are there again, after a close in order and after `kill -9`, beside
//! the time in which a program that does nothing but I/O reads as many bytes of the same drive in requests of the same size,
//! each to memory that nothing was read to before, as the DRAM tier's is after an open. (Reads to the same few MiB again and
//! again are told beside it: on virtual machines these were more than twice as fast.)
//! Progress goes to standard error, one JSON object to standard output, as its last line.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pegaflow_benches::{DEPTH_MAX, KvBytes, RawDrive, Shape, Transfer, memory_of};
use pegaflow_engine::{
    BlockKey, BlockSave, ByteSize, CodecChoice, DeviceMemory, Engine, EngineConfig, GroupGeometry, InstanceId,
    InstanceSpec, KeyChain, LocalKvCache, LookupRequest, NamespaceDescriptor, NvmeConfig, OperationId, SaveRequest,
    SessionId, WarmState,
};
use serde_json::json;

const MIB: u64 = 1 << 20;
/// The header page of a record.
const HEADER_BYTES: u64 = 4096;
/// What the store has in flight on one drive that was not measured.
const IN_FLIGHT_BYTES: u64 = 32 * MIB;
/// Neighbours are read as one request up to this size.
const JOINED_BYTES: u64 = MIB;
/// Blocks of a prompt are this many MiB together, at most.
const PROMPT_BYTES: u64 = 64 * MIB;
/// More can not be registered with a ring as one buffer.
const RING_BUFFER_BYTES: u64 = 1 << 30;
const PATIENCE: Duration = Duration::from_secs(300);

/// Measures a warm start.
#[derive(Parser)]
struct Arguments {
    /// Where the files are made, in a new directory that is removed afterwards. Takes about 3 x MiB of disk.
    #[arg(long, env = "DIR", default_value = ".")]
    dir: PathBuf,
    /// MiB of payload that is in DRAM before the restart.
    #[arg(long, env = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    mib: u64,
    /// Size of a block in KiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(4..=16384))]
    block_kib: u64,
    /// Restarts of each kind, of which the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Fills the store in this directory, says so, and waits; for the bench itself.
    #[arg(long, hide = true)]
    fill: Option<PathBuf>,
}

impl Arguments {
    fn block_bytes(&self) -> u64 {
        self.block_kib << 10
    }

    fn record_bytes(&self) -> u64 {
        self.block_bytes() + HEADER_BYTES
    }

    fn prompt_blocks(&self) -> u64 {
        (PROMPT_BYTES / self.block_bytes()).clamp(1, 2048)
    }

    fn prompts(&self) -> u64 {
        (self.mib * MIB / self.block_bytes()).div_ceil(self.prompt_blocks())
    }

    fn blocks(&self) -> u64 {
        self.prompts() * self.prompt_blocks()
    }

    fn config(&self, directory: &Path) -> EngineConfig {
        let bytes = self.blocks() * self.record_bytes();
        let nvme = NvmeConfig {
            codec: CodecChoice::None,
            scrub: ByteSize(0),
            health_interval_s: 0,
            hot_set_interval_s: 1,
            ..NvmeConfig::new(directory.join("store"), ByteSize(bytes.div_ceil(MIB) * MIB * 5 / 4 + 512 * MIB))
        };
        // So that nine tenths hold all of it.
        let dram = ByteSize((bytes * 4 / 3).div_ceil(16 * MIB) * 16 * MIB + 64 * MIB);
        EngineConfig { dram, nvme: Some(nvme), ..EngineConfig::default() }
    }

    /// The requests that warm starts make of the drive, as far as neighbours are joined.
    fn shape(&self) -> Shape {
        let joined = (JOINED_BYTES / self.record_bytes()).max(1) * self.record_bytes();
        let depth = (IN_FLIGHT_BYTES / joined).clamp(1, DEPTH_MAX as u64) as usize;
        Shape { request_bytes: joined, depth }
    }

    fn keys(&self, prompt: u64) -> Vec<BlockKey> {
        let mut chain = KeyChain::new();
        (0..self.prompt_blocks()).map(|block| chain.next(&[prompt as u32, block as u32], b"")).collect()
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(directory) = &arguments.fill {
        return fill(&arguments, directory);
    }
    let directory = tempfile::Builder::new()
        .prefix("pegaflow-bench-warm-")
        .tempdir_in(&arguments.dir)
        .with_context(|| format!("in {}", arguments.dir.display()))?;
    let mut drive = Drive::new(&arguments, directory.path())?;
    filled(&arguments, directory.path(), false)?;
    let (mut clean, mut killed) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        for (is_killed, starts) in [(false, &mut clean), (true, &mut killed)] {
            if is_killed {
                filled(&arguments, directory.path(), true)?;
            }
            let touch = || touch_memory(&arguments, directory.path());
            touch()?;
            let before = drive.read_new()?;
            touch()?;
            let start = WarmStart::measure(&arguments, directory.path())?;
            touch()?;
            let gbps = (before + drive.read_new()?) / 2.0;
            starts.push(start.against(gbps, drive.read_again()?, &arguments, is_killed));
        }
    }
    let report = |starts: &[Compared]| {
        json!({
            "ratio": round(median(starts, |start| start.ratio)),
            "seconds": round(median(starts, |start| start.seconds)),
            "open_seconds": round(median(starts, |start| start.open_seconds)),
            "ratio_without_open": round(median(starts, |start| start.ratio_without_open)),
            "drive_gbps": round(median(starts, |start| start.drive_gbps)),
            "drive_gbps_same_memory": round(median(starts, |start| start.drive_gbps_same_memory)),
            "ratio_same_memory": round(median(starts, |start| start.ratio * start.drive_gbps_same_memory / start.drive_gbps)),
            "share": round(starts.iter().map(|start| start.share).fold(f64::INFINITY, f64::min)),
        })
    };
    let ratio = median(&clean, |start| start.ratio).max(median(&killed, |start| start.ratio));
    let share = clean.iter().chain(&killed).map(|start| start.share).fold(f64::INFINITY, f64::min);
    println!(
        "{}",
        json!({
            "ratio": round(ratio), "bar": 1.15, "share": round(share),
            "hot_bytes": arguments.blocks() * arguments.block_bytes(), "block_bytes": arguments.block_bytes(),
            "closed": report(&clean), "killed": report(&killed),
        })
    );
    Ok(())
}

/// Takes as much memory as the DRAM tier will and gives it back. A virtual machine may have to be given its memory by its
/// host first, at 0.7 GB/s where this was seen: that is neither the drive's speed nor the engine's.
fn touch_memory(arguments: &Arguments, directory: &Path) -> Result<()> {
    let engine = Engine::open(EngineConfig { nvme: None, ..arguments.config(directory) })?;
    let until = Instant::now() + PATIENCE;
    while engine.stats().dram_ready_bytes < engine.stats().dram_capacity_bytes {
        ensure!(Instant::now() < until, "waited too long for memory");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(engine.close(until)?)
}

struct Worker {
    engine: Engine,
    session: SessionId,
    instance: InstanceId,
}

impl Worker {
    fn new(arguments: &Arguments, engine: Engine) -> Result<Self> {
        let (session, instance) = (engine.start_session(), InstanceId("bench".into()));
        let spec = InstanceSpec {
            instance: instance.clone(),
            namespace: NamespaceDescriptor::new().with("model", "bench"),
            groups: vec![GroupGeometry { group: 0, block_bytes: arguments.block_bytes(), shards: 1 }],
            shard: 0,
            keeps_all: false,
        };
        engine.register(session, spec)?;
        Ok(Self { engine, session, instance })
    }

    /// How many blocks of a prompt are in DRAM; to the policy it is a request.
    fn lookup(&self, keys: &[BlockKey], tag: u64) -> Result<u64> {
        let request = LookupRequest {
            instance: self.instance.clone(),
            tenant: None,
            group: 0,
            keys: keys.to_vec(),
            lease: None,
            tag,
            with_places: false,
            question: None,
            prefetch: false,
        };
        Ok(self.engine.lookup(self.session, &request)?.dram_blocks.into())
    }

    fn save(&self, keys: &[BlockKey], number: u64, memory: &Arc<dyn DeviceMemory>) -> Result<()> {
        let parents = std::iter::once(BlockKey::ROOT).chain(keys.iter().copied());
        let blocks = keys.iter().zip(parents).zip(0..);
        let blocks =
            blocks.map(|((key, parent), depth)| BlockSave { key: *key, parent, depth, block: depth }).collect();
        let request = SaveRequest {
            session: self.session,
            operation: OperationId(number),
            target: self.instance.clone().into(),
            memory: Arc::new(LocalKvCache::new(Arc::clone(memory), self.engine.arena(), None)),
            blocks,
        };
        let (sender, receiver) = channel();
        // A receiver that has gone needs no answer.
        let done = Box::new(move |outcome| {
            let _ = sender.send(outcome);
        });
        self.engine.save(request, done)?;
        let outcome = receiver.recv_timeout(PATIENCE)?;
        ensure!(outcome.dropped == 0, "{} blocks were dropped", outcome.dropped);
        Ok(self.engine.flush(Instant::now() + PATIENCE)?)
    }

    fn wait(&self, what: &str, is_so: impl Fn(&Engine) -> bool) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !is_so(&self.engine) {
            ensure!(Instant::now() < until, "waited too long for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Brings all prompts to DRAM and to the drive in a process of its own, which is then closed or killed.
fn filled(arguments: &Arguments, directory: &Path, is_killed: bool) -> Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--fill")
        .arg(directory)
        .args(["--mib", &arguments.mib.to_string(), "--block-kib", &arguments.block_kib.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
    ensure!(line == "filled\n", "the process that fills the store has failed");
    if is_killed {
        child.kill()?;
        child.wait()?;
    } else {
        drop(child.stdin.take());
        ensure!(child.wait()?.success(), "the process that fills the store has failed");
    }
    Ok(())
}

fn fill(arguments: &Arguments, directory: &Path) -> Result<()> {
    let worker = Worker::new(arguments, Engine::open(arguments.config(directory))?)?;
    worker.wait("DRAM", |engine| engine.stats().dram_ready_bytes == engine.stats().dram_capacity_bytes)?;
    worker.wait("the warm start", |engine| engine.stats().warm_start.state != WarmState::Running)?;
    let bytes = KvBytes::Random.make((arguments.prompt_blocks() * arguments.block_bytes()) as usize, 1);
    let memory = memory_of(arguments.block_bytes(), bytes)?;
    for prompt in 0..arguments.prompts() {
        let keys = arguments.keys(prompt);
        worker.lookup(&keys, prompt)?;
        worker.save(&keys, prompt, &memory)?;
    }
    // Once more, so that what came last is in the next list, too.
    for prompt in 0..arguments.prompts() {
        worker.lookup(&arguments.keys(prompt), arguments.prompts() + prompt)?;
    }
    worker.wait("the list", |engine| engine.stats().warm_start.kept_blocks == arguments.blocks())?;
    println!("filled");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(worker.engine.close(Instant::now() + PATIENCE)?)
}

/// The drive without a store.
struct Drive {
    path: PathBuf,
    shape: Shape,
    requests: u64,
    /// The next of them.
    next: u64,
}

impl Drive {
    fn new(arguments: &Arguments, directory: &Path) -> Result<Self> {
        let (shape, path) = (arguments.shape(), directory.join("raw"));
        let requests = (arguments.blocks() * arguments.record_bytes()).div_ceil(shape.request_bytes);
        let memory_bytes = (shape.request_bytes * shape.depth as u64) as usize;
        let mut raw = RawDrive::create(&path, requests * shape.request_bytes, memory_bytes)?;
        let offsets: Vec<u64> = (0..requests).map(|number| number * shape.request_bytes).collect();
        raw.run(Transfer::Write { sync_bytes: 64 * MIB }, shape, &offsets)?;
        Ok(Self { path, shape, requests, next: 0 })
    }

    /// GB/s of reads of which each goes to other memory than those before it.
    fn read_new(&mut self) -> Result<f64> {
        let requests = (RING_BUFFER_BYTES / self.shape.request_bytes).min(self.requests);
        self.read(requests, requests)
    }

    /// GB/s of reads that go to the same memory again and again.
    fn read_again(&mut self) -> Result<f64> {
        self.read(self.shape.depth as u64, self.requests)
    }

    /// Reads on where the last one has ended.
    fn read(&mut self, memory_requests: u64, requests: u64) -> Result<f64> {
        let bytes = self.shape.request_bytes;
        let mut raw = RawDrive::open(&self.path, usize::try_from(memory_requests * bytes)?)?;
        let offsets: Vec<u64> = (0..requests).map(|number| (self.next + number) % self.requests * bytes).collect();
        self.next += requests;
        let took = raw.run(Transfer::Read, self.shape, &offsets)?;
        Ok(requests as f64 * bytes as f64 / 1e9 / took.as_secs_f64())
    }
}

/// What one warm start took.
struct WarmStart {
    seconds: f64,
    open_seconds: f64,
    read_blocks: u64,
    /// Blocks that lookups find in DRAM, of all.
    share: f64,
}

struct Compared {
    /// From the beginning of the open on.
    ratio: f64,
    /// From when the open returned.
    ratio_without_open: f64,
    seconds: f64,
    open_seconds: f64,
    drive_gbps: f64,
    drive_gbps_same_memory: f64,
    share: f64,
}

impl WarmStart {
    fn measure(arguments: &Arguments, directory: &Path) -> Result<Self> {
        let start = Instant::now();
        let engine = Engine::open(arguments.config(directory))?;
        let open_seconds = start.elapsed().as_secs_f64();
        let worker = Worker::new(arguments, engine)?;
        worker.wait("the warm start", |engine| engine.stats().warm_start.state != WarmState::Running)?;
        let seconds = start.elapsed().as_secs_f64();
        let progress = worker.engine.stats().warm_start;
        let mut found = 0;
        for prompt in 0..arguments.prompts() {
            found += worker.lookup(&arguments.keys(prompt), prompt)?;
        }
        let share = found as f64 / arguments.blocks() as f64;
        ensure!(worker.engine.stats().loaded_nvme_blocks == 0, "something was loaded");
        worker.engine.close(Instant::now() + PATIENCE)?;
        Ok(Self { seconds, open_seconds, read_blocks: progress.read_blocks, share })
    }

    fn against(self, drive_gbps: f64, drive_gbps_same_memory: f64, arguments: &Arguments, is_killed: bool) -> Compared {
        let Self { seconds, open_seconds, read_blocks, share } = self;
        let drive_seconds = read_blocks as f64 * arguments.record_bytes() as f64 / 1e9 / drive_gbps;
        let ratio = seconds / drive_seconds.max(1e-9);
        let ratio_without_open = (seconds - open_seconds).max(0.0) / drive_seconds.max(1e-9);
        let how = if is_killed { "killed" } else { "closed" };
        // A closed standard error is no reason to stop.
        let _ = writeln!(
            std::io::stderr(),
            "bench-warm: {how}: {seconds:.3} s ({open_seconds:.3} s of it to open) for {share:.3} of the hot set; the \
             drive reads {drive_gbps:.2} GB/s, {drive_seconds:.3} s; ratio {ratio:.3}, without the open {ratio_without_open:.3}"
        );
        Compared { ratio, ratio_without_open, seconds, open_seconds, drive_gbps, drive_gbps_same_memory, share }
    }
}

fn median(starts: &[Compared], of: impl Fn(&Compared) -> f64) -> f64 {
    let mut values: Vec<f64> = starts.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
