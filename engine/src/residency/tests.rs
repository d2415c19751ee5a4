use super::*;
use crate::choice::BlockChoice;
use crate::pins::PinInfo;
use crate::policy::{BlockMemory, PegaflowConfig, PolicyChoice, SplitMix};
use pegaflow_tiers::{ArenaConfig, ErrorKind, KeyChain, NamespaceHandle};

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

/// Pins the chain that has this block.
fn pin(residency: &Residency, block: &RecordId, until: Option<Instant>) -> Result<PinInfo, ErrorKind> {
    let prefix = block.key.to_string().parse().expect("digits");
    let meant = residency.meant([block.namespace].into(), (Some(&prefix), true), None);
    meant.and_then(|meant| residency.pin(&meant, BlockChoice::default(), until)).map_err(|error| error.kind())
}

/// A policy looks at a thousand blocks for one that may leave; those that are pinned and that nobody uses are more.
#[test]
fn many_pinned_blocks_are_in_the_way_of_nobody_who_needs_room() {
    for policy in PolicyChoice::ALL {
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(32 << 20) }).expect("memory");
        let residency = Residency::new(arena, policies(policy));
        let cold: Vec<_> = (0..24).flat_map(|first| chain(&residency, first, 64, 4096, false)).collect();
        residency.touch_chain(cold.iter().map(|id| (id, Arena::slot_bytes(4096))));
        assert_eq!(cold.len(), 24 * 64, "more than a search looks at");
        while residency.enter(&mut residency.policies.lock()) {}
        let meant = residency.meant([NamespaceHandle(1)].into(), (None, false), None).expect("all");
        let pin = residency.pin(&meant, BlockChoice::default(), None).expect("less than half");
        assert_eq!((pin.blocks, residency.pinned().blocks), (cold.len() as u64, cold.len() as u64));
        // A use does not bring them back into the order.
        residency.touch_chain(cold.iter().map(|id| (id, Arena::slot_bytes(4096))));
        while residency.enter(&mut residency.policies.lock()) {}
        assert_eq!(residency.policies.lock().len(), 0, "{policy}: a policy knows a pinned block");
        assert!(residency.state.lock().order.is_empty(), "{policy}: a pinned block is in the order");
        for first in 100..200 {
            let ids = chain(&residency, first, 64, 4096, false);
            assert_eq!(ids.len(), 64, "{policy}: no room");
            residency.touch_chain(ids.iter().map(|id| (id, Arena::slot_bytes(4096))));
        }
        assert!(cold.iter().all(|id| residency.contains(id)), "{policy}: a pinned block has left");
        residency.unpin(|_, _| true);
        for first in 200..300 {
            chain(&residency, first, 64, 4096, false);
        }
        assert!(!cold.iter().all(|id| residency.contains(id)), "{policy}: they stay though nobody pins them");
    }
}

#[test]
fn saves_leave_room_for_loads_beside_pinned_blocks() {
    let residency = residency();
    chain(&residency, 1, 30, BLOCK, false);
    let meant = residency.meant([NamespaceHandle(1)].into(), (None, false), None).expect("all");
    assert_eq!(residency.pin(&meant, BlockChoice::default(), None).expect("less than half").blocks, 30);
    let mut accepted = 0;
    while let Some(slot) = residency.alloc_dirty(BLOCK) {
        let key = BlockKey::from_name(&[accepted]);
        let id = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key };
        residency.insert(Resident::new(id, (BlockKey::ROOT, 0), Arc::new(slot), 1, true), false);
        accepted += 1;
    }
    assert!((20..34).contains(&accepted), "{accepted}");
    assert!(residency.alloc(BLOCK).is_some());
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
    let mut pinned: Vec<(u64, RecordId)> = Vec::new();
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
        if random.below(8) == 0 && pinned.len() < 4 {
            let last = ids.last().filter(|id| id.namespace != NamespaceHandle(0) && residency.contains(id));
            let pin = last.map(|id| (pin(&residency, id, None), *id));
            // More than half of DRAM is refused.
            pinned.extend(pin.and_then(|(pin, id)| Some((pin.ok()?.number, id))));
        }
        if random.below(24) == 0 && !pinned.is_empty() {
            let (number, _) = pinned.swap_remove(random.below(pinned.len()));
            assert_eq!(residency.unpin(|of, _| of == number).pins, 1);
        }
        assert!(pinned.iter().all(|(_, id)| residency.contains(id)), "a pinned block has left");
        for block in held.iter().chain(&dirty).filter(|block| block.id.namespace != NamespaceHandle(0)) {
            assert!(residency.get(&block.id).is_some_and(|here| Arc::ptr_eq(&here, block)), "{:?} has left", block.id);
        }
    }
    drop(held);
    residency.unpin(|_, _| true);
    assert_eq!(residency.pinned(), PinTotals::default());
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

/// By our policy's measure: who was asked for a minute ago makes room for what is asked for at this moment, not the other way
/// round, and what was fetched stays until it was used.
#[test]
fn a_fetched_block_takes_the_place_of_one_that_is_worth_less() {
    let now_ms = Arc::new(std::sync::atomic::AtomicU64::new(1));
    let clock = Arc::clone(&now_ms);
    let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(4 << 20) }).expect("memory");
    let clock: crate::scheduler::Clock = Box::new(move || clock.load(Ordering::Relaxed));
    let policies = SizePolicies::new(PolicyChoice::Pegaflow, PegaflowConfig::default(), 4 << 20, clock);
    let residency = Residency::new(arena, policies);
    let slot_bytes = Arena::slot_bytes(BLOCK);
    let ask = |ids: &[RecordId], seconds: u64| {
        now_ms.store(seconds * 1000, Ordering::Relaxed);
        let prefixes = ids.iter().map(|id| id.key.prefix()).collect();
        let session = crate::api::SessionId(1);
        residency.request(&Asked { session, tag: 0, place: ids[0], shards: 1, slot_bytes, prefixes });
    };
    let of_keys = |first: u32, length: u32| -> Vec<RecordId> {
        let mut keys = KeyChain::new();
        let place = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::ROOT };
        (0..length).map(|depth| place.with_key(keys.next(&[first, depth], b""))).collect()
    };
    let fetch = |ids: &[RecordId], at: usize| {
        let slot = residency.alloc_colder(BLOCK, &ids[at], None)?;
        let parent = at.checked_sub(1).map_or(BlockKey::ROOT, |before| ids[before].key);
        let block = Resident::new(ids[at], (parent, at as u32), Arc::new(slot), BLOCK as u64, false);
        block.mark_fetched(FetchReason::REQUEST);
        drop(residency.insert(block, false));
        Some(())
    };
    let here = chain(&residency, 1, 64, BLOCK, false);
    let (asked, newer) = (of_keys(2, 80), of_keys(3, 4));
    assert!(fetch(&asked, 0).is_none(), "nobody knows what it is worth");
    ask(&asked, 60);
    ask(&here, 120);
    assert!(fetch(&asked, 0).is_none(), "those that are here were asked for since");
    assert_eq!(residency.gauges(), (64, 0, Evicted::default()));
    ask(&asked, 240);
    let fetched = (0..80).take_while(|at| fetch(&asked, *at).is_some()).count();
    assert_eq!(fetched, 64, "all of the older ones, and none of its own");
    assert!(here.iter().all(|id| !residency.contains(id)));
    ask(&newer, 480);
    assert!(fetch(&newer, 0).is_none(), "what was fetched stays");
    let last = residency.get(&asked[63]);
    residency.note_loaded(last.iter());
    drop(last);
    assert!(fetch(&newer, 0).is_some() && !residency.contains(&asked[63]), "until it was used");
    // Not so what has come back from an earlier run: nobody is known to wait for it.
    residency.get(&asked[62]).expect("here").mark_fetched(FetchReason::HotSet);
    assert!(fetch(&newer, 1).is_some() && !residency.contains(&asked[62]));
    let [_, request, _] = &*residency.fetched;
    assert_eq!((request.used_blocks.get(), request.wasted_blocks.get()), (1, 0));
    // Somebody waits for it: that is a use in a minute, which is more than anything here is worth after an hour.
    let unknown = of_keys(4, 1);
    let all: Vec<_> = residency.ids().iter().filter_map(|id| residency.get(id)).collect();
    assert_eq!(all.iter().filter(|block| block.take_fetched().is_some()).count(), 64);
    drop(all);
    ask(&newer, 4000);
    assert!(residency.alloc_colder(BLOCK, &unknown[0], None).is_none());
    assert!(residency.alloc_colder(BLOCK, &unknown[0], Some(0)).is_some());
}

/// What has come back from an earlier run and nobody has used makes room for what a request waits for, the coldest first.
#[test]
fn the_hot_set_makes_room_for_a_request_and_in_its_order() {
    let policies = [PolicyChoice::Lru, PolicyChoice::Fifo, PolicyChoice::S3Fifo, PolicyChoice::Arc];
    for (policy, is_settled) in policies.into_iter().flat_map(|policy| [(policy, true), (policy, false)]) {
        let residency = residency_of(policy);
        let mut keys = KeyChain::new();
        let place = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::ROOT };
        let used = chain(&residency, 1, 32, BLOCK, false);
        residency.touch_chain(used.iter().map(|id| (id, BLOCK + 4096)));
        let mut back: Vec<(RecordId, BlockKey, u32)> = (0..32)
            .map(|depth| {
                let parent = keys.parent();
                (place.with_key(keys.next(&[2, depth], b"")), parent, depth)
            })
            .collect();
        // They come in any order.
        back.reverse();
        for (id, parent, depth) in &back {
            let slot = residency.alloc(BLOCK).expect("room");
            let block = Resident::new(*id, (*parent, *depth), Arc::new(slot), BLOCK as u64, false);
            block.mark_fetched(FetchReason::HotSet);
            drop(residency.insert(block, false));
        }
        back.reverse();
        if is_settled {
            residency.settle(back.iter().map(|(id, ..)| id));
        }
        let newcomer = place.with_key(BlockKey::from_bytes([7; 32]));
        assert!(residency.alloc_colder(BLOCK, &newcomer, None).is_none(), "{policy}: nobody asks for it");
        let asked_at = residency.tick();
        let slots: Vec<_> = (0..32).map_while(|_| residency.alloc_colder(BLOCK, &newcomer, Some(asked_at))).collect();
        assert_eq!(slots.len(), 32, "{policy}");
        assert!(used.iter().all(|id| residency.contains(id)), "{policy}: a used block has left");
        let [.., hot_set] = &*residency.fetched;
        assert_eq!(hot_set.wasted_blocks.get(), 32);
    }
}

/// The past of a block comes back with it, but not over what was asked for since.
#[test]
fn a_block_that_comes_back_is_worth_what_it_was() {
    let survey = |residency: &Residency| {
        let mut found = Vec::new();
        assert_eq!(
            residency.survey(None, 100, &mut found).map(|last| residency.survey(Some(last), 100, &mut found)),
            Some(None)
        );
        found
    };
    let slot_bytes = BLOCK + 4096;
    let ask = |residency: &Residency, ids: &[RecordId]| {
        let prefixes = ids.iter().map(|id| id.key.prefix()).collect();
        let session = crate::api::SessionId(1);
        residency.request(&Asked { session, tag: 0, place: ids[0], shards: 1, slot_bytes, prefixes });
    };
    let before = residency();
    let ids = chain(&before, 1, 8, BLOCK, false);
    (0..3).for_each(|_| ask(&before, &ids));
    let memories: Vec<_> = survey(&before).iter().map(|found| (found.id, found.memory)).collect();
    assert!(memories.iter().all(|(_, memory)| memory.uses >= 3), "{memories:?}");
    let after = residency();
    assert!(after.restore_learned(&before.learned().expect("a policy that learns")));
    let past = |memory: &BlockMemory| BlockMemory { idle_s: 100, ..*memory };
    after.recall(memories.iter().map(|(id, memory)| (id.fingerprint(), past(memory))));
    // Somebody asks for the first two before they come.
    ask(&after, &ids[..2]);
    assert_eq!(chain(&after, 1, 8, BLOCK, false), ids);
    after.settle(ids.iter());
    for found in survey(&after) {
        let (_, memory) = memories.iter().find(|(id, _)| *id == found.id).expect("one of them");
        let expected = if ids[..2].contains(&found.id) { found.memory.uses == 1 } else { found.memory == past(memory) };
        assert!(expected, "{:?}, was {memory:?}", found.memory);
    }
}

/// A block that came after its child is no leaf, and none is counted twice or for ever.
#[test]
fn a_parent_that_comes_later_knows_its_children() {
    let residency = residency_of(PolicyChoice::Lru);
    let mut keys = KeyChain::new();
    let place = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::ROOT };
    let chain: Vec<(RecordId, BlockKey)> = (0..4)
        .map(|depth| {
            let parent = keys.parent();
            (place.with_key(keys.next(&[depth], b"")), parent)
        })
        .collect();
    let come = |at: usize| {
        let slot = residency.alloc(BLOCK).expect("room");
        let (id, parent) = chain[at];
        drop(residency.insert(Resident::new(id, (parent, at as u32), Arc::new(slot), BLOCK as u64, false), false));
    };
    let leave = |at: usize| drop(residency.state.lock().detach(&chain[at].0, &mut residency.policies.lock()));
    let leaves = || -> Vec<usize> {
        let state = residency.state.lock();
        (0..4).filter(|at| state.may_leave_as_leaf(&chain[*at].0)).collect()
    };
    [3, 1, 2, 0].into_iter().for_each(come);
    assert_eq!(leaves(), [3]);
    leave(1);
    assert_eq!(leaves(), [0, 3], "its child has no parent");
    come(1);
    assert_eq!(leaves(), [3], "and has it again");
    leave(2);
    leave(3);
    assert_eq!(leaves(), [1]);
    assert!(residency.state.lock().without_parent.is_empty());
}
