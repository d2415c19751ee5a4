//! How fast lookups are and how much memory the index takes, at a given number of keys: in the process and over the
//! socket, on a real store that was written through the engine and opened again. Progress goes to standard error, one
//! JSON object to standard output, as its last line.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use hdrhistogram::Histogram;
use pegaflow_benches::{BLOCK_BYTES, PROMPT_BLOCKS, Prompts, block_memory, spec};
use pegaflow_engine::{
    BlockSave, ByteSize, Engine, EngineConfig, InstanceId, LocalKvCache, LookupReply, LookupRequest, NvmeConfig,
    OperationId, SaveRequest, SessionId,
};
use pegaflow_tests::{ServerOptions, TestWorker, WorkerOptions};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A record of the smallest block takes two pages of the store.
const RECORD_BYTES: u64 = 8192;
const LEASE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures lookups of 2,048 keys, memory per key, and the time from open to the first hit.
#[derive(Parser)]
struct Arguments {
    /// How many keys the index holds; rounded up to whole prompts of 2,048. Each takes 8 KiB of disk while it runs.
    #[arg(long, env = "KEYS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(2048..=10_000_000))]
    keys: u64,
    /// How many lookups are measured; a tenth as many run before them.
    #[arg(long, env = "LOOKUPS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(10..=10_000_000))]
    lookups: u64,
    /// The seed of keys and of the prompts looked up.
    #[arg(long, env = "SEED", default_value_t = 1)]
    seed: u64,
    /// Where the store is made, in a new directory that is removed afterwards. Default: the current directory.
    #[arg(long, default_value = ".")]
    directory: PathBuf,
}

/// Whatever answers lookups: an engine in the process, a server at its socket.
trait Lookups {
    fn look_up(&mut self, request: &LookupRequest) -> Result<LookupReply>;
    fn release(&mut self, reply: &LookupReply);
}

struct InProcess {
    engine: Engine,
    session: SessionId,
}

impl Lookups for InProcess {
    fn look_up(&mut self, request: &LookupRequest) -> Result<LookupReply> {
        Ok(self.engine.lookup(self.session, request)?)
    }

    fn release(&mut self, reply: &LookupReply) {
        reply.lease.into_iter().for_each(|lease| self.engine.release(lease));
    }
}

struct OverSocket(TestWorker);

impl Lookups for OverSocket {
    fn look_up(&mut self, request: &LookupRequest) -> Result<LookupReply> {
        Ok(self.0.client.lookup(request)?)
    }

    fn release(&mut self, reply: &LookupReply) {
        reply.lease.into_iter().for_each(|lease| self.0.client.release(lease));
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let directory = tempfile::Builder::new()
        .prefix("pegaflow-bench-index-")
        .tempdir_in(&arguments.directory)
        .with_context(|| format!("in {}", arguments.directory.display()))?;
    progress(&format!("making {} keys from seed {}", arguments.keys, arguments.seed));
    let prompts = Prompts::new(usize::try_from(arguments.keys)?.div_ceil(PROMPT_BLOCKS), arguments.seed);
    let options = server_options(directory.path(), prompts.keys())?;
    write_store(&prompts, &options)?;

    progress("opening the store");
    let start = Instant::now();
    let mut in_process = open(&options)?;
    let first = in_process.look_up(&request(&prompts, 0))?;
    let open_first_hit = start.elapsed();
    ensure!(first.hit_blocks as usize == PROMPT_BLOCKS, "the first prompt is not found after the open: {first:?}");
    let stats = in_process.engine.stats();
    progress(&format!("measuring {} lookups of {PROMPT_BLOCKS} keys in the process", arguments.lookups));
    let times = measure(&mut in_process, &prompts, &arguments)?;
    in_process.engine.close(Instant::now() + PATIENCE)?;
    drop(in_process);

    progress("the same over the socket");
    let _server = options.start(PATIENCE)?;
    let worker = WorkerOptions {
        instance: "bench".into(),
        model: "bench".into(),
        block_bytes: BLOCK_BYTES,
        blocks: 8,
        device: pegaflow_tests::KvDevice::Host,
    };
    let mut over_socket = OverSocket(TestWorker::connect(&options.socket(), worker, PATIENCE)?);
    let socket_times = measure(&mut over_socket, &prompts, &arguments)?;
    over_socket.0.client.close(Duration::from_secs(5));

    let micros = |times: &Histogram<u64>, quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
    let report = serde_json::json!({
        "keys": stats.nvme_records,
        "lookup2048_p50_us": micros(&times, 0.5),
        "lookup2048_p99_us": micros(&times, 0.99),
        "socket_lookup2048_p50_us": micros(&socket_times, 0.5),
        "socket_lookup2048_p99_us": micros(&socket_times, 0.99),
        "bytes_per_key": stats.index_bytes as f64 / stats.nvme_records as f64,
        "open_first_hit_ms": open_first_hit.as_secs_f64() * 1000.0,
    });
    println!("{report}");
    Ok(())
}

fn server_options(directory: &Path, keys: usize) -> Result<ServerOptions> {
    let mut options = ServerOptions::small(directory)?;
    let capacity = (keys as u64 * RECORD_BYTES * 11 / 10).next_multiple_of(64 << 20) + (512 << 20);
    options.capacity = capacity.to_string();
    options.region = (64u64 << 20).to_string();
    options.dram = "256MiB".into();
    Ok(options)
}

fn open(options: &ServerOptions) -> Result<InProcess> {
    let nvme = NvmeConfig {
        region: Some(options.region.parse()?),
        ..NvmeConfig::new(options.store(), options.capacity.parse()?)
    };
    let engine = Engine::open(EngineConfig { dram: ByteSize::mib(256), nvme: Some(nvme), ..EngineConfig::default() })?;
    let session = engine.start_session();
    engine.register(session, spec())?;
    Ok(InProcess { engine, session })
}

/// Saves every prompt through the engine, as workers do.
fn write_store(prompts: &Prompts, options: &ServerOptions) -> Result<()> {
    let InProcess { engine, session } = open(options)?;
    let memory = block_memory(PROMPT_BLOCKS as u32)?;
    for number in 0..prompts.len() {
        let (sender, ended) = std::sync::mpsc::sync_channel(1);
        let save = SaveRequest {
            session,
            operation: OperationId(number as u64),
            instance: InstanceId("bench".into()),
            group: 0,
            shard: 0,
            memory: Arc::new(LocalKvCache::new(Arc::clone(&memory), engine.arena(), None)),
            blocks: (0u32..)
                .zip(prompts.chain(number))
                .map(|(block, (key, parent))| BlockSave { key, parent, depth: block, block })
                .collect(),
        };
        engine.save(
            save,
            Box::new(move |outcome| {
                let _ = sender.send(outcome);
            }),
        )?;
        let outcome = ended.recv_timeout(PATIENCE)?;
        ensure!(outcome.saved as usize == PROMPT_BLOCKS, "prompt {number} was not saved: {outcome:?}");
        // DRAM takes only so much that is not durable yet.
        if number % 8 == 7 {
            engine.flush(Instant::now() + PATIENCE)?;
        }
        if number % 64 == 0 {
            progress(&format!("{} of {} prompts are written", number, prompts.len()));
        }
    }
    engine.close(Instant::now() + PATIENCE)?;
    Ok(())
}

fn request(prompts: &Prompts, number: usize) -> LookupRequest {
    let keys = prompts.chain(number).map(|(key, _)| key).collect();
    LookupRequest {
        instance: InstanceId("bench".into()),
        group: 0,
        keys,
        lease: Some(LEASE),
        tag: number as u64,
        with_places: false,
    }
}

/// Looks up whole prompts, drawn at random, each with a lease that is given back; the times are in nanoseconds.
fn measure(lookups: &mut dyn Lookups, prompts: &Prompts, arguments: &Arguments) -> Result<Histogram<u64>> {
    let mut random = StdRng::seed_from_u64(arguments.seed);
    let mut times = Histogram::new(3)?;
    let unmeasured = arguments.lookups / 10;
    for round in 0..unmeasured + arguments.lookups {
        let request = request(prompts, prompts.random(&mut random));
        let start = Instant::now();
        let reply = lookups.look_up(&request)?;
        let elapsed = start.elapsed();
        ensure!(
            reply.hit_blocks as usize == PROMPT_BLOCKS,
            "a lookup found {} of {PROMPT_BLOCKS} keys",
            reply.hit_blocks
        );
        lookups.release(&reply);
        if round >= unmeasured {
            times.record(u64::try_from(elapsed.as_nanos())?)?;
        }
    }
    Ok(times)
}

fn progress(what: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(std::io::stderr(), "bench-index: {what}");
}
