//! The oracle: for each record what was last reported durable, and what came after it and may or may not be there. The
//! bytes of a record are a stream of random numbers seeded by its key and version, so nothing has to be kept of them.

use std::collections::{BTreeMap, HashSet};

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

use super::SimFailureKind;
use crate::index::Location;

/// The version of every block: its bytes follow from its key. Objects begin above.
pub(in crate::nvme) const BLOCK_VERSION: u64 = 0;

/// What can be true of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nvme) enum Fact {
    /// It was removed, or never was.
    Absent,
    /// It is there, with the bytes of this version.
    There { version: u64, bytes: usize },
}

/// An operation that was not reported as durable.
#[derive(Debug, Clone, Copy)]
struct Unsure {
    operation: u64,
    fact: Fact,
    /// It may be found in a later life, as long as nothing newer is durable: it was reported as failed while the power was
    /// there, or is a copy of a block behind one that went.
    may_come_back: bool,
}

impl Unsure {
    /// What is left of it where the newest record of the identity may have gone with its region. Blocks are never flagged
    /// as replaced: nothing but an entry of the index, which is gone too, stood before an older copy.
    fn behind_what_went(&self) -> Option<Self> {
        let is_block = matches!(self.fact, Fact::There { version: BLOCK_VERSION, .. });
        (is_block || self.may_come_back).then_some(Self { may_come_back: true, ..*self })
    }
}

/// What is known of one record.
#[derive(Debug, Clone)]
struct Track {
    sure: Fact,
    /// Where it was reported.
    location: Option<Location>,
    later: Vec<Unsure>,
}

impl Default for Track {
    fn default() -> Self {
        Self { sure: Fact::Absent, location: None, later: Vec::new() }
    }
}

/// What was found where a record should be.
#[derive(Debug, Clone)]
pub(in crate::nvme) enum Seen {
    Nothing,
    Bytes(Location, Vec<u8>),
}

/// What is known of all records.
#[derive(Default)]
pub(in crate::nvme) struct Model {
    tracks: BTreeMap<u64, Track>,
    /// Lives of regions that were given up, or may have been: what was in them may be gone.
    given_up: HashSet<(u32, u64)>,
}

/// The bytes of a version.
pub(in crate::nvme) fn content(name: u64, version: u64, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    SmallRng::seed_from_u64(name.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version.wrapping_mul(0xd134_2543_de82_ef95))
        .fill_bytes(&mut content);
    content
}

/// A rebuild can not tell a torn replacement from a decayed one: better nothing than something old.
fn may_be_hidden(track: &Track, was_rebuilt: bool) -> bool {
    was_rebuilt && track.later.iter().any(|unsure| unsure.fact != Fact::Absent)
}

fn is(name: u64, fact: Fact, found: &[u8]) -> bool {
    matches!(fact, Fact::There { version, bytes } if bytes == found.len() && content(name, version, bytes) == found)
}

type Verdict = Result<(), (SimFailureKind, String)>;

impl Model {
    /// All records that there ever were.
    pub(in crate::nvme) fn names(&self) -> Vec<u64> {
        self.tracks.keys().copied().collect()
    }

    /// What was last reported.
    pub(in crate::nvme) fn sure(&self, name: u64) -> Fact {
        self.tracks.get(&name).map_or(Fact::Absent, |track| track.sure)
    }

    /// What was last accepted.
    pub(in crate::nvme) fn newest(&self, name: u64) -> Fact {
        let track = self.tracks.get(&name);
        track.map_or(Fact::Absent, |track| track.later.last().map_or(track.sure, |unsure| unsure.fact))
    }

    /// An operation was accepted.
    pub(in crate::nvme) fn accepted(&mut self, name: u64, operation: u64, fact: Fact) {
        let unsure = Unsure { operation, fact, may_come_back: false };
        self.tracks.entry(name).or_default().later.push(unsure);
    }

    /// An operation was reported as durable.
    pub(in crate::nvme) fn durable(&mut self, name: u64, operation: u64, location: Location) {
        let track = self.tracks.entry(name).or_default();
        if let Some(place) = track.later.iter().position(|unsure| unsure.operation == operation) {
            (track.sure, track.location) = (track.later[place].fact, Some(location));
            track.later.drain(..=place);
        }
    }

    /// An operation was reported as failed by a store with power.
    pub(in crate::nvme) fn failed(&mut self, name: u64, operation: u64) {
        let later = self.tracks.entry(name).or_default().later.iter_mut();
        later.filter(|unsure| unsure.operation == operation).for_each(|unsure| unsure.may_come_back = true);
    }

    /// A record was purged with its namespace: nothing of it may be found again.
    pub(in crate::nvme) fn purged(&mut self, name: u64) {
        self.tracks.insert(name, Track::default());
    }

    /// A life of a region is over, or may be.
    pub(in crate::nvme) fn given_up(&mut self, region: u32, generation: u64) {
        self.given_up.insert((region, generation));
    }

    /// What lies at some places is over.
    pub(in crate::nvme) fn given_up_at(&mut self, is_over: impl Fn(&Location) -> bool) {
        let locations = self.tracks.values().filter_map(|track| track.location).filter(is_over);
        self.given_up.extend(locations.map(|location| (location.region, location.generation)));
    }

    fn may_be_gone(&self, track: &Track) -> bool {
        track.location.is_none_or(|location| self.given_up.contains(&(location.region, location.generation)))
    }

    /// Judges what a running store returns.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(in crate::nvme) fn check(&self, name: u64, seen: &Seen) -> Verdict {
        let nothing = Track::default();
        let track = self.tracks.get(&name).unwrap_or(&nothing);
        match seen {
            Seen::Nothing => self.judge_absence(name, track, false),
            Seen::Bytes(_, found) if is(name, track.sure, found) => Ok(()),
            Seen::Bytes(location, found) => Err(self.judge_bytes(name, track, location, found)),
        }
    }

    /// Judges what a store returns that was opened after a crash, and knows it from then on. Where regions have left, a
    /// newer version that nobody was promised may have counted first and gone with one of them.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(in crate::nvme) fn settle(&mut self, name: u64, seen: &Seen, was_rebuilt: bool, have_left: bool) -> Verdict {
        let track = self.tracks.get(&name).cloned().unwrap_or_default();
        let mut next = track.clone();
        next.later.retain(|unsure| unsure.may_come_back);
        match seen {
            Seen::Nothing => {
                self.judge_absence(name, &track, was_rebuilt || have_left)?;
                next.location = None;
                // Hidden by a torn replacement, or gone with its region: where the index comes back it may be found again.
                let may_come_back = self.may_be_gone(&track) || may_be_hidden(&track, was_rebuilt);
                if !may_come_back {
                    next.sure = Fact::Absent;
                }
                if have_left {
                    next.later = track.later.iter().filter_map(Unsure::behind_what_went).collect();
                }
            }
            Seen::Bytes(location, found) => {
                let is_known = track.location == Some(*location) && is(name, track.sure, found);
                let later = track.later.iter().rposition(|unsure| is(name, unsure.fact, found));
                if let Some(place) = later.filter(|_| !is_known) {
                    next.sure = track.later[place].fact;
                    let operation = track.later[place].operation;
                    next.later.retain(|unsure| unsure.operation > operation);
                } else if !is(name, track.sure, found) {
                    return Err(self.judge_bytes(name, &track, location, found));
                }
                next.location = Some(*location);
            }
        }
        self.tracks.insert(name, next);
        Ok(())
    }

    fn judge_absence(&self, name: u64, track: &Track, was_rebuilt: bool) -> Verdict {
        let was_removed = track.later.iter().any(|unsure| unsure.fact == Fact::Absent);
        if track.sure == Fact::Absent || self.may_be_gone(track) || was_removed || may_be_hidden(track, was_rebuilt) {
            return Ok(());
        }
        Err((SimFailureKind::LostDurable, format!("record {name} is not there: {track:?}")))
    }

    fn judge_bytes(&self, name: u64, track: &Track, location: &Location, found: &[u8]) -> (SimFailureKind, String) {
        let version = (0..10_000).find(|version| content(name, *version, found.len()) == found);
        match version {
            Some(version) => (
                SimFailureKind::CameBack,
                format!("record {name} came back in version {version} at {location:?}: {track:?}"),
            ),
            None => (SimFailureKind::WrongBytes, format!("record {name} has wrong bytes at {location:?}: {track:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 100;

    fn put(model: &mut Model, operation: u64, version: u64) {
        model.accepted(1, operation, Fact::There { version, bytes: BYTES });
    }

    fn place(region: u32) -> Location {
        Location { region, generation: 1, page: 2, pages: 2 }
    }

    /// Two copies that nobody was promised, of which the newer one went with its region.
    fn after_the_newer_went(version: u64, newer: u64) -> Model {
        let mut model = Model::default();
        put(&mut model, 1, version);
        put(&mut model, 2, newer);
        model.settle(1, &Seen::Nothing, false, true).expect("a region has left");
        model
    }

    fn come_back(model: &mut Model, version: u64) -> Verdict {
        model.settle(1, &Seen::Bytes(place(0), content(1, version, BYTES)), true, false)
    }

    #[test]
    fn an_older_copy_of_a_block_may_be_found_where_the_newer_one_went() {
        let mut model = after_the_newer_went(BLOCK_VERSION, BLOCK_VERSION);
        model.settle(1, &Seen::Nothing, false, false).expect("nothing was promised");
        come_back(&mut model, BLOCK_VERSION).expect("the same bytes");
        assert!(model.settle(1, &Seen::Nothing, true, false).is_err(), "it was found, so it stays");
    }

    #[test]
    fn an_older_version_of_an_object_may_not() {
        assert!(come_back(&mut after_the_newer_went(1, 2), 1).is_err());
        let mut model = Model::default();
        put(&mut model, 1, BLOCK_VERSION);
        model.settle(1, &Seen::Nothing, false, false).expect("nothing was promised");
        assert!(come_back(&mut model, BLOCK_VERSION).is_err(), "no region has left: a crash has cut it off");
    }

    #[test]
    fn nor_a_block_that_was_removed_meanwhile() {
        let mut model = after_the_newer_went(BLOCK_VERSION, BLOCK_VERSION);
        model.accepted(1, 3, Fact::Absent);
        model.durable(1, 3, place(1));
        assert!(come_back(&mut model, BLOCK_VERSION).is_err());
    }
}
