//! Bringing the hot set back: after an open, on a thread of its own, in steps. What a step reads goes behind all loads and
//! before nothing that somebody waits for; it takes free DRAM, and stops where there is none.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use pegaflow_tiers::{Arena, GroupGeometry, Location, NamespaceHandle, RecordId, Store};

use super::keep::unix_ms;
use super::reads::in_turn;
use super::{HotBlock, HotSet, piece};
use crate::api::{WarmProgress, WarmState};
use crate::fetch::{FetchEnd, FetchReason, FetchWish};
use crate::inner::Inner;

/// Blocks of one step: as much as is read in the order of the drive and not in that of their worth.
const STEP_BYTES: u64 = 64 << 20;
/// But not more than this part of DRAM, and no more blocks than so many.
const STEP_PART: u64 = 16;
const STEP_BLOCKS_MAX: usize = 1024;
/// Steps in flight: one is read while the next one is made.
const STEPS: usize = 2;
/// Sizes of blocks in one step at most: each is a wish of its own.
const SIZES_MAX: usize = 16;
/// How much of DRAM is filled at most, in percent; the rest is left to what comes first.
const FILL_PERCENT_MAX: u64 = 90;
/// As long as more than this part of DRAM waits to be written, the drive is left to the writer.
const DIRTY_PART: u64 = 8;
/// No read of a step is started later than this.
const STEP_DEADLINE: Duration = Duration::from_secs(60);
/// Without a sign that there is room it is looked again after this time.
const ROOM_PATIENCE: Duration = Duration::from_millis(500);

/// What is known of the hot set of the run before, and of the list that this run keeps.
pub(crate) struct WarmStart {
    opened: Instant,
    is_on: bool,
    progress: Mutex<Known>,
}

struct Known {
    progress: WarmProgress,
    /// The newest list of the store.
    last_list: u64,
    /// What had been asked for and saved when it was written.
    activity: u64,
}

impl WarmStart {
    pub(crate) fn new(opened: Instant, is_on: bool) -> Self {
        let state = if is_on { WarmState::Running } else { WarmState::Off };
        let progress = WarmProgress { state, ..WarmProgress::default() };
        Self { opened, is_on, progress: Mutex::new(Known { progress, last_list: 0, activity: 0 }) }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.is_on
    }

    pub(crate) fn progress(&self) -> WarmProgress {
        let mut progress = self.progress.lock().progress;
        if progress.state == WarmState::Running {
            progress.took_ms = self.opened.elapsed().as_millis() as u64;
        }
        progress
    }

    /// Whether a new list may take the place of the last one: that is in DRAM as far as it can be, and something has happened
    /// since.
    pub(super) fn may_keep(&self, activity: u64) -> bool {
        let known = self.progress.lock();
        !matches!(known.progress.state, WarmState::Off | WarmState::Running) && known.activity != activity
    }

    /// The number of the next list: when it is written, but above that of all others even if the clock was set back.
    pub(super) fn next_list(&self, unix_ms: u64) -> u64 {
        let mut known = self.progress.lock();
        known.last_list = unix_ms.max(known.last_list.saturating_add(1));
        known.last_list
    }

    /// A list of so many blocks was written.
    pub(super) fn kept(&self, activity: u64, blocks: usize) {
        let mut known = self.progress.lock();
        (known.activity, known.progress.kept_blocks) = (activity, blocks as u64);
    }

    fn change(&self, change: impl FnOnce(&mut WarmProgress)) {
        change(&mut self.progress.lock().progress);
    }

    fn note(&self, step: WarmStep) {
        self.change(|progress| match step {
            WarmStep::Missing => progress.missing_blocks += 1,
            WarmStep::Came { blocks, bytes } => {
                progress.read_blocks += blocks;
                progress.read_bytes += bytes;
            }
            WarmStep::At(_) => {}
        });
    }
}

/// What has come of a list so far.
#[derive(Debug, Clone, Copy)]
pub(super) enum WarmStep {
    /// One of its blocks is not in the store any more, or comes after one that is not.
    Missing,
    /// Blocks are in DRAM, each shard for itself.
    Came { blocks: u64, bytes: u64 },
    /// So many of its blocks were looked for.
    At(usize),
}

/// The body of the thread.
pub(crate) fn warm(inner: &Arc<Inner>) {
    let note = |step| inner.warm_start.note(step);
    let of_list = |(store, list)| Warming::new(inner, store, list, &note, &|| false).run();
    // A close on the way leaves the list as it is: it is better than what came back of it.
    if let Some(state) = last_list(inner).map_or(Some(WarmState::Nothing), of_list) {
        let took_ms = inner.warm_start.opened.elapsed().as_millis() as u64;
        inner.warm_start.change(|progress| (progress.state, progress.took_ms) = (state, took_ms));
        let WarmProgress { listed_blocks, missing_blocks, read_blocks, read_bytes, .. } = inner.warm_start.progress();
        let (read_mib, state) = (read_bytes >> 20, state.as_str());
        if listed_blocks > 0 {
            tracing::info!(
                state,
                listed_blocks,
                missing_blocks,
                read_blocks,
                read_mib,
                took_ms,
                "the hot set is back in DRAM"
            );
        }
    }
    inner.drive.end_helper();
}

/// What the run before has kept; `None` if there is none.
fn last_list(inner: &Inner) -> Option<(Arc<Store>, HotSet)> {
    let store = inner.drive.store()?;
    let note = |number| {
        let found = store.note(&piece::name(number));
        found.inspect_err(|error| tracing::warn!(%error, "which blocks were hot can not be read")).ok().flatten()
    };
    let list = piece::decode((0..piece::PIECES_MAX).filter_map(note))?;
    let mut known = inner.warm_start.progress.lock();
    known.last_list = list.written_unix_ms;
    known.progress.listed_blocks = list.blocks.len() as u64;
    drop(known);
    Some((store, list))
}

/// A wish of a step has ended.
struct Ended {
    step: u64,
    block_bytes: u64,
    planned_bytes: u64,
    end: FetchEnd,
}

/// A step whose blocks are being read.
struct Step {
    number: u64,
    wishes_left: usize,
    /// Where it begins in the list.
    first: usize,
    /// In the order of their worth.
    ids: Vec<RecordId>,
}

/// Brings the blocks of a list to DRAM, in its order.
pub(super) struct Warming<'a> {
    inner: &'a Arc<Inner>,
    note: &'a dyn Fn(WarmStep),
    is_unwanted: &'a dyn Fn() -> bool,
    store: Arc<Store>,
    blocks: Vec<HotBlock>,
    /// Seconds since the list was written.
    away_s: u32,
    /// Which of the blocks are not in the store any more, or come after one that is not.
    is_gone: Vec<bool>,
    groups: HashMap<(NamespaceHandle, u16), Option<GroupGeometry>>,
    next: usize,
    steps: VecDeque<Step>,
    numbers: u64,
    /// What the steps take in DRAM when all has come.
    planned_bytes: u64,
    is_full: bool,
    /// There was no room, but DRAM is still growing: a sign is waited for.
    is_held_up: bool,
    /// Blocks for which there was no room, as counted by the fetches.
    no_room_blocks: u64,
    sender: Sender<Ended>,
    receiver: Receiver<Ended>,
}

/// What came of making a step.
enum Made {
    Step,
    /// The list is at its end.
    End,
    NoRoom,
}

impl<'a> Warming<'a> {
    /// `note` is told what comes of the list; `is_unwanted` is asked before each step.
    pub(super) fn new(
        inner: &'a Arc<Inner>,
        store: Arc<Store>,
        HotSet { written_unix_ms, blocks }: HotSet,
        note: &'a dyn Fn(WarmStep),
        is_unwanted: &'a dyn Fn() -> bool,
    ) -> Self {
        let away_s = u32::try_from(unix_ms().saturating_sub(written_unix_ms) / 1000).unwrap_or(u32::MAX);
        let (sender, receiver) = bounded(STEPS * SIZES_MAX);
        Self {
            inner,
            note,
            is_unwanted,
            store,
            away_s,
            is_gone: vec![false; blocks.len()],
            blocks,
            groups: HashMap::new(),
            next: 0,
            steps: VecDeque::new(),
            numbers: 0,
            planned_bytes: 0,
            is_full: false,
            is_held_up: false,
            no_room_blocks: 0,
            sender,
            receiver,
        }
    }

    /// How it ended; `None` if the engine closes.
    pub(super) fn run(mut self) -> Option<WarmState> {
        let state = loop {
            if self.inner.is_closed() {
                break None;
            }
            if (self.is_unwanted)() || self.store.poison_reason().is_some() || !self.inner.drive.is_current(&self.store)
            {
                break Some(WarmState::Stopped);
            }
            if self.is_full {
                break Some(WarmState::Full);
            }
            let seen = self.inner.residency.room_changes();
            let may_start = self.steps.len() < STEPS && !self.is_held_up && !self.is_writer_behind();
            match may_start.then(|| self.make_step()) {
                Some(Made::Step) => {}
                _ if !self.steps.is_empty() => self.take_end(),
                _ if std::mem::take(&mut self.is_held_up) => {
                    self.inner.residency.wait_for_room(seen, Instant::now() + ROOM_PATIENCE);
                }
                Some(Made::End) => break Some(WarmState::Done),
                Some(Made::NoRoom) if !self.is_growing() => break Some(WarmState::Full),
                _ => self.inner.residency.wait_for_room(seen, Instant::now() + ROOM_PATIENCE),
            }
        };
        // Reads that run end by themselves, and with the close all of them have.
        while !self.steps.is_empty() && !self.inner.is_closed() {
            self.take_end();
        }
        self.inner.residency.end_recall();
        state.filter(|_| !self.inner.is_closed())
    }

    fn is_growing(&self) -> bool {
        self.inner.arena.ready_bytes() < self.inner.arena.capacity_bytes()
    }

    fn is_writer_behind(&self) -> bool {
        let (_, dirty_bytes, _) = self.inner.residency.gauges();
        dirty_bytes > self.inner.arena.ready_bytes() / DIRTY_PART
    }

    /// Asks for the next blocks of the list, all that fit.
    fn make_step(&mut self) -> Made {
        let ready_bytes = self.inner.arena.ready_bytes();
        // What is being read may count twice for a moment.
        let taken = self.inner.arena.used_bytes() + self.planned_bytes;
        let free = (ready_bytes / 100 * FILL_PERCENT_MAX).saturating_sub(taken);
        let most = STEP_BYTES.min(ready_bytes / STEP_PART);
        let (mut bytes, mut ids, first) = (0, Vec::new(), self.next);
        let mut by_size: BTreeMap<u64, Vec<(RecordId, Location)>> = BTreeMap::new();
        let mut memories = Vec::new();
        while let Some(block) = self.blocks.get(self.next).copied() {
            let found = self.locate(&block);
            let block_bytes = found.as_ref().map_or(0, |(block_bytes, _)| *block_bytes);
            let reads = found.map(|(_, reads)| reads).unwrap_or_default();
            let slots = reads.len() as u64 * Arena::slot_bytes(block_bytes as usize) as u64;
            let is_enough = bytes + slots > most || ids.len() + reads.len() > STEP_BLOCKS_MAX;
            let is_other = !by_size.contains_key(&block_bytes) && by_size.len() >= SIZES_MAX;
            if !reads.is_empty() && !ids.is_empty() && (is_enough || is_other) {
                break;
            }
            if bytes + slots > free {
                if ids.is_empty() {
                    return Made::NoRoom;
                }
                break;
            }
            self.next += 1;
            bytes += slots;
            ids.extend(reads.iter().map(|(id, _)| *id));
            let memory =
                crate::policy::BlockMemory { idle_s: block.memory.idle_s.saturating_add(self.away_s), ..block.memory };
            // Of a block of which no request had told the policy there is nothing to remember.
            if block.memory.uses > 0 {
                memories.extend(reads.iter().map(|(id, _)| (id.fingerprint(), memory)));
            }
            if !reads.is_empty() {
                by_size.entry(block_bytes).or_default().extend(reads);
            }
        }
        (self.note)(WarmStep::At(self.next));
        if ids.is_empty() {
            return Made::End;
        }
        self.inner.residency.recall(memories.into_iter());
        self.ask(by_size, first, ids);
        Made::Step
    }

    /// Where the shards of a block lie that are not in DRAM, and how large each is; `None` if the block is gone.
    fn locate(&mut self, block: &HotBlock) -> Option<(u64, Vec<(RecordId, Location)>)> {
        let found = self.try_locate(block);
        if found.is_none()
            && let Some(is_gone @ false) = self.is_gone.get_mut(self.next)
        {
            *is_gone = true;
            (self.note)(WarmStep::Missing);
        }
        found
    }

    fn try_locate(&mut self, block: &HotBlock) -> Option<(u64, Vec<(RecordId, Location)>)> {
        // Without its ancestors it is worth nothing.
        if block.parent.is_some_and(|parent| self.is_gone.get(parent as usize) != Some(&false)) {
            return None;
        }
        let (namespace, group) = (block.id.namespace, block.id.group);
        let store = &self.store;
        let geometry = *self.groups.entry((namespace, group)).or_insert_with(|| store.group(namespace, group));
        let geometry = geometry?;
        let mut reads = Vec::new();
        for shard in 0..geometry.shards {
            let id = RecordId { shard, ..block.id };
            if !self.inner.residency.contains(&id) {
                reads.push((id, self.store.locate(&id)?));
            }
        }
        Some((geometry.block_bytes, reads))
    }

    /// Hands a step to the fetches.
    fn ask(&mut self, by_size: BTreeMap<u64, Vec<(RecordId, Location)>>, first: usize, ids: Vec<RecordId>) {
        self.numbers += 1;
        let step = self.numbers;
        self.steps.push_back(Step { number: step, wishes_left: by_size.len(), first, ids });
        for (block_bytes, reads) in by_size {
            let planned_bytes = reads.len() as u64 * Arena::slot_bytes(block_bytes as usize) as u64;
            self.planned_bytes += planned_bytes;
            let sender = self.sender.clone();
            let wish = FetchWish {
                store: Arc::downgrade(&self.store),
                reads: in_turn(reads),
                block_bytes,
                reason: FetchReason::HotSet,
                asked: 0,
                asked_at: None,
                deadline: Instant::now() + STEP_DEADLINE,
                // The channel holds as many as there are wishes.
                done: Some(Box::new(move |end| drop(sender.try_send(Ended { step, block_bytes, planned_bytes, end })))),
            };
            // Refused or not, its end comes.
            if let Err(error) = self.inner.fetches.push(wish) {
                tracing::debug!(%error, "blocks of the hot set are left out");
            }
        }
    }

    /// Waits for a wish to end. The fetches tell the end of each.
    fn take_end(&mut self) {
        let Ok(Ended { step, block_bytes, planned_bytes, end }) = self.receiver.recv() else { return };
        self.planned_bytes -= planned_bytes;
        let no_room_blocks = self.inner.fetches.totals(FetchReason::HotSet).no_room_blocks;
        let had_no_room = std::mem::replace(&mut self.no_room_blocks, no_room_blocks) < no_room_blocks;
        (self.note)(WarmStep::Came { blocks: end.blocks, bytes: end.blocks * block_bytes });
        let Some(at) = self.steps.iter().position(|of| of.number == step) else { return };
        if had_no_room && self.is_growing() {
            // What has come of it meanwhile is not read again.
            self.next = self.steps.iter().map(|of| of.first).min().unwrap_or(self.next);
            self.is_held_up = true;
        } else if had_no_room {
            self.is_full = true;
        }
        if let Some(of) = self.steps.get_mut(at) {
            of.wishes_left -= 1;
        }
        if self.steps.get(at).is_some_and(|of| of.wishes_left == 0)
            && let Some(of) = self.steps.remove(at)
        {
            self.inner.residency.settle(of.ids.iter());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_rising_numbers_whatever_the_clock_says() {
        let warm_start = WarmStart::new(Instant::now(), true);
        warm_start.progress.lock().last_list = 1000;
        let numbers = [5, 2000, 1500, 1500].map(|unix_ms| warm_start.next_list(unix_ms));
        assert_eq!(numbers, [1001, 2000, 2001, 2002]);
    }

    #[test]
    fn no_list_takes_the_place_of_one_that_is_on_its_way() {
        let warm_start = WarmStart::new(Instant::now(), true);
        assert!(!warm_start.may_keep(7), "it runs");
        for state in [WarmState::Done, WarmState::Full, WarmState::Nothing, WarmState::Stopped] {
            warm_start.change(|progress| progress.state = state);
            assert!(warm_start.may_keep(7) && !warm_start.may_keep(0), "{state:?}");
        }
        warm_start.kept(7, 1);
        assert!(!warm_start.may_keep(7) && warm_start.may_keep(8), "only when something has happened");
        let off = WarmStart::new(Instant::now(), false);
        assert!(!off.may_keep(7));
    }
}
