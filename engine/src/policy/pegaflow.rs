//! Our policy. It sees what a page cache does not: the prefix tree, conversations and the gaps between their turns.
//!
//! Only leaves may leave, so a block never loses its ancestors. The leaf that leaves is worth least: its expected uses per
//! second of occupation ([`worth`]), from hazards that are learned while it runs ([`hazard`]) for classes of blocks
//! ([`class`]). A newcomer is admitted to a full tier only if it is worth more than the one that would leave. Before
//! anything was learned hazards fall with age and are equal for all: least recently used.

mod age;
mod class;
mod hazard;
mod index;
mod levels;
mod tree;
mod watch;
mod worth;

use std::cell::Cell;

use self::class::{Class, Evidence, tail_bucket};
use self::hazard::Hazard;
use self::levels::{Levels, NONE, level};
use self::tree::Tree;
use self::watch::Watch;
use self::worth::Worth;
use super::least_recent::PINNED_MAX;
use super::{BlockMemory, Past, Policy, PolicyBlock, PolicyRequest, SplitMix};

/// Time is kept in ticks of this many ms.
const TICK_MS: u64 = 16;
/// A request that reaches so near to the end of an earlier one is its next turn. The last block of a prompt need not be
/// full, and then its next version has another key.
const TURN_REACH: u8 = 1;
/// Fewer new sightings than this change no fit.
const FIT_SIGHTINGS_MIN: usize = 64;
/// A fit follows when the sightings have grown, or were replaced, by one part of so many.
const FIT_PART: usize = 8;
/// Looks at blocks that have grown older, for each request and for each of its blocks.
const AGED_PER_REQUEST: usize = 64;
const AGED_PER_BLOCK: usize = 4;
/// How many blocks one request can make forgotten. Chains are not longer in the mean.
const FORGOTTEN_MAX: usize = 4096;
/// How many times a search for a victim puts a block in its right place first.
const CORRECTIONS_MAX: usize = 16;
/// A policy that goes on after a restart can remember uses of so long ago, in ticks: three days.
const PAST_TICKS: u32 = 1 << 24;
/// Blocks are watched for so many times the age at which they leave.
const HORIZON: f32 = 4.0;

/// What may be chosen about [`PegaflowPolicy`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PegaflowConfig {
    /// A newcomer must be worth this many times the block that would leave for it. 1 and less for memory, where a write
    /// costs nothing; more saves writes. Default: 1.
    pub write_hurdle: f32,
    /// Depth in a chain, in blocks, at which recomputing a block costs twice as much as at the beginning, because
    /// attention reads all tokens before it. Default: infinite; every hit counts the same.
    pub recompute_knee_blocks: f32,
    /// Blocks that left or were refused and are remembered. Default: 65,536. About 90 bytes each.
    pub remembered_max: usize,
    /// Where random choices begin.
    pub seed: u64,
}

impl Default for PegaflowConfig {
    fn default() -> Self {
        Self { write_hurdle: 1.0, recompute_knee_blocks: f32::INFINITY, remembered_max: 1 << 16, seed: 1 }
    }
}

/// Our policy; see the module's documentation.
pub struct PegaflowPolicy {
    config: PegaflowConfig,
    tree: Tree,
    levels: Levels,
    hazard: Hazard,
    worth: Worth,
    watch: Watch,
    random: SplitMix,
    /// The time of the first request, in ms, and since then in ticks, the ticks before it included.
    epoch_ms: Option<u64>,
    past: u32,
    now: u32,
    /// The nodes of the last request's chain, and where in it the next search begins.
    path: Vec<u32>,
    hint: Cell<usize>,
    /// Sightings since the last fit.
    news: usize,
    /// The age at which blocks leave, in seconds: a moving mean.
    leaving_age: f32,
    /// The size of the first block; worth is per so many bytes.
    unit_bytes: f32,
}

/// Ticks in seconds.
fn seconds(ticks: u32) -> f32 {
    ticks as f32 * (TICK_MS as f32 / 1000.0)
}

impl PegaflowPolicy {
    /// An empty policy that has learned nothing.
    pub fn new(config: PegaflowConfig) -> Self {
        Self {
            config,
            tree: Tree::new(config.remembered_max.max(1)),
            levels: Levels::new(),
            hazard: Hazard::new(),
            worth: Worth::new(),
            watch: Watch::new(),
            random: SplitMix::new(config.seed),
            epoch_ms: None,
            past: 0,
            now: 0,
            path: Vec::new(),
            hint: Cell::new(0),
            news: 0,
            leaving_age: 0.0,
            unit_bytes: 0.0,
        }
    }

    /// Bytes of the blocks that are here.
    pub(crate) fn here_bytes(&self) -> u64 {
        self.tree.here_bytes()
    }

    /// Sees to it that a block is known, here or not, as [`Policy::insert`] does for one that no request has named.
    pub(crate) fn know(&mut self, block: &PolicyBlock, parent: Option<u64>) {
        let parent = parent.map_or(NONE, |parent| self.find(parent).unwrap_or_else(|| self.tree.add(parent, 0)));
        let at = self.find(block.key).unwrap_or_else(|| self.tree.add(block.key, 0));
        if self.tree.nodes[at as usize].uses == 0 {
            self.go_on(at, parent);
        }
    }

    /// Which turn of a conversation a request is whose deepest known block is `deepest`, and the gap since the one before.
    fn turn(&self, deepest: Option<u32>) -> (u8, Option<f32>) {
        let Some(at) = deepest else { return (1, None) };
        let node = &self.tree.nodes[at as usize];
        if node.blocks_after <= TURN_REACH {
            (node.turn.saturating_add(1), Some(seconds(self.now - node.last)))
        } else {
            (node.first_turn, None)
        }
    }

    /// Counts a use of the block at `position` of the path.
    fn renew(&mut self, position: usize, known: usize, turn: (u8, Option<f32>), tenant: u64) {
        let at = self.path[position];
        let blocks = self.path.len();
        let node = &mut self.tree.nodes[at as usize];
        let is_known = node.uses > 0;
        let blocks_after = blocks - 1 - position;
        let evidence = Evidence {
            gap: if is_known { Some(seconds(self.now - node.last)) } else { turn.1 },
            turn: turn.0.into(),
            blocks_after,
            uses: node.uses.into(),
            new_blocks: blocks - known,
            blocks,
            tenant,
        };
        node.class = Class::new(&evidence);
        node.last = self.now;
        node.uses = node.uses.saturating_add(1);
        node.was_used = is_known;
        node.turn = turn.0;
        if !is_known {
            node.first_turn = turn.0;
        }
        node.blocks_after = blocks_after.min(usize::from(u8::MAX)) as u8;
        let watched = std::mem::replace(&mut node.watched, NONE);
        if let Some((_, sighting)) = self.watch.end(watched, self.now, true) {
            self.hazard.add(sighting);
            self.news += 1;
        }
    }

    /// Watches one block of each class of distance from the request's end.
    fn watch_some(&mut self) {
        let blocks = self.path.len();
        let mut end = blocks;
        while end > 0 {
            let bucket = tail_bucket(blocks - end);
            let mut begin = end - 1;
            while begin > 0 && tail_bucket(blocks - begin) == bucket {
                begin -= 1;
            }
            if self.watch.share() >= 1.0 || self.random.unit() < self.watch.share() {
                let at = self.path[begin + self.random.below(end - begin)];
                self.watch_one(at);
            }
            end = begin;
        }
    }

    fn watch_one(&mut self, at: u32) {
        let node = &mut self.tree.nodes[at as usize];
        let (place, before) = self.watch.begin(at, node.class, self.now);
        node.watched = place;
        self.news += 1;
        if let Some((other, sighting)) = before {
            self.watch.adapt(sighting.age, HORIZON * self.leaving_age);
            if other != at {
                self.tree.nodes[other as usize].watched = NONE;
            }
            self.hazard.add(sighting);
        }
    }

    fn fit_if_due(&mut self) {
        let sightings = self.hazard.sightings() + self.watch.len();
        if self.news >= (sightings / FIT_PART).max(FIT_SIGHTINGS_MIN) {
            self.news = 0;
            self.hazard.fit(self.watch.so_far(self.now));
            self.worth.forget();
        }
    }

    /// What a place is worth to the block now.
    fn worth_of(&mut self, at: u32, bytes: u32) -> f32 {
        let node = &self.tree.nodes[at as usize];
        let uses = self.worth.of(self.hazard.factors(), node.class, seconds(self.now - node.last));
        let cost = 1.0 + node.depth as f32 / self.config.recompute_knee_blocks;
        uses * cost * self.unit_bytes / bytes.max(1) as f32
    }

    /// A block that no request has named, most likely what the model wrote behind its prompt: it is the end of its
    /// parent's request now, from where the conversation goes on.
    fn go_on(&mut self, at: u32, parent: u32) {
        let before = self.tree.nodes.get(parent as usize).copied();
        let node = &mut self.tree.nodes[at as usize];
        (node.last, node.uses, node.blocks_after) = (self.now, 1, 0);
        if let Some(before) = before {
            node.depth = before.depth + 1;
            (node.class, node.first_turn, node.turn) = (before.class, before.turn, before.turn);
        }
    }

    /// Puts a leaf where it belongs now.
    fn place(&mut self, at: u32) {
        let bytes = self.tree.nodes[at as usize].bytes;
        let worth = self.worth_of(at, bytes);
        let age_step = age::step(seconds(self.now - self.tree.nodes[at as usize].last));
        self.levels.push(&mut self.tree.nodes, at, level(worth), age_step as u8);
    }

    fn place_again(&mut self, at: u32) {
        self.levels.unlink(&mut self.tree.nodes, at);
        self.place(at);
    }

    /// Looks again at leaves that have grown older.
    fn let_age(&mut self) {
        let mut looks = AGED_PER_REQUEST + AGED_PER_BLOCK * self.path.len();
        for step in (0..age::AGES - 1).rev() {
            let end = age::begin(step + 1);
            while looks > 0
                && let Some(at) = self.levels.first_of_age(step)
                && seconds(self.now - self.tree.nodes[at as usize].last) >= end
            {
                self.place_again(at);
                looks -= 1;
            }
        }
    }

    /// The leaf that is worth least, put in its right place first if it lay too low.
    fn lowest(&mut self) -> Option<u32> {
        for _ in 0..CORRECTIONS_MAX {
            let at = self.levels.lowest()?;
            let node = &self.tree.nodes[at as usize];
            let (bytes, before) = (node.bytes, node.level());
            if level(self.worth_of(at, bytes)) <= before {
                break;
            }
            self.place_again(at);
        }
        self.levels.lowest()
    }

    /// The leaf that is worth least of those that may leave.
    fn victim(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u32> {
        self.lowest()?;
        let lowest_first = self.levels.lowest_first(&self.tree.nodes).take(PINNED_MAX);
        lowest_first.into_iter().find(|at| may_leave(self.tree.nodes[*at as usize].key))
    }

    /// Takes out a block that makes room for another one.
    fn let_go(&mut self, victim: u32) -> u64 {
        let node = self.tree.nodes[victim as usize];
        let age = seconds(self.now - node.last);
        self.leaving_age += (age - self.leaving_age) / 1024.0;
        self.take_out(victim);
        node.key
    }

    fn take_out(&mut self, at: u32) {
        if self.tree.nodes[at as usize].is_leaf() {
            self.levels.unlink(&mut self.tree.nodes, at);
        }
        if let Some(parent) = self.tree.leave(at) {
            self.place(parent);
        }
    }

    /// Forgets blocks that are not here, if they are too many. Between two requests only: the path names nodes.
    fn forget_some(&mut self) {
        self.path.clear();
        self.tree.forget(FORGOTTEN_MAX, |watched| {
            if let Some((_, sighting)) = self.watch.end(watched, self.now, false) {
                self.hazard.add(sighting);
            }
        });
    }

    /// The node of a block, most likely one of the last request's.
    fn find(&self, key: u64) -> Option<u32> {
        let hint = self.hint.get();
        for position in hint..(hint + 2).min(self.path.len()) {
            let at = self.path[position];
            if self.tree.nodes[at as usize].key == key {
                self.hint.set(position);
                return Some(at);
            }
        }
        self.tree.find(key)
    }
}

impl Policy for PegaflowPolicy {
    fn request(&mut self, request: &PolicyRequest<'_>) {
        let epoch_ms = *self.epoch_ms.get_or_insert(request.now_ms);
        let now = request.now_ms.saturating_sub(epoch_ms) / TICK_MS;
        self.now = self.now.max((now + u64::from(self.past)).min(u64::from(u32::MAX - 1)) as u32);
        if self.unit_bytes == 0.0 {
            self.unit_bytes = request.chain.first().map_or(0.0, |block| block.bytes as f32);
        }
        self.forget_some();
        self.hint.set(0);
        // Nobody is added before all were looked for: so these reads of cold memory need not wait for each other.
        self.path.extend(request.chain.iter().map(|block| self.tree.find(block.key).unwrap_or(NONE)));
        let (mut deepest, mut known) = (None, 0);
        for (depth, (block, at)) in request.chain.iter().zip(&mut self.path).enumerate() {
            if *at == NONE {
                // Twice in one chain it is the same block.
                *at = self.tree.find(block.key).unwrap_or_else(|| self.tree.add(block.key, depth as u32));
            } else {
                (deepest, known) = (Some(*at), depth + 1);
            }
        }
        let turn = self.turn(deepest);
        for position in 0..self.path.len() {
            self.renew(position, known, turn, request.tenant);
        }
        self.watch_some();
        self.fit_if_due();
        for position in 0..self.path.len() {
            let at = self.path[position];
            if self.tree.nodes[at as usize].is_leaf() {
                self.place_again(at);
            }
        }
        self.let_age();
    }

    fn admits(&mut self, block: &PolicyBlock, parent: Option<u64>, is_full: bool) -> bool {
        let parent = parent.map(|parent| self.find(parent));
        if let Some(parent) = parent
            && !parent.is_some_and(|parent| self.tree.nodes[parent as usize].is_here)
        {
            return false;
        }
        if !is_full {
            return true;
        }
        let (Some(at), Some(victim)) = (self.find(block.key), self.lowest()) else { return false };
        if parent == Some(Some(victim)) {
            return false;
        }
        let victim_bytes = self.tree.nodes[victim as usize].bytes;
        let victim_worth = self.worth_of(victim, victim_bytes);
        self.worth_of(at, block.bytes) > self.config.write_hurdle * victim_worth
    }

    fn insert(&mut self, block: &PolicyBlock, parent: Option<u64>) {
        self.know(block, parent);
        let Some(at) = self.find(block.key) else { return };
        let parent = parent.and_then(|parent| self.find(parent)).unwrap_or(NONE);
        if self.tree.nodes[at as usize].is_here {
            return;
        }
        if self.unit_bytes == 0.0 {
            self.unit_bytes = block.bytes as f32;
        }
        if let Some(leaf) = self.tree.enter(at, parent, block.bytes) {
            self.levels.unlink(&mut self.tree.nodes, leaf);
        }
        if self.tree.nodes[at as usize].is_leaf() {
            self.place(at);
        }
    }

    fn evict(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let victim = self.victim(may_leave)?;
        Some(self.let_go(victim))
    }

    fn evict_for(&mut self, newcomer: &PolicyBlock, least: f32, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let worth = self.worth(newcomer).unwrap_or(0.0).max(least);
        let victim = self.victim(may_leave)?;
        let bytes = self.tree.nodes[victim as usize].bytes;
        let is_worth_more = worth > self.worth_of(victim, bytes);
        is_worth_more.then(|| self.let_go(victim))
    }

    fn hand_over(&mut self) -> Option<(u64, Past)> {
        let at = self.levels.lowest()?;
        let key = self.tree.nodes[at as usize].key;
        Some((key, self.hand_over_one(key)?))
    }

    fn hand_over_one(&mut self, key: u64) -> Option<Past> {
        let at = self.tree.find(key).filter(|at| self.tree.nodes[*at as usize].is_here)?;
        let parent = self.tree.nodes.get(self.tree.nodes[at as usize].parent as usize).map(|parent| parent.key);
        let past = Past { parent, memory: self.memory(key) };
        self.take_out(at);
        Some(past)
    }

    fn remove(&mut self, key: u64) {
        if let Some(at) = self.tree.find(key)
            && self.tree.nodes[at as usize].is_here
        {
            self.take_out(at);
        }
    }

    fn contains(&self, key: u64) -> bool {
        self.find(key).is_some_and(|at| self.tree.nodes[at as usize].is_here)
    }

    fn len(&self) -> usize {
        self.tree.here()
    }

    fn worth(&mut self, block: &PolicyBlock) -> Option<f32> {
        let at = self.find(block.key)?;
        Some(self.worth_of(at, block.bytes))
    }

    fn note(&self) -> Vec<u8> {
        self.hazard.note()
    }

    fn restore(&mut self, note: &[u8]) -> bool {
        let is_good = self.hazard.restore(note);
        self.worth.forget();
        if is_good && self.epoch_ms.is_none() {
            (self.past, self.now) = (PAST_TICKS, PAST_TICKS);
        }
        is_good
    }

    fn memory(&self, key: u64) -> Option<BlockMemory> {
        let node = self.find(key).map(|at| &self.tree.nodes[at as usize]).filter(|node| node.uses > 0)?;
        Some(BlockMemory {
            idle_s: seconds(self.now - node.last) as u32,
            evidence: node.class.bits(),
            uses: node.uses.min(u8::MAX.into()) as u8,
            first_turn: node.first_turn,
            turn: node.turn,
            blocks_after: node.blocks_after,
        })
    }

    fn recall(&mut self, key: u64, memory: &BlockMemory) {
        let Some(at) = self.find(key) else { return };
        let idle = (u64::from(memory.idle_s) * 1000 / TICK_MS).min(self.now.into()) as u32;
        let node = &mut self.tree.nodes[at as usize];
        (node.last, node.class) = (self.now - idle, Class::from_bits(memory.evidence));
        (node.uses, node.first_turn, node.turn) = (memory.uses.max(1).into(), memory.first_turn, memory.turn);
        node.blocks_after = memory.blocks_after;
        if node.is_leaf() {
            self.place_again(at);
        }
    }

    fn takes_last_first(&self) -> bool {
        false
    }

    fn remember_at_most(&mut self, blocks: usize) {
        self.tree.remember_at_most(blocks.min(self.config.remembered_max).max(1));
    }
}

#[cfg(test)]
mod tests;
