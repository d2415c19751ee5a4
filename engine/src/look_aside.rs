//! Reads beside requests: while found blocks are computed because the drives look slow, a few of them are read now and then
//! to see whether they still are. One at a time, behind all loads; what is read stays in DRAM, where the next lookup finds
//! it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use parking_lot::{Condvar, Mutex};
use pegaflow_tiers::{GroupGeometry, IoPriority, Location, RecordId};

use crate::api::InstanceId;
use crate::inner::Inner;
use crate::lease::{Hit, Pinned};
use crate::residency::Resident;

/// The most reads of one look.
const READS_MAX: usize = 64;
/// How long a look waits for a slot. Nobody waits for it, so it must not wait for others.
const SLOT_PATIENCE: Duration = Duration::from_millis(50);

struct Look {
    instance: InstanceId,
    block_bytes: u64,
    reads: Vec<(RecordId, Location)>,
    pinned: Pinned,
}

#[derive(Default)]
struct State {
    next: Option<Look>,
    is_closed: bool,
}

/// The look that is to be done next, if there is one.
#[derive(Default)]
pub(crate) struct LookAside {
    state: Mutex<State>,
    changed: Condvar,
}

impl LookAside {
    /// Reads at least one and about `bytes` of what was found on the drive. What cannot be done is reported as such.
    pub(crate) fn start(
        &self,
        inner: &Inner,
        instance: &InstanceId,
        bytes: u64,
        geometry: &GroupGeometry,
        hits: impl Iterator<Item = Hit>,
        pinned: Option<Pinned>,
    ) {
        let mut left = bytes;
        let on_drive = hits.filter_map(|hit| hit.location().map(|location| (hit.id(), location)));
        let wanted = |(_, location): &(RecordId, Location)| {
            let is_wanted = left > 0;
            left = left.saturating_sub(location.bytes());
            is_wanted
        };
        let reads: Vec<_> = on_drive.take_while(wanted).take(READS_MAX).collect();
        let mut state = self.state.lock();
        match pinned.filter(|_| !reads.is_empty() && !state.is_closed && state.next.is_none()) {
            Some(pinned) => {
                let block_bytes = geometry.block_bytes;
                state.next = Some(Look { instance: instance.clone(), block_bytes, reads, pinned });
                drop(state);
                self.changed.notify_all();
            }
            None => {
                drop(state);
                inner.load_choice.was_read(instance, 0, 0, None);
            }
        }
    }

    /// The body of the thread: does one look after the other until [`LookAside::close`].
    pub(crate) fn serve(&self, inner: &Inner) {
        while let Some(look) = self.take() {
            look.run(inner);
        }
    }

    fn take(&self) -> Option<Look> {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(look) = state.next.take() {
                return Some(look);
            }
            self.changed.wait(&mut state);
        }
    }

    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        let look = state.next.take();
        drop(state);
        drop(look);
        self.changed.notify_all();
    }
}

impl Look {
    fn run(self, inner: &Inner) {
        let queued = inner.load_choice.queued_bytes();
        let started = Instant::now();
        let read = self.read(inner, started + inner.config.load_timeout());
        let took = read.map(|_| started.elapsed());
        inner.load_choice.was_read(&self.instance, read.unwrap_or(0), queued, took);
    }

    /// How many bytes were read; `None` if anything went wrong.
    fn read(&self, inner: &Inner, deadline: Instant) -> Option<u64> {
        let store = self.pinned.store()?;
        let (sender, receiver) = bounded(self.reads.len());
        let mut started = 0;
        for (id, location) in self.reads.iter().copied() {
            let patience = Instant::now() + SLOT_PATIENCE;
            let Some(slot) = inner.residency.alloc_until(self.block_bytes as usize, false, patience) else { break };
            let (slot, sender) = (Arc::new(slot), sender.clone());
            let kept = Arc::clone(&slot);
            // The channel holds as many as there are reads; a receiver that has gone needs no answer.
            let done = Box::new(move |result| drop(sender.try_send((id, location, kept, result))));
            store.read(id, location, slot, IoPriority::Prefetch, done).ok()?;
            started += 1;
        }
        let mut bytes = 0;
        for _ in 0..started {
            let (id, location, slot, result) = receiver.recv_deadline(deadline).ok()?;
            let verified = result.ok().filter(|verified| verified.payload_bytes == self.block_bytes)?;
            let block = Resident::new(id, (verified.parent, verified.depth), slot, verified.payload_bytes, false);
            inner.residency.insert(block, false);
            bytes += location.bytes();
        }
        (bytes > 0).then_some(bytes)
    }
}
