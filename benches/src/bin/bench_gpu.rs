//! How fast blocks move between GPU memory and an arena: the copy engine through `DeviceMemory`, beside the raw link measured
//! in the same run. Progress and a table go to standard error, one JSON object to standard output, as its last line.

use std::ffi::c_void;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use cudarc::driver::sys;
use pegaflow_tiers::{
    Arena, ArenaConfig, ArenaView, CopyDirection, CudaMemory, DeviceMemory, Fragment, PlacedCopy, RangeFragment, Slot,
    gpu_count,
};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// The fragments of a block lie in layers; a block has so many that it is 4 MiB long, but not more than this.
const LAYERS_MAX: u64 = 64;

/// Measures the copy engine on one GPU. Without a GPU it says so and ends well.
#[derive(Parser)]
struct Arguments {
    /// Which GPU.
    #[arg(long, env = "GPU", default_value_t = 0)]
    gpu: u32,
    /// MiB that each measurement moves.
    #[arg(long, env = "COPY_MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=4096))]
    copy_mib: u64,
    /// Measurements of which the median counts.
    #[arg(long, env = "REPEATS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    repeats: u32,
    /// Fragment sizes in KiB.
    #[arg(long, value_delimiter = ',', default_values_t = [8, 16, 32, 64, 128, 256, 512, 2048])]
    fragments_kib: Vec<u64>,
    /// The seed of block numbers and places.
    #[arg(long, env = "SEED", default_value_t = 1)]
    seed: u64,
    /// A JSON file with "tpot_median_rise" and "tpot_p99_rise", measured with a running vLLM.
    #[arg(long)]
    tpot: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match gpu_count() {
        Ok(count) if count > arguments.gpu => {}
        Ok(count) => return skip(&format!("there is no GPU {}; this host has {count}", arguments.gpu)),
        Err(error) => return skip(&error.to_string()),
    }
    enter(arguments.gpu)?;
    let bytes = arguments.copy_mib * MIB;
    let link = Link::measure(bytes, arguments.repeats)?;
    progress(&format!(
        "raw pinned copies, GB/s: {:.1} to the GPU, {:.1} from it, {:.1} both at once",
        link.h2d, link.d2h, link.pair
    ));
    let bench = Bench::new(&arguments, bytes)?;
    progress("fragment   direction  path         method     GB/s  of the link");
    let mut rows = Vec::new();
    let mut both = Vec::new();
    for fragment_kib in &arguments.fragments_kib {
        let setup = bench.setup(fragment_kib * KIB)?;
        for (direction, path) in [
            (CopyDirection::ToSlots, Path::Start),
            (CopyDirection::ToDevice, Path::Before),
            (CopyDirection::ToDevice, Path::Start),
        ] {
            rows.push(bench.row(&setup, direction, path, &link)?);
        }
        if *fragment_kib == 64 {
            for path in [Path::Before, Path::Start] {
                let gbps = bench.both(&setup, path)?;
                progress(&format!(
                    "both directions at once, loads by {}: {gbps:.1} GB/s, {:.3} of raw",
                    path.name(),
                    gbps / link.pair
                ));
                both.push(json!({"load_path": path.name(), "gbps": round(gbps), "ratio": round(gbps / link.pair)}));
            }
        }
    }
    let latency = bench.latencies()?;
    let (median_rise, p99_rise) = tpot(&arguments)?;
    let report = json!({
        "link_h2d_gbps": round(link.h2d),
        "link_d2h_gbps": round(link.d2h),
        "link_pair_gbps": round(link.pair),
        "both_ratio": both.first().map(|both| both["ratio"].clone()),
        "both": both,
        "rows": rows,
        "latency_us": latency,
        "tpot_median_rise": median_rise,
        "tpot_p99_rise": p99_rise,
    });
    println!("{report}");
    Ok(())
}

fn skip(why: &str) -> Result<()> {
    println!("bench-gpu: skipped: {why}");
    println!("{}", json!({ "skipped": why }));
    Ok(())
}

fn progress(what: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(std::io::stderr(), "bench-gpu: {what}");
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn gbps(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

fn tpot(arguments: &Arguments) -> Result<(Value, Value)> {
    let Some(path) = &arguments.tpot else { return Ok((Value::Null, Value::Null)) };
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let measured: Value = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    Ok((measured["tpot_median_rise"].clone(), measured["tpot_p99_rise"].clone()))
}

/// Makes the GPU current in this thread; the context goes with the process.
fn enter(gpu: u32) -> Result<()> {
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: there is a driver, see `main`; the pointers are valid for the calls.
    unsafe {
        sys::cuInit(0).result()?;
        sys::cuDeviceGet(&mut device, i32::try_from(gpu)?).result()?;
        sys::cuDevicePrimaryCtxRetain(&mut context, device).result()?;
        sys::cuCtxSetCurrent(context).result()?;
    }
    Ok(())
}

fn device_memory(bytes: u64) -> Result<u64> {
    let mut start = 0;
    // SAFETY: the context is current; the pointer is valid for the call. Never freed.
    unsafe { sys::cuMemAlloc_v2(&mut start, usize::try_from(bytes)?).result() }
        .with_context(|| format!("taking {bytes} bytes of GPU memory; give a smaller --copy-mib"))?;
    Ok(start)
}

struct Stream(sys::CUstream);

impl Stream {
    fn new() -> Result<Self> {
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the pointer is valid for the call. Never destroyed.
        unsafe { sys::cuStreamCreate(&mut stream, flags).result() }?;
        Ok(Self(stream))
    }

    fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<()> {
        // SAFETY: both memories are of that length and never freed.
        unsafe { sys::cuMemcpyAsync(to, from, bytes as usize, self.0).result() }?;
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the stream lives.
        unsafe { sys::cuStreamSynchronize(self.0).result() }?;
        Ok(())
    }
}

/// What the link does without us, in GB/s.
struct Link {
    h2d: f64,
    d2h: f64,
    pair: f64,
}

impl Link {
    /// The best of three medians.
    fn measure(bytes: u64, repeats: u32) -> Result<Self> {
        let pinned = || -> Result<u64> {
            let mut start: *mut c_void = std::ptr::null_mut();
            // SAFETY: the context is current; the pointer is valid for the call. Freed at the end.
            unsafe { sys::cuMemAllocHost_v2(&mut start, usize::try_from(bytes)?).result() }?;
            Ok(start as u64)
        };
        let (host, device) = ([pinned()?, pinned()?], [device_memory(bytes)?, device_memory(bytes)?]);
        let streams = [Stream::new()?, Stream::new()?];
        let best = |to_device: bool, from_device: bool| -> Result<f64> {
            let mut best = Duration::MAX;
            for _ in 0..3 {
                let mut times = Vec::new();
                for _ in 0..=repeats {
                    let start = Instant::now();
                    if to_device {
                        streams[0].copy(device[0], host[0], bytes)?;
                    }
                    if from_device {
                        streams[1].copy(host[1], device[1], bytes)?;
                    }
                    streams.iter().try_for_each(Stream::wait)?;
                    times.push(start.elapsed());
                }
                best = best.min(median(times.split_off(1)));
            }
            Ok(gbps(bytes * (u64::from(to_device) + u64::from(from_device)), best))
        };
        let link = Self { h2d: best(true, false)?, d2h: best(false, true)?, pair: best(true, true)? };
        // SAFETY: taken above; all copies have ended.
        unsafe {
            host.iter().try_for_each(|host| sys::cuMemFreeHost(*host as usize as *mut c_void).result())?;
            device.iter().try_for_each(|device| sys::cuMemFree_v2(*device).result())?;
        }
        Ok(link)
    }
}

/// How a load is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    Start,
    Before,
}

impl Path {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Before => "load_before",
        }
    }
}

struct Bench {
    arena: Arc<Arena>,
    view: Arc<ArenaView>,
    device: u64,
    device_bytes: u64,
    copy_bytes: u64,
    stream: Stream,
    gpu: u32,
    repeats: u32,
    seed: u64,
}

/// A KV cache of one geometry and places for two copies of it, all scattered.
struct Setup {
    memory: Arc<CudaMemory>,
    fragment_bytes: u64,
    saves: Vec<(u32, Slot)>,
    loads: Vec<(u32, Slot)>,
}

type Ended = std::sync::mpsc::Receiver<pegaflow_tiers::Result<()>>;

impl Bench {
    fn new(arguments: &Arguments, copy_bytes: u64) -> Result<Self> {
        // Slots are a page longer than their block and do not lie over the end of a chunk: up to a third is lost.
        let arena = Arena::new(ArenaConfig { is_shared: true, ..ArenaConfig::new(copy_bytes * 3 + (64 << 20)) })?;
        let fd = arena.fd().context("the arena is shared")?;
        let view = ArenaView::map(fd, arena.id(), arena.capacity_bytes())?;
        Ok(Self {
            arena,
            view,
            device: device_memory(copy_bytes * 2)?,
            device_bytes: copy_bytes * 2,
            copy_bytes,
            stream: Stream::new()?,
            gpu: arguments.gpu,
            repeats: arguments.repeats,
            seed: arguments.seed,
        })
    }

    fn setup(&self, fragment_bytes: u64) -> Result<Setup> {
        let layers = (4 * MIB / fragment_bytes).clamp(1, LAYERS_MAX);
        let blocks = u32::try_from(self.device_bytes / layers / fragment_bytes)?;
        let layer_bytes = u64::from(blocks) * fragment_bytes;
        let ranges: Vec<_> = (0..layers).map(|layer| (self.device + layer * layer_bytes, layer_bytes)).collect();
        let fragment = Fragment { offset: 0, stride: fragment_bytes, bytes: fragment_bytes };
        let fragments = (0..u32::try_from(layers)?).map(|range| RangeFragment { range, fragment }).collect();
        // SAFETY: the device's memory is never freed.
        let memory = Arc::new(unsafe { CudaMemory::new(self.gpu, &ranges, fragments, blocks, Box::new(())) }?);
        self.attach(&memory)?;
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut numbers: Vec<u32> = (0..blocks).collect();
        numbers.shuffle(&mut random);
        let block_bytes = usize::try_from(layers * fragment_bytes)?;
        let slots: Option<Vec<_>> = numbers.iter().map(|_| self.arena.alloc(block_bytes)).collect();
        let mut slots = slots.context("the arena is too small")?;
        slots.shuffle(&mut random);
        let mut saves: Vec<_> = numbers.into_iter().zip(slots).collect();
        let loads = saves.split_off(saves.len() / 2);
        Ok(Setup { memory, fragment_bytes, saves, loads })
    }

    fn attach(&self, memory: &CudaMemory) -> Result<()> {
        memory.attach(&self.view)?;
        let start = Instant::now();
        while !memory.is_attached(&self.view)? {
            ensure!(start.elapsed() < PATIENCE, "the arena is not registered after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        if start.elapsed() > Duration::from_millis(10) {
            progress(&format!("registered {} bytes in {:?}", self.arena.capacity_bytes(), start.elapsed()));
            // The calibration runs behind it.
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }

    fn begin(
        &self,
        memory: &Arc<CudaMemory>,
        direction: CopyDirection,
        path: Path,
        blocks: &[(u32, Slot)],
    ) -> Result<Ended> {
        let (done, ended) = std::sync::mpsc::sync_channel(1);
        let copy = PlacedCopy {
            arena: Arc::clone(&self.view),
            direction,
            blocks: blocks.iter().map(|(block, slot)| (*block, slot.place())).collect(),
            after: None,
            cancelled: Arc::default(),
            done: Box::new(move |result| drop(done.try_send(result))),
        };
        match path {
            Path::Start => Arc::clone(memory).start(copy),
            Path::Before => Arc::clone(memory).load_before(copy, self.stream.0 as u64)?,
        }
        Ok(ended)
    }

    fn row(&self, setup: &Setup, direction: CopyDirection, path: Path, link: &Link) -> Result<Value> {
        let (blocks, name, raw) = match direction {
            CopyDirection::ToSlots => (&setup.saves, "d2h", link.d2h),
            CopyDirection::ToDevice => (&setup.loads, "h2d", link.h2d),
        };
        let (mut times, mut calls) = (Vec::new(), Vec::new());
        for _ in 0..=self.repeats {
            let start = Instant::now();
            let ended = self.begin(&setup.memory, direction, path, blocks)?;
            calls.push(start.elapsed());
            ended.recv_timeout(PATIENCE)??;
            times.push(start.elapsed());
        }
        let bytes = blocks.len() as u64 * setup.memory.layout().block_bytes();
        ensure!(bytes <= self.copy_bytes, "more was moved than said");
        let gbps = gbps(bytes, median(times.split_off(1)));
        let method = setup.memory.method_name();
        progress(&format!(
            "{:>5} KiB  {name}        {:<11}  {method:<7}  {gbps:>7.1}  {:>6.3}",
            setup.fragment_bytes / KIB,
            path.name(),
            gbps / raw
        ));
        Ok(json!({
            "fragment_bytes": setup.fragment_bytes,
            "direction": name,
            "gbps": round(gbps),
            "ratio": round(gbps / raw),
            "method": method,
            "path": path.name(),
            "call_ms": round(median(calls.split_off(1)).as_secs_f64() * 1000.0),
        }))
    }

    /// A save and a load at once, in GB/s together.
    fn both(&self, setup: &Setup, path: Path) -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..=self.repeats {
            let start = Instant::now();
            let save = self.begin(&setup.memory, CopyDirection::ToSlots, Path::Start, &setup.saves)?;
            let load = self.begin(&setup.memory, CopyDirection::ToDevice, path, &setup.loads)?;
            save.recv_timeout(PATIENCE)??;
            load.recv_timeout(PATIENCE)??;
            times.push(start.elapsed());
        }
        let blocks = (setup.saves.len() + setup.loads.len()) as u64;
        Ok(gbps(blocks * setup.memory.layout().block_bytes(), median(times.split_off(1))))
    }

    /// What a small copy takes beyond its bytes: an event alone, and one block of two fragments each way.
    fn latencies(&self) -> Result<Value> {
        let layer = 64 * KIB;
        let fragment = Fragment { offset: 0, stride: 4 * KIB, bytes: 4 * KIB };
        let ranges = [(self.device, layer), (self.device + layer, layer)];
        let fragments = (0..2).map(|range| RangeFragment { range, fragment }).collect();
        // SAFETY: the device's memory is never freed.
        let memory = Arc::new(unsafe { CudaMemory::new(self.gpu, &ranges, fragments, 16, Box::new(())) }?);
        self.attach(&memory)?;
        let blocks = [(3, self.arena.alloc(8192).context("the arena is full")?)];
        let mut latencies = serde_json::Map::new();
        for (name, direction, path) in [
            ("save", CopyDirection::ToSlots, Path::Start),
            ("load", CopyDirection::ToDevice, Path::Start),
            ("load_before", CopyDirection::ToDevice, Path::Before),
        ] {
            let mut times = Vec::new();
            for _ in 0..200 {
                let start = Instant::now();
                let ended = self.begin(&memory, direction, path, &blocks)?;
                ended.recv_timeout(PATIENCE)??;
                times.push(start.elapsed());
            }
            latencies.insert(name.into(), json!(round(median(times).as_secs_f64() * 1e6)));
        }
        latencies.insert("event".into(), json!(round(event_latency()?.as_secs_f64() * 1e6)));
        progress(&format!("latencies in us: {}", Value::Object(latencies.clone())));
        Ok(Value::Object(latencies))
    }
}

/// From the record of an event on an idle stream until a query sees it.
fn event_latency() -> Result<Duration> {
    let stream = Stream::new()?;
    let mut event = std::ptr::null_mut();
    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    let mut times = Vec::new();
    // SAFETY: the context is current; stream and event are never destroyed.
    unsafe {
        sys::cuEventCreate(&mut event, flags).result()?;
        for _ in 0..1000 {
            let start = Instant::now();
            sys::cuEventRecord(event, stream.0).result()?;
            while sys::cuEventQuery(event) == sys::CUresult::CUDA_ERROR_NOT_READY {
                if start.elapsed() > PATIENCE {
                    bail!("an event is never seen");
                }
            }
            times.push(start.elapsed());
        }
    }
    Ok(median(times))
}
