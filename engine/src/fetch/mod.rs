//! Reads beside everything: blocks on the drive that somebody will want are brought to DRAM in the background. One bounded
//! queue ([`queue`]) and one thread; every read goes behind all loads, what comes is verified and stays in DRAM as a clean
//! block.
//!
//! Nothing waits for a fetch, and a fetch waits for nobody: it takes free slots and those of blocks that are worth less
//! than the one that comes ([`Residency::alloc_colder`](crate::residency::Residency::alloc_colder)); where there is none it ends.

mod queue;

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use pegaflow_tiers::{
    Arena, Error, ErrorKind, IoPriority, Location, NamespaceHandle, RecordId, Result, Store, Verified,
};

use crate::api::{FetchTotals, SessionId};
use crate::counters::Counter;
use crate::inner::Inner;
use crate::residency::Resident;
use queue::{Queue, Reading, Started};

/// Reads of fetches in flight, at most.
const READS_MAX: usize = 256;
/// Bytes of these as they are stored, at most (but always one read): what one drive takes to be at its best.
const READ_BYTES_MAX: u64 = 32 << 20;
/// And blocks of no more than this part of DRAM.
const DRAM_PART: u64 = 8;
/// Requests have no more than this part of DRAM in blocks that were fetched for them and that they have not loaded yet: what
/// is fetched too early leaves before it is used.
const READY_PART: u64 = 4;

/// For whom blocks are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum FetchReason {
    /// To see how fast the drive is: few, first, and one at a time.
    LookAside,
    /// A request that waits to be scheduled. One for each: a later wish takes the place of an earlier one.
    Request {
        /// Who asked.
        session: SessionId,
        /// The asker's name for the request.
        tag: u64,
    },
    /// What is likely to be asked for.
    HotSet,
}

impl FetchReason {
    /// How many there are.
    pub(crate) const KINDS: usize = 3;
    /// Any request.
    pub(crate) const REQUEST: Self = Self::Request { session: SessionId(0), tag: 0 };

    /// Who goes first has the lower one.
    pub(crate) fn rank(self) -> usize {
        match self {
            Self::LookAside => 0,
            Self::Request { .. } => 1,
            Self::HotSet => 2,
        }
    }
}

/// How a wish ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FetchEnd {
    /// Blocks that were read, and are in DRAM.
    pub(crate) blocks: u64,
    /// Bytes of these, as they are stored.
    pub(crate) bytes: u64,
    /// Whether all of them are: none failed, was left out for want of room, or was cut off by a cancel or the deadline.
    pub(crate) is_whole: bool,
    /// From the first read on; nothing if none was started.
    pub(crate) took: Duration,
    /// Bytes that the drives read for others in that time: what was being fetched at the first read, and what loads have read
    /// since.
    pub(crate) beside_bytes: u64,
}

/// Is told once how a wish ended, also if it was refused or the engine closes. Runs on the thread of the fetches, or on
/// that which refused or cancelled: it must not wait.
pub(crate) type FetchDone = Box<dyn FnOnce(FetchEnd) + Send>;

/// Blocks that are to be in DRAM.
pub(crate) struct FetchWish {
    /// The store that the locations are of. Nothing is pinned: a location that is over by the time it is read is a miss.
    pub(crate) store: Weak<Store>,
    /// What to read, in this order: ancestors before their descendants. Objects are left out.
    pub(crate) reads: Vec<(RecordId, Location)>,
    /// Of the payload of each.
    pub(crate) block_bytes: u64,
    pub(crate) reason: FetchReason,
    /// The number under which the policies get to know the request, from [`Requests::push`](crate::scheduler::Requests::push); 0
    /// if it is none. Before that they cannot say what its blocks are worth.
    pub(crate) asked: u64,
    /// The moment at which somebody asked for these blocks, by [`Residency::tick`](crate::residency::Residency::tick); `None` if nobody has. Where the
    /// policy only knows an order, blocks that were used after it are hotter.
    pub(crate) asked_at: Option<u64>,
    /// No read is started after it.
    pub(crate) deadline: Instant,
    pub(crate) done: Option<FetchDone>,
}

impl FetchWish {
    fn end(mut self, end: FetchEnd) {
        if let Some(done) = self.done.take() {
            done(end);
        }
    }
}

impl Drop for FetchWish {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done(FetchEnd::default());
        }
    }
}

/// What became of fetches, by reason. Blocks that are used or leave are counted by the residency, which sees it.
#[derive(Default)]
pub(crate) struct FetchCounters {
    blocks: Counter,
    bytes: Counter,
    pub(crate) used_blocks: Counter,
    pub(crate) wasted_blocks: Counter,
    pub(crate) wasted_bytes: Counter,
    cancelled_blocks: Counter,
    refused_blocks: Counter,
    no_room_blocks: Counter,
    failed_blocks: Counter,
}

impl FetchCounters {
    fn totals(&self) -> FetchTotals {
        FetchTotals {
            blocks: self.blocks.get(),
            bytes: self.bytes.get(),
            used_blocks: self.used_blocks.get(),
            wasted_blocks: self.wasted_blocks.get(),
            wasted_bytes: self.wasted_bytes.get(),
            cancelled_blocks: self.cancelled_blocks.get(),
            refused_blocks: self.refused_blocks.get(),
            no_room_blocks: self.no_room_blocks.get(),
            failed_blocks: self.failed_blocks.get(),
        }
    }
}

/// By [`FetchReason::rank`].
pub(crate) type CountersByReason = [FetchCounters; FetchReason::KINDS];

/// A read that has ended.
struct ReadEnd {
    started: Started,
    slot: Arc<pegaflow_tiers::Slot>,
    result: Result<Verified>,
}

#[derive(Default)]
struct State {
    queue: Queue,
    /// At most as many as are in flight.
    ended: Vec<ReadEnd>,
    is_closed: bool,
}

/// What the thread and the reads in flight share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// All fetches.
pub(crate) struct Fetches {
    shared: Arc<Shared>,
    counters: Arc<CountersByReason>,
}

impl Fetches {
    pub(crate) fn new(counters: Arc<CountersByReason>) -> Self {
        Self { shared: Arc::default(), counters }
    }

    /// Leaves a wish in the queue; returns at once.
    ///
    /// # Errors
    /// `Busy` if the queue is full, or another look is under way; `Closed`. The wish's `done` has run then.
    pub(crate) fn push(&self, mut wish: FetchWish) -> Result<()> {
        // Of an object DRAM may know that it is over, which the store does not yet.
        wish.reads.retain(|(id, _)| id.namespace != NamespaceHandle(0));
        let (reason, blocks) = (wish.reason, wish.reads.len() as u64);
        if wish.reads.is_empty() {
            wish.end(FetchEnd { is_whole: true, ..FetchEnd::default() });
            return Ok(());
        }
        let mut state = self.shared.state.lock();
        if state.is_closed {
            drop(state);
            return Err(Error::new(ErrorKind::Closed, "the engine is closed"));
        }
        let replaced = match reason {
            FetchReason::Request { .. } => state.queue.remove(|other| other == reason),
            _ => Vec::new(),
        };
        let refused = state.queue.push(wish).err();
        drop(state);
        self.count_cancelled(&replaced);
        // Ends of wishes are told outside of the lock.
        drop(replaced);
        if refused.is_some() {
            self.of(reason).refused_blocks.add(blocks);
            return Err(Error::new(ErrorKind::Busy, "too much waits to be fetched; nothing was queued"));
        }
        self.shared.changed.notify_all();
        Ok(())
    }

    /// A request has taken what was fetched for it, or will not: its wish ends; whether there was one. No read of it is
    /// started afterwards; those in flight end.
    pub(crate) fn cancel(&self, session: SessionId, tag: u64) -> bool {
        self.remove(|reason| reason == FetchReason::Request { session, tag })
    }

    /// Ends the wishes of all requests of a session.
    pub(crate) fn cancel_session(&self, of: SessionId) -> bool {
        self.remove(|reason| matches!(reason, FetchReason::Request { session, .. } if session == of))
    }

    /// Bytes that the wish of a request still has to read, those before it in the queue included; `None` if there is none.
    pub(crate) fn left_bytes(&self, reason: FetchReason) -> Option<u64> {
        self.shared.state.lock().queue.left_bytes(reason)
    }

    /// Bytes that wait to be read or are being read.
    pub(crate) fn waiting_bytes(&self) -> u64 {
        self.shared.state.lock().queue.waiting_bytes()
    }

    /// The blocks that are being read at this moment.
    pub(crate) fn reading(&self) -> Reading {
        self.shared.state.lock().queue.reading().clone()
    }

    /// Something that a wish may have waited for has come: the policies know more requests.
    pub(crate) fn wake(&self) {
        if self.shared.state.lock().queue.is_held_up() {
            self.shared.changed.notify_all();
        }
    }

    /// What became of the fetches of a kind so far.
    pub(crate) fn totals(&self, reason: FetchReason) -> FetchTotals {
        self.of(reason).totals()
    }

    /// Ends the thread and all wishes.
    pub(crate) fn close(&self) {
        self.shared.state.lock().is_closed = true;
        self.remove(|_| true);
        self.shared.changed.notify_all();
    }

    fn remove(&self, is_meant: impl Fn(FetchReason) -> bool) -> bool {
        let mut state = self.shared.state.lock();
        let removed = state.queue.remove(is_meant);
        // Others may have more now.
        let is_more_allowed = state.queue.is_waiting();
        drop(state);
        if is_more_allowed {
            self.shared.changed.notify_all();
        }
        self.count_cancelled(&removed);
        !removed.is_empty()
    }

    fn count_cancelled(&self, removed: &[queue::Removed]) {
        removed.iter().for_each(|wish| self.of(wish.reason()).cancelled_blocks.add(wish.left_blocks()));
    }

    fn of(&self, reason: FetchReason) -> &FetchCounters {
        let [look_aside, request, hot_set] = &*self.counters;
        match reason {
            FetchReason::LookAside => look_aside,
            FetchReason::Request { .. } => request,
            FetchReason::HotSet => hot_set,
        }
    }

    /// The body of the thread, until [`Fetches::close`].
    pub(crate) fn serve(&self, inner: &Inner) {
        let mut state = self.shared.state.lock();
        while !state.is_closed {
            let ended = std::mem::take(&mut state.ended);
            let has_ended = !ended.is_empty();
            for end in ended {
                self.take_in(inner, &mut state, end);
            }
            let late = state.queue.remove_late(Instant::now());
            if !late.is_empty() {
                self.count_cancelled(&late);
                MutexGuard::unlocked(&mut state, || drop(late));
            }
            if self.start_one(inner, &mut state) || has_ended {
                continue;
            }
            match state.queue.next_deadline() {
                Some(deadline) => drop(self.shared.changed.wait_until(&mut state, deadline)),
                None => self.shared.changed.wait(&mut state),
            }
        }
    }

    /// Starts the next read, if there is room for it in flight and in DRAM; false if there is nothing to do for now.
    fn start_one(&self, inner: &Inner, state: &mut MutexGuard<'_, State>) -> bool {
        let dram_bytes_max = inner.arena.ready_bytes() / DRAM_PART;
        let ready_bytes_max = inner.arena.ready_bytes() / READY_PART;
        let handed = inner.requests.handed();
        if !state.queue.has_room(READS_MAX, READ_BYTES_MAX, dram_bytes_max) {
            return false;
        }
        let loads_bytes = inner.load_choice.read_bytes();
        let Some(next) = state.queue.next(handed, loads_bytes, ready_bytes_max, Instant::now()) else { return false };
        let read = MutexGuard::unlocked(state, || self.start_read(inner, &next));
        match read {
            Ok(Attempt::Reading) => {}
            Ok(Attempt::Present) => self.end_read(inner, state, &next, false, true),
            // The policies do not know yet what it is worth: once more when they do.
            Ok(Attempt::NoRoom) if next.asked > handed => state.queue.hold_up(&next),
            Ok(Attempt::NoRoom) => {
                self.of(next.reason).no_room_blocks.add(1 + state.queue.cut(&next));
                self.end_read(inner, state, &next, false, false);
            }
            Err(error) => {
                tracing::debug!(%error, "a block was not fetched");
                self.fail(inner, state, &next);
            }
        }
        true
    }

    fn start_read(&self, inner: &Inner, next: &Started) -> Result<Attempt> {
        if next.is_double || inner.residency.contains(&next.id) {
            return Ok(Attempt::Present);
        }
        let store = next.store.upgrade().filter(|store| store.poison_reason().is_none());
        let store = store.ok_or_else(|| Error::new(ErrorKind::Closed, "the store of the block is out of use"))?;
        let payload_bytes = next.block_bytes as usize;
        let slot = inner.residency.alloc_colder(payload_bytes, &next.id, next.asked_at);
        let slot = match next.reason {
            // Without a look the drive would never be found to have become faster.
            FetchReason::LookAside => slot.or_else(|| inner.residency.alloc(payload_bytes)),
            _ => slot,
        };
        let Some(slot) = slot.map(Arc::new) else { return Ok(Attempt::NoRoom) };
        let (shared, kept, started) = (Arc::clone(&self.shared), Arc::clone(&slot), next.clone());
        let done = Box::new(move |result| {
            shared.state.lock().ended.push(ReadEnd { started, slot: kept, result });
            shared.changed.notify_all();
        });
        store.read(next.id, next.location, slot, IoPriority::Prefetch, done)?;
        Ok(Attempt::Reading)
    }

    /// A read has ended: what came well goes to DRAM.
    fn take_in(&self, inner: &Inner, state: &mut MutexGuard<'_, State>, end: ReadEnd) {
        let ReadEnd { started, slot, result } = end;
        let verified = match result {
            Ok(verified) if verified.payload_bytes == started.block_bytes => verified,
            Ok(_) => return self.fail(inner, state, &started),
            Err(error) => {
                tracing::debug!(%error, "a fetched block did not come back from the drive");
                return self.fail(inner, state, &started);
            }
        };
        let block = Resident::new(started.id, (verified.parent, verified.depth), slot, verified.payload_bytes, false);
        block.mark_fetched(started.reason);
        let counters = self.of(started.reason);
        counters.blocks.add(1);
        counters.bytes.add(started.stored_bytes());
        let is_new = MutexGuard::unlocked(state, || {
            let present = inner.residency.insert(Arc::clone(&block), false);
            Arc::ptr_eq(&present, &block)
        });
        if !is_new {
            counters.wasted_blocks.add(1);
            counters.wasted_bytes.add(Arena::slot_bytes(started.block_bytes as usize) as u64);
        }
        self.end_read(inner, state, &started, true, true);
    }

    /// A block of a chain is missing: those after it are of no use.
    fn fail(&self, inner: &Inner, state: &mut MutexGuard<'_, State>, started: &Started) {
        self.of(started.reason).failed_blocks.add(1);
        if started.reason != FetchReason::HotSet {
            let left = state.queue.cut(started);
            self.of(started.reason).cancelled_blocks.add(left);
        }
        self.end_read(inner, state, started, false, false);
    }

    fn end_read(
        &self,
        inner: &Inner,
        state: &mut MutexGuard<'_, State>,
        started: &Started,
        is_read: bool,
        is_there: bool,
    ) {
        if let Some((wish, end)) = state.queue.ended(started, is_read, is_there, inner.load_choice.read_bytes()) {
            MutexGuard::unlocked(state, || {
                // As after a load: the first block of a chain becomes the most recent. The hot set has another order.
                if wish.reason != FetchReason::HotSet {
                    let slot_bytes = Arena::slot_bytes(wish.block_bytes as usize);
                    inner.residency.touch_chain(wish.reads.iter().map(|(id, _)| (id, slot_bytes)));
                }
                wish.end(end);
            });
        }
    }
}

/// What came of the attempt to read a block.
enum Attempt {
    Reading,
    /// It is in DRAM already.
    Present,
    NoRoom,
}

#[cfg(test)]
mod tests;
