//! The thread of a GPU: takes copies, queues their pieces within bounds, sees them end and answers. It sleeps while
//! nothing is on its way, and looks every 50 us while something is: the driver has no way to wait for several events.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::device::Core;
use super::job::Job;
use super::queue::Queue;

/// Between two looks while copies are on the device.
const LOOK_IN_FLIGHT: Duration = Duration::from_micros(50);
/// Between two looks while all wait for a fence or an arena.
const LOOK_WAITING: Duration = Duration::from_micros(200);
/// Without an end for so long the device is stuck, or behind something that is.
const STALLED_AFTER: Duration = Duration::from_secs(30);
const STALL_REPORT_EVERY: Duration = Duration::from_secs(10);

struct Engine<'a> {
    core: &'a Core,
    queue: Queue<Job>,
    progressed: Instant,
    reported: Option<Instant>,
}

/// Runs until the device is dropped.
pub(super) fn run(core: &Arc<Core>) {
    let _entered = match core.tools.context.enter() {
        Ok(entered) => entered,
        Err(error) => {
            tracing::error!(%error, "the GPU takes no copies");
            core.inbox.close();
            return;
        }
    };
    let mut engine = Engine { core, queue: Queue::default(), progressed: Instant::now(), reported: None };
    loop {
        match std::panic::catch_unwind(AssertUnwindSafe(|| engine.turn())) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => {
                tracing::error!("the thread of the GPU has panicked; it takes no more copies");
                core.inbox.close();
                // Every job that is dropped with the queue waits for its copies and answers.
                return;
            }
        }
    }
}

impl Engine<'_> {
    /// One look at everything; false when there is nothing left to do for ever.
    fn turn(&mut self) -> bool {
        let is_in_flight = self.queue.iter().any(Job::is_in_flight);
        let patience = if is_in_flight { LOOK_IN_FLIGHT } else { LOOK_WAITING };
        let (new, is_closed) = self.core.inbox.take((!self.queue.is_empty()).then_some(patience));
        new.into_iter().for_each(|job| self.queue.push(job));
        if is_closed && self.queue.is_empty() {
            return false;
        }
        self.settle();
        self.submit();
        for job in self.queue.take_ended(Job::has_ended) {
            job.finish();
        }
        true
    }

    fn settle(&mut self) {
        let (mut has_progressed, mut is_in_flight) = (false, false);
        for job in self.queue.iter_mut() {
            has_progressed |= job.settle();
            is_in_flight |= job.is_in_flight();
            job.update();
        }
        if has_progressed || !is_in_flight {
            self.progressed = Instant::now();
            self.reported = None;
        } else if self.progressed.elapsed() > STALLED_AFTER
            && self.reported.is_none_or(|reported| reported.elapsed() > STALL_REPORT_EVERY)
        {
            tracing::error!(
                seconds = self.progressed.elapsed().as_secs(),
                "no copy of the GPU has ended; their memory stays in use until they do"
            );
            self.reported = Some(Instant::now());
        }
    }

    fn submit(&mut self) {
        if self.queue.iter().any(Job::needs_rest) {
            return;
        }
        // Bounded: every piece counts against the bytes in flight or ends the job.
        while let Some(job) = self.queue.next() {
            job.queue_next();
        }
    }
}
