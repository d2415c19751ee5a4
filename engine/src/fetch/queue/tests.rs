use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pegaflow_tiers::{BlockKey, NamespaceHandle};

use super::*;
use crate::api::SessionId;

const REQUEST: fn(u64) -> FetchReason = |tag| FetchReason::Request { session: SessionId(1), tag };

fn id(number: u32) -> RecordId {
    let key = BlockKey::from_name(&number.to_le_bytes());
    RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key }
}

fn wish(reason: FetchReason, numbers: std::ops::Range<u32>, deadline: Instant) -> FetchWish {
    let location = |page| Location { region: 0, generation: 1, page, pages: 2 };
    FetchWish {
        store: Weak::new(),
        reads: numbers.map(|number| (id(number), location(number))).collect(),
        block_bytes: 4096,
        reason,
        asked: 0,
        asked_at: None,
        deadline,
        done: None,
    }
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn next(queue: &mut Queue) -> Option<Started> {
    queue.next(0, 0, Instant::now())
}

fn pages(queue: &mut Queue) -> Vec<u32> {
    std::iter::from_fn(|| next(queue)).map(|started| started.location.page).collect()
}

#[test]
fn looks_go_before_requests_before_the_hot_set() {
    let mut queue = Queue::default();
    let wishes =
        [(FetchReason::HotSet, 0..3), (REQUEST(1), 10..12), (REQUEST(2), 20..22), (FetchReason::LookAside, 30..31)];
    for (reason, numbers) in wishes {
        assert!(queue.push(wish(reason, numbers, later())).is_ok());
    }
    // The hot set has begun when a request comes.
    assert_eq!(next(&mut queue).map(|started| started.location.page), Some(30));
    assert_eq!(next(&mut queue).map(|started| started.location.page), Some(10));
    assert!(queue.push(wish(REQUEST(3), 40..42, later())).is_ok());
    assert_eq!(pages(&mut queue), [11, 20, 21, 40, 41, 0, 1, 2]);
}

#[test]
fn the_queue_is_bounded_in_wishes_and_blocks_and_takes_one_look() {
    let mut queue = Queue::default();
    let fits = |queue: &mut Queue, reason, numbers| queue.push(wish(reason, numbers, later())).is_ok();
    assert!(fits(&mut queue, FetchReason::LookAside, 0..1));
    assert!(!fits(&mut queue, FetchReason::LookAside, 1..2), "one look at a time");
    let started = next(&mut queue).expect("a block");
    assert!(queue.ended(&started, true, true, 0).is_some());
    assert!(fits(&mut queue, FetchReason::LookAside, 1..2));
    for tag in 1..WISHES_MAX as u64 {
        assert!(fits(&mut queue, REQUEST(tag), 2..3));
    }
    assert!(!fits(&mut queue, FetchReason::HotSet, 2..3), "too many wishes");
    assert_eq!(queue.remove(|_| true).len(), WISHES_MAX);
    let most = BLOCKS_MAX as u32;
    assert!(fits(&mut queue, REQUEST(1), 0..most - 1) && fits(&mut queue, REQUEST(2), 0..1));
    assert!(!fits(&mut queue, REQUEST(3), 0..1), "too many blocks");
    assert_eq!(
        queue.remove(|reason| reason == REQUEST(1)).first().map(Removed::left_blocks),
        Some(most.into()).map(|n: u64| n - 1)
    );
    assert!(fits(&mut queue, REQUEST(3), 0..1));
}

#[test]
fn reads_in_flight_are_bounded_but_one_always_goes() {
    let mut queue = Queue::default();
    assert!(queue.push(wish(FetchReason::HotSet, 0..9, later())).is_ok());
    assert!(queue.has_room(0, 0, 0));
    let first = next(&mut queue).expect("a block");
    assert!(!queue.has_room(1, u64::MAX, u64::MAX) && !queue.has_room(9, 8192, u64::MAX));
    assert!(!queue.has_room(9, u64::MAX, 4096) && queue.has_room(2, 8193, 4097));
    queue.ended(&first, true, true, 0);
    assert!(queue.has_room(0, 0, 0));
}

#[test]
fn a_removed_wish_gives_no_more_blocks_and_its_reads_end() {
    let mut queue = Queue::default();
    assert!(queue.push(wish(REQUEST(1), 0..5, later())).is_ok());
    assert!(queue.push(wish(REQUEST(2), 10..11, later())).is_ok());
    let started = next(&mut queue).expect("a block");
    assert_eq!(queue.left_bytes(REQUEST(1)), Some(5 * 8192));
    assert_eq!(queue.left_bytes(REQUEST(2)), Some(6 * 8192));
    let removed = queue.remove(|reason| reason == REQUEST(1));
    assert_eq!(removed.iter().map(Removed::left_blocks).collect::<Vec<_>>(), [4]);
    assert_eq!(queue.left_bytes(REQUEST(1)), None);
    assert!(queue.reading().contains(&started.id));
    assert!(queue.ended(&started, true, true, 0).is_none());
    assert!(queue.reading().is_empty());
    assert_eq!(pages(&mut queue), [10]);
}

#[test]
fn who_is_late_goes_and_is_told() {
    let told = Arc::new(AtomicU64::new(0));
    let mut queue = Queue::default();
    let now = Instant::now();
    for (tag, seconds) in [(1, 5), (2, 3), (3, 9)] {
        let counted = Arc::clone(&told);
        let mut wish = wish(REQUEST(tag), 0..2, now + Duration::from_secs(seconds));
        wish.done = Some(Box::new(move |end| {
            assert!(!end.is_whole);
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        assert!(queue.push(wish).is_ok());
    }
    assert_eq!(queue.next_deadline(), Some(now + Duration::from_secs(3)));
    assert!(queue.remove_late(now + Duration::from_secs(2)).is_empty());
    let late = queue.remove_late(now + Duration::from_secs(5));
    assert_eq!((late.len(), told.load(Ordering::Relaxed)), (2, 0));
    drop(late);
    assert_eq!(told.load(Ordering::Relaxed), 2);
    assert_eq!(queue.next_deadline(), Some(now + Duration::from_secs(9)));
}

#[test]
fn a_wish_ends_with_its_last_read_and_says_what_became_of_it() {
    let mut queue = Queue::default();
    assert!(queue.push(wish(REQUEST(1), 0..4, later())).is_ok());
    let reads: Vec<Started> = (0..3).filter_map(|_| queue.next(0, 100, Instant::now())).collect();
    assert!(queue.ended(&reads[0], true, true, 0).is_none());
    assert!(queue.ended(&reads[1], false, true, 0).is_none(), "was there already");
    assert_eq!(queue.cut(&reads[2]), 1);
    let (_, end) = queue.ended(&reads[2], false, false, 130).expect("the last");
    assert_eq!((end.blocks, end.bytes, end.is_whole, end.beside_bytes), (1, 8192, false, 30));
    assert!(next(&mut queue).is_none() && queue.next_deadline().is_none());
}

#[test]
fn a_block_is_read_once_for_two_wishes() {
    let mut queue = Queue::default();
    assert!(queue.push(wish(REQUEST(1), 0..1, later())).is_ok());
    assert!(queue.push(wish(REQUEST(2), 0..1, later())).is_ok());
    let first = next(&mut queue).expect("a block");
    let second = next(&mut queue).expect("a block");
    assert!(!first.is_double && second.is_double);
    assert!(queue.ended(&second, false, true, 0).is_some());
    assert!(queue.reading().contains(&first.id), "it is still read for the first");
}

#[test]
fn a_held_up_wish_lets_others_pass_until_the_policies_know_its_request() {
    let mut queue = Queue::default();
    let mut held = wish(REQUEST(1), 0..2, later());
    held.asked = 5;
    assert!(queue.push(held).is_ok());
    assert!(queue.push(wish(REQUEST(2), 10..11, later())).is_ok());
    let started = queue.next(4, 0, Instant::now()).expect("a block");
    queue.hold_up(&started);
    assert!(queue.is_held_up() && queue.reading().is_empty());
    assert_eq!(queue.next(4, 0, Instant::now()).map(|started| started.location.page), Some(10));
    assert!(queue.next(4, 0, Instant::now()).is_none());
    assert_eq!(queue.next(5, 0, Instant::now()).map(|started| started.location.page), Some(0));
    assert!(!queue.is_held_up());
}
