//! The table in memory that answers every lookup: fingerprint to location, at most 48 bytes a key. Owns no record and
//! does no I/O; it is filled from the log when a store opens and kept up by whoever appends and reclaims. Two records
//! with equal fingerprints (one pair among 2^32 keys) share an entry, the later one wins: the reader checks the
//! identity in the record's header, so that is a miss. 256 shards, each under its own lock; one that grows or shrinks
//! copies itself meanwhile, that is a 256th of the table.

mod shard;
mod uses;

use parking_lot::{RwLock, RwLockReadGuard};

use self::shard::{Entry, Shard, spread};
pub use self::uses::Uses;
use super::Location;

const SHARDS: usize = 256;
/// The keys of a prefix that are looked up together: the first window is small because most lookups of an unknown
/// prompt end at the first key, later ones grow up to the last.
const FIRST_WINDOW: usize = 16;
const WINDOW_GROWTH: usize = 4;
const LARGEST_WINDOW: usize = 512;

/// What the table knows of a record, without its identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableEntry {
    /// The record's fingerprint.
    pub fingerprint: u64,
    /// The low half of its parent's fingerprint, 0 for none.
    pub parent: u32,
    /// Where it lies; of the generation the low 16 bits.
    pub location: Location,
    /// How often and when it was used.
    pub uses: Uses,
}

impl From<&Entry> for TableEntry {
    fn from(entry: &Entry) -> Self {
        let (location, uses) = (entry.location(), entry.uses());
        Self { fingerprint: entry.fingerprint(), parent: entry.parent(), location, uses }
    }
}

/// Where every record of a store lies, by fingerprint. Shared by reference; every method may be called from any thread.
pub struct Table {
    shards: Box<[RwLock<Shard>; SHARDS]>,
}

impl Table {
    /// An empty table; it takes 8 KiB.
    pub fn new() -> Self {
        Self { shards: Box::new(std::array::from_fn(|_| RwLock::default())) }
    }

    /// Says where a record lies. `parent` is the low half of its parent's fingerprint, 0 for none. Of the location's
    /// generation the low 16 bits are kept. Returns the location that this one replaces.
    ///
    /// A fingerprint of 0 and a location outside its limits cannot be kept: they are not inserted, and later misses.
    pub fn insert(&self, fingerprint: u64, parent: u32, location: Location) -> Option<Location> {
        if fingerprint == 0 || !location.is_valid() {
            return None;
        }
        let entry = Entry::new(fingerprint, parent, &location);
        let replaced = self.shard(spread(fingerprint)).write().insert(entry);
        replaced.map(|old| old.location())
    }

    /// Where the record lies, if it is known; the generation is its low 16 bits.
    pub fn get(&self, fingerprint: u64) -> Option<Location> {
        let spread = spread(fingerprint);
        self.shard(spread).read().get(fingerprint, spread).map(Entry::location)
    }

    /// The low half of the fingerprint of the record's parent, 0 for none, if the record is known.
    pub fn parent(&self, fingerprint: u64) -> Option<u32> {
        let spread = spread(fingerprint);
        self.shard(spread).read().get(fingerprint, spread).map(Entry::parent)
    }

    /// How often and when the record was used, if it is known.
    pub fn uses(&self, fingerprint: u64) -> Option<Uses> {
        let spread = spread(fingerprint);
        self.shard(spread).read().get(fingerprint, spread).map(Entry::uses)
    }

    /// Counts a use of a record in this epoch (see [`Uses`]); the record as it was before, if it is known.
    pub fn note_use(&self, fingerprint: u64, epoch: u16) -> Option<TableEntry> {
        let spread = spread(fingerprint);
        let mut shard = self.shard(spread).write();
        let before = shard.get(fingerprint, spread).map(TableEntry::from);
        shard.change_uses(fingerprint, spread, |uses| uses.noted(epoch));
        before
    }

    /// Halves how often a record was used, so that past use counts for less each time it is asked about.
    pub fn age_uses(&self, fingerprint: u64) {
        let spread = spread(fingerprint);
        self.shard(spread).write().change_uses(fingerprint, spread, Uses::aged);
    }

    /// Every record that lies in a region of that generation (compared by its low 16 bits), in the order of their pages.
    /// Goes through the whole table, a shard at a time: for what happens once in the life of a region.
    pub fn in_region(&self, region: u32, generation: u64) -> Vec<TableEntry> {
        let mut found = Vec::new();
        for shard in &*self.shards {
            let shard = shard.read();
            let here = shard.iter().filter(|entry| entry.is_in(region, generation as u16));
            found.extend(here.map(TableEntry::from));
        }
        found.sort_unstable_by_key(|entry| entry.location.page);
        found
    }

    /// Clears `out` and fills it with the locations of the longest run of known fingerprints, from the first on.
    ///
    /// Each window of keys is looked up under the locks of all its shards, taken in ascending order: so cache misses
    /// overlap, which an atomic operation between two keys would prevent, and a run is consistent inside a window.
    pub fn prefix(&self, fingerprints: impl IntoIterator<Item = u64>, out: &mut Vec<Location>) {
        out.clear();
        let mut rest = fingerprints.into_iter();
        let mut window = FIRST_WINDOW;
        let mut now = [Sought::default(); LARGEST_WINDOW];
        loop {
            let mut count = 0;
            for (sought, fingerprint) in now.iter_mut().take(window).zip(&mut rest) {
                *sought = Sought { fingerprint, spread: spread(fingerprint) };
                count += 1;
            }
            if !self.prefix_window(&now[..count], out) || count < window {
                return;
            }
            window = (window * WINDOW_GROWTH).min(LARGEST_WINDOW);
        }
    }

    /// Appends the locations of a window's run; whether the whole window was found.
    fn prefix_window(&self, window: &[Sought], out: &mut Vec<Location>) -> bool {
        let mut needed = ShardSet::default();
        for sought in window {
            needed.add(shard_of(sought.spread));
        }
        let mut held: [Option<RwLockReadGuard<'_, Shard>>; SHARDS] = [const { None }; SHARDS];
        for shard in needed.ascending() {
            held[shard] = Some(self.shards[shard].read());
        }
        let shard_at = |spread: u64| held[shard_of(spread)].as_deref();

        // No branch depends on what is loaded here, so the processor has many of these loads in flight at once.
        let mut touched = 0;
        for sought in window {
            touched ^= shard_at(sought.spread).map_or(0, |shard| shard.touch(sought.spread));
        }
        std::hint::black_box(touched);

        for &Sought { fingerprint, spread } in window {
            match shard_at(spread).and_then(|shard| shard.get(fingerprint, spread)) {
                Some(entry) => out.push(entry.location()),
                None => return false,
            }
        }
        true
    }

    /// Forgets the record if it is known to lie at `location` (compared with the low 16 bits of the generation);
    /// whether it did. A record that was meanwhile stored elsewhere stays.
    pub fn remove_if(&self, fingerprint: u64, location: &Location) -> bool {
        let spread = spread(fingerprint);
        self.shard(spread).write().remove_if(fingerprint, spread, |entry| entry.is_at(location))
    }

    /// Forgets every record for whose location `keep` does not hold; how many those were. One shard at a time is locked,
    /// and needs as much memory again meanwhile; `keep` runs under that lock and must not call the table.
    pub fn retain(&self, keep: impl Fn(&Location) -> bool) -> usize {
        self.shards.iter().map(|shard| shard.write().retain(|entry| keep(&entry.location()))).sum()
    }

    /// How many records are known. Exact only while nobody inserts or removes.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().len()).sum()
    }

    /// Whether no record is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory that it takes in bytes, with locks, unused entries and an estimate of the allocator's share.
    pub fn memory_bytes(&self) -> usize {
        let entries: usize = self.shards.iter().map(|shard| shard.read().memory_bytes()).sum();
        entries + size_of_val(&*self.shards)
    }

    fn shard(&self, spread: u64) -> &RwLock<Shard> {
        &self.shards[shard_of(spread)]
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("len", &self.len()).field("memory_bytes", &self.memory_bytes()).finish()
    }
}

/// The shard of a spread fingerprint: its upper 8 bits, so always below [`SHARDS`].
fn shard_of(spread: u64) -> usize {
    (spread >> 56) as usize
}

/// A key that is looked up.
#[derive(Clone, Copy, Default)]
struct Sought {
    fingerprint: u64,
    spread: u64,
}

/// A set of shards, one bit each.
#[derive(Default)]
struct ShardSet([u64; SHARDS / 64]);

impl ShardSet {
    fn add(&mut self, shard: usize) {
        self.0[shard / 64] |= 1 << (shard % 64);
    }

    fn ascending(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(word, &bits)| {
            let mut left = bits;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(word * 64 + bit)
            })
        })
    }
}

#[cfg(test)]
mod tests;
