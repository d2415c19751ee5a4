//! What every engine does.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::queue::{QUEUE_CAPACITY, STARVATION_LIMIT};
use super::*;

pub(super) fn bytes_come_back_at_every_offset_size_and_memory(open: &Open) {
    let Some(rig) = Rig::new(open, 8, 4 * MIB) else { return };
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut model = vec![0; 4 * MIB];
    // Slots of 772 KiB lie across the border between two registered buffers of 1 MiB.
    let sizes = [2, 3, 5, 16, 193];
    for round in 0..120 {
        let bytes = PAGE * sizes[random.random_range(0..sizes.len())];
        let offset = PAGE * random.random_range(0..=(model.len() - bytes) / PAGE);
        // Several at once, so that later ones lie elsewhere in the arena.
        let mut memory: Vec<_> = (0..random.random_range(1..3)).map(|_| rig.slot(bytes)).collect();
        let mut pick = |random: &mut StdRng| match random.random() {
            true => memory.pop().unwrap_or_else(|| pages(bytes)),
            false => pages(bytes),
        };
        let written = pattern(seed ^ round, bytes);
        let buffer = filled(pick(&mut random), &written);
        let buffer = rig.transfer(IoKind::Write, offset, buffer).expect("written");
        assert_eq!(content(&buffer), written, "a write changes nothing in memory");
        model[offset..offset + bytes].copy_from_slice(&written);
        let offset = PAGE * random.random_range(0..=(model.len() - bytes) / PAGE);
        let buffer = rig.transfer(IoKind::Read, offset, pick(&mut random)).expect("read");
        assert!(content(&buffer) == model[offset..offset + bytes], "read at {offset} in round {round}");
    }
    assert!(rig.bytes_at(0, model.len()) == model, "the file is not what was written");
    assert_eq!(rig.arena.used_bytes(), 0);
}

pub(super) fn ten_thousand_operations_pass_through_a_depth_of_four(open: &Open) {
    const PAGES: usize = 500;
    let Some(rig) = Rig::new(open, 4, PAGES * PAGE) else { return };
    assert_eq!(rig.engine.depth(), 4);
    for round in 0..10 {
        let (sender, receiver) = bounded(PAGES);
        for page in 0..PAGES {
            let buffer = filled(pages(PAGE), &pattern((round * PAGES + page) as u64, PAGE));
            rig.submit(request(IoKind::Write, page * PAGE, Some(buffer), IoPriority::Write, report(&sender)));
        }
        assert_eq!(outcomes(&receiver, PAGES), vec![None; PAGES]);
        let (sender, receiver) = bounded(PAGES);
        for page in 0..PAGES {
            let sender = sender.clone();
            rig.submit(read(page * PAGE, IoPriority::Demand, move |completion| {
                sender.send((page, completion.result.is_ok(), completion.buffer)).expect("the test waits");
            }));
        }
        for _ in 0..PAGES {
            let (page, is_ok, buffer) = receiver.recv_timeout(PATIENCE).expect("a completion");
            let found = content(&buffer.expect("the buffer comes back"));
            assert!(is_ok && found == pattern((round * PAGES + page) as u64, PAGE), "page {page} of round {round}");
        }
        assert!(receiver.is_empty());
    }
}

pub(super) fn many_threads_submit_at_once(open: &Open) {
    const THREADS: usize = 8;
    const OPERATIONS: usize = 200;
    let Some(rig) = Rig::new(open, 16, THREADS * PAGE) else { return };
    let rig = &rig;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for i in 0..OPERATIONS {
                    let bytes = pattern((thread * OPERATIONS + i) as u64, PAGE);
                    let buffer = rig.transfer(IoKind::Write, thread * PAGE, filled(pages(PAGE), &bytes));
                    buffer.expect("written");
                    let buffer = rig.transfer(IoKind::Read, thread * PAGE, pages(PAGE)).expect("read");
                    assert!(content(&buffer) == bytes, "operation {i} of thread {thread}");
                }
            });
        }
    });
}

pub(super) fn what_was_written_is_read_after_a_sync(open: &Open) {
    let Some(rig) = Rig::new(open, 8, MIB) else { return };
    let bytes = pattern(1, 8 * PAGE);
    rig.transfer(IoKind::Write, 16 * PAGE, filled(rig.slot(8 * PAGE), &bytes)).expect("written");
    sync_blocking(&*rig.engine, FileId(0), PATIENCE).expect("synced");
    assert!(content(&rig.transfer(IoKind::Read, 16 * PAGE, pages(8 * PAGE)).expect("read")) == bytes);
    assert!(rig.bytes_at(16 * PAGE, 8 * PAGE) == bytes);
    // A sync has no buffer to give back.
    let error =
        transfer_blocking(&*rig.engine, FileId(0), IoKind::Sync, 0, pages(PAGE), PATIENCE).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

pub(super) fn a_read_past_the_end_of_the_file_is_an_error(open: &Open) {
    // The file ends at a page, inside a page, and before the read begins.
    for (file_bytes, offset) in [(4 * PAGE, 2 * PAGE), (4 * PAGE - 1000, 2 * PAGE), (4 * PAGE, 64 * PAGE)] {
        let Some(rig) = Rig::new(open, 8, file_bytes) else { return };
        for buffer in [pages(4 * PAGE), rig.slot(4 * PAGE)] {
            let (sender, receiver) = bounded(1);
            let request = request(IoKind::Read, offset, Some(buffer), IoPriority::Demand, move |completion| {
                sender.send(completion).expect("the test waits");
            });
            rig.submit(request);
            let completion = receiver.recv_timeout(PATIENCE).expect("a completion");
            assert_eq!(completion.result.expect_err("past the end").kind(), ErrorKind::Corrupt);
            assert_eq!(completion.buffer.map(|buffer| buffer.bytes()), Some(4 * PAGE));
        }
        assert!(rig.transfer(IoKind::Read, 0, pages(PAGE)).is_ok(), "the engine goes on");
    }
}

pub(super) fn a_neighbour_past_the_end_fails_alone(open: &Open) {
    const PAGES: usize = 8;
    // The file ends at a page, and inside a page.
    for file_bytes in [5 * PAGE, 6 * PAGE - 1000] {
        let Some(rig) = Rig::new(open, 1, file_bytes) else { return };
        let full = file_bytes / PAGE;
        let bytes = pattern(1, full * PAGE);
        rig.transfer(IoKind::Write, 0, filled(pages(full * PAGE), &bytes)).expect("written");
        // Neighbours in the arena, and pages anywhere.
        for is_slot in [true, false] {
            let (sender, receiver) = bounded(PAGES);
            let release = rig.block();
            for page in 0..PAGES / 2 {
                let buffer = if is_slot { rig.slot(2 * PAGE) } else { pages(2 * PAGE) };
                let sender = sender.clone();
                rig.submit(request(
                    IoKind::Read,
                    page * 2 * PAGE,
                    Some(buffer),
                    IoPriority::Demand,
                    move |completion| {
                        sender.send((page, completion)).expect("the test waits");
                    },
                ));
            }
            drop(release);
            for _ in 0..PAGES / 2 {
                let (page, completion) = receiver.recv_timeout(PATIENCE).expect("a completion");
                let error = completion.result.err().map(|error| error.kind());
                if (page + 1) * 2 > full {
                    assert_eq!(error, Some(ErrorKind::Corrupt), "pair {page} is not in the file");
                } else {
                    let found = content(&completion.buffer.expect("the buffer comes back"));
                    assert!(error.is_none() && found == bytes[page * 2 * PAGE..][..2 * PAGE], "pair {page}");
                }
            }
        }
    }
}

pub(super) fn requests_off_the_contract_come_back(open: &Open) {
    let Some(rig) = Rig::new(open, 8, MIB) else { return };
    let too_long = match rig.slot(2 * PAGE) {
        IoBuffer::Slot { slot, .. } => IoBuffer::Slot { slot, bytes: 3 * PAGE },
        pages => pages,
    };
    let odd = match rig.slot(2 * PAGE) {
        IoBuffer::Slot { slot, .. } => IoBuffer::Slot { slot, bytes: 1000 },
        pages => pages,
    };
    let cases = [
        (0, IoKind::Read, 512, Some(pages(PAGE)), "an offset off the alignment"),
        (0, IoKind::Read, usize::MAX - 4095, Some(pages(PAGE)), "an offset past 2^63"),
        (1, IoKind::Read, 0, Some(pages(PAGE)), "an unknown file"),
        (0, IoKind::Write, 0, None, "no buffer"),
        (0, IoKind::Sync, 0, Some(pages(PAGE)), "a sync with a buffer"),
        (0, IoKind::Write, 0, Some(too_long), "more than the slot"),
        (0, IoKind::Write, 0, Some(odd), "a length off the alignment"),
    ];
    for (file, kind, offset, buffer, what) in cases {
        let bytes = buffer.as_ref().map(IoBuffer::bytes);
        let (sender, receiver) = bounded(1);
        let request =
            IoRequest { file: FileId(file), ..request(kind, offset, buffer, IoPriority::Demand, report(&sender)) };
        let (request, error) = rig.engine.submit(request).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{what}");
        assert_eq!((request.offset, request.buffer.as_ref().map(IoBuffer::bytes)), (offset as u64, bytes));
        assert!(receiver.is_empty(), "{what}");
    }
}

pub(super) fn a_full_queue_gives_the_request_back(open: &Open) {
    let Some(rig) = Rig::new(open, 1, MIB) else { return };
    let (sender, receiver) = bounded(QUEUE_CAPACITY + 2);
    let release = rig.block();
    for _ in 0..QUEUE_CAPACITY {
        rig.submit(read(0, IoPriority::Prefetch, report(&sender)));
    }
    let (back, error) = rig.engine.submit(read(7 * PAGE, IoPriority::Prefetch, report(&sender))).expect_err("full");
    assert_eq!((error.kind(), back.offset), (ErrorKind::Busy, 7 * PAGE as u64));
    assert_eq!(back.buffer.as_ref().map(IoBuffer::bytes), Some(PAGE));
    rig.submit(read(0, IoPriority::Demand, report(&sender)));
    assert!(receiver.is_empty(), "nothing has run yet");
    drop(release);
    assert_eq!(outcomes(&receiver, QUEUE_CAPACITY + 1), vec![None; QUEUE_CAPACITY + 1]);
    rig.submit(back);
    assert_eq!(outcomes(&receiver, 1), [None], "what came back can be submitted again");
}

pub(super) fn higher_priorities_go_first_and_none_is_starved(open: &Open) {
    let Some(rig) = Rig::new(open, 1, MIB) else { return };
    let (sender, receiver) = bounded(100);
    let release = rig.block();
    for priority in [IoPriority::Write, IoPriority::Prefetch, IoPriority::Demand] {
        for _ in 0..30 {
            let sender = sender.clone();
            rig.submit(read(0, priority, move |_| sender.send(priority).expect("the test waits")));
        }
    }
    drop(release);
    let order: Vec<_> = (0..90).map(|_| receiver.recv_timeout(PATIENCE).expect("a completion")).collect();
    let limit = STARVATION_LIMIT as usize;
    assert_eq!(order[..limit], vec![IoPriority::Demand; limit]);
    assert_eq!(order[limit..limit + 2], [IoPriority::Write, IoPriority::Prefetch]);
    let last = |priority| order.iter().rposition(|&p| p == priority);
    assert!(last(IoPriority::Demand) < last(IoPriority::Prefetch));
    assert!(last(IoPriority::Prefetch) < last(IoPriority::Write));
}

pub(super) fn after_close_requests_come_back(open: &Open) {
    let Some(rig) = Rig::new(open, 8, MIB) else { return };
    assert!(rig.transfer(IoKind::Read, 0, pages(PAGE)).is_ok());
    rig.engine.close();
    rig.engine.close();
    let (sender, receiver) = bounded(1);
    let (back, error) = rig.engine.submit(read(PAGE, IoPriority::Demand, report(&sender))).expect_err("closed");
    assert_eq!((error.kind(), back.offset), (ErrorKind::Closed, PAGE as u64));
    assert!(receiver.is_empty());
}

pub(super) fn close_completes_everything_once(open: &Open) {
    const OPERATIONS: usize = 500;
    let Some(rig) = Rig::new(open, 1, MIB) else { return };
    let (sender, receiver) = bounded(OPERATIONS + 1);
    let release = rig.block();
    for i in 0..OPERATIONS {
        rig.submit(read(i % 256 * PAGE, IoPriority::Prefetch, report(&sender)));
    }
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| rig.engine.close());
        }
        // The engine refuses requests before it waits for what is in flight.
        let is_open = |outcome: Result<(), (IoRequest, Error)>| match outcome {
            Ok(()) => true,
            Err((_, error)) => error.kind() != ErrorKind::Closed,
        };
        while is_open(rig.engine.submit(read(0, IoPriority::Write, |_| ()))) {
            std::thread::yield_now();
        }
        drop(release);
    });
    assert_eq!(outcomes(&receiver, OPERATIONS), vec![Some(ErrorKind::Closed); OPERATIONS]);

    // In full flow: some have ended, some are in flight, some wait.
    for _ in 0..5 {
        let Some(rig) = Rig::new(open, 16, MIB) else { return };
        let (sender, receiver) = bounded(101);
        for i in 0..100 {
            let large = Some(pages(64 * PAGE));
            rig.submit(request(IoKind::Write, i % 4 * 64 * PAGE, large, IoPriority::Write, report(&sender)));
        }
        let first = receiver.recv_timeout(PATIENCE).expect("a completion");
        rig.engine.close();
        assert_eq!(receiver.len(), 99, "close returns when everything has been completed");
        let ended = outcomes(&receiver, 99);
        assert!(ended.iter().chain([&first]).all(|end| matches!(end, None | Some(ErrorKind::Closed))), "{ended:?}");
    }
}

pub(super) fn buffers_live_until_their_operation_has_ended(open: &Open) {
    const OPERATIONS: usize = 64;
    let Some(mut rig) = Rig::new(open, 1, MIB) else { return };
    let ended = Arc::new(AtomicUsize::new(0));
    let release = rig.block();
    for i in 0..OPERATIONS {
        let buffer = rig.slot(4 * PAGE);
        let (ended, arena) = (Arc::clone(&ended), Arc::clone(&rig.arena));
        rig.submit(request(IoKind::Read, i * 4 * PAGE % MIB, Some(buffer), IoPriority::Prefetch, move |completion| {
            let before = ended.fetch_add(1, Ordering::SeqCst);
            assert_eq!(arena.used_bytes(), ((OPERATIONS - before) * 4 * PAGE) as u64, "each holds its own until here");
            drop(completion);
        }));
    }
    assert_eq!(rig.arena.used_bytes(), (OPERATIONS * 4 * PAGE) as u64, "the requests hold the memory");
    // Everything else goes: the handle of the engine too, which waits for the thread.
    let engine = std::mem::replace(&mut rig.engine, engines::psync(&rig.file, &rig.arena, 1).expect("another"));
    let dropping = std::thread::spawn(move || drop(engine));
    assert_eq!(ended.load(Ordering::SeqCst), 0);
    drop(release);
    dropping.join().expect("closed");
    assert_eq!(ended.load(Ordering::SeqCst), OPERATIONS);
    assert_eq!(rig.arena.used_bytes(), 0);
}

pub(super) fn the_last_handle_may_be_dropped_in_a_completion(open: &Open) {
    let Some(mut rig) = Rig::new(open, 2, MIB) else { return };
    let engine = std::mem::replace(&mut rig.engine, engines::psync(&rig.file, &rig.arena, 1).expect("another"));
    let (sender, receiver) = bounded(2);
    let (handed, handle) = bounded::<Engine>(1);
    let first = read(0, IoPriority::Demand, {
        let sender = sender.clone();
        move |_| {
            drop(handle.recv_timeout(PATIENCE));
            sender.send(()).expect("the test waits");
        }
    });
    assert!(engine.submit(first).is_ok());
    assert!(handed.send(engine).is_ok());
    receiver.recv_timeout(PATIENCE).expect("the drop returned");
}

pub(super) fn a_panic_in_a_completion_is_survived(open: &Open) {
    let Some(rig) = Rig::new(open, 4, MIB) else { return };
    let (sender, receiver) = bounded(100);
    for _ in 0..20 {
        rig.submit(read(0, IoPriority::Demand, |_| panic!("a completion panics, on purpose")));
        rig.submit(read(0, IoPriority::Demand, report(&sender)));
    }
    assert_eq!(outcomes(&receiver, 20), vec![None; 20]);
    assert!(rig.transfer(IoKind::Read, 0, pages(PAGE)).is_ok());
    rig.engine.close();
}

pub(super) fn an_idle_engine_uses_no_cpu(open: &Open) {
    let Some(rig) = Rig::new(open, 16, MIB) else { return };
    let threads = Arc::new(Mutex::new(HashSet::new()));
    let (sender, receiver) = bounded(200);
    for _ in 0..200 {
        let threads = Arc::clone(&threads);
        let report = report(&sender);
        rig.submit(read(0, IoPriority::Demand, move |completion| {
            threads.lock().insert(rustix::thread::gettid());
            report(completion);
        }));
    }
    outcomes(&receiver, 200);
    // Nanoseconds on a CPU, as the kernel counts them.
    let used = || -> u64 {
        let one = |thread: &rustix::thread::Pid| -> u64 {
            let path = format!("/proc/self/task/{}/schedstat", thread.as_raw_nonzero());
            let text = std::fs::read_to_string(path).expect("the thread lives");
            text.split(' ').next().and_then(|word| word.parse().ok()).expect("nanoseconds")
        };
        threads.lock().iter().map(one).sum()
    };
    std::thread::sleep(Duration::from_millis(100));
    let before = used();
    std::thread::sleep(Duration::from_millis(400));
    let spent = Duration::from_nanos(used() - before);
    assert!(spent < Duration::from_millis(40), "{spent:?} on the CPU in 400 ms of idling");
}
