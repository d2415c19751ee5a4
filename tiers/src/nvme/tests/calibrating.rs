//! How fast the drives are: measured only over what was written, within bounds, giving way to everybody, kept for the next
//! open and believed only there.

use std::fs::File;

use parking_lot::Mutex;

use super::super::backing::{Backing, SmallFile, System};
use super::super::calibration::CalibrationPlan;
use super::super::fill::FillPlan;
use super::*;
use crate::index::IndexLog;

const DAY: Duration = Duration::from_secs(24 * 3600);
const REQUEST_BYTES: usize = 64 << 10;

/// The system's own, with a plan that small stores are enough for.
struct Calibrating(CalibrationPlan);

impl Backing for Calibrating {
    fn engine(&self, config: &StoreConfig, files: &[File], arena: &Arc<Arena>) -> Result<Arc<dyn BlockIo>> {
        System.engine(config, files, arena)
    }

    fn index(&self, path: &Path) -> Result<IndexLog> {
        System.index(path)
    }

    fn small_file(&self, path: &Path) -> Result<Box<dyn SmallFile>> {
        System.small_file(path)
    }

    fn calibration(&self) -> Option<CalibrationPlan> {
        Some(self.0.clone())
    }
}

/// Measures whatever has a few pieces, for as long as it takes.
fn plan() -> CalibrationPlan {
    CalibrationPlan {
        written_bytes_min: 8 * REQUEST_BYTES as u64,
        time_max: DAY,
        request_bytes: REQUEST_BYTES,
        window: Duration::ZERO,
        window_requests: 16,
        attempts: 1,
        ..CalibrationPlan::default()
    }
}

/// Never ends by itself.
fn endless() -> CalibrationPlan {
    CalibrationPlan { window: DAY, window_max: DAY, bytes_max: u64::MAX, ..plan() }
}

/// The offsets of the reads that were made to measure, and how reads are to be made, by file.
#[derive(Clone, Default)]
struct Reads(Arc<Mutex<Vec<u64>>>, Arc<Mutex<Vec<(FileId, ReadDepth)>>>);

/// An engine that notes them.
struct Watched(Arc<dyn BlockIo>, Reads);

impl BlockIo for Watched {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn depth(&self) -> usize {
        self.0.depth()
    }

    fn submit(&self, request: IoRequest) -> std::result::Result<(), (IoRequest, crate::error::Error)> {
        if request.kind == IoKind::Read && request.priority == IoPriority::Prefetch {
            self.1.0.lock().push(request.offset);
        }
        self.0.submit(request)
    }

    fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        self.1.1.lock().push((file, depth));
        self.0.set_read_depth(file, depth);
    }

    fn close(&self) {
        self.0.close();
    }
}

impl Reads {
    /// The depths that the engine was given.
    fn depths(&self) -> Vec<(FileId, ReadDepth)> {
        self.1.lock().clone()
    }

    fn count(&self) -> usize {
        self.0.lock().len()
    }
}

fn open(place: &Place, plan: CalibrationPlan) -> (Arc<Store>, Reads) {
    let reads = Reads::default();
    let (config, policy) = (place.config.clone(), Arc::clone(&place.policy));
    let wrap = |io| -> Arc<dyn BlockIo> { Arc::new(Watched(io, reads.clone())) };
    let opened = Store::open_on(&Calibrating(plan), config, &place.arena, policy, wrap, FillPlan::default());
    (opened.expect("the store opens").0, reads)
}

/// A store with enough written in it.
fn written(io: IoChoice) -> Place {
    let place = Place::new(io, 32);
    let (store, _) = place.open();
    (0..4).for_each(|turn| put(&place, &store, (turn * 16..turn * 16 + 16).map(|name| (name, 1, 60_000))));
    close(store);
    assert!(!cache(&place).exists(), "nothing is known of a store that did nothing");
    place
}

fn cache(place: &Place) -> PathBuf {
    place.config.path.join("calibration.json")
}

fn measured(place: &Place, plan: CalibrationPlan) -> Vec<DriveSpeed> {
    let (store, _) = open(place, plan);
    assert!(store.wait_calibrated(soon()), "measured");
    let speeds = store.drive_speeds();
    close(store);
    speeds
}

fn origins(speeds: &[DriveSpeed]) -> Vec<DepthOrigin> {
    speeds.iter().map(|speed| speed.depth_origin).collect()
}

fn a_drive_is_measured_once_and_known_at_the_next_open(io: IoChoice) {
    let place = written(io);
    let (store, reads) = open(&place, plan());
    assert!(store.wait_calibrated(soon()), "measured");
    let (first, depths) = (store.drive_speeds(), reads.depths());
    close(store);
    assert_eq!(depths.iter().map(|(file, _)| *file).collect::<Vec<_>>(), [FileId(1)], "the engine is told");
    assert_eq!(depths[0].1.request_bytes as u64, first[0].read_request_bytes);
    assert!(depths[0].1.depth_bytes as u64 > first[0].read_depth_bytes, "with room for requests that end in lumps");
    assert!(first.iter().all(|speed| speed.depth_origin == DepthOrigin::Measured), "{first:?}");
    for speed in &first {
        assert!(speed.read_bytes_per_second > 0, "{speed:?}");
        assert!((REQUEST_BYTES as u64..=32 * REQUEST_BYTES as u64).contains(&speed.read_depth_bytes), "{speed:?}");
    }
    let (store, reads) = open(&place, plan());
    assert!(store.wait_calibrated(soon()));
    let again = store.drive_speeds();
    assert_eq!((reads.count(), reads.depths()), (0, depths), "nothing is read for it");
    assert!(again.iter().zip(&first).all(|(again, first)| {
        again.depth_origin == DepthOrigin::Cached
            && (&again.path, again.read_depth_bytes, again.read_request_bytes)
                == (&first.path, first.read_depth_bytes, first.read_request_bytes)
    }));
    (0..64).for_each(|name| assert_object(&place, &store, name, 1, 60_000));
    close(store);
}

fn each_drive_is_measured_by_itself(io: IoChoice) {
    on_drives(2, || {
        let place = written(io);
        let speeds = measured(&place, plan());
        assert_eq!(origins(&speeds), [DepthOrigin::Measured; 2]);
        assert_ne!(speeds[0].path, speeds[1].path);
    });
}

fn what_is_kept_is_not_believed_of_something_else(io: IoChoice) {
    let mut place = written(io);
    assert_eq!(origins(&measured(&place, plan())), [DepthOrigin::Measured]);
    let text = std::fs::read_to_string(cache(&place)).expect("kept");
    // Damaged: a faster drive than it is.
    let damaged = text.replacen("\"read_depth_bytes\": ", "\"read_depth_bytes\": 9", 1);
    assert_ne!(damaged, text);
    for bad in [damaged.as_str(), "", "{}", "my notes", &text[..text.len() / 2]] {
        std::fs::write(cache(&place), bad).expect("written");
        assert_eq!(origins(&measured(&place, plan())), [DepthOrigin::Measured], "{bad}");
    }
    assert_eq!(origins(&measured(&place, plan())), [DepthOrigin::Cached]);
    place.config.queue_depth += 1;
    assert_eq!(origins(&measured(&place, plan())), [DepthOrigin::Measured], "other settings");
    let copied = place.copy();
    assert_eq!(origins(&measured(&copied, plan())), [DepthOrigin::Cached], "the same store on the same device");
    let other = written(io);
    std::fs::copy(cache(&place), cache(&other)).expect("copied");
    assert_eq!(origins(&measured(&other, plan())), [DepthOrigin::Measured], "another store");
    let old = CalibrationPlan { age_max: Duration::ZERO, ..plan() };
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(origins(&measured(&place, old)), [DepthOrigin::Measured], "too old");
}

fn what_was_not_written_is_not_measured(io: IoChoice) {
    let place = Place::new(io, 32);
    let (store, reads) = open(&place, plan());
    assert!(store.wait_calibrated(soon()));
    assert_eq!((origins(&store.drive_speeds()), reads.count()), (vec![DepthOrigin::Default], 0), "an empty store");
    assert_eq!(store.drive_speeds()[0].read_bytes_per_second, 0);
    put(&place, &store, (0..64).map(|name| (name, 1, 60_000)));
    close(store);
    // The index says that it was written, the file system that it was not.
    let regions = std::fs::OpenOptions::new().write(true).open(place.config.path.join("regions.0")).expect("there");
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    for region in 0..32 {
        rustix::fs::fallocate(&regions, flags, region * REGION_BYTES + 8192, REGION_BYTES - 8192).expect("punched");
    }
    let (store, reads) = open(&place, plan());
    assert!(store.stats().live_bytes > 0 && store.wait_calibrated(soon()));
    assert_eq!((origins(&store.drive_speeds()), reads.count()), (vec![DepthOrigin::Default], 0));
    close(store);
}

fn a_measurement_is_bounded(io: IoChoice) {
    let place = written(io);
    let pieces = 100;
    let few = CalibrationPlan { bytes_max: pieces * REQUEST_BYTES as u64, ..endless() };
    let (store, reads) = open(&place, few);
    assert!(store.wait_calibrated(soon()), "it ends when it has read enough");
    assert!((1..=pieces as usize).contains(&reads.count()), "{} reads", reads.count());
    assert_eq!(origins(&store.drive_speeds()), [DepthOrigin::Default]);
    close(store);
    let short = CalibrationPlan { time_max: Duration::from_millis(1), ..endless() };
    let (store, reads) = open(&place, short);
    assert!(store.wait_calibrated(soon()), "it ends when its time is up");
    assert!(reads.0.lock().iter().all(|offset| offset % 4096 == 0));
    close(store);
}

/// Waits until the store is being measured.
fn wait_for_reads(reads: &Reads) {
    let deadline = soon();
    while reads.count() < 100 {
        assert!(Instant::now() < deadline, "nothing is measured");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn a_measurement_gives_way(io: IoChoice) {
    let place = written(io);
    for what in ["a read", "a write", "a close", "a drop"] {
        let (store, reads) = open(&place, endless());
        wait_for_reads(&reads);
        match what {
            "a read" => assert_object(&place, &store, 7, 1, 60_000),
            "a write" => put(&place, &store, [(7, 1, 60_000)]),
            "a close" => {
                close(store);
                continue;
            }
            _ => {
                drop(store);
                continue;
            }
        }
        assert!(store.wait_calibrated(soon()), "{what} ends it");
        let count = reads.count();
        assert_object(&place, &store, 8, 1, 60_000);
        assert_eq!((origins(&store.drive_speeds()), reads.count()), (vec![DepthOrigin::Default], count));
        close(store);
    }
}

fn what_was_interrupted_is_measured_when_nobody_uses_the_store(io: IoChoice) {
    let place = written(io);
    let (window, pause) = (Duration::from_millis(30), Duration::from_millis(10));
    let (store, reads) = open(&place, CalibrationPlan { window, pause, attempts: 8, ..plan() });
    wait_for_reads(&reads);
    assert_object(&place, &store, 7, 1, 60_000);
    assert!(store.wait_calibrated(soon()));
    assert_eq!(origins(&store.drive_speeds()), [DepthOrigin::Measured]);
    close(store);
}

on_both_engines!(
    a_drive_is_measured_once_and_known_at_the_next_open,
    each_drive_is_measured_by_itself,
    what_is_kept_is_not_believed_of_something_else,
    what_was_not_written_is_not_measured,
    a_measurement_is_bounded,
    a_measurement_gives_way,
    what_was_interrupted_is_measured_when_nobody_uses_the_store,
);

/// What a store with 512 MiB in it finds out about this machine, five times. For people.
#[test]
#[ignore = "writes 512 MiB and prints"]
fn this_drive() {
    let mut place = Place::new(IoChoice::Auto, 16);
    place.arena = Arena::new(ArenaConfig::new(512 << 20)).expect("memory");
    let region_bytes = 64 << 20;
    place.config = StoreConfig { io: IoChoice::Auto, ..StoreConfig::new(place.store_path(), 1 << 30, region_bytes) };
    let (store, _) = place.open();
    (0..32).for_each(|turn| put(&place, &store, (turn * 8..turn * 8 + 8).map(|name| (name, 1, (2 << 20) - 4096))));
    println!("{:?}", store.drive_speeds());
    close(store);
    for _ in 0..5 {
        drop(std::fs::remove_file(cache(&place)));
        let opened = Instant::now();
        let (store, reads) = open(&place, CalibrationPlan::default());
        let open_ms = opened.elapsed().as_millis();
        assert!(store.wait_calibrated(soon()));
        println!("open {open_ms} ms, measured after {} ms, {} reads", opened.elapsed().as_millis(), reads.count());
        println!("{:?}", store.drive_speeds());
        close(store);
    }
}
