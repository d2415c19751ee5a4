//! What encoding has brought so far for one group of one namespace, and whether the next record is worth a try.

use parking_lot::Mutex;

use super::{Codec, CodecHint};

/// Payload bytes after which what was saved is judged, and how far back it is remembered.
const JUDGED_BYTES: u64 = 16 << 20;
/// A group whose records shrink by less than one part in this many is not encoded ...
const WORTH_PART: u64 = 20;
/// ... but for one record in so many, since what is in the cache may change.
const PROBE_EVERY: u64 = 64;

/// Why a record was not encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Skip {
    /// Records like it save too little, or this one did.
    Ratio,
    /// The encoders have enough to do.
    Queue,
    /// The drive reads faster than this machine decodes.
    Speed,
}

/// One group of one namespace.
#[derive(Debug)]
pub(crate) struct Lane {
    codec: Codec,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    raw_bytes: u64,
    stored_bytes: u64,
    skipped: u64,
}

impl State {
    fn is_worth_it(&self) -> bool {
        self.raw_bytes < JUDGED_BYTES || self.stored_bytes <= self.raw_bytes - self.raw_bytes / WORTH_PART
    }
}

impl Lane {
    pub(crate) fn new(hint: CodecHint) -> Self {
        Self { codec: hint.codec(), state: Mutex::new(State::default()) }
    }

    /// The codec to try for the next record; `None` if it is not worth it.
    pub(crate) fn next(&self) -> Option<Codec> {
        let mut state = self.state.lock();
        if !state.is_worth_it() {
            state.skipped += 1;
            if !state.skipped.is_multiple_of(PROBE_EVERY) {
                return None;
            }
        }
        Some(self.codec)
    }

    /// A record was tried: this is what it would have come to, `raw_bytes` if it did not shrink.
    pub(crate) fn note(&self, raw_bytes: u64, stored_bytes: u64) {
        let mut state = self.state.lock();
        if !state.is_worth_it() {
            // A probe: a good one gives all of them another chance.
            if stored_bytes > raw_bytes - raw_bytes / WORTH_PART {
                return;
            }
            *state = State::default();
        } else if state.raw_bytes >= 2 * JUDGED_BYTES {
            state.raw_bytes /= 2;
            state.stored_bytes /= 2;
        }
        state.raw_bytes += raw_bytes;
        state.stored_bytes += stored_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: u64 = 1 << 20;

    #[test]
    fn what_does_not_pay_is_tried_now_and_then_and_taken_up_again() {
        let lane = Lane::new(CodecHint::Bf16);
        for _ in 0..64 {
            if lane.next().is_some() {
                lane.note(RECORD, RECORD);
            }
        }
        let tried = (0..640).filter(|_| lane.next().map(|_| lane.note(RECORD, RECORD)).is_some()).count();
        assert_eq!(tried, 10);
        // Now the same records shrink.
        let tried = (0..640).filter(|_| lane.next().map(|_| lane.note(RECORD, RECORD * 2 / 3)).is_some()).count();
        assert!(tried > 560, "{tried}");
    }

    #[test]
    fn what_pays_is_always_encoded() {
        let lane = Lane::new(CodecHint::Fp8);
        for _ in 0..1000 {
            assert_eq!(lane.next(), Some(Codec::F8E4m3));
            lane.note(RECORD, RECORD * 5 / 6);
        }
    }
}
