//! Which blocks are watched, to learn what becomes of blocks: a few of each request, in the order of their beginning. What
//! a watched block went through ends with its next use; or unused, when its place is needed or nobody remembers it.

use super::class::Class;
use super::hazard::Sighting;
use super::levels::NONE;

/// Blocks that are watched at a time.
const WATCHED_MAX: usize = 1 << 16;
/// By how much the share of watched blocks changes when a place is taken from one too early or too late.
const SHARE_STEP: f64 = 0.01;

#[derive(Debug, Clone, Copy)]
struct Watched {
    /// Who it is; `NONE` where nobody is watched.
    node: u32,
    since: u32,
    class: Class,
}

/// The watched blocks, in a ring.
pub(super) struct Watch {
    ring: Vec<Watched>,
    next: usize,
    len: usize,
    /// Which share of those that could be watched are.
    share: f64,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self { ring: Vec::new(), next: 0, len: 0, share: 1.0 }
    }

    pub(super) fn share(&self) -> f64 {
        self.share
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Watches a block; returns its place, and whose place that was.
    pub(super) fn begin(&mut self, node: u32, class: Class, now: u32) -> (u32, Option<(u32, Sighting)>) {
        let place = self.next;
        self.next = (self.next + 1) % WATCHED_MAX;
        if place == self.ring.len() {
            self.ring.push(Watched { node: NONE, since: 0, class });
        }
        let before = self.end(place as u32, now, false);
        self.ring[place] = Watched { node, since: now, class };
        self.len += 1;
        (place as u32, before)
    }

    /// Ends what a place watches; returns who that was and what became of it.
    pub(super) fn end(&mut self, place: u32, now: u32, is_use: bool) -> Option<(u32, Sighting)> {
        let watched = self.ring.get_mut(place as usize).filter(|watched| watched.node != NONE)?;
        let node = std::mem::replace(&mut watched.node, NONE);
        self.len -= 1;
        Some((node, sighting(watched.class, watched.since, now, is_use)))
    }

    /// A place was taken from a block of this age; places are to last for `horizon`. Both in seconds.
    pub(super) fn adapt(&mut self, age: f32, horizon: f32) {
        if age < horizon {
            self.share *= 1.0 - SHARE_STEP;
        } else if age > 2.0 * horizon {
            self.share = (self.share * (1.0 + SHARE_STEP)).min(1.0);
        }
    }

    /// Those that are watched, as far as they got.
    pub(super) fn so_far(&self, now: u32) -> impl Iterator<Item = Sighting> + '_ {
        let watched = self.ring.iter().filter(|watched| watched.node != NONE);
        watched.map(move |watched| sighting(watched.class, watched.since, now, false))
    }
}

fn sighting(class: Class, since: u32, now: u32, is_use: bool) -> Sighting {
    Sighting { class, age: super::seconds(now.saturating_sub(since)), is_use }
}
