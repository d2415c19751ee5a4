//! One operation on its way through an engine: what to transfer next, what an outcome of the kernel means, and its
//! end. Pure bookkeeping that owns the request; the engines make the system calls.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use super::{FileId, IO_ALIGN, IoBuffer, IoCompletion, IoDone, IoKind, IoRequest};
use crate::error::{Error, ErrorKind, Result};

/// The most bytes of one transfer; longer requests are cut. The kernel's own limit is a page below 2 GiB.
pub(super) const PIECE_BYTES: usize = 1 << 30;

/// How often in a row an operation that was interrupted or told to try again is started anew.
const RETRIES: u32 = 16;

/// An accepted request and how far it has come.
pub(super) struct Operation {
    request: IoRequest,
    /// Whether a transfer must stay on the alignment.
    is_direct: bool,
    piece_bytes: usize,
    moved: usize,
    retries: u32,
}

/// The transfer to make next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where in the file.
    pub(super) offset: u64,
    /// Where in the buffer.
    pub(super) from: usize,
    /// How many bytes.
    pub(super) bytes: usize,
}

impl Operation {
    pub(super) fn new(request: IoRequest, is_direct: bool, piece_bytes: usize) -> Self {
        Self { request, is_direct, piece_bytes, moved: 0, retries: 0 }
    }

    pub(super) fn file(&self) -> FileId {
        self.request.file
    }

    pub(super) fn kind(&self) -> IoKind {
        self.request.kind
    }

    pub(super) fn buffer_mut(&mut self) -> Option<&mut IoBuffer> {
        self.request.buffer.as_mut()
    }

    /// Bytes that are still to be transferred; none for a sync.
    pub(super) fn bytes_left(&self) -> usize {
        self.bytes() - self.moved
    }

    /// What is to be transferred next; nothing for a sync.
    pub(super) fn piece(&self) -> Piece {
        let bytes = (self.bytes() - self.moved).min(self.piece_bytes);
        Piece { offset: self.request.offset + self.moved as u64, from: self.moved, bytes }
    }

    /// The memory of the next transfer.
    pub(super) fn memory(&self) -> (NonNull<u8>, usize) {
        let piece = self.piece();
        self.request.buffer.as_ref().map_or((NonNull::dangling(), 0), |buffer| buffer.part(piece.from, piece.bytes))
    }

    /// Takes in how a transfer ended: the result of the whole operation, or `None` when [`Operation::piece`] is to be
    /// transferred next.
    pub(super) fn advance(&mut self, outcome: io::Result<usize>) -> Option<Result<()>> {
        // A failed sync is never repeated: the kernel may have dropped the dirty pages and would report success.
        if self.request.kind == IoKind::Sync {
            return Some(outcome.map(drop).map_err(|source| self.failed(source)));
        }
        match outcome {
            Err(error) if is_transient(&error) && self.retries < RETRIES => {
                self.retries += 1;
                None
            }
            Err(error) => Some(Err(self.failed(error))),
            Ok(0) => Some(Err(self.ended())),
            Ok(moved) => {
                self.moved += moved;
                self.retries = 0;
                match self.moved {
                    moved if moved >= self.bytes() => Some(Ok(())),
                    moved if self.is_direct && !moved.is_multiple_of(IO_ALIGN) => Some(Err(self.ended())),
                    _ => None,
                }
            }
        }
    }

    /// Gives the buffer back and calls `done`.
    pub(super) fn finish(self, result: Result<()>) {
        let IoRequest { buffer, done, .. } = self.request;
        deliver(done, IoCompletion { buffer, result });
    }

    /// Calls `done` without the buffer, which the kernel may still use: its memory is leaked on purpose.
    pub(super) fn abandon(self, error: Error) {
        let IoRequest { buffer, done, .. } = self.request;
        std::mem::forget(buffer);
        deliver(done, IoCompletion { buffer: None, result: Err(error) });
    }

    fn bytes(&self) -> usize {
        self.request.buffer.as_ref().map_or(0, IoBuffer::bytes)
    }

    fn failed(&self, source: io::Error) -> Error {
        let doing = match self.request.kind {
            IoKind::Read => "reading",
            IoKind::Write => "writing",
            IoKind::Sync => "fdatasync",
        };
        self.describe(Error::from_io(doing, source))
    }

    /// The transfer stopped short where it cannot go on.
    fn ended(&self) -> Error {
        let at = self.request.offset + self.moved as u64;
        let short = self.bytes() - self.moved;
        let (kind, what) = match self.request.kind {
            IoKind::Read => {
                (ErrorKind::Corrupt, format!("the file ends at byte {at}, {short} bytes before the read does"))
            }
            _ => (ErrorKind::Io, format!("the drive took no more at byte {at}, {short} bytes before the write ends")),
        };
        self.describe(Error::new(kind, what))
    }

    fn describe(&self, error: Error) -> Error {
        let error = error.with("file", self.request.file.0).with("offset", self.request.offset);
        error.with("bytes", self.bytes()).with("moved", self.moved)
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Calls a completion; a panic in it is logged and goes no further, since the thread serves everybody.
pub(super) fn deliver(done: IoDone, completion: IoCompletion) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| done(completion))) {
        tracing::error!(panic = panic_text(&*panic), "a completion of an I/O request panicked; the engine goes on");
    }
}

/// What a panic said.
pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::super::{IoPriority, Pages};
    use super::*;

    fn operation(kind: IoKind, is_direct: bool) -> Operation {
        let buffer = (kind != IoKind::Sync).then(|| IoBuffer::Pages(Pages::new(4 * 4096)));
        let done = Box::new(|_| ());
        let request = IoRequest { file: FileId(0), kind, offset: 8192, buffer, priority: IoPriority::Demand, done };
        Operation::new(request, is_direct, 3 * 4096)
    }

    fn failure(outcome: Option<Result<()>>) -> Option<ErrorKind> {
        outcome.and_then(Result::err).map(|error| error.kind())
    }

    fn errno(code: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(code))
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let mut read = operation(IoKind::Read, true);
        assert_eq!(read.piece(), Piece { offset: 8192, from: 0, bytes: 3 * 4096 });
        assert!(read.advance(Ok(4096)).is_none());
        assert_eq!(read.piece(), Piece { offset: 8192 + 4096, from: 4096, bytes: 3 * 4096 });
        assert!(read.advance(Ok(2 * 4096)).is_none());
        assert_eq!(read.piece(), Piece { offset: 8192 + 3 * 4096, from: 3 * 4096, bytes: 4096 });
        let base = read.buffer_mut().map(|buffer| buffer.as_ptr().as_ptr() as usize).expect("a buffer");
        let (memory, bytes) = read.memory();
        assert_eq!((memory.as_ptr() as usize - base, bytes), (3 * 4096, 4096));
        assert!(read.advance(Ok(4096)).is_some_and(|result| result.is_ok()));
    }

    #[test]
    fn a_direct_transfer_off_the_alignment_is_an_error_and_a_buffered_one_goes_on() {
        assert_eq!(failure(operation(IoKind::Read, true).advance(Ok(1000))), Some(ErrorKind::Corrupt));
        assert_eq!(failure(operation(IoKind::Write, true).advance(Ok(1000))), Some(ErrorKind::Io));
        let mut write = operation(IoKind::Write, false);
        assert!(write.advance(Ok(1000)).is_none());
        assert_eq!(write.piece(), Piece { offset: 9192, from: 1000, bytes: 3 * 4096 });
    }

    #[test]
    fn no_progress_is_an_error() {
        assert_eq!(failure(operation(IoKind::Read, false).advance(Ok(0))), Some(ErrorKind::Corrupt));
        assert_eq!(failure(operation(IoKind::Write, false).advance(Ok(0))), Some(ErrorKind::Io));
    }

    #[test]
    fn transient_failures_are_retried_a_bounded_number_of_times() {
        for code in [libc::EINTR, libc::EAGAIN] {
            let mut write = operation(IoKind::Write, true);
            for _ in 0..RETRIES {
                assert!(write.advance(errno(code)).is_none());
            }
            assert_eq!(failure(write.advance(errno(code))), Some(ErrorKind::Io));
        }
        let mut write = operation(IoKind::Write, true);
        assert_eq!(failure(write.advance(errno(libc::ENOSPC))), Some(ErrorKind::NoSpace));
    }

    #[test]
    fn a_failed_sync_is_not_repeated() {
        assert_eq!(failure(operation(IoKind::Sync, true).advance(errno(libc::EINTR))), Some(ErrorKind::Io));
        assert!(operation(IoKind::Sync, true).advance(Ok(0)).is_some_and(|result| result.is_ok()));
    }
}
