//! Which node a key has: an open table of eight bytes a place (half of the key's hash, and the node), so that a look-up
//! reads one line of memory, where a map of keys would read two. Collisions go to the next place; who leaves is replaced
//! by those behind that would rather be there, so there are no tombstones.

use std::hash::{BuildHasher, Hasher};

use super::levels::NONE;
use crate::policy::Build;

const PLACES_MIN: usize = 16;
/// Filled to at most so many eighths.
const FILLED_EIGHTHS: usize = 6;

#[derive(Debug, Clone, Copy)]
struct Place {
    hash: u32,
    /// `NONE` where nobody is.
    node: u32,
}

const EMPTY: Place = Place { hash: 0, node: NONE };

/// The table. It names nodes only; whose key a node has its owner knows.
pub(super) struct Index {
    places: Vec<Place>,
    len: usize,
}

/// The part of a key's hash that is kept. Its upper bits choose the place.
fn hash(key: u64) -> u32 {
    let mut hasher = Build::default().build_hasher();
    hasher.write_u64(key);
    (hasher.finish() >> 32) as u32
}

impl Index {
    pub(super) fn new() -> Self {
        Self { places: vec![EMPTY; PLACES_MIN], len: 0 }
    }

    /// Where the search for a hash begins.
    fn home(&self, hash: u32) -> usize {
        ((u64::from(hash) * self.places.len() as u64) >> 32) as usize
    }

    fn after(&self, place: usize) -> usize {
        (place + 1) & (self.places.len() - 1)
    }

    /// The node of a key; `is_it` says whether a node has that key.
    pub(super) fn find(&self, key: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let hash = hash(key);
        let mut at = self.home(hash);
        loop {
            let place = self.places[at];
            if place.node == NONE {
                return None;
            }
            if place.hash == hash && is_it(place.node) {
                return Some(place.node);
            }
            at = self.after(at);
        }
    }

    /// Adds a node whose key is not there.
    pub(super) fn insert(&mut self, key: u64, node: u32) {
        if self.len * 8 >= self.places.len() * FILLED_EIGHTHS {
            self.grow();
        }
        self.len += 1;
        self.put(Place { hash: hash(key), node });
    }

    /// The place of a node that is there with that key, for [`Index::remove`].
    pub(super) fn place(&self, key: u64, node: u32) -> Option<usize> {
        let mut at = self.home(hash(key));
        while self.places[at].node != node {
            if self.places[at].node == NONE {
                return None;
            }
            at = self.after(at);
        }
        Some(at)
    }

    /// Takes out a node that is there with that key; it was at `place` lately.
    pub(super) fn remove(&mut self, key: u64, node: u32, place: usize) {
        let is_there = self.places.get(place).is_some_and(|place| place.node == node);
        let found = if is_there { Some(place) } else { self.place(key, node) };
        let Some(mut gap) = found else { return };
        self.len -= 1;
        let mask = self.places.len() - 1;
        let mut at = self.after(gap);
        while self.places[at].node != NONE {
            // Whoever would have come upon the gap while looking for a place moves there.
            let from_home = at.wrapping_sub(self.home(self.places[at].hash)) & mask;
            if from_home >= (at.wrapping_sub(gap) & mask) {
                self.places[gap] = self.places[at];
                gap = at;
            }
            at = self.after(at);
        }
        self.places[gap] = EMPTY;
    }

    fn put(&mut self, place: Place) {
        let mut at = self.home(place.hash);
        while self.places[at].node != NONE {
            at = self.after(at);
        }
        self.places[at] = place;
    }

    fn grow(&mut self) {
        let larger = vec![EMPTY; self.places.len() * 2];
        for place in std::mem::replace(&mut self.places, larger) {
            if place.node != NONE {
                self.put(place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::policy::SplitMix;

    #[test]
    fn it_finds_what_a_map_finds() {
        for seed in 1..20 {
            let mut random = SplitMix::new(seed);
            let mut index = Index::new();
            let mut map: HashMap<u64, u32> = HashMap::new();
            let mut keys = Vec::new();
            // First it grows, then it shrinks; few keys, so that the same ones come and go.
            for step in 0..6000u32 {
                let key = random.below(700) as u64;
                let goes = random.below(3000) < step as usize / 2;
                match (map.get(&key).copied(), goes) {
                    (None, false) => {
                        let node = keys.len() as u32;
                        keys.push(key);
                        index.insert(key, node);
                        map.insert(key, node);
                    }
                    (Some(node), true) => {
                        // As if the table had changed since, every other time.
                        let place =
                            if step % 2 == 0 { index.place(key, node).expect("it is there") } else { usize::MAX };
                        index.remove(key, node, place);
                        map.remove(&key);
                    }
                    _ => {}
                }
                let other = random.below(700) as u64;
                let found = index.find(other, |node| keys[node as usize] == other);
                assert_eq!(found, map.get(&other).copied(), "seed {seed}, step {step}");
                assert_eq!(index.len, map.len());
            }
        }
    }

    #[test]
    fn keys_of_the_same_place_are_told_apart_and_wrap_around() {
        let mut index = Index::new();
        let last = (0u64..).filter(|key| index.home(hash(*key)) == PLACES_MIN - 1).take(5).collect::<Vec<_>>();
        for (node, key) in last.iter().enumerate() {
            index.insert(*key, node as u32);
        }
        index.remove(last[1], 1, 0);
        for (node, key) in last.iter().enumerate() {
            let found = index.find(*key, |node| last[node as usize] == *key);
            assert_eq!(found, (node != 1).then_some(node as u32));
        }
    }
}
