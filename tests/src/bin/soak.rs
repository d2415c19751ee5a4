//! A server under full churn for a long time: saves, loads, cancels, expiring leases and sudden disconnects on a store so
//! small that regions are given up all the time. Every second its memory, its open files and its bytes on disk are
//! sampled; every block that is loaded is compared. Prints one JSON object as its last line.
//!
//! `rss_growth` and `fd_growth` compare two medians: of the first tenth of the samples after the warm-up, and of the last
//! tenth. Medians, since memory goes up and down by several MiB with RocksDB's memtables, in a few seconds. The warm-up is
//! a fifth of the run, at least three minutes of it (half of a shorter run): threads, tables in memory and the buffers of
//! encoders reach their size in it. The arena is all there when the server says that it is ready, so it is no growth, but it
//! is in the RSS that growth is a share of: `anonymous_mib`, `file_mib` and `shared_mib` (the arena) tell the parts of
//! `rss_mib` at the first and at the last tenth. `capacity_exceeded` counts the samples over the bound. Exit code 0 only
//! if memory is flat within 2 %, descriptors are flat and the bound always held.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use pegaflow_tests::{Chain, KvDevice, ServerOptions, ServerProcess, TestWorker, WorkerOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;
const BLOCKS: u32 = 32;
/// The smallest block; clients have one to four times of it.
const BLOCK_BYTES: u64 = 48 << 10;
/// Sequences that clients draw from: several times what the store holds.
const CHAINS: u64 = 2000;
const CAPACITY_MIB: u64 = 512;
const DRAM_MIB: u64 = 128;
/// What the index may take beside the regions: RocksDB's logs, manifest and messages, and twice a row for every record.
const INDEX_FIXED_BYTES: u64 = 160 * MIB;
const INDEX_ROW_BYTES: u64 = 2 * 256;
/// The share of the run that is warm-up (caches and memtables fill), the least seconds of it, and the most share of a short
/// run.
const WARM_UP_SHARE: usize = 5;
const WARM_UP_SECONDS: usize = 180;
const WARM_UP_SHARE_MAX: usize = 2;
const RSS_GROWTH_MAX: f64 = 0.02;
/// Connections come and go while a sample is taken.
const FD_GROWTH_MAX: i64 = 4;

#[derive(Parser)]
#[command(about = "Churns one server for a long time and looks for growth")]
struct Arguments {
    /// How long, in minutes.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Clients at a time.
    #[arg(long, default_value_t = 8)]
    clients: u64,
    /// Replays a run: the seed that it printed.
    #[arg(long)]
    seed: Option<u64>,
    /// Writes every sample here as a line of comma-separated numbers: seconds, kB of RSS, of it anonymous, of files and
    /// shared, descriptors, bytes of regions, bytes on disk in all.
    #[arg(long)]
    samples: Option<PathBuf>,
}

#[derive(Default)]
struct Tally {
    operations: AtomicU64,
    right: AtomicU64,
    wrong: AtomicU64,
    disconnects: AtomicU64,
    errors: AtomicU64,
}

/// What is measured every second.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    rss_kb: u64,
    anonymous_kb: u64,
    file_kb: u64,
    shared_kb: u64,
    descriptors: u64,
    region_bytes: u64,
    disk_bytes: u64,
}

impl Sample {
    fn take(server: &ServerProcess, store: &Path) -> Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            line.trim().trim_end_matches("kB").trim().parse().with_context(|| format!("{name} {line}"))
        };
        let mut sample = Self {
            rss_kb: field("VmRSS:")?,
            anonymous_kb: field("RssAnon:")?,
            file_kb: field("RssFile:")?,
            shared_kb: field("RssShmem:")?,
            descriptors: descriptors(server.pid()),
            ..Self::default()
        };
        sample.add_tree(store);
        Ok(sample)
    }

    /// Adds what lies in a directory. Files of the index come and go meanwhile.
    fn add_tree(&mut self, directory: &Path) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else { continue };
            if found.is_dir() {
                self.add_tree(&entry.path());
                continue;
            }
            let bytes = found.blocks() * 512;
            self.disk_bytes += bytes;
            if entry.file_name().to_string_lossy().starts_with("regions") {
                self.region_bytes += bytes;
            }
        }
    }
}

/// Open files without the tables of the index, of which RocksDB opens more and fewer within a bound of its own.
fn descriptors(pid: u32) -> u64 {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let target = |entry: std::fs::DirEntry| std::fs::read_link(entry.path()).unwrap_or_default();
    links.map(target).filter(|target| !target.to_string_lossy().contains("/index/")).count() as u64
}

/// The life of one client, up to a disconnect.
fn client(socket: &Path, number: u64, random: &mut SmallRng, stop: &AtomicBool, tally: &Tally) -> Result<()> {
    let options = WorkerOptions {
        instance: format!("soak-{number}"),
        model: "soak".into(),
        block_bytes: BLOCK_BYTES * (1 + number % 4),
        blocks: BLOCKS,
        device: KvDevice::Host,
    };
    let mut worker = TestWorker::connect(socket, options, Duration::from_secs(30))?;
    while !stop.load(Ordering::Relaxed) {
        // Half of what is asked for are a few popular sequences, which hit.
        let seed = if random.random() { random.random_range(0..40) } else { random.random_range(0..CHAINS) };
        let chain = Chain::new(seed, random.random_range(1..=BLOCKS as usize));
        tally.operations.fetch_add(1, Ordering::Relaxed);
        match random.random_range(0..1000) {
            0..500 => {
                let operation = worker.start_save(&chain, 0, chain.keys.len())?;
                if random.random_ratio(1, 20) {
                    worker.client.cancel(operation);
                }
                worker.wait(operation, Duration::from_secs(90))?;
            }
            500..900 => {
                let found = worker.check(&chain)?;
                tally.right.fetch_add(found.right as u64, Ordering::Relaxed);
                tally.wrong.fetch_add(found.wrong as u64, Ordering::Relaxed);
            }
            900..980 => {
                let reply = worker.lookup(&chain, Some(Duration::from_secs(60)))?;
                let Some(lease) = reply.lease else { continue };
                let operation = worker.start_load(lease, reply.hit_blocks)?;
                worker.client.cancel(operation);
                worker.wait_load(operation)?;
            }
            // The lease is left to its time.
            980..995 => drop(worker.lookup(&chain, Some(Duration::from_secs(2)))?),
            _ => {
                worker.start_save(&chain, 0, chain.keys.len())?;
                tally.disconnects.fetch_add(1, Ordering::Relaxed);
                break;
            }
        }
    }
    worker.client.close(Duration::from_secs(30));
    Ok(())
}

fn median(values: impl Iterator<Item = u64>) -> f64 {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0) as f64
}

fn run(arguments: &Arguments) -> Result<serde_json::Value> {
    let seed = arguments.seed.unwrap_or_else(rand::random);
    eprintln!("seed {seed} (replay with --seed {seed})");
    let temporary = tempfile::Builder::new().prefix("pegaflow-soak-").tempdir_in(".")?;
    let mut options = ServerOptions::small(temporary.path())?;
    options.dram = format!("{DRAM_MIB}MiB");
    options.capacity = format!("{CAPACITY_MIB}MiB");
    options.region = "16MiB".into();
    let mut server = options.start(Duration::from_secs(60))?;
    let (socket, store) = (options.socket(), options.store());
    let (tally, stop) = (Tally::default(), AtomicBool::new(false));
    let samples = std::thread::scope(|scope| {
        for number in 0..arguments.clients {
            let (tally, socket, stop) = (&tally, &socket, &stop);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed ^ number);
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = client(socket, number, &mut random, stop, tally) {
                        eprintln!("client {number}: {error:#}");
                        tally.errors.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let samples = watch(arguments, &server, &store);
        stop.store(true, Ordering::Relaxed);
        samples
    })?;
    let exit_code = server.terminate(Duration::from_secs(60))?;
    let bound = CAPACITY_MIB * MIB;
    let disk_bound = bound + INDEX_FIXED_BYTES + bound / BLOCK_BYTES * INDEX_ROW_BYTES;
    // The file system's own pages for a file of regions.
    let is_over = |sample: &&Sample| sample.region_bytes > bound + MIB || sample.disk_bytes > disk_bound;
    let exceeded = samples.iter().filter(is_over).count();
    let warm_up = (samples.len() / WARM_UP_SHARE).max(WARM_UP_SECONDS.min(samples.len() / WARM_UP_SHARE_MAX));
    let settled = samples.get(warm_up..).unwrap_or_default();
    let tenth = settled.len().div_ceil(10);
    let (first, last) = (&settled[..tenth], &settled[settled.len() - tenth..]);
    let kb = |samples: &[Sample], of: fn(&Sample) -> u64| median(samples.iter().map(of));
    let rss = |samples: &[Sample]| kb(samples, |sample| sample.rss_kb);
    let mib = |of: fn(&Sample) -> u64| [first, last].map(|samples| (kb(samples, of) / 102.4).round() / 10.0);
    let files = |samples: &[Sample]| median(samples.iter().map(|sample| sample.descriptors)) as i64;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Ok(serde_json::json!({
        "rss_growth": rss(last) / rss(first).max(1.0) - 1.0, "fd_growth": files(last) - files(first),
        "capacity_exceeded": exceeded, "samples": samples.len(), "minutes": arguments.minutes,
        "rss_mib": mib(|sample| sample.rss_kb), "anonymous_mib": mib(|sample| sample.anonymous_kb),
        "file_mib": mib(|sample| sample.file_kb), "shared_mib": mib(|sample| sample.shared_kb), "fds": [files(first), files(last)],
        "disk_mib_max": samples.iter().map(|sample| sample.disk_bytes).max().unwrap_or(0) / MIB,
        "disk_mib_bound": disk_bound / MIB, "operations": count(&tally.operations),
        "disconnects": count(&tally.disconnects), "errors": count(&tally.errors), "blocks_right": count(&tally.right),
        "wrong_bytes": count(&tally.wrong), "panics": ServerProcess::panics(&options.directory.join("server.log")),
        "exit_code": exit_code, "seed": seed,
    }))
}

/// A sample every second until the time is over.
fn watch(arguments: &Arguments, server: &ServerProcess, store: &Path) -> Result<Vec<Sample>> {
    let total = (arguments.minutes * 60.0).max(20.0) as u64;
    let progress = ProgressBar::new(total);
    progress.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} s, {msg}")?);
    let mut log = arguments.samples.as_ref().map(std::fs::File::create).transpose()?;
    let started = Instant::now();
    let mut samples = Vec::new();
    for second in 1..=total {
        std::thread::sleep((started + Duration::from_secs(second)).saturating_duration_since(Instant::now()));
        let sample = Sample::take(server, store).context("the server has ended")?;
        if let Some(log) = &mut log {
            let Sample { rss_kb, anonymous_kb, file_kb, shared_kb, descriptors, region_bytes, disk_bytes } = sample;
            let memory = format!("{rss_kb},{anonymous_kb},{file_kb},{shared_kb}");
            let line = format!("{second},{memory},{descriptors},{region_bytes},{disk_bytes}\n");
            std::io::Write::write_all(log, line.as_bytes())?;
        }
        progress.set_position(second);
        let Sample { rss_kb, descriptors, disk_bytes, .. } = sample;
        progress.set_message(format!("{} MiB, {descriptors} files, {} MiB on disk", rss_kb >> 10, disk_bytes >> 20));
        samples.push(sample);
    }
    progress.finish();
    Ok(samples)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(report) => {
            println!("{report}");
            let number = |name: &str| report.get(name).and_then(serde_json::Value::as_f64).unwrap_or(f64::MAX);
            let names = ["capacity_exceeded", "wrong_bytes", "errors", "panics", "exit_code"];
            let is_flat = number("rss_growth") <= RSS_GROWTH_MAX && number("fd_growth") <= FD_GROWTH_MAX as f64;
            let is_clean = is_flat && names.iter().all(|name| number(name) == 0.0);
            if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
