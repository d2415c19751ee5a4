//! Loads that a worker copies itself, at the places that a lookup told: what is in flight, and the rules that hold for them
//! wherever the engine is, in the worker's process or in a server.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pegaflow_tiers::{Error, ErrorKind, Result};

use crate::api::{LoadOutcome, OperationId};

/// A copy at told places is not started with less of the lease left than this; it takes far less.
const LEASE_REMAINING_MIN: Duration = Duration::from_secs(10);

/// Placed loads in flight, with what cancels them.
#[derive(Default)]
pub struct PlacedLoads {
    running: Mutex<HashMap<OperationId, Arc<AtomicBool>>>,
    ended: Condvar,
}

impl PlacedLoads {
    /// Whether enough of the lease is left for a copy to end in it.
    ///
    /// # Errors
    /// `Timeout` with less than 10 s.
    pub fn check_lease(remaining: Duration) -> Result<()> {
        if remaining < LEASE_REMAINING_MIN {
            let message = format!("the lease has {remaining:?} left, less than the {LEASE_REMAINING_MIN:?} to copy in");
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        Ok(())
    }

    /// How a load of `blocks` ended whose copy ended so.
    pub fn outcome(result: Result<()>, blocks: Vec<u32>) -> LoadOutcome {
        match result {
            Ok(()) => LoadOutcome { loaded_dram: blocks.len() as u32, ..LoadOutcome::default() },
            Err(error) => {
                tracing::warn!("a load ended without its bytes: {error:#}");
                LoadOutcome { failed: blocks, ..LoadOutcome::default() }
            }
        }
    }

    /// Notes a load; its copy is given what is returned, which is true once it is cancelled.
    pub fn start(&self, operation: OperationId) -> Arc<AtomicBool> {
        let cancelled = Arc::<AtomicBool>::default();
        self.running.lock().insert(operation, Arc::clone(&cancelled));
        cancelled
    }

    /// The load has ended, or was not started after all.
    pub fn end(&self, operation: OperationId) {
        self.running.lock().remove(&operation);
        self.ended.notify_all();
    }

    /// Asks for a load, or for all, to end early. Unknown ones are ignored.
    pub fn cancel(&self, operation: Option<OperationId>) {
        let running = self.running.lock();
        let meant = running.iter().filter(|(id, _)| operation.is_none_or(|operation| **id == operation));
        meant.for_each(|(_, cancelled)| cancelled.store(true, Ordering::Release));
    }

    /// Waits until none is left; whether that came before the deadline.
    pub fn wait(&self, deadline: Instant) -> bool {
        let mut running = self.running.lock();
        while !running.is_empty() {
            if self.ended.wait_until(&mut running, deadline).timed_out() {
                return running.is_empty();
            }
        }
        true
    }
}
