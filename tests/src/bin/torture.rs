//! Kills a server with SIGKILL at random moments, over and over, and checks after each start that every block that can
//! be read is bit-exact and that every block whose save was acknowledged as durable is there. Then, on a simulated drive:
//! power losses, every single operation failing, flipped bits, torn logs.
//!
//! Two stores in turn: one large enough to keep everything (nothing acknowledged may be missing), one so small that
//! regions are reclaimed all the time (blocks may be missing, never wrong). Kills aim at the open with its recovery, the
//! rebuild of a lost index, saves, flushes, the compactions of RocksDB after an open, and the close; what each one hit is
//! counted. Prints one JSON object as its last line; exit code 0 only if nothing was wrong.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use pegaflow_tests::power_loss::{self, Simulated};
use pegaflow_tests::{Chain, KvDevice, ServerOptions, ServerProcess, TestWorker, WorkerOptions};
use pegaflow_tiers::SimFailureKind;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// The longest that the server saves before it is killed.
const KILL_AFTER_MS_MAX: u64 = 300;
/// How long a start may take before it counts as a hang.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const CHAIN_BLOCKS_MAX: usize = 24;
const BLOCK_BYTES: u64 = 48 << 10;
/// The capacity of the store that keeps everything, and the bytes given to it after which it is checked as a whole and
/// made anew: a full store would rightly give up what is oldest.
const LARGE_CAPACITY: &str = "1GiB";
const LARGE_BYTES_MAX: u64 = 768 << 20;
/// How long an open is taken to last before one was seen.
const OPEN_TIME: Duration = Duration::from_millis(60);
/// Tables in the index from which RocksDB merges them.
const COMPACTION_TABLES: usize = 4;

#[derive(Parser)]
#[command(about = "Kills the server at random moments and checks what is left")]
struct Arguments {
    /// How often to kill.
    #[arg(long, default_value_t = 50)]
    kills: u64,
    /// Histories with power losses on a simulated drive.
    #[arg(long, default_value_t = 0)]
    seeds: u64,
    /// The first of their seeds.
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Runs one history and tells it on standard error; nothing else is run.
    #[arg(long)]
    seed: Option<u64>,
    /// Of the sweep of failing operations, the flipped bits and the torn logs every so many; 0: none of them.
    #[arg(long, default_value_t = 1)]
    stride: usize,
    /// What is simulated, and the servers that are killed, have encrypted stores.
    #[arg(long)]
    encrypted: bool,
    /// Replays the kills of a run: the seed that it printed.
    #[arg(long)]
    kill_seed: Option<u64>,
    /// Keeps the stores here instead of in a temporary directory.
    #[arg(long)]
    directory: Option<PathBuf>,
}

/// What a kill hit.
#[derive(Default, serde::Serialize)]
struct Hits {
    /// The open, which recovers what the kill before left.
    open: u64,
    /// An open without an index, which is made anew.
    rebuild: u64,
    /// Saves.
    save: u64,
    /// Of these, with regions being reclaimed.
    reclaim: u64,
    /// A flush that was waited for.
    flush: u64,
    /// The moments after an open with several tables in the index, when RocksDB merges them.
    compaction: u64,
    /// The close.
    close: u64,
}

#[derive(Default)]
struct Tally {
    kills: u64,
    hits: Hits,
    wrong_bytes: usize,
    lost_durable: usize,
    hangs: usize,
    right: usize,
}

/// One store and what is known of it.
struct Scenario {
    options: ServerOptions,
    /// Whether the store is large enough that nothing acknowledged may be missing.
    keeps_all: bool,
    durable: Vec<Chain>,
    other: Vec<Chain>,
    /// Bytes that the store was given since it was made.
    given_bytes: u64,
    /// How long an open takes.
    open_time: Duration,
}

/// What was going on when the server was killed.
#[derive(Default)]
struct Work {
    was_flushing: bool,
    reclaimed: u64,
}

/// Kills a process from a thread of its own.
struct Killer(std::thread::JoinHandle<()>);

impl Killer {
    fn at(pid: u32, after: Duration) -> Self {
        Self(std::thread::spawn(move || {
            std::thread::sleep(after);
            signal(pid, "-KILL");
        }))
    }

    /// While somebody waits for a flush; somewhen if nobody does.
    fn in_a_flush(pid: u32, flushing: &Arc<AtomicBool>, after: Duration) -> Self {
        let flushing = Arc::clone(flushing);
        Self(std::thread::spawn(move || {
            let started = Instant::now();
            while !flushing.load(Ordering::Acquire) && started.elapsed() < Duration::from_secs(2) {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(after);
            signal(pid, "-KILL");
        }))
    }

    fn after_terminating(pid: u32, after: Duration) -> Self {
        Self(std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            signal(pid, "-TERM");
            std::thread::sleep(after);
            signal(pid, "-KILL");
        }))
    }

    fn wait(self) {
        let _ = self.0.join();
    }
}

fn signal(pid: u32, signal: &str) {
    let _ = std::process::Command::new("kill").args([signal, &pid.to_string()]).stderr(Stdio::null()).status();
}

/// Regions that the server has reclaimed so far.
fn reclaimed_regions(worker: &TestWorker) -> u64 {
    fn find(value: &serde_json::Value) -> Option<u64> {
        match value {
            serde_json::Value::Object(fields) => {
                let own = fields.get("reclaimed_regions").and_then(serde_json::Value::as_u64);
                own.or_else(|| fields.values().find_map(find))
            }
            _ => None,
        }
    }
    worker.client.stats().ok().as_ref().and_then(find).unwrap_or(0)
}

impl Scenario {
    fn new(directory: &Path, name: &str, capacity: &str, keeps_all: bool, is_encrypted: bool) -> Result<Self> {
        let mut options = ServerOptions::small(&directory.join(name))?;
        if is_encrypted {
            let key = directory.join(format!("{name}.key"));
            std::fs::write(&key, "5a".repeat(32))?;
            std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
            options.more = vec!["--encryption-key-file".into(), key.display().to_string()];
        }
        options.capacity = capacity.into();
        options.region = "4MiB".into();
        options.dram = "32MiB".into();
        Ok(Self { options, keeps_all, durable: Vec::new(), other: Vec::new(), given_bytes: 0, open_time: OPEN_TIME })
    }

    fn worker(&self) -> Result<TestWorker> {
        let options = WorkerOptions {
            instance: "torture".into(),
            model: "torture".into(),
            block_bytes: BLOCK_BYTES,
            blocks: CHAIN_BLOCKS_MAX as u32,
            device: KvDevice::Host,
        };
        TestWorker::connect(&self.options.socket(), options, START_TIMEOUT)
    }

    /// Starts the server, checks a sample of what must be there, works until the kill, kills.
    fn round(&mut self, random: &mut SmallRng, tally: &mut Tally) -> Result<()> {
        if self.keeps_all && self.given_bytes > LARGE_BYTES_MAX {
            self.make_anew(random, tally)?;
        }
        tally.kills += 1;
        let aim = random.random_range(0..20);
        if aim < 5 {
            return self.kill_in_open(aim == 0, random, tally);
        }
        let tables = self.index_tables();
        let started = Instant::now();
        let mut server = match self.options.start(START_TIMEOUT) {
            Ok(server) => server,
            Err(error) => {
                eprintln!("no start: {error:#}");
                tally.hangs += 1;
                return Ok(());
            }
        };
        // The longest seen counts: a start that was disturbed is a start all the same.
        self.open_time = self.open_time.max(started.elapsed()).min(Duration::from_secs(2));
        if aim == 5 || (aim == 6 && tables >= COMPACTION_TABLES) {
            std::thread::sleep(Duration::from_millis(random.random_range(0..30)));
            server.kill()?;
            tally.hits.compaction += u64::from(tables >= COMPACTION_TABLES);
            return Ok(());
        }
        let mut worker = self.worker()?;
        self.check(&mut worker, 40, random, tally)?;
        let reclaimed = reclaimed_regions(&worker);
        let pid = server.pid();
        let flushing = Arc::new(AtomicBool::new(false));
        let killer = if aim == 7 {
            Killer::after_terminating(pid, Duration::from_millis(random.random_range(0..40)))
        } else if aim < 12 {
            Killer::in_a_flush(pid, &flushing, Duration::from_micros(random.random_range(0..20_000)))
        } else {
            Killer::at(pid, Duration::from_millis(random.random_range(0..KILL_AFTER_MS_MAX)))
        };
        let work = self.work_until_killed(&mut worker, &flushing, random);
        killer.wait();
        server.kill()?;
        worker.client.close(Duration::from_secs(5));
        let hits = &mut tally.hits;
        match (aim, work.was_flushing) {
            (7, _) => hits.close += 1,
            (_, true) => hits.flush += 1,
            _ => hits.save += 1,
        }
        hits.reclaim += u64::from(work.reclaimed > reclaimed);
        Ok(())
    }

    /// A kill before the server says that it is ready.
    fn kill_in_open(&mut self, without_index: bool, random: &mut SmallRng, tally: &mut Tally) -> Result<()> {
        if without_index {
            drop(std::fs::remove_dir_all(self.options.store().join("index")));
        }
        let mut server = self.options.spawn()?;
        std::thread::sleep(self.open_time.mul_f64(random.random_range(0.05..1.0)));
        server.kill()?;
        // It may have been ready already.
        let is_ready = server.wait_ready(START_TIMEOUT).is_ok();
        match (is_ready, without_index) {
            (true, _) => tally.hits.save += 1,
            (false, true) => tally.hits.rebuild += 1,
            (false, false) => tally.hits.open += 1,
        }
        Ok(())
    }

    /// How many tables RocksDB has.
    fn index_tables(&self) -> usize {
        let Ok(files) = std::fs::read_dir(self.options.store().join("index")) else { return 0 };
        files.flatten().filter(|file| file.path().extension().is_some_and(|extension| extension == "sst")).count()
    }

    /// Saves chain after chain; what a flush has confirmed is durable.
    fn work_until_killed(&mut self, worker: &mut TestWorker, flushing: &AtomicBool, random: &mut SmallRng) -> Work {
        let mut work = Work::default();
        let mut saved = Vec::new();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(20) {
            let chain = Chain::new(random.random(), random.random_range(1..=CHAIN_BLOCKS_MAX));
            let outcome = worker.save(&chain, 0, chain.keys.len());
            // With a page for the header; nothing shrinks.
            self.given_bytes += chain.keys.len() as u64 * (BLOCK_BYTES + 4096);
            let is_saved = matches!(outcome, Ok(outcome) if outcome.saved as usize == chain.keys.len());
            if is_saved {
                saved.push(chain)
            } else {
                self.other.push(chain)
            }
            if random.random_ratio(1, 4) {
                work.reclaimed = reclaimed_regions(worker).max(work.reclaimed);
                flushing.store(true, Ordering::Release);
                match worker.client.flush(Duration::from_secs(10)) {
                    Ok(()) => self.durable.append(&mut saved),
                    Err(_) => work.was_flushing = true,
                }
                flushing.store(false, Ordering::Release);
            }
            if !worker.client.is_connected() {
                break;
            }
        }
        self.other.append(&mut saved);
        work
    }

    /// Checks chains: `sample` of the durable ones (all if there are fewer), and some others.
    fn check(&self, worker: &mut TestWorker, sample: usize, random: &mut SmallRng, tally: &mut Tally) -> Result<()> {
        let skip = self.durable.len().saturating_sub(sample);
        let old =
            (0..skip.min(sample)).map(|_| random.random_range(0..skip)).filter_map(|index| self.durable.get(index));
        for chain in self.durable.iter().skip(skip).chain(old.collect::<Vec<_>>()) {
            let found = worker.check(chain)?;
            tally.wrong_bytes += found.wrong;
            tally.right += found.right;
            if self.keeps_all && found.blocks > 0 {
                eprintln!("lost: chain {:#x}, {} of {} blocks", chain.seed, found.blocks, chain.keys.len());
                tally.lost_durable += found.blocks;
            }
        }
        for chain in self.other.iter().rev().take(10) {
            let found = worker.check(chain)?;
            tally.wrong_bytes += found.wrong;
            tally.right += found.right;
        }
        Ok(())
    }

    /// Checks everything, and goes on with an empty store.
    fn make_anew(&mut self, random: &mut SmallRng, tally: &mut Tally) -> Result<()> {
        self.finish(random, tally)?;
        std::fs::remove_dir_all(self.options.store())?;
        (self.durable, self.other, self.given_bytes) = (Vec::new(), Vec::new(), 0);
        Ok(())
    }

    /// Checks everything after the last kill.
    fn finish(&mut self, random: &mut SmallRng, tally: &mut Tally) -> Result<()> {
        let mut server = self.options.start(START_TIMEOUT)?;
        let mut worker = self.worker()?;
        self.check(&mut worker, usize::MAX, random, tally)?;
        worker.client.close(Duration::from_secs(5));
        if server.terminate(Duration::from_secs(40))? != Some(0) {
            tally.hangs += 1;
        }
        Ok(())
    }
}

fn kill(arguments: &Arguments) -> Result<(Tally, u64, usize)> {
    let seed = arguments.kill_seed.unwrap_or_else(rand::random);
    if arguments.kills == 0 {
        return Ok((Tally::default(), seed, 0));
    }
    eprintln!("seed of the kills {seed} (again with --kill-seed {seed})");
    let mut random = SmallRng::seed_from_u64(seed);
    let temporary = tempfile::Builder::new().prefix("pegaflow-torture-").tempdir_in(".")?;
    let directory = arguments.directory.clone().unwrap_or_else(|| temporary.path().to_owned());
    let mut scenarios = [
        Scenario::new(&directory, "large", LARGE_CAPACITY, true, arguments.encrypted)?,
        Scenario::new(&directory, "small", "48MiB", false, arguments.encrypted)?,
    ];
    let progress = progress(arguments.kills, "kills")?;
    let mut tally = Tally::default();
    while tally.kills < arguments.kills && tally.hangs < 5 {
        let scenario = &mut scenarios[(tally.kills % 2) as usize];
        scenario.round(&mut random, &mut tally).context("a round")?;
        progress.set_position(tally.kills);
        progress.set_message(format!(
            "{} blocks right, {} wrong, {} lost",
            tally.right, tally.wrong_bytes, tally.lost_durable
        ));
    }
    for scenario in &mut scenarios {
        scenario.finish(&mut random, &mut tally).context("the last check")?;
    }
    progress.finish();
    let panics =
        scenarios.iter().map(|scenario| ServerProcess::panics(&scenario.options.directory.join("server.log"))).sum();
    Ok((tally, seed, panics))
}

fn simulate(arguments: &Arguments) -> Result<Simulated> {
    if let Some(seed) = arguments.seed {
        return power_loss::replay(seed, arguments.encrypted);
    }
    let mut simulated = Simulated::default();
    if arguments.seeds > 0 {
        let progress = progress(arguments.seeds, "power losses")?;
        power_loss::histories(arguments.first_seed, arguments.seeds, arguments.encrypted, &progress, &mut simulated)?;
        progress.finish();
        eprintln!("{:?} in {:.1?}", simulated.tally, simulated.elapsed);
    }
    if arguments.stride > 0 {
        power_loss::damages(arguments.stride, arguments.encrypted, &mut simulated)?;
        eprintln!("{:?} {:?}", simulated.sweep, simulated.damage);
    }
    Ok(simulated)
}

fn progress(length: u64, what: &str) -> Result<ProgressBar> {
    let progress = ProgressBar::new(length);
    progress.set_style(ProgressStyle::with_template(&format!("{{bar:30}} {{pos}}/{{len}} {what}, {{eta}} {{msg}}"))?);
    Ok(progress)
}

fn run(arguments: &Arguments) -> Result<bool> {
    let simulated = simulate(arguments)?;
    let (tally, seed, panics) = match arguments.seed {
        Some(_) => (Tally::default(), 0, 0),
        None => kill(arguments)?,
    };
    for failure in &simulated.failures {
        eprintln!("{failure} (again with --seed {})", failure.seed);
    }
    let found = |kinds: &[SimFailureKind]| simulated.failures.iter().filter(|f| kinds.contains(&f.kind)).count();
    let wrong_bytes = tally.wrong_bytes + found(&[SimFailureKind::WrongBytes, SimFailureKind::CameBack]);
    let lost_durable = tally.lost_durable + found(&[SimFailureKind::LostDurable]);
    let panics = panics + found(&[SimFailureKind::Panic]);
    let hangs = tally.hangs + found(&[SimFailureKind::Hang, SimFailureKind::Refused]);
    let (histories, sweep, damage) = (&simulated.tally, &simulated.sweep, &simulated.damage);
    println!(
        "{}",
        serde_json::json!({
            "kills": tally.kills, "kills_hit": tally.hits, "seeds": histories.seeds,
            "power_loss_seeds": histories.seeds, "crashes": histories.crashes,
            "crashes_in_open": histories.crashes_in_open,
            "seeds_per_second": histories.seeds as f64 / simulated.elapsed.as_secs_f64().max(1e-9),
            "wrong_bytes": wrong_bytes, "lost_durable": lost_durable, "panics": panics, "hangs": hangs,
            "blocks_right": tally.right, "records_right": histories.right,
            "sweep_operations": sweep.operations, "fault_points": sweep.runs, "flips": damage.flips,
            "torn_cuts": damage.torn_cuts, "seed": seed,
        })
    );
    Ok(wrong_bytes + lost_durable + panics + hangs + simulated.failures.len() == 0)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: {error:#}");
            ExitCode::FAILURE
        }
    }
}
