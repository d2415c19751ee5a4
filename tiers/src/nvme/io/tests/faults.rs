//! What the faulty engine does to what stands above it.

use super::*;

type FaultyRig = (Rig, Arc<Faulty<PsyncIo>>);

fn faulty(plan: FaultPlan) -> FaultyRig {
    let rig = Rig::new(&engines::psync, 1, MIB).expect("psync works everywhere");
    let file = rig.file.try_clone().expect("a descriptor");
    drop(file);
    let path = rig._directory.path().join("region");
    let (file, ..) = open_direct(&path).expect("opened");
    let inner = PsyncIo::open(Files::adopt(&[&file]).expect("adopted"), 1).expect("an engine");
    let engine = Arc::new(Faulty::new(inner, plan).expect("a thread"));
    let rig = Rig { engine: Arc::clone(&engine) as Engine, ..rig };
    (rig, engine)
}

fn write(rig: &Rig, offset: usize, seed: u64, bytes: usize) -> Option<ErrorKind> {
    rig.transfer(IoKind::Write, offset, filled(pages(bytes), &pattern(seed, bytes))).err().map(|error| error.kind())
}

fn differing_bits(left: &[u8], right: &[u8]) -> u32 {
    left.iter().zip(right).map(|(l, r)| (l ^ r).count_ones()).sum()
}

#[test]
fn the_planned_operations_fail_and_no_others() {
    let plan = FaultPlan::default()
        .fail(IoKind::Write, 2, FaultAction::Errno(libc::ENOSPC))
        .with(Fault { kind: IoKind::Write, first: 4, times: 2, action: FaultAction::Errno(libc::EIO) })
        .fail(IoKind::Sync, 1, FaultAction::Errno(libc::EIO));
    let (rig, engine) = faulty(plan);
    let ends: Vec<_> = (0..6).map(|i| write(&rig, i * PAGE, i as u64 + 1, PAGE)).collect();
    let (full, failed) = (Some(ErrorKind::NoSpace), Some(ErrorKind::Io));
    assert_eq!(ends, [None, full, None, failed, failed, None]);
    for (page, end) in ends.iter().enumerate() {
        let wanted = if end.is_none() { pattern(page as u64 + 1, PAGE) } else { vec![0; PAGE] };
        assert!(rig.bytes_at(page * PAGE, PAGE) == wanted, "page {page}");
    }
    assert!(sync_blocking(&*rig.engine, FileId(0), PATIENCE).is_err());
    assert!(sync_blocking(&*rig.engine, FileId(0), PATIENCE).is_ok());
    assert_eq!((engine.seen(IoKind::Write), engine.seen(IoKind::Sync), engine.fired()), (6, 2, 4));
}

#[test]
fn a_flipped_bit_is_silent() {
    let flip = FaultAction::FlipBit { byte: 5000, bit: 3 };
    let (rig, engine) = faulty(FaultPlan::default().fail(IoKind::Read, 1, flip).fail(IoKind::Write, 2, flip));
    let wanted = pattern(1, 2 * PAGE);
    assert_eq!(write(&rig, 0, 1, 2 * PAGE), None);
    let slot = rig.transfer(IoKind::Read, 0, rig.slot(2 * PAGE)).expect("a silent fault");
    assert_eq!(differing_bits(&content(&slot), &wanted), 1);
    assert_eq!(content(&slot)[5000] ^ wanted[5000], 1 << 3);
    assert!(content(&rig.transfer(IoKind::Read, 0, pages(2 * PAGE)).expect("read")) == wanted, "only in memory");
    // On the medium, and not in the memory of the writer.
    let buffer = rig.transfer(IoKind::Write, 0, filled(pages(2 * PAGE), &wanted)).expect("a silent fault");
    assert!(content(&buffer) == wanted);
    assert_eq!(differing_bits(&rig.bytes_at(0, 2 * PAGE), &wanted), 1);
    assert_eq!(engine.fired(), 2);
}

#[test]
fn a_torn_write_leaves_its_first_pages() {
    let torn = |bytes| FaultAction::Torn { bytes };
    let plan = FaultPlan::default().fail(IoKind::Write, 1, torn(2 * PAGE + 7)).fail(IoKind::Write, 2, torn(100));
    let (rig, _engine) = faulty(plan);
    assert_eq!(write(&rig, 0, 1, 4 * PAGE), Some(ErrorKind::Io));
    let wanted = pattern(1, 4 * PAGE);
    assert!(rig.bytes_at(0, 2 * PAGE) == wanted[..2 * PAGE]);
    assert!(rig.bytes_at(2 * PAGE, 2 * PAGE) == vec![0; 2 * PAGE]);
    assert_eq!(write(&rig, 8 * PAGE, 2, 4 * PAGE), Some(ErrorKind::Io));
    assert!(rig.bytes_at(8 * PAGE, 4 * PAGE) == vec![0; 4 * PAGE]);
}

#[test]
fn a_lost_write_reports_success() {
    let (rig, engine) = faulty(FaultPlan::default());
    assert_eq!(write(&rig, 0, 1, PAGE), None);
    engine.inject(Fault { kind: IoKind::Write, first: 2, times: u64::MAX, action: FaultAction::Lost });
    assert_eq!(write(&rig, 0, 2, PAGE), None);
    assert!(rig.bytes_at(0, PAGE) == pattern(1, PAGE));
    engine.heal();
    assert_eq!(write(&rig, 0, 3, PAGE), None);
    assert!(rig.bytes_at(0, PAGE) == pattern(3, PAGE));
}

#[test]
fn held_operations_end_when_released_and_stalled_ones_by_themselves() {
    let plan = FaultPlan::default().fail(IoKind::Read, 1, FaultAction::Hold).fail(
        IoKind::Read,
        2,
        FaultAction::Stall(Duration::from_millis(20)),
    );
    let (rig, engine) = faulty(plan);
    let (held, held_end) = bounded(1);
    let (stalled, stalled_end) = bounded(1);
    rig.submit(request(IoKind::Read, 0, Some(rig.slot(2 * PAGE)), IoPriority::Demand, report(&held)));
    rig.submit(read(0, IoPriority::Demand, report(&stalled)));
    assert_eq!(outcomes(&stalled_end, 1), [None]);
    assert!(held_end.is_empty());
    assert_eq!(rig.arena.used_bytes(), 2 * PAGE as u64, "what is held keeps its memory");
    engine.release();
    assert_eq!(outcomes(&held_end, 1), [None]);
}

#[test]
fn close_lets_go_of_what_is_held() {
    let hold = Fault { kind: IoKind::Read, first: 1, times: u64::MAX, action: FaultAction::Hold };
    let (rig, _engine) = faulty(FaultPlan::default().with(hold));
    let (sender, receiver) = bounded(101);
    for _ in 0..100 {
        rig.submit(read(0, IoPriority::Demand, report(&sender)));
    }
    rig.engine.close();
    assert_eq!(receiver.len(), 100);
    let (_, error) = rig.engine.submit(read(0, IoPriority::Demand, report(&sender))).expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[test]
fn a_refused_request_comes_back_as_it_was() {
    let flip = FaultAction::FlipBit { byte: 0, bit: 0 };
    let always = |kind| Fault { kind, first: 1, times: u64::MAX, action: flip };
    let (rig, engine) = faulty(FaultPlan::default().with(always(IoKind::Write)));
    let wanted = pattern(1, PAGE);
    let (sender, receiver) = bounded(1);
    let buffer = filled(pages(PAGE), &wanted);
    let wrong = IoRequest {
        file: FileId(9),
        ..request(IoKind::Write, 0, Some(buffer), IoPriority::Write, move |completion| {
            sender.send(completion).expect("the test waits");
        })
    };
    let (mut back, error) = rig.engine.submit(wrong).expect_err("an unknown file");
    assert_eq!((error.kind(), engine.seen(IoKind::Write), engine.fired()), (ErrorKind::InvalidInput, 0, 0));
    assert!(back.buffer.as_ref().map(content) == Some(wanted.clone()));
    back.file = FileId(0);
    rig.submit(back);
    let completion = receiver.recv_timeout(PATIENCE).expect("its own completion");
    assert!(completion.result.is_ok() && completion.buffer.as_ref().map(content) == Some(wanted.clone()));
    assert_eq!(differing_bits(&rig.bytes_at(0, PAGE), &wanted), 1, "flipped once, not twice");
}

#[test]
fn a_wait_is_bounded_and_leaves_the_memory_to_the_operation() {
    let (rig, engine) = faulty(FaultPlan::default().fail(IoKind::Read, 1, FaultAction::Hold));
    let slot = rig.slot(2 * PAGE);
    let bound = Duration::from_millis(10);
    let end = transfer_blocking(&*rig.engine, FileId(0), IoKind::Read, 0, slot, bound);
    assert_eq!(end.expect_err("held").kind(), ErrorKind::Timeout);
    assert_eq!(rig.arena.used_bytes(), 2 * PAGE as u64);
    engine.release();
    rig.engine.close();
    assert_eq!(rig.arena.used_bytes(), 0);
}
