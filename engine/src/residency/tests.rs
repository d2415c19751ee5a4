use std::time::Duration;

use super::*;
use crate::policy::{PegaflowConfig, PolicyChoice, SplitMix};
use pegaflow_tiers::{ArenaConfig, KeyChain, NamespaceHandle};

const BLOCK: usize = 60 * 1024;

fn policies(choice: PolicyChoice) -> SizePolicies {
    SizePolicies::new(choice, PegaflowConfig::default(), 4 << 20, Box::new(|| 0))
}

fn residency_of(choice: PolicyChoice) -> Residency {
    let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(4 << 20) }).expect("memory");
    Residency::new(arena, policies(choice))
}

fn residency() -> Residency {
    residency_of(PolicyChoice::Pegaflow)
}

fn chain(residency: &Residency, first: u32, length: u32, payload: usize, dirty: bool) -> Vec<RecordId> {
    let mut keys = KeyChain::new();
    let mut ids = Vec::new();
    for depth in 0..length {
        let parent = keys.parent();
        let key = keys.next(&[first, depth], b"");
        let id = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key };
        let Some(slot) = residency.alloc(payload) else { break };
        drop(residency.insert(Resident::new(id, (parent, depth), Arc::new(slot), payload as u64, dirty), false));
        ids.push(id);
    }
    ids
}

#[test]
fn leaves_leave_before_their_ancestors() {
    for policy in PolicyChoice::ALL {
        let residency = residency_of(policy);
        let ids = chain(&residency, 1, 64, BLOCK, false);
        assert_eq!(ids.len(), 64);
        residency.touch_chain(ids.iter().map(|id| (id, BLOCK + 4096)));
        drop(chain(&residency, 2, 16, BLOCK, false));
        let here: Vec<bool> = ids.iter().map(|id| residency.contains(id)).collect();
        let kept = here.iter().take_while(|here| **here).count();
        assert!(kept > 0 && here[kept..].iter().all(|here| !here), "{policy}: a hole in the chain: {here:?}");
    }
}

#[test]
fn dirty_and_held_blocks_stay() {
    PolicyChoice::ALL.into_iter().for_each(dirty_and_held_blocks_stay_with);
}

fn dirty_and_held_blocks_stay_with(policy: PolicyChoice) {
    let residency = residency_of(policy);
    let dirty = chain(&residency, 1, 32, BLOCK, true);
    let clean = chain(&residency, 2, 32, BLOCK, false);
    residency.touch_chain(dirty.iter().chain(&clean).map(|id| (id, BLOCK + 4096)));
    let held: Vec<_> = clean.iter().filter_map(|id| residency.get(id)).collect();
    assert!(residency.alloc(BLOCK).is_none());
    drop(held);
    assert!(residency.alloc(BLOCK).is_some());
    assert!(dirty.iter().all(|id| residency.contains(id)));
    dirty.iter().filter_map(|id| residency.get(id)).for_each(|block| residency.mark_clean(&block));
    assert_eq!(residency.gauges().1, 0);
}

#[test]
fn another_size_gets_room_from_the_coldest_chunk() {
    let residency = residency();
    let small = chain(&residency, 1, 64, BLOCK, false);
    assert_eq!(small.len(), 64);
    let large = chain(&residency, 2, 1, 1 << 20, false);
    assert_eq!(large.len(), 1);
    assert!(small.iter().filter(|id| residency.contains(id)).count() >= 32);
}

#[test]
fn saves_leave_room_for_loads() {
    let residency = residency();
    let mut accepted = 0;
    while let Some(slot) = residency.alloc_dirty(BLOCK) {
        let key = BlockKey::from_name(&[accepted]);
        let id = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key };
        residency.insert(Resident::new(id, (BlockKey::ROOT, 0), Arc::new(slot), 1, true), false);
        accepted += 1;
    }
    assert!((40..64).contains(&accepted), "{accepted}");
    assert!(residency.alloc(BLOCK).is_some());
}

#[test]
fn who_waits_for_room_is_woken_by_a_change_also_just_before() {
    let residency = Arc::new(residency());
    let held: Vec<Slot> = std::iter::from_fn(|| residency.alloc(BLOCK)).collect();
    let seen = residency.room.changes();
    residency.notify_room();
    let patience = Duration::from_secs(30);
    assert!(residency.room.wait(seen, Instant::now() + patience), "a change before the wait is not lost");
    assert!(!residency.room.wait(seen + 1, Instant::now()), "there was no other");
    let waiting = std::thread::spawn({
        let residency = Arc::clone(&residency);
        move || residency.alloc_until(BLOCK, false, Instant::now() + patience).is_some()
    });
    drop(held);
    residency.notify_room();
    assert!(waiting.join().expect("no panic"));
}

#[test]
fn a_growing_arena_wakes_who_waits_for_room_and_raises_the_limit_of_dirty_bytes() {
    let arena = Arena::new(ArenaConfig { window_bytes: 2 << 20, ..ArenaConfig::new(512 << 20) }).expect("memory");
    let residency = Residency::new(Arc::clone(&arena), policies(PolicyChoice::Pegaflow));
    // More than half of the arena: there is room only when it has grown, and nobody else makes any.
    let wanted = 300 << 20;
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(residency.alloc_until(wanted, true, deadline).is_some());
    assert!(Instant::now() < deadline, "found at the last look, not woken");
    assert!(arena.ready_bytes() >= 400 << 20, "{} bytes of DRAM are too few", arena.ready_bytes());
}

#[test]
fn a_removal_hides_until_it_ends_and_a_newer_insert_wins() {
    let residency = residency();
    let id = chain(&residency, 1, 1, BLOCK, false)[0];
    let (taken, removal) = residency.remove(&id);
    assert!(taken.is_some() && residency.is_removed(&id));
    chain(&residency, 1, 1, BLOCK, false);
    assert!(!residency.is_removed(&id));
    let (_, newer) = residency.remove(&id);
    residency.end_removal(&id, removal);
    assert!(residency.is_removed(&id));
    residency.end_removal(&id, newer);
    assert!(!residency.is_removed(&id));
}

/// Blocks come, become clean, are asked for, held, refused and removed at random, in two sizes, with objects between them.
#[test]
fn whoever_may_not_leave_stays_and_the_policies_know_who_is_here() {
    for policy in PolicyChoice::ALL {
        for seed in 1..6 {
            println!("{policy}, seed {seed}");
            churn(policy, seed);
        }
    }
}

fn churn(policy: PolicyChoice, seed: u64) {
    let mut random = SplitMix::new(seed);
    let residency = residency_of(policy);
    let sizes = [BLOCK, 2 * BLOCK + 4096];
    let (mut held, mut dirty): (Vec<Arc<Resident>>, Vec<Arc<Resident>>) = (Vec::new(), Vec::new());
    for _ in 0..1500 {
        let number = random.below(24) as u32;
        let payload = sizes[number as usize % 2];
        let is_dirty = random.below(3) == 0;
        let ids = match random.below(10) {
            0 => object(&residency, number, payload, is_dirty),
            _ => chain(&residency, number, 1 + random.below(8) as u32, payload, is_dirty),
        };
        let prefixes: Vec<u64> = ids.iter().map(|id| id.key.prefix()).collect();
        if let Some(place) = ids.first().copied() {
            let (session, slot_bytes) = (crate::api::SessionId(1), Arena::slot_bytes(payload));
            residency.request(&Asked { session, tag: 0, place, shards: 1, slot_bytes, prefixes });
        }
        residency.touch_chain(ids.iter().map(|id| (id, Arena::slot_bytes(payload))));
        let here: Vec<_> = ids.iter().filter_map(|id| residency.get(id)).collect();
        dirty.extend(here.iter().filter(|block| block.is_dirty()).cloned());
        if random.below(4) == 0 {
            held.extend(here.first().cloned());
            // As a refused block that is written after all.
            here.last().into_iter().for_each(|block| residency.mark_dirty(block));
            dirty.extend(here.last().cloned());
        }
        while dirty.len() > 12 {
            residency.mark_clean(&dirty.swap_remove(random.below(dirty.len())));
        }
        if random.below(6) == 0 {
            held.truncate(random.below(8));
        }
        for block in held.iter().chain(&dirty).filter(|block| block.id.namespace != NamespaceHandle(0)) {
            assert!(residency.get(&block.id).is_some_and(|here| Arc::ptr_eq(&here, block)), "{:?} has left", block.id);
        }
    }
    drop(held);
    dirty.drain(..).for_each(|block| residency.mark_clean(&block));
    let ids = residency.ids();
    let blocks: Vec<_> = ids.iter().filter_map(|id| residency.get(id)).collect();
    residency.touch_chain(blocks.iter().map(|block| (&block.id, block.slot.bytes())));
    drop(blocks);
    let mut policies = residency.policies.lock();
    while residency.enter(&mut policies) {}
    let known = |id: &RecordId| {
        sizes.iter().any(|size| policies.contains(Arena::slot_bytes(*size), id.fingerprint(), id.namespace.0.into()))
    };
    assert!(ids.iter().all(known), "somebody here is not known");
    assert_eq!(policies.len(), ids.len(), "somebody is known who is not here");
    let mut state = residency.state.lock();
    let mut left = 0;
    for size in sizes {
        while let Some(block) = state.take_least(Arena::slot_bytes(size), &mut policies) {
            assert_eq!(block.children.load(Ordering::Relaxed), 0, "an ancestor before its descendants");
            left += 1;
        }
    }
    assert!(state.blocks.is_empty() && left == ids.len(), "all of them may leave");
}

fn object(residency: &Residency, number: u32, payload: usize, dirty: bool) -> Vec<RecordId> {
    let id =
        RecordId { namespace: NamespaceHandle(0), group: 0, shard: 0, key: BlockKey::from_name(&number.to_le_bytes()) };
    let Some(slot) = residency.alloc(payload) else { return Vec::new() };
    let block = Resident::new(id, (BlockKey::ROOT, 0), Arc::new(slot), payload as u64, dirty);
    drop(residency.insert(Arc::clone(&block), true));
    vec![id]
}

#[test]
fn dirty_blocks_are_not_searched_and_whom_no_policy_knows_leaves_when_it_is_the_oldest() {
    let entered = |residency: &Residency| {
        let mut policies = residency.policies.lock();
        while residency.enter(&mut policies) {}
        policies.len()
    };
    let ours = residency();
    let ids = chain(&ours, 1, 8, BLOCK, true);
    assert_eq!(entered(&ours), 0);
    ids.iter().take(3).filter_map(|id| ours.get(id)).for_each(|block| ours.mark_clean(&block));
    // One of them is to be written once more before it is told of.
    ours.get(&ids[1]).into_iter().for_each(|block| ours.mark_dirty(&block));
    assert_eq!(entered(&ours), 2);

    let lru = residency_of(PolicyChoice::Lru);
    let unknown = chain(&lru, 1, 1, BLOCK, false);
    let known = chain(&lru, 2, 63, BLOCK, false);
    lru.touch_chain(known.iter().map(|id| (id, BLOCK + 4096)));
    assert_eq!(entered(&lru), 63);
    assert!(lru.alloc(BLOCK).is_some());
    assert!(!lru.contains(&unknown[0]) && known.iter().all(|id| lru.contains(id)));
}
