//! A drive: room, file system, direct I/O, io_uring, and how fast it is.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_engine::{ByteSize, Error, ErrorKind, Result};
use pegaflow_tiers::{
    Arena, ArenaConfig, BlockIo, FileId, IoBuffer, IoChoice, IoKind, IoPriority, IoRequest, Pages, open_direct,
    open_engine,
};

use super::{Finding, State};

/// What is written and read to measure, in requests of this size, so many at a time.
const FILE_BYTES: u64 = 512 << 20;
const REQUEST_BYTES: usize = 1 << 20;
const DEPTH: usize = 32;
/// Room that a file system must have for the measurement beside what the store takes.
const SPARE_BYTES: u64 = 1 << 30;
/// The longest wait for one transfer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Neither direction is measured for longer.
const MEASURE_MAX: Duration = Duration::from_secs(5);
/// Slower than this a drive makes computing the better choice for most models.
const READ_GBPS_MIN: f64 = 1.0;
const EXT: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;
const TMPFS: u64 = 0x0102_1994;

/// Looks at the drive of a directory that the store takes `capacity` bytes of.
pub(super) fn examine(path: &Path, capacity: u64, measures: bool) -> Vec<Finding> {
    let what = format!("drive {}", path.display());
    let folder = path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let mut findings = vec![room(&what, path, folder, capacity)];
    let trial = folder.join(format!(".pegaflow-doctor-{}", std::process::id()));
    let _gone = Removed(trial.clone());
    match File::create_new(&trial).map_err(|error| Error::from_io(format!("making '{}'", trial.display()), error)) {
        Ok(file) => {
            drop(file);
            findings.extend(try_it(&what, &trial, folder, measures));
        }
        Err(error) => {
            let remedy = format!("sudo chown $USER {}", folder.display());
            findings.push(Finding::other(State::Wrong, what, format!("{error:#}"), remedy));
        }
    }
    findings
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _none = std::fs::remove_file(&self.0);
    }
}

fn room(what: &str, path: &Path, folder: &Path, capacity: u64) -> Finding {
    let Ok(stat) = rustix::fs::statvfs(folder) else {
        return Finding::other(State::Wrong, what, "its file system can not be asked", "mount it");
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    // A store that is there has taken its room.
    if path.join("superblock").exists() {
        return Finding::good(what, format!("a store is there; {} are free beside it", ByteSize(free)));
    }
    let found = format!("{} free, the store takes {}", ByteSize(free), ByteSize(capacity));
    if free < capacity {
        let remedy = format!("give it at most {}, or free some", ByteSize(free / 100 * 95));
        return Finding::other(State::Wrong, what, found, remedy);
    }
    Finding::good(what, found)
}

fn try_it(what: &str, trial: &Path, folder: &Path, measures: bool) -> Vec<Finding> {
    let mut findings = vec![file_system(what, folder)];
    let opened = open_direct(trial);
    let (file, is_direct) = match opened {
        Ok((file, _, is_direct)) => (file, is_direct),
        Err(error) => {
            let remedy = "choose a directory on ext4 or XFS on a local NVMe drive";
            findings.push(Finding::other(State::Wrong, what, format!("{error:#}"), remedy));
            return findings;
        }
    };
    if !is_direct {
        let remedy = "choose a directory on ext4 or XFS: the page cache would hold every block a second time";
        findings.push(Finding::other(State::Slow, what, "the file system has no direct I/O", remedy));
    }
    let arena = match Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(4 << 20) }) {
        Ok(arena) => Arc::new(arena),
        Err(error) => {
            findings.push(Finding::other(State::Wrong, "memory", format!("{error:#}"), "free some memory"));
            return findings;
        }
    };
    let engine = match open_engine(IoChoice::IoUring, &[&file], &arena, DEPTH) {
        Ok(engine) => {
            findings.push(Finding::good(what, "io_uring works on it"));
            Ok(engine)
        }
        Err(error) => {
            let found = format!("io_uring does not work; pread and pwrite are used: {}", error.message());
            let remedy =
                "sysctl -w kernel.io_uring_disabled=0; in a container allow io_uring_setup, _enter and _register";
            findings.push(Finding::other(State::Slow, what, found, remedy));
            open_engine(IoChoice::Psync, &[&file], &arena, DEPTH)
        }
    };
    if measures {
        findings.push(match engine.and_then(|engine| speed(&engine, &file, folder)) {
            Ok((read, write)) => told(what, read, write),
            Err(error) => Finding::other(State::Missing, what, format!("not measured: {error:#}"), "free some room"),
        });
    }
    findings
}

fn file_system(what: &str, folder: &Path) -> Finding {
    let kind = rustix::fs::statfs(folder).map_or(0, |stat| stat.f_type as u64);
    match kind {
        EXT => Finding::good(what, "ext4"),
        XFS => Finding::good(what, "XFS"),
        TMPFS => Finding::other(State::Wrong, what, "tmpfs: memory, not a drive", "give path a directory on a drive"),
        other => Finding::other(
            State::Slow,
            what,
            format!("a file system of type {other:#x}, on which the store is not tested"),
            "ext4 and XFS are",
        ),
    }
}

fn told(what: &str, read: f64, write: f64) -> Finding {
    let requests = format!("{} KiB, {DEPTH} at a time", REQUEST_BYTES >> 10);
    let found = format!("reads {read:.2} GB/s, writes {write:.2} GB/s ({requests})");
    if read < READ_GBPS_MIN {
        let remedy = "fine with load_policy = \"auto\", which computes what this drive is too slow for; \
                      faster: a local NVMe drive, or a further one with drive";
        return Finding::other(State::Slow, what, found, remedy);
    }
    Finding::good(what, found)
}

/// GB/s of reads in random order and of writes one after the other.
fn speed(engine: &Arc<dyn BlockIo>, file: &File, folder: &Path) -> Result<(f64, f64)> {
    let stat = rustix::fs::statvfs(folder).map_err(|error| Error::from_io("asking the file system", error.into()))?;
    if stat.f_bavail.saturating_mul(stat.f_frsize) < SPARE_BYTES {
        let message = format!("less than {} are free", ByteSize(SPARE_BYTES));
        return Err(Error::new(ErrorKind::NoSpace, message));
    }
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, FILE_BYTES)
        .map_err(|error| Error::from_io("taking room", error.into()))?;
    let count = FILE_BYTES / REQUEST_BYTES as u64;
    let (written, write_s) = transfer(engine, IoKind::Write, (0..count).collect())?;
    let (wait, synced) = crossbeam_channel::bounded(1);
    submit(engine, IoKind::Sync, 0, None, Box::new(move |end| drop(wait.try_send(end.result))))?;
    synced.recv_timeout(PATIENCE).map_err(|_| slow())??;
    // All of what was written, in another order than it was.
    let order: Vec<u64> = (0..written).map(|number| number.wrapping_mul(0x9e37_79b1) % written.max(1)).collect();
    let (read, read_s) = transfer(engine, IoKind::Read, order)?;
    engine.close();
    let gbps = |count: u64, seconds: f64| (count * REQUEST_BYTES as u64) as f64 / 1e9 / seconds.max(1e-9);
    Ok((gbps(read, read_s), gbps(written, write_s)))
}

/// How many were done within the longest time, and how long it took.
fn transfer(engine: &Arc<dyn BlockIo>, kind: IoKind, order: Vec<u64>) -> Result<(u64, f64)> {
    let (sender, receiver) = crossbeam_channel::bounded(DEPTH);
    let started = Instant::now();
    let mut buffers: Vec<IoBuffer> = (0..DEPTH).map(|_| IoBuffer::Pages(noise())).collect();
    let (mut running, mut done) = (0, 0);
    let mut left = order.into_iter();
    loop {
        while started.elapsed() < MEASURE_MAX && !buffers.is_empty() {
            let (Some(place), Some(buffer)) = (left.next(), buffers.pop()) else { break };
            let sender = sender.clone();
            let ended = Box::new(move |end: pegaflow_tiers::IoCompletion| drop(sender.try_send(end)));
            submit(engine, kind, place * REQUEST_BYTES as u64, Some(buffer), ended)?;
            running += 1;
        }
        if running == 0 {
            return Ok((done, started.elapsed().as_secs_f64()));
        }
        let end = receiver.recv_timeout(PATIENCE).map_err(|_| slow())?;
        end.result?;
        buffers.extend(end.buffer);
        (running, done) = (running - 1, done + 1);
    }
}

fn submit(
    engine: &Arc<dyn BlockIo>,
    kind: IoKind,
    offset: u64,
    buffer: Option<IoBuffer>,
    done: pegaflow_tiers::IoDone,
) -> Result<()> {
    let request = IoRequest { file: FileId(0), kind, offset, buffer, priority: IoPriority::Demand, done };
    engine.submit(request).map_err(|(_, error)| error)
}

fn slow() -> Error {
    Error::new(ErrorKind::Timeout, format!("the drive did not answer within {PATIENCE:?}"))
}

/// Bytes that a drive can not shrink.
fn noise() -> Pages {
    let mut pages = Pages::new(REQUEST_BYTES);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for word in pages.as_mut_slice().chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    pages
}
