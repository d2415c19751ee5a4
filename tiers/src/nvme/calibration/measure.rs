//! One drive is measured: random reads of written pieces, more and more of them in flight, until more does not help. The
//! stream of reads never pauses between two depths, and of each depth only the time counts in which all that is in flight
//! was started at it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::CalibrationPlan;
use crate::dram::Arena;
use crate::error::{Error, ErrorKind, Result};
use crate::nvme::io::{BlockIo, FileId, IoBuffer, IoKind, IoPriority, IoRequest, Pages};
use crate::nvme::page::PAGE_BYTES;

/// The part of the best rate that is enough, in percent.
const ENOUGH_PERCENT: u64 = 97;
/// Depths are doubled so often at most: from one request to 32.
const DEPTHS: u32 = 6;
/// Depths that have to be measured for a result.
const DEPTHS_MIN: usize = 3;
/// Requests in flight at most, the smaller ones included.
const IN_FLIGHT_MAX: usize = 128;
/// Smaller requests that are tried have this part of the size.
const SMALLER: usize = 4;
/// Requests of which a rate is made at least.
const REQUESTS_MIN: u32 = 4;

/// What a drive can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Measured {
    /// Bytes per second that it is read with at its best.
    pub(super) read_bytes_per_second: u64,
    /// The fewest bytes in flight with which it is almost that.
    pub(super) depth_bytes: u64,
    /// The size of request that it likes.
    pub(super) request_bytes: u64,
}

/// How a measurement ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Measured(Measured),
    /// Somebody else wants the drive, or the store is being closed.
    Stopped,
    /// It failed, or there was no time for enough.
    Failed(Error),
}

/// Memory to read into: slots of the arena, which the kernel knows, as far as they may be taken, and other memory.
pub(super) struct Memory {
    pub(super) arena: Arc<Arena>,
    pub(super) arena_bytes: usize,
}

impl Memory {
    fn take(&mut self, bytes: usize) -> IoBuffer {
        if self.arena_bytes >= bytes
            && let Some(slot) = self.arena.alloc(bytes - PAGE_BYTES)
            && slot.bytes() >= bytes
        {
            self.arena_bytes -= bytes;
            return IoBuffer::Slot { slot: Arc::new(slot), bytes };
        }
        IoBuffer::Pages(Pages::new(bytes))
    }

    fn give_back(&mut self, buffer: &IoBuffer) {
        if matches!(buffer, IoBuffer::Slot { .. }) {
            self.arena_bytes += buffer.bytes();
        }
    }
}

/// Measures the reads of a file at these offsets, each good for a request of the plan's size.
pub(super) fn measure(
    io: &dyn BlockIo,
    file: FileId,
    offsets: &[u64],
    memory: Memory,
    plan: &CalibrationPlan,
    is_stopped: &dyn Fn() -> bool,
) -> Outcome {
    let mut stream = Stream::new(io, file, offsets, memory, plan, is_stopped);
    let mut rates: Vec<(u64, u64)> = Vec::new();
    let request = plan.request_bytes;
    for depth in (0..DEPTHS).map(|double| request << double) {
        match stream.rate(request, depth) {
            Ok(rate) => rates.push((depth as u64, rate)),
            Err(End::Stopped) => return Outcome::Stopped,
            Err(End::Failed(error)) => return Outcome::Failed(error),
            Err(End::TimeIsUp) => break,
        }
        if has_settled(&rates) {
            break;
        }
    }
    let Some((depth_bytes, best)) = smallest_enough(&rates) else {
        let message = format!("{} depths were measured in the time given, {DEPTHS_MIN} are needed", rates.len());
        return Outcome::Failed(Error::new(ErrorKind::Timeout, message));
    };
    let smaller = request / SMALLER;
    let likes_smaller = smaller.is_multiple_of(PAGE_BYTES) && smaller > PAGE_BYTES && {
        match stream.rate(smaller, depth_bytes as usize) {
            Ok(rate) => best * 100 < rate * ENOUGH_PERCENT,
            Err(End::Stopped) => return Outcome::Stopped,
            Err(End::Failed(_) | End::TimeIsUp) => false,
        }
    };
    let request_bytes = if likes_smaller { smaller } else { request } as u64;
    Outcome::Measured(Measured { read_bytes_per_second: best, depth_bytes, request_bytes })
}

/// Whether the last two depths were hardly better than what was before them.
fn has_settled(rates: &[(u64, u64)]) -> bool {
    let Some((before, last)) = rates.split_last_chunk::<2>().filter(|(before, _)| !before.is_empty()) else {
        return false;
    };
    let best = |rates: &[(u64, u64)]| rates.iter().map(|(_, rate)| *rate).max().unwrap_or(0);
    best(last) * ENOUGH_PERCENT <= best(before) * 100
}

/// The smallest depth with almost the best rate, and the best rate.
fn smallest_enough(rates: &[(u64, u64)]) -> Option<(u64, u64)> {
    let best = rates.iter().map(|(_, rate)| *rate).max().filter(|best| *best > 0)?;
    let enough = rates.iter().find(|(_, rate)| rate * 100 >= best * ENOUGH_PERCENT)?;
    (rates.len() >= DEPTHS_MIN).then_some((enough.0, best))
}

/// Why there is no rate.
enum End {
    Stopped,
    TimeIsUp,
    Failed(Error),
}

/// A read that ended.
struct Ended {
    at: Instant,
    buffer: Option<IoBuffer>,
    result: Result<()>,
}

/// Reads of one size in flight, as many as are wanted.
struct Stream<'a> {
    io: &'a dyn BlockIo,
    file: FileId,
    offsets: &'a [u64],
    next: usize,
    memory: Memory,
    free: Vec<IoBuffer>,
    request_bytes: usize,
    in_flight: usize,
    bytes_left: u64,
    deadline: Instant,
    plan: &'a CalibrationPlan,
    is_stopped: &'a dyn Fn() -> bool,
    sender: Sender<Ended>,
    receiver: Receiver<Ended>,
}

impl<'a> Stream<'a> {
    fn new(
        io: &'a dyn BlockIo,
        file: FileId,
        offsets: &'a [u64],
        memory: Memory,
        plan: &'a CalibrationPlan,
        is_stopped: &'a dyn Fn() -> bool,
    ) -> Self {
        let (sender, receiver) = bounded(IN_FLIGHT_MAX);
        let (bytes_left, deadline) = (plan.bytes_max, Instant::now() + plan.time_max);
        let (next, free, request_bytes, in_flight) = (0, Vec::new(), 0, 0);
        Self {
            io,
            file,
            offsets,
            next,
            memory,
            free,
            request_bytes,
            in_flight,
            bytes_left,
            deadline,
            plan,
            is_stopped,
            sender,
            receiver,
        }
    }

    /// Bytes per second with so many in flight, in requests of one size.
    fn rate(&mut self, request_bytes: usize, depth_bytes: usize) -> Result<u64, End> {
        if request_bytes != self.request_bytes {
            while self.in_flight > 0 {
                self.receive()?;
            }
            self.free.drain(..).for_each(|buffer| self.memory.give_back(&buffer));
            self.request_bytes = request_bytes;
        }
        let target = (depth_bytes / request_bytes).clamp(1, IN_FLIGHT_MAX);
        let mut older = self.in_flight.max(target);
        let mut window: Option<Instant> = None;
        let mut requests = 0;
        loop {
            while self.in_flight < target {
                self.submit()?;
            }
            let at = self.receive()?;
            if older > 0 {
                older -= 1;
                continue;
            }
            let Some(began) = window else {
                window = Some(at);
                continue;
            };
            requests += 1;
            let passed = at.saturating_duration_since(began);
            let is_enough = passed >= self.plan.window && requests >= self.plan.window_requests;
            if is_enough || (passed >= self.plan.window_max && requests >= REQUESTS_MIN) {
                let bytes = u128::from(requests) * request_bytes as u128;
                return Ok(u64::try_from(bytes * 1_000_000_000 / passed.as_nanos().max(1)).unwrap_or(u64::MAX));
            }
        }
    }

    fn submit(&mut self) -> Result<(), End> {
        if (self.is_stopped)() {
            return Err(End::Stopped);
        }
        let bytes = self.request_bytes as u64;
        if Instant::now() >= self.deadline || self.bytes_left < bytes {
            return Err(End::TimeIsUp);
        }
        let offset = self.offsets.get(self.next).copied();
        self.next = (self.next + 1) % self.offsets.len().max(1);
        let offset = offset.ok_or_else(|| End::Failed(Error::new(ErrorKind::InvalidInput, "nothing to read")))?;
        let buffer = self.free.pop().unwrap_or_else(|| self.memory.take(self.request_bytes));
        let sender = self.sender.clone();
        // There is room for all that is in flight; once the measurement has ended nobody listens.
        let done = Box::new(move |completion: crate::nvme::io::IoCompletion| {
            let (at, buffer) = (Instant::now(), completion.buffer);
            drop(sender.try_send(Ended { at, buffer, result: completion.result }));
        });
        let (file, kind, priority) = (self.file, IoKind::Read, IoPriority::Prefetch);
        let request = IoRequest { file, kind, offset, buffer: Some(buffer), priority, done };
        match self.io.submit(request) {
            Ok(()) => {
                self.bytes_left -= bytes;
                self.in_flight += 1;
                Ok(())
            }
            // Others fill the queue, or the store is being closed.
            Err((_, error)) if matches!(error.kind(), ErrorKind::Busy | ErrorKind::Closed) => Err(End::Stopped),
            Err((_, error)) => Err(End::Failed(error)),
        }
    }

    /// Waits for a read; when it ended.
    fn receive(&mut self) -> Result<Instant, End> {
        // A drive that does not answer in time is not measured; what is in flight keeps its memory.
        let patience = self.deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let ended = self.receiver.recv_timeout(patience).map_err(|error| match error {
            RecvTimeoutError::Timeout => End::TimeIsUp,
            RecvTimeoutError::Disconnected => End::Stopped,
        })?;
        self.in_flight -= 1;
        self.free.extend(ended.buffer);
        match ended.result {
            Ok(()) => Ok(ended.at),
            Err(error) if error.kind() == ErrorKind::Closed => Err(End::Stopped),
            Err(error) => Err(End::Failed(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_depth_that_is_enough_is_taken() {
        assert_eq!(smallest_enough(&[(1, 100), (2, 190), (4, 300), (8, 304), (16, 306)]), Some((4, 306)));
        assert_eq!(smallest_enough(&[(1, 300), (2, 190), (4, 301)]), Some((1, 301)));
        assert_eq!(smallest_enough(&[(1, 100), (2, 200), (4, 400), (8, 800)]), Some((8, 800)));
        assert_eq!(smallest_enough(&[(1, 100), (2, 100)]), None, "too few");
        assert_eq!(smallest_enough(&[(1, 0), (2, 0), (4, 0)]), None);
    }

    #[test]
    fn deeper_is_not_tried_once_it_does_not_help() {
        assert!(!has_settled(&[(1, 100), (2, 100)]));
        assert!(has_settled(&[(1, 100), (2, 100), (4, 102)]));
        assert!(!has_settled(&[(1, 100), (2, 100), (4, 110)]));
        assert!(!has_settled(&[(1, 100), (2, 150), (4, 140)]));
        assert!(has_settled(&[(1, 100), (2, 150), (4, 140), (8, 150)]));
    }
}
