//! Which block is read next. Pure bookkeeping: looks before requests before the hot set, each in the order in which they
//! came; a block that one wish is reading is not read for another one.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::BuildHasherDefault;
use std::sync::Weak;
use std::time::{Duration, Instant};

use pegaflow_tiers::{Location, RecordId, Store};

use super::{FetchEnd, FetchReason, FetchWish};
use crate::residency::KeyHasher;

/// What is being read.
pub(super) type Reading = HashSet<RecordId, BuildHasherDefault<KeyHasher>>;

/// Wishes that wait, at most.
const WISHES_MAX: usize = 1024;
/// Blocks that they wait for, at most: 20 MB.
const BLOCKS_MAX: usize = 1 << 18;

/// A block that is about to be read.
#[derive(Clone)]
pub(super) struct Started {
    /// Of its wish.
    pub(super) number: u64,
    pub(super) id: RecordId,
    pub(super) location: Location,
    pub(super) store: Weak<Store>,
    pub(super) block_bytes: u64,
    pub(super) reason: FetchReason,
    /// See [`FetchWish::asked`].
    pub(super) asked: u64,
    /// See [`FetchWish::asked_at`].
    pub(super) asked_at: Option<u64>,
    /// Another wish is reading it already.
    pub(super) is_double: bool,
}

impl Started {
    pub(super) fn stored_bytes(&self) -> u64 {
        self.location.bytes()
    }
}

/// A wish that has not ended.
struct Live {
    number: u64,
    wish: FetchWish,
    /// How many of its reads were handed out.
    next: usize,
    /// Bytes of the others.
    left_bytes: u64,
    in_flight: usize,
    /// It goes on when the policies know the request with this number.
    held_up: u64,
    began: Option<Instant>,
    /// What loads had read by then.
    loads_bytes: u64,
    end: FetchEnd,
}

impl Live {
    fn left(&self) -> &[(RecordId, Location)] {
        self.wish.reads.get(self.next..).unwrap_or_default()
    }
}

/// A wish that was taken out before it had ended. It is told so when this is dropped, outside of locks.
pub(super) struct Removed(Live);

impl Removed {
    pub(super) fn reason(&self) -> FetchReason {
        self.0.wish.reason
    }

    /// Blocks that will not be read.
    pub(super) fn left_blocks(&self) -> u64 {
        self.0.left().len() as u64
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Queue {
    /// By rank, each in the order of arrival.
    live: [VecDeque<Live>; FetchReason::KINDS],
    numbers: u64,
    blocks: usize,
    reading: Reading,
    /// Of these, as they are stored and in DRAM.
    reading_bytes: u64,
    reading_dram_bytes: u64,
    /// Requests whose wishes have brought blocks that no load has taken yet: bytes in DRAM, and until when that counts.
    ready: HashMap<FetchReason, (u64, Instant)>,
}

impl Queue {
    /// # Errors
    /// The wish, if there is no room for it, or it is a second look.
    pub(super) fn push(&mut self, wish: FetchWish) -> Result<(), Box<FetchWish>> {
        let wishes: usize = self.live.iter().map(VecDeque::len).sum();
        let is_full = wishes >= WISHES_MAX || self.blocks + wish.reads.len() > BLOCKS_MAX;
        match self.live.get_mut(wish.reason.rank()) {
            Some(of_rank) if !is_full && (wish.reason != FetchReason::LookAside || of_rank.is_empty()) => {
                self.numbers += 1;
                self.blocks += wish.reads.len();
                let left_bytes = wish.reads.iter().map(|(_, location)| location.bytes()).sum();
                let end = FetchEnd { is_whole: true, ..FetchEnd::default() };
                let number = self.numbers;
                of_rank.push_back(Live {
                    number,
                    wish,
                    next: 0,
                    left_bytes,
                    in_flight: 0,
                    held_up: 0,
                    began: None,
                    loads_bytes: 0,
                    end,
                });
                Ok(())
            }
            _ => Err(Box::new(wish)),
        }
    }

    /// Whether one more read may be in flight.
    pub(super) fn has_room(&self, reads_max: usize, bytes_max: u64, dram_bytes_max: u64) -> bool {
        let is_in_bounds = self.reading.len() < reads_max
            && self.reading_bytes < bytes_max
            && self.reading_dram_bytes < dram_bytes_max;
        self.reading.is_empty() || is_in_bounds
    }

    /// Whether requests may have more brought to DRAM before they take what is there.
    fn has_budget(&self, request_bytes_max: u64) -> bool {
        let requests = self.live.get(FetchReason::REQUEST.rank()).into_iter().flatten();
        let in_flight: u64 = requests.map(|live| live.in_flight as u64 * live.wish.block_bytes).sum();
        let ready: u64 = self.ready.values().map(|(bytes, _)| bytes).sum();
        ready + in_flight < request_bytes_max
    }

    /// The next block to read; `handed` is the last request that the policies know, `loads_bytes` what loads have
    /// read so far. Requests have at most `request_bytes_max` in DRAM that they have not loaded yet.
    pub(super) fn next(
        &mut self,
        handed: u64,
        loads_bytes: u64,
        request_bytes_max: u64,
        now: Instant,
    ) -> Option<Started> {
        let has_budget = self.has_budget(request_bytes_max);
        let may_go_on = |live: &&mut Live| {
            let is_allowed = has_budget || live.wish.reason.rank() != FetchReason::REQUEST.rank();
            is_allowed && live.held_up <= handed && live.next < live.wish.reads.len()
        };
        let live = self.live.iter_mut().flatten().find(may_go_on)?;
        let (id, location) = *live.wish.reads.get(live.next)?;
        if live.began.is_none() {
            live.began = Some(now);
            (live.loads_bytes, live.end.beside_bytes) = (loads_bytes, self.reading_bytes);
        }
        (live.next, live.held_up) = (live.next + 1, 0);
        live.left_bytes -= location.bytes();
        live.in_flight += 1;
        let is_double = !self.reading.insert(id);
        if !is_double {
            self.reading_bytes += location.bytes();
            self.reading_dram_bytes += live.wish.block_bytes;
        }
        Some(Started {
            number: live.number,
            id,
            location,
            store: live.wish.store.clone(),
            block_bytes: live.wish.block_bytes,
            reason: live.wish.reason,
            asked: live.wish.asked,
            asked_at: live.wish.asked_at,
            is_double,
        })
    }

    /// The block that was to be read last is to be read later: when the policies know the request that its wish is for.
    pub(super) fn hold_up(&mut self, started: &Started) {
        self.forget_reading(started);
        if let Some(live) = self.find(started) {
            live.in_flight -= 1;
            live.next -= 1;
            live.left_bytes += started.stored_bytes();
            live.held_up = started.asked;
            if live.next == 0 {
                // Its time begins when it goes on.
                live.began = None;
            }
        }
    }

    /// Whether anything is left to read.
    pub(super) fn is_waiting(&self) -> bool {
        self.live.iter().flatten().any(|live| !live.left().is_empty())
    }

    /// Whether a wish waits for the policies.
    pub(super) fn is_held_up(&self) -> bool {
        self.live.iter().flatten().any(|live| live.held_up > 0)
    }

    /// A read has ended, or was not needed. The wish with its end, if that was the last of it.
    pub(super) fn ended(
        &mut self,
        started: &Started,
        is_read: bool,
        is_there: bool,
        loads_bytes: u64,
    ) -> Option<(FetchWish, FetchEnd)> {
        self.forget_reading(started);
        let of_rank = self.live.get_mut(started.reason.rank())?;
        let live = of_rank.iter_mut().find(|live| live.number == started.number)?;
        live.in_flight -= 1;
        live.end.is_whole &= is_there;
        if is_read {
            live.end.blocks += 1;
            live.end.bytes += started.stored_bytes();
            if matches!(started.reason, FetchReason::Request { .. }) {
                let ready = self.ready.entry(started.reason).or_insert((0, live.wish.deadline));
                ready.0 += started.block_bytes;
            }
        }
        if live.in_flight > 0 || !live.left().is_empty() {
            return None;
        }
        let of_rank = self.live.get_mut(started.reason.rank())?;
        let at = of_rank.iter().position(|live| live.number == started.number)?;
        let Live { wish, began, mut end, loads_bytes: before, .. } = of_rank.remove(at)?;
        end.beside_bytes += loads_bytes.saturating_sub(before);
        self.blocks -= wish.reads.len();
        end.took = began.map_or(Duration::ZERO, |began| began.elapsed());
        Some((wish, end))
    }

    /// Nothing more of the wish is read; how many blocks that leaves out.
    pub(super) fn cut(&mut self, started: &Started) -> u64 {
        let Some(live) = self.find(started) else { return 0 };
        let left = live.left().len();
        (live.next, live.left_bytes) = (live.wish.reads.len(), 0);
        live.end.is_whole &= left == 0;
        left as u64
    }

    /// Takes out wishes. What is being read of them goes on.
    pub(super) fn remove(&mut self, is_meant: impl Fn(FetchReason) -> bool) -> Vec<Removed> {
        self.ready.retain(|reason, _| !is_meant(*reason));
        self.remove_live(|live| is_meant(live.wish.reason))
    }

    /// Takes out wishes whose deadline has come.
    pub(super) fn remove_late(&mut self, now: Instant) -> Vec<Removed> {
        self.ready.retain(|_, (_, until)| *until > now);
        self.remove_live(|live| live.wish.deadline <= now)
    }

    fn remove_live(&mut self, is_meant: impl Fn(&Live) -> bool) -> Vec<Removed> {
        let mut removed = Vec::new();
        for of_rank in &mut self.live {
            let (gone, kept) = std::mem::take(of_rank).into_iter().partition(&is_meant);
            *of_rank = kept;
            let gone: VecDeque<Live> = gone;
            removed.extend(gone.into_iter().map(Removed));
        }
        self.blocks -= removed.iter().map(|Removed(live)| live.wish.reads.len()).sum::<usize>();
        removed
    }

    /// When the first deadline comes.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let of_ready = self.ready.values().map(|(_, until)| *until);
        self.live.iter().flatten().map(|live| live.wish.deadline).chain(of_ready).min()
    }

    /// Bytes to be read until a wish has ended: its own, those before it and those in flight.
    pub(super) fn left_bytes(&self, reason: FetchReason) -> Option<u64> {
        let mut before = self.reading_bytes;
        for live in self.live.iter().flatten() {
            before += live.left_bytes;
            if live.wish.reason == reason {
                return Some(before);
            }
        }
        None
    }

    /// Bytes that wait to be read or are being read.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.reading_bytes + self.live.iter().flatten().map(|live| live.left_bytes).sum::<u64>()
    }

    /// What is being read.
    pub(super) fn reading(&self) -> &Reading {
        &self.reading
    }

    fn forget_reading(&mut self, started: &Started) {
        if !started.is_double && self.reading.remove(&started.id) {
            self.reading_bytes -= started.stored_bytes();
            self.reading_dram_bytes -= started.block_bytes;
        }
    }

    fn find(&mut self, started: &Started) -> Option<&mut Live> {
        let of_rank = self.live.get_mut(started.reason.rank())?;
        of_rank.iter_mut().find(|live| live.number == started.number)
    }
}

#[cfg(test)]
mod tests;
