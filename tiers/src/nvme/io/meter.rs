//! How fast each file is read and written at its best, learned from the requests that pass by: a wrapper around an engine.
//! Only the time counts in which somebody waits for the drive. What a drive does with a request or two is not its best, so
//! a lower value replaces a higher one only where enough waited, and slowly.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{BlockIo, FileId, IoBuffer, IoCompletion, IoKind, IoRequest, ReadDepth};
use crate::error::{Error, Result};
use crate::latency::{Latencies, LatencyHistogram};

/// What a value is learned from: so much time in which something waited, and so many requests.
const WINDOW: Duration = Duration::from_millis(100);
const WINDOW_REQUESTS: u32 = 32;
/// A value falls by this part of its distance to a lower one.
const DECAY: u64 = 8;
/// How many bytes have to wait on average for a value that is believed though it is low, while nothing else is known.
const DEEP_BYTES: u64 = 8 << 20;

/// The share of a ceiling that is in use is that of this time, up to twice of it.
const RECENT: Duration = Duration::from_secs(10);

/// What is known of all files of an engine.
pub(crate) struct Meters {
    files: Vec<Meter>,
    reads: LatencyHistogram,
    writes: LatencyHistogram,
    syncs: LatencyHistogram,
}

struct Meter {
    tracks: Mutex<Tracks>,
    read: Best,
    write: Best,
}

/// The best rate, in bytes per second; 0 while not known.
struct Best {
    bytes_per_second: AtomicU64,
    /// So many bytes have to wait for a lower value to count.
    deep_bytes: AtomicU64,
}

impl Best {
    fn new() -> Self {
        Self { bytes_per_second: AtomicU64::new(0), deep_bytes: AtomicU64::new(DEEP_BYTES) }
    }

    fn get(&self) -> u64 {
        self.bytes_per_second.load(Ordering::Relaxed)
    }

    fn set(&self, bytes_per_second: u64) {
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Takes in what a window shows.
    fn note(&self, window: &Window) {
        let (rate, best) = (window.rate(), self.get());
        let is_deep = !window.is_mixed && window.mean_waiting() >= self.deep_bytes.load(Ordering::Relaxed);
        if (best > 0 && rate > best) || (best == 0 && is_deep) {
            self.set(rate);
        } else if is_deep {
            self.set(best - (best - rate) / DECAY);
        }
    }
}

/// What waits for one drive, and the windows in which that is measured.
#[derive(Default)]
struct Tracks {
    seen: Option<Instant>,
    reads: Track,
    writes: Track,
}

#[derive(Default)]
struct Track {
    requests: u32,
    bytes: u64,
    window: Window,
    ended: DirectionUse,
    recent: Recent,
}

/// What has gone in one direction since the start, and what is on its way.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DirectionUse {
    /// Requests that ended well; syncs are writes.
    pub(crate) requests: u64,
    /// Bytes of these.
    pub(crate) bytes: u64,
    /// Requests that failed or were refused.
    pub(crate) failed: u64,
    /// Time in which something waited, in nanoseconds.
    pub(crate) busy_ns: u64,
    /// Requests that wait or are in flight.
    pub(crate) waiting: u64,
    /// Bytes of these.
    pub(crate) waiting_bytes: u64,
    /// Bytes per second in the last 10 to 20 seconds.
    pub(crate) recent_bytes_per_second: u64,
}

/// Two moments in the past and the bytes until then; the older one is at least [`RECENT`] ago.
#[derive(Debug, Clone, Copy, Default)]
struct Recent {
    older: Option<(Instant, u64)>,
    newer: Option<(Instant, u64)>,
}

impl Recent {
    fn advance(&mut self, now: Instant, bytes: u64) {
        match self.newer {
            Some((then, _)) if now.saturating_duration_since(then) < RECENT => {}
            newer => (self.older, self.newer) = (newer.or(Some((now, bytes))), Some((now, bytes))),
        }
    }

    fn rate(&self, now: Instant, bytes: u64) -> u64 {
        let Some((then, before)) = self.older else { return 0 };
        let ns = now.saturating_duration_since(then).as_nanos().max(1);
        u64::try_from(u128::from(bytes.saturating_sub(before)) * 1_000_000_000 / ns).unwrap_or(u64::MAX)
    }
}

/// What happened while something waited.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    busy: Duration,
    done_bytes: u64,
    done_requests: u32,
    /// Bytes that waited, times nanoseconds.
    byte_ns: u128,
    /// Whether requests of the other direction waited too.
    is_mixed: bool,
}

impl Window {
    fn rate(&self) -> u64 {
        let ns = self.busy.as_nanos().max(1);
        u64::try_from(u128::from(self.done_bytes) * 1_000_000_000 / ns).unwrap_or(u64::MAX)
    }

    fn mean_waiting(&self) -> u64 {
        u64::try_from(self.byte_ns / self.busy.as_nanos().max(1)).unwrap_or(u64::MAX)
    }

    fn is_full(&self) -> bool {
        self.busy >= WINDOW && self.done_requests >= WINDOW_REQUESTS
    }
}

impl Tracks {
    /// Time has passed.
    fn advance(&mut self, now: Instant) {
        let passed = self.seen.map_or(Duration::ZERO, |seen| now.saturating_duration_since(seen));
        self.seen = Some(now);
        let is_mixed = self.reads.requests > 0 && self.writes.requests > 0;
        for track in [&mut self.reads, &mut self.writes] {
            track.recent.advance(now, track.ended.bytes);
            if track.requests > 0 {
                track.ended.busy_ns += u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
                track.window.busy += passed;
                track.window.byte_ns += passed.as_nanos() * u128::from(track.bytes);
                track.window.is_mixed |= is_mixed;
            }
        }
    }

    fn of(&mut self, kind: IoKind) -> &mut Track {
        match kind {
            IoKind::Read => &mut self.reads,
            // What was written is there when it is synced: waiting for that is part of writing.
            IoKind::Write | IoKind::Sync => &mut self.writes,
        }
    }
}

impl Meter {
    fn started(&self, kind: IoKind, bytes: u64, now: Instant) {
        let mut tracks = self.tracks.lock();
        tracks.advance(now);
        let track = tracks.of(kind);
        track.requests += 1;
        track.bytes += bytes;
    }

    fn ended(&self, kind: IoKind, bytes: u64, is_ok: bool, now: Instant) {
        let mut tracks = self.tracks.lock();
        tracks.advance(now);
        let track = tracks.of(kind);
        track.requests -= 1;
        track.bytes -= bytes;
        let (window, ended) = (&mut track.window, &mut track.ended);
        match is_ok {
            true => (ended.requests, ended.bytes) = (ended.requests + 1, ended.bytes + bytes),
            false => ended.failed += 1,
        }
        if is_ok {
            window.done_bytes += bytes;
            window.done_requests += 1;
        }
        if window.is_full() {
            match kind {
                IoKind::Read => self.read.note(window),
                IoKind::Write | IoKind::Sync => self.write.note(window),
            }
            *window = Window::default();
        }
    }

    /// Of reads and of writes.
    fn uses(&self, now: Instant) -> (DirectionUse, DirectionUse) {
        let mut tracks = self.tracks.lock();
        tracks.advance(now);
        let of = |track: &Track| DirectionUse {
            waiting: track.requests.into(),
            waiting_bytes: track.bytes,
            recent_bytes_per_second: track.recent.rate(now, track.ended.bytes),
            ..track.ended
        };
        (of(&tracks.reads), of(&tracks.writes))
    }
}

impl Meters {
    /// Of `files` files of which nothing is known.
    pub(crate) fn new(files: usize) -> Arc<Self> {
        let meter = |_| Meter { tracks: Mutex::default(), read: Best::new(), write: Best::new() };
        let histogram = LatencyHistogram::default;
        let files = (0..files).map(meter).collect();
        Arc::new(Self { files, reads: histogram(), writes: histogram(), syncs: histogram() })
    }

    /// How long reads, writes and syncs of all files took that ended well, from when they were asked for.
    pub(crate) fn latencies(&self) -> [Latencies; 3] {
        [self.reads.read(), self.writes.read(), self.syncs.read()]
    }

    /// How a file is used: reads, then writes.
    pub(crate) fn uses(&self, file: FileId) -> (DirectionUse, DirectionUse) {
        self.files.get(file.0 as usize).map(|meter| meter.uses(Instant::now())).unwrap_or_default()
    }

    fn latency(&self, kind: IoKind) -> &LatencyHistogram {
        match kind {
            IoKind::Read => &self.reads,
            IoKind::Write => &self.writes,
            IoKind::Sync => &self.syncs,
        }
    }

    /// Bytes per second that a file is read with at its best; 0 while not known.
    pub(crate) fn read(&self, file: FileId) -> u64 {
        self.files.get(file.0 as usize).map_or(0, |meter| meter.read.get())
    }

    /// Bytes per second that a file is written with at its best, syncs included; 0 while not known.
    pub(crate) fn write(&self, file: FileId) -> u64 {
        self.files.get(file.0 as usize).map_or(0, |meter| meter.write.get())
    }

    /// What is known of reads from elsewhere, and how many bytes have to be in flight for it.
    pub(crate) fn know_read(&self, file: FileId, bytes_per_second: u64, depth_bytes: u64) {
        if let Some(meter) = self.files.get(file.0 as usize) {
            meter.read.set(bytes_per_second);
            if depth_bytes > 0 {
                meter.read.deep_bytes.store(depth_bytes, Ordering::Relaxed);
            }
        }
    }

    /// What is known of writes from elsewhere.
    pub(crate) fn know_write(&self, file: FileId, bytes_per_second: u64) {
        if let Some(meter) = self.files.get(file.0 as usize) {
            meter.write.set(bytes_per_second);
        }
    }
}

/// See the module.
pub(crate) struct Metered {
    inner: Arc<dyn BlockIo>,
    meters: Arc<Meters>,
}

impl Metered {
    pub(crate) fn new(inner: Arc<dyn BlockIo>, meters: Arc<Meters>) -> Self {
        Self { inner, meters }
    }
}

impl BlockIo for Metered {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn submit(&self, mut request: IoRequest) -> Result<(), (IoRequest, Error)> {
        let (file, kind) = (request.file.0 as usize, request.kind);
        let Some(meter) = self.meters.files.get(file) else { return self.inner.submit(request) };
        let bytes = request.buffer.as_ref().map_or(0, |buffer| IoBuffer::bytes(buffer) as u64);
        let begun = Instant::now();
        meter.started(kind, bytes, begun);
        let done = std::mem::replace(&mut request.done, Box::new(drop));
        // A request that is refused comes back with its own callback.
        let done = Arc::new(Mutex::new(Some(done)));
        request.done = Box::new({
            let (done, meters) = (Arc::clone(&done), Arc::clone(&self.meters));
            move |completion: IoCompletion| {
                let (now, is_ok) = (Instant::now(), completion.result.is_ok());
                if let Some(meter) = meters.files.get(file) {
                    meter.ended(kind, bytes, is_ok, now);
                }
                if is_ok {
                    meters.latency(kind).record(now.saturating_duration_since(begun));
                }
                if let Some(done) = { done.lock().take() } {
                    done(completion);
                }
            }
        });
        self.inner.submit(request).map_err(|(mut request, error)| {
            meter.ended(kind, bytes, false, Instant::now());
            if let Some(done) = done.lock().take() {
                request.done = done;
            }
            (request, error)
        })
    }

    fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        self.inner.set_read_depth(file, depth);
    }

    fn close(&self) {
        self.inner.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A meter, and a clock that is moved by hand.
    struct Rig {
        meters: Arc<Meters>,
        now: Instant,
    }

    impl Rig {
        fn new() -> Self {
            Self { meters: Meters::new(1), now: Instant::now() }
        }

        /// `count` requests of 1 MiB of which always `waiting` wait; one ends every `ms` milliseconds.
        fn run(&mut self, kind: IoKind, waiting: u64, count: u64, ms: u64) {
            let meter = &self.meters.files[0];
            (0..waiting).for_each(|_| meter.started(kind, MIB, self.now));
            for _ in 0..count {
                self.now += Duration::from_millis(ms);
                meter.ended(kind, MIB, true, self.now);
                meter.started(kind, MIB, self.now);
            }
            (0..waiting).for_each(|_| meter.ended(kind, MIB, false, self.now));
        }

        fn read(&self) -> u64 {
            self.meters.read(FileId(0)) / MIB
        }
    }

    #[test]
    fn the_rate_is_that_of_the_time_in_which_something_waited() {
        let mut rig = Rig::new();
        for _ in 0..5 {
            rig.run(IoKind::Read, 16, 50, 2);
            rig.now += Duration::from_secs(60);
        }
        assert_eq!((rig.read(), rig.meters.write(FileId(0))), (500, 0));
        rig.run(IoKind::Write, 16, 100, 4);
        assert_eq!((rig.read(), rig.meters.write(FileId(0)) / MIB), (500, 250));
    }

    #[test]
    fn what_was_moved_is_counted_and_what_was_moved_lately() {
        let mut rig = Rig::new();
        rig.run(IoKind::Read, 2, 1000, 20);
        let uses = |rig: &Rig| rig.meters.files[0].uses(rig.now);
        let (read, write) = uses(&rig);
        assert_eq!((read.requests, read.bytes, read.failed), (1000, 1000 * MIB, 2));
        assert_eq!((read.waiting, read.waiting_bytes, write.requests), (0, 0, 0));
        assert_eq!((read.busy_ns, read.recent_bytes_per_second / MIB), (20_000_000_000, 50));
        rig.now += Duration::from_secs(15);
        assert!(uses(&rig).0.recent_bytes_per_second / MIB <= 30, "the end of the work and a pause");
        rig.now += Duration::from_secs(15);
        assert_eq!(uses(&rig).0.recent_bytes_per_second, 0, "a pause only");
        rig.meters.files[0].started(IoKind::Write, MIB, rig.now);
        assert_eq!((uses(&rig).1.waiting, uses(&rig).1.waiting_bytes), (1, MIB));
    }

    #[test]
    fn a_few_requests_say_nothing_but_that_a_drive_is_faster() {
        let mut rig = Rig::new();
        rig.run(IoKind::Read, 1, 1000, 1);
        assert_eq!(rig.read(), 0, "one at a time is not what a drive can do");
        rig.run(IoKind::Read, 16, 100, 5);
        assert_eq!(rig.read(), 200);
        rig.run(IoKind::Read, 1, 1000, 20);
        assert_eq!(rig.read(), 200, "nor does it show that it is slow");
        rig.run(IoKind::Read, 1, 1000, 2);
        assert_eq!(rig.read(), 500, "but it shows what it does");
    }

    #[test]
    fn a_drive_that_has_become_slower_is_believed_after_a_while() {
        let mut rig = Rig::new();
        rig.meters.know_read(FileId(0), 1000 * MIB, 4 * MIB);
        rig.run(IoKind::Read, 8, 100, 10);
        assert!((600..1000).contains(&rig.read()), "{} after a second", rig.read());
        rig.run(IoKind::Read, 8, 2000, 10);
        assert!((100..110).contains(&rig.read()), "{} after twenty", rig.read());
    }

    #[test]
    fn reads_beside_writes_do_not_make_a_drive_slower() {
        let mut rig = Rig::new();
        rig.meters.know_read(FileId(0), 1000 * MIB, MIB);
        rig.meters.files[0].started(IoKind::Sync, 0, rig.now);
        rig.run(IoKind::Read, 8, 1000, 10);
        assert_eq!(rig.read(), 1000);
    }
}
