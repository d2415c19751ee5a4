//! Loads and saves in flight: who asked, whether it is to end early, and waiting for them to end.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use pegaflow_tiers::{Error, ErrorKind, Result};

use crate::api::{OperationId, SessionId};

/// One load or save in flight.
pub(crate) struct Operation {
    number: u64,
    session: SessionId,
    id: OperationId,
    is_save: bool,
    is_cancelled: AtomicBool,
}

impl Operation {
    pub(crate) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }
}

#[derive(Default)]
struct State {
    next: u64,
    running: HashMap<u64, Arc<Operation>>,
}

/// All operations in flight.
#[derive(Default)]
pub(crate) struct Operations {
    state: Mutex<State>,
    ended: Condvar,
}

impl Operations {
    pub(crate) fn start(&self, session: SessionId, id: OperationId, is_save: bool) -> Arc<Operation> {
        let mut state = self.state.lock();
        state.next += 1;
        let number = state.next;
        let operation = Arc::new(Operation { number, session, id, is_save, is_cancelled: AtomicBool::new(false) });
        state.running.insert(number, Arc::clone(&operation));
        operation
    }

    pub(crate) fn end(&self, operation: &Operation) {
        self.state.lock().running.remove(&operation.number);
        self.ended.notify_all();
    }

    pub(crate) fn cancel(&self, session: SessionId, id: Option<OperationId>) {
        let state = self.state.lock();
        let meant =
            |operation: &&Arc<Operation>| operation.session == session && id.is_none_or(|id| operation.id == id);
        state
            .running
            .values()
            .filter(meant)
            .for_each(|operation| operation.is_cancelled.store(true, Ordering::Release));
    }

    pub(crate) fn cancel_all(&self) {
        self.state.lock().running.values().for_each(|operation| operation.is_cancelled.store(true, Ordering::Release));
    }

    pub(crate) fn len(&self) -> usize {
        self.state.lock().running.len()
    }

    /// Waits until every operation of the session (or of everybody) has ended.
    ///
    /// # Errors
    /// `Timeout` with the number that still runs.
    pub(crate) fn wait_ended(&self, session: Option<SessionId>, deadline: Instant) -> Result<()> {
        self.wait(deadline, |operation| session.is_none_or(|session| operation.session == session))
    }

    /// Waits until every save that was started before has ended.
    ///
    /// # Errors
    /// `Timeout` with the number that still runs.
    pub(crate) fn wait_saves(&self, deadline: Instant) -> Result<()> {
        let last = self.state.lock().next;
        self.wait(deadline, |operation| operation.is_save && operation.number <= last)
    }

    fn wait(&self, deadline: Instant, meant: impl Fn(&Operation) -> bool) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            let left = state.running.values().filter(|operation| meant(operation)).count();
            if left == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::Timeout, format!("{left} loads or saves have not ended in time")));
            }
            self.ended.wait_until(&mut state, deadline);
        }
    }
}
