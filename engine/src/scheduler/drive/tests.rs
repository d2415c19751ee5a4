use super::*;
use crate::policy::PolicyChoice;
use crate::replay::{ReplayTier, Synthetic, replay};
use pegaflow_tiers::{BlockKey, NamespaceHandle};
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn policy(blocks: u64) -> (DrivePolicy, Arc<AtomicU64>) {
    let now_ms = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&now_ms);
    (DrivePolicy::new(blocks, Box::new(move || clock.load(Ordering::Relaxed))), now_ms)
}

fn place() -> RecordId {
    RecordId { namespace: NamespaceHandle(0), group: 0, shard: 0, key: BlockKey::ROOT }
}

fn asked(prefixes: Vec<u64>) -> Asked {
    Asked { session: crate::api::SessionId(1), tag: 0, place: place(), shards: 1, slot_bytes: 1, prefixes }
}

fn block(key: u64) -> PolicyBlock {
    PolicyBlock { key, bytes: 1 }
}

/// Requests, and then offers of what the store does not have, ancestors first, as saves make them. Returns blocks written
/// and references served, with a store that keeps what the policy would keep.
#[test]
fn it_writes_what_a_replay_writes() {
    let trace = Synthetic::Rag.trace(1);
    for capacity in [1000, 5000] {
        let (drive, now_ms) = policy(capacity);
        let (mut hits, mut writes) = (0u64, 0u64);
        for request in trace.requests() {
            now_ms.store(request.now_ms, Ordering::Relaxed);
            let keys: Vec<u64> = request.blocks.iter().map(|block| place().fingerprint_of(block.key)).collect();
            let here = |key: u64| drive.worth(&block(key)).is_some();
            hits += keys.iter().take_while(|key| here(**key)).count() as u64;
            let stored: HashSet<u64> = keys.iter().copied().filter(|key| here(*key)).collect();
            drive.request(
                &asked(request.blocks.iter().map(|block| block.key).collect()),
                &RecordId::fingerprint_of,
                &|key| Some(stored.contains(&key)),
            );
            let mut parent = None;
            for key in keys {
                let has_parent = parent.is_none_or(here);
                if !here(key) && drive.judge(&block(key), parent, has_parent).is_ok() {
                    drive.accept(&block(key), parent);
                    writes += 1;
                }
                parent = Some(key);
            }
            assert!(drive.state.lock().policy.len() as u64 <= capacity);
        }
        let of = |policy| {
            let config = PegaflowConfig { write_hurdle: WRITE_HURDLE, ..PegaflowConfig::default() };
            let outcome = replay(&trace, &[ReplayTier { policy, capacity, config }], &mut |_| {});
            (outcome.tiers[0].hits, outcome.tiers[0].writes)
        };
        let (replayed, lru) = (of(PolicyChoice::Pegaflow), of(PolicyChoice::Lru));
        println!("{capacity}: {hits} hits, {writes} writes; replayed {replayed:?}, lru {lru:?}");
        assert!(hits as f64 > 0.99 * replayed.0 as f64, "{hits} hits, replayed {replayed:?}");
        assert!((writes as f64) < 1.02 * replayed.1 as f64, "{writes} writes, replayed {replayed:?}");
        assert!(writes < lru.1 && hits > lru.0, "{hits} hits and {writes} writes, lru {lru:?}");
    }
}

#[test]
fn what_the_store_has_lost_or_has_from_before_is_brought_in_line_by_requests() {
    let (drive, _) = policy(100);
    let on_drive = RefCell::new(HashSet::from([1, 2, 3].map(|key| place().fingerprint_of(key))));
    let is_stored = |key: u64| Some(on_drive.borrow().contains(&key));
    drive.request(&asked(vec![1, 2, 3, 4]), &RecordId::fingerprint_of, &is_stored);
    let kept = |key: u64| drive.worth(&block(place().fingerprint_of(key))).is_some();
    assert_eq!([1, 2, 3, 4, 5].map(kept), [true, true, true, false, false], "found on the drive");
    on_drive.borrow_mut().remove(&place().fingerprint_of(3));
    drive.request(&asked(vec![1, 2, 3, 4]), &RecordId::fingerprint_of, &is_stored);
    assert_eq!([1, 2, 3].map(kept), [true, true, false], "lost with its region");
    drive.request(&asked(vec![1, 2, 3, 4]), &RecordId::fingerprint_of, &|_| None);
    assert_eq!([1, 2, 3].map(kept), [true, true, false], "nothing is known while the table is filled");
}

#[test]
fn a_store_with_room_takes_all_and_a_full_one_no_orphans() {
    let (drive, now_ms) = policy(10);
    for key in 1..=10 {
        assert!(drive.judge(&block(key), Some(99), false).is_ok(), "there is room");
        drive.accept(&block(key), None);
    }
    assert_eq!(drive.judge(&block(20), Some(99), false), Err(Refusal::Ancestor));
    // All of one moment are alike: who comes is written.
    assert!(drive.judge(&block(21), None, true).is_ok());
    now_ms.store(3_600_000, Ordering::Relaxed);
    assert!(drive.judge(&block(22), None, true).is_ok(), "least recently used, without having learned anything");
    // Its parent is on the drive, though the policy has let it go.
    assert!(drive.judge(&block(23), Some(77), true).is_ok());
    drive.accept(&block(23), Some(77));
    assert!(drive.state.lock().policy.len() <= 10);
    drive.lose(23);
    assert_eq!(drive.worth(&block(23)), None);
    // More blocks than it follows: everything is worth a write.
    let (large, _) = policy(BLOCKS_MAX as u64 + 1);
    assert!((0..100).all(|key| large.judge(&block(key), Some(5000), false).is_ok()));
}
