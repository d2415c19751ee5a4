//! One shard of the table: open addressing in one slice of 24-byte entries, linear probing, deletion by shifting
//! back, so that there are no tombstones. At least one entry is always empty, which ends every probe. Sized for
//! memory: full at 13/16, resized to 10/16, in both directions. Knows nothing of locks and of other shards.

use super::Uses;
use crate::index::Location;

/// What the table keeps of one record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    /// The record's fingerprint; [`EMPTY`] marks an entry that holds nothing.
    fingerprint: u64,
    packed: u64,
    parent: u32,
    generation: u16,
    uses: Uses,
}

const EMPTY: u64 = 0;
const VACANT: Entry = Entry { fingerprint: EMPTY, packed: 0, parent: 0, generation: 0, uses: Uses::NONE };

/// 48 bytes a key are promised; with 24-byte entries that leaves a load of at least one half.
const _: () = assert!(size_of::<Entry>() == 24);

/// What the allocator keeps beside one allocation, an estimate that is counted as memory of the table.
const ALLOCATION_BYTES: usize = 16;

/// Up to this capacity a shard is filled until one entry is empty: a whole scan is a handful of cache lines, and with
/// few keys a shard every entry counts.
const DENSE_CAPACITY: usize = 32;

impl Entry {
    pub(super) fn new(fingerprint: u64, parent: u32, location: &Location) -> Self {
        // The contract of the table: of a generation it keeps the low 16 bits.
        let generation = location.generation as u16;
        Self { fingerprint, packed: location.pack(), parent, generation, uses: Uses::NONE }
    }

    pub(super) fn location(&self) -> Location {
        Location::unpack(self.packed, self.generation)
    }

    pub(super) fn parent(&self) -> u32 {
        self.parent
    }

    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    pub(super) fn uses(&self) -> Uses {
        self.uses
    }

    /// The region that it says the record lies in, by number and low bits of the generation.
    pub(super) fn is_in(&self, region: u32, generation: u16) -> bool {
        !self.is_vacant() && self.generation == generation && self.location().region == region
    }

    /// Whether it says that the record lies there.
    pub(super) fn is_at(&self, location: &Location) -> bool {
        location.is_valid() && self.packed == location.pack() && self.generation == location.generation as u16
    }

    fn is_vacant(&self) -> bool {
        self.fingerprint == EMPTY
    }
}

/// Spreads a fingerprint over shards (upper 8 bits) and entries (the 32 bits below them): the two halves of a full
/// product, folded, so that every bit of the fingerprint counts, whichever bits the keys have in common.
pub(super) fn spread(fingerprint: u64) -> u64 {
    let product = u128::from(fingerprint ^ 0x2545_f491_4f6c_dd1d) * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

/// A shard of the table.
#[derive(Default)]
pub(super) struct Shard {
    entries: Box<[Entry]>,
    len: usize,
}

/// Where a probe ended.
enum Probe {
    Found(usize),
    Vacant(usize),
    /// There is no entry at all yet.
    NoRoom,
}

impl Shard {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The memory of the entries, without the shard itself.
    pub(super) fn memory_bytes(&self) -> usize {
        if self.entries.is_empty() { 0 } else { size_of_val::<[Entry]>(&self.entries) + ALLOCATION_BYTES }
    }

    /// Brings the entries into the cache that a search is likely to read: the one where it starts, and the second after
    /// it, which mostly lies in the next cache line. The value is of no use but to keep the loads.
    pub(super) fn touch(&self, spread: u64) -> u64 {
        let home = self.home(spread);
        let load = |slot: usize| self.entries.get(slot).map_or(EMPTY, |entry| entry.fingerprint);
        load(home) ^ load(home + 2)
    }

    pub(super) fn get(&self, fingerprint: u64, spread: u64) -> Option<&Entry> {
        match self.probe(fingerprint, spread) {
            Probe::Found(slot) => self.entries.get(slot),
            Probe::Vacant(_) | Probe::NoRoom => None,
        }
    }

    /// Changes how often a record was used; whether it is known.
    pub(super) fn change_uses(&mut self, fingerprint: u64, spread: u64, change: impl FnOnce(Uses) -> Uses) -> bool {
        let Probe::Found(slot) = self.probe(fingerprint, spread) else { return false };
        let Some(entry) = self.entries.get_mut(slot) else { return false };
        entry.uses = change(entry.uses);
        true
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| !entry.is_vacant())
    }

    /// Puts an entry, and returns the one of the same fingerprint that it replaces. How often that one was used goes on
    /// to count: it is the same record elsewhere, or the same name.
    pub(super) fn insert(&mut self, entry: Entry) -> Option<Entry> {
        debug_assert!(!entry.is_vacant(), "a fingerprint is never 0");
        let mut probe = self.probe(entry.fingerprint, spread(entry.fingerprint));
        if !matches!(probe, Probe::Found(_)) && !fits(self.len + 1, self.entries.len()) {
            self.resize(capacity_for(self.len + 1));
            probe = self.probe(entry.fingerprint, spread(entry.fingerprint));
        }
        match probe {
            Probe::Found(slot) => {
                self.entries.get_mut(slot).map(|old| std::mem::replace(old, Entry { uses: old.uses, ..entry }))
            }
            Probe::Vacant(slot) => {
                if let Some(vacant) = self.entries.get_mut(slot) {
                    *vacant = entry;
                    self.len += 1;
                }
                None
            }
            Probe::NoRoom => None,
        }
    }

    /// Removes the entry of a fingerprint if `condition` holds for it; whether it did.
    pub(super) fn remove_if(&mut self, fingerprint: u64, spread: u64, condition: impl FnOnce(&Entry) -> bool) -> bool {
        let Probe::Found(slot) = self.probe(fingerprint, spread) else { return false };
        if !condition(&self.entries[slot]) {
            return false;
        }
        self.close_gap(slot);
        self.len -= 1;
        if is_sparse(self.len, self.entries.len()) {
            self.resize(capacity_for(self.len));
        }
        true
    }

    /// Keeps only the entries for which `keep` holds; how many went.
    pub(super) fn retain(&mut self, keep: impl Fn(&Entry) -> bool) -> usize {
        let kept: Vec<Entry> = self.entries.iter().filter(|entry| !entry.is_vacant() && keep(entry)).copied().collect();
        let removed = self.len - kept.len();
        if removed > 0 {
            let capacity = self.entries.len();
            let sparse = is_sparse(kept.len(), capacity);
            self.fill(if sparse { capacity_for(kept.len()) } else { capacity }, &kept);
        }
        removed
    }

    /// Where a search starts: the spread's 32 bits below the shard's, scaled to the capacity, which need not be a
    /// power of two.
    fn home(&self, spread: u64) -> usize {
        let fraction = spread >> 24 & 0xffff_ffff;
        ((fraction * self.entries.len() as u64) >> 32) as usize
    }

    fn after(&self, slot: usize) -> usize {
        if slot + 1 == self.entries.len() { 0 } else { slot + 1 }
    }

    /// How far a search goes from one place to another, around the end.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.entries.len() - from }
    }

    fn probe(&self, fingerprint: u64, spread: u64) -> Probe {
        let mut slot = self.home(spread);
        for _ in 0..self.entries.len() {
            let found = self.entries[slot].fingerprint;
            // In this order: a search for the fingerprint 0 must not find a vacant entry.
            if found == EMPTY {
                return Probe::Vacant(slot);
            }
            if found == fingerprint {
                return Probe::Found(slot);
            }
            slot = self.after(slot);
        }
        Probe::NoRoom
    }

    /// Empties an entry and shifts back those behind it that a search could otherwise no longer reach.
    fn close_gap(&mut self, slot: usize) {
        let mut gap = slot;
        let mut next = self.after(slot);
        for _ in 1..self.entries.len() {
            let entry = self.entries[next];
            if entry.is_vacant() {
                break;
            }
            let home = self.home(spread(entry.fingerprint));
            if self.distance(home, next) >= self.distance(gap, next) {
                self.entries[gap] = entry;
                gap = next;
            }
            next = self.after(next);
        }
        self.entries[gap] = VACANT;
    }

    fn resize(&mut self, capacity: usize) {
        let old = std::mem::take(&mut self.entries);
        self.fill(capacity, &old);
    }

    /// Starts anew with `capacity` entries that hold what is not vacant of `entries`.
    fn fill(&mut self, capacity: usize, entries: &[Entry]) {
        self.entries = vec![VACANT; capacity].into_boxed_slice();
        self.len = 0;
        for entry in entries.iter().filter(|entry| !entry.is_vacant()) {
            if let Probe::Vacant(slot) = self.probe(entry.fingerprint, spread(entry.fingerprint)) {
                self.entries[slot] = *entry;
                self.len += 1;
            }
        }
    }
}

/// Whether a capacity holds that many entries and short probes.
fn fits(len: usize, capacity: usize) -> bool {
    if capacity <= DENSE_CAPACITY { len < capacity } else { len * 16 <= capacity * 13 }
}

/// The capacity that a shard is given for that many entries.
fn capacity_for(len: usize) -> usize {
    match len {
        0 => 0,
        1..=8 => len + 1,
        9..=24 => len + len / 4,
        _ => len + len / 5 * 3 + 1,
    }
}

/// Whether a capacity is so much too large that memory is to be given back. Away from [`capacity_for`], so that a shard
/// does not resize back and forth.
fn is_sparse(len: usize, capacity: usize) -> bool {
    capacity > capacity_for(len) * 9 / 8 + 1
}

#[cfg(test)]
mod tests;
