//! How many bytes a day may go to the drive: the unit that operators write, and the ledger that keeps to it. Pure
//! arithmetic; whoever asks says what time it is. The ledger survives restarts, which therefore do not fill it up.

use std::fmt;
use std::str::FromStr;

use pegaflow_tiers::{Error, ErrorKind, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::ByteSize;

const DAY_MS: u64 = 24 * HOUR_MS;
const HOUR_MS: u64 = 60 * 60 * 1000;
const HOURS: usize = 24;
/// What was not spent may be saved up for this part of a day.
const BURST_SHARE: u64 = 24;
/// But not less than this, or a single group commit would empty it.
const BURST_BYTES_MIN: u64 = 64 << 20;
/// What may be written between two durable notes of the ledger; without a budget, where only a sum is at stake, more.
const NOTE_SHARE: u64 = 16;
const NOTE_BYTES_UNLIMITED: u64 = 1 << 30;
const NOTE_VERSION: u8 = 1;

/// A bound on what is written to the drive: `500GiB/day`, or `1.5dwpd`, drive writes per day, where the drive counts as
/// large as the configured capacity of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteBudget {
    /// Bytes a day.
    BytesPerDay(ByteSize),
    /// Thousandths of the store's capacity a day.
    MilliDriveWritesPerDay(u32),
}

impl WriteBudget {
    /// Bytes a day, for a store of `capacity_bytes`.
    pub fn bytes_per_day(self, capacity_bytes: u64) -> u64 {
        match self {
            Self::BytesPerDay(bytes) => bytes.0,
            Self::MilliDriveWritesPerDay(milli) => {
                u64::try_from(u128::from(capacity_bytes) * u128::from(milli) / 1000).unwrap_or(u64::MAX)
            }
        }
    }
}

impl FromStr for WriteBudget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            let message = format!("'{text}' is not a write budget; write for example 500GiB/day or 1.5dwpd");
            Error::new(ErrorKind::InvalidInput, message)
        };
        let lower = text.trim().to_ascii_lowercase();
        if let Some(size) = lower.strip_suffix("/day") {
            return Ok(Self::BytesPerDay(size.parse().map_err(|_| bad())?));
        }
        let number = lower.strip_suffix("dwpd").ok_or_else(bad)?.trim();
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return Err(bad());
        }
        let milli = (number.parse::<f64>().map_err(|_| bad())? * 1000.0).round();
        if milli > f64::from(u32::MAX) { Err(bad()) } else { Ok(Self::MilliDriveWritesPerDay(milli as u32)) }
    }
}

impl fmt::Display for WriteBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BytesPerDay(bytes) => write!(f, "{bytes}/day"),
            Self::MilliDriveWritesPerDay(milli) => write!(f, "{}dwpd", f64::from(*milli) / 1000.0),
        }
    }
}

impl Serialize for WriteBudget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::BytesPerDay(bytes) => serializer.collect_str(&format_args!("{}/day", bytes.0)),
            Self::MilliDriveWritesPerDay(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for WriteBudget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What was spent and what may be spent: a token bucket, and the last day by hours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ledger {
    /// `None`: no bound.
    bytes_per_day: Option<u64>,
    /// What may be spent now; below zero after what could not be refused.
    tokens: i64,
    /// The part of a byte that has come in besides, in bytes times `DAY_MS`.
    remainder: u64,
    at_ms: u64,
    /// Spent in each hour of the last day, by the hour's number modulo 24.
    hours: [u64; HOURS],
    /// Spent since the last note.
    unnoted: u64,
    is_noted: bool,
}

impl Ledger {
    /// A new ledger, which may be spent from as after a quiet while.
    pub(crate) fn new(bytes_per_day: Option<u64>, now_ms: u64) -> Self {
        let tokens = bytes_per_day.map_or(0, burst_bytes) as i64;
        Self { bytes_per_day, tokens, remainder: 0, at_ms: now_ms, hours: [0; HOURS], unnoted: 0, is_noted: false }
    }

    /// A ledger that goes on from a note; a new one if there is none or it cannot be read. Time that has passed since
    /// counts, up to the limit on what may be saved up.
    pub(crate) fn from_note(bytes_per_day: Option<u64>, note: Option<&[u8]>, now_ms: u64) -> Self {
        let mut ledger = Self::new(bytes_per_day, now_ms);
        if let Some((tokens, at_ms, hours)) = note.and_then(read_note) {
            (ledger.tokens, ledger.at_ms, ledger.hours) = (tokens.min(ledger.tokens), at_ms, hours);
            ledger.advance(now_ms);
        }
        ledger
    }

    /// Another bound from now on. What was saved up stays, as far as it may be saved up; a first bound begins with nothing.
    pub(crate) fn set_bytes_per_day(&mut self, bytes_per_day: Option<u64>) {
        if self.bytes_per_day == bytes_per_day {
            return;
        }
        let saved = self.bytes_per_day.map_or(0, |_| self.tokens);
        self.tokens = bytes_per_day.map_or(0, |rate| saved.min(burst_bytes(rate) as i64));
        // The next note follows at once: the step of the last one was another.
        (self.bytes_per_day, self.remainder, self.is_noted) = (bytes_per_day, 0, false);
    }

    /// Lets time pass. A clock that goes back stands still until it has caught up; one that leaps ahead fills the bucket.
    pub(crate) fn advance(&mut self, now_ms: u64) {
        let passed_ms = now_ms.saturating_sub(self.at_ms);
        if passed_ms == 0 {
            return;
        }
        let (before, now) = (self.at_ms / HOUR_MS, now_ms / HOUR_MS);
        for hour in (before + 1..=now).take(HOURS) {
            self.hours[hour_index(hour)] = 0;
        }
        if now - before >= HOURS as u64 {
            self.hours = [0; HOURS];
        }
        self.at_ms = now_ms;
        let Some(rate) = self.bytes_per_day else { return };
        let come = u128::from(rate) * u128::from(passed_ms) + u128::from(self.remainder);
        let tokens = i128::from(self.tokens) + (come / u128::from(DAY_MS)) as i128;
        self.remainder = (come % u128::from(DAY_MS)) as u64;
        self.tokens = tokens.min(i128::from(burst_bytes(rate))) as i64;
    }

    /// Spends bytes that were written, allowed or not.
    pub(crate) fn spend(&mut self, bytes: u64) {
        let hour = hour_index(self.at_ms / HOUR_MS);
        self.hours[hour] = self.hours[hour].saturating_add(bytes);
        self.unnoted = self.unnoted.saturating_add(bytes);
        if self.bytes_per_day.is_some() {
            self.tokens = self.tokens.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    /// How full the bucket is with `promised_bytes` taken off: at most 1, at or below 0 if nothing may be spent. Without
    /// a budget always full.
    pub(crate) fn fill(&self, promised_bytes: u64) -> f64 {
        match self.bytes_per_day {
            None => 1.0,
            Some(rate) => (self.tokens as f64 - promised_bytes as f64) / burst_bytes(rate) as f64,
        }
    }

    /// Bytes that were spent in the last 23 to 24 hours.
    pub(crate) fn spent_day_bytes(&self) -> u64 {
        self.hours.iter().fold(0, |sum, hour| sum.saturating_add(*hour))
    }

    /// Bytes a day that may be spent, if there is a bound.
    pub(crate) fn bytes_per_day(&self) -> Option<u64> {
        self.bytes_per_day
    }

    /// A note to be kept durably, if it is time for one. It says that more was spent than was, by as much as may be spent
    /// before the next note: a crash in between does not give anything back.
    pub(crate) fn due_note(&mut self) -> Option<Vec<u8>> {
        let step = self.bytes_per_day.map_or(NOTE_BYTES_UNLIMITED, |rate| burst_bytes(rate) / NOTE_SHARE);
        if self.is_noted && self.unnoted < step {
            return None;
        }
        (self.is_noted, self.unnoted) = (true, 0);
        Some(self.note_with(self.tokens.saturating_sub(step as i64)))
    }

    /// The note of a ledger that nothing more is spent from, until it is read again.
    pub(crate) fn last_note(&self) -> Vec<u8> {
        self.note_with(self.tokens)
    }

    fn note_with(&self, tokens: i64) -> Vec<u8> {
        let mut note = vec![NOTE_VERSION];
        note.extend(tokens.to_le_bytes());
        note.extend(self.at_ms.to_le_bytes());
        self.hours.iter().for_each(|hour| note.extend(hour.to_le_bytes()));
        note
    }
}

fn hour_index(hour: u64) -> usize {
    (hour % HOURS as u64) as usize
}

/// What may be saved up.
fn burst_bytes(bytes_per_day: u64) -> u64 {
    (bytes_per_day / BURST_SHARE).max(BURST_BYTES_MIN).min(bytes_per_day.max(1)).min(i64::MAX as u64)
}

fn read_note(note: &[u8]) -> Option<(i64, u64, [u64; HOURS])> {
    let (version, rest) = note.split_first()?;
    let (words, tail) = rest.as_chunks::<8>();
    if *version != NOTE_VERSION || words.len() != HOURS + 2 || !tail.is_empty() {
        return None;
    }
    let mut hours = [0; HOURS];
    for (hour, word) in hours.iter_mut().zip(words.get(2..)?) {
        *hour = u64::from_le_bytes(*word);
    }
    Some((i64::from_le_bytes(*words.first()?), u64::from_le_bytes(*words.get(1)?), hours))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const START_MS: u64 = 1_790_000_000_000 / HOUR_MS * HOUR_MS;

    fn ledger(bytes_per_day: u64) -> Ledger {
        Ledger::new(Some(bytes_per_day), START_MS)
    }

    #[test]
    fn budgets_are_read_as_people_write_them() {
        let read = |text: &str| text.parse::<WriteBudget>().ok();
        assert_eq!(read("500GiB/day"), Some(WriteBudget::BytesPerDay(ByteSize::gib(500))));
        assert_eq!(read(" 1.5 TB/Day"), Some(WriteBudget::BytesPerDay(ByteSize(1_500_000_000_000))));
        assert_eq!(read("1.5dwpd"), Some(WriteBudget::MilliDriveWritesPerDay(1500)));
        assert_eq!(read("0.3 DWPD"), Some(WriteBudget::MilliDriveWritesPerDay(300)));
        for bad in ["", "500GiB", "dwpd", "-1dwpd", "1e9dwpd", "infdwpd", "nandwpd", "5000000dwpd", "x/day", "1/hour"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(WriteBudget::MilliDriveWritesPerDay(1500).bytes_per_day(200 * GIB), 300 * GIB);
        for budget in ["500GiB/day", "1.5dwpd", "12345/day"] {
            let budget = read(budget).expect("good");
            let json = serde_json::to_string(&budget).expect("written");
            assert_eq!(serde_json::from_str::<WriteBudget>(&json).expect("read"), budget, "{json}");
        }
    }

    #[test]
    fn a_day_brings_a_days_bytes_however_often_it_is_looked_at() {
        for step_ms in [1, 777, 60_000, HOUR_MS] {
            let mut ledger = ledger(10 * GIB);
            ledger.spend(10 * GIB);
            let mut now = START_MS;
            while now < START_MS + DAY_MS / 4 {
                now += step_ms;
                ledger.advance(now);
            }
            let passed = u128::from(now - START_MS);
            let expected = i128::from(burst_bytes(10 * GIB)) - i128::from(10 * GIB)
                + (u128::from(10 * GIB) * passed / u128::from(DAY_MS)) as i128;
            assert_eq!(i128::from(ledger.tokens), expected, "steps of {step_ms} ms");
        }
    }

    #[test]
    fn what_is_saved_up_is_bounded_and_clocks_that_go_wrong_give_nothing_away() {
        let mut ledger = ledger(240 * GIB);
        assert!(ledger.fill(0) == 1.0 && ledger.fill(5 * GIB) == 0.5);
        ledger.advance(START_MS + 100 * DAY_MS);
        assert!(ledger.fill(0) == 1.0);
        ledger.spend(15 * GIB);
        assert!(ledger.fill(0) == -0.5);
        let before = ledger.clone();
        ledger.advance(START_MS);
        assert_eq!(ledger, before);
        ledger.advance(START_MS + 100 * DAY_MS + HOUR_MS / 2);
        assert!(ledger.fill(0) == 0.0);
        assert!(Ledger::new(None, START_MS).fill(u64::MAX) == 1.0);
    }

    #[test]
    fn a_restart_fills_nothing_up_and_a_crash_gives_nothing_back() {
        let mut ledger = ledger(240 * GIB);
        let mut note = ledger.due_note().expect("the first");
        for _ in 0..1000 {
            ledger.spend(7 << 20);
            // What a crash at this point would leave.
            let after = Ledger::from_note(Some(240 * GIB), Some(&note), START_MS);
            assert!(after.tokens <= ledger.tokens + (7 << 20), "{} after {}", after.tokens, ledger.tokens);
            note = ledger.due_note().unwrap_or(note);
        }
        let after = Ledger::from_note(Some(240 * GIB), Some(&ledger.last_note()), START_MS);
        assert_eq!((after.tokens, after.hours), (ledger.tokens, ledger.hours));
        // An hour later, and with half of the budget.
        let later = Ledger::from_note(Some(120 * GIB), Some(&ledger.last_note()), START_MS + HOUR_MS / 10);
        assert_eq!(later.tokens, ledger.tokens.min(5 << 30) + 120 * (GIB as i64) / 240);
        for bad in [&[][..], &note[1..], &[9; 209], &note[..100]] {
            assert_eq!(Ledger::from_note(Some(GIB), Some(bad), START_MS), Ledger::new(Some(GIB), START_MS));
        }
    }

    #[test]
    fn another_bound_gives_nothing_away() {
        let mut ledger = ledger(240 * GIB);
        ledger.spend(3 << 30);
        let (tokens, hours) = (ledger.tokens, ledger.hours);
        ledger.set_bytes_per_day(Some(480 * GIB));
        assert_eq!((ledger.tokens, ledger.hours), (tokens, hours), "a larger bound comes in with time");
        assert!(ledger.due_note().is_some());
        ledger.set_bytes_per_day(Some(24 * GIB));
        assert_eq!(ledger.tokens, 1 << 30, "an hour of it may be saved up");
        ledger.spend(2 << 30);
        ledger.set_bytes_per_day(Some(240 * GIB));
        assert_eq!(ledger.tokens, -(1 << 30), "what is owed stays owed");
        ledger.set_bytes_per_day(None);
        assert!(ledger.fill(u64::MAX) == 1.0);
        ledger.set_bytes_per_day(Some(240 * GIB));
        assert_eq!(ledger.fill(0), 0.0);
        ledger.advance(START_MS + HOUR_MS / 2);
        assert!((ledger.fill(0) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn the_last_day_is_counted_by_hours() {
        let mut ledger = Ledger::new(None, START_MS);
        for hour in 0..30 {
            ledger.advance(START_MS + hour * HOUR_MS);
            ledger.spend(1);
        }
        assert_eq!(ledger.spent_day_bytes(), 24);
        ledger.advance(START_MS + 39 * HOUR_MS);
        assert_eq!(ledger.spent_day_bytes(), 14);
        ledger.advance(START_MS + 1000 * HOUR_MS);
        assert_eq!(ledger.spent_day_bytes(), 0);
    }
}
