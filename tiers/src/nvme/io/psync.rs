//! The engine of `pread`, `pwrite` and `fdatasync`: a few threads that take requests from the same queues as the ring.
//! The reference for the other engines, and the fallback where the kernel refuses io_uring.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{JoinHandle, ThreadId};

use parking_lot::{Condvar, Mutex};

use super::files::Files;
use super::operation::{Operation, PIECE_BYTES};
use super::queue::Queues;
use super::{BlockIo, IoKind, IoRequest};
use crate::error::{Error, ErrorKind, Result};

/// The most threads, and so the most operations in flight.
const THREADS: usize = 4;

/// See the module.
pub(super) struct PsyncIo {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    thread_ids: Vec<ThreadId>,
}

struct Shared {
    files: Files,
    piece_bytes: usize,
    queues: Mutex<Queues>,
    /// A request came, or the engine is closed.
    changed: Condvar,
}

impl PsyncIo {
    /// Starts `depth` threads, at least one and at most four.
    pub(super) fn open(files: Files, depth: usize) -> Result<Self> {
        Self::with_pieces(files, depth, PIECE_BYTES)
    }

    /// The same with transfers cut into pieces of another size.
    pub(super) fn with_pieces(files: Files, depth: usize, piece_bytes: usize) -> Result<Self> {
        let shared = Shared { files, piece_bytes, queues: Mutex::new(Queues::shared()), changed: Condvar::new() };
        let shared = Arc::new(shared);
        let mut engine = Self { shared, threads: Mutex::default(), thread_ids: Vec::new() };
        for number in 0..depth.clamp(1, THREADS) {
            let shared = Arc::clone(&engine.shared);
            let thread = std::thread::Builder::new().name(format!("pega-psync-{number}"));
            // On failure the engine is dropped, which ends the threads that there are.
            let thread = thread
                .spawn(move || shared.work())
                .map_err(|source| Error::from_io("starting an I/O thread (see ulimit -u)", source))?;
            engine.thread_ids.push(thread.thread().id());
            engine.threads.get_mut().push(thread);
        }
        Ok(engine)
    }
}

impl Shared {
    fn work(&self) {
        while let Some((request, refusal)) = self.next() {
            let is_direct = self.files.is_direct(request.file);
            let mut operation = Operation::new(request, is_direct, self.piece_bytes);
            let result = refusal.map_or_else(|| self.run(&mut operation), Err);
            operation.finish(result);
        }
    }

    /// Waits for a request; with an error it is only to be completed. `None` at the end.
    fn next(&self) -> Option<(IoRequest, Option<Error>)> {
        let mut queues = self.queues.lock();
        loop {
            let refusal = queues.end().cloned();
            match (queues.pop(), refusal) {
                (Some(request), refusal) => return Some((request, refusal)),
                (None, Some(_)) => return None,
                (None, None) => self.changed.wait(&mut queues),
            }
        }
    }

    fn run(&self, operation: &mut Operation) -> Result<()> {
        loop {
            let outcome = self.transfer(operation);
            if let Some(result) = operation.advance(outcome) {
                return result;
            }
        }
    }

    fn transfer(&self, operation: &mut Operation) -> std::io::Result<usize> {
        let file = self.files.get(operation.file())?;
        let piece = operation.piece();
        match (operation.kind(), operation.buffer_mut()) {
            (IoKind::Read, Some(buffer)) => buffer.read_at(file.as_fd(), piece.offset, piece.from, piece.bytes),
            (IoKind::Write, Some(buffer)) => buffer.write_at(file.as_fd(), piece.offset, piece.from, piece.bytes),
            _ => Ok(rustix::fs::fdatasync(file).map(|()| 0)?),
        }
    }
}

impl BlockIo for PsyncIo {
    fn name(&self) -> &'static str {
        "psync"
    }

    fn depth(&self) -> usize {
        self.thread_ids.len()
    }

    fn submit(&self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        if let Err(error) = self.shared.files.check(&request) {
            return Err((request, error));
        }
        self.shared.queues.lock().push(request)?;
        self.shared.changed.notify_one();
        Ok(())
    }

    fn close(&self) {
        self.shared.queues.lock().close(Error::new(ErrorKind::Closed, "the I/O engine is closed"));
        self.shared.changed.notify_all();
        // A completion may drop the last handle of the engine; its own thread cannot wait for itself.
        if self.thread_ids.contains(&std::thread::current().id()) {
            return;
        }
        // Held while waiting, so that a second caller also returns only when all has ended.
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                tracing::error!("an I/O thread ended with a panic");
            }
        }
    }
}

impl Drop for PsyncIo {
    fn drop(&mut self) {
        self.close();
    }
}
