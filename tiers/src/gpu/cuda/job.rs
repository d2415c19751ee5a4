//! One copy on its way: waiting for its fence and its arena, cut piece by piece, on the device, ended. A job answers
//! exactly once, and never before the last of its pieces has ended, whatever happens to the thread that drives it.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::arena::Registration;
use super::device::{Core, Ticket};
use super::driver::{Progress, Recorded};
use super::lane::{Copying, Lane};
use super::memory::CudaMemory;
use super::method::Method;
use super::plan::{ArenaSpan, Cursor};
use super::queue::Work;
use crate::error::{Error, ErrorKind, Result};
use crate::gpu::{CopyDirection, CopyDone, Fence, PlacedCopy};

/// How long a copy waits for its arena to be registered.
const ATTACH_PATIENCE: Duration = Duration::from_secs(60);

/// Something of a job that the device has.
enum InFlight {
    Piece {
        end: Arc<Recorded>,
        bytes: u64,
    },
    /// A piece that failed to start as a whole: over when all of the lane is.
    WholeLane,
}

/// A copy that has not ended.
pub(super) struct Job {
    memory: Arc<CudaMemory>,
    copy: PlacedCopy,
    /// Taken when it is called.
    done: Option<CopyDone>,
    is_urgent: bool,
    registration: Option<Arc<Registration>>,
    /// Bytes of the arena that have to be registered.
    arena_bytes: u64,
    deadline: Instant,
    cursor: Cursor,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u64,
    is_ready: bool,
    failed: Option<Error>,
    _ticket: Ticket,
}

impl Job {
    /// A copy whose blocks and places were checked.
    pub(super) fn new(memory: Arc<CudaMemory>, mut copy: PlacedCopy, is_urgent: bool, ticket: Ticket) -> Self {
        let done = std::mem::replace(&mut copy.done, Box::new(|_| {}));
        let arena_bytes = ArenaSpan::end_of(&copy.blocks, memory.geometry().block_bytes());
        Self {
            registration: memory.core().arenas.get(&copy.arena),
            memory,
            copy,
            done: Some(done),
            is_urgent,
            arena_bytes,
            deadline: Instant::now() + ATTACH_PATIENCE,
            cursor: Cursor::default(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            is_ready: false,
            failed: None,
            _ticket: ticket,
        }
    }

    fn is_all_queued(&self) -> bool {
        self.failed.is_some() || self.cursor.is_at_end(self.copy.blocks.len())
    }

    /// Nothing more of it is queued; it ends with `error` once what was queued has ended.
    pub(super) fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
        self.is_ready = false;
    }

    /// Looks at what the job waits for.
    pub(super) fn update(&mut self) {
        if self.is_all_queued() {
            self.is_ready = false;
            return;
        }
        if self.copy.cancelled.load(Ordering::Acquire) {
            return self.fail(Error::new(ErrorKind::Cancelled, "the copy was cancelled"));
        }
        if self.is_ready {
            return;
        }
        match self.is_arena_ready() {
            Err(error) => return self.fail(error),
            Ok(false) if Instant::now() > self.deadline => {
                let message = format!("the GPU does not reach the arena after {} s", ATTACH_PATIENCE.as_secs());
                return self.fail(Error::new(ErrorKind::Timeout, message));
            }
            Ok(false) => return,
            Ok(true) => {}
        }
        // The fence is waited for here and not in a stream, where it would hold up other copies and could not be cancelled.
        match self.fence_progress() {
            Err(error) | Ok(Progress::Lost(error) | Progress::Unclear(error)) => self.fail(error),
            Ok(Progress::Pending) => {}
            Ok(Progress::Ended) => {
                self.copy.after = None;
                self.is_ready = true;
            }
        }
    }

    /// Whether the GPU reaches all places of the copy.
    pub(super) fn is_arena_ready(&mut self) -> Result<bool> {
        if self.registration.is_none() {
            self.registration = self.memory.core().arenas.get(&self.copy.arena);
        }
        self.registration.as_ref().map_or(Ok(false), |registration| registration.is_ready(self.arena_bytes))
    }

    fn fence_progress(&self) -> Result<Progress> {
        self.copy.after.as_ref().map_or(Ok(Progress::Ended), |fence| recorded(fence).map(|event| event.progress()))
    }

    /// Queues the next piece on a lane that the caller holds; false when there is none.
    ///
    /// A failure is the job's, not the caller's: it ends with it.
    pub(super) fn queue_piece(&mut self, lane: &mut Lane) -> bool {
        let core = self.memory.core();
        let Some(registration) = &self.registration else { return false };
        let method = self.method(lane);
        let geometry = self.memory.geometry();
        let Some(piece) = self.cursor.next(geometry, self.copy.blocks.len(), method.piece_bytes(self.is_urgent)) else {
            return false;
        };
        let copying = Copying {
            direction: self.copy.direction,
            blocks: &self.copy.blocks,
            geometry,
            slices: self.memory.slices(),
            arena: registration.span(),
        };
        let ctas = method.ctas(self.memory.shape(), core.tuning());
        // SAFETY: the job holds memory, arena and registration, and lets go of them only when the piece has ended (see
        // `drop`). Blocks and places were checked before there was a job.
        match unsafe { lane.queue(&core.tools, copying, &piece, method, ctas) } {
            Ok(end) => {
                let bytes = piece.total_bytes();
                self.in_flight.push_back(InFlight::Piece { end, bytes });
                self.in_flight_bytes += bytes;
                self.is_ready &= !self.is_all_queued();
            }
            Err(error) => {
                self.in_flight.push_back(InFlight::WholeLane);
                self.fail(error);
            }
        }
        self.failed.is_none()
    }

    /// How the job is copied in that lane.
    pub(super) fn method(&self, lane: &mut Lane) -> Method {
        let direction = self.copy.direction;
        let wanted = self.memory.forced_method();
        let wanted = wanted.unwrap_or_else(|| Method::choose(self.memory.shape()));
        lane.method(&self.memory.core().tools, wanted, direction)
    }

    /// The fence, for those who wait for it in a stream.
    pub(super) fn fence(&self) -> Result<Option<&Recorded>> {
        self.copy.after.as_ref().map(recorded).transpose()
    }

    /// The end of the last piece.
    pub(super) fn last_end(&self) -> Option<&Recorded> {
        match self.in_flight.back()? {
            InFlight::Piece { end, .. } => Some(end),
            InFlight::WholeLane => None,
        }
    }

    fn lane<'a>(&self, core: &'a Core) -> &'a parking_lot::Mutex<Lane> {
        match self.copy.direction {
            CopyDirection::ToSlots => &core.saves,
            CopyDirection::ToDevice if self.is_urgent => &core.urgent,
            CopyDirection::ToDevice => &core.loads,
        }
    }

    /// Queues the next piece on the job's own lane.
    pub(super) fn queue_next(&mut self) {
        let core = Arc::clone(self.memory.core());
        let mut lane = self.lane(&core).lock();
        if !self.queue_piece(&mut lane) {
            self.is_ready = false;
        }
    }

    /// Lets go of what has ended; returns whether anything had.
    pub(super) fn settle(&mut self) -> bool {
        let before = self.in_flight.len();
        while let Some(first) = self.in_flight.front() {
            let progress = match first {
                InFlight::Piece { end, .. } => end.progress(),
                InFlight::WholeLane => self.lane(self.memory.core()).lock().progress(),
            };
            match progress {
                Progress::Pending | Progress::Unclear(_) => break,
                Progress::Ended => {
                    if let Some(InFlight::Piece { bytes, .. }) = self.in_flight.pop_front() {
                        self.in_flight_bytes -= bytes;
                    }
                }
                Progress::Lost(error) => {
                    self.in_flight.clear();
                    self.in_flight_bytes = 0;
                    self.fail(error);
                }
            }
        }
        self.in_flight.len() < before
    }

    pub(super) fn is_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether a piece failed half way, so that its lane has to come to rest.
    pub(super) fn needs_rest(&self) -> bool {
        self.in_flight.iter().any(|part| matches!(part, InFlight::WholeLane))
    }

    pub(super) fn has_ended(&self) -> bool {
        self.in_flight.is_empty() && self.is_all_queued()
    }

    /// Takes back the right to answer, from a job of which nothing was queued.
    pub(super) fn abandon(mut self) {
        debug_assert!(self.in_flight.is_empty(), "a job with copies in flight answers");
        self.done = None;
    }

    /// Answers. Called when the job has ended.
    pub(super) fn finish(mut self) {
        let result = self.failed.take().map_or(Ok(()), Err);
        self.answer(result);
    }

    fn answer(&mut self, result: Result<()>) {
        let Some(done) = self.done.take() else { return };
        if std::panic::catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
            tracing::error!("what a copy was to call at its end has panicked");
        }
    }
}

impl Work for Job {
    fn is_load(&self) -> bool {
        self.copy.direction == CopyDirection::ToDevice
    }

    fn is_ready(&self) -> bool {
        self.is_ready
    }

    fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }
}

impl Drop for Job {
    /// Only a job that has not answered has anything to do here: the thread has panicked, or is gone. It waits for its
    /// pieces first, without a deadline: memory that the device may still write is never given back.
    fn drop(&mut self) {
        if self.done.is_none() {
            return;
        }
        let entered = Arc::clone(self.memory.core());
        let _entered = entered.tools.context.enter();
        let mut since = Instant::now();
        loop {
            self.settle();
            if !self.is_in_flight() {
                break;
            }
            if since.elapsed() > Duration::from_secs(10) {
                tracing::error!(
                    bytes = self.in_flight_bytes,
                    "still waiting for copies of a GPU whose thread has ended"
                );
                since = Instant::now();
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let error = self.failed.take();
        self.answer(Err(error.unwrap_or_else(|| Error::new(ErrorKind::Closed, "the GPU's thread has ended"))));
    }
}

/// The event of a fence.
fn recorded(fence: &Fence) -> Result<&Recorded> {
    fence.0.downcast_ref::<Recorded>().ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "the fence of a copy is of another device; take one of the same memory")
    })
}
