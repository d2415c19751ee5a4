//! The prefix tree: blocks that are in the tier, and beside them, bounded, those that left or were refused lately.

use std::collections::VecDeque;

use super::class::Class;
use super::index::Index;
use super::levels::{Linked, Links, NONE};

/// How many are forgotten at once.
const FORGOTTEN_AT_ONCE: usize = 16;

/// A block, here or remembered. One line of memory, and not parts of two.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Node {
    pub(super) key: u64,
    /// The block before it, while it is here; `NONE` for a first one.
    pub(super) parent: u32,
    /// Blocks after it that are here.
    pub(super) children: u32,
    /// When it was used last, in ticks.
    pub(super) last: u32,
    /// What was known then.
    pub(super) class: Class,
    /// Its place among the watched; `NONE` if it is not.
    pub(super) watched: u32,
    pub(super) bytes: u32,
    /// Blocks before it.
    pub(super) depth: u32,
    links: Links,
    /// Requests that used it.
    pub(super) uses: u16,
    /// The turn of the request that brought it, and of the last that used it.
    pub(super) first_turn: u8,
    pub(super) turn: u8,
    /// Blocks after it in the last request.
    pub(super) blocks_after: u8,
    pub(super) is_here: bool,
    is_remembered: bool,
    /// Whether it was used since it stood last in the queue of those that are forgotten next.
    pub(super) was_used: bool,
}

impl Linked for Node {
    fn links_of(&self) -> &Links {
        &self.links
    }

    fn links(&mut self) -> &mut Links {
        &mut self.links
    }
}

impl Node {
    /// Whether it may leave without leaving a descendant behind.
    pub(super) fn is_leaf(&self) -> bool {
        self.is_here && self.children == 0
    }

    pub(super) fn level(&self) -> u8 {
        self.links.level
    }
}

const _: () = assert!(size_of::<Node>() == 64);

/// All nodes.
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    index: Index,
    free: Vec<u32>,
    /// Those that are not here, oldest first; also some that have come back.
    remembered: VecDeque<u32>,
    remembered_max: usize,
    here: usize,
    here_bytes: u64,
}

impl Tree {
    pub(super) fn new(remembered_max: usize) -> Self {
        Self {
            nodes: Vec::new(),
            index: Index::new(),
            free: Vec::new(),
            remembered: VecDeque::new(),
            remembered_max,
            here: 0,
            here_bytes: 0,
        }
    }

    pub(super) fn find(&self, key: u64) -> Option<u32> {
        self.index.find(key, |at| self.nodes[at as usize].key == key)
    }

    pub(super) fn here(&self) -> usize {
        self.here
    }

    pub(super) fn here_bytes(&self) -> u64 {
        self.here_bytes
    }

    /// A node for a block that was not known.
    pub(super) fn add(&mut self, key: u64, depth: u32) -> u32 {
        let node = Node {
            key,
            parent: NONE,
            children: 0,
            last: 0,
            class: Class::default(),
            watched: NONE,
            bytes: 1,
            depth,
            links: Links::default(),
            uses: 0,
            first_turn: 1,
            turn: 1,
            blocks_after: u8::MAX,
            is_here: false,
            is_remembered: false,
            was_used: false,
        };
        let at = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(node);
            (self.nodes.len() - 1) as u32
        });
        self.nodes[at as usize] = node;
        self.index.insert(key, at);
        self.remember(at);
        at
    }

    /// The block is here, after `parent`. Returns the parent if it was a leaf that is none any more.
    pub(super) fn enter(&mut self, at: u32, parent: u32, bytes: u32) -> Option<u32> {
        self.here += 1;
        self.here_bytes += u64::from(bytes);
        let node = &mut self.nodes[at as usize];
        (node.is_here, node.parent, node.bytes) = (true, parent, bytes);
        let parent_node = self.nodes.get_mut(parent as usize)?;
        parent_node.children += 1;
        (parent_node.is_here && parent_node.children == 1).then_some(parent)
    }

    /// The block is gone. Returns its parent if that has become a leaf.
    pub(super) fn leave(&mut self, at: u32) -> Option<u32> {
        self.here -= 1;
        let node = &mut self.nodes[at as usize];
        node.is_here = false;
        self.here_bytes -= u64::from(node.bytes);
        let parent = std::mem::replace(&mut node.parent, NONE);
        self.remember(at);
        let parent_node = self.nodes.get_mut(parent as usize)?;
        parent_node.children -= 1;
        parent_node.is_leaf().then_some(parent)
    }

    /// From now on; those that are too many are forgotten bit by bit.
    pub(super) fn remember_at_most(&mut self, blocks: usize) {
        self.remembered_max = blocks;
    }

    /// Blocks that are known, here or not.
    #[cfg(test)]
    pub(super) fn known(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    fn remember(&mut self, at: u32) {
        let node = &mut self.nodes[at as usize];
        if !std::mem::replace(&mut node.is_remembered, true) {
            self.remembered.push_back(at);
        }
    }

    /// Forgets those that are next, but looks at `most` at most. Calls `was_watched` for each that was, with its place.
    pub(super) fn forget(&mut self, most: usize, mut was_watched: impl FnMut(u32)) {
        let mut looks = most;
        loop {
            let overfull = self.remembered.len().saturating_sub(self.remembered_max);
            // Some at a time, so that reads of cold memory need not wait for each other.
            let some = overfull.min(looks).min(FORGOTTEN_AT_ONCE);
            if some == 0 {
                return;
            }
            looks -= some;
            let mut places = [0; FORGOTTEN_AT_ONCE];
            for (place, &at) in places.iter_mut().zip(self.remembered.iter().take(some)) {
                *place = self.index.place(self.nodes[at as usize].key, at).unwrap_or(usize::MAX);
            }
            for place in places.into_iter().take(some) {
                if let Some(watched) = self.forget_one(place) {
                    was_watched(watched);
                }
            }
        }
    }

    /// Forgets the one that is next, and is at that place in the index, most likely. Returns its place among the watched,
    /// if it has one.
    fn forget_one(&mut self, place: usize) -> Option<u32> {
        let at = self.remembered.pop_front()?;
        let node = &mut self.nodes[at as usize];
        node.is_remembered = false;
        if node.is_here {
            return None;
        }
        // Descendants name it as their parent; and who was asked for again is remembered for another round.
        if node.children > 0 || std::mem::take(&mut node.was_used) {
            self.remember(at);
            return None;
        }
        let watched = std::mem::replace(&mut node.watched, NONE);
        self.index.remove(node.key, at, place);
        self.free.push(at);
        Some(watched).filter(|watched| *watched != NONE)
    }
}
