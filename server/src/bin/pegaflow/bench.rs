//! `pegaflow bench` measures a running server the way an engine uses it: it saves blocks of random bytes, loads them out of
//! DRAM and off the drives, looks them up, and compares every byte. Their namespace is its own and is purged at the end.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use pegaflow_engine::{
    BlockChoice, BlockKey, BlockSave, ByteSize, DeviceMemory, Error, ErrorKind, GroupGeometry, HostMemory, InstanceId,
    InstanceSpec, LoadBlock, LookupReply, LookupRequest, NamespaceDescriptor, OperationId, Result,
};
use pegaflow_server::ExitStatus;
use pegaflow_server::client::{Client, ClientConfig, CompletionResult};

use rand::{RngCore, SeedableRng};
use serde_json::{Value, json};

use crate::namespaces::is_known;

/// The longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the server may take to end a session, and how often it is looked.
const PURGE_MAX: Duration = Duration::from_secs(5);
const PURGE_RETRY: Duration = Duration::from_millis(50);
const LOOKUPS: usize = 1000;
/// Blocks of one load or save: an engine moves a prompt at a time, too.
const BATCH_BLOCKS: usize = 64;
/// Plain copies of which the fastest counts.
const COPIES: usize = 3;
/// What is in memory that nothing was loaded to.
const UNLOADED: u8 = 0xA5;
const BYTES_MAX: u64 = 16 << 30;
const BLOCKS_MAX: u64 = 16_384;

/// What is to be measured.
#[derive(Debug, Args)]
pub(crate) struct BenchOptions {
    /// Bytes to save and load; at most 16 GiB and a quarter of the server's DRAM. Three times as much memory is taken here.
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    bytes: ByteSize,
    /// Bytes of a block, as an engine would have: 4 KiB to 64 MiB.
    #[arg(long, value_name = "SIZE", default_value = "2MiB")]
    block: ByteSize,
}

/// Measures; what was found, as JSON, and as text if that is wanted. The status says whether every byte was right.
pub(crate) fn bench(
    client: &Client,
    config: ClientConfig,
    options: &BenchOptions,
    is_json: bool,
) -> Result<(Value, ExitStatus)> {
    let stats = client.stats()?;
    check(options, &stats)?;
    let run = Run::new(options);
    let (memory, copy) = run.memory(options)?;
    // It holds the memory, to register it anew, as long as it lives.
    let worker = Client::start(config)?;
    let found = run.measure(&worker, &memory, copy, &stats);
    worker.close(PATIENCE);
    drop(worker);
    // Also if it failed half-way.
    if let Err(error) = run.purge(client) {
        eprintln!("pegaflow: its blocks stay: {error:#}; pegaflow purge --namespace {}", run.spec.namespace.id());
    }
    let mut told = found?;
    let loads = 1 + usize::from(!told["load_drive_gbps"].is_null());
    let wrong = run.wrong_bytes(memory, loads)?;
    told["wrong_bytes"] = wrong.into();
    if !is_json {
        print(&told);
    }
    Ok((told, if wrong == 0 { ExitStatus::Ok } else { ExitStatus::Failed }))
}

fn check(options: &BenchOptions, stats: &Value) -> Result<()> {
    let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
    let (ByteSize(bytes), ByteSize(block)) = (options.bytes, options.block);
    if !(4 << 10..=64 << 20).contains(&block) {
        return bad(format!("blocks of {}; give 4 KiB to 64 MiB", options.block));
    }
    if bytes / block > BLOCKS_MAX {
        return bad(format!("{} in blocks of {}; give at most {BLOCKS_MAX} blocks", options.bytes, options.block));
    }
    let dram = number(stats, "dram_ready_bytes");
    let most = (dram / 4).min(BYTES_MAX);
    if bytes < block || bytes > most {
        return bad(format!(
            "--bytes {}; give at least a block ({}) and at most {}, a quarter of the server's DRAM: the rest serves its engines",
            options.bytes,
            options.block,
            ByteSize(most)
        ));
    }
    Ok(())
}

fn number(stats: &Value, name: &str) -> u64 {
    stats.get("engine").and_then(|engine| engine.get(name)).and_then(Value::as_u64).unwrap_or_default()
}

/// One measurement.
struct Run {
    spec: InstanceSpec,
    keys: Vec<BlockKey>,
    block_bytes: u64,
    seed: u64,
}

impl Run {
    fn new(options: &BenchOptions) -> Self {
        let seed: u64 = rand::random();
        let blocks = options.bytes.0 / options.block.0;
        let spec = InstanceSpec {
            instance: InstanceId(format!("pegaflow-bench-{seed:016x}").into()),
            namespace: NamespaceDescriptor::new()
                .with("model", "pegaflow-bench")
                .with("run", format!("{seed:016x}"))
                .with("block_bytes", options.block.0.to_string()),
            groups: vec![GroupGeometry { group: 0, block_bytes: options.block.0, shards: 1 }],
            shard: 0,
            keeps_all: true,
        };
        let keys = (0..blocks).map(|_| BlockKey::from_bytes(rand::random())).collect();
        Self { spec, keys, block_bytes: options.block.0, seed }
    }

    fn bytes(&self) -> usize {
        self.keys.len() * self.block_bytes as usize
    }

    /// What is saved, room for what is loaded out of DRAM, and room for what is loaded off the drives; and the bytes a second
    /// of a plain copy within it: what no save or load of this process can beat. All of it has been written once, so that no
    /// rate has the first touch of memory in it.
    fn memory(&self, options: &BenchOptions) -> Result<(Arc<HostMemory>, f64)> {
        let mut bytes = vec![UNLOADED; 3 * self.bytes()];
        let (saved, room) = bytes.split_at_mut(self.bytes());
        rand::rngs::SmallRng::seed_from_u64(self.seed).fill_bytes(saved);
        let room = &mut room[..saved.len()];
        let fastest = (0..COPIES).map(|_| {
            let started = Instant::now();
            room.copy_from_slice(saved);
            std::hint::black_box(&room);
            self.rate(started.elapsed())
        });
        let rate = fastest.fold(0.0, f64::max);
        room.fill(UNLOADED);
        Ok((Arc::new(HostMemory::owned(bytes, options.block.0)?), rate))
    }

    fn measure(&self, client: &Client, memory: &Arc<HostMemory>, copy: f64, stats: &Value) -> Result<Value> {
        client.wait_connected(PATIENCE)?;
        client.register(self.spec.clone(), Arc::clone(memory) as Arc<dyn DeviceMemory>)?;
        client.wait_connected(PATIENCE)?;
        let save = self.timed(|| self.save(client))?;
        let durable_started = Instant::now();
        client.flush(PATIENCE)?;
        let durable = self.rate(Duration::from_secs_f64(self.bytes() as f64 / save) + durable_started.elapsed());
        let mut lookups = (0..LOOKUPS).map(|_| self.lookup_us(client)).collect::<Result<Vec<f64>>>()?;
        lookups.sort_by(f64::total_cmp);
        let dram = self.timed(|| self.load(client, 1))?;
        let drives = stats.get("engine").and_then(|engine| engine.get("drive_speeds")).and_then(Value::as_array);
        let of_drives = |name: &str| -> Option<f64> {
            let speeds = drives?.iter().map(|drive| drive.get(name).and_then(Value::as_f64).unwrap_or_default());
            Some(speeds.sum()).filter(|speed: &f64| *speed > 0.0)
        };
        let has_store = drives.is_some_and(|drives| !drives.is_empty());
        let drive = match has_store {
            true => {
                client.evict(&BlockChoice::of(&[self.spec.namespace.id()]), PATIENCE)?;
                Some(self.timed(|| self.load(client, 2))?)
            }
            false => None,
        };
        let gbps = |rate: f64| (rate / 1e7).round() / 100.0;
        Ok(json!({
            "bytes": self.bytes(),
            "block_bytes": self.block_bytes,
            "copy_gbps": gbps(copy),
            "save_gbps": gbps(save),
            "save_ratio": ratio(save, Some(copy)),
            "load_dram_gbps": gbps(dram),
            "load_dram_ratio": ratio(dram, Some(copy)),
            "durable_gbps": has_store.then(|| gbps(durable)),
            "load_drive_gbps": drive.map(gbps),
            "drive_read_gbps": of_drives("read_bytes_per_second").map(gbps),
            "load_drive_ratio": drive.and_then(|drive| ratio(drive, of_drives("read_bytes_per_second"))),
            "lookup_keys": self.keys.len(),
            "lookup_p50_us": lookups.get(LOOKUPS / 2),
            "lookup_p99_us": lookups.get(LOOKUPS * 99 / 100),
        }))
    }

    fn rate(&self, took: Duration) -> f64 {
        self.bytes() as f64 / took.as_secs_f64().max(1e-9)
    }

    fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let started = Instant::now();
        work()?;
        Ok(self.rate(started.elapsed()))
    }

    fn save(&self, client: &Client) -> Result<()> {
        let key = |index: usize| self.keys.get(index).copied().unwrap_or(BlockKey::ROOT);
        let blocks: Vec<BlockSave> = (0..self.keys.len())
            .map(|index| {
                let parent = index.checked_sub(1).map_or(BlockKey::ROOT, key);
                BlockSave { key: key(index), parent, depth: index as u32, block: index as u32 }
            })
            .collect();
        let mut waiting = HashSet::new();
        for (number, batch) in blocks.chunks(BATCH_BLOCKS).enumerate() {
            let operation = OperationId(number as u64 + 1);
            client.save(operation, self.spec.instance.clone().into(), batch.to_vec(), 0)?;
            waiting.insert(operation);
        }
        wait(client, waiting, |result| match result {
            CompletionResult::Save(saved) if saved.dropped == 0 => Ok(()),
            other => Err(format!("a save was not taken whole ({other:?}): the server is too busy, or has no room")),
        })
    }

    /// Loads all into the part of the memory with this number.
    fn load(&self, client: &Client, part: usize) -> Result<()> {
        let found = self.look_up(client, true)?;
        let hits = found.hit_blocks as usize;
        let lease = found.lease.filter(|_| hits == self.keys.len()).ok_or_else(|| {
            let message = format!("{hits} of {} blocks were found: others needed the room", self.keys.len());
            Error::new(ErrorKind::NotFound, message)
        })?;
        let first = (part * self.keys.len()) as u32;
        let blocks: Vec<LoadBlock> =
            (0..self.keys.len() as u32).map(|index| LoadBlock { index, block: first + index }).collect();
        let operation = OperationId(1);
        client.load(operation, lease, 0, blocks, 0)?;
        wait(client, HashSet::from([operation]), |result| match result {
            CompletionResult::Load(loaded) if loaded.failed.is_empty() => Ok(()),
            CompletionResult::Load(loaded) => Err(format!("{} blocks could not be loaded", loaded.failed.len())),
            other => Err(format!("{other:?}")),
        })
    }

    fn look_up(&self, client: &Client, with_lease: bool) -> Result<LookupReply> {
        client.lookup(&LookupRequest {
            instance: self.spec.instance.clone(),
            tenant: None,
            group: 0,
            keys: self.keys.clone(),
            lease: with_lease.then_some(PATIENCE),
            tag: 1,
            with_places: false,
            question: None,
            prefetch: false,
        })
    }

    fn lookup_us(&self, client: &Client) -> Result<f64> {
        let started = Instant::now();
        self.look_up(client, false)?;
        Ok((started.elapsed().as_secs_f64() * 1e7).round() / 10.0)
    }

    /// Has the server forget all of it. As long as the worker's session is being ended, its namespace goes on empty, and is
    /// purged once more.
    fn purge(&self, client: &Client) -> Result<()> {
        let deadline = Instant::now() + PURGE_MAX;
        let id = self.spec.namespace.id();
        while is_known(client, &id)? {
            if let Err(error) = client.purge(&id, None, PATIENCE)
                && error.kind() != ErrorKind::NotFound
            {
                return Err(error);
            }
            if Instant::now() >= deadline {
                let message = "its session has not ended in time; nothing is in it any more, but its name";
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            std::thread::sleep(PURGE_RETRY);
        }
        Ok(())
    }

    /// Bytes that are not those that were saved, in as many parts as were loaded.
    fn wrong_bytes(&self, memory: Arc<HostMemory>, loads: usize) -> Result<usize> {
        let held =
            || Error::new(ErrorKind::Timeout, "copies did not end in time; the loaded bytes can not be compared");
        let deadline = Instant::now() + PATIENCE;
        let mut memory = memory;
        let bytes = loop {
            match Arc::try_unwrap(memory) {
                Ok(memory) => break memory.into_bytes().unwrap_or_default(),
                Err(_) if Instant::now() >= deadline => return Err(held()),
                Err(shared) => {
                    memory = shared;
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        };
        let mut parts = bytes.chunks_exact(self.bytes());
        let saved = parts.next().unwrap_or_default();
        let wrong = |part: &[u8]| part.iter().zip(saved).filter(|(loaded, saved)| loaded != saved).count();
        Ok(parts.take(loads).map(wrong).sum())
    }
}

fn ratio(rate: f64, ceiling: Option<f64>) -> Option<f64> {
    ceiling.map(|ceiling| (rate / ceiling * 1000.0).round() / 1000.0)
}

/// Waits until all operations have ended well.
fn wait(
    client: &Client,
    mut waiting: HashSet<OperationId>,
    is_good: impl Fn(&CompletionResult) -> std::result::Result<(), String>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !waiting.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let message = format!("{} operations have not ended in {PATIENCE:?}", waiting.len());
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        client.wait_completion(left);
        for ended in client.poll() {
            waiting.remove(&ended.operation);
            is_good(&ended.result).map_err(|why| Error::new(ErrorKind::Busy, why))?;
        }
    }
    Ok(())
}

fn print(told: &Value) {
    let number = |name: &str| told.get(name).and_then(Value::as_f64);
    let line = |what: &str, rate: &str, of: &str, ratio: &str| {
        let rate = number(rate).map_or("-".into(), |rate| format!("{rate:.2} GB/s"));
        let ratio = number(ratio).map_or_else(String::new, |ratio| format!("   {ratio:.3} of {of}"));
        println!("{what:<28}{rate:>12}{ratio}");
    };
    println!("{} in blocks of {}", size(told, "bytes"), size(told, "block_bytes"));
    line("a plain copy in memory", "copy_gbps", "", "");
    line("save", "save_gbps", "a plain copy", "save_ratio");
    line("save until durable", "durable_gbps", "", "");
    line("load out of DRAM", "load_dram_gbps", "a plain copy", "load_dram_ratio");
    line("load off the drives", "load_drive_gbps", "what the drives read", "load_drive_ratio");
    let micros = |name: &str| number(name).unwrap_or_default();
    println!(
        "a lookup of {} keys{:>14.0} us   median; 99 % within {:.0} us",
        micros("lookup_keys"),
        micros("lookup_p50_us"),
        micros("lookup_p99_us")
    );
    match number("wrong_bytes").unwrap_or_default() {
        0.0 => println!("every byte was right"),
        wrong => println!("{wrong} BYTES WERE WRONG: please report it, with the server's log"),
    }
}

fn size(told: &Value, name: &str) -> ByteSize {
    ByteSize(told.get(name).and_then(Value::as_u64).unwrap_or_default())
}
