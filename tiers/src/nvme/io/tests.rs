//! The conformance suite: every engine passes every case. `ring_*` are the ring with the arena registered as a whole,
//! in part and not at all; `*_pieces` cut transfers so small that each one has to be continued.

mod cases;
mod faults;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use tempfile::TempDir;

use super::files::Files;
use super::psync::PsyncIo;
use super::uring::{RingOptions, UringIo};
use super::*;
use crate::dram::{Arena, ArenaConfig};
use crate::error::ErrorKind;

/// How long a case waits for what must happen; a bound, not a measure.
const PATIENCE: Duration = Duration::from_secs(30);

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

macro_rules! conformance {
    ($($engine:ident: [$($case:ident),* $(,)?]),* $(,)?) => {$(
        mod $engine {
            $(#[test]
            fn $case() {
                super::cases::$case(&super::engines::$engine);
            })*
        }
    )*};
    ($($engine:ident),* => $cases:tt) => { conformance! { $($engine: $cases),* } };
}

conformance! {
    psync, psync_pieces, ring, ring_partly_registered, ring_unregistered, ring_pieces, faulty, metered => [
        bytes_come_back_at_every_offset_size_and_memory,
        ten_thousand_operations_pass_through_a_depth_of_four,
        many_threads_submit_at_once,
        what_was_written_is_read_after_a_sync,
        a_read_past_the_end_of_the_file_is_an_error,
        a_neighbour_past_the_end_fails_alone,
        requests_off_the_contract_come_back,
        a_full_queue_gives_the_request_back,
        higher_priorities_go_first_and_none_is_starved,
        after_close_requests_come_back,
        close_completes_everything_once,
        buffers_live_until_their_operation_has_ended,
        the_last_handle_may_be_dropped_in_a_completion,
        a_panic_in_a_completion_is_survived,
        an_idle_engine_uses_no_cpu,
    ]
}

type Engine = Arc<dyn BlockIo>;

/// Opens an engine, or says why the kernel has none.
type Open = dyn Fn(&File, &Arc<Arena>, usize) -> Result<Engine>;

mod engines {
    use super::*;

    pub(super) fn psync(file: &File, _: &Arc<Arena>, depth: usize) -> Result<Engine> {
        Ok(Arc::new(PsyncIo::open(Files::adopt(&[file])?, depth)?))
    }

    pub(super) fn psync_pieces(file: &File, _: &Arc<Arena>, depth: usize) -> Result<Engine> {
        Ok(Arc::new(PsyncIo::with_pieces(Files::adopt(&[file])?, depth, 2 * PAGE)?))
    }

    pub(super) fn faulty(file: &File, _: &Arc<Arena>, depth: usize) -> Result<Engine> {
        let inner = PsyncIo::open(Files::adopt(&[file])?, depth)?;
        Ok(Arc::new(Faulty::new(inner, FaultPlan::default())?))
    }

    pub(super) fn metered(file: &File, _: &Arc<Arena>, depth: usize) -> Result<Engine> {
        let inner = Arc::new(PsyncIo::open(Files::adopt(&[file])?, depth)?);
        Ok(Arc::new(Metered::new(inner, Meters::new(1))))
    }

    fn open_ring(file: &File, arena: &Arc<Arena>, options: RingOptions) -> Result<Engine> {
        Ok(Arc::new(UringIo::open(Files::adopt(&[file])?, arena, options)?))
    }

    pub(super) fn ring(file: &File, arena: &Arc<Arena>, depth: usize) -> Result<Engine> {
        open_ring(file, arena, RingOptions::new(depth))
    }

    pub(super) fn ring_partly_registered(file: &File, arena: &Arc<Arena>, depth: usize) -> Result<Engine> {
        open_ring(file, arena, RingOptions { buffer_bytes: MIB, buffers_max: 3, ..RingOptions::new(depth) })
    }

    pub(super) fn ring_unregistered(file: &File, arena: &Arc<Arena>, depth: usize) -> Result<Engine> {
        open_ring(file, arena, RingOptions { buffers_max: 0, ..RingOptions::new(depth) })
    }

    pub(super) fn ring_pieces(file: &File, arena: &Arc<Arena>, depth: usize) -> Result<Engine> {
        open_ring(file, arena, RingOptions { piece_bytes: 2 * PAGE, ..RingOptions::new(depth) })
    }
}

/// A directory on the file system of the build, which has direct I/O.
pub(super) fn directory() -> TempDir {
    let program = std::env::current_exe().expect("the test's own path");
    tempfile::tempdir_in(program.parent().expect("a directory")).expect("a directory")
}

/// `chunks` of 2 MiB.
pub(super) fn arena(chunks: u64) -> Arc<Arena> {
    Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(chunks << 21) }).expect("memory")
}

/// Whether the machine, not the engine, is why there is no ring.
pub(super) fn is_denied(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported)
}

/// One engine on one file of its own.
struct Rig {
    engine: Engine,
    arena: Arc<Arena>,
    file: File,
    _directory: TempDir,
}

impl Rig {
    /// `None`, after a word about it, where the kernel denies the ring.
    fn new(open: &Open, depth: usize, file_bytes: usize) -> Option<Self> {
        let directory = directory();
        let path = directory.path().join("region");
        File::create_new(&path).and_then(|file| file.set_len(file_bytes as u64)).expect("a file");
        let (file, _, is_direct) = open_direct(&path).expect("opened");
        assert!(is_direct, "the suite needs a file system with direct I/O");
        let arena = arena(4);
        match open(&file, &arena, depth) {
            Ok(engine) => Some(Self { engine, arena, file: File::open(&path).expect("opened"), _directory: directory }),
            Err(error) if is_denied(&error) => {
                eprintln!("SKIPPED: this machine has no io_uring: {error}");
                None
            }
            Err(error) => panic!("no engine: {error:#}"),
        }
    }

    fn transfer(&self, kind: IoKind, offset: usize, buffer: IoBuffer) -> Result<IoBuffer> {
        transfer_blocking(&*self.engine, FileId(0), kind, offset as u64, buffer, PATIENCE)
    }

    fn submit(&self, request: IoRequest) {
        if let Err((_, error)) = self.engine.submit(request) {
            panic!("refused: {error:#}");
        }
    }

    /// A slot of `bytes`, header page included.
    fn slot(&self, bytes: usize) -> IoBuffer {
        let slot = Arc::new(self.arena.alloc(bytes - PAGE).expect("room in the arena"));
        assert_eq!(slot.bytes(), bytes);
        IoBuffer::Slot { slot, bytes }
    }

    /// What the file holds, not through the engine.
    fn bytes_at(&self, offset: usize, bytes: usize) -> Vec<u8> {
        let mut found = vec![0; bytes];
        self.file.read_exact_at(&mut found, offset as u64).expect("read");
        found
    }

    /// Keeps the only thread of an engine of depth 1 busy until the sender is dropped.
    fn block(&self) -> Sender<()> {
        let (release, released) = bounded::<()>(0);
        let (entered, blocked) = bounded(1);
        self.submit(read(0, IoPriority::Demand, move |_| {
            entered.send(()).expect("the test waits");
            let _ = released.recv_timeout(PATIENCE);
        }));
        blocked.recv_timeout(PATIENCE).expect("the completion runs");
        release
    }
}

fn pages(bytes: usize) -> IoBuffer {
    IoBuffer::Pages(Pages::new(bytes))
}

/// A read of one page.
fn read(offset: usize, priority: IoPriority, done: impl FnOnce(IoCompletion) + Send + 'static) -> IoRequest {
    request(IoKind::Read, offset, Some(pages(PAGE)), priority, done)
}

fn request(
    kind: IoKind,
    offset: usize,
    buffer: Option<IoBuffer>,
    priority: IoPriority,
    done: impl FnOnce(IoCompletion) + Send + 'static,
) -> IoRequest {
    IoRequest { file: FileId(0), kind, offset: offset as u64, buffer, priority, done: Box::new(done) }
}

/// A completion that sends its outcome.
fn report(sender: &Sender<Option<ErrorKind>>) -> impl FnOnce(IoCompletion) + Send + 'static {
    let sender = sender.clone();
    move |completion| sender.send(completion.result.err().map(|error| error.kind())).expect("the test waits")
}

/// The next `count` outcomes, and that no more come.
fn outcomes(receiver: &Receiver<Option<ErrorKind>>, count: usize) -> Vec<Option<ErrorKind>> {
    let all = (0..count).map(|_| receiver.recv_timeout(PATIENCE).expect("a completion")).collect();
    assert!(receiver.is_empty(), "a completion ran twice");
    all
}

/// Bytes that tell where they belong.
fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let word = |i: u64| (seed ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (0..bytes as u64 / 8).flat_map(|i| word(i + 1).rotate_left(29).to_le_bytes()).collect()
}

fn filled(mut buffer: IoBuffer, bytes: &[u8]) -> IoBuffer {
    match &mut buffer {
        IoBuffer::Pages(pages) => pages.as_mut_slice()[..bytes.len()].copy_from_slice(bytes),
        IoBuffer::Slot { slot, .. } => {
            let (header, payload) = bytes.split_at(PAGE);
            slot.write_header(header.try_into().expect("a page"));
            let slot = Arc::get_mut(slot).expect("not shared yet");
            slot.payload_mut()[..payload.len()].copy_from_slice(payload);
        }
        IoBuffer::SlotEnd { .. } => unreachable!("only ever read into"),
    }
    buffer
}

fn content(buffer: &IoBuffer) -> Vec<u8> {
    match buffer {
        IoBuffer::Pages(pages) => pages.as_slice().to_vec(),
        IoBuffer::Slot { slot, bytes } => {
            let mut all = slot.read_header().to_vec();
            all.extend_from_slice(&slot.payload()[..bytes - PAGE]);
            all
        }
        IoBuffer::SlotEnd { .. } => unreachable!("none is made here"),
    }
}
