//! A worker in another process, as the engine's copies see it: orders go out as events of its session, and come back as
//! CopyEnded. What it has not reported counts as ended only when it has said goodbye on the connection that gave it the
//! arena, or when its process has exited; until then nothing that it was told to copy is reused.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use pegaflow_engine::{BlockCopy, CopyBatch, CopyDirection, Error, ErrorKind, KvCache, MemoryLayout, Result, Slot};
use tokio::sync::mpsc;

use crate::proto::session_event::Event;
use crate::proto::{CopyOrder, SessionEvent};

/// The state of one worker.
#[derive(Default)]
pub(crate) struct Peer {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where orders go; `None` when the session is over.
    events: Option<mpsc::Sender<SessionEvent>>,
    /// Whether the worker has the arena mapped.
    has_arena: bool,
    last_order: u64,
    orders: HashMap<u64, Sender<Result<()>>>,
}

impl Peer {
    pub(crate) fn new(events: mpsc::Sender<SessionEvent>) -> Self {
        Self { state: Mutex::new(State { events: Some(events), ..State::default() }) }
    }

    /// No more orders; those in flight stay until the worker is done with them.
    pub(crate) fn session_ended(&self) {
        self.state.lock().events = None;
    }

    #[cfg(test)]
    pub(crate) fn has_arena(&self) -> bool {
        self.state.lock().has_arena
    }

    /// The worker gets the arena.
    pub(crate) fn arena_given(&self) {
        self.state.lock().has_arena = true;
    }

    /// The worker can touch the arena no more.
    pub(crate) fn arena_left(&self) {
        let mut state = self.state.lock();
        state.has_arena = false;
        for (_, order) in state.orders.drain() {
            let _nobody_waits = order.try_send(Err(gone()));
        }
    }

    /// The worker says that an order has ended.
    pub(crate) fn copy_ended(&self, order: u64, is_complete: bool) {
        if let Some(waiting) = self.state.lock().orders.remove(&order) {
            let failed = || Error::new(ErrorKind::Io, "the worker could not copy all of the blocks; see its log");
            let _nobody_waits = waiting.try_send(if is_complete { Ok(()) } else { Err(failed()) });
        }
    }

    fn order(&self, copy: CopyOrder) -> Result<Receiver<Result<()>>> {
        let mut state = self.state.lock();
        if !state.has_arena {
            return Err(Error::new(ErrorKind::Closed, "the worker has not mapped the arena"));
        }
        let order = state.last_order + 1;
        let event = SessionEvent { event: Some(Event::Copy(CopyOrder { order, ..copy })) };
        // An operation has one order in flight at the most, and the queue has a place for each.
        state.events.as_ref().ok_or_else(gone)?.try_send(event).map_err(|_| gone())?;
        let (ended, waiting) = bounded(1);
        state.last_order = order;
        state.orders.insert(order, ended);
        Ok(waiting)
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Closed, "the worker is gone")
}

/// The KV cache of a worker, for one operation.
pub(crate) struct PeerKvCache {
    peer: Arc<Peer>,
    layout: MemoryLayout,
    operation: u64,
}

impl PeerKvCache {
    pub(crate) fn new(peer: Arc<Peer>, layout: MemoryLayout, operation: u64) -> Self {
        Self { peer, layout, operation }
    }
}

struct Ordered {
    ended: Receiver<Result<()>>,
    _slots: Vec<Arc<Slot>>,
}

impl CopyBatch for Ordered {
    fn wait(&mut self, deadline: Instant) -> Result<()> {
        match self.ended.recv_deadline(deadline) {
            Ok(ended) => ended,
            Err(RecvTimeoutError::Timeout) => {
                Err(Error::new(ErrorKind::Timeout, "the worker has not reported its copies"))
            }
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }
}

impl KvCache for PeerKvCache {
    fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    fn copy(self: Arc<Self>, direction: CopyDirection, copies: Vec<BlockCopy>) -> Result<Box<dyn CopyBatch>> {
        let ended = self.peer.order(CopyOrder {
            order: 0,
            operation: self.operation,
            is_load: direction == CopyDirection::ToDevice,
            blocks: copies.iter().map(|copy| copy.block).collect(),
            places: copies.iter().map(|copy| copy.slot.place().0).collect(),
        })?;
        Ok(Box::new(Ordered { ended, _slots: copies.into_iter().map(|copy| copy.slot).collect() }))
    }
}
