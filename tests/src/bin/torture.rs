//! Kills a server with SIGKILL at random moments, over and over, and checks after each start that every block that can
//! be read is bit-exact and that every block whose save was acknowledged as durable is there.
//!
//! Two stores in turn: one large enough to keep everything (nothing acknowledged may be missing), one so small that
//! regions are reclaimed all the time (blocks may be missing, never wrong). One kill in ten hits the server while it
//! opens its store. Prints one JSON object as its last line; exit code 0 only if nothing was wrong.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use pegaflow_tests::{Chain, KvDevice, ServerOptions, ServerProcess, TestWorker, WorkerOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// The longest that the server saves before it is killed.
const KILL_AFTER_MS_MAX: u64 = 300;
/// How long a start may take before it counts as a hang.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const CHAIN_BLOCKS_MAX: usize = 24;

#[derive(Parser)]
#[command(about = "Kills the server at random moments and checks what is left")]
struct Arguments {
    /// How often to kill.
    #[arg(long, default_value_t = 50)]
    kills: u64,
    /// Power-loss seeds; these come with the issue on the store.
    #[arg(long, default_value_t = 0)]
    seeds: u64,
    /// Replays a run: the seed that it printed.
    #[arg(long)]
    seed: Option<u64>,
    /// Keeps the stores here instead of in a temporary directory.
    #[arg(long)]
    directory: Option<PathBuf>,
}

#[derive(Default)]
struct Tally {
    kills: u64,
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
}

impl Scenario {
    fn new(directory: &Path, name: &str, capacity: &str, keeps_all: bool) -> Result<Self> {
        let mut options = ServerOptions::small(&directory.join(name))?;
        options.capacity = capacity.into();
        options.region = "4MiB".into();
        options.dram = "32MiB".into();
        Ok(Self { options, keeps_all, durable: Vec::new(), other: Vec::new() })
    }

    fn worker(&self) -> Result<TestWorker> {
        let options = WorkerOptions {
            instance: "torture".into(),
            model: "torture".into(),
            block_bytes: 48 * 1024,
            blocks: CHAIN_BLOCKS_MAX as u32,
            device: KvDevice::Host,
        };
        TestWorker::connect(&self.options.socket(), options, START_TIMEOUT)
    }

    /// Starts the server, checks a sample of what must be there, saves until the kill, kills.
    fn round(&mut self, random: &mut SmallRng, tally: &mut Tally) -> Result<()> {
        if random.random_ratio(1, 10) {
            let mut server = self.options.spawn()?;
            std::thread::sleep(Duration::from_millis(random.random_range(0..100)));
            server.kill()?;
            tally.kills += 1;
            return Ok(());
        }
        let mut server = match self.options.start(START_TIMEOUT) {
            Ok(server) => server,
            Err(error) => {
                eprintln!("no start: {error:#}");
                tally.hangs += 1;
                return Ok(());
            }
        };
        let mut worker = self.worker()?;
        self.check(&mut worker, 40, random, tally)?;
        let kill_after = Duration::from_millis(random.random_range(0..KILL_AFTER_MS_MAX));
        let pid = server.pid();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(kill_after);
            let _ = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        });
        self.save_until_killed(&mut worker, random);
        let _ = killer.join();
        server.kill()?;
        worker.client.close(Duration::from_secs(5));
        tally.kills += 1;
        Ok(())
    }

    /// Saves chain after chain; what a flush has confirmed is durable.
    fn save_until_killed(&mut self, worker: &mut TestWorker, random: &mut SmallRng) {
        let mut saved = Vec::new();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(20) {
            let chain = Chain::new(random.random(), random.random_range(1..=CHAIN_BLOCKS_MAX));
            let outcome = worker.save(&chain, 0, chain.keys.len());
            let is_saved = matches!(outcome, Ok(outcome) if outcome.saved as usize == chain.keys.len());
            if is_saved {
                saved.push(chain)
            } else {
                self.other.push(chain)
            }
            if random.random_ratio(1, 4) && worker.client.flush(Duration::from_secs(10)).is_ok() {
                self.durable.append(&mut saved);
            }
            if !worker.client.is_connected() {
                break;
            }
        }
        self.other.append(&mut saved);
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

fn run(arguments: &Arguments) -> Result<(Tally, u64, usize)> {
    let seed = arguments.seed.unwrap_or_else(rand::random);
    eprintln!("seed {seed} (replay with --seed {seed})");
    let mut random = SmallRng::seed_from_u64(seed);
    let temporary = tempfile::Builder::new().prefix("pegaflow-torture-").tempdir_in(".")?;
    let directory = arguments.directory.clone().unwrap_or_else(|| temporary.path().to_owned());
    let mut scenarios =
        [Scenario::new(&directory, "large", "4GiB", true)?, Scenario::new(&directory, "small", "48MiB", false)?];
    let progress = ProgressBar::new(arguments.kills);
    progress.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} kills, {msg}")?);
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let _ = arguments.seeds;
    match run(&arguments) {
        Ok((tally, seed, panics)) => {
            let is_clean = tally.wrong_bytes == 0 && tally.lost_durable == 0 && panics == 0 && tally.hangs == 0;
            println!(
                "{}",
                serde_json::json!({
                    "kills": tally.kills, "power_loss_seeds": 0, "fault_points": 0, "wrong_bytes": tally.wrong_bytes,
                    "lost_durable": tally.lost_durable, "panics": panics, "hangs": tally.hangs,
                    "blocks_right": tally.right, "seed": seed,
                })
            );
            if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("torture: {error:#}");
            ExitCode::FAILURE
        }
    }
}
