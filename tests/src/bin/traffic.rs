//! Real traffic for whoever watches a server: workers that save, look up with a question as vLLM's scheduler does, and load
//! what was found, over and over, at a steady pace. Every loaded block is compared. Prints one JSON object as its last line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use pegaflow_tests::{Chain, KvDevice, TestWorker, WorkerOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCKS: u32 = 16;

#[derive(Parser)]
#[command(about = "Saves, looks up and loads at a steady pace, for tests of what watches a server")]
struct Arguments {
    /// The server's socket.
    #[arg(long)]
    socket: PathBuf,
    /// How long, in seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Workers at a time.
    #[arg(long, default_value_t = 2)]
    workers: u64,
    /// Requests a second of each worker.
    #[arg(long, default_value_t = 20)]
    pace: u32,
    /// Bytes of a block, a multiple of 48.
    #[arg(long, default_value_t = 384 * 1024)]
    block_bytes: u64,
    /// How many different prompts there are; the first are asked for most often.
    #[arg(long, default_value_t = 64)]
    prompts: u64,
    /// Replays a run: the seed that it printed.
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Default)]
struct Tally {
    requests: u64,
    right: u64,
    wrong: u64,
}

/// What one worker does until the time is over.
fn work(arguments: &Arguments, number: u64, seed: u64) -> Result<Tally> {
    let options = WorkerOptions {
        instance: format!("traffic-{number}"),
        model: format!("traffic-{number}"),
        block_bytes: arguments.block_bytes,
        blocks: BLOCKS,
        device: KvDevice::Host,
    };
    let mut worker = TestWorker::connect(&arguments.socket, options, Duration::from_secs(30))?;
    let mut random = SmallRng::seed_from_u64(seed ^ number);
    let pause = Duration::from_secs(1) / arguments.pace.max(1);
    let (started, mut tally) = (Instant::now(), Tally::default());
    while started.elapsed() < Duration::from_secs(arguments.seconds) {
        // Squared: few prompts are asked for often, many seldom.
        let rank = random.random::<f64>().powi(2) * arguments.prompts as f64;
        let chain = Chain::new(rank as u64, BLOCKS as usize);
        let found = worker.ask_and_check(&chain, &format!("cmpl-{number:04x}-{}", tally.requests))?;
        tally.right += found.right as u64;
        tally.wrong += found.wrong as u64;
        if found.blocks > 0 {
            worker.save(&chain, 0, chain.keys.len())?;
        }
        tally.requests += 1;
        let due = pause * u32::try_from(tally.requests).unwrap_or(u32::MAX);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
    worker.client.close(Duration::from_secs(10));
    Ok(tally)
}

fn run(arguments: &Arguments) -> Result<Tally> {
    let seed = arguments.seed.unwrap_or_else(rand::random);
    eprintln!("seed {seed} (replay with --seed {seed})");
    let outcomes: Vec<Result<Tally>> = std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..arguments.workers).map(|number| scope.spawn(move || work(arguments, number, seed))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| anyhow::bail!("a worker panicked"))).collect()
    });
    outcomes.into_iter().try_fold(Tally::default(), |sum, of| {
        let of = of?;
        Ok(Tally { requests: sum.requests + of.requests, right: sum.right + of.right, wrong: sum.wrong + of.wrong })
    })
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(tally) => {
            let Tally { requests, right, wrong } = tally;
            println!("{}", serde_json::json!({ "requests": requests, "blocks_right": right, "wrong_bytes": wrong }));
            if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("traffic: {error:#}");
            ExitCode::FAILURE
        }
    }
}
