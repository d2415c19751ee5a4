//! Requests that a thread waits for: superblocks, recovery, probes. Never for use on a thread of an engine.

use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::{BlockIo, FileId, IoBuffer, IoCompletion, IoKind, IoPriority, IoRequest};
use crate::error::{Error, ErrorKind, Result};

/// How long to wait before a request that met a full queue is offered again.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// Reads or writes `buffer` and waits for at most `timeout`; the buffer comes back.
///
/// # Errors
/// What the engine reports, and `Timeout`: then the operation still owns the buffer and may yet happen.
pub(crate) fn transfer_blocking(
    io: &dyn BlockIo,
    file: FileId,
    kind: IoKind,
    offset: u64,
    buffer: IoBuffer,
    timeout: Duration,
) -> Result<IoBuffer> {
    let completion = run(io, file, kind, offset, Some(buffer), timeout)?;
    completion.result?;
    completion.buffer.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a sync has no buffer; use sync_blocking"))
}

/// Makes what was written and completed before durable, and waits for at most `timeout`.
///
/// # Errors
/// What the engine reports, and `Timeout`: then it is not known what is durable.
pub(crate) fn sync_blocking(io: &dyn BlockIo, file: FileId, timeout: Duration) -> Result<()> {
    run(io, file, IoKind::Sync, 0, None, timeout)?.result
}

fn run(
    io: &dyn BlockIo,
    file: FileId,
    kind: IoKind,
    offset: u64,
    buffer: Option<IoBuffer>,
    timeout: Duration,
) -> Result<IoCompletion> {
    let deadline = Instant::now() + timeout;
    let (sender, receiver) = bounded(1);
    // After a timeout nobody listens; the completion, and with it the buffer, is then dropped.
    let done = Box::new(move |completion| drop(sender.try_send(completion)));
    let mut request = IoRequest { file, kind, offset, buffer, priority: IoPriority::Demand, done };
    while let Err((back, error)) = io.submit(request) {
        if error.kind() != ErrorKind::Busy || Instant::now() + BUSY_PAUSE >= deadline {
            return Err(error);
        }
        std::thread::sleep(BUSY_PAUSE);
        request = back;
    }
    receiver.recv_deadline(deadline).map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            let message = format!("the drive did not answer within {timeout:?}; check it and the kernel's log");
            Error::new(ErrorKind::Timeout, message).with("file", file.0).with("offset", offset)
        }
        RecvTimeoutError::Disconnected => Error::new(ErrorKind::Closed, "the I/O engine ended without an answer"),
    })
}
