//! How fast each drive is, and how deep it wants to be read. Measured in the background once the store is open and nobody
//! uses it, kept in a file for the next open, and learned from what readers and writers do. Reads only, and only what was
//! written; gives way to everybody. Owns what is known; the I/O engine and the codec's decision use it.

mod cache;
mod device;
mod measure;
mod pieces;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::Serialize;

use self::cache::{CachedDrive, now_unix_ms};
use self::measure::{Measured, Memory, Outcome, measure};
use super::drive::Drive;
use super::io::{BlockIo, DirectionUse, Meters, READ_DEPTH_DEFAULT, ReadDepth};
use super::shared::Shared;
use crate::dram::Arena;
use crate::latency::Latencies;

/// The part of the arena that all measurements together may use.
const ARENA_PART: u64 = 8;
/// The longest time for which nobody may have used the store.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// No drive is read with less in flight.
const DEPTH_MIN_BYTES: usize = 8 << 20;

/// When and how much is measured.
#[derive(Debug, Clone)]
pub(super) struct CalibrationPlan {
    /// Written bytes that a drive must have.
    pub(super) written_bytes_min: u64,
    /// How long it may take.
    pub(super) time_max: Duration,
    /// How many bytes of a drive may be read.
    pub(super) bytes_max: u64,
    /// Bytes of a request, and of the smallest depth.
    pub(super) request_bytes: usize,
    /// A rate is made of so much time and so many requests; of less after the longer time.
    pub(super) window: Duration,
    pub(super) window_requests: u32,
    pub(super) window_max: Duration,
    /// How often it is tried while others use the drive, and for how long nobody may have used it after the first time;
    /// doubled each time, up to a minute.
    pub(super) attempts: u32,
    pub(super) pause: Duration,
    /// How long a result is believed.
    pub(super) age_max: Duration,
}

impl Default for CalibrationPlan {
    fn default() -> Self {
        Self {
            written_bytes_min: 256 << 20,
            time_max: Duration::from_millis(300),
            bytes_max: 2 << 30,
            request_bytes: 1 << 20,
            window: Duration::from_millis(10),
            window_requests: 16,
            window_max: Duration::from_millis(40),
            attempts: 8,
            pause: Duration::from_secs(1),
            age_max: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

/// Where it is known from how deep a drive is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DepthOrigin {
    /// It is not known: the default for every drive.
    #[default]
    Default,
    /// Measured at an earlier open.
    Cached,
    /// Measured at this open.
    Measured,
}

/// How fast a drive is, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DriveSpeed {
    /// The directory on it.
    pub path: PathBuf,
    /// Bytes per second that it is read with at its best: as it was measured, then as reads show. 0 while not known.
    pub read_bytes_per_second: u64,
    /// Bytes per second that it is written with at its best, syncs included, as writes show. 0 while not known.
    pub write_bytes_per_second: u64,
    /// Bytes of reads in flight with which it reads at almost its best.
    pub read_depth_bytes: u64,
    /// Neighbouring reads are made as one up to so many bytes.
    pub read_request_bytes: u64,
    /// Operations in flight on it at most.
    pub queue_depth: u64,
    /// Where the depth is known from.
    pub depth_origin: DepthOrigin,
}

/// What has gone to a drive and come from it since the store was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DriveUse {
    /// The directory on it.
    pub path: PathBuf,
    /// Reads that ended well.
    pub reads: u64,
    /// Bytes of these.
    pub read_bytes: u64,
    /// Reads that failed or were refused.
    pub failed_reads: u64,
    /// Time in which a read waited, in nanoseconds.
    pub read_busy_ns: u64,
    /// Reads that wait or are in flight.
    pub reads_waiting: u64,
    /// Bytes of these.
    pub read_bytes_waiting: u64,
    /// What was read in the last 10 to 20 seconds, per thousand of what the drive is read with at its best in that time; 0
    /// while that is not known.
    pub read_ceiling_permille: u64,
    /// Writes that ended well, syncs included.
    pub writes: u64,
    /// Bytes of these.
    pub write_bytes: u64,
    /// Writes and syncs that failed or were refused.
    pub failed_writes: u64,
    /// Time in which a write or sync waited, in nanoseconds.
    pub write_busy_ns: u64,
    /// Writes and syncs that wait or are in flight.
    pub writes_waiting: u64,
    /// Bytes of these.
    pub write_bytes_waiting: u64,
    /// As `read_ceiling_permille`, of writes.
    pub write_ceiling_permille: u64,
}

impl DriveUse {
    fn new(path: PathBuf, (read, write): (DirectionUse, DirectionUse), (reads_at, writes_at): (u64, u64)) -> Self {
        let permille = |of: DirectionUse, best: u64| (of.recent_bytes_per_second * 1000).checked_div(best).unwrap_or(0);
        Self {
            path,
            reads: read.requests,
            read_bytes: read.bytes,
            failed_reads: read.failed,
            read_busy_ns: read.busy_ns,
            reads_waiting: read.waiting,
            read_bytes_waiting: read.waiting_bytes,
            read_ceiling_permille: permille(read, reads_at),
            writes: write.requests,
            write_bytes: write.bytes,
            failed_writes: write.failed,
            write_busy_ns: write.busy_ns,
            writes_waiting: write.waiting,
            write_bytes_waiting: write.waiting_bytes,
            write_ceiling_permille: permille(write, writes_at),
        }
    }
}

/// What is known of the drives of an open store.
pub(super) struct Calibration {
    /// `None`: nothing is measured nor learned.
    plan: Option<CalibrationPlan>,
    meters: Arc<Meters>,
    settings: String,
    queue_depth: u64,
    cache: PathBuf,
    drives: Vec<Mutex<Known>>,
    is_stopped: AtomicBool,
    /// Somebody has used the store since this was last unset.
    is_disturbed: AtomicBool,
    /// Whether the measuring has ended, or there is none.
    has_ended: Mutex<bool>,
    changed: Condvar,
}

/// A drive.
struct Known {
    path: PathBuf,
    identity: String,
    depth: Option<Measured>,
    origin: DepthOrigin,
    measured_unix_ms: u64,
}

/// A drive as the store knows it.
pub(super) struct CalibratedDrive {
    /// The file of its regions.
    pub(super) regions: PathBuf,
    /// Which drive of which store.
    pub(super) name: String,
}

impl Calibration {
    /// Of a store whose drives may not be measured.
    pub(super) fn off() -> Self {
        Self::new(None, Meters::new(0), PathBuf::new(), String::new(), 0, Vec::new())
    }

    /// Takes up what the file `cache` says of these drives, in the order of the configuration.
    pub(super) fn load(
        plan: CalibrationPlan,
        meters: Arc<Meters>,
        io: &dyn BlockIo,
        queue_depth: usize,
        cache: PathBuf,
        drives: Vec<CalibratedDrive>,
    ) -> Self {
        let settings = format!("{} {} {queue_depth}", device::kernel_release(), io.name());
        let age_max = plan.age_max;
        let calibration = Self::new(Some(plan), meters, cache, settings, queue_depth as u64, drives);
        let cached = cache::load(&calibration.cache);
        for (number, drive) in calibration.drives.iter().enumerate() {
            let mut drive = drive.lock();
            let found = cached.iter().find(|cached| cached.holds(&drive.identity, &calibration.settings, age_max));
            let Some(found) = found else { continue };
            drive.measured_unix_ms = found.measured_unix_ms;
            let (file, meters) = (Drive::file(number), &calibration.meters);
            meters.know_read(file, found.read_bytes_per_second, found.read_depth_bytes);
            meters.know_write(file, found.write_bytes_per_second);
            if found.read_depth_bytes > 0 {
                let measured = Measured {
                    read_bytes_per_second: found.read_bytes_per_second,
                    depth_bytes: found.read_depth_bytes,
                    request_bytes: found.read_request_bytes,
                };
                (drive.depth, drive.origin) = (Some(measured), DepthOrigin::Cached);
                io.set_read_depth(file, depth_for(&measured));
            }
        }
        calibration
    }

    fn new(
        plan: Option<CalibrationPlan>,
        meters: Arc<Meters>,
        cache: PathBuf,
        settings: String,
        queue_depth: u64,
        drives: Vec<CalibratedDrive>,
    ) -> Self {
        let known = |drive: CalibratedDrive| {
            let identity = format!("{} on {}", drive.name, device::device_of(&drive.regions));
            let path = drive.regions.parent().unwrap_or(&drive.regions).to_owned();
            Mutex::new(Known { path, identity, depth: None, origin: DepthOrigin::Default, measured_unix_ms: 0 })
        };
        Self {
            plan,
            meters,
            settings,
            queue_depth,
            cache,
            drives: drives.into_iter().map(known).collect(),
            is_stopped: AtomicBool::new(false),
            is_disturbed: AtomicBool::new(false),
            has_ended: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    /// Somebody uses the store: a measurement ends, and gives way.
    pub(super) fn disturb(&self) {
        if !self.is_disturbed.load(Ordering::Relaxed) {
            self.is_disturbed.store(true, Ordering::Relaxed);
        }
    }

    /// The store is being closed.
    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        drop(self.has_ended.lock());
        self.changed.notify_all();
    }

    fn is_interrupted(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed) || self.is_disturbed.load(Ordering::Relaxed)
    }

    /// Waits until nobody has used the store for so long; false if it is being closed, or is in use.
    fn is_idle_for(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        self.is_disturbed.store(false, Ordering::Relaxed);
        let mut has_ended = self.has_ended.lock();
        self.changed.wait_while_until(&mut has_ended, |_| !self.is_stopped.load(Ordering::Relaxed), until);
        drop(has_ended);
        !self.is_interrupted()
    }

    /// Bytes per second that all drives read together at their best; 0 while that is not known of one of them.
    pub(super) fn read_bytes_per_second(&self) -> u64 {
        let mut sum = 0u64;
        for number in 0..self.drives.len() {
            match self.meters.read(Drive::file(number)) {
                0 => return 0,
                rate => sum = sum.saturating_add(rate),
            }
        }
        sum
    }

    /// How fast the drives are, in the order of the configuration.
    pub(super) fn speeds(&self) -> Vec<DriveSpeed> {
        let speed = |(number, known): (usize, &Mutex<Known>)| {
            let (known, file) = (known.lock(), Drive::file(number));
            let of_default = (READ_DEPTH_DEFAULT.depth_bytes as u64, READ_DEPTH_DEFAULT.request_bytes as u64);
            let (read_depth_bytes, read_request_bytes) =
                known.depth.map_or(of_default, |measured| (measured.depth_bytes, measured.request_bytes));
            DriveSpeed {
                path: known.path.clone(),
                read_bytes_per_second: self.meters.read(file),
                write_bytes_per_second: self.meters.write(file),
                read_depth_bytes,
                read_request_bytes,
                queue_depth: self.queue_depth,
                depth_origin: known.origin,
            }
        };
        self.drives.iter().enumerate().map(speed).collect()
    }

    /// How each drive is used.
    pub(super) fn uses(&self) -> Vec<DriveUse> {
        let of = |(number, known): (usize, &Mutex<Known>)| {
            let file = Drive::file(number);
            let best = (self.meters.read(file), self.meters.write(file));
            DriveUse::new(known.lock().path.clone(), self.meters.uses(file), best)
        };
        self.drives.iter().enumerate().map(of).collect()
    }

    /// How long reads, writes and syncs of all drives took.
    pub(super) fn latencies(&self) -> [Latencies; 3] {
        self.meters.latencies()
    }

    /// Keeps what is known for the next open.
    pub(super) fn save(&self) {
        if self.plan.is_none() {
            return;
        }
        let cached = |(number, known): (usize, &Mutex<Known>)| {
            let (known, file) = (known.lock(), Drive::file(number));
            let measured_unix_ms = if known.measured_unix_ms == 0 { now_unix_ms() } else { known.measured_unix_ms };
            let cached = CachedDrive {
                identity: known.identity.clone(),
                settings: self.settings.clone(),
                measured_unix_ms,
                read_bytes_per_second: self.meters.read(file),
                write_bytes_per_second: self.meters.write(file),
                read_depth_bytes: known.depth.map_or(0, |measured| measured.depth_bytes),
                read_request_bytes: known.depth.map_or(0, |measured| measured.request_bytes),
            };
            (cached.read_bytes_per_second > 0 || cached.write_bytes_per_second > 0).then_some(cached)
        };
        let drives: Vec<CachedDrive> = self.drives.iter().enumerate().filter_map(cached).collect();
        if drives.is_empty() {
            return;
        }
        if let Err(error) = cache::save(&self.cache, drives) {
            tracing::info!(path = %self.cache.display(), %error, "what is known of the drives is not kept");
        }
    }

    /// Notes what is known of all drives at once, for tests.
    #[cfg(test)]
    pub(super) fn know_read(&self, bytes_per_second: u64) {
        (0..self.drives.len()).for_each(|number| self.meters.know_read(Drive::file(number), bytes_per_second, 0));
    }

    /// Waits until nothing is measured any more, for tests; false at `deadline`.
    #[cfg(test)]
    pub(super) fn wait_ended(&self, deadline: Instant) -> bool {
        let mut has_ended = self.has_ended.lock();
        self.changed.wait_while_until(&mut has_ended, |has_ended| !*has_ended, deadline);
        *has_ended
    }

    fn end(&self) {
        *self.has_ended.lock() = true;
        self.changed.notify_all();
    }

    fn note(&self, io: &dyn BlockIo, number: usize, measured: Measured) {
        if let Some(known) = self.drives.get(number) {
            let mut known = known.lock();
            (known.depth, known.origin) = (Some(measured), DepthOrigin::Measured);
            known.measured_unix_ms = now_unix_ms();
        }
        let file = Drive::file(number);
        self.meters.know_read(file, measured.read_bytes_per_second, measured.depth_bytes);
        io.set_read_depth(file, depth_for(&measured));
    }

    /// One line for a drive.
    fn log(&self, number: usize, what: &str) {
        let Some(speed) = self.speeds().into_iter().nth(number) else { return };
        let mib = |bytes: u64| bytes >> 20;
        tracing::info!(
            drive = %speed.path.display(),
            read_mib_s = mib(speed.read_bytes_per_second),
            write_mib_s = mib(speed.write_bytes_per_second),
            read_depth_kib = speed.read_depth_bytes >> 10,
            read_request_kib = speed.read_request_bytes >> 10,
            queue_depth = speed.queue_depth,
            "the drive's speed: {what}"
        );
    }
}

/// Twice what was measured is allowed, since requests end in lumps: what is left in flight when a large one ends is then
/// still what the drive wants. Less than [`DEPTH_MIN_BYTES`] would hardly make anybody wait less, and be too little where
/// the measurement was disturbed.
fn depth_for(measured: &Measured) -> ReadDepth {
    let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    ReadDepth {
        depth_bytes: bytes(measured.depth_bytes)
            .saturating_mul(2)
            .clamp(DEPTH_MIN_BYTES, READ_DEPTH_DEFAULT.depth_bytes),
        request_bytes: bytes(measured.request_bytes),
    }
}

/// Starts the thread that measures the drives of which nothing is known, if there are such.
pub(super) fn start(
    shared: &Arc<Shared>,
    arena: &Arc<Arena>,
    files: Vec<PathBuf>,
    is_direct: bool,
) -> Option<JoinHandle<()>> {
    let calibration = &shared.calibration;
    let mut unknown = Vec::new();
    for (number, path) in files.into_iter().enumerate() {
        let is_known = calibration.drives.get(number).is_none_or(|known| known.lock().depth.is_some());
        if calibration.plan.is_none() {
            continue;
        }
        match is_known {
            true => calibration.log(number, "as measured at an earlier open"),
            // The page cache is not the drive.
            false if !is_direct => calibration.log(number, "not measured, without direct I/O"),
            false => unknown.push((number, path)),
        }
    }
    let Some(plan) = calibration.plan.clone().filter(|_| !unknown.is_empty()) else {
        calibration.end();
        return None;
    };
    let (shared, arena) = (Arc::clone(shared), Arc::clone(arena));
    let work = move || {
        Job { shared: &shared, arena: &arena, plan: &plan }.run(unknown);
        shared.calibration.end();
    };
    let thread = std::thread::Builder::new().name("pega-calibrate".into()).spawn(work);
    thread.inspect_err(|error| tracing::warn!(%error, "the drives are not measured: there is no thread for it")).ok()
}

struct Job<'a> {
    shared: &'a Arc<Shared>,
    arena: &'a Arc<Arena>,
    plan: &'a CalibrationPlan,
}

/// How it went with one drive.
enum Tried {
    Known,
    /// It will not be otherwise at this open.
    Unknown(String),
    /// Others used it.
    Interrupted,
}

impl Job<'_> {
    fn run(&self, mut unknown: Vec<(usize, PathBuf)>) {
        let calibration = &self.shared.calibration;
        // Until then the index uses the home, and not all that was written is known.
        self.shared.fill.wait();
        let mut pause = self.plan.pause;
        for attempt in 0..self.plan.attempts {
            let is_free = if attempt == 0 {
                !calibration.is_interrupted()
            } else {
                let is_idle = calibration.is_idle_for(pause);
                pause = (pause * 2).min(PAUSE_MAX);
                is_idle
            };
            if calibration.is_stopped.load(Ordering::Relaxed) {
                return;
            }
            if is_free {
                self.measure_all(&mut unknown);
            }
            if unknown.is_empty() {
                break;
            }
        }
        if !calibration.is_stopped.load(Ordering::Relaxed) {
            unknown.iter().for_each(|(number, _)| calibration.log(*number, "not measured, the store was in use"));
        }
        if calibration.drives.iter().any(|known| known.lock().origin == DepthOrigin::Measured) {
            calibration.save();
        }
    }

    /// Measures drives at the same time, as they are used; those that were interrupted stay in the list.
    fn measure_all(&self, unknown: &mut Vec<(usize, PathBuf)>) {
        let arena_bytes = self.arena.ready_bytes() / ARENA_PART / unknown.len().max(1) as u64;
        let tried: Vec<Tried> = std::thread::scope(|scope| {
            let start = |(number, path): &(usize, PathBuf)| {
                let (number, path) = (*number, path.clone());
                let thread = std::thread::Builder::new().name(format!("pega-calibr-{number}"));
                thread.spawn_scoped(scope, move || self.measure(number, &path, arena_bytes as usize))
            };
            let threads: Vec<_> = unknown.iter().map(start).collect();
            let failed = || Tried::Unknown("not measured, its thread failed".into());
            threads
                .into_iter()
                .map(|thread| thread.map_or_else(|_| failed(), |thread| thread.join().unwrap_or_else(|_| failed())))
                .collect()
        });
        let mut tried = tried.into_iter();
        unknown.retain(|(number, _)| match tried.next() {
            Some(Tried::Known) => {
                self.shared.calibration.log(*number, "measured");
                false
            }
            Some(Tried::Unknown(why)) => {
                self.shared.calibration.log(*number, &why);
                false
            }
            Some(Tried::Interrupted) | None => true,
        });
    }

    fn measure(&self, number: usize, path: &Path, arena_bytes: usize) -> Tried {
        let (shared, calibration) = (self.shared, &self.shared.calibration);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) => return Tried::Unknown(format!("not measured: {error}")),
        };
        let request_bytes = self.plan.request_bytes as u64;
        let count = usize::try_from(self.plan.bytes_max / request_bytes).unwrap_or(usize::MAX);
        let regions = shared.regions.infos();
        let offsets = pieces::written_pieces(&shared.drive, number, &regions, &file, request_bytes, count);
        if (offsets.len() as u64) * request_bytes < self.plan.written_bytes_min.max(1) {
            return Tried::Unknown("not measured, too little was written to it".into());
        }
        let memory = Memory { arena: Arc::clone(self.arena), arena_bytes };
        let is_interrupted = || calibration.is_interrupted();
        let io = shared.drive.io();
        match measure(io, Drive::file(number), &offsets, memory, self.plan, &is_interrupted) {
            Outcome::Measured(measured) => {
                calibration.note(io, number, measured);
                Tried::Known
            }
            Outcome::Stopped => Tried::Interrupted,
            Outcome::Failed(error) => Tried::Unknown(format!("not measured: {error:#}")),
        }
    }
}
