//! The state of all loads and saves of a worker, as a machine without clock, threads or network: inputs are calls, outputs
//! are [`Action`]s and completions.
//!
//! An operation is told to the server, which orders copies of its blocks, one order at a time, and then says how it ended.
//! Fencing: an operation completes only when none of its copies is running and none can start any more: orders for one that
//! has completed are refused, and operations have numbers of their own on the wire, which are never used twice. Saves reach
//! the server one after the other, ancestors before descendants.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pegaflow_engine::{
    BlockSave, CopyDirection, DeviceMemory, Fence, LeaseId, LoadBlock, LoadOutcome, OperationId, Place, SaveOutcome,
    SaveTarget,
};

use super::completions::{CompletionResult, Completions};
use crate::proto;
use crate::wire;

/// The most operations that the server has at once, below its own limit.
pub(super) const SENT_MAX: usize = 512;

/// What is to be moved.
pub(super) enum Work {
    Load { lease: LeaseId, shard: u16, blocks: Vec<LoadBlock> },
    Save { target: SaveTarget, blocks: Vec<BlockSave> },
}

impl Work {
    fn is_load(&self) -> bool {
        matches!(self, Self::Load { .. })
    }

    fn blocks(&self) -> HashSet<u32> {
        match self {
            Self::Load { blocks, .. } => blocks.iter().map(|block| block.block).collect(),
            Self::Save { blocks, .. } => blocks.iter().map(|block| block.block).collect(),
        }
    }

    /// The result of an operation of which nothing counts.
    fn lost(&self) -> CompletionResult {
        match self {
            Self::Load { blocks, .. } => CompletionResult::Load(LoadOutcome {
                failed: blocks.iter().map(|block| block.block).collect(),
                ..LoadOutcome::default()
            }),
            Self::Save { blocks, .. } => {
                CompletionResult::Save(SaveOutcome { dropped: blocks.len() as u32, ..SaveOutcome::default() })
            }
        }
    }
}

/// Copies that the server ordered.
pub(super) struct CopyJob {
    /// The session that ordered them, by its epoch, and the order.
    pub(super) order: (u64, u64),
    /// The operation's number on the wire.
    pub(super) wire: u64,
    pub(super) kv: Arc<dyn DeviceMemory>,
    pub(super) direction: CopyDirection,
    pub(super) blocks: Vec<(u32, Place)>,
    pub(super) after: Option<Fence>,
    pub(super) cancelled: Arc<AtomicBool>,
}

/// What the driver is to do. Load and Save RPCs are answered by [`Operations::answered`], copies by [`Operations::copied`].
pub(super) enum Action {
    Load { wire: u64, request: proto::LoadRequest },
    Save { wire: u64, request: proto::SaveRequest },
    Copy(CopyJob),
    CopyEnded { order: u64, is_complete: bool },
    Cancel { wires: Vec<u64> },
}

struct Operation {
    id: OperationId,
    work: Work,
    kv: Arc<dyn DeviceMemory>,
    after: Option<Fence>,
    cancelled: Arc<AtomicBool>,
    deadline: Instant,
    is_sent: bool,
    is_copying: bool,
}

/// All operations.
pub(super) struct Operations {
    completions: Arc<Completions>,
    /// By their number on the wire.
    operations: HashMap<u64, Operation>,
    by_id: HashMap<OperationId, u64>,
    /// Not sent yet.
    loads: VecDeque<u64>,
    saves: VecDeque<u64>,
    /// A save whose RPC was not answered yet.
    save_sent: Option<u64>,
    sent: usize,
    last_wire: u64,
    session: Option<u64>,
    epoch: u64,
    actions: Vec<Action>,
    timeout: Duration,
}

impl Operations {
    pub(super) fn new(completions: Arc<Completions>, timeout: Duration) -> Self {
        Self {
            completions,
            operations: HashMap::new(),
            by_id: HashMap::new(),
            loads: VecDeque::new(),
            saves: VecDeque::new(),
            save_sent: None,
            sent: 0,
            last_wire: 0,
            session: None,
            epoch: 0,
            actions: Vec::new(),
            timeout,
        }
    }

    /// A session in which the worker is registered and has the arena.
    pub(super) fn session_ready(&mut self, session: u64) {
        self.session = Some(session);
    }

    /// The session is over: whatever was not done is lost; copies that are running end on their own.
    pub(super) fn session_lost(&mut self) {
        self.epoch += 1;
        self.session = None;
        self.save_sent = None;
        self.loads.clear();
        self.saves.clear();
        let all: Vec<u64> = self.operations.keys().copied().collect();
        all.into_iter().for_each(|wire| self.lose(wire));
    }

    /// Takes an operation on. Its blocks were checked to lie in `kv`.
    pub(super) fn submit(
        &mut self,
        id: OperationId,
        work: Work,
        kv: Arc<dyn DeviceMemory>,
        after: Option<Fence>,
        now: Instant,
    ) {
        self.last_wire += 1;
        let wire = self.last_wire;
        let queue = if work.is_load() { &mut self.loads } else { &mut self.saves };
        queue.push_back(wire);
        let deadline = now + self.timeout;
        let cancelled = Arc::default();
        let operation = Operation { id, work, kv, after, cancelled, deadline, is_sent: false, is_copying: false };
        self.operations.insert(wire, operation);
        self.by_id.insert(id, wire);
        if self.session.is_none() {
            self.lose(wire);
        }
    }

    /// Ends an operation early: it completes as soon as its running copy has ended.
    pub(super) fn cancel(&mut self, id: OperationId) {
        let Some(&wire) = self.by_id.get(&id) else { return };
        if self.operations.get(&wire).is_some_and(|operation| operation.is_sent) && self.session.is_some() {
            self.actions.push(Action::Cancel { wires: vec![wire] });
        }
        self.lose(wire);
    }

    /// Cancels what is past its time.
    pub(super) fn tick(&mut self, now: Instant) {
        let late: Vec<_> =
            self.operations.values().filter(|operation| operation.deadline <= now).map(|entry| entry.id).collect();
        for id in late {
            tracing::warn!(operation = id.0, timeout = ?self.timeout, "an operation took too long; cancelled");
            self.cancel(id);
            // Only a copy is left; it ends by itself.
            if let Some(operation) = self.by_id.get(&id).and_then(|wire| self.operations.get_mut(wire)) {
                operation.deadline = now + self.timeout;
            }
        }
    }

    /// When [`Operations::tick`] is to be called next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.operations.values().map(|operation| operation.deadline).min()
    }

    /// Whether no operation is left.
    pub(super) fn is_idle(&self) -> bool {
        self.operations.is_empty()
    }

    /// The server's answer to a Load or Save RPC: accepted or not.
    pub(super) fn answered(&mut self, wire: u64, is_accepted: bool) {
        if self.save_sent == Some(wire) {
            self.save_sent = None;
        }
        if !is_accepted {
            self.lose(wire);
        }
    }

    /// The server wants blocks copied.
    pub(super) fn ordered(&mut self, order: proto::CopyOrder) {
        let proto::CopyOrder { order, operation: wire, is_load, blocks, places } = order;
        let number = (self.epoch, order);
        let entry = self.operations.get_mut(&wire).filter(|entry| {
            // An operation that was given up is gone, or copies; blocks that it does not have are never touched.
            let is_open = entry.is_sent && !entry.is_copying;
            is_open && entry.work.is_load() == is_load && blocks.len() == places.len() && {
                let own = entry.work.blocks();
                blocks.iter().all(|block| own.contains(block))
            }
        });
        let Some(entry) = entry else {
            tracing::debug!(wire, order, "an order for an operation that is over; refused");
            return self.actions.push(Action::CopyEnded { order, is_complete: false });
        };
        entry.is_copying = true;
        self.actions.push(Action::Copy(CopyJob {
            order: number,
            wire,
            kv: Arc::clone(&entry.kv),
            direction: if is_load { CopyDirection::ToDevice } else { CopyDirection::ToSlots },
            blocks: blocks.into_iter().zip(places.into_iter().map(Place)).collect(),
            after: entry.after.clone(),
            cancelled: Arc::clone(&entry.cancelled),
        }));
    }

    /// A copy has ended: nothing of it is running any more.
    pub(super) fn copied(&mut self, (epoch, order): (u64, u64), wire: u64, is_complete: bool) {
        if epoch == self.epoch && self.session.is_some() {
            self.actions.push(Action::CopyEnded { order, is_complete });
        }
        let Some(entry) = self.operations.get_mut(&wire) else { return };
        entry.is_copying = false;
        if entry.cancelled.load(Ordering::Acquire) {
            self.lose(wire);
        }
    }

    /// The server has ended a load.
    pub(super) fn load_ended(&mut self, event: proto::LoadEnded) {
        let proto::LoadEnded { operation, loaded_dram, loaded_nvme, failed } = event;
        let is_load = |entry: &Operation| entry.work.is_load();
        let outcome = LoadOutcome { loaded_dram, loaded_nvme, failed };
        self.ended(operation, is_load, CompletionResult::Load(outcome));
    }

    /// The server has ended a save.
    pub(super) fn save_ended(&mut self, event: &proto::SaveEnded) {
        let proto::SaveEnded { operation, saved, present, dropped } = *event;
        let is_save = |entry: &Operation| !entry.work.is_load();
        self.ended(operation, is_save, CompletionResult::Save(SaveOutcome { saved, present, dropped }));
    }

    fn ended(&mut self, wire: u64, is_it: impl FnOnce(&Operation) -> bool, result: CompletionResult) {
        let Some(entry) = self.operations.get(&wire).filter(|entry| entry.is_sent && is_it(entry)) else { return };
        if entry.is_copying {
            // A server that ends an operation before its copy contradicts itself; the copy decides when it is over.
            tracing::error!(wire, "the server ended an operation whose copy is running");
            return self.lose(wire);
        }
        self.complete(wire, result);
    }

    /// What is to be done now.
    #[must_use]
    pub(super) fn pump(&mut self) -> Vec<Action> {
        while let Some(session) = self.session
            && self.sent < SENT_MAX
        {
            // Loads come first: a request waits for them.
            if let Some(wire) = self.loads.pop_front() {
                self.send(wire, session);
            } else if self.save_sent.is_none()
                && let Some(wire) = self.saves.pop_front()
            {
                self.send(wire, session);
            } else {
                break;
            }
        }
        std::mem::take(&mut self.actions)
    }

    fn send(&mut self, wire: u64, session: u64) {
        let Some(entry) = self.operations.get_mut(&wire) else { return };
        entry.is_sent = true;
        self.sent += 1;
        let action = match &entry.work {
            Work::Load { lease, shard, blocks } => Action::Load {
                wire,
                request: proto::LoadRequest {
                    session,
                    operation: wire,
                    lease: wire::lease_bytes(*lease).to_vec().into(),
                    shard: (*shard).into(),
                    indexes: blocks.iter().map(|block| block.index).collect(),
                    blocks: blocks.iter().map(|block| block.block).collect(),
                },
            },
            Work::Save { target, blocks } => {
                self.save_sent = Some(wire);
                Action::Save {
                    wire,
                    request: proto::SaveRequest {
                        session,
                        operation: wire,
                        instance: target.instance.to_string(),
                        tenant: wire::tenant_to_wire(target.tenant.as_ref()),
                        group: target.group.into(),
                        shard: target.shard.into(),
                        keys: wire::join_keys(blocks.iter().map(|block| &block.key)),
                        parents: wire::join_keys(blocks.iter().map(|block| &block.parent)),
                        depths: blocks.iter().map(|block| block.depth).collect(),
                        blocks: blocks.iter().map(|block| block.block).collect(),
                    },
                }
            }
        };
        self.actions.push(action);
    }

    /// Gives an operation up: at once, or as soon as its copy has ended.
    fn lose(&mut self, wire: u64) {
        let Some(entry) = self.operations.get(&wire) else { return };
        entry.cancelled.store(true, Ordering::Release);
        if !entry.is_copying {
            let lost = entry.work.lost();
            self.complete(wire, lost);
        }
    }

    fn complete(&mut self, wire: u64, result: CompletionResult) {
        let Some(entry) = self.operations.remove(&wire) else { return };
        self.by_id.remove(&entry.id);
        if entry.is_sent {
            self.sent -= 1;
        }
        if self.save_sent == Some(wire) {
            self.save_sent = None;
        }
        // The worker's memory may be given back as soon as the completion is seen.
        let id = entry.id;
        drop(entry);
        self.completions.end(id, result);
    }
}

#[cfg(test)]
mod tests;
