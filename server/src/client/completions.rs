//! Ended operations on their way to the caller, and the bound on those not yet fetched. An operation's number is taken
//! when it is accepted and free again when its completion has been fetched.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pegaflow_engine::{Error, ErrorKind, LoadOutcome, OperationId, Result, SaveOutcome};

/// The most operations that are in flight or whose completion was not fetched.
pub const OUTSTANDING_MAX: usize = 16_384;

/// The end of an operation: no copy into or out of the worker's memory can happen any more for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// The operation, as named by the caller.
    pub operation: OperationId,
    /// How it ended.
    pub result: CompletionResult,
}

/// How a load or a save ended. Block numbers are those of the worker's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CompletionResult {
    /// A load.
    Load(LoadOutcome),
    /// A save.
    Save(SaveOutcome),
}

#[derive(Default)]
pub(super) struct Completions {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    outstanding: HashSet<OperationId>,
    ended: VecDeque<Completion>,
}

impl Completions {
    /// Takes the number of an operation.
    ///
    /// # Errors
    /// `InvalidInput` if it is in use, `Busy` at the bound.
    pub(super) fn accept(&self, operation: OperationId) -> Result<()> {
        let mut state = self.state.lock();
        if state.outstanding.len() >= OUTSTANDING_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{OUTSTANDING_MAX} operations are in flight or not polled, which is the limit; call poll"),
            ));
        }
        if !state.outstanding.insert(operation) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("operation {} is in flight or not polled; give every operation its own number", operation.0),
            ));
        }
        Ok(())
    }

    /// Gives the number of an operation back that was not started after all.
    pub(super) fn retract(&self, operation: OperationId) {
        self.state.lock().outstanding.remove(&operation);
    }

    pub(super) fn end(&self, operation: OperationId, result: CompletionResult) {
        self.state.lock().ended.push_back(Completion { operation, result });
        self.arrived.notify_all();
    }

    pub(super) fn fetch(&self) -> Vec<Completion> {
        let mut state = self.state.lock();
        let ended = std::mem::take(&mut state.ended);
        for completion in &ended {
            state.outstanding.remove(&completion.operation);
        }
        ended.into()
    }

    /// Whether there is something to fetch, after waiting for it at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        while state.ended.is_empty() {
            if self.arrived.wait_until(&mut state, deadline).timed_out() {
                return !state.ended.is_empty();
            }
        }
        true
    }
}
