//! The thread that owns the ring: takes requests from the inbox, submits, waits in the kernel, completes. The only
//! user of the ring and of the operations in flight.
#![expect(unsafe_code, reason = "hands memory and descriptors to the kernel through the ring")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use io_uring::{IoUring, opcode, squeue, types};

use super::super::operation::{Operation, deliver, panic_text};
use super::super::{FileId, IoCompletion, IoKind, IoRequest};
use super::in_flight::InFlight;
use super::registered::{Registered, register_most};
use super::run::{Next, Run};
use super::{RingOptions, Shared};
use crate::dram::Arena;
use crate::error::{Error, ErrorKind, Result};

/// The `user_data` of the poll of the eventfd; operations have the numbers of their places.
const WAKE: u64 = u64::MAX;

/// How often in a row, and how far apart, the ring is tried when the kernel lacks memory and nothing completes: 10 s.
const ENTER_RETRIES: u32 = 10_000;
const ENTER_PAUSE: Duration = Duration::from_millis(1);

/// How often in a row the poll of the eventfd may fail.
const WAKE_RETRIES: u32 = 16;

/// `IORING_ENTER_GETEVENTS` of the kernel's interface.
const ENTER_GETEVENTS: u32 = 1;

/// The body of the thread. Says through `ready` whether there is a ring, and its descriptor; then serves until the
/// engine is closed.
pub(super) fn serve(shared: Arc<Shared>, arena: Arc<Arena>, options: RingOptions, ready: &Sender<Result<RawFd>>) {
    let mut ring = match Ring::new(Arc::clone(&shared), arena, options) {
        Ok(ring) => ring,
        Err(error) => return drop(ready.try_send(Err(error))),
    };
    let _ = ready.try_send(Ok(ring.ring.as_raw_fd()));
    let outcome = catch_unwind(AssertUnwindSafe(|| ring.run()));
    let error = match outcome {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(panic) => Error::new(ErrorKind::Poisoned, format!("the I/O thread panicked: {}", panic_text(&*panic))),
    };
    tracing::error!(%error, "the io_uring engine broke down and takes no more requests");
    shared.inbox.lock().queues.close(error.clone());
    ring.in_flight.abandon(&error);
    ring.again.drain(..).for_each(|operation| operation.finish(Err(error.clone())));
    ring.refuse_waiting();
}

/// Dropped in this order: the ring is closed before the operations in flight (of which none is left unless the ring
/// broke down), and both before the arena that is registered with it.
struct Ring {
    ring: IoUring,
    in_flight: InFlight,
    shared: Arc<Shared>,
    options: RingOptions,
    registered: Registered,
    has_registered_files: bool,
    /// Whether the kernel has reads and writes of several pieces of registered memory.
    has_registered_vectors: bool,
    /// What is to be transferred alone after a run that it was in; at most the members of all runs in flight.
    again: VecDeque<Operation>,
    /// Whether the eventfd is being polled.
    is_wake_armed: bool,
    wake_failures: u32,
    enter_failures: u32,
    /// Reused: the requests of a run, numbers of runs to start, and what the kernel reported.
    run: Vec<IoRequest>,
    taken: Vec<usize>,
    reported: Vec<(u64, i32)>,
    arena: Arc<Arena>,
}

impl Ring {
    fn new(shared: Arc<Shared>, arena: Arc<Arena>, options: RingOptions) -> Result<Self> {
        let depth = options.depth;
        let (ring, has_registered_vectors) = build(depth)?;
        let has_registered_files = match ring.submitter().register_files(&shared.files.raw()) {
            Ok(()) => true,
            Err(error) => {
                tracing::info!(%error, "io_uring uses the store's files without registering them");
                false
            }
        };
        let registered = make_table(&ring, &arena, options);
        let mut ring = Self {
            ring,
            in_flight: InFlight::new(depth, shared.files.raw().len()),
            shared,
            options,
            registered,
            has_registered_files,
            has_registered_vectors,
            again: VecDeque::new(),
            is_wake_armed: false,
            wake_failures: 0,
            enter_failures: 0,
            run: Vec::new(),
            taken: Vec::with_capacity(depth),
            reported: Vec::with_capacity(2 * depth + 2),
            arena,
        };
        ring.register_next();
        tracing::info!(
            depth,
            has_registered_files,
            registered_bytes = ring.registered.bytes(),
            arena_bytes = ring.arena.capacity_bytes(),
            "io_uring is ready"
        );
        Ok(ring)
    }

    /// Serves until the engine is closed and nothing is in flight.
    fn run(&mut self) -> Result<()> {
        loop {
            let is_closed = self.take_requests()?;
            if is_closed && self.in_flight.is_empty() && self.again.is_empty() {
                return Ok(());
            }
            self.register_next();
            self.arm_wake()?;
            self.enter()?;
            self.reap()?;
        }
    }

    /// Registers the next part of the arena if all of it is ready: only one, because the ring stands still meanwhile.
    fn register_next(&mut self) {
        let Some((number, part)) = self.registered.next(self.arena.ready_bytes() as usize) else { return };
        // SAFETY: the part lies in the arena, which this thread keeps mapped until the ring is closed.
        match unsafe { self.ring.submitter().register_buffers_update(number, &[part], None) } {
            Ok(()) => self.registered.add(),
            Err(error) => {
                self.registered.stop();
                warn_partly(&self.registered, &self.arena, &error);
            }
        }
        #[cfg(test)]
        self.shared.registered_bytes.store(self.registered.bytes(), std::sync::atomic::Ordering::Release);
        // More is ready: let the ring come by here again, after it has looked at requests, even if there are none.
        if self.registered.next(self.arena.ready_bytes() as usize).is_some() {
            self.shared.wake();
        }
    }

    /// Moves requests from the inbox into the ring, as many as may be in flight. Returns whether the engine is closed;
    /// then what waited has been completed with the reason.
    fn take_requests(&mut self) -> Result<bool> {
        while self.in_flight.len() < self.options.depth
            && let Some(operation) = self.again.pop_front()
        {
            let number = self.in_flight.insert(Run::new(vec![operation]));
            self.start(number)?;
        }
        let mut inbox = self.shared.inbox.lock();
        if inbox.queues.end().is_some() {
            drop(inbox);
            self.refuse_waiting();
            return Ok(true);
        }
        let bounds = &self.shared.bounds;
        let mut run = std::mem::take(&mut self.run);
        while self.in_flight.len() < self.options.depth {
            let in_flight = &self.in_flight;
            let has_room =
                |request: &IoRequest| bounds.has_room(request.file, request.kind, in_flight.load(request.file));
            inbox.queues.pop_run(has_room, |first| bounds.run_bytes(first), &mut run);
            if run.is_empty() {
                break;
            }
            let member = |request: IoRequest| {
                let is_direct = self.shared.files.is_direct(request.file);
                Operation::new(request, is_direct, self.options.piece_bytes)
            };
            let run = Run::new(run.drain(..).map(member).collect());
            self.taken.push(self.in_flight.insert(run));
            #[cfg(test)]
            for file in (0..inbox.full.len()).map(|file| FileId(file as u32)) {
                let reads_bytes = self.in_flight.load(file).reads.bytes;
                self.shared.reads_bytes_max.fetch_max(reads_bytes, std::sync::atomic::Ordering::AcqRel);
            }
        }
        self.run = run;
        // With the ring full a completion comes before there is anything to do for a new request; so it is for what finds
        // its drive full.
        inbox.wants_wake = self.in_flight.len() < self.options.depth;
        for file in (0..inbox.full.len()).map(|file| FileId(file as u32)) {
            let has_waiting = inbox.queues.has_waiting(file);
            inbox.full[file.0 as usize] = bounds.full(file, self.in_flight.load(file), has_waiting);
        }
        drop(inbox);
        let mut taken = std::mem::take(&mut self.taken);
        for number in taken.drain(..) {
            self.start(number)?;
        }
        self.taken = taken;
        Ok(false)
    }

    /// Completes what waits in the inbox with the reason why the engine ended.
    fn refuse_waiting(&mut self) {
        loop {
            let mut inbox = self.shared.inbox.lock();
            let (Some(error), Some(request)) = (inbox.queues.end().cloned(), inbox.queues.pop()) else { return };
            drop(inbox);
            let IoRequest { buffer, done, .. } = request;
            deliver(done, IoCompletion { buffer, result: Err(error) });
        }
    }

    /// Puts the next transfer of a run into the submission queue.
    fn start(&mut self, number: usize) -> Result<()> {
        let Some(run) = self.in_flight.get_mut(number) else { return Ok(()) };
        let Some(first) = run.first() else { return Ok(()) };
        let (file, flags) = if self.has_registered_files {
            (types::Fd(first.file().0.cast_signed()), squeue::Flags::FIXED_FILE)
        } else {
            let file = self.shared.files.get(first.file()).map_err(|source| broken("finding a file", source))?;
            (types::Fd(file.as_raw_fd()), squeue::Flags::empty())
        };
        let offset = first.piece().offset;
        let entry = match run.vectors() {
            [] => self.registered.transfer(first.kind(), first.memory(), file, offset),
            [one] => match NonNull::new(one.iov_base.cast()) {
                Some(start) => self.registered.transfer(first.kind(), (start, one.iov_len), file, offset),
                None => return Ok(()),
            },
            several => self.registered.vectored(first.kind(), several, file, offset, self.has_registered_vectors),
        };
        self.push(entry.flags(flags).user_data(number as u64))
    }

    fn arm_wake(&mut self) -> Result<()> {
        if self.is_wake_armed {
            return Ok(());
        }
        let poll = opcode::PollAdd::new(types::Fd(self.shared.wake.as_raw_fd()), libc::POLLIN as u32);
        self.push(poll.build().user_data(WAKE))?;
        self.is_wake_armed = true;
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry) -> Result<()> {
        // SAFETY: an entry of an operation points to the buffer that the operation owns. It stays in `in_flight` until
        // the kernel has reported its end; if the ring breaks down before that, `in_flight` leaks it. The descriptors
        // are owned by `shared`, which this thread holds. The poll of the eventfd uses no memory.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There is an entry for each operation in flight and for the poll, and none is in the queue twice.
        pushed.map_err(|error| broken("filling the submission queue", io::Error::other(error)))
    }

    /// Submits and blocks until something has completed.
    fn enter(&mut self) -> Result<()> {
        let error = match self.ring.submit_and_wait(1) {
            Ok(_) => {
                self.enter_failures = 0;
                return Ok(());
            }
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            // No memory for requests, or completions have to be taken first. Completions of a ring with deferred task
            // work appear only in a call that asks for them, which the failed one did not get to do.
            Some(libc::EAGAIN | libc::EBUSY) if self.enter_failures < ENTER_RETRIES => {
                self.enter_failures += 1;
                // SAFETY: submits nothing, waits for nothing, and passes no memory.
                let _ = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, ENTER_GETEVENTS, None) };
                if self.ring.completion().is_empty() {
                    std::thread::sleep(ENTER_PAUSE);
                }
                Ok(())
            }
            _ => Err(broken("submitting to the ring", error)),
        }
    }

    /// Takes in what the kernel reported: completes operations, or starts their next transfer.
    fn reap(&mut self) -> Result<()> {
        let mut reported = std::mem::take(&mut self.reported);
        reported.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        if !reported.is_empty() {
            self.enter_failures = 0;
        }
        for (number, outcome) in reported.drain(..) {
            if number == WAKE {
                self.woken(outcome)?;
            } else {
                self.transferred(number as usize, outcome)?;
            }
        }
        self.reported = reported;
        Ok(())
    }

    fn woken(&mut self, outcome: i32) -> Result<()> {
        self.is_wake_armed = false;
        if outcome >= 0 {
            self.wake_failures = 0;
            // Resets the counter; that it was zero already does no harm.
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
            return Ok(());
        }
        self.wake_failures += 1;
        if self.wake_failures > WAKE_RETRIES {
            return Err(broken("polling the eventfd", io::Error::from_raw_os_error(-outcome)));
        }
        Ok(())
    }

    fn transferred(&mut self, number: usize, outcome: i32) -> Result<()> {
        let Some(run) = self.in_flight.get_mut(number) else { return Ok(()) };
        let outcome = usize::try_from(outcome).map_err(|_| io::Error::from_raw_os_error(-outcome));
        match run.advance(outcome) {
            Next::Again => self.start(number)?,
            Next::Ended(result) => self.in_flight.remove(number).into_iter().for_each(|run| run.finish(&result)),
            Next::Parted(moved) => {
                self.again.extend(self.in_flight.remove(number).into_iter().flat_map(|run| run.part(moved)));
            }
        }
        Ok(())
    }
}

impl Registered {
    /// The entry of a transfer between memory and a descriptor.
    fn transfer(
        &self,
        kind: IoKind,
        (memory, bytes): (NonNull<u8>, usize),
        file: types::Fd,
        offset: u64,
    ) -> squeue::Entry {
        let (start, length) = (memory.as_ptr(), bytes as u32);
        match (kind, self.buffer_of(memory, bytes)) {
            (IoKind::Sync, _) => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            (IoKind::Read, Some(buffer)) => opcode::ReadFixed::new(file, start, length, buffer).offset(offset).build(),
            (IoKind::Read, None) => opcode::Read::new(file, start, length).offset(offset).build(),
            (IoKind::Write, Some(buffer)) => {
                opcode::WriteFixed::new(file, start, length, buffer).offset(offset).build()
            }
            (IoKind::Write, None) => opcode::Write::new(file, start, length).offset(offset).build(),
        }
    }

    /// The entry of a transfer between several pieces of memory and a descriptor. The pieces are read when the entry is
    /// submitted.
    fn vectored(
        &self,
        kind: IoKind,
        pieces: &[libc::iovec],
        file: types::Fd,
        offset: u64,
        has_registered_vectors: bool,
    ) -> squeue::Entry {
        let buffer = |piece: &libc::iovec| self.buffer_of(NonNull::new(piece.iov_base.cast())?, piece.iov_len);
        let first = pieces.first().filter(|_| has_registered_vectors).and_then(buffer);
        let buffer = first.filter(|first| pieces.iter().all(|piece| buffer(piece) == Some(*first)));
        let (start, count) = (pieces.as_ptr(), pieces.len() as u32);
        match (kind == IoKind::Read, buffer) {
            (true, Some(buffer)) => opcode::ReadvFixed::new(file, start, count, buffer).offset(offset).build(),
            (true, None) => opcode::Readv::new(file, start, count).offset(offset).build(),
            (false, Some(buffer)) => opcode::WritevFixed::new(file, start, count, buffer).offset(offset).build(),
            (false, None) => opcode::Writev::new(file, start, count).offset(offset).build(),
        }
    }
}

/// Makes the ring, with what the kernel has to save interrupts and wake-ups, and asks whether it has all we need, and
/// whether it has transfers between a file and several pieces of registered memory.
fn build(depth: usize) -> Result<(IoUring, bool)> {
    // One entry for each operation and one for the poll; twice as many completions can never overflow.
    let entries = (depth as u32 + 1).next_power_of_two();
    let builder = || {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(2 * entries);
        builder
    };
    let is_unknown = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    let mut ring = builder().setup_single_issuer().setup_defer_taskrun().build(entries);
    if ring.as_ref().is_err_and(is_unknown) {
        ring = builder().setup_coop_taskrun().build(entries);
    }
    if ring.as_ref().is_err_and(is_unknown) {
        ring = builder().build(entries);
    }
    let ring = ring.map_err(refused)?;
    let mut probe = io_uring::Probe::new();
    let known = ring.submitter().register_probe(&mut probe);
    let needed = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::ReadFixed::CODE,
        opcode::Write::CODE,
        opcode::WriteFixed::CODE,
        opcode::Fsync::CODE,
        opcode::PollAdd::CODE,
    ];
    if known.is_err() || !ring.params().is_feature_nodrop() || needed.iter().any(|&code| !probe.is_supported(code)) {
        let message = "the kernel's io_uring is too old; use Linux 5.6 or later, or io = psync";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let has_vectors =
        [opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE].iter().all(|&code| probe.is_supported(code));
    Ok((ring, has_vectors))
}

fn refused(source: io::Error) -> Error {
    let remedy = match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "allow it in the container's seccomp profile and set kernel.io_uring_disabled to 0"
        }
        Some(libc::ENOSYS) => "use a kernel with io_uring, and a seccomp profile that allows it",
        Some(libc::ENOMEM) => "raise the limit on locked memory (ulimit -l), or lower the queue depth",
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n)",
        _ => "see the kernel's log",
    };
    Error::from_io(format!("the kernel gives no io_uring ({remedy}, or use io = psync)"), source)
}

/// Makes the table of registered buffers, empty: they are registered as the arena grows. A kernel before 5.19 has only
/// tables that are full from the start: then it is what is ready now, or as much of that as the kernel takes.
fn make_table(ring: &IoUring, arena: &Arena, options: RingOptions) -> Registered {
    let mut registered = Registered::new(arena.range(), options.buffer_bytes, options.buffers_max);
    let submitter = ring.submitter();
    if registered.buffers() == 0 {
        return registered;
    }
    let Err(error) = submitter.register_buffers_sparse(registered.buffers() as u32) else { return registered };
    tracing::info!(%error, "io_uring has no tables that grow; what the arena has by now is registered");
    let parts = registered.parts(arena.ready_bytes() as usize);
    let register = |count: usize| {
        // SAFETY: the parts lie in the arena, which the ring's thread keeps mapped until the ring is closed.
        unsafe { submitter.register_buffers(parts.get(..count).unwrap_or(&parts)) }
    };
    let (count, reason) = register_most(parts.len(), register, || submitter.unregister_buffers());
    (0..count).for_each(|_| registered.add());
    registered.stop();
    if let Some(error) = reason {
        warn_partly(&registered, arena, &error);
    }
    registered
}

fn warn_partly(registered: &Registered, arena: &Arena, error: &io::Error) {
    let (registered_bytes, of_bytes) = (registered.bytes(), arena.capacity_bytes());
    let remedy = "raise the limit on locked memory (ulimit -l) for faster transfers";
    tracing::warn!(%error, registered_bytes, of_bytes, remedy, "the arena is not registered as a whole");
}

fn broken(doing: &str, source: io::Error) -> Error {
    let message = format!("the io_uring engine broke down {doing}: {source}; reopen the store");
    Error::new(ErrorKind::Poisoned, message)
}
