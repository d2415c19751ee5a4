//! The bounded queues in front of an engine, one for each priority, and the order in which they are served.
//! Knows nothing of threads or drives: an engine keeps them behind its mutex.

use std::collections::VecDeque;

use super::IoRequest;
use crate::error::{Error, ErrorKind, Result};

/// The most requests that wait in the queue of one priority.
pub(super) const QUEUE_CAPACITY: usize = 4096;

/// After so many requests of higher priority a waiting one of a lower priority is served.
pub(super) const STARVATION_LIMIT: u32 = 8;

const PRIORITIES: usize = 3;

/// Requests that wait for the drive.
#[derive(Default)]
pub(super) struct Queues {
    waiting: [VecDeque<IoRequest>; PRIORITIES],
    /// How many requests of a higher priority were served while one of this priority waited.
    passed: [u32; PRIORITIES],
    /// Why no request is taken any more.
    end: Option<Error>,
}

impl Queues {
    /// Queues a request, or gives it back with the reason.
    pub(super) fn push(&mut self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        if let Some(end) = &self.end {
            return Err((request, end.clone()));
        }
        let queue = &mut self.waiting[request.priority as usize];
        if queue.len() >= QUEUE_CAPACITY {
            let message = format!(
                "{QUEUE_CAPACITY} {:?} requests wait for the drive, which is the limit; submit again when some have \
                 completed",
                request.priority
            );
            return Err((request, Error::new(ErrorKind::Busy, message)));
        }
        queue.push_back(request);
        Ok(())
    }

    /// The next request to serve.
    pub(super) fn pop(&mut self) -> Option<IoRequest> {
        let starved =
            (0..PRIORITIES).rev().find(|&p| self.passed[p] >= STARVATION_LIMIT && !self.waiting[p].is_empty());
        let served = starved.or_else(|| (0..PRIORITIES).find(|&p| !self.waiting[p].is_empty()))?;
        self.passed[served] = 0;
        for lower in served + 1..PRIORITIES {
            self.passed[lower] = if self.waiting[lower].is_empty() { 0 } else { self.passed[lower] + 1 };
        }
        self.waiting[served].pop_front()
    }

    /// Takes no request from now on; the first reason stays.
    pub(super) fn close(&mut self, reason: Error) {
        self.end.get_or_insert(reason);
    }

    /// Why no request is taken any more, once that is so.
    pub(super) fn end(&self) -> Option<&Error> {
        self.end.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FileId, IoKind, IoPriority};
    use super::*;

    fn request(priority: IoPriority, offset: u64) -> IoRequest {
        let done = Box::new(|_| ());
        IoRequest { file: FileId(0), kind: IoKind::Sync, offset, buffer: None, priority, done }
    }

    fn fill(queues: &mut Queues, priority: IoPriority, count: u64) {
        for offset in 0..count {
            assert!(queues.push(request(priority, offset)).is_ok());
        }
    }

    #[test]
    fn higher_priorities_go_first_and_lower_ones_are_not_starved() {
        let mut queues = Queues::default();
        fill(&mut queues, IoPriority::Write, 2);
        fill(&mut queues, IoPriority::Prefetch, 2);
        fill(&mut queues, IoPriority::Demand, 20);
        let order: Vec<_> = std::iter::from_fn(|| queues.pop().map(|request| request.priority)).collect();
        let place = |priority| order.iter().position(|&p| p == priority);
        assert_eq!(place(IoPriority::Demand), Some(0));
        assert_eq!(place(IoPriority::Write), Some(STARVATION_LIMIT as usize));
        assert_eq!(place(IoPriority::Prefetch), Some(STARVATION_LIMIT as usize + 1));
        assert_eq!(order.iter().filter(|&&p| p == IoPriority::Demand).count(), 20);
        assert_eq!(order.len(), 24);
    }

    #[test]
    fn requests_of_one_priority_keep_their_order() {
        let mut queues = Queues::default();
        fill(&mut queues, IoPriority::Prefetch, 100);
        assert!((0..100).all(|offset| queues.pop().is_some_and(|request| request.offset == offset)));
    }

    #[test]
    fn each_queue_is_bounded_and_a_closed_one_takes_nothing() {
        let mut queues = Queues::default();
        fill(&mut queues, IoPriority::Write, QUEUE_CAPACITY as u64);
        let (request_back, error) = queues.push(request(IoPriority::Write, 77)).expect_err("full");
        assert_eq!((request_back.offset, error.kind()), (77, ErrorKind::Busy));
        fill(&mut queues, IoPriority::Demand, 1);
        queues.close(Error::new(ErrorKind::Poisoned, "first"));
        queues.close(Error::new(ErrorKind::Closed, "second"));
        let (_, error) = queues.push(request(IoPriority::Demand, 0)).expect_err("closed");
        assert_eq!(error.kind(), ErrorKind::Poisoned);
        assert_eq!(std::iter::from_fn(|| queues.pop()).count(), QUEUE_CAPACITY + 1);
    }
}
