//! Many clients at once: saves, lookups, loads, cancels and sudden disconnects of random sizes against one server over
//! its socket. Every block that is loaded is compared byte for byte; at the end leases, sessions, operations and open
//! files must be back where they were. Then the server must be idle. Prints one JSON object as its last line.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use pegaflow_tests::{Chain, KvDevice, ServerOptions, ServerProcess, TestWorker, WorkerOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCKS: u32 = 32;

#[derive(Parser)]
#[command(about = "Hammers one server with many clients and looks for leaks and wrong bytes")]
struct Arguments {
    /// Clients at a time.
    #[arg(long, default_value_t = 64)]
    clients: u64,
    /// How long, in seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// How long the idle server is watched, in seconds; 0 skips it.
    #[arg(long, default_value_t = 30)]
    idle_seconds: u64,
    /// Replays a run: the seed that it printed.
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Default)]
struct Tally {
    operations: AtomicU64,
    right: AtomicU64,
    wrong: AtomicU64,
    disconnects: AtomicU64,
    errors: AtomicU64,
}

/// The life of one client; some block sizes and chains are shared by several of them.
fn client(socket: &Path, number: u64, random: &mut SmallRng, until: Instant, tally: &Tally) -> Result<()> {
    let block_bytes = 48 * 1024 * (1 + number % 4);
    let options = WorkerOptions {
        instance: format!("stress-{number}"),
        model: "stress".into(),
        block_bytes,
        blocks: BLOCKS,
        device: KvDevice::Host,
    };
    let mut worker = TestWorker::connect(socket, options, Duration::from_secs(30))?;
    while Instant::now() < until {
        let chain = Chain::new(random.random_range(0..200), random.random_range(1..=BLOCKS as usize));
        tally.operations.fetch_add(1, Ordering::Relaxed);
        match random.random_range(0..100) {
            0..40 => {
                let operation = worker.start_save(&chain, 0, chain.keys.len())?;
                if random.random_ratio(1, 8) {
                    worker.client.cancel(operation);
                }
                worker.wait(operation, Duration::from_secs(90))?;
            }
            40..80 => {
                let found = worker.check(&chain)?;
                tally.right.fetch_add(found.right as u64, Ordering::Relaxed);
                tally.wrong.fetch_add(found.wrong as u64, Ordering::Relaxed);
            }
            80..95 => cancelled_load(&mut worker, &chain, random, tally)?,
            95..98 => drop(worker.lookup(&chain, Some(Duration::from_secs(5)))?),
            _ => {
                // In the middle of a save: the client is gone, whatever the server does at the moment.
                worker.start_save(&chain, 0, chain.keys.len())?;
                tally.disconnects.fetch_add(1, Ordering::Relaxed);
                worker.client.close(Duration::from_secs(30));
                return Ok(());
            }
        }
    }
    worker.client.close(Duration::from_secs(30));
    Ok(())
}

/// A load that is cancelled at once: what it says has arrived must be right all the same.
fn cancelled_load(worker: &mut TestWorker, chain: &Chain, random: &mut SmallRng, tally: &Tally) -> Result<()> {
    let reply = worker.lookup(chain, Some(Duration::from_secs(60)))?;
    let Some(lease) = reply.lease else { return Ok(()) };
    if random.random_ratio(1, 3) {
        worker.client.release(lease);
        return Ok(());
    }
    let operation = worker.start_load(lease, reply.hit_blocks)?;
    worker.client.cancel(operation);
    let outcome = worker.wait_load(operation)?;
    for (index, key) in chain.keys.iter().enumerate().take(reply.hit_blocks as usize) {
        if !outcome.failed.contains(&(index as u32)) {
            let is_wrong = worker.difference(index as u32, key).is_some();
            tally.wrong.fetch_add(is_wrong.into(), Ordering::Relaxed);
            tally.right.fetch_add((!is_wrong).into(), Ordering::Relaxed);
        }
    }
    Ok(())
}

struct Gauges {
    leases: u64,
    operations: u64,
    instances: u64,
    sessions: u64,
    open_files: usize,
}

fn gauges(socket: &Path, server: &ServerProcess) -> Result<Gauges> {
    let options = WorkerOptions {
        instance: "gauges".into(),
        model: "gauges".into(),
        block_bytes: 48,
        blocks: 1,
        device: KvDevice::Host,
    };
    let worker = TestWorker::connect(socket, options, Duration::from_secs(30))?;
    let stats = worker.client.stats()?;
    let number = |name: &str| stats["engine"][name].as_u64().with_context(|| format!("no {name} in {stats}"));
    let gauges = Gauges {
        leases: number("leases")?,
        operations: number("operations")?,
        instances: number("instances")?,
        sessions: number("sessions")?,
        open_files: server.open_files(),
    };
    worker.client.close(Duration::from_secs(5));
    Ok(gauges)
}

fn run(arguments: &Arguments) -> Result<serde_json::Value> {
    let seed = arguments.seed.unwrap_or_else(rand::random);
    eprintln!("seed {seed} (replay with --seed {seed})");
    let temporary = tempfile::Builder::new().prefix("pegaflow-stress-").tempdir_in(".")?;
    let mut options = ServerOptions::small(temporary.path())?;
    options.dram = "256MiB".into();
    let mut server = options.start(Duration::from_secs(60))?;
    let socket = options.socket();
    let before = gauges(&socket, &server)?;
    let tally = Tally::default();
    let until = Instant::now() + Duration::from_secs(arguments.seconds);
    std::thread::scope(|scope| {
        for number in 0..arguments.clients {
            let (tally, socket) = (&tally, &socket);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed ^ number);
                while Instant::now() < until {
                    if let Err(error) = client(socket, number, &mut random, until, tally) {
                        eprintln!("client {number}: {error:#}");
                        tally.errors.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    // Disconnected sessions end on their own; give them the bound that they have.
    let settled = Instant::now() + Duration::from_secs(30);
    let mut after = gauges(&socket, &server)?;
    while (after.sessions, after.operations, after.leases) != (before.sessions, before.operations, before.leases)
        && Instant::now() < settled
    {
        std::thread::sleep(Duration::from_millis(200));
        after = gauges(&socket, &server)?;
    }
    // The server's own store opens further index files as it grows; those are bounded by its settings.
    let leaked_files = after.open_files.saturating_sub(before.open_files);
    let leaks = after.leases
        + after.operations.saturating_sub(before.operations)
        + after.sessions.saturating_sub(before.sessions)
        + after.instances.saturating_sub(before.instances);
    let idle_percent = idle(&server, arguments.idle_seconds);
    let exit_code = server.terminate(Duration::from_secs(60))?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Ok(serde_json::json!({
        "clients": arguments.clients, "seconds": arguments.seconds, "operations": count(&tally.operations),
        "disconnects": count(&tally.disconnects), "errors": count(&tally.errors), "blocks_right": count(&tally.right),
        "wrong_bytes": count(&tally.wrong), "leaks": leaks, "leaked_files": leaked_files, "idle_cpu_percent": idle_percent,
        "panics": ServerProcess::panics(&options.directory.join("server.log")), "exit_code": exit_code, "seed": seed,
    }))
}

/// CPU time of the server while nobody asks anything, in percent of one core.
fn idle(server: &ServerProcess, seconds: u64) -> Option<f64> {
    let before = (seconds > 0).then(|| server.cpu_ticks())?;
    std::thread::sleep(Duration::from_secs(seconds));
    Some((server.cpu_ticks() - before) as f64 / seconds as f64)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(report) => {
            println!("{report}");
            let is_zero = |name: &str| report.get(name).and_then(serde_json::Value::as_u64) == Some(0);
            let is_clean = ["wrong_bytes", "leaks", "errors", "panics", "exit_code"].iter().all(|name| is_zero(name));
            if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("stress: {error:#}");
            ExitCode::FAILURE
        }
    }
}
