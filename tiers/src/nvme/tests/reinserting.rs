//! Records that are used outlive their regions, as what they were: never a wrong byte, never an old version, never at
//! the price of what is new.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::*;

on_both_engines!(
    what_is_used_outlives_its_region_and_the_rest_goes,
    blocks_are_kept_with_their_ancestors_or_not_at_all
);

const HOT_BYTES: usize = 5000;
const COLD_BYTES: usize = 20_000;

/// Gives up the oldest region and keeps what was used.
#[derive(Default)]
struct KeepUsed {
    /// Waits in every question until it may go on, if there is somebody to ask.
    gate: Option<(Sender<()>, Receiver<()>)>,
    resident: Mutex<HashMap<u64, ResidentBlock>>,
}

impl ReclaimPolicy for KeepUsed {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        Oldest.victim(candidates)
    }

    fn may_keep(&self, region: &RegionInfo) -> bool {
        region.used_records > 0
    }

    fn keep(&self, records: &[RecordInfo], _budget_bytes: u64) -> Vec<usize> {
        if let Some((asked, go)) = &self.gate {
            asked.send(()).expect("somebody listens");
            let _ = go.recv();
        }
        (0..records.len()).filter(|at| records[*at].uses > 0).collect()
    }

    fn resident(&self, fingerprint: u64) -> Option<ResidentBlock> {
        self.resident.lock().get(&fingerprint).cloned()
    }
}

/// A place whose policy waits when it is asked what to keep: `asked` says that it was, and it goes on after `go`.
fn gated(regions: u64) -> (Place, Receiver<()>, Sender<()>) {
    let (asking, asked) = unbounded();
    let (go, going) = unbounded();
    let policy = KeepUsed { gate: Some((asking, going)), ..KeepUsed::default() };
    (Place::with_policy(IoChoice::Psync, regions, Arc::new(policy)), asked, go)
}

/// Writes cold objects one after the other; each time a region is about to go it has all the time that it wants.
fn put_slowly(place: &Place, store: &Store, names: std::ops::Range<u64>) {
    for name in names {
        put(place, store, [(name, 1, COLD_BYTES)]);
        while store.stats().free_regions == 0 {
            std::thread::yield_now();
        }
    }
}

/// Writes cold objects until nothing is free, because the region that is about to go waits for the policy; the next name.
fn fill(place: &Place, store: &Store, first: u64) -> u64 {
    let mut name = first;
    while store.stats().free_regions > 0 {
        put(place, store, [(name, 1, COLD_BYTES)]);
        name += 1;
    }
    name
}

fn what_is_used_outlives_its_region_and_the_rest_goes(io: IoChoice) {
    let place = Place::with_policy(io, 6, Arc::new(KeepUsed::default()));
    let (store, _) = place.open();
    put(&place, &store, (0..4).map(|name| (name, 1, HOT_BYTES)));
    put(&place, &store, (100..104).map(|name| (name, 1, HOT_BYTES)));
    for round in 0..30 {
        for name in 0..4 {
            assert_object(&place, &store, name, 1, HOT_BYTES);
        }
        put_slowly(&place, &store, 1000 + round * 10..1006 + round * 10);
    }
    let stats = store.stats();
    assert!(stats.reclaimed_regions > 10 && stats.failed_appends == 0 && stats.bad_reads == 0, "{stats:?}");
    assert!(stats.reinserted_records >= 8 && stats.cut_reinsertions == 0, "{stats:?}");
    assert_eq!(stats.reinserted_bytes, stats.reinserted_records * 3 * 4096);
    // At most a quarter of each region that went.
    assert!(stats.reinserted_bytes <= stats.reclaimed_regions * REGION_BYTES / 4, "{stats:?}");
    assert!((100..104).all(|name| store.locate(&object_id(name)).is_none()), "nobody used them");
    let wiped = place.copy();
    wiped.wipe_index();
    close(store);
    for place in [&place, &wiped] {
        let (store, _) = place.open();
        (0..4).for_each(|name| assert_object(place, &store, name, 1, HOT_BYTES));
    }
}

fn blocks_are_kept_with_their_ancestors_or_not_at_all(io: IoChoice) {
    let place = Place::with_policy(io, 6, Arc::new(KeepUsed::default()));
    let (store, _) = place.open();
    let groups = [GroupGeometry { group: 0, block_bytes: 8192, shards: 1 }];
    let namespace = store.namespace(&NamespaceDescriptor::new().with("model", "m"), &groups).expect("registered");
    let id = |block: u64| RecordId { namespace, group: 0, shard: 0, key: BlockKey::from_name(&block.to_be_bytes()) };
    let mut ends = Ends::new();
    // Block 1 is a root with a child; block 11 has a parent that the store never had.
    for (block, parent) in [(1, None), (2, Some(1)), (11, Some(10)), (20, None)] {
        let mut slot = place.slot(8192);
        slot.payload_mut().copy_from_slice(&content(block, 0, 8192));
        let parent = parent.map_or(BlockKey::ROOT, |parent| id(parent).key);
        let kind = RecordKind::Kv;
        let slot = Some(Arc::new(slot));
        let done = ends.done(block);
        append(&store, Append { id: id(block), kind, parent, depth: 3, slot, payload_bytes: 8192, done });
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    for round in 0..8 {
        store.note_uses([1, 2, 11].map(id));
        put_slowly(&place, &store, 1000 + round * 10..1009 + round * 10);
    }
    assert!(store.stats().reinserted_records >= 2, "{:?}", store.stats());
    for block in [1, 2] {
        let location = store.locate(&id(block)).expect("it was used");
        assert!(read_at(&place, &store, id(block), location).expect("good") == content(block, 0, 8192));
    }
    assert_eq!((store.locate(&id(11)), store.locate(&id(20))), (None, None));
    close(store);
    place.wipe_index();
    let (store, _) = place.open();
    let location = store.locate(&id(2)).expect("there");
    let slot = Arc::new(place.slot(8192));
    let (sender, receiver) = unbounded();
    let done: ReadDone = Box::new(move |result| drop(sender.send(result)));
    store.read(id(2), location, slot, IoPriority::Demand, done).expect("started");
    let verified = receiver.recv_timeout(PATIENCE).expect("ends").expect("good");
    assert_eq!((verified.parent, verified.depth, verified.kind), (id(1).key, 3, RecordKind::Kv));
}

/// The copy of a version must not come behind the version that replaces it, or behind its removal.
#[test]
fn a_copy_never_overtakes_a_newer_version_or_a_removal() {
    // On their way when the copy comes, or durable.
    for is_durable in [false, true] {
        overtake(is_durable);
    }
}

fn overtake(is_durable: bool) {
    let (mut place, asked, go) = gated(4);
    let (store, _) = place.open();
    put(&place, &store, (1..4).map(|name| (name, 1, HOT_BYTES)));
    // Two regions and a half.
    put(&place, &store, (100..124).map(|name| (name, 1, COLD_BYTES)));
    // From here on nothing becomes durable by itself: what is appended next waits behind the copies' own flush.
    close(store);
    (place.config.commit_interval, place.config.commit_bytes) = (Duration::from_secs(3600), 1 << 30);
    let (store, _) = place.open();
    store.note_uses((1..4).map(object_id));
    let mut ends = Ends::new();
    for name in 200..220 {
        append(&store, object(&place, name, 1, COLD_BYTES, ends.done(name)));
        if asked.recv_timeout(Duration::from_millis(50)).is_ok() {
            break;
        }
    }
    append(&store, object(&place, 1, 2, HOT_BYTES, ends.done(1)));
    append(&store, tombstone(object_id(2), ends.done(2)));
    if is_durable {
        store.flush(soon()).expect("flushed");
    }
    go.send(()).expect("it waits");
    drop(go);
    // No flush before the copies have ended: what is newer is still on its way when they come.
    while store.stats().reinserted_records == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    let is_right = |place: &Place, store: &Store| {
        assert_object(place, store, 1, 2, HOT_BYTES);
        assert_eq!(get(place, store, 2), None, "a removed object came back");
        assert_object(place, store, 3, 1, HOT_BYTES);
    };
    assert_eq!(store.stats().reinserted_records, 1, "{:?}", store.stats());
    is_right(&place, &store);
    close(store);
    place.wipe_index();
    let (store, _) = place.open();
    is_right(&place, &store);
}

#[test]
fn a_bad_record_is_not_written_again() {
    let place = Place::with_policy(IoChoice::Psync, 4, Arc::new(KeepUsed::default()));
    let (store, _) = place.open();
    put(&place, &store, (1..5).map(|name| (name, 1, HOT_BYTES)));
    let at = |name: u64| place.offset_of(&store.locate(&object_id(name)).expect("there"));
    // One byte of a payload, one of a header.
    for offset in [at(1) + 4096 + 77, at(2) + 123] {
        let byte = place.bytes_at(offset, 1)[0];
        place.overwrite(offset, &[byte ^ 0x10]);
    }
    store.note_uses((1..5).map(object_id));
    for name in 100..150 {
        put_slowly(&place, &store, name..name + 1);
        store.note_uses((3..5).map(object_id));
    }
    let stats = store.stats();
    assert!(stats.bad_reads == 2 && stats.reinserted_records >= 2, "{stats:?}");
    assert_eq!((get(&place, &store, 1), get(&place, &store, 2)), (None, None));
    close(store);
    place.wipe_index();
    let (store, _) = place.open();
    (3..5).for_each(|name| assert_object(&place, &store, name, 1, HOT_BYTES));
    assert_eq!((get(&place, &store, 1), get(&place, &store, 2)), (None, None));
}

/// A drive that goes while its records are to be written again: they are there when it is.
#[test]
fn what_a_drive_that_is_gone_can_not_read_is_not_to_blame() {
    let (place, asked, go) = gated(4);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    put(&place, &store, (1..4).map(|name| (name, 1, HOT_BYTES)));
    let origin = store.locate(&object_id(1)).expect("there");
    store.note_uses((1..4).map(object_id));
    fill(&place, &store, 100);
    asked.recv_timeout(PATIENCE).expect("the policy is asked");
    let (first, action) = (drive.seen(IoKind::Read) + 1, FaultAction::Errno(libc::ENXIO));
    drive.inject(Fault { kind: IoKind::Read, first, times: u64::MAX, action });
    go.send(()).expect("it waits");
    drop(go);
    let deadline = soon();
    while drive.fired() == 0 || store.poison_reason().is_none() {
        assert!(Instant::now() < deadline, "the store has not noticed: {:?}", store.stats());
        std::thread::yield_now();
    }
    assert_eq!(store.poison_reason(), Some(PoisonReason::DeviceGone));
    assert_eq!((store.stats().bad_reads, store.locate(&object_id(1))), (0, Some(origin)));
    drop((store, drive));
    let (store, _) = place.open();
    (1..4).for_each(|name| assert_object(&place, &store, name, 1, HOT_BYTES));
}

#[test]
fn what_is_new_never_waits_for_what_is_kept() {
    let (place, asked, go) = gated(4);
    let (store, _) = place.open();
    put(&place, &store, (1..4).map(|name| (name, 1, HOT_BYTES)));
    store.note_uses((1..4).map(object_id));
    // Nobody lets the policy go on: the store must do without an answer, again and again.
    fill(&place, &store, 100);
    asked.recv_timeout(PATIENCE).expect("the policy is asked");
    put(&place, &store, (200..260).map(|name| (name, 1, COLD_BYTES)));
    let stats = store.stats();
    assert!(stats.reclaimed_regions >= 5 && stats.failed_appends == 0, "{stats:?}");
    assert_eq!((stats.cut_reinsertions, stats.reinserted_records), (1, 0), "{stats:?}");
    drop(go);
    close(store);
}

/// Until the copies are durable the originals stay.
#[test]
fn a_region_goes_only_when_its_copies_are_durable() {
    let (place, asked, go) = gated(4);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    put(&place, &store, (1..4).map(|name| (name, 1, HOT_BYTES)));
    let origin = store.locate(&object_id(1)).expect("there");
    store.note_uses((1..4).map(object_id));
    let next = fill(&place, &store, 100);
    asked.recv_timeout(PATIENCE).expect("the policy is asked");
    let first = drive.seen(IoKind::Sync) + 1;
    drive.inject(Fault { kind: IoKind::Sync, first, times: 1, action: FaultAction::Hold });
    let written = drive.seen(IoKind::Write);
    go.send(()).expect("it waits");
    while drive.seen(IoKind::Write) < written + 3 || drive.seen(IoKind::Sync) < first {
        std::thread::yield_now();
    }
    // The copies are written and not synced. The originals are there, found and readable.
    assert_eq!((store.stats().reclaimed_regions, store.locate(&object_id(1))), (0, Some(origin)));
    assert_object(&place, &store, 1, 1, HOT_BYTES);
    drive.release();
    while store.stats().reclaimed_regions == 0 {
        std::thread::yield_now();
    }
    assert_eq!(store.stats().reinserted_records, 3);
    assert_ne!(store.locate(&object_id(1)).expect("there").region, origin.region);
    drop(go);
    put(&place, &store, [(next, 1, COLD_BYTES)]);
    (1..4).for_each(|name| assert_object(&place, &store, name, 1, HOT_BYTES));
}

#[test]
fn a_copy_that_fails_costs_only_itself() {
    let (place, asked, go) = gated(4);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    put(&place, &store, (1..4).map(|name| (name, 1, HOT_BYTES)));
    store.note_uses((1..4).map(object_id));
    let next = fill(&place, &store, 100);
    asked.recv_timeout(PATIENCE).expect("the policy is asked");
    let first = drive.seen(IoKind::Write) + 2;
    drive.inject(Fault { kind: IoKind::Write, first, times: 1, action: FaultAction::Errno(5) });
    go.send(()).expect("it waits");
    drop(go);
    while drive.fired() == 0 {
        std::thread::yield_now();
    }
    put(&place, &store, (next..next + 10).map(|name| (name, 1, COLD_BYTES)));
    let stats = store.stats();
    assert!(stats.failed_appends == 0 && stats.reinserted_records < 3, "{stats:?}");
    (next..next + 10).for_each(|name| assert_object(&place, &store, name, 1, COLD_BYTES));
    for name in 1..4 {
        assert!(get(&place, &store, name).is_none_or(|bytes| bytes == content(name, 1, HOT_BYTES)));
    }
}

#[test]
fn a_block_in_memory_is_written_again_without_a_read() {
    let policy = Arc::new(KeepUsed::default());
    let place = Place::with_policy(IoChoice::Psync, 4, Arc::clone(&policy) as Arc<dyn ReclaimPolicy>);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    let groups = [GroupGeometry { group: 0, block_bytes: 8192, shards: 1 }];
    let namespace = store.namespace(&NamespaceDescriptor::new().with("model", "m"), &groups).expect("registered");
    let id = RecordId { namespace, group: 0, shard: 0, key: BlockKey::from_name(b"block") };
    let mut slot = place.slot(8192);
    slot.payload_mut().copy_from_slice(&content(7, 0, 8192));
    let slot = Arc::new(slot);
    let mut ends = Ends::new();
    let (kind, parent, done) = (RecordKind::Kv, BlockKey::ROOT, ends.done(7));
    append(&store, Append { id, kind, parent, depth: 5, slot: Some(Arc::clone(&slot)), payload_bytes: 8192, done });
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    policy.resident.lock().insert(id.fingerprint(), ResidentBlock { id, slot });
    let read = drive.seen(IoKind::Read);
    for name in 100..200 {
        store.note_uses([id]);
        put_slowly(&place, &store, name..name + 1);
    }
    let stats = store.stats();
    assert!(stats.reclaimed_regions > 3 && stats.reinserted_records >= 2, "{stats:?}");
    assert_eq!(drive.seen(IoKind::Read), read, "nothing was read");
    let location = store.locate(&id).expect("there");
    assert!(read_at(&place, &store, id, location).expect("good") == content(7, 0, 8192));
}

/// A store that closes, or crashes, while records are written again.
#[test]
fn a_store_ends_in_the_middle_of_it() {
    for in_order in [true, false] {
        let (place, asked, go) = gated(4);
        let (store, _) = place.open();
        put(&place, &store, (1..4).map(|name| (name, 1, HOT_BYTES)));
        store.note_uses((1..4).map(object_id));
        fill(&place, &store, 100);
        asked.recv_timeout(PATIENCE).expect("the policy is asked");
        let ended = Arc::new(AtomicBool::new(false));
        let ending = std::thread::spawn({
            let ended = Arc::clone(&ended);
            move || {
                if in_order {
                    close(store)
                } else {
                    drop(store)
                }
                ended.store(true, Ordering::Release);
            }
        });
        drop(go);
        ending.join().expect("it ends");
        assert!(ended.load(Ordering::Acquire));
        let (store, _) = place.open();
        (1..4).for_each(|name| assert_object(&place, &store, name, 1, HOT_BYTES));
    }
}

/// Readers never see a used record missing, however often it moves.
#[test]
fn a_record_that_moves_is_found_all_the_time() {
    let place = Place::with_policy(IoChoice::Auto, 6, Arc::new(KeepUsed::default()));
    let (store, _) = place.open();
    put(&place, &store, [(1, 1, HOT_BYTES)]);
    let stop = AtomicBool::new(false);
    let looks = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A read would pin the region, which then does not go.
            while !stop.load(Ordering::Relaxed) {
                assert!(store.locate(&object_id(1)).is_some(), "it was found before");
                store.note_uses([object_id(1)]);
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        for round in 0..20 {
            let before = looks.load(Ordering::Relaxed);
            put_slowly(&place, &store, 1000 + round * 10..1004 + round * 10);
            while looks.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(store.stats().reinserted_records > 0, "{:?}", store.stats());
    assert_object(&place, &store, 1, 1, HOT_BYTES);
}

#[test]
fn at_most_a_share_of_a_region_is_written_again() {
    let place = Place::with_policy(IoChoice::Psync, 4, Arc::new(KeepUsed::default()));
    let (store, _) = place.open();
    put(&place, &store, (1..16).map(|name| (name, 1, HOT_BYTES)));
    store.note_uses((1..16).map(object_id));
    let mut name = 100;
    while store.stats().reclaimed_regions == 0 {
        put_slowly(&place, &store, name..name + 1);
        name += 1;
    }
    // Five records of three pages are the most that fit in a quarter of 64 pages; the first of the log, as was said.
    assert_eq!((store.stats().reinserted_records, store.stats().cut_reinsertions), (5, 0), "{:?}", store.stats());
    let there: Vec<u64> = (1..16).filter(|name| store.locate(&object_id(*name)).is_some()).collect();
    assert_eq!(there, [1, 2, 3, 4, 5]);
}

/// What is stored encoded is copied as it is stored, also if it lies in memory: written from there it would be larger.
#[test]
fn an_encoded_block_stays_encoded() {
    const BYTES: usize = 64 << 10;
    let policy = Arc::new(KeepUsed::default());
    let place = Place::with_policy(IoChoice::Psync, 4, Arc::clone(&policy) as Arc<dyn ReclaimPolicy>);
    let (store, _) = place.open();
    let groups = [GroupGeometry { group: 0, block_bytes: BYTES as u64, shards: 1 }];
    let descriptor = NamespaceDescriptor::new().with(crate::codec::CodecHint::FIELD, "bf16");
    let namespace = store.namespace(&descriptor, &groups).expect("registered");
    let id = RecordId { namespace, group: 0, shard: 0, key: BlockKey::from_name(b"block") };
    let bytes: Vec<u8> = (0..BYTES).map(|at| [at as u8 / 64, 0x3f][at % 2]).collect();
    let mut slot = place.slot(BYTES);
    slot.payload_mut().copy_from_slice(&bytes);
    let slot = Arc::new(slot);
    let mut ends = Ends::new();
    let (kind, parent, done) = (RecordKind::Kv, BlockKey::ROOT, ends.done(7));
    let payload_bytes = BYTES as u64;
    append(&store, Append { id, kind, parent, depth: 5, slot: Some(Arc::clone(&slot)), payload_bytes, done });
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    let origin = store.locate(&id).expect("there");
    assert!(origin.pages < 15, "{origin:?} is not encoded");
    policy.resident.lock().insert(id.fingerprint(), ResidentBlock { id, slot });
    for name in 100..200 {
        store.note_uses([id]);
        put_slowly(&place, &store, name..name + 1);
    }
    let location = store.locate(&id).expect("it was used");
    assert!(store.stats().reinserted_records >= 2, "{:?}", store.stats());
    assert_eq!(location.pages, origin.pages);
    let slot = Arc::new(place.slot(BYTES));
    let (sender, receiver) = unbounded();
    let done: ReadDone = Box::new(move |result| drop(sender.send(result)));
    store.read(id, location, Arc::clone(&slot), IoPriority::Demand, done).expect("started");
    receiver.recv_timeout(PATIENCE).expect("ends").expect("good");
    assert!(slot.payload()[..BYTES] == bytes);
}
