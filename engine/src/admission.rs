//! Which blocks are worth a drive write, within the write budget. A block that is refused stays in DRAM as a clean one;
//! it is asked about again when it is used. Objects are never asked about, but what they write counts, as does all that
//! the store writes by itself. Pure logic: time, volume and policy come from outside.

use std::num::NonZeroUsize;
use std::time::{SystemTime, UNIX_EPOCH};

use lru::LruCache;
use parking_lot::Mutex;
use pegaflow_tiers::WriteVolume;

use crate::counters::Counter;
use crate::write_budget::Ledger;

/// Refused blocks that are remembered.
const GHOSTS_MAX: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("above zero");
/// Sights after which a block needs no more, however short the budget is.
const SIGHTS_MAX: u32 = 4;

/// What time it is, in ms since 1970: the budget goes on over restarts.
pub(crate) trait Clock: Send + Sync {
    fn unix_ms(&self) -> u64;
}

/// The system's clock.
pub(crate) struct SystemClock;

impl Clock for SystemClock {
    fn unix_ms(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    }
}

/// A block that could be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offer {
    pub(crate) fingerprint: u64,
    /// Whether the block before it is in the store, or on its way there; also for a first block.
    pub(crate) has_parent: bool,
    /// What a place on the drive is worth to it, where the policy knows.
    pub(crate) worth: Option<f32>,
}

/// Why a block is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The budget is used up.
    Budget,
    /// The budget is short, and the block has not been seen often enough.
    Unproven,
    /// A block without its ancestors is worthless.
    Ancestor,
    /// The store is full of blocks that are worth more.
    Worth,
}

/// Decides.
pub(crate) trait Admit: Send {
    /// Whether a block is worth a write when the budget is filled to `fill` (1 full, 0 or less empty).
    fn admit(&mut self, offer: &Offer, fill: f64) -> Result<(), Refusal>;
}

/// With a budget at least half full everything is admitted. Below that a block must have been seen before, the more often
/// the emptier the budget is: it settles where what is admitted is what the budget allows, and those blocks are written
/// that are asked for again and again.
pub(crate) struct SeenBefore {
    /// How often blocks were seen that were refused.
    ghosts: LruCache<u64, u32>,
}

impl SeenBefore {
    pub(crate) fn new() -> Self {
        Self { ghosts: LruCache::new(GHOSTS_MAX) }
    }
}

impl Admit for SeenBefore {
    fn admit(&mut self, offer: &Offer, fill: f64) -> Result<(), Refusal> {
        let sights = (self.ghosts.peek(&offer.fingerprint).copied().unwrap_or(0) + 1).min(SIGHTS_MAX);
        if !offer.has_parent {
            // Seen all the same: when the ancestors are written it goes with them.
            self.ghosts.put(offer.fingerprint, sights);
            return Err(Refusal::Ancestor);
        }
        let needed = if fill >= 0.5 {
            1
        } else if fill > 0.0 {
            // One more for each halving.
            ((-fill.log2()).ceil() as u32).clamp(2, SIGHTS_MAX)
        } else {
            self.ghosts.put(offer.fingerprint, sights);
            return Err(Refusal::Budget);
        };
        if sights >= needed {
            self.ghosts.pop(&offer.fingerprint);
            return Ok(());
        }
        self.ghosts.put(offer.fingerprint, sights);
        Err(Refusal::Unproven)
    }
}

/// Levels of worth that are told apart, four to a doubling.
const LEVELS: usize = 128;
const LEVEL_OF_ONE: f32 = 100.0;
/// Offers after which the past counts half, and offers without which nothing is known of the others.
const OFFERS_MAX: u32 = 8192;
const OFFERS_MIN: u32 = 256;

/// As [`SeenBefore`]; and with a budget that is less than half full also those blocks are admitted that are worth most, the
/// fewer the emptier it is: with it filled to a fifth, the best two fifths of what was offered lately.
pub(crate) struct ByWorth {
    seen: SeenBefore,
    /// How many of the last offers were of each level.
    offers: [u32; LEVELS],
}

impl ByWorth {
    pub(crate) fn new() -> Self {
        Self { seen: SeenBefore::new(), offers: [0; LEVELS] }
    }

    /// Counts an offer; the share of offers that were worth as much or more.
    fn rank(&mut self, worth: f32) -> f64 {
        let level = (worth.max(f32::MIN_POSITIVE).log2() * 4.0 + LEVEL_OF_ONE).clamp(0.0, LEVELS as f32 - 1.0) as usize;
        if let Some(offers) = self.offers.get_mut(level) {
            *offers += 1;
        }
        let all: u32 = self.offers.iter().sum();
        let as_good: u32 = self.offers.iter().skip(level).sum();
        if all >= OFFERS_MAX {
            self.offers.iter_mut().for_each(|offers| *offers /= 2);
        }
        if all < OFFERS_MIN { 1.0 } else { f64::from(as_good) / f64::from(all) }
    }
}

impl Admit for ByWorth {
    fn admit(&mut self, offer: &Offer, fill: f64) -> Result<(), Refusal> {
        let rank = offer.worth.map_or(1.0, |worth| self.rank(worth));
        let verdict = self.seen.admit(offer, fill);
        if verdict == Err(Refusal::Unproven) && rank <= 2.0 * fill { Ok(()) } else { verdict }
    }
}

/// What there is to see of the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct BudgetStatus {
    /// 0: no bound.
    pub(crate) bytes_per_day: u64,
    pub(crate) spent_day_bytes: u64,
}

struct State {
    ledger: Ledger,
    admit: Box<dyn Admit>,
    /// What the store had written when the ledger was last brought up to date.
    counted_bytes: u64,
}

/// The way to the drive for blocks.
pub(crate) struct Admission {
    clock: Box<dyn Clock>,
    state: Mutex<State>,
    pub(crate) refused_budget: Counter,
    pub(crate) refused_unproven: Counter,
    pub(crate) refused_ancestor: Counter,
    pub(crate) refused_worth: Counter,
}

impl Admission {
    /// Goes on from the note of an earlier run. The store's volume starts at zero.
    pub(crate) fn new(
        bytes_per_day: Option<u64>,
        note: Option<&[u8]>,
        admit: Box<dyn Admit>,
        clock: Box<dyn Clock>,
    ) -> Self {
        let ledger = Ledger::from_note(bytes_per_day, note, clock.unix_ms());
        Self {
            clock,
            state: Mutex::new(State { ledger, admit, counted_bytes: 0 }),
            refused_budget: Counter::default(),
            refused_unproven: Counter::default(),
            refused_ancestor: Counter::default(),
            refused_worth: Counter::default(),
        }
    }

    /// Another write budget from now on; `None`: no bound.
    pub(crate) fn set_bytes_per_day(&self, bytes_per_day: Option<u64>, volume: WriteVolume) {
        let mut state = self.state.lock();
        state.bring_up_to_date(volume, self.clock.unix_ms());
        state.ledger.set_bytes_per_day(bytes_per_day);
    }

    /// Counts a block that is not written.
    pub(crate) fn count(&self, refusal: Refusal) {
        match refusal {
            Refusal::Budget => self.refused_budget.add(1),
            Refusal::Unproven => self.refused_unproven.add(1),
            Refusal::Ancestor => self.refused_ancestor.add(1),
            Refusal::Worth => self.refused_worth.add(1),
        }
    }

    /// Whether a block may be written, and a note to be kept durably before it is.
    pub(crate) fn offer(&self, offer: &Offer, volume: WriteVolume) -> (Result<(), Refusal>, Option<Vec<u8>>) {
        let mut state = self.state.lock();
        state.bring_up_to_date(volume, self.clock.unix_ms());
        if state.ledger.bytes_per_day().is_none() {
            return (Ok(()), state.ledger.due_note());
        }
        let fill = state.ledger.fill(volume.queued_bytes);
        let verdict = state.admit.admit(offer, fill);
        let note = state.ledger.due_note();
        drop(state);
        if let Err(refusal) = verdict {
            self.count(refusal);
        }
        (verdict, note)
    }

    pub(crate) fn status(&self, volume: WriteVolume) -> BudgetStatus {
        let mut state = self.state.lock();
        state.bring_up_to_date(volume, self.clock.unix_ms());
        let bytes_per_day = state.ledger.bytes_per_day().unwrap_or(0);
        BudgetStatus { bytes_per_day, spent_day_bytes: state.ledger.spent_day_bytes() }
    }

    /// The note to be kept when nothing more is written.
    pub(crate) fn last_note(&self, volume: WriteVolume) -> Vec<u8> {
        let mut state = self.state.lock();
        state.bring_up_to_date(volume, self.clock.unix_ms());
        state.ledger.last_note()
    }
}

impl State {
    fn bring_up_to_date(&mut self, volume: WriteVolume, now_ms: u64) {
        self.ledger.advance(now_ms);
        self.ledger.spend(volume.written_bytes.saturating_sub(self.counted_bytes));
        self.counted_bytes = self.counted_bytes.max(volume.written_bytes);
    }
}

#[cfg(test)]
mod tests;
