//! Kills workers with SIGKILL in the middle of their loads and saves: the server must go on, everything that the dead worker
//! held must come back, and the next worker must get right bytes. Prints one JSON object as its last line.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use pegaflow_tests::{Chain, KvDevice, Missing, ServerOptions, ServerProcess, TestWorker, WorkerOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCKS: u32 = 64;
const CHAINS: u64 = 24;
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Parser)]
#[command(about = "Kills workers in the middle of loads and saves and checks the server and the bytes")]
struct Arguments {
    /// How often to kill.
    #[arg(long, default_value_t = 18)]
    kills: u32,
    /// Where the workers' KV caches are: `host`, or `cuda:0` for the first GPU.
    #[arg(long, default_value = "host")]
    device: KvDevice,
    /// Bytes of a block; a multiple of 48.
    #[arg(long, default_value_t = 1_572_864)]
    block_bytes: u64,
    /// Replays a run: the seed that it printed.
    #[arg(long)]
    seed: Option<u64>,
    /// Plays the worker on this socket until it is killed.
    #[arg(long, hide = true)]
    worker: Option<PathBuf>,
}

impl Arguments {
    fn connect(&self, socket: &Path, name: &str) -> Result<TestWorker> {
        let options = WorkerOptions {
            instance: name.into(),
            model: "killed".into(),
            block_bytes: self.block_bytes,
            blocks: BLOCKS,
            device: self.device,
        };
        TestWorker::connect(socket, options, PATIENCE)
    }
}

/// Loads and saves until somebody kills this process.
fn work(arguments: &Arguments, socket: &Path, seed: u64) -> Result<()> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut worker = arguments.connect(socket, "victim")?;
    // A GPU reaches the arena some time after the worker has registered; a save waits for that.
    let chain = Chain::new(0, BLOCKS as usize);
    worker.save(&chain, 0, chain.keys.len())?;
    println!("working");
    loop {
        let chain = Chain::new(random.random_range(0..CHAINS), BLOCKS as usize);
        if random.random_bool(0.5) {
            worker.save(&chain, 0, chain.keys.len())?;
        } else if random.random_bool(0.5) {
            worker.load_placed(&chain)?;
        } else {
            worker.check(&chain)?;
        }
    }
}

struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn start_victim(arguments: &Arguments, socket: &Path, seed: u64) -> Result<Victim> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--worker")
        .arg(socket)
        .args(["--device", &arguments.device.to_string(), "--block-bytes", &arguments.block_bytes.to_string()])
        .args(["--seed", &seed.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("piped")?;
    let victim = Victim(child);
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() != "working" {
        bail!("the worker did not start: {line}");
    }
    Ok(victim)
}

/// What clients hold: sessions, operations, bytes of DRAM in no block, and the server's open sockets.
fn held(worker: &TestWorker, server: &ServerProcess, slot_bytes: u64) -> Result<[u64; 4]> {
    let stats = worker.client.stats()?;
    let engine = |name: &str| stats["engine"][name].as_u64().with_context(|| format!("no {name}"));
    let in_blocks = engine("dram_blocks")? * slot_bytes;
    let unused = engine("dram_used_bytes")?.abs_diff(in_blocks);
    Ok([engine("sessions")?, engine("operations")?, unused, server.open_sockets() as u64])
}

fn run(arguments: &Arguments, seed: u64) -> Result<serde_json::Value> {
    let directory = tempfile::tempdir()?;
    // All chains fit in DRAM, so that placed loads are met as well as ordinary ones.
    let dram = CHAINS * u64::from(BLOCKS) * (arguments.block_bytes + 8192) * 2;
    let options = ServerOptions {
        dram: dram.max(64 << 20).to_string(),
        capacity: (2 * dram).max(1 << 30).to_string(),
        region: "64MiB".into(),
        ..ServerOptions::small(directory.path())?
    };
    let mut server = options.start(PATIENCE)?;
    let socket = options.socket();
    let mut random = SmallRng::seed_from_u64(seed);
    let mut survivor = arguments.connect(&socket, "survivor")?;
    let slot_bytes = (arguments.block_bytes.next_multiple_of(4096)) + 4096;
    let before = held(&survivor, &server, slot_bytes)?;
    let (mut tally, mut leaked) = (Missing::default(), 0u64);
    for kill in 0..arguments.kills {
        let victim = start_victim(arguments, &socket, random.random())?;
        std::thread::sleep(Duration::from_millis(random.random_range(20..400)));
        drop(victim);
        let deadline = Instant::now() + PATIENCE;
        while held(&survivor, &server, slot_bytes)? != before {
            if Instant::now() >= deadline {
                eprintln!("kill {kill}: held {:?}, before {before:?}", held(&survivor, &server, slot_bytes)?);
                leaked += 1;
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for number in 0..CHAINS {
            let found = survivor.check(&Chain::new(number, BLOCKS as usize))?;
            tally.right += found.right;
            tally.wrong += found.wrong;
        }
    }
    // Leases whose places were told outlive their workers, but not their time.
    let deadline = Instant::now() + PATIENCE;
    let leases = || survivor.client.stats()?["engine"]["leases"].as_u64().context("no leases");
    while leases()? > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
    }
    leaked += leases()?;
    let is_alive = server.is_running();
    server.kill()?;
    Ok(serde_json::json!({
        "device": arguments.device.to_string(),
        "kills": arguments.kills,
        "blocks_right": tally.right,
        "wrong_bytes": tally.wrong,
        "leaked": leaked,
        "server_alive": is_alive,
        "seed": seed,
    }))
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(rand::random);
    if let Some(socket) = &arguments.worker {
        work(&arguments, socket, seed)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("seed {seed} (replay with --seed {seed})");
    let result = run(&arguments, seed)?;
    let is_good = result["wrong_bytes"] == 0
        && result["leaked"] == 0
        && result["server_alive"] == true
        && result["blocks_right"].as_u64() > Some(0);
    println!("{result}");
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
