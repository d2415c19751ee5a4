//! How much of each drive's requests the kernel gets at once. Reads and writes are bounded apart: enough of each keeps
//! the drive busy, and more would only make the next demand read wait in a queue that knows no priorities.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::{FileId, IoKind, IoRequest, ReadDepth};
use super::in_flight::FileLoad;
use super::{Full, RingOptions};

/// Runs that are started whatever their bytes, so that the next one is there when one ends.
const RUNS_MIN: usize = 2;

/// See the module.
pub(super) struct Bounds {
    /// By file.
    reads: Vec<Reads>,
    write_bytes: usize,
    write_run_bytes: usize,
    /// Runs of a file in flight, and how many of these may be writes.
    runs: usize,
    write_runs: usize,
}

struct Reads {
    depth_bytes: AtomicUsize,
    run_bytes: AtomicUsize,
}

impl Bounds {
    /// Of `files` files, of which the first has the superblocks and each other one is a drive.
    pub(super) fn new(files: usize, options: RingOptions) -> Self {
        let runs = (options.depth / files.saturating_sub(1).max(1)).max(1);
        let run_bytes = options.run_bytes.min(options.piece_bytes);
        let reads =
            || Reads { depth_bytes: AtomicUsize::new(options.in_flight_bytes), run_bytes: AtomicUsize::new(run_bytes) };
        Self {
            reads: (0..files).map(|_| reads()).collect(),
            write_bytes: options.in_flight_bytes,
            write_run_bytes: run_bytes,
            runs,
            // Reads find room at once, however many writes there are.
            write_runs: (runs - runs / 4).max(1),
        }
    }

    /// Bounds the reads of a file from now on.
    pub(super) fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        let Some(reads) = self.reads.get(file.0 as usize) else { return };
        reads.depth_bytes.store(depth.depth_bytes, Ordering::Relaxed);
        reads.run_bytes.store(depth.request_bytes.min(self.write_run_bytes), Ordering::Relaxed);
    }

    /// Whether one more request of a file may be started.
    pub(super) fn has_room(&self, file: FileId, kind: IoKind, load: FileLoad) -> bool {
        let (of_kind, bytes_max) = match kind {
            IoKind::Read => (load.reads, self.read_depth_bytes(file)),
            IoKind::Write => (load.writes, self.write_bytes),
            IoKind::Sync => return true,
        };
        load.reads.runs + load.writes.runs < self.runs
            && (kind == IoKind::Read || load.writes.runs < self.write_runs)
            && (of_kind.bytes < bytes_max || of_kind.runs < RUNS_MIN)
    }

    /// What of a file has to wait for a completion, given whether requests of it wait already.
    pub(super) fn full(&self, file: FileId, load: FileLoad, has_waiting: bool) -> Full {
        let reads = !self.has_room(file, IoKind::Read, load);
        Full { reads, writes: has_waiting || !self.has_room(file, IoKind::Write, load) }
    }

    /// How long a run of neighbours may become that begins with this request.
    pub(super) fn run_bytes(&self, first: &IoRequest) -> usize {
        let of_file = self.reads.get(first.file.0 as usize).filter(|_| first.kind == IoKind::Read);
        of_file.map_or(self.write_run_bytes, |reads| reads.run_bytes.load(Ordering::Relaxed))
    }

    fn read_depth_bytes(&self, file: FileId) -> usize {
        self.reads.get(file.0 as usize).map_or(0, |reads| reads.depth_bytes.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::bounded;

    use super::super::super::tests::{arena, directory, is_denied};
    use super::super::super::{BlockIo, IoBuffer, IoCompletion, IoDone, IoPriority, Pages, open_direct};
    use super::super::in_flight::Load;
    use super::super::{Files, UringIo};
    use super::*;

    const MIB: usize = 1 << 20;
    const PATIENCE: Duration = Duration::from_secs(30);

    fn load(reads: (usize, usize), writes: (usize, usize)) -> FileLoad {
        let load = |(runs, bytes)| Load { runs, bytes };
        FileLoad { reads: load(reads), writes: load(writes) }
    }

    /// Room for reads and for writes of the first drive of two.
    fn room(bounds: &Bounds, load: FileLoad) -> (bool, bool) {
        let room = |kind| bounds.has_room(FileId(1), kind, load);
        assert!(room(IoKind::Sync));
        (room(IoKind::Read), room(IoKind::Write))
    }

    #[test]
    fn reads_and_writes_of_a_drive_are_bounded_apart() {
        let bounds = Bounds::new(3, RingOptions { in_flight_bytes: 8 * MIB, ..RingOptions::new(16) });
        assert_eq!(room(&bounds, load((0, 0), (0, 0))), (true, true));
        assert_eq!(room(&bounds, load((7, 8 * MIB - 1), (0, 0))), (true, true));
        assert_eq!(room(&bounds, load((4, 8 * MIB), (0, 0))), (false, true));
        assert_eq!(room(&bounds, load((0, 0), (4, 8 * MIB))), (true, false));
        assert_eq!(room(&bounds, load((0, 0), (6, 6 * 4096))), (true, false), "two of eight are left to reads");
        assert_eq!(room(&bounds, load((2, 8192), (6, 6 * 4096))), (false, false), "its share of the ring");
        assert_eq!(room(&bounds, load((1, 64 * MIB), (1, 64 * MIB))), (true, true), "the next one is there");
    }

    #[test]
    fn a_calibrated_drive_has_its_own_bound_for_reads() {
        let bounds = Bounds::new(3, RingOptions { in_flight_bytes: 8 * MIB, ..RingOptions::new(16) });
        bounds.set_read_depth(FileId(1), ReadDepth { depth_bytes: 2 * MIB, request_bytes: 256 << 10 });
        assert_eq!(room(&bounds, load((2, 2 * MIB), (0, 0))), (false, true));
        assert_eq!(room(&bounds, load((2, MIB), (2, 2 * MIB))), (true, true));
        assert!(bounds.has_room(FileId(2), IoKind::Read, load((2, 2 * MIB), (0, 0))), "the other drive has not");
        bounds.set_read_depth(FileId(9), ReadDepth { depth_bytes: 1, request_bytes: 1 });
    }

    /// The most bytes of reads that a ring has in flight of 48 that wait.
    fn most_in_flight(depth: Option<ReadDepth>) -> Option<usize> {
        let directory = directory();
        let path = directory.path().join("region");
        std::fs::write(&path, vec![7; 8 * MIB]).expect("a file");
        let (file, ..) = open_direct(&path).expect("opened");
        let arena = arena(1);
        let engine = match UringIo::open(Files::adopt(&[file]).expect("adopted"), &arena, RingOptions::new(64)) {
            Ok(engine) => engine,
            Err(error) if is_denied(&error) => {
                eprintln!("SKIPPED: this machine has no io_uring: {error}");
                return None;
            }
            Err(error) => panic!("no engine: {error:#}"),
        };
        depth.into_iter().for_each(|depth| engine.set_read_depth(FileId(0), depth));
        let (sender, receiver) = bounded(64);
        let (release, released) = bounded::<()>(0);
        let read = |megabyte: u64, done: IoDone| {
            let buffer = Some(IoBuffer::Pages(Pages::new(MIB)));
            let (offset, priority) = (megabyte * MIB as u64, IoPriority::Demand);
            let request = IoRequest { file: FileId(0), kind: IoKind::Read, offset, buffer, priority, done };
            assert!(engine.submit(request).is_ok());
        };
        // Holds up the ring until all others wait.
        read(
            0,
            Box::new(move |_| {
                let _ = released.recv_timeout(PATIENCE);
            }),
        );
        for number in 0..48 {
            let sender = sender.clone();
            let done = move |completion: IoCompletion| {
                let _ = sender.try_send(completion.result.is_ok());
            };
            read(number * 3 % 8, Box::new(done));
        }
        drop(release);
        assert!((0..48).all(|_| receiver.recv_timeout(PATIENCE).expect("a completion")));
        Some(engine.shared.reads_bytes_max.load(Ordering::Acquire))
    }

    #[test]
    fn a_ring_keeps_to_the_depth_it_was_given() {
        let depth = ReadDepth { depth_bytes: 4 * MIB, request_bytes: MIB };
        let Some(most) = most_in_flight(Some(depth)) else { return };
        assert_eq!(most, 4 * MIB);
        assert!(most_in_flight(None) > Some(4 * MIB), "it would have more");
    }

    #[test]
    fn a_ring_of_one_has_room_for_one() {
        let bounds = Bounds::new(1, RingOptions::new(1));
        let room = |load| [IoKind::Read, IoKind::Write].map(|kind| bounds.has_room(FileId(0), kind, load));
        assert_eq!(room(load((0, 0), (0, 0))), [true; 2]);
        assert_eq!(room(load((1, 4096), (0, 0))), [false; 2]);
    }
}
