//! How fast lookups are, how much memory the index takes and how long an open lasts, at a given number of keys: in the
//! process and over the socket. The store is made up (`pegaflow_benches::SyntheticStore`: real but for the payloads), or
//! with `--real` written through the engine. Progress goes to standard error, one JSON object to standard output, as its
//! last line.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use hdrhistogram::Histogram;
use pegaflow_benches::{BLOCK_BYTES, PROMPT_BLOCKS, Prompts, REGION_BYTES, SyntheticStore, block_memory, spec};
use pegaflow_engine::{
    BlockSave, ByteSize, Engine, EngineConfig, InstanceId, LocalKvCache, LookupReply, LookupRequest, NvmeConfig,
    OperationId, SaveRequest, SessionId,
};
use pegaflow_tests::{ServerOptions, TestWorker, WorkerOptions};
use pegaflow_tiers::{BlockKey, Location, NamespaceHandle, RecordId, Table};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A record of the smallest block takes two pages of the store.
const RECORD_BYTES: u64 = 8192;
const LEASE: Duration = Duration::from_secs(60);
/// Between two lookups while the table is being filled.
const LOOKUP_PAUSE: Duration = Duration::from_millis(20);
/// The bound on memory holds from here on.
const FEWEST_KEYS: u64 = 1000;
const PATIENCE: Duration = Duration::from_secs(900);

/// Measures lookups of 2,048 keys, memory per key, and the time from open to the first hit.
#[derive(Parser)]
struct Arguments {
    /// How many keys the index holds; rounded up to whole prompts of 2,048. A million take 500 MB of disk while it runs.
    #[arg(long, env = "KEYS", default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(2048..=100_000_000))]
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
    /// Writes every block through the engine instead of making rows up; a million keys take 8 GB of disk and minutes.
    #[arg(long)]
    real: bool,
    /// For the bench itself: leaves the store of this directory as a kill at the worst moment would, and waits for it.
    #[arg(long, hide = true)]
    crash: Option<PathBuf>,
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
    progress(&format!("making {} keys from seed {}", arguments.keys, arguments.seed));
    let prompts = Prompts::new(usize::try_from(arguments.keys)?.div_ceil(PROMPT_BLOCKS), arguments.seed);
    if let Some(store) = &arguments.crash {
        return crash(store, &prompts);
    }
    let growth = measure_growth(&prompts)?;
    let directory = tempfile::Builder::new()
        .prefix("pegaflow-bench-index-")
        .tempdir_in(&arguments.directory)
        .with_context(|| format!("in {}", arguments.directory.display()))?;
    let options = server_options(directory.path(), prompts.keys(), arguments.real)?;
    if arguments.real {
        write_store(&prompts, &options)?;
    } else {
        progress("making the store: real regions, rows without records");
        let store = SyntheticStore::visit(&options.store(), prompts.keys(), true)?;
        store.commit_all(&prompts, |done| progress(&format!("{done} of {} prompts are committed", prompts.len())))?;
    }

    progress("opening the store");
    let (mut in_process, opened) = open_measured(&options, &prompts)?;
    let stats = in_process.engine.stats();
    progress(&format!("measuring {} lookups of {PROMPT_BLOCKS} keys in the process", arguments.lookups));
    let times = measure(&mut in_process, &prompts, &arguments)?;
    in_process.engine.close(Instant::now() + PATIENCE)?;
    drop(in_process);

    progress("the same over the socket");
    let socket_times = {
        let _server = options.start(PATIENCE)?;
        let worker = WorkerOptions {
            instance: "bench".into(),
            model: "bench".into(),
            block_bytes: BLOCK_BYTES,
            blocks: 8,
            device: pegaflow_tests::KvDevice::Host,
        };
        let mut over_socket = OverSocket(TestWorker::connect(&options.socket(), worker, PATIENCE)?);
        let deadline = Instant::now() + PATIENCE;
        while over_socket.0.client.stats()?["engine"]["index_full"] != true {
            ensure!(Instant::now() < deadline, "the server's index is not full in time");
            std::thread::sleep(LOOKUP_PAUSE);
        }
        let times = measure(&mut over_socket, &prompts, &arguments)?;
        over_socket.0.client.close(Duration::from_secs(5));
        times
    };
    let after_kill = if arguments.real { None } else { Some(after_kill(&options, &prompts, &arguments)?) };

    let micros = |times: &Histogram<u64>, quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    let report = serde_json::json!({
        "keys": stats.nvme_records,
        "synthetic": !arguments.real,
        "lookup2048_p50_us": micros(&times, 0.5),
        "lookup2048_p99_us": micros(&times, 0.99),
        "socket_lookup2048_p50_us": micros(&socket_times, 0.5),
        "socket_lookup2048_p99_us": micros(&socket_times, 0.99),
        "bytes_per_key": stats.index_bytes as f64 / stats.nvme_records as f64,
        "bytes_per_key_max": growth.bytes_per_key_max,
        "insert_pause_max_us": growth.pause_max.as_secs_f64() * 1e6,
        "open_ms": millis(opened.open),
        "open_first_hit_ms": millis(opened.first_hit),
        "open_first_hit_cpu_ms": millis(opened.first_hit_cpu),
        "open_full_ms": millis(opened.full),
        "lookup2048_while_filling_max_us": opened.slowest_lookup.as_secs_f64() * 1e6,
        "open_first_hit_after_kill_ms": after_kill.as_ref().map(|(opened, _)| millis(opened.first_hit)),
        "open_first_hit_after_kill_cpu_ms": after_kill.as_ref().map(|(opened, _)| millis(opened.first_hit_cpu)),
        "open_full_after_kill_ms": after_kill.as_ref().map(|(opened, _)| millis(opened.full)),
        "wal_bytes_at_kill": after_kill.as_ref().map(|(_, wal_bytes)| wal_bytes),
    });
    println!("{report}");
    Ok(())
}

fn server_options(directory: &Path, keys: usize, is_real: bool) -> Result<ServerOptions> {
    let mut options = ServerOptions::small(directory)?;
    options.dram = "256MiB".into();
    // A scrub would find that rows without records have none, and drop them.
    options.more = vec!["--scrub".into(), "0".into()];
    if is_real {
        let capacity = (keys as u64 * RECORD_BYTES * 11 / 10).next_multiple_of(64 << 20) + (512 << 20);
        options.capacity = capacity.to_string();
        options.region = (64u64 << 20).to_string();
    } else {
        options.capacity = SyntheticStore::capacity_bytes(keys).to_string();
        options.region = REGION_BYTES.to_string();
    }
    Ok(options)
}

/// How the table took all keys, one after the other.
struct Growth {
    pause_max: Duration,
    bytes_per_key_max: f64,
}

/// Inserts all keys into an empty table: the longest that one insertion takes, with whatever grows in it.
fn measure_growth(prompts: &Prompts) -> Result<Growth> {
    progress("growing a table");
    let table = Table::new();
    let place = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::ROOT };
    let mut growth = Growth { pause_max: Duration::ZERO, bytes_per_key_max: 0.0 };
    let mut next_look = FEWEST_KEYS;
    let keys = (0..prompts.len()).flat_map(|number| prompts.chain(number));
    for (count, (key, parent)) in (1..).zip(keys) {
        let fingerprint = place.with_key(key).fingerprint();
        let location = Location { region: 1, generation: 1, page: 2, pages: 2 };
        let start = Instant::now();
        table.insert(fingerprint, parent.prefix() as u32, location);
        growth.pause_max = growth.pause_max.max(start.elapsed());
        if count == next_look {
            growth.bytes_per_key_max = growth.bytes_per_key_max.max(table.memory_bytes() as f64 / table.len() as f64);
            next_look += next_look / 64;
        }
    }
    ensure!(table.len() == prompts.keys(), "the table has {} of {} keys", table.len(), prompts.keys());
    Ok(growth)
}

/// Times of an open, all from its beginning.
struct Opened {
    open: Duration,
    first_hit: Duration,
    /// What the whole process has computed until then: the time that it would take on an idle core.
    first_hit_cpu: Duration,
    full: Duration,
    /// The slowest lookup until the table was full.
    slowest_lookup: Duration,
}

/// Opens the store and looks up prompts until the table is full.
fn open_measured(options: &ServerOptions, prompts: &Prompts) -> Result<(InProcess, Opened)> {
    let (start, cpu_before) = (Instant::now(), cpu_time()?);
    let mut in_process = open(options)?;
    let open = start.elapsed();
    let look_up = |in_process: &mut InProcess, number: usize| -> Result<Duration> {
        let start = Instant::now();
        let reply = in_process.look_up(&request(prompts, number))?;
        let elapsed = start.elapsed();
        ensure!(reply.hit_blocks as usize == PROMPT_BLOCKS, "prompt {number} is not found after the open: {reply:?}");
        in_process.release(&reply);
        Ok(elapsed)
    };
    // The last one: its rows are as likely to be read late as early, for keys are hashes.
    let mut slowest_lookup = look_up(&mut in_process, prompts.len() - 1)?;
    let first_hit = start.elapsed();
    let first_hit_cpu = cpu_time()?.saturating_sub(cpu_before);
    let mut full = first_hit;
    for number in (0..prompts.len()).cycle() {
        if in_process.engine.stats().index_full {
            break;
        }
        ensure!(start.elapsed() < PATIENCE, "the index is not full in time");
        slowest_lookup = slowest_lookup.max(look_up(&mut in_process, number)?);
        std::thread::sleep(LOOKUP_PAUSE);
        full = start.elapsed();
    }
    let stats = in_process.engine.stats();
    ensure!(stats.nvme_records >= prompts.keys() as u64, "the index has {} records", stats.nvme_records);
    Ok((in_process, Opened { open, first_hit, first_hit_cpu, full, slowest_lookup }))
}

/// What this process has computed so far, in steps of 10 ms.
fn cpu_time() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 10))
}

/// Lets another process use the store and kills it when the write-ahead log is long, then opens it.
fn after_kill(options: &ServerOptions, prompts: &Prompts, arguments: &Arguments) -> Result<(Opened, u64)> {
    progress("a process that is to be killed writes to the store");
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--keys", &arguments.keys.to_string(), "--seed", &arguments.seed.to_string(), "--crash"])
        .arg(options.store())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let said = child.stdout.take().context("no pipe").and_then(|out| Ok(BufReader::new(out).read_line(&mut line)?));
    child.kill()?;
    child.wait()?;
    said?;
    let wal_bytes = line.trim().parse().with_context(|| format!("the process said {line:?}"))?;
    progress(&format!("killed, with a write-ahead log of {wal_bytes} bytes; opening the store"));
    let (in_process, opened) = open_measured(options, prompts)?;
    in_process.engine.close(Instant::now() + PATIENCE)?;
    Ok((opened, wal_bytes))
}

/// Leaves the store unclean and the write-ahead log long, says so, and waits to be killed.
fn crash(store: &Path, prompts: &Prompts) -> Result<()> {
    let store = SyntheticStore::visit(store, prompts.keys(), false)?;
    let log = store.log()?;
    let wal_bytes = store.lengthen_wal(&log, prompts)?;
    println!("{wal_bytes}");
    std::thread::sleep(PATIENCE);
    anyhow::bail!("nobody killed this process")
}

fn open(options: &ServerOptions) -> Result<InProcess> {
    let nvme = NvmeConfig {
        region: Some(options.region.parse()?),
        scrub: ByteSize(0),
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
            target: InstanceId("bench".into()).into(),
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
        tenant: None,
        group: 0,
        keys,
        lease: Some(LEASE),
        tag: number as u64,
        with_places: false,
        question: None,
        prefetch: false,
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
