//! An operator has blocks stay in DRAM: whatever else needs room they stay, no more than half of DRAM does, and each way to
//! end a pin ends it. And has blocks leave by prefix and by age.
#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCK, BLOCKS, Worker, keys, read, save, soon};

/// Without a store: what leaves is gone.
fn worker(policy: PolicyChoice) -> Worker {
    Worker::new(EngineConfig { dram: ByteSize::mib(16), policy, ..EngineConfig::default() })
}

fn all() -> BlockChoice {
    BlockChoice::default()
}

/// The block with this key, and those that continue it.
fn under(key: BlockKey) -> BlockChoice {
    BlockChoice { prefix: Some(key.to_string()[..16].parse().expect("digits")), ..all() }
}

/// More than DRAM has room for.
fn crowd(worker: &mut Worker, first: u32) {
    (first..first + 64).for_each(|number| save(worker, &keys(BLOCKS, number)));
}

fn found(worker: &Worker, keys: &[BlockKey]) -> u32 {
    let reply = worker.lookup(keys);
    reply.lease.into_iter().for_each(|lease| worker.engine.release(lease));
    reply.hit_blocks
}

fn pinned(worker: &Worker) -> (u64, u64) {
    let stats = worker.engine.stats();
    (stats.dram_pins, stats.dram_pinned_blocks)
}

#[test]
fn pinned_blocks_stay_whoever_needs_room_until_the_pin_is_ended() {
    for policy in PolicyChoice::ALL {
        let mut worker = worker(policy);
        let engine = worker.engine.clone();
        let chains = [keys(BLOCKS, 1), keys(BLOCKS, 2)];
        chains.iter().for_each(|chain| save(&mut worker, chain));
        let pin = engine.pin(&all(), None).expect("fits");
        let blocks = 2 * u64::from(BLOCKS);
        assert_eq!((pin.number, pin.blocks, pin.left), (1, blocks, None), "{pin:?}");
        assert!(pin.bytes >= blocks * BLOCK && engine.stats().dram_pinned_bytes == pin.bytes, "{pin:?}");
        crowd(&mut worker, 100);
        assert!(engine.stats().dram_evicted_blocks > 0, "{policy}: nobody needed room");
        chains.iter().for_each(|chain| assert_eq!(read(&mut worker, chain), (BLOCKS, 0), "{policy}"));
        let EvictOutcome { kept_blocks, .. } = engine.evict(&all()).expect("all");
        assert_eq!((kept_blocks, engine.stats().dram_blocks), (blocks, blocks), "{policy}: an eviction leaves them");
        let info = engine.list_namespaces(None, 8, 0).expect("open").remove(0);
        assert_eq!((info.pinned_blocks, info.pinned_bytes), (blocks, blocks * BLOCK));
        assert_eq!(engine.pins().expect("open"), std::slice::from_ref(&pin));
        // Two pins hold the same; both have to end.
        let second = engine.pin(&under(chains[0][0]), Some(Duration::from_secs(3600))).expect("nothing more");
        assert!(second.blocks == u64::from(BLOCKS) && second.left.is_some(), "{second:?}");
        assert_eq!(engine.unpin(pin.number).expect("there").blocks, u64::from(BLOCKS));
        assert_eq!(pinned(&worker), (1, u64::from(BLOCKS)));
        assert_eq!(engine.unpin(pin.number).expect_err("over").kind(), ErrorKind::NotFound);
        crowd(&mut worker, 200);
        assert_eq!(read(&mut worker, &chains[0]), (BLOCKS, 0), "{policy}");
        assert_eq!(engine.unpin_namespaces(&[]).expect("all").pins, 1);
        assert_eq!((pinned(&worker), engine.stats().dram_pinned_bytes), ((0, 0), 0));
        crowd(&mut worker, 300);
        crowd(&mut worker, 400);
        assert_eq!(found(&worker, &chains[0]), 0, "{policy}: it stays though nobody pins it");
    }
}

#[test]
fn no_more_than_half_of_dram_is_pinned() {
    let mut worker = worker(PolicyChoice::Lru);
    let engine = worker.engine.clone();
    crowd(&mut worker, 100);
    let error = engine.pin(&all(), None).expect_err("too much");
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
    assert!(text.contains("the limit is") && text.contains("unpin") && text.contains("--dram"), "{text}");
    assert_eq!(pinned(&worker), (0, 0), "all or nothing");
    // What is pinned already counts, and is not counted twice.
    let mut pins = 0;
    let refused = (100..164).rev().find_map(|number| {
        let pinned = engine.pin(&under(keys(1, number)[0]), None);
        pins += u64::from(pinned.is_ok());
        pinned.err()
    });
    assert_eq!(refused.expect("too much").kind(), ErrorKind::InvalidInput);
    let half = engine.stats().dram_ready_bytes / 2;
    let bytes = engine.stats().dram_pinned_bytes;
    assert!(bytes <= half && bytes > half / 10 * 8, "{bytes} of {half}");
    engine.pin(&under(keys(1, 163)[0]), None).expect("nothing more");
    assert_eq!(pinned(&worker).0, pins + 1);
    save(&mut worker, &keys(BLOCKS, 1));
    let bad = |told: Result<PinInfo>| told.expect_err("refused").kind();
    assert_eq!(bad(engine.pin(&all(), Some(Duration::from_millis(999)))), ErrorKind::InvalidInput);
    assert_eq!(bad(engine.pin(&all(), Some(Duration::from_secs(367 * 86_400)))), ErrorKind::InvalidInput);
    let by_age = BlockChoice { unused_for: Some(Duration::from_secs(1)), ..all() };
    assert_eq!(bad(engine.pin(&by_age, None)), ErrorKind::InvalidInput);
    assert_eq!(bad(engine.pin(&under(keys(1, 9999)[0]), None)), ErrorKind::NotFound);
    let unknown = NamespaceDescriptor::new().with("model", "unknown").id();
    assert_eq!(bad(engine.pin(&BlockChoice::of(&[unknown]), None)), ErrorKind::NotFound);
    engine.unpin_namespaces(&[]).expect("all");
    for _ in 0..64 {
        engine.pin(&under(keys(1, 163)[0]), None).expect("the same again");
    }
    assert_eq!(bad(engine.pin(&under(keys(1, 163)[0]), None)), ErrorKind::Busy);
}

#[test]
fn a_pin_ends_at_its_time() {
    let mut worker = worker(PolicyChoice::default());
    let engine = worker.engine.clone();
    save(&mut worker, &keys(BLOCKS, 1));
    let started = Instant::now();
    engine.pin(&all(), None).expect("fits");
    // The thread that waits for the end of one hears of an earlier one.
    engine.pin(&all(), Some(Duration::from_secs(3600))).expect("fits");
    engine.pin(&all(), Some(Duration::from_secs(1))).expect("fits");
    while pinned(&worker).0 > 2 {
        assert!(started.elapsed() < Duration::from_secs(60), "not in time");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(pinned(&worker), (2, u64::from(BLOCKS)), "the others go on");
}

#[test]
fn a_purge_ends_pins_and_gives_their_room_back() {
    let mut worker = worker(PolicyChoice::default());
    let engine = worker.engine.clone();
    save(&mut worker, &keys(BLOCKS, 1));
    engine.pin(&all(), None).expect("fits");
    let id = engine.list_namespaces(None, 8, 0).expect("open").remove(0).id;
    assert_eq!(engine.purge(&id, soon()).expect("purged").expect("known").dram_blocks, u64::from(BLOCKS));
    assert_eq!((pinned(&worker), engine.pins().expect("open")), ((0, 0), Vec::new()));
    assert_eq!(engine.stats().dram_used_bytes, 0, "the room is free");
}

#[test]
fn a_prefix_is_its_block_and_what_continues_it() {
    let mut worker = worker(PolicyChoice::default());
    let engine = worker.engine.clone();
    // Two chains that part after eight blocks, and one apart.
    let (one, apart) = (keys(16, 1), keys(16, 2));
    let mut chain = KeyChain::resume(one[7]);
    let other: Vec<BlockKey> = (0..8).map(|at| chain.next(&[77, at], b"")).collect();
    let other = [&one[..8], &other[..]].concat();
    [&one, &apart].into_iter().for_each(|chain| save(&mut worker, chain));
    assert_eq!(worker.save(&other, BlockKey::ROOT), SaveOutcome { saved: 8, present: 8, dropped: 0 });
    assert_eq!(engine.stats().dram_blocks, 40);
    // Told by their first blocks, the larger one first; and behind what its two chains share, as two.
    let told = |under: Option<&BlockKey>| {
        let under = under.map(|key| key.to_string().parse().expect("digits"));
        let found = engine.list_prefixes(&[], under.as_ref(), 10).expect("there").into_iter();
        found.map(|it| (it.key, it.depth, it.common_blocks, it.branches, it.blocks)).collect::<Vec<_>>()
    };
    assert_eq!(told(None), [(one[0], 0, 8, 2, 24), (apart[0], 0, 16, 0, 16)]);
    let mut both = [(one[8], 8, 8, 0, 8), (other[8], 8, 8, 0, 8)];
    both.sort();
    assert_eq!(told(Some(&one[0])), both);
    assert_eq!(told(Some(&one[7])), both);
    assert_eq!(told(Some(&one[8])), []);
    let info = engine.list_prefixes(&[], None, 1).expect("open").remove(0);
    assert!(info.bytes >= 24 * BLOCK && info.pinned_bytes == 0 && info.idle < Duration::from_secs(60), "{info:?}");
    assert_eq!(engine.list_prefixes(&[], None, 0).expect_err("none").kind(), ErrorKind::InvalidInput);
    // A pin keeps what comes before, too: without it nothing of it would be found.
    assert_eq!(engine.pin(&under(one[8]), None).expect("there").blocks, 16);
    assert_eq!(engine.pin(&under(one[0]), None).expect("there").blocks, 24);
    engine.unpin_namespaces(&[]).expect("all");
    let evict = |choice: &BlockChoice| engine.evict(choice).expect("there").dram_blocks;
    assert_eq!(evict(&under(other[8])), 8);
    assert_eq!((found(&worker, &other), found(&worker, &one)), (8, 16));
    assert_eq!(evict(&under(one[4])), 12);
    assert_eq!((found(&worker, &one), found(&worker, &apart)), (4, 16));
    assert_eq!(engine.evict(&under(one[4])).expect_err("gone").kind(), ErrorKind::NotFound);
}

#[test]
fn what_nobody_has_used_for_some_time_leaves() {
    let mut worker = worker(PolicyChoice::default());
    let engine = worker.engine.clone();
    let chains = [keys(BLOCKS, 1), keys(BLOCKS, 2)];
    chains.iter().for_each(|chain| save(&mut worker, chain));
    let older = |seconds| BlockChoice { unused_for: Some(Duration::from_secs(seconds)), ..all() };
    assert_eq!(engine.evict(&older(3600)).expect("none").dram_blocks, 0);
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(read(&mut worker, &chains[1]), (BLOCKS, 0));
    assert_eq!(engine.evict(&older(2)).expect("one").dram_blocks, u64::from(BLOCKS));
    assert_eq!((found(&worker, &chains[0]), found(&worker, &chains[1])), (0, BLOCKS));
}
