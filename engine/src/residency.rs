//! Which blocks are in DRAM: the map that lookups ask, and the order in which blocks leave.
//!
//! A block is *dirty* until the store has it (then it cannot leave), and *held* while a lease, a load, a reader or a pin has it.
//! Of one size those leave first that the policy says; whom it does not know, least recently used first. Leaves of a chain
//! leave before their ancestors: a block without its ancestors is worthless. This module moves no bytes; it gives and takes
//! slots.
//!
//! Two locks: that of the policies, which is held for as long as a policy thinks, comes before that of the map, which is
//! all that lookups take.

mod accounts;
mod hot;
mod key_hasher;
mod meant;
mod pins;
mod prefixes;
mod purge;

pub(crate) use self::key_hasher::KeyHasher;
pub(crate) use self::meant::Meant;
pub(crate) use self::pins::PinTotals;
pub(crate) use self::prefixes::Prefix;
pub(crate) use self::purge::InDram;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::{Condvar, Mutex};
use pegaflow_tiers::{Arena, BlockKey, NamespaceHandle, RecordId, ResidentBlock, Slot};

use crate::fetch::{CountersByReason, FetchReason};
use crate::scheduler::{Asked, SizePolicies};

use self::pins::Pins;

/// How many blocks one search for a victim looks at before it takes the oldest that may leave.
const VICTIM_TRIES: usize = 1024;
/// How many of the oldest blocks of another size have their chunks looked at when one is to be emptied.
const CHUNK_TRIES: usize = 16;
/// Dirty bytes may take this share of DRAM (in percent); beyond it saves are dropped, so that loads always find room.
const DIRTY_PERCENT_MAX: u64 = 75;
/// What a block is worth at least that a request waits for, in uses per second: one in a minute, a lease's time.
pub(crate) const ASKED_WORTH: f32 = 1.0 / 60.0;
/// How often a slot is looked for, if others take those that were made free.
const COLDER_TRIES: usize = 4;
/// The time begins here: there are moments before it.
const FIRST_TICK: u64 = 1 << 62;
/// How many of the coldest blocks are looked at for one that nobody has used since it came back.
const COLDEST_TRIES: usize = 64;
/// How many blocks the policies are told of before one is asked who leaves; and how many under one lock of the map.
const ENTER_MAX: usize = 4096;
const ENTER_STEP: usize = 64;

/// A block in DRAM. Its payload does not change any more.
pub(crate) struct Resident {
    pub(crate) id: RecordId,
    pub(crate) parent: BlockKey,
    pub(crate) slot: Arc<Slot>,
    pub(crate) payload_bytes: u64,
    /// Blocks before it in its chain.
    pub(crate) depth: u32,
    dirty: AtomicBool,
    children: AtomicU32,
    /// Whether it was not admitted to the drive.
    is_refused: AtomicBool,
    /// Whether it waits for the policies to be told of it.
    is_entering: AtomicBool,
    /// Why it was fetched, if it was and nobody has used it yet: the rank of the reason, from 1; else 0.
    fetched: AtomicU8,
    /// Pins that hold it. Changes under the lock of the map only.
    pins: AtomicU32,
    /// When it was used last, in seconds of [`Residency::now_s`].
    used_s: AtomicU32,
}

impl Resident {
    pub(crate) fn new(
        id: RecordId,
        (parent, depth): (BlockKey, u32),
        slot: Arc<Slot>,
        payload_bytes: u64,
        dirty: bool,
    ) -> Arc<Self> {
        let children = AtomicU32::new(0);
        let (dirty, is_refused) = (AtomicBool::new(dirty), AtomicBool::new(false));
        let (is_entering, fetched) = (AtomicBool::new(false), AtomicU8::new(0));
        let (pins, used_s) = (AtomicU32::new(0), AtomicU32::new(0));
        Arc::new(Self {
            id,
            parent,
            slot,
            payload_bytes,
            depth,
            dirty,
            children,
            is_refused,
            is_entering,
            fetched,
            pins,
            used_s,
        })
    }

    /// Notes that it was read before it was asked for, and why.
    pub(crate) fn mark_fetched(&self, reason: FetchReason) {
        self.fetched.store(reason.rank() as u8 + 1, Ordering::Relaxed);
    }

    /// The rank of the reason for which it was fetched, if nobody has used it since; for one caller only.
    fn take_fetched(&self) -> Option<usize> {
        usize::from(self.fetched.swap(0, Ordering::Relaxed)).checked_sub(1)
    }

    /// Whether it was fetched for that reason, and nobody has used it since.
    fn is_fetched_for(&self, reason: FetchReason) -> bool {
        usize::from(self.fetched.load(Ordering::Relaxed)) == reason.rank() + 1
    }

    /// Whether somebody is to use it soon.
    fn is_fetched(&self) -> bool {
        self.fetched.load(Ordering::Relaxed) > 0 && !self.is_fetched_for(FetchReason::HotSet)
    }

    /// Notes that the block was not admitted to the drive.
    pub(crate) fn refuse(&self) {
        self.is_refused.store(true, Ordering::Release);
    }

    /// Whether the block was not admitted; true for one caller only, who asks again.
    pub(crate) fn take_refused(&self) -> bool {
        self.is_refused.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Whether it is to stay whoever needs room.
    fn is_pinned(&self) -> bool {
        self.pins.load(Ordering::Relaxed) > 0
    }
}

type Build = BuildHasherDefault<KeyHasher>;

#[derive(Default)]
struct State {
    blocks: HashMap<RecordId, Arc<Resident>, Build>,
    /// The same by fingerprint, for the store, which knows no more of most records.
    by_fingerprint: HashMap<u64, RecordId, Build>,
    /// Who lies in which chunk of the arena.
    by_chunk: BTreeSet<(u32, RecordId)>,
    /// By slot size: least recently used first, with the tick of the last use.
    order: BTreeMap<usize, LruCache<RecordId, u64, Build>>,
    /// Named objects of which the store may know what is over: their removal is not durable yet, or their newest version
    /// could not be written. By the number of the removal.
    removed: HashMap<RecordId, u64, Build>,
    removals: u64,
    /// Numbers of namespaces that were purged: nothing under them is found, and nothing comes under them any more.
    purged: HashSet<NamespaceHandle>,
    /// How many blocks are here of which the parent is not, by that parent.
    without_parent: HashMap<RecordId, u32, Build>,
    /// Of whom the policies are to be told.
    entering: VecDeque<RecordId>,
    tick: u64,
    /// Ticks from here on downwards are of blocks that nobody has used since they came back from an earlier run.
    coldest: u64,
    dirty_bytes: u64,
    pinned: PinTotals,
    evicted: Evicted,
    fetched: Arc<CountersByReason>,
}

/// How many blocks have left, and for whom.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// For a block of the same size that was saved or loaded.
    pub(crate) room: u64,
    /// With a whole chunk, for blocks of another size.
    pub(crate) other_size: u64,
    /// For a block that was fetched and is worth more.
    pub(crate) colder: u64,
}

/// Where those wait who found no room, until there may be some.
#[derive(Default)]
struct Room {
    changes: Mutex<u64>,
    changed: Condvar,
}

impl Room {
    /// How often there may have come to be room; to be asked before looking for it.
    fn changes(&self) -> u64 {
        *self.changes.lock()
    }

    fn announce(&self) {
        *self.changes.lock() += 1;
        self.changed.notify_all();
    }

    /// Waits until there is another change than `seen`; false if there is none by `deadline`.
    fn wait(&self, seen: u64, deadline: Instant) -> bool {
        let mut changes = self.changes.lock();
        !self.changed.wait_while_until(&mut changes, |changes| *changes == seen, deadline).timed_out()
    }
}

/// All blocks in DRAM.
pub(crate) struct Residency {
    arena: Arc<Arena>,
    /// Who leaves. Locked before the state; whoever takes a block out holds it.
    policies: Mutex<SizePolicies>,
    /// Whether the policies only know an order, in which the blocks of a chain come last to first. Others know the tree, and
    /// are told of a block when it may leave.
    is_ordered: bool,
    state: Mutex<State>,
    /// What somebody keeps here. Locked before the policies.
    pins: Mutex<Pins>,
    pins_changed: Condvar,
    opened: Instant,
    room: Arc<Room>,
    /// What becomes of fetched blocks.
    pub(crate) fetched: Arc<CountersByReason>,
}

impl Residency {
    pub(crate) fn new(arena: Arc<Arena>, policies: SizePolicies) -> Self {
        let room = Arc::new(Room::default());
        let growing = Arc::clone(&room);
        arena.on_growth(Box::new(move || growing.announce()));
        let (is_ordered, policies) = (policies.take_last_first(), Mutex::new(policies));
        let fetched = Arc::<CountersByReason>::default();
        let (tick, coldest) = (FIRST_TICK, FIRST_TICK);
        let state = State { fetched: Arc::clone(&fetched), tick, coldest, ..State::default() };
        let (state, pins, pins_changed) = (Mutex::new(state), Mutex::default(), Condvar::new());
        Self { arena, policies, is_ordered, state, pins, pins_changed, opened: Instant::now(), room, fetched }
    }

    /// A request for a chain: those of its blocks that are here, and those that are not.
    pub(crate) fn request(&self, asked: &Asked) {
        // Without those that earlier requests have left here it would not be known as their next turn.
        while self.enter(&mut self.policies.lock()) {}
        let is_block = asked.place.namespace != NamespaceHandle(0);
        for shard in 0..asked.shards {
            let place = RecordId { shard, ..asked.place };
            let keys = asked.prefixes.iter().map(|prefix| place.fingerprint_of(*prefix));
            self.policies.lock().request(asked.slot_bytes, is_block, place.namespace.0.into(), keys);
        }
    }

    /// What the policies have learned, to be kept; `None` if that is nothing.
    pub(crate) fn learned(&self) -> Option<Vec<u8>> {
        self.policies.lock().note()
    }

    /// Begins with what an earlier run had learned; false if that can not be read.
    pub(crate) fn restore_learned(&self, note: &[u8]) -> bool {
        self.policies.lock().restore(note)
    }

    /// Tells the policies of blocks that have come or may leave by now; whether there are more.
    fn enter(&self, policies: &mut SizePolicies) -> bool {
        for _ in 0..ENTER_MAX / ENTER_STEP {
            let mut state = self.state.lock();
            let count = state.entering.len().min(ENTER_STEP);
            let ids: Vec<RecordId> = state.entering.drain(..count).collect();
            let blocks: Vec<_> = ids.into_iter().filter_map(|id| state.take_entering(&id)).collect();
            drop(state);
            // None of them goes meanwhile: that takes the lock of the policies.
            for (block, slot_bytes) in blocks.into_iter().filter(|(block, _)| self.is_ordered || !block.is_dirty()) {
                let parent = (!block.parent.is_root()).then(|| block.id.with_key(block.parent).fingerprint());
                policies.enter(slot_bytes, block.id.fingerprint(), parent, block.id.namespace.0.into());
            }
            if count < ENTER_STEP {
                return false;
            }
        }
        true
    }

    /// The block, if it is here. Does not count as a use.
    pub(crate) fn get(&self, id: &RecordId) -> Option<Arc<Resident>> {
        self.state.lock().find(id).cloned()
    }

    /// The block with this fingerprint as the store has it: not an object, whose bytes here may be newer ones.
    pub(crate) fn stored_block(&self, fingerprint: u64) -> Option<ResidentBlock> {
        let state = self.state.lock();
        let id = state.by_fingerprint.get(&fingerprint).filter(|id| id.namespace != NamespaceHandle(0))?;
        let block = state.blocks.get(id).filter(|block| !block.is_dirty())?;
        Some(ResidentBlock { id: *id, slot: Arc::clone(&block.slot) })
    }

    pub(crate) fn contains(&self, id: &RecordId) -> bool {
        self.state.lock().find(id).is_some()
    }

    /// For each id the block, if it is here; one lock for all.
    pub(crate) fn get_many(&self, ids: impl Iterator<Item = RecordId>, found: &mut Vec<Option<Arc<Resident>>>) {
        let state = self.state.lock();
        found.extend(ids.map(|id| state.find(&id).cloned()));
    }

    /// Counts as a use of the chain: the first block becomes the most recent, so that the last one leaves first.
    pub(crate) fn touch_chain<'a>(&self, ids: impl DoubleEndedIterator<Item = (&'a RecordId, usize)>) {
        let now_s = self.now_s();
        let mut state = self.state.lock();
        for (id, slot_bytes) in ids.rev() {
            state.touch(id, slot_bytes);
            state.blocks.get(id).into_iter().for_each(|block| block.used_s.store(now_s, Ordering::Relaxed));
            if self.is_ordered {
                state.start_entering(id);
            }
        }
    }

    /// A free slot, made by letting others leave if need be; `None` when everything is dirty or held.
    pub(crate) fn alloc(&self, payload_bytes: usize) -> Option<Slot> {
        loop {
            if let Some(slot) = self.arena.alloc(payload_bytes) {
                return Some(slot);
            }
            // What is larger than the arena is by now gets no room, whoever leaves.
            if Arena::slot_bytes(payload_bytes) as u64 > self.arena.ready_bytes() {
                return None;
            }
            let mut policies = self.policies.lock();
            self.enter(&mut policies);
            let victims = self.state.lock().take_victims(Arena::slot_bytes(payload_bytes), &mut policies);
            drop(policies);
            if victims.is_empty() {
                return None;
            }
            // Slots go back to the arena here, outside of the locks.
            drop(victims);
        }
    }

    /// A free slot for a block that comes before it is loaded: one that nobody has, or else that of a block of its size that
    /// is worth less. Never one of a block that was fetched and not used yet, or fetches would undo each other's work. Does
    /// not wait; `None` if there is none such.
    ///
    /// Worth less: by the policy's own measure, if it has one; what somebody asks for at this moment is worth a use within
    /// the minute that a lease lasts, if the policy says no more. A policy that only knows an order puts
    /// what is asked for behind all that is here, so those have less who were used last before `asked_at`
    /// ([`Residency::tick`]); for a newcomer that nobody asks for nobody leaves.
    pub(crate) fn alloc_colder(
        &self,
        payload_bytes: usize,
        newcomer: &RecordId,
        asked_at: Option<u64>,
    ) -> Option<Slot> {
        let slot_bytes = Arena::slot_bytes(payload_bytes);
        for _ in 0..COLDER_TRIES {
            if let Some(slot) = self.arena.alloc(payload_bytes) {
                return Some(slot);
            }
            let mut policies = self.policies.lock();
            self.enter(&mut policies);
            let victim = self.state.lock().take_colder(slot_bytes, newcomer, asked_at, &mut policies);
            drop(policies);
            // The slot goes back to the arena outside of the locks; somebody else may be faster.
            drop(victim?);
        }
        self.arena.alloc(payload_bytes)
    }

    /// The time of the residency: it goes on with every use of a block.
    pub(crate) fn tick(&self) -> u64 {
        self.state.lock().tick
    }

    /// How long ago the engine was opened.
    pub(crate) fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    /// The same in seconds.
    fn now_s(&self) -> u32 {
        u32::try_from(self.age().as_secs()).unwrap_or(u32::MAX)
    }

    /// Blocks are loaded: what was fetched of them was not fetched in vain.
    pub(crate) fn note_loaded<'a>(&self, blocks: impl Iterator<Item = &'a Arc<Resident>>) {
        for counters in blocks.filter_map(|block| self.fetched.get(block.take_fetched()?)) {
            counters.used_blocks.add(1);
        }
    }

    /// A free slot for bytes that the store does not have yet; `None` also when too much of what is not pinned is dirty
    /// already.
    pub(crate) fn alloc_dirty(&self, payload_bytes: usize) -> Option<Slot> {
        let slot_bytes = Arena::slot_bytes(payload_bytes) as u64;
        let (dirty_bytes, pinned_bytes) = {
            let state = self.state.lock();
            (state.dirty_bytes, state.pinned.bytes)
        };
        let limit = self.arena.ready_bytes().saturating_sub(pinned_bytes) / 100 * DIRTY_PERCENT_MAX;
        if dirty_bytes + slot_bytes > limit {
            return None;
        }
        self.alloc(payload_bytes)
    }

    /// As `alloc` (or `alloc_dirty`), waiting for room until `deadline`.
    pub(crate) fn alloc_until(&self, payload_bytes: usize, dirty: bool, deadline: Instant) -> Option<Slot> {
        let attempt = || if dirty { self.alloc_dirty(payload_bytes) } else { self.alloc(payload_bytes) };
        loop {
            let seen = self.room.changes();
            if let Some(slot) = attempt() {
                return Some(slot);
            }
            if !self.room.wait(seen, deadline) {
                return attempt();
            }
        }
    }

    /// Makes a block visible. If the id is here already, `replace` decides whether the new one takes its place; the one
    /// that is here afterwards is returned. One of a namespace that was purged is returned as it is and stays invisible: it goes
    /// when its users let go of it.
    pub(crate) fn insert(&self, block: Arc<Resident>, replace: bool) -> Arc<Resident> {
        block.used_s.store(self.now_s(), Ordering::Relaxed);
        let mut policies = replace.then(|| self.policies.lock());
        let mut state = self.state.lock();
        if state.is_purged(block.id.namespace) {
            // It was never counted as dirty.
            block.dirty.store(false, Ordering::Release);
            return block;
        }
        state.removed.remove(&block.id);
        if let Some(present) = state.blocks.get(&block.id) {
            let Some(policies) = &mut policies else { return Arc::clone(present) };
            let id = block.id;
            drop(state.detach(&id, policies));
        }
        if block.is_dirty() {
            state.dirty_bytes += block.slot.bytes() as u64;
        }
        state.join_chain(&block);
        let (id, slot_bytes) = (block.id, block.slot.bytes());
        state.by_chunk.insert((block.slot.chunk(), id));
        state.by_fingerprint.insert(id.fingerprint(), id);
        state.blocks.insert(id, Arc::clone(&block));
        if block.is_fetched_for(FetchReason::HotSet) {
            state.put_coldest(&id, slot_bytes);
        } else {
            state.touch(&id, slot_bytes);
        }
        // The order of a chain is known when all of it has come, see `touch_chain`.
        let is_object = id.namespace == NamespaceHandle(0);
        let enters = if self.is_ordered { is_object } else { !block.is_dirty() };
        if enters {
            state.start_entering(&id);
        }
        block
    }

    /// The store has the block (or never will): it may leave.
    pub(crate) fn mark_clean(&self, block: &Resident) {
        if block.dirty.swap(false, Ordering::AcqRel) {
            let mut state = self.state.lock();
            state.dirty_bytes -= block.slot.bytes() as u64;
            if !self.is_ordered {
                state.start_entering(&block.id);
            }
            drop(state);
            self.room.announce();
        }
    }

    /// A clean block is to go to the store after all: it may not leave before.
    pub(crate) fn mark_dirty(&self, block: &Resident) {
        if !self.is_purged(block.id.namespace) && !block.dirty.swap(true, Ordering::AcqRel) {
            self.state.lock().dirty_bytes += block.slot.bytes() as u64;
        }
    }

    /// Tells those who wait that a lease or a reader has gone.
    pub(crate) fn notify_room(&self) {
        self.room.announce();
    }

    /// Takes a named object out; whatever the store still has of it is hidden until [`Residency::end_removal`].
    pub(crate) fn remove(&self, id: &RecordId) -> (Option<Arc<Resident>>, u64) {
        let mut policies = self.policies.lock();
        let mut state = self.state.lock();
        state.removals += 1;
        let removal = state.removals;
        state.removed.insert(*id, removal);
        (state.detach(id, &mut policies), removal)
    }

    /// The removal is durable: the store itself no longer finds the object.
    pub(crate) fn end_removal(&self, id: &RecordId, removal: u64) {
        let mut state = self.state.lock();
        if state.removed.get(id) == Some(&removal) {
            state.removed.remove(id);
        }
    }

    /// The store could not take this version of an object: what it has is older, and is hidden until
    /// [`Residency::end_hiding`] or [`Residency::end_removal`].
    pub(crate) fn hide(&self, object: &Arc<Resident>) {
        let mut state = self.state.lock();
        if state.blocks.get(&object.id).is_some_and(|newest| Arc::ptr_eq(newest, object)) {
            state.removals += 1;
            let removal = state.removals;
            state.removed.insert(object.id, removal);
        }
    }

    /// The store has this version of an object; if it is the newest, nothing has to be hidden.
    pub(crate) fn end_hiding(&self, object: &Arc<Resident>) {
        let mut state = self.state.lock();
        if state.blocks.get(&object.id).is_some_and(|newest| Arc::ptr_eq(newest, object)) {
            state.removed.remove(&object.id);
        }
    }

    /// The objects of which the store may know what is over, with the numbers for [`Residency::end_removal`].
    pub(crate) fn removed(&self) -> Vec<(RecordId, u64)> {
        self.state.lock().removed.iter().map(|(id, removal)| (*id, *removal)).collect()
    }

    /// All that are here.
    pub(crate) fn ids(&self) -> Vec<RecordId> {
        self.state.lock().blocks.keys().copied().collect()
    }

    pub(crate) fn is_removed(&self, id: &RecordId) -> bool {
        self.state.lock().removed.contains_key(id)
    }

    /// (blocks, dirty bytes, evicted so far)
    pub(crate) fn gauges(&self) -> (u64, u64, Evicted) {
        let state = self.state.lock();
        (state.blocks.len() as u64, state.dirty_bytes, state.evicted)
    }
}

impl State {
    /// The block, if it is here and was not purged.
    fn find(&self, id: &RecordId) -> Option<&Arc<Resident>> {
        self.blocks.get(id).filter(|_| !self.is_purged(id.namespace))
    }

    fn touch(&mut self, id: &RecordId, slot_bytes: usize) {
        self.tick += 1;
        let tick = self.tick;
        if self.blocks.get(id).is_some_and(|block| !block.is_pinned()) {
            self.order
                .entry(slot_bytes)
                .or_insert_with(|| LruCache::unbounded_with_hasher(Build::default()))
                .put(*id, tick);
        }
    }

    /// The block is less recent than all others. It is not pinned.
    fn put_coldest(&mut self, id: &RecordId, slot_bytes: usize) {
        self.coldest -= 1;
        let tick = self.coldest;
        let order = self.order.entry(slot_bytes).or_insert_with(|| LruCache::unbounded_with_hasher(Build::default()));
        order.put(*id, tick);
        order.demote(id);
    }

    /// The policies are to be told of a block, if it is here.
    fn start_entering(&mut self, id: &RecordId) {
        if let Some(block) = self.blocks.get(id).filter(|block| !block.is_pinned())
            && !block.is_entering.swap(true, Ordering::Relaxed)
        {
            self.entering.push_back(*id);
        }
    }

    /// A block of which the policies are told now, with the bytes of its slot. Of two with one fingerprint the policies
    /// know the later one.
    fn take_entering(&self, id: &RecordId) -> Option<(Arc<Resident>, usize)> {
        let block = self.blocks.get(id)?;
        block.is_entering.store(false, Ordering::Relaxed);
        let is_meant = self.by_fingerprint.get(&id.fingerprint()) == Some(id) && !block.is_pinned();
        is_meant.then(|| (Arc::clone(block), block.slot.bytes()))
    }

    fn detach(&mut self, id: &RecordId, policies: &mut SizePolicies) -> Option<Arc<Resident>> {
        let block = self.blocks.remove(id)?;
        let slot_bytes = block.slot.bytes();
        self.by_chunk.remove(&(block.slot.chunk(), *id));
        if self.by_fingerprint.get(&id.fingerprint()) == Some(id) {
            self.by_fingerprint.remove(&id.fingerprint());
            policies.leave(slot_bytes, id.fingerprint(), id.namespace.0.into());
        }
        self.leave_order(id, slot_bytes);
        if let Some(counters) = block.take_fetched().and_then(|rank| self.fetched.get(rank)) {
            counters.wasted_blocks.add(1);
            counters.wasted_bytes.add(slot_bytes as u64);
        }
        self.leave_chain(&block);
        Some(block)
    }

    fn leave_order(&mut self, id: &RecordId, slot_bytes: usize) {
        if let Some(order) = self.order.get_mut(&slot_bytes) {
            order.pop(id);
            if order.is_empty() {
                self.order.remove(&slot_bytes);
            }
        }
    }

    /// Counts a block that comes as a child of its parent, and those that came before it as its own: reads end in any order.
    fn join_chain(&mut self, block: &Resident) {
        if let Some(children) = self.without_parent.remove(&block.id) {
            block.children.store(children, Ordering::Relaxed);
        }
        if block.parent.is_root() {
            return;
        }
        let parent = block.id.with_key(block.parent);
        match self.blocks.get(&parent) {
            Some(parent) => drop(parent.children.fetch_add(1, Ordering::Relaxed)),
            None => *self.without_parent.entry(parent).or_default() += 1,
        }
    }

    /// The reverse, for a block that has gone.
    fn leave_chain(&mut self, block: &Resident) {
        let children = block.children.load(Ordering::Relaxed);
        if children > 0 {
            self.without_parent.insert(block.id, children);
        }
        if block.parent.is_root() {
            return;
        }
        let parent = block.id.with_key(block.parent);
        if let Some(parent) = self.blocks.get(&parent) {
            let _ = parent.children.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        } else if let Some(children) = self.without_parent.get_mut(&parent) {
            *children -= 1;
            if *children == 0 {
                self.without_parent.remove(&parent);
            }
        }
    }

    fn may_leave(&self, id: &RecordId) -> bool {
        // One count is the map's own: more means that somebody reads it.
        self.blocks.get(id).is_some_and(|block| {
            !block.is_dirty() && Arc::strong_count(block) == 1 && Arc::strong_count(&block.slot) == 1
        })
    }

    fn may_leave_as_leaf(&self, id: &RecordId) -> bool {
        let has_no_child = |block: &Arc<Resident>| block.children.load(Ordering::Relaxed) == 0;
        self.may_leave(id) && self.blocks.get(id).is_some_and(has_no_child)
    }

    /// Takes out whoever must leave so that a slot of `wanted` bytes may become free: the one of its own size that is worth
    /// least, or a whole chunk of another size whose oldest block is older than the oldest of its own. Empty if nobody may
    /// leave.
    fn take_victims(&mut self, wanted: usize, policies: &mut SizePolicies) -> Vec<Arc<Resident>> {
        let oldest = |order: &LruCache<RecordId, u64, Build>| order.peek_lru().map_or(u64::MAX, |(_, &tick)| tick);
        let own = self.order.get(&wanted).map_or(u64::MAX, oldest);
        let other = self
            .order
            .iter()
            .filter(|(bytes, _)| **bytes != wanted)
            .map(|(bytes, order)| (oldest(order), *bytes))
            .min();
        let mut victims = Vec::new();
        if let Some((age, bytes)) = other
            && age < own
        {
            victims = self.take_chunk(bytes, policies);
            self.evicted.other_size += victims.len() as u64;
        }
        if victims.is_empty() {
            let least = self.take_least(wanted, policies);
            victims.extend(least.or_else(|| self.take_oldest(wanted, policies)));
            self.evicted.room += victims.len() as u64;
        }
        if victims.is_empty() {
            let sizes: Vec<usize> = self.order.keys().copied().filter(|bytes| *bytes != wanted).collect();
            victims = sizes
                .into_iter()
                .map(|bytes| self.take_chunk(bytes, policies))
                .find(|taken| !taken.is_empty())
                .unwrap_or_default();
            self.evicted.other_size += victims.len() as u64;
        }
        victims
    }

    /// The block of a size that its policy lets go, or the oldest if the policy does not know that.
    fn take_least(&mut self, slot_bytes: usize, policies: &mut SizePolicies) -> Option<Arc<Resident>> {
        if let Some(unknown) = self.unknown_leaf(slot_bytes, policies) {
            return self.detach(&unknown, policies);
        }
        let least = policies.evict(slot_bytes, &mut |fingerprint| {
            self.by_fingerprint.get(&fingerprint).is_some_and(|id| self.may_leave_as_leaf(id))
        })?;
        let id = *self.by_fingerprint.get(&least)?;
        self.detach(&id, policies)
    }

    /// The oldest of a size, if its policy does not know it; of blocks that have come back from an earlier run and that
    /// nobody has used, the first of the oldest that may leave: they came in some disorder.
    fn unknown_leaf(&self, slot_bytes: usize, policies: &SizePolicies) -> Option<RecordId> {
        for (id, _) in self.order.get(&slot_bytes)?.iter().rev().take(COLDEST_TRIES) {
            if policies.contains(slot_bytes, id.fingerprint(), id.namespace.0.into()) {
                return None;
            }
            if self.may_leave_as_leaf(id) {
                return Some(*id);
            }
            self.blocks.get(id).filter(|block| block.is_fetched_for(FetchReason::HotSet))?;
        }
        None
    }

    /// A block of a size that is worth less than the newcomer, see [`Residency::alloc_colder`].
    fn take_colder(
        &mut self,
        slot_bytes: usize,
        newcomer: &RecordId,
        asked_at: Option<u64>,
        policies: &mut SizePolicies,
    ) -> Option<Arc<Resident>> {
        let may_leave = |state: &Self, fingerprint: u64| {
            let id = state.by_fingerprint.get(&fingerprint)?;
            let is_free = state.may_leave_as_leaf(id) && !state.blocks.get(id)?.is_fetched();
            is_free.then_some(*id)
        };
        let colder = if policies.take_last_first() {
            let asked_at = asked_at?;
            let order = self.order.get(&slot_bytes)?;
            // Who is asked for nothing in vain gives nobody another round.
            order.peek_lru().filter(|(_, tick)| **tick < asked_at)?;
            let is_older = |id: &RecordId| order.peek(id).is_some_and(|tick| *tick < asked_at);
            match self.unknown_leaf(slot_bytes, policies).filter(|id| {
                self.blocks.get(id).is_some_and(|block| block.is_fetched_for(FetchReason::HotSet)) && is_older(id)
            }) {
                Some(unused) => unused.fingerprint(),
                None => policies.evict(slot_bytes, &mut |fingerprint| {
                    may_leave(self, fingerprint).as_ref().is_some_and(is_older)
                })?,
            }
        } else {
            let newcomer = (newcomer.fingerprint(), newcomer.namespace.0.into());
            let least = asked_at.map_or(0.0, |_| ASKED_WORTH);
            policies
                .evict_for(slot_bytes, newcomer, least, &mut |fingerprint| may_leave(self, fingerprint).is_some())?
        };
        let id = *self.by_fingerprint.get(&colder)?;
        self.evicted.colder += 1;
        self.detach(&id, policies)
    }

    /// The oldest block of a size that may leave, leaves of chains first.
    fn take_oldest(&mut self, slot_bytes: usize, policies: &mut SizePolicies) -> Option<Arc<Resident>> {
        let mut parent_that_may_leave = None;
        for _ in 0..VICTIM_TRIES.min(self.order.get(&slot_bytes)?.len()) {
            let id = *self.order.get(&slot_bytes)?.peek_lru()?.0;
            if self.may_leave(&id) {
                let is_parent = self.blocks.get(&id).is_some_and(|block| block.children.load(Ordering::Relaxed) > 0);
                if !is_parent {
                    return self.detach(&id, policies);
                }
                parent_that_may_leave.get_or_insert(id);
            }
            self.touch(&id, slot_bytes);
        }
        parent_that_may_leave.and_then(|id| self.detach(&id, policies))
    }

    /// All blocks of one chunk: the first chunk of which all may leave, among those of the oldest blocks of a size.
    fn take_chunk(&mut self, slot_bytes: usize, policies: &mut SizePolicies) -> Vec<Arc<Resident>> {
        let Some(order) = self.order.get(&slot_bytes) else { return Vec::new() };
        let oldest = order.iter().rev().take(CHUNK_TRIES).filter_map(|(id, _)| Some(self.blocks.get(id)?.slot.chunk()));
        let members = |chunk: u32| -> Vec<RecordId> {
            let from_here = self.by_chunk.range((chunk, RecordId::LEAST)..);
            from_here.take_while(|(of, _)| *of == chunk).map(|(_, id)| *id).collect()
        };
        let free = oldest.map(members).find(|ids| ids.iter().all(|id| self.may_leave(id)));
        free.unwrap_or_default().iter().filter_map(|id| self.detach(id, policies)).collect()
    }
}

#[cfg(test)]
mod tests;
