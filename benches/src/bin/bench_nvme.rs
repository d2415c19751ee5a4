//! How close the store comes to its drive: payload bytes through the public API with checksums on, in turns with a program
//! that does nothing but I/O on the same file system. Progress and tables go to standard error, one JSON object to
//! standard output, as its last line.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pegaflow_benches::{
    Content, KvBytes, Order, RawDrive, Shape, StoreLoad, Transfer, TurnShape, cached_bytes, cpu_time,
    decode_capacity_gbps, drive_bytes,
};
use pegaflow_tiers::{Arena, ArenaConfig, CodecChoice, StoreStats};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// As often as the store syncs.
const SYNC_BYTES: u64 = 64 * MIB;
const TABLE_HEAD: &str = "ceiling  store   ratio  (quartiles)         cores per GB/s of both";
/// The drive's shape is looked for with so many bytes.
const TRIAL_BYTES: u64 = 128 * MIB;
const PLAIN: Content = Content { bytes: KvBytes::Random, codec: CodecChoice::None, is_encrypted: false };
/// Also where the drive reads faster than this machine decodes, which `auto` would find out in the middle of the bench.
const BF16: Content = Content { bytes: KvBytes::Bf16, codec: CodecChoice::Always, is_encrypted: false };
const FP8: Content = Content { bytes: KvBytes::Fp8, codec: CodecChoice::Always, is_encrypted: false };
const WRITE: Transfer = Transfer::Write { sync_bytes: SYNC_BYTES };

/// Measures a store beside the raw drive.
#[derive(Parser)]
struct Arguments {
    /// Where the files are made, in a new directory that is removed afterwards. Takes about 2 x PAIRS x MIB of disk.
    #[arg(long, env = "DIR", default_value = ".")]
    dir: PathBuf,
    /// MiB of payload that one turn writes or reads.
    #[arg(long, env = "MIB", default_value_t = 384, value_parser = clap::value_parser!(u64).range(16..=4096))]
    mib: u64,
    /// Pairs of turns, ceiling and store, of which the median counts.
    #[arg(long, env = "PAIRS", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=999))]
    pairs: u32,
    /// Block sizes in KiB.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256, 1024, 4096])]
    blocks_kib: Vec<u64>,
    /// Instead: an encrypted store beside one that is not, which is what encryption costs.
    #[arg(long)]
    encrypt: bool,
    /// The seed of orders and places.
    #[arg(long, env = "SEED", default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let directory = tempfile::Builder::new()
        .prefix("pegaflow-bench-nvme-")
        .tempdir_in(&arguments.dir)
        .with_context(|| format!("in {}", arguments.dir.display()))?;
    if arguments.encrypt {
        println!("{}", encryption(&arguments, directory.path())?);
        return Ok(());
    }
    let mut bench = Bench::new(&arguments, directory.path())?;
    let mut rows = Vec::new();
    for block_kib in &arguments.blocks_kib {
        rows.extend(bench.rows(block_kib * KIB, PLAIN)?);
    }
    let ceiling_read = median(&mut bench.ceiling_reads.clone());
    for block_kib in &arguments.blocks_kib {
        rows.extend(bench.rows(block_kib * KIB, BF16)?);
    }
    let (bf16_ratio, fp8_ratio) = (bench.stored_ratio(BF16)?, bench.stored_ratio(FP8)?);
    let capacity = decode_capacity_gbps(1 << 20, Duration::from_secs(1))?;
    progress(&format!("all cores decode {capacity:.2} GB/s"));
    let report = json!({
        "ceiling_read_gbps": round(ceiling_read),
        "ceiling_write_gbps": round(median(&mut bench.ceiling_writes)),
        "rows": rows,
        "bf16_ratio": round(bf16_ratio),
        "fp8_ratio": round(fp8_ratio),
        "effective_read_ratio": round(bench.effective_reads.iter().copied().fold(f64::INFINITY, f64::min)),
        "decode_capacity_ratio": round(capacity / ceiling_read),
        "page_cache_bytes": 0,
    });
    println!("{report}");
    Ok(())
}

/// One turn: bytes, wall clock, CPU.
#[derive(Clone, Copy)]
struct Turn {
    gbps: f64,
    /// Cores that a GB/s takes.
    cores: f64,
}

fn turn(bytes: u64, run: impl FnOnce() -> Result<Duration>) -> Result<Turn> {
    let cpu = cpu_time();
    let elapsed = run()?;
    let cpu = cpu_time() - cpu;
    let gigabytes = bytes as f64 / 1e9;
    Ok(Turn { gbps: gigabytes / elapsed.as_secs_f64(), cores: cpu.as_secs_f64() / gigabytes })
}

/// Pairs of turns of the ceiling and the store.
#[derive(Default)]
struct Pairs(Vec<(Turn, Turn)>);

impl Pairs {
    fn of(&self, value: impl Fn(&(Turn, Turn)) -> f64) -> Vec<f64> {
        let mut values: Vec<f64> = self.0.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    fn median(&self, value: impl Fn(&(Turn, Turn)) -> f64) -> f64 {
        median(&mut self.of(value))
    }

    fn ratio(&self) -> f64 {
        self.median(|(ceiling, store)| store.gbps / ceiling.gbps)
    }

    fn cores(&self) -> f64 {
        self.median(|(_, store)| store.cores)
    }

    fn print(&self, what: &str) {
        let ratios = self.of(|(ceiling, store)| store.gbps / ceiling.gbps);
        let at = |share: f64| ratios.get((share * (ratios.len() - 1) as f64).round() as usize).copied().unwrap_or(0.0);
        progress(&format!(
            "{what:<44} {:>6.2} {:>6.2}   {:.3}  ({:.3} .. {:.3})   {:.3} {:.3}",
            self.median(|(ceiling, _)| ceiling.gbps),
            self.median(|(_, store)| store.gbps),
            at(0.5),
            at(0.25),
            at(0.75),
            self.median(|(ceiling, _)| ceiling.cores),
            self.cores(),
        ));
    }
}

struct Bench<'a> {
    arguments: &'a Arguments,
    directory: &'a Path,
    random: SmallRng,
    ceiling_reads: Vec<f64>,
    ceiling_writes: Vec<f64>,
    read_shape: Shape,
    write_shape: Shape,
    /// Reads in order of compressed blocks, of 256 KiB and more.
    effective_reads: Vec<f64>,
}

impl<'a> Bench<'a> {
    fn new(arguments: &'a Arguments, directory: &'a Path) -> Result<Self> {
        let mut bench = Self {
            arguments,
            directory,
            random: SmallRng::seed_from_u64(arguments.seed),
            ceiling_reads: Vec::new(),
            ceiling_writes: Vec::new(),
            read_shape: Shape { request_bytes: MIB, depth: 8 },
            write_shape: Shape { request_bytes: MIB, depth: 8 },
            effective_reads: Vec::new(),
        };
        let mut raw = bench.raw(1)?;
        let shapes: Vec<Shape> = [256 * KIB, MIB, 4 * MIB]
            .into_iter()
            .flat_map(|request_bytes| [4, 8, 16, 32, 64].map(|depth| Shape { request_bytes, depth }))
            .filter(|shape| shape.request_bytes * shape.depth as u64 <= (64 * MIB).min(bench.turn_bytes()))
            .collect();
        // Extents that were never written are slower; that is measured apart.
        raw.run(WRITE, bench.write_shape, &in_order(0, bench.turn_bytes(), MIB))?;
        bench.write_shape = bench.best(&mut raw, WRITE, &shapes)?;
        bench.read_shape = bench.best(&mut raw, Transfer::Read, &shapes)?;
        progress(&format!("best for the drive: writes {}, reads {}", bench.write_shape, bench.read_shape));
        Ok(bench)
    }

    fn turn_bytes(&self) -> u64 {
        self.arguments.mib * MIB
    }

    /// The raw drive on a file of its own with room for so many turns.
    fn raw(&self, turns: usize) -> Result<RawDrive> {
        let path = self.directory.join("ceiling");
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        RawDrive::create(&path, self.turn_bytes() * turns as u64, usize::try_from(self.turn_bytes())?)
    }

    /// Which of `shapes` is fastest on what is already written.
    fn best(&mut self, raw: &mut RawDrive, transfer: Transfer, shapes: &[Shape]) -> Result<Shape> {
        let mut best = (0.0, self.read_shape);
        for &shape in shapes {
            let bytes = self.turn_bytes().min(TRIAL_BYTES);
            let offsets = in_order(0, bytes, shape.request_bytes);
            let mut speeds = Vec::new();
            for _ in 0..3 {
                speeds.push(turn(bytes, || raw.run(transfer, shape, &offsets))?.gbps);
            }
            let speed = median(&mut speeds);
            if speed > best.0 {
                best = (speed, shape);
            }
        }
        Ok(best.1)
    }

    /// Both rows of one block size.
    fn rows(&mut self, block_bytes: u64, content: Content) -> Result<Vec<Value>> {
        let pairs = self.arguments.pairs as usize;
        let bytes = self.turn_bytes();
        let is_plain = content.codec == CodecChoice::None;
        let codec = if is_plain { "none" } else { "auto" };
        let shape = TurnShape { block_bytes, blocks: usize::try_from(bytes / block_bytes)?, turns: pairs };
        let path = self.directory.join("store");
        let mut load = create(&path, shape, content)?;
        let mut raw = self.raw(pairs)?;
        let drive_before = drive_bytes()?;
        let mut raw_bytes = (0, 0);
        progress(&format!("{:>4} KiB, codec {codec:<27} {TABLE_HEAD}", block_bytes / KIB));

        let write_shape = self.write_shape;
        let mut fresh = Pairs::default();
        for number in 0..pairs {
            let offsets = in_order(number as u64 * bytes, bytes, write_shape.request_bytes);
            let write = || raw.run(WRITE, write_shape, &offsets);
            fresh.0.push(pair(number, bytes, &mut load, write, |load| load.write(Order::Sequential))?);
            raw_bytes.1 += bytes;
        }
        fresh.print("writes, first pass over fresh extents");

        let random_shapes = [16, 32, 64, 128].map(|depth| Shape { request_bytes: block_bytes, depth });
        let random_shapes: Vec<Shape> = random_shapes
            .into_iter()
            .filter(|shape| shape.request_bytes * shape.depth as u64 <= (64 * MIB).min(bytes))
            .collect();
        let random_shape = self.best(&mut raw, Transfer::Read, &random_shapes)?;
        let read_shape = self.read_shape;
        let (mut writes, mut scattered) = (Pairs::default(), Pairs::default());
        let (mut reads, mut random_reads) = (Pairs::default(), Pairs::default());
        for number in 0..pairs {
            let start = number as u64 * bytes;
            for (pairs, order) in [(&mut writes, Order::Sequential), (&mut scattered, Order::Random)] {
                let offsets = in_order(start, bytes, write_shape.request_bytes);
                let write = || raw.run(WRITE, write_shape, &offsets);
                pairs.0.push(pair(number, bytes, &mut load, write, |load| load.write(order))?);
                raw_bytes.1 += bytes;
            }
        }
        let before = load.stats();
        if !is_plain {
            // What is read is to be what the codec makes of all blocks, however fast they were written above.
            (0..pairs).try_for_each(|_| load.fill())?;
        }
        let after = load.stats();
        let payload_bytes = after.appended_payload_bytes - before.appended_payload_bytes;
        let payload_ratio = match after.appended_stored_bytes - before.appended_stored_bytes {
            0 => 1.0,
            stored_bytes => payload_bytes as f64 / stored_bytes as f64,
        };
        for number in 0..pairs {
            let start = number as u64 * bytes;
            let offsets = in_order(start, bytes, read_shape.request_bytes);
            let read = || raw.run(Transfer::Read, read_shape, &offsets);
            reads.0.push(pair(number, bytes, &mut load, read, |load| load.read(Order::Sequential))?);
            let all = bytes * pairs as u64 / block_bytes;
            let offsets: Vec<u64> =
                (0..bytes / block_bytes).map(|_| self.random.random_range(0..all) * block_bytes).collect();
            let read = || raw.run(Transfer::Read, random_shape, &offsets);
            random_reads.0.push(pair(number, bytes, &mut load, read, |load| load.read(Order::Random))?);
            raw_bytes.0 += 2 * bytes;
        }
        writes.print("writes, steady state");
        scattered.print("writes, steady state, from scattered slots");
        reads.print("reads, in order");
        random_reads.print("reads, random");
        if is_plain {
            self.ceiling_writes.extend(writes.of(|(ceiling, _)| ceiling.gbps));
            self.ceiling_reads.extend(reads.of(|(ceiling, _)| ceiling.gbps));
        } else if block_bytes >= 256 * KIB {
            self.effective_reads.push(reads.ratio());
        }
        let stats = load.stats();
        prove_direct(&path.join("regions.0"), drive_before, raw_bytes, &stats)?;
        load.close()?;
        drop(raw);
        std::fs::remove_dir_all(&path)?;
        let row = |order: &str, reads: &Pairs, writes: &Pairs| {
            json!({
                "block_bytes": block_bytes, "codec": codec, "order": order,
                "read_ratio": round(reads.ratio()), "write_ratio": round(writes.ratio()),
                "first_write_ratio": round(fresh.ratio()), "payload_ratio": round(payload_ratio),
                "cpu_cores_per_gbps": round(reads.cores()), "write_cpu_cores_per_gbps": round(writes.cores()),
            })
        };
        Ok(vec![row("sequential", &reads, &writes), row("random", &random_reads, &scattered)])
    }

    /// Bytes of payload for each byte that they take on the drive, of blocks of 1 MiB that the store compressed: when many
    /// wait for too few cores it stores the rest as they are.
    fn stored_ratio(&self, content: Content) -> Result<f64> {
        let path = self.directory.join("store");
        let mut load = create(&path, TurnShape { block_bytes: MIB, blocks: 16, turns: 2 }, content)?;
        load.write(Order::Sequential)?;
        let stats = load.stats();
        load.close()?;
        std::fs::remove_dir_all(&path)?;
        progress(&format!(
            "{:?}: {} of {} blocks compressed",
            content.bytes, stats.encoded_records, stats.appended_records
        ));
        Ok(stats.appended_payload_bytes as f64 / stats.appended_stored_bytes.max(1) as f64)
    }
}

/// An encrypted store in turns with the same one without, for each size of block.
fn encryption(arguments: &Arguments, directory: &Path) -> Result<Value> {
    let pairs = arguments.pairs as usize;
    let bytes = arguments.mib * MIB;
    let mut rows = Vec::new();
    let (mut least_read, mut least_write) = (f64::INFINITY, f64::INFINITY);
    for block_bytes in arguments.blocks_kib.iter().map(|block_kib| block_kib * KIB) {
        // The first turn of each is a warm-up.
        let shape = TurnShape { block_bytes, blocks: usize::try_from(bytes / block_bytes)?, turns: 1 + pairs };
        let paths = [directory.join("plain"), directory.join("encrypted")];
        let mut plain = create(&paths[0], shape, PLAIN)?;
        let mut encrypted = create(&paths[1], shape, Content { is_encrypted: true, ..PLAIN })?;
        progress(&format!("{:>4} KiB, encrypted beside plain            plain    encr.   ratio", block_bytes / KIB));
        let (mut writes, mut reads) = (Pairs::default(), Pairs::default());
        for number in 0..=pairs {
            let write = pair(
                number,
                bytes,
                &mut encrypted,
                || plain.write(Order::Sequential),
                |load| load.write(Order::Sequential),
            )?;
            let read = pair(
                number,
                bytes,
                &mut encrypted,
                || plain.read(Order::Sequential),
                |load| load.read(Order::Sequential),
            )?;
            plain.check()?;
            if number > 0 {
                writes.0.push(write);
                reads.0.push(read);
            }
        }
        writes.print("writes");
        reads.print("reads, in order");
        let stats = encrypted.stats();
        let speed = |bytes: u64, nanoseconds: u64| bytes as f64 / nanoseconds.max(1) as f64;
        let seal_gbps = speed(stats.appended_payload_bytes, stats.seal_ns);
        let unseal_gbps = speed(stats.read_bytes, stats.unseal_ns);
        progress(&format!("a thread encrypts {seal_gbps:.2} GB/s with checksum, decrypts {unseal_gbps:.2}"));
        plain.close()?;
        encrypted.close()?;
        paths.iter().try_for_each(std::fs::remove_dir_all)?;
        (least_read, least_write) = (least_read.min(reads.ratio()), least_write.min(writes.ratio()));
        let plain_cores = |pairs: &Pairs| pairs.median(|(plain, _)| plain.cores);
        rows.push(json!({
            "block_bytes": block_bytes,
            "read_ratio": round(reads.ratio()), "write_ratio": round(writes.ratio()),
            "thread_encrypts_gbps": round(seal_gbps), "thread_decrypts_gbps": round(unseal_gbps),
            "plain_read_gbps": round(reads.median(|(plain, _)| plain.gbps)),
            "plain_write_gbps": round(writes.median(|(plain, _)| plain.gbps)),
            "cpu_cores_per_gbps": round(reads.cores()), "plain_cpu_cores_per_gbps": round(plain_cores(&reads)),
            "write_cpu_cores_per_gbps": round(writes.cores()), "plain_write_cpu_cores_per_gbps": round(plain_cores(&writes)),
        }));
    }
    Ok(json!({ "encrypted_read_ratio": round(least_read), "encrypted_write_ratio": round(least_write), "rows": rows }))
}

/// A store under load, with all of its arena there.
fn create(path: &Path, shape: TurnShape, content: Content) -> Result<StoreLoad> {
    let config = ArenaConfig { chunk_bytes: TurnShape::CHUNK_BYTES, ..ArenaConfig::new(shape.arena_bytes()) };
    let arena = Arena::new(config)?;
    while arena.ready_bytes() < arena.capacity_bytes() {
        std::thread::sleep(Duration::from_millis(10));
    }
    StoreLoad::create(path, &arena, shape, content)
}

/// Fails if the page cache had a part in it: the drive itself moved what the ceiling and the store asked for, and nothing
/// of the region file is in memory.
fn prove_direct(region_file: &Path, before: (u64, u64), raw: (u64, u64), stats: &StoreStats) -> Result<()> {
    let cached = cached_bytes(&File::open(region_file)?)?;
    ensure!(cached == 0, "{cached} bytes of the region file are in the page cache");
    let after = drive_bytes()?;
    let (read, written) = (after.0 - before.0, after.1 - before.1);
    let (wanted_reads, wanted_writes) = (raw.0 + stats.read_stored_bytes, raw.1 + stats.appended_stored_bytes);
    ensure!(read >= wanted_reads, "the drive read {read} bytes, less than the {wanted_reads} asked for");
    ensure!(written >= wanted_writes, "the drive wrote {written} bytes, less than the {wanted_writes} asked for");
    Ok(())
}

/// One turn of each, the ceiling first in every other pair.
fn pair(
    number: usize,
    bytes: u64,
    load: &mut StoreLoad,
    ceiling: impl FnOnce() -> Result<Duration>,
    store: impl FnOnce(&mut StoreLoad) -> Result<Duration>,
) -> Result<(Turn, Turn)> {
    let ends = if number.is_multiple_of(2) {
        let ceiling = turn(bytes, ceiling)?;
        (ceiling, turn(bytes, || store(load))?)
    } else {
        let store = turn(bytes, || store(load))?;
        (turn(bytes, ceiling)?, store)
    };
    load.check()?;
    Ok(ends)
}

fn in_order(start: u64, bytes: u64, request_bytes: u64) -> Vec<u64> {
    (0..bytes / request_bytes).map(|number| start + number * request_bytes).collect()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn progress(what: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(std::io::stderr(), "bench-nvme: {what}");
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
