//! The bounded queues in front of an engine, and the order in which they are served. A lane has one for each priority; an
//! engine whose drives do not share anything has a lane for each file, so that none waits for another's, and takes a
//! request only if its drive has room. Knows nothing of threads: an engine keeps them behind its mutex.

use std::collections::VecDeque;

use super::{FileId, IoBuffer, IoKind, IoRequest};
use crate::error::{Error, ErrorKind, Result};

/// The most requests that wait in the queue of one priority of a lane.
pub(super) const QUEUE_CAPACITY: usize = 4096;

/// After so many requests of higher priority a waiting one of a lower priority is served.
pub(super) const STARVATION_LIMIT: u32 = 8;

/// The most requests that [`Queues::pop_run`] takes at once.
pub(super) const RUN_MAX: usize = 64;

const PRIORITIES: usize = 3;

/// Requests that wait for the drives.
pub(super) struct Queues {
    lanes: Vec<Lane>,
    /// The lane to look at first, so that all get their turn.
    next: usize,
    /// Why no request is taken any more.
    end: Option<Error>,
}

/// Requests that wait for the same drive.
#[derive(Default)]
struct Lane {
    waiting: [VecDeque<IoRequest>; PRIORITIES],
    /// How many requests of a higher priority were served while one of this priority waited.
    passed: [u32; PRIORITIES],
}

impl Lane {
    /// The priority to serve next. Nothing of a lower priority goes while one of a higher one has no room, unless it has
    /// waited too long: it would take what that one waits for. What has waited too long and has no room holds up nobody.
    fn choose(&self, has_room: &impl Fn(&IoRequest) -> bool) -> Option<usize> {
        let may_go = |priority: usize| self.waiting[priority].front().is_some_and(has_room);
        let starved = (0..PRIORITIES).rev().find(|&p| self.passed[p] >= STARVATION_LIMIT && may_go(p));
        starved.or_else(|| (0..PRIORITIES).find(|&p| !self.waiting[p].is_empty()).filter(|&p| may_go(p)))
    }

    fn pop(&mut self, has_room: &impl Fn(&IoRequest) -> bool) -> Option<IoRequest> {
        let served = self.choose(has_room)?;
        self.passed[served] = 0;
        for lower in served + 1..PRIORITIES {
            self.passed[lower] = if self.waiting[lower].is_empty() { 0 } else { self.passed[lower].saturating_add(1) };
        }
        self.waiting[served].pop_front()
    }
}

impl Queues {
    /// With one lane for all files: for an engine whose threads take requests of any drive.
    pub(super) fn shared() -> Self {
        Self::by_file(1)
    }

    /// With a lane for each of `files` files.
    pub(super) fn by_file(files: usize) -> Self {
        Self { lanes: (0..files.max(1)).map(|_| Lane::default()).collect(), next: 0, end: None }
    }

    fn lane_of(&self, file: FileId) -> usize {
        (file.0 as usize).min(self.lanes.len() - 1)
    }

    /// Queues a request, or gives it back with the reason.
    pub(super) fn push(&mut self, request: IoRequest) -> Result<(), (IoRequest, Error)> {
        if let Some(end) = &self.end {
            return Err((request, end.clone()));
        }
        let lane = self.lane_of(request.file);
        let queue = &mut self.lanes[lane].waiting[request.priority as usize];
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

    /// Whether requests of the file's lane wait.
    pub(super) fn has_waiting(&self, file: FileId) -> bool {
        self.lanes[self.lane_of(file)].waiting.iter().any(|queue| !queue.is_empty())
    }

    /// The next request to serve, whether its drive has room or not.
    pub(super) fn pop(&mut self) -> Option<IoRequest> {
        self.pop_from(&|_| true).map(|(_, request)| request)
    }

    /// The next request to serve, with its lane. Lanes take turns.
    fn pop_from(&mut self, has_room: &impl Fn(&IoRequest) -> bool) -> Option<(usize, IoRequest)> {
        let count = self.lanes.len();
        for lane in (self.next..self.next + count).map(|lane| lane % count) {
            if let Some(request) = self.lanes[lane].pop(has_room) {
                self.next = (lane + 1) % count;
                return Some((lane, request));
            }
        }
        None
    }

    /// The next request to serve among those that have room, and with it those right behind it in its queue that go on in
    /// the file where it ends, together at most `bytes_max` of the first and [`RUN_MAX`] of them. They count as one for
    /// who waits behind them.
    pub(super) fn pop_run(
        &mut self,
        has_room: impl Fn(&IoRequest) -> bool,
        bytes_max: impl Fn(&IoRequest) -> usize,
        run: &mut Vec<IoRequest>,
    ) {
        let Some((lane, first)) = self.pop_from(&has_room) else { return };
        let (priority, file, kind, bytes_max) = (first.priority, first.file, first.kind, bytes_max(&first));
        let length = |request: &IoRequest| request.buffer.as_ref().map_or(0, IoBuffer::bytes);
        let mut bytes = length(&first);
        let mut end = first.offset + bytes as u64;
        run.push(first);
        let queue = &mut self.lanes[lane].waiting[priority as usize];
        while let Some(next) = queue.front()
            && kind != IoKind::Sync
            && (next.file, next.kind, next.offset) == (file, kind, end)
            && bytes + length(next) <= bytes_max
            && run.len() < RUN_MAX
            && let Some(next) = queue.pop_front()
        {
            bytes += length(&next);
            end += length(&next) as u64;
            run.push(next);
        }
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
    use super::super::{IoPriority, Pages};
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
        let mut queues = Queues::shared();
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
        let mut queues = Queues::shared();
        fill(&mut queues, IoPriority::Prefetch, 100);
        assert!((0..100).all(|offset| queues.pop().is_some_and(|request| request.offset == offset)));
    }

    /// The offsets of each run, in pages.
    fn runs(queues: &mut Queues, pages_max: usize) -> Vec<Vec<u64>> {
        std::iter::from_fn(|| {
            let mut run = Vec::new();
            queues.pop_run(|_| true, |_| pages_max * 4096, &mut run);
            (!run.is_empty()).then(|| run.iter().map(|request| request.offset / 4096).collect())
        })
        .collect()
    }

    #[test]
    fn neighbours_are_served_together_up_to_a_bound() {
        let page = |kind, page: u64, pages: usize| {
            let buffer = (kind != IoKind::Sync).then(|| IoBuffer::Pages(Pages::new(pages * 4096)));
            IoRequest { kind, buffer, ..request(IoPriority::Write, page * 4096) }
        };
        let filled = |requests: Vec<IoRequest>| {
            let mut queues = Queues::shared();
            requests.into_iter().for_each(|request| assert!(queues.push(request).is_ok()));
            queues
        };
        let (read, write) = (IoKind::Read, IoKind::Write);
        let mut queues = filled(vec![page(write, 0, 2), page(write, 2, 1), page(write, 3, 3), page(write, 7, 1)]);
        assert_eq!(runs(&mut queues, 8), [vec![0, 2, 3], vec![7]], "a gap ends a run");
        let mut queues = filled(vec![page(write, 0, 2), page(write, 2, 1), page(write, 3, 3)]);
        assert_eq!(runs(&mut queues, 4), [vec![0, 2], vec![3]], "so does the bound on its bytes");
        let mut queues = filled(vec![page(write, 0, 9), page(write, 9, 1)]);
        assert_eq!(runs(&mut queues, 4), [vec![0], vec![9]], "what is larger goes alone");
        let mut queues = filled(vec![page(write, 0, 1), page(read, 1, 1), page(read, 2, 1)]);
        assert_eq!(runs(&mut queues, 8), [vec![0], vec![1, 2]], "reads and writes do not mix");
        let mut queues = filled(vec![page(IoKind::Sync, 0, 0), page(IoKind::Sync, 0, 0), page(write, 0, 1)]);
        assert_eq!(runs(&mut queues, 8), [[0], [0], [0]], "a sync goes alone");
        let other = IoRequest { file: FileId(1), ..page(write, 1, 1) };
        assert_eq!(runs(&mut filled(vec![page(write, 0, 1), other]), 8), [[0], [1]], "another file");
        let demand = IoRequest { priority: IoPriority::Demand, ..page(write, 1, 1) };
        assert_eq!(runs(&mut filled(vec![page(write, 0, 1), demand]), 8), [[1], [0]], "another priority");
        let mut queues = filled((0..RUN_MAX as u64 + 3).map(|number| page(write, number, 1)).collect());
        let lengths: Vec<_> = runs(&mut queues, usize::MAX / 4096).iter().map(Vec::len).collect();
        assert_eq!(lengths, [RUN_MAX, 3]);
    }

    #[test]
    fn a_run_counts_as_one_for_who_waits() {
        let mut queues = Queues::shared();
        fill(&mut queues, IoPriority::Write, 1);
        for number in 0..20 * 4 {
            let buffer = Some(IoBuffer::Pages(Pages::new(4096)));
            let request = IoRequest { kind: IoKind::Read, buffer, ..request(IoPriority::Demand, number * 4096) };
            assert!(queues.push(request).is_ok());
        }
        let mut run = Vec::new();
        let served = std::iter::from_fn(|| {
            run.clear();
            queues.pop_run(|_| true, |_| 4 * 4096, &mut run);
            run.first().map(|request| request.priority)
        });
        assert_eq!(served.take_while(|&priority| priority == IoPriority::Demand).count(), STARVATION_LIMIT as usize);
    }

    /// What is served by drives with room for some reads and writes each, of requests that are always there.
    struct Drives {
        queues: Queues,
        /// In flight, by file: reads and writes.
        in_flight: Vec<[usize; 2]>,
    }

    const ROOM: usize = 4;

    impl Drives {
        fn new(files: usize) -> Self {
            Self { queues: Queues::by_file(files), in_flight: vec![[0; 2]; files] }
        }

        fn push(&mut self, file: u32, kind: IoKind, priority: IoPriority) {
            let buffer = Some(IoBuffer::Pages(Pages::new(4096)));
            let request = IoRequest { file: FileId(file), kind, buffer, ..request(priority, 0) };
            assert!(self.queues.push(request).is_ok());
        }

        /// Starts what has room; who was served, by file and priority.
        fn start(&mut self) -> Vec<(u32, IoPriority)> {
            let served = std::iter::from_fn(|| {
                let mut run = Vec::new();
                let in_flight = &self.in_flight;
                let has_room = |request: &IoRequest| in_flight[request.file.0 as usize][request.kind as usize] < ROOM;
                self.queues.pop_run(has_room, |_| 4096, &mut run);
                let request = run.pop()?;
                self.in_flight[request.file.0 as usize][request.kind as usize] += 1;
                Some((request.file.0, request.priority))
            });
            served.collect()
        }

        fn end(&mut self, file: usize, kind: IoKind) {
            self.in_flight[file][kind as usize] -= 1;
        }
    }

    const READ: (IoKind, IoPriority) = (IoKind::Read, IoPriority::Demand);
    const WRITE: (IoKind, IoPriority) = (IoKind::Write, IoPriority::Write);

    #[test]
    fn writes_do_not_take_what_waiting_reads_need_and_go_on_all_the_same() {
        let mut drives = Drives::new(1);
        (0..200).for_each(|_| drives.push(0, READ.0, READ.1));
        (0..50).for_each(|_| drives.push(0, WRITE.0, WRITE.1));
        assert_eq!(drives.start(), [(0, IoPriority::Demand); ROOM], "writes have room and wait");
        let mut order = Vec::new();
        for _ in 0..90 {
            drives.end(0, IoKind::Read);
            for (_, priority) in drives.start() {
                order.push(priority);
                if priority == IoPriority::Write {
                    drives.end(0, IoKind::Write);
                }
            }
        }
        let writes = order.iter().filter(|&&priority| priority == IoPriority::Write).count();
        assert_eq!(writes, (order.len() - writes + ROOM) / STARVATION_LIMIT as usize, "one after eight reads");
    }

    #[test]
    fn a_flood_of_writes_does_not_hold_up_a_read() {
        let mut drives = Drives::new(1);
        (0..100).for_each(|_| drives.push(0, WRITE.0, WRITE.1));
        assert_eq!(drives.start(), [(0, IoPriority::Write); ROOM]);
        for _ in 0..50 {
            drives.push(0, READ.0, READ.1);
            assert_eq!(drives.start(), [(0, IoPriority::Demand)], "while all the room of writes is taken");
            drives.end(0, IoKind::Read);
        }
        // Writes that have waited too long and have no room hold up nobody either.
        assert!(drives.queues.lanes[0].passed[IoPriority::Write as usize] > STARVATION_LIMIT);
        drives.push(0, READ.0, IoPriority::Prefetch);
        assert_eq!(drives.start(), [(0, IoPriority::Prefetch)]);
    }

    #[test]
    fn a_drive_that_stands_still_holds_up_no_other() {
        let mut drives = Drives::new(3);
        (0..100).for_each(|_| drives.push(1, READ.0, READ.1));
        assert_eq!(drives.start().len(), ROOM);
        drives.push(2, WRITE.0, WRITE.1);
        drives.push(0, READ.0, IoPriority::Prefetch);
        let mut served = drives.start();
        served.sort_unstable();
        assert_eq!(served, [(0, IoPriority::Prefetch), (2, IoPriority::Write)]);
    }

    /// Whatever is asked for and in whatever order drives answer: nothing that has room waits for more than a bounded
    /// number of others of its drive, and while there is something to do no drive is idle.
    #[test]
    fn nothing_is_starved_in_random_traffic() {
        use rand::{Rng, SeedableRng, rngs::SmallRng};
        let seed =
            std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| rand::rng().random());
        println!("SEED={seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let mut drives = Drives::new(2);
        // How often something else was served while it waited with room, by file and priority.
        let mut passed = [[0u32; PRIORITIES]; 2];
        let kinds = [(IoKind::Read, IoPriority::Demand), (IoKind::Read, IoPriority::Prefetch), WRITE];
        let waits =
            |drives: &Drives, file: usize, priority: usize| !drives.queues.lanes[file].waiting[priority].is_empty();
        for _ in 0..20_000 {
            let file = random.random_range(0..2);
            let (kind, priority) = kinds[random.random_range(0..3)];
            // Mostly a flood of demand reads, or of writes.
            if drives.queues.lanes[file as usize].waiting[priority as usize].len() < 50 {
                drives.push(file, kind, priority);
            }
            for (file, served) in drives.start() {
                for other in 0..PRIORITIES {
                    let count = &mut passed[file as usize][other];
                    let is_blocked = drives.in_flight[file as usize][kinds[other].0 as usize] >= ROOM;
                    *count = if other == served as usize || !waits(&drives, file as usize, other) {
                        0
                    } else {
                        *count + u32::from(!is_blocked)
                    };
                    assert!(*count <= 3 * STARVATION_LIMIT, "priority {other} of file {file} waits for ever");
                }
            }
            for file in 0..2 {
                for kind in [IoKind::Read, IoKind::Write] {
                    if drives.in_flight[file][kind as usize] > 0 && random.random_bool(0.4) {
                        drives.end(file, kind);
                    }
                }
                let is_idle = drives.in_flight[file] == [0; 2];
                assert!(!is_idle || !(0..PRIORITIES).any(|p| waits(&drives, file, p)) || !drives.start().is_empty());
            }
        }
    }

    #[test]
    fn each_queue_is_bounded_and_a_closed_one_takes_nothing() {
        let mut queues = Queues::shared();
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
