//! Reads a whole store once and checks every record: a long sequential job beside the data plane. It runs on a thread of
//! its own, on tokio-uring where that works, with blocking reads where it does not: tokio-uring panics where the kernel
//! interrupts or refuses it, and such a panic ends only that attempt.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Sender, bounded};

use super::io::open_direct;
use super::page::{PAGE_BYTES, get_u32, get_u64, put};
use super::read::{check, is_drive_gone};
use super::shared::Shared;
use super::stats::add;
use crate::block::RecordId;
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexLog, Location};

/// Records whose places are held in memory at once; a larger store is gone through in several passes.
const RECORDS_AT_ONCE: u64 = 1 << 20;
/// The same for a scrub, which may hold them for hours.
const SCRUB_RECORDS_AT_ONCE: u64 = 1 << 16;
/// Bytes read at once, unless one record is larger.
const READ_BYTES: u64 = 4 << 20;
/// The same for a scrub: a reader who comes meanwhile waits for one of these at most.
const SCRUB_READ_BYTES: u64 = 1 << 20;
/// The name in the index under which stands where a scrub is (region, u32) and when the last one ended (ms since 1970, u64).
const SCRUB_NAME: &str = "scrub";
/// How often that is written at most.
const SCRUB_NOTE_INTERVAL: Duration = Duration::from_secs(60);
/// How many progress reports may wait for whoever listens.
const PROGRESS_MAX: usize = 16;

/// What a verification found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Records that were read and checked.
    pub records: u64,
    /// Bytes of these, headers and padding included.
    pub bytes: u64,
    /// Records that failed; they are out of the index now.
    pub corrupt: u64,
    /// Whether it was stopped before it had seen everything.
    pub is_stopped: bool,
    /// What read: `tokio_uring` or `blocking`.
    pub engine: &'static str,
}

/// How far a verification has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyProgress {
    /// Records that were checked.
    pub records: u64,
    /// Records there were when it began.
    pub records_total: u64,
}

/// A piece that a scrub has read, and how far it has come with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubStep {
    /// Bytes of the piece.
    pub bytes: u64,
    /// The region in which it lies; those before it are done.
    pub region: u32,
    /// Regions of the store.
    pub regions_total: u32,
    /// Records that this call has checked.
    pub records: u64,
    /// Records of the store now.
    pub records_total: u64,
    /// Of those that were checked, damaged ones.
    pub corrupt: u64,
}

/// Called by a scrub after each piece: returns when the next one may be read, or false to stop.
pub type ScrubPace = Arc<dyn Fn(&ScrubStep) -> bool + Send + Sync>;

/// Where a scrub begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubFrom {
    /// At the region in which the last one was stopped, also before a restart; where it comes to is noted.
    WhereItWas,
    /// At the first region; where another one was stopped stays noted until this one has seen everything.
    Start,
}

/// Reads the region files in large pieces.
trait Reader {
    /// Fills `bytes` from `offset` of a drive's file; both multiples of a page.
    fn read(&mut self, drive: usize, offset: u64, bytes: usize) -> io::Result<&[u8]>;
}

/// One way of reading everything.
type Attempt = fn(&Job) -> Result<VerifyReport>;

/// What one attempt works on.
struct Job {
    shared: Arc<Shared>,
    index: Arc<IndexLog>,
    /// The regions, by drive.
    files: Vec<File>,
    progress: Sender<VerifyProgress>,
    /// For a scrub: where it begins, and how fast it is.
    scrub: Option<(ScrubFrom, ScrubPace)>,
}

/// Verifies; see [`super::store::Store::verify`].
pub(super) fn verify(
    shared: &Arc<Shared>,
    index: &Arc<IndexLog>,
    paths: &[PathBuf],
    scrub: Option<(ScrubFrom, &ScrubPace)>,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport> {
    // What is not in the table could not be taken out of it.
    shared.fill.wait();
    let attempts: [Option<Attempt>; 2] = [on_tokio_uring(), Some(on_blocking_reads)];
    let mut last = Error::new(ErrorKind::Io, "the verification did not end");
    for attempt in attempts.into_iter().flatten() {
        let (sender, receiver) = bounded(PROGRESS_MAX);
        let files = paths.iter().map(|path| open_direct(path).map(|(file, ..)| file)).collect::<Result<_>>()?;
        let (shared, index) = (Arc::clone(shared), Arc::clone(index));
        let scrub = scrub.map(|(from, pace)| (from, Arc::clone(pace)));
        let job = Job { shared, index, files, progress: sender, scrub };
        let started = std::thread::Builder::new().name("pega-verify-store".into()).spawn(move || attempt(&job));
        let thread = started.map_err(|source| Error::from_io("starting the verification", source))?;
        receiver.iter().for_each(&mut *progress);
        match thread.join() {
            Ok(Err(error)) if error.kind() == ErrorKind::Unsupported => last = error,
            Ok(result) => return result,
            Err(_) => tracing::warn!("the verification's engine panicked; it starts over with blocking reads"),
        }
    }
    Err(last)
}

/// Goes on with a scrub, or begins one; see [`super::store::Store::scrub`].
pub(super) fn scrub(
    shared: &Arc<Shared>,
    index: &Arc<IndexLog>,
    paths: &[PathBuf],
    from: ScrubFrom,
    pace: &ScrubPace,
) -> Result<VerifyReport> {
    let report = verify(shared, index, paths, Some((from, pace)), &mut drop)?;
    if !report.is_stopped {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        note_scrub(index, 0, now)?;
        add(&shared.counts.scrub_passes, 1);
        shared.counts.scrub_last_pass_unix_ms.store(now, Ordering::Relaxed);
    }
    Ok(report)
}

/// The region where a scrub goes on, and when the last one ended, in ms since 1970; 0 for never.
pub(super) fn scrub_state(index: &IndexLog) -> Result<(u32, u64)> {
    let value = index.meta_get(SCRUB_NAME)?.filter(|value| value.len() == 12);
    Ok(value.map_or((0, 0), |value| (get_u32(&value, 0), get_u64(&value, 4))))
}

fn note_scrub(index: &IndexLog, region: u32, last_pass_unix_ms: u64) -> Result<()> {
    let mut value = [0; 12];
    put(&mut value, 0, &region.to_le_bytes());
    put(&mut value, 4, &last_pass_unix_ms.to_le_bytes());
    index.meta_put(SCRUB_NAME, &value)
}

fn on_blocking_reads(job: &Job) -> Result<VerifyReport> {
    struct Blocking<'a>(&'a [File], Aligned);
    impl Reader for Blocking<'_> {
        fn read(&mut self, drive: usize, offset: u64, bytes: usize) -> io::Result<&[u8]> {
            let buffer = self.1.first(bytes);
            self.0.get(drive).ok_or(io::ErrorKind::NotFound)?.read_exact_at(buffer, offset)?;
            Ok(buffer)
        }
    }
    job.run("blocking", &mut Blocking(&job.files, Aligned::default()))
}

#[cfg(not(feature = "tokio-uring"))]
fn on_tokio_uring() -> Option<Attempt> {
    None
}

#[cfg(feature = "tokio-uring")]
fn on_tokio_uring() -> Option<Attempt> {
    use tokio_uring::buf::BoundedBuf;

    struct Ring {
        runtime: tokio_uring::Runtime,
        files: Vec<tokio_uring::fs::File>,
        buffer: Aligned,
    }
    impl Reader for Ring {
        fn read(&mut self, drive: usize, offset: u64, bytes: usize) -> io::Result<&[u8]> {
            let file = self.files.get(drive).ok_or(io::ErrorKind::NotFound)?;
            let start = self.buffer.start(bytes);
            let mut done = 0;
            while done < bytes {
                let piece = std::mem::take(&mut self.buffer.bytes).slice(start + done..start + bytes);
                let (read, piece) = self.runtime.block_on(file.read_at(piece, offset + done as u64));
                self.buffer.bytes = piece.into_inner();
                match read {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(read) => done += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(&self.buffer.bytes[start..start + bytes])
        }
    }
    fn run(job: &Job) -> Result<VerifyReport> {
        let unsupported =
            |error: io::Error| Error::new(ErrorKind::Unsupported, format!("no ring for the verification: {error}"));
        let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).map_err(unsupported)?;
        let files: io::Result<Vec<File>> = job.files.iter().map(File::try_clone).collect();
        let files = files.map_err(unsupported)?;
        // Inside the runtime, where the files register with its driver.
        let files = runtime.block_on(async { files.into_iter().map(tokio_uring::fs::File::from_std).collect() });
        job.run("tokio_uring", &mut Ring { runtime, files, buffer: Aligned::default() })
    }
    Some(run)
}

impl Job {
    fn run(&self, engine: &'static str, reader: &mut dyn Reader) -> Result<VerifyReport> {
        let total = self.shared.table.len() as u64;
        let mut report = VerifyReport { engine, ..VerifyReport::default() };
        let regions = self.shared.regions.count();
        let at_once = if self.scrub.is_some() { SCRUB_RECORDS_AT_ONCE } else { RECORDS_AT_ONCE };
        let step = (u64::from(regions) / (total / at_once + 1)).max(1) as u32;
        let is_resumed = matches!(self.scrub, Some((ScrubFrom::WhereItWas, _)));
        let mut next = if is_resumed { scrub_state(&self.index)?.0 } else { 0 };
        next = if next < regions { next } else { 0 };
        let mut noted = Instant::now();
        while next < regions {
            let end = next.saturating_add(step).min(regions);
            let mut places = self.places(|region| (next..end).contains(&region))?;
            places.sort_unstable_by_key(|(location, _)| (location.region, location.page));
            next = end;
            for of_one_region in places.chunk_by(|(a, _), (b, _)| a.region == b.region) {
                if !self.check_region(reader, of_one_region, &mut report) {
                    report.is_stopped = true;
                    return Ok(report);
                }
                if let Some((location, _)) = of_one_region.first()
                    && is_resumed
                    && noted.elapsed() >= SCRUB_NOTE_INTERVAL
                {
                    noted = Instant::now();
                    note_scrub(&self.index, location.region + 1, scrub_state(&self.index)?.1)?;
                }
                let progress = VerifyProgress { records: report.records, records_total: total };
                // Whoever listens slowly misses some.
                let _ = self.progress.try_send(progress);
            }
        }
        Ok(report)
    }

    /// Where the records of some regions lie, as the durable index says and lookups find.
    fn places(&self, is_wanted: impl Fn(u32) -> bool) -> Result<Vec<(Location, RecordId)>> {
        let mut places = Vec::new();
        self.index.scan(&mut |row| {
            let is_live = self.shared.namespaces.is_live(row.id.namespace);
            if is_live && is_wanted(row.location.region) && self.shared.locate(&row.id) == Some(row.location) {
                places.push((row.location, row.id));
            }
            Ok(())
        })?;
        Ok(places)
    }

    /// Checks the records of a region, given in the order of their pages; nothing if it was reclaimed meanwhile. Whether to
    /// go on.
    fn check_region(
        &self,
        reader: &mut dyn Reader,
        places: &[(Location, RecordId)],
        report: &mut VerifyReport,
    ) -> bool {
        let piece_bytes = if self.scrub.is_some() { SCRUB_READ_BYTES } else { READ_BYTES };
        let Some((first, _)) = places.first() else { return true };
        let mut rest = places;
        while let Some((start, _)) = rest.first() {
            let end_of = |location: &Location| location.page + location.pages;
            let bytes_to = |location: &Location| u64::from(end_of(location) - start.page) * PAGE_BYTES as u64;
            let fits = |location: &Location| bytes_to(location) <= piece_bytes;
            let count = rest.iter().take_while(|(location, _)| fits(location)).count().max(1);
            let (now, later) = rest.split_at(count);
            rest = later;
            let pages = now.last().map_or(0, |(last, _)| end_of(last) - start.page);
            // Pinned piece by piece: a scrub takes its time, and the region may be wanted.
            let Ok(pins) = self.shared.regions.pin(&[*first]) else { return true };
            self.check_piece(reader, *start, pages, now, report);
            drop(pins);
            if let Some((_, pace)) = &self.scrub {
                let bytes = u64::from(pages) * PAGE_BYTES as u64;
                add(&self.shared.counts.scrubbed_bytes, bytes);
                let step = ScrubStep {
                    bytes,
                    region: first.region,
                    regions_total: self.shared.regions.count(),
                    records: report.records,
                    records_total: self.shared.table.len() as u64,
                    corrupt: report.corrupt,
                };
                if !pace(&step) {
                    return false;
                }
            }
        }
        true
    }

    fn check_piece(
        &self,
        reader: &mut dyn Reader,
        start: Location,
        pages: u32,
        places: &[(Location, RecordId)],
        report: &mut VerifyReport,
    ) {
        if let Ok(bytes) = self.read(reader, &start, pages as usize * PAGE_BYTES) {
            for (location, id) in places {
                let at = (location.page - start.page) as usize * PAGE_BYTES;
                self.check_record(id, location, bytes.get(at..at + location.bytes() as usize), report);
            }
            return;
        }
        // What can not be read at once may be readable one by one.
        for (location, id) in places {
            match self.read(reader, location, location.bytes() as usize) {
                Ok(bytes) => self.check_record(id, location, Some(bytes), report),
                Err(source) => {
                    let error = Error::from_io("reading a record", source);
                    // Of a drive that is gone no record is to blame.
                    if !is_drive_gone(&self.shared, location, &error) {
                        self.check_record(id, location, None, report);
                    }
                }
            }
        }
    }

    fn read<'a>(&self, reader: &'a mut dyn Reader, from: &Location, bytes: usize) -> io::Result<&'a [u8]> {
        let place = self.shared.drive.place(from.region).ok_or(io::ErrorKind::NotFound)?;
        reader.read(place.drive, self.shared.drive.locate(from.region, from.page).1, bytes)
    }

    fn check_record(&self, id: &RecordId, location: &Location, bytes: Option<&[u8]>, report: &mut VerifyReport) {
        let checked = bytes.and_then(|bytes| {
            let (header, payload) = bytes.split_at_checked(PAGE_BYTES)?;
            // Purged meanwhile: it is no longer there, and nothing is wrong with it.
            let Some(identity) = self.shared.namespaces.identity(id) else { return Some(()) };
            match check(&self.shared, &identity, location, header, payload) {
                // Its key was destroyed: nothing is wrong with it, and nobody can read it.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.shared.forget_at(id, location);
                    self.shared.inbox.push_bad_record(*id, *location);
                    Some(())
                }
                checked => checked.ok().map(drop),
            }
        });
        report.records += 1;
        report.bytes += location.bytes();
        if checked.is_none() && self.shared.forget_at(id, location) {
            report.corrupt += 1;
            add(&self.shared.counts.bad_reads, 1);
            add(&self.shared.counts.scrub_bad_records, u64::from(self.scrub.is_some()));
            tracing::warn!(?id, ?location, "a record is damaged; it is quarantined");
            self.shared.inbox.push_bad_record(*id, *location);
        }
    }
}

/// Bytes of which a part starts at a multiple of a page in memory, as direct I/O wants it.
#[derive(Default)]
pub(super) struct Aligned {
    bytes: Vec<u8>,
}

impl Aligned {
    /// Where the aligned part begins; it has room for `bytes`.
    fn start(&mut self, bytes: usize) -> usize {
        if self.bytes.len() < bytes + PAGE_BYTES {
            self.bytes = vec![0; bytes + PAGE_BYTES];
        }
        self.bytes.as_ptr().align_offset(PAGE_BYTES)
    }

    /// So many of them.
    pub(super) fn first(&mut self, bytes: usize) -> &mut [u8] {
        let start = self.start(bytes);
        &mut self.bytes[start..start + bytes]
    }
}
