//! The state of all loads and saves of a worker, as a machine without clock, threads or network: inputs are calls, outputs
//! are [`Action`]s and completions. An operation is cut into chunks that fit free staging slots.
//!
//! Save: copy to staging -> Save RPC -> ended event. Load: Load RPC -> ended event -> copy to the worker's memory.
//! Fencing: an operation completes only when none of its copies is running. What the server does concerns staging only: a
//! chunk that the server still has keeps its slots until the server's event, or until the session, and with it the whole
//! staging memory, is gone. Saves go to the server one chunk at a time and in order, ancestors before descendants.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_engine::{
    BlockSave, DeviceMemory, HostMemory, InstanceId, LeaseId, LoadBlock, LoadOutcome, OperationId, SaveOutcome,
};

use super::completions::{CompletionResult, Completions};
use super::copies::{Copied, CopyJob};
use crate::proto;
use crate::wire;

/// The most chunks at once, below the server's limit of operations in a session.
pub(super) const CHUNKS_MAX: usize = 512;
/// A save's chunk is about this long, so that copying one and saving the one before overlap.
const SAVE_CHUNK_BYTES: u64 = 32 << 20;

/// The slots shared with the server.
pub(super) struct Pool {
    /// The server's number for the memory.
    number: u32,
    memory: Arc<HostMemory>,
    free: Vec<u32>,
}

impl Pool {
    pub(super) fn new(number: u32, memory: Arc<HostMemory>) -> Self {
        let free = (0..memory.layout().blocks()).rev().collect();
        Self { number, memory, free }
    }

    fn slot_bytes(&self) -> u64 {
        self.memory.layout().block_bytes()
    }

    fn slots(&self) -> usize {
        self.memory.layout().blocks() as usize
    }
}

/// What is to be moved.
pub(super) enum Work {
    Load { lease: LeaseId, shard: u16, blocks: Vec<LoadBlock> },
    Save { instance: InstanceId, group: u16, shard: u16, blocks: Vec<BlockSave> },
}

impl Work {
    fn len(&self) -> usize {
        match self {
            Self::Load { blocks, .. } => blocks.len(),
            Self::Save { blocks, .. } => blocks.len(),
        }
    }

    fn is_load(&self) -> bool {
        matches!(self, Self::Load { .. })
    }

    /// The number in the worker's memory of the block at `at`.
    fn block(&self, at: usize) -> Option<u32> {
        match self {
            Self::Load { blocks, .. } => blocks.get(at).map(|block| block.block),
            Self::Save { blocks, .. } => blocks.get(at).map(|block| block.block),
        }
    }
}

/// What the driver is to do. Every RPC is answered by [`Transfers::answered`], every copy by [`Transfers::copied`].
pub(super) enum Action {
    Load { chunk: u64, request: proto::LoadRequest },
    Save { chunk: u64, request: proto::SaveRequest },
    Copy(CopyJob),
    Cancel { chunks: Vec<u64> },
}

struct Operation {
    work: Work,
    kv: Arc<HostMemory>,
    /// Blocks before this are in chunks, or were.
    next: usize,
    /// Chunks that the operation waits for.
    chunks: usize,
    deadline: Instant,
    /// Nothing more of it is to be started.
    is_stopped: bool,
    load: LoadOutcome,
    save: SaveOutcome,
}

impl Operation {
    /// Counts blocks that will not be moved.
    fn lose(&mut self, range: Range<usize>) {
        match &self.work {
            Work::Load { .. } => self.load.failed.extend(range.filter_map(|at| self.work.block(at))),
            Work::Save { .. } => self.save.dropped += range.len() as u32,
        }
    }

    /// No more chunks: the rest is lost.
    fn stop(&mut self) {
        self.is_stopped = true;
        let rest = self.next..self.work.len();
        self.next = rest.end;
        self.lose(rest);
    }

    fn is_over(&self) -> bool {
        self.chunks == 0 && self.next == self.work.len()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A copy is running.
    Copying,
    /// A save's bytes are in staging, waiting for their turn.
    Staged,
    /// The server has it.
    Sent,
}

struct Chunk {
    /// `None` when the operation no longer waits for it.
    operation: Option<OperationId>,
    is_load: bool,
    stage: Stage,
    /// Which blocks of the operation.
    range: Range<usize>,
    /// The session whose staging it uses.
    epoch: u64,
    slots: Vec<u32>,
    /// What the server counted, to be reported when the copy has ended.
    loaded: (u32, u32),
    /// For a load: places in `range`, from its start, that the server could not load.
    failed: Vec<usize>,
    /// When to give the session up if the server has not reported an abandoned chunk.
    give_up: Option<Instant>,
}

/// All operations and chunks.
pub(super) struct Transfers {
    completions: Arc<Completions>,
    operations: HashMap<OperationId, Operation>,
    chunks: HashMap<u64, Chunk>,
    /// Operations with blocks that are in no chunk yet.
    loads: VecDeque<OperationId>,
    saves: VecDeque<OperationId>,
    /// Chunks of saves that the server does not have yet, in their order.
    save_order: VecDeque<u64>,
    save_sent: Option<u64>,
    next_chunk: u64,
    session: u64,
    epoch: u64,
    /// `None` while there is no session that can move blocks.
    pool: Option<Pool>,
    actions: Vec<Action>,
    timeout: Duration,
}

impl Transfers {
    pub(super) fn new(completions: Arc<Completions>, timeout: Duration) -> Self {
        Self {
            completions,
            operations: HashMap::new(),
            chunks: HashMap::new(),
            loads: VecDeque::new(),
            saves: VecDeque::new(),
            save_order: VecDeque::new(),
            save_sent: None,
            next_chunk: 1,
            session: 0,
            epoch: 0,
            pool: None,
            actions: Vec::new(),
            timeout,
        }
    }

    /// A session with staging memory is there.
    pub(super) fn session_ready(&mut self, session: u64, pool: Pool) {
        self.session = session;
        self.pool = Some(pool);
    }

    /// The session is over: whatever the server had is lost; copies that are running end on their own.
    pub(super) fn session_lost(&mut self) {
        self.epoch += 1;
        self.pool = None;
        self.save_sent = None;
        self.loads.clear();
        self.saves.clear();
        self.operations.values_mut().for_each(Operation::stop);
        let gone: Vec<u64> =
            self.chunks.iter().filter(|(_, chunk)| chunk.stage != Stage::Copying).map(|(id, _)| *id).collect();
        for number in gone {
            self.lose_chunk(number);
        }
        self.save_order.clear();
        let over: Vec<_> = self.operations.keys().copied().collect();
        over.into_iter().for_each(|operation| self.complete_if_over(operation));
    }

    /// Takes an operation on. Its blocks were checked to lie in `kv`.
    pub(super) fn submit(&mut self, operation: OperationId, work: Work, kv: Arc<HostMemory>, now: Instant) {
        let is_load = work.is_load();
        let entry = Operation {
            work,
            kv,
            next: 0,
            chunks: 0,
            deadline: now + self.timeout,
            is_stopped: false,
            load: LoadOutcome::default(),
            save: SaveOutcome::default(),
        };
        self.operations.insert(operation, entry);
        if self.pool.is_none() {
            self.stop(operation);
        } else if is_load {
            self.loads.push_back(operation);
        } else {
            self.saves.push_back(operation);
        }
        self.complete_if_over(operation);
    }

    /// Ends an operation early: it completes as soon as its running copies have ended.
    pub(super) fn cancel(&mut self, operation: OperationId, now: Instant) {
        if !self.operations.contains_key(&operation) {
            return;
        }
        self.stop(operation);
        let give_up = now + self.timeout;
        let mut told = Vec::new();
        let mine: Vec<u64> = self
            .chunks
            .iter()
            .filter(|(_, chunk)| chunk.operation == Some(operation) && chunk.stage != Stage::Copying)
            .map(|(number, _)| *number)
            .collect();
        for number in mine {
            let Some(chunk) = self.chunks.get_mut(&number) else { continue };
            if chunk.stage == Stage::Staged {
                self.lose_chunk(number);
                continue;
            }
            chunk.operation = None;
            chunk.give_up = Some(give_up);
            let range = chunk.range.clone();
            if let Some(operation) = self.operations.get_mut(&operation) {
                operation.lose(range);
                operation.chunks -= 1;
            }
            told.push(number);
        }
        if !told.is_empty() {
            self.actions.push(Action::Cancel { chunks: told });
        }
        self.complete_if_over(operation);
    }

    /// Cancels what is past its time. Whether the session must be given up, because the server keeps slots for ever.
    #[must_use]
    pub(super) fn tick(&mut self, now: Instant) -> bool {
        let late: Vec<_> =
            self.operations.iter().filter(|(_, entry)| entry.deadline <= now).map(|(id, _)| *id).collect();
        for operation in late {
            tracing::warn!(operation = operation.0, timeout = ?self.timeout, "an operation took too long; cancelled");
            self.cancel(operation, now);
            // Only copies are left; they end by themselves.
            if let Some(entry) = self.operations.get_mut(&operation) {
                entry.deadline = now + self.timeout;
            }
        }
        self.chunks.values().any(|chunk| chunk.give_up.is_some_and(|at| at <= now))
    }

    /// When [`Transfers::tick`] is to be called next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let operations = self.operations.values().map(|entry| entry.deadline);
        operations.chain(self.chunks.values().filter_map(|chunk| chunk.give_up)).min()
    }

    /// Whether no operation is left.
    pub(super) fn is_idle(&self) -> bool {
        self.operations.is_empty()
    }

    /// The server's answer to a Load or Save RPC: accepted or not. Not accepted: the server does not touch the slots.
    pub(super) fn answered(&mut self, number: u64, is_accepted: bool) {
        if is_accepted {
            return;
        }
        let Some(chunk) = self.chunks.get(&number).filter(|chunk| chunk.stage == Stage::Sent) else { return };
        let operation = chunk.operation;
        self.lose_chunk(number);
        if let Some(operation) = operation {
            // The rest would fare no better, and descendants of dropped blocks are worthless.
            self.stop(operation);
            self.complete_if_over(operation);
        }
    }

    /// The server has ended a load: it writes the slots no more.
    pub(super) fn load_ended(&mut self, event: &proto::LoadEnded) {
        let Some(chunk) = self.chunks.get_mut(&event.operation) else { return };
        if chunk.stage != Stage::Sent || !chunk.is_load {
            return;
        }
        let Some(entry) = chunk.operation.and_then(|operation| self.operations.get_mut(&operation)) else {
            self.remove_chunk(event.operation);
            return;
        };
        let failed: std::collections::HashSet<u32> = event.failed.iter().copied().collect();
        let mut blocks = Vec::with_capacity(chunk.slots.len());
        for (place, (slot, at)) in chunk.slots.iter().zip(chunk.range.clone()).enumerate() {
            match entry.work.block(at) {
                Some(block) if !failed.contains(slot) => blocks.push((*slot, block)),
                _ => chunk.failed.push(place),
            }
        }
        chunk.loaded = (event.loaded_dram, event.loaded_nvme);
        if blocks.is_empty() {
            self.load_copied(event.operation, true);
            return;
        }
        let Some(pool) = &self.pool else {
            self.load_copied(event.operation, false);
            return;
        };
        chunk.stage = Stage::Copying;
        let job = CopyJob { chunk: event.operation, from: Arc::clone(&pool.memory), to: Arc::clone(&entry.kv), blocks };
        self.actions.push(Action::Copy(job));
    }

    /// The server has ended a save: it reads the slots no more.
    pub(super) fn save_ended(&mut self, event: &proto::SaveEnded) {
        let is_sent = |chunk: &Chunk| chunk.stage == Stage::Sent && !chunk.is_load;
        let Some(chunk) = self.chunks.get(&event.operation).filter(|chunk| is_sent(chunk)) else { return };
        let Some(operation) = chunk.operation else {
            self.remove_chunk(event.operation);
            return;
        };
        self.remove_chunk(event.operation);
        if let Some(entry) = self.operations.get_mut(&operation) {
            entry.save.saved += event.saved;
            entry.save.present += event.present;
            entry.save.dropped += event.dropped;
            entry.chunks -= 1;
        }
        self.complete_if_over(operation);
    }

    /// A copy has ended.
    pub(super) fn copied(&mut self, copied: &Copied) {
        let Some(chunk) = self.chunks.get_mut(&copied.chunk).filter(|chunk| chunk.stage == Stage::Copying) else {
            return;
        };
        if chunk.is_load {
            self.load_copied(copied.chunk, copied.is_complete);
            return;
        }
        chunk.stage = Stage::Staged;
        let (operation, epoch) = (chunk.operation, chunk.epoch);
        let is_stopped = operation.and_then(|id| self.operations.get(&id)).is_none_or(|entry| entry.is_stopped);
        if is_stopped || !copied.is_complete || epoch != self.epoch {
            self.lose_chunk(copied.chunk);
            operation.into_iter().for_each(|operation| self.complete_if_over(operation));
        }
    }

    /// Starts what can be started; what the driver is to do.
    pub(super) fn pump(&mut self) -> Vec<Action> {
        while self.start_load() {}
        while self.start_save() {}
        self.send_save();
        std::mem::take(&mut self.actions)
    }

    /// Hands the next chunk of a load to the server, if it fits. A load waits until all of it fits, or half of the slots
    /// are free: few large requests keep the drive busier than many small ones.
    fn start_load(&mut self) -> bool {
        let Some(&operation) = self.loads.front() else { return false };
        let Some(entry) = self.operations.get(&operation) else {
            self.loads.pop_front();
            return true;
        };
        let left = entry.work.len() - entry.next;
        let Some(pool) = &self.pool else { return false };
        if self.chunks.len() >= CHUNKS_MAX || pool.free.len() < left.min(pool.slots().div_ceil(2)) {
            return false;
        }
        let count = left.min(pool.free.len());
        let Some((number, slots, memory)) = self.new_chunk(operation, count, Stage::Sent) else { return false };
        let Some(Operation { work: Work::Load { lease, shard, blocks }, next, .. }) = self.operations.get(&operation)
        else {
            return false;
        };
        let request = proto::LoadRequest {
            session: self.session,
            operation: number,
            lease: wire::lease_bytes(*lease).to_vec().into(),
            shard: (*shard).into(),
            memory,
            indexes: blocks.get(next - count..*next).unwrap_or_default().iter().map(|block| block.index).collect(),
            slots,
            is_part: count < left,
        };
        self.actions.push(Action::Load { chunk: number, request });
        if count == left {
            self.loads.pop_front();
        }
        true
    }

    /// Starts copying the next chunk of a save to staging. Loads come first: a request waits for them.
    fn start_save(&mut self) -> bool {
        let Some(&operation) = self.saves.front() else { return false };
        let Some(entry) = self.operations.get(&operation) else {
            self.saves.pop_front();
            return true;
        };
        let left = entry.work.len() - entry.next;
        let Some(pool) = &self.pool else { return false };
        let chunk_blocks = usize::try_from(SAVE_CHUNK_BYTES / pool.slot_bytes()).unwrap_or(usize::MAX);
        let count = left.min(pool.free.len()).min(chunk_blocks.min(pool.slots() / 2).max(1));
        if count == 0 || !self.loads.is_empty() || self.chunks.len() >= CHUNKS_MAX {
            return false;
        }
        let staging = Arc::clone(&pool.memory);
        let Some((number, slots, _)) = self.new_chunk(operation, count, Stage::Copying) else { return false };
        let Some(entry) = self.operations.get(&operation) else { return false };
        let blocks = (entry.next - count..entry.next).filter_map(|at| entry.work.block(at)).zip(slots).collect();
        self.save_order.push_back(number);
        self.actions.push(Action::Copy(CopyJob { chunk: number, from: Arc::clone(&entry.kv), to: staging, blocks }));
        if count == left {
            self.saves.pop_front();
        }
        true
    }

    /// Sends the next staged chunk of a save when the one before it has ended.
    fn send_save(&mut self) {
        while self.save_sent.is_none() {
            let Some(&number) = self.save_order.front() else { return };
            let Some(chunk) = self.chunks.get_mut(&number) else {
                self.save_order.pop_front();
                continue;
            };
            if chunk.stage != Stage::Staged {
                return;
            }
            let operation = chunk.operation;
            let entry = operation.and_then(|operation| self.operations.get(&operation));
            let Some(Operation { work: Work::Save { instance, group, shard, blocks }, is_stopped: false, .. }) = entry
            else {
                self.lose_chunk(number);
                operation.into_iter().for_each(|operation| self.complete_if_over(operation));
                continue;
            };
            let blocks = blocks.get(chunk.range.clone()).unwrap_or_default();
            let request = proto::SaveRequest {
                session: self.session,
                operation: number,
                instance: instance.to_string(),
                group: (*group).into(),
                shard: (*shard).into(),
                memory: self.pool.as_ref().map_or(0, |pool| pool.number),
                keys: wire::join_keys(blocks.iter().map(|block| &block.key)),
                parents: wire::join_keys(blocks.iter().map(|block| &block.parent)),
                depths: blocks.iter().map(|block| block.depth).collect(),
                slots: chunk.slots.clone(),
            };
            chunk.stage = Stage::Sent;
            self.save_order.pop_front();
            self.save_sent = Some(number);
            self.actions.push(Action::Save { chunk: number, request });
        }
    }

    /// Cuts the next `count` blocks off an operation and takes slots for them; the chunk's number, its slots, and the
    /// server's number for their memory.
    fn new_chunk(&mut self, operation: OperationId, count: usize, stage: Stage) -> Option<(u64, Vec<u32>, u32)> {
        let entry = self.operations.get_mut(&operation)?;
        let pool = self.pool.as_mut()?;
        let slots = pool.free.split_off(pool.free.len().checked_sub(count)?);
        let number = self.next_chunk;
        self.next_chunk += 1;
        let range = entry.next..entry.next + count;
        entry.next = range.end;
        entry.chunks += 1;
        let chunk = Chunk {
            operation: Some(operation),
            is_load: entry.work.is_load(),
            stage,
            range,
            epoch: self.epoch,
            slots: slots.clone(),
            loaded: (0, 0),
            failed: Vec::new(),
            give_up: None,
        };
        self.chunks.insert(number, chunk);
        Some((number, slots, pool.number))
    }

    /// Takes a chunk out and gives its slots back, unless their session is gone.
    fn remove_chunk(&mut self, number: u64) -> Option<Chunk> {
        let mut chunk = self.chunks.remove(&number)?;
        if chunk.epoch == self.epoch
            && let Some(pool) = &mut self.pool
        {
            pool.free.append(&mut chunk.slots);
        }
        if self.save_sent == Some(number) {
            self.save_sent = None;
        }
        Some(chunk)
    }

    /// Takes a chunk out whose blocks were not moved.
    fn lose_chunk(&mut self, number: u64) {
        let Some(chunk) = self.remove_chunk(number) else { return };
        if let Some(entry) = chunk.operation.and_then(|operation| self.operations.get_mut(&operation)) {
            entry.lose(chunk.range);
            entry.chunks -= 1;
        }
    }

    /// The blocks of a load's chunk are in the worker's memory, or not if `is_complete` is false.
    fn load_copied(&mut self, number: u64, is_complete: bool) {
        let Some(chunk) = self.remove_chunk(number) else { return };
        let Some(operation) = chunk.operation else { return };
        if let Some(entry) = self.operations.get_mut(&operation) {
            entry.chunks -= 1;
            if is_complete {
                entry.load.loaded_dram += chunk.loaded.0;
                entry.load.loaded_nvme += chunk.loaded.1;
                for place in chunk.failed {
                    let at = chunk.range.start + place;
                    entry.lose(at..at + 1);
                }
            } else {
                entry.lose(chunk.range);
            }
        }
        self.complete_if_over(operation);
    }

    fn stop(&mut self, operation: OperationId) {
        self.loads.retain(|waiting| *waiting != operation);
        self.saves.retain(|waiting| *waiting != operation);
        if let Some(entry) = self.operations.get_mut(&operation) {
            entry.stop();
        }
    }

    fn complete_if_over(&mut self, operation: OperationId) {
        if !self.operations.get(&operation).is_some_and(Operation::is_over) {
            return;
        }
        let Some(entry) = self.operations.remove(&operation) else { return };
        let result = match entry.work {
            Work::Load { .. } => CompletionResult::Load(entry.load),
            Work::Save { .. } => CompletionResult::Save(entry.save),
        };
        // The worker's memory may be given back as soon as the completion is seen.
        drop(entry.kv);
        self.completions.end(operation, result);
    }
}

#[cfg(test)]
mod tests;
