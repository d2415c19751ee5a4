//! An engine whose drive fails as planned: errors, flipped bits, torn and lost writes, stalls. Wraps any engine; with
//! an empty plan it changes nothing. For tests only; which operation fails is decided when it is submitted, by its
//! place among the accepted ones of its kind, so a caller that submits from one thread sees the same every time.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::operation::deliver;
use super::{BlockIo, FileId, IO_ALIGN, IoBuffer, IoCompletion, IoDone, IoKind, IoRequest, ReadDepth};
use crate::error::{Error, ErrorKind, Result};

/// The most operations whose end is held back at a time; more are refused with `Busy`.
const LATE_MAX: usize = 4096;

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAction {
    /// It fails with this error number and does not reach the drive.
    Errno(i32),
    /// One bit of its bytes changes silently: on its way back for a read, on the medium for a write.
    FlipBit {
        /// Which byte of the buffer; past its end it counts from the start again.
        byte: usize,
        /// Which bit, 0 to 7.
        bit: u8,
    },
    /// Of a write only the first `bytes` bytes, rounded down to 4096, reach the drive, then it fails with `EIO`. Reads
    /// and syncs fail with `EIO`.
    Torn {
        /// How many bytes.
        bytes: usize,
    },
    /// It reports success and does not reach the drive.
    Lost,
    /// The drive moves it by so many bytes, a multiple of 4096, and reports success: what was there is overwritten, or
    /// read instead. Syncs do not change.
    Misdirected {
        /// How far, forwards.
        by: u64,
    },
    /// Its first system call is interrupted. Engines begin it anew, except for a sync, which fails.
    Interrupted,
    /// Its first system call moves only so many bytes, rounded down to 4096. Engines go on from there.
    Short {
        /// How many bytes.
        bytes: usize,
    },
    /// It is made, and reported after this time.
    Stall(Duration),
    /// It is made, and reported when [`Faulty::release`] is called or the engine is closed.
    Hold,
}

/// A fault of the operations `first` to `first + times - 1` of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Which kind.
    pub kind: IoKind,
    /// Its number among the accepted operations of its kind, counted from 1.
    pub first: u64,
    /// How many operations in a row; `u64::MAX` for all that follow.
    pub times: u64,
    /// What happens.
    pub action: FaultAction,
}

/// Which operations fail, and how; the first fault that fits counts. Empty by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FaultPlan(Vec<Fault>);

impl FaultPlan {
    /// Adds a fault of the `nth` operation of a kind, counted from 1.
    #[must_use]
    pub fn fail(self, kind: IoKind, nth: u64, action: FaultAction) -> Self {
        self.with(Fault { kind, first: nth, times: 1, action })
    }

    /// Adds a fault.
    #[must_use]
    pub fn with(mut self, fault: Fault) -> Self {
        self.0.push(fault);
        self
    }

    fn action(&self, kind: IoKind, number: u64) -> Option<FaultAction> {
        let fits = |fault: &&Fault| {
            fault.kind == kind && number.checked_sub(fault.first).is_some_and(|place| place < fault.times)
        };
        self.0.iter().find(fits).map(|fault| fault.action)
    }
}

/// See the module.
pub struct Faulty<I: BlockIo> {
    inner: I,
    script: Mutex<Script>,
    late: Arc<Late>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Script {
    plan: FaultPlan,
    /// Accepted operations by kind.
    seen: [u64; 3],
    fired: u64,
}

impl<I: BlockIo> Faulty<I> {
    /// Wraps an engine.
    ///
    /// # Errors
    /// If the thread that reports stalled operations cannot be started.
    pub fn new(inner: I, plan: FaultPlan) -> Result<Self> {
        let late = Arc::new(Late::default());
        let thread = std::thread::Builder::new().name("pega-faulty".to_owned());
        let thread = thread
            .spawn({
                let late = Arc::clone(&late);
                move || late.work()
            })
            .map_err(|source| Error::from_io("starting the thread of the faulty drive", source))?;
        let script = Mutex::new(Script { plan, ..Script::default() });
        Ok(Self { inner, script, late, thread: Mutex::new(Some(thread)) })
    }

    /// Adds a fault while running; its `first` counts from the start of the engine, see [`Faulty::seen`].
    pub fn inject(&self, fault: Fault) {
        self.script.lock().plan.0.push(fault);
    }

    /// Takes every fault out of the plan: the drive is well again.
    pub fn heal(&self) {
        self.script.lock().plan.0.clear();
    }

    /// Lets every held operation end, now and from now on.
    pub fn release(&self) {
        self.late.change(|state| state.is_released = true);
    }

    /// How many operations of a kind were accepted.
    pub fn seen(&self, kind: IoKind) -> u64 {
        self.script.lock().seen[kind as usize]
    }

    /// How many faults have happened.
    pub fn fired(&self) -> u64 {
        self.script.lock().fired
    }

    /// The engine inside.
    pub fn inner(&self) -> &I {
        &self.inner
    }

    /// Runs a request as `action` says.
    fn fail(&self, request: IoRequest, action: FaultAction) -> Result<(), (IoRequest, Error)> {
        let prefix = |buffer: &IoBuffer, bytes: usize| bytes.min(buffer.bytes()) / IO_ALIGN * IO_ALIGN;
        let is_write = request.kind == IoKind::Write;
        match (action, &request.buffer) {
            (FaultAction::Errno(errno), _) => self.answer(request, failure(errno)),
            (FaultAction::Lost, _) => self.answer(request, Ok(())),
            (FaultAction::Misdirected { by }, _) => {
                let offset = request.offset;
                let moved = IoRequest { offset: offset.saturating_add(by), ..request };
                self.forward(moved, None, |_| ()).map_err(|(back, error)| (IoRequest { offset, ..back }, error))
            }
            // System calls are made behind this seam: there they are begun anew, or gone on with.
            (FaultAction::Interrupted, _) if request.kind == IoKind::Sync => self.answer(request, failure(libc::EINTR)),
            (FaultAction::Interrupted | FaultAction::Short { .. }, _) => self.forward(request, None, |_| ()),
            (FaultAction::Torn { bytes }, Some(buffer)) if is_write && prefix(buffer, bytes) > 0 => {
                let torn = IoBuffer::Pages(buffer.copy_of(prefix(buffer, bytes)));
                self.forward(request, Some(torn), |completion| completion.result = failure(libc::EIO))
            }
            (FaultAction::Torn { .. }, _) => self.answer(request, failure(libc::EIO)),
            (FaultAction::FlipBit { byte, bit }, Some(buffer)) if is_write => {
                let mut flipped = IoBuffer::Pages(buffer.copy_of(buffer.bytes()));
                flipped.flip_bit(byte, bit);
                self.forward(request, Some(flipped), |_| ())
            }
            (FaultAction::FlipBit { byte, bit }, _) => self.forward(request, None, move |completion| {
                if let Some(buffer) = &mut completion.buffer {
                    buffer.flip_bit(byte, bit);
                }
            }),
            (FaultAction::Stall(time), _) => self.delay(request, Due::At(Instant::now() + time)),
            (FaultAction::Hold, _) => self.delay(request, Due::Released),
        }
    }

    /// Ends a request without the engine inside, on our own thread.
    fn answer(&self, request: IoRequest, result: Result<()>) -> Result<(), (IoRequest, Error)> {
        if let Err(error) = self.late.reserve() {
            return Err((request, error));
        }
        let IoRequest { buffer, done, .. } = request;
        self.late.put(Due::Now, done, IoCompletion { buffer, result });
        Ok(())
    }

    /// Lets the engine inside run a request, with other bytes if there are any, and changes how it ended.
    fn forward(
        &self,
        request: IoRequest,
        bytes: Option<IoBuffer>,
        change: impl FnOnce(&mut IoCompletion) + Send + 'static,
    ) -> Result<(), (IoRequest, Error)> {
        self.wrap(request, bytes, move |mut completion, done| {
            change(&mut completion);
            deliver(done, completion);
        })
    }

    fn delay(&self, request: IoRequest, due: Due) -> Result<(), (IoRequest, Error)> {
        if let Err(error) = self.late.reserve() {
            return Err((request, error));
        }
        let late = Arc::clone(&self.late);
        let outcome = self.wrap(request, None, move |completion, done| late.put(due, done, completion));
        if outcome.is_err() {
            self.late.change(|state| state.reserved -= 1);
        }
        outcome
    }

    /// Puts `end` between the engine inside and the request's own completion. What the engine refuses comes back as it
    /// was.
    fn wrap(
        &self,
        mut request: IoRequest,
        bytes: Option<IoBuffer>,
        end: impl FnOnce(IoCompletion, IoDone) + Send + 'static,
    ) -> Result<(), (IoRequest, Error)> {
        let is_replaced = bytes.is_some();
        let original = if is_replaced { std::mem::replace(&mut request.buffer, bytes) } else { None };
        let done = std::mem::replace(&mut request.done, Box::new(|_| ()));
        let kept = Arc::new(Mutex::new(Some((done, original))));
        request.done = Box::new({
            let kept = Arc::clone(&kept);
            move |mut completion| {
                let Some((done, original)) = kept.lock().take() else { return };
                if is_replaced {
                    completion.buffer = original;
                }
                end(completion, done);
            }
        });
        self.inner.submit(request).map_err(|(mut request, error)| {
            if let Some((done, original)) = kept.lock().take() {
                request.done = done;
                if is_replaced {
                    request.buffer = original;
                }
            }
            (request, error)
        })
    }
}

impl<I: BlockIo> BlockIo for Faulty<I> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn submit(&self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        let kind = request.kind;
        let mut script = self.script.lock();
        script.seen[kind as usize] += 1;
        let action = script.plan.action(kind, script.seen[kind as usize]);
        drop(script);
        let outcome = match action {
            None => self.inner.submit(request),
            Some(action) => self.fail(request, action),
        };
        let mut script = self.script.lock();
        match &outcome {
            Ok(()) => script.fired += u64::from(action.is_some()),
            // It was not accepted, so it does not count.
            Err(_) => script.seen[kind as usize] -= 1,
        }
        outcome
    }

    fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        self.inner.set_read_depth(file, depth);
    }

    fn close(&self) {
        self.late.change(|state| state.is_closing = true);
        self.inner.close();
        self.late.change(|state| state.is_closed = true);
        let mut thread = self.thread.lock();
        // A completion on our own thread may be what closes the engine.
        if thread.as_ref().is_some_and(|thread| thread.thread().id() != std::thread::current().id())
            && thread.take().is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the thread of the faulty drive ended with a panic");
        }
    }
}

impl<I: BlockIo> Drop for Faulty<I> {
    fn drop(&mut self) {
        self.close();
    }
}

fn failure(errno: i32) -> Result<()> {
    Err(Error::from_io("a planned fault", std::io::Error::from_raw_os_error(errno)))
}

/// When a completion is due.
#[derive(Debug, Clone, Copy)]
enum Due {
    Now,
    At(Instant),
    Released,
}

/// Completions that are held back, and the thread that lets them go.
#[derive(Default)]
struct Late {
    state: Mutex<LateState>,
    changed: Condvar,
}

#[derive(Default)]
struct LateState {
    waiting: Vec<(Due, IoDone, IoCompletion)>,
    /// Operations that are waiting or will be.
    reserved: usize,
    is_released: bool,
    /// No new one is taken, none is held back any longer.
    is_closing: bool,
    /// The engine inside has ended.
    is_closed: bool,
}

impl Late {
    fn reserve(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.is_closing {
            return Err(Error::new(ErrorKind::Closed, "the I/O engine is closed"));
        }
        if state.reserved >= LATE_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{LATE_MAX} operations of the faulty drive are held back"),
            ));
        }
        state.reserved += 1;
        Ok(())
    }

    /// Holds back a completion that was reserved.
    fn put(&self, due: Due, done: IoDone, completion: IoCompletion) {
        let mut state = self.state.lock();
        if state.is_closed {
            drop(state);
            return deliver(done, completion);
        }
        state.waiting.push((due, done, completion));
        drop(state);
        self.changed.notify_one();
    }

    fn change(&self, change: impl FnOnce(&mut LateState)) {
        change(&mut self.state.lock());
        self.changed.notify_one();
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            let place = state.waiting.iter().position(|(due, ..)| state.is_due(due, now));
            if let Some(place) = place {
                let (_, done, completion) = state.waiting.remove(place);
                state.reserved -= 1;
                drop(state);
                deliver(done, completion);
                state = self.state.lock();
                continue;
            }
            if state.is_closed {
                return;
            }
            let next = state.waiting.iter().filter_map(|(due, ..)| match due {
                Due::At(time) => Some(*time),
                _ => None,
            });
            match next.min() {
                Some(time) => drop(self.changed.wait_until(&mut state, time)),
                None => self.changed.wait(&mut state),
            }
        }
    }
}

impl LateState {
    fn is_due(&self, due: &Due, now: Instant) -> bool {
        self.is_closing
            || match due {
                Due::Now => true,
                Due::At(time) => *time <= now,
                Due::Released => self.is_released,
            }
    }
}
