//! The io_uring engine: one named thread owns one ring; any thread may hand it requests through bounded queues.
//! An eventfd, polled by the ring, wakes the thread; it blocks in the kernel otherwise and never spins. Requests enter
//! by `submit`, wait in [`Queues`], move into the ring while their drive has room ([`bounds`]), and leave by `done` on
//! the ring's thread. [`ring`] is that thread, [`registered`] the arena as the kernel knows it: that thread registers
//! it piece by piece as it becomes ready.

mod bounds;
#[cfg(test)]
mod breakdown;
#[cfg(test)]
mod growing;
mod in_flight;
mod registered;
mod ring;
mod run;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{JoinHandle, ThreadId};

use crossbeam_channel::bounded;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use self::bounds::Bounds;
use super::files::Files;
use super::operation::PIECE_BYTES;
use super::queue::Queues;
use super::{BlockIo, FileId, IoKind, IoRequest, READ_DEPTH_DEFAULT, ReadDepth};
use crate::dram::Arena;
use crate::error::{Error, ErrorKind, Result};

/// The most operations in flight that may be asked for.
pub(super) const DEPTH_MAX: usize = 4096;

/// How a ring is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingOptions {
    /// The most operations in flight, 1 to [`DEPTH_MAX`]; each drive has its share of them.
    pub(super) depth: usize,
    /// Longer transfers are cut.
    pub(super) piece_bytes: usize,
    /// Neighbouring requests are handed to the kernel as one up to so many bytes; 0: never.
    pub(super) run_bytes: usize,
    /// No more writes are started on a drive that has so many bytes of writes in flight, and no more reads while it has so
    /// many of reads, unless [`BlockIo::set_read_depth`] says otherwise.
    pub(super) in_flight_bytes: usize,
    /// Bytes of the arena in one registered buffer; the kernel takes at most 1 GiB. Registering one holds up the ring.
    pub(super) buffer_bytes: usize,
    /// The most registered buffers; the kernel takes at most 16,384.
    pub(super) buffers_max: usize,
}

impl RingOptions {
    pub(super) fn new(depth: usize) -> Self {
        Self {
            depth,
            piece_bytes: PIECE_BYTES,
            run_bytes: READ_DEPTH_DEFAULT.request_bytes,
            in_flight_bytes: READ_DEPTH_DEFAULT.depth_bytes,
            buffer_bytes: 256 << 20,
            buffers_max: 1 << 14,
        }
    }
}

/// See the module.
pub(super) struct UringIo {
    shared: Arc<Shared>,
    depth: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
    thread_id: ThreadId,
    /// The descriptor of the ring, for the test that breaks it.
    #[cfg(test)]
    ring_descriptor: std::os::fd::RawFd,
}

/// What callers and the ring's thread share.
struct Shared {
    files: Files,
    bounds: Bounds,
    inbox: Mutex<Inbox>,
    /// Its counter is above zero when the thread is to look at the inbox.
    wake: OwnedFd,
    /// For tests, as is the most bytes of reads that were in flight on a file.
    #[cfg(test)]
    registered_bytes: std::sync::atomic::AtomicUsize,
    #[cfg(test)]
    reads_bytes_max: std::sync::atomic::AtomicUsize,
}

struct Inbox {
    queues: Queues,
    /// Whether the thread may be blocked and would not notice a new request.
    wants_wake: bool,
    /// By file: kinds of requests that have to wait for a completion whatever the thread does.
    full: Vec<Full>,
}

/// Whether reads and writes of a file have to wait.
#[derive(Debug, Clone, Copy, Default)]
struct Full {
    reads: bool,
    writes: bool,
}

impl Inbox {
    fn new(files: usize) -> Self {
        Self { queues: Queues::by_file(files), wants_wake: false, full: vec![Full::default(); files] }
    }

    /// Whether the thread is to be woken for a request; says so once.
    fn take_wake(&mut self, file: FileId, kind: IoKind) -> bool {
        let full = self.full.get(file.0 as usize).copied().unwrap_or_default();
        let must_wait = (kind == IoKind::Read && full.reads) || (kind == IoKind::Write && full.writes);
        !must_wait && std::mem::take(&mut self.wants_wake)
    }
}

impl UringIo {
    /// Starts the thread, which makes the ring.
    ///
    /// # Errors
    /// `PermissionDenied`, `Unsupported` or `Io` with a remedy where the
    /// kernel gives no ring.
    pub(super) fn open(files: Files, arena: &Arc<Arena>, options: RingOptions) -> Result<Self> {
        let depth = options.depth;
        debug_assert!((1..=DEPTH_MAX).contains(&depth), "the depth was checked");
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::from_io("making an eventfd (see ulimit -n)", errno.into()))?;
        let count = files.raw().len();
        let shared = Arc::new(Shared {
            bounds: Bounds::new(count, options),
            inbox: Mutex::new(Inbox::new(count)),
            files,
            wake,
            #[cfg(test)]
            registered_bytes: Default::default(),
            #[cfg(test)]
            reads_bytes_max: Default::default(),
        });
        // What has become ready is registered while the ring is idle rather than before somebody's next request.
        let growing = Arc::downgrade(&shared);
        arena.on_growth(Box::new(move || growing.upgrade().iter().for_each(|shared| shared.wake())));
        let (ready, started) = bounded(1);
        let thread = std::thread::Builder::new().name("pega-uring".to_owned());
        let thread = thread
            .spawn({
                let (shared, arena) = (Arc::clone(&shared), Arc::clone(arena));
                move || ring::serve(shared, arena, options, &ready)
            })
            .map_err(|source| Error::from_io("starting the I/O thread (see ulimit -u)", source))?;
        let thread_id = thread.thread().id();
        let ended = |_| Err(Error::new(ErrorKind::Io, "the I/O thread ended while starting"));
        let _ring_descriptor = started.recv().unwrap_or_else(ended)?;
        Ok(Self {
            shared,
            depth,
            thread: Mutex::new(Some(thread)),
            thread_id,
            #[cfg(test)]
            ring_descriptor: _ring_descriptor,
        })
    }
}

impl Shared {
    fn wake(&self) {
        // The counter cannot overflow: the thread resets it before it asks for the next wake.
        if let Err(error) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "the I/O thread could not be woken");
        }
    }
}

impl BlockIo for UringIo {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn submit(&self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        if let Err(error) = self.shared.files.check(&request) {
            return Err((request, error));
        }
        let (file, kind) = (request.file, request.kind);
        let mut inbox = self.shared.inbox.lock();
        inbox.queues.push(request)?;
        let wake = inbox.take_wake(file, kind);
        drop(inbox);
        if wake {
            self.shared.wake();
        }
        Ok(())
    }

    fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        self.shared.bounds.set_read_depth(file, depth);
        // More may have room.
        self.shared.wake();
    }

    fn close(&self) {
        let mut inbox = self.shared.inbox.lock();
        inbox.queues.close(Error::new(ErrorKind::Closed, "the I/O engine is closed"));
        let wake = std::mem::take(&mut inbox.wants_wake);
        drop(inbox);
        if wake {
            self.shared.wake();
        }
        // A completion may drop the last handle of the engine; the ring's thread cannot wait for itself.
        if std::thread::current().id() == self.thread_id {
            return;
        }
        // Held while waiting, so that a second caller also returns only when all has ended.
        let mut thread = self.thread.lock();
        if thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the I/O thread ended with a panic");
        }
    }
}

impl Drop for UringIo {
    fn drop(&mut self) {
        self.close();
    }
}
