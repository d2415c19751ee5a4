//! What every policy keeps to, and what ours does beyond.

use super::*;

fn block(key: u64) -> PolicyBlock {
    PolicyBlock { key: SplitMix::mix(key), bytes: 1 }
}

/// Asks for a chain and brings in what is missing, as the owner of a tier of `capacity` blocks would. Returns how many
/// blocks from the first were there.
fn ask(policy: &mut dyn Policy, chain: &[PolicyBlock], now_ms: u64, capacity: usize) -> usize {
    let hits = chain.iter().take_while(|block| policy.contains(block.key)).count();
    policy.request(&PolicyRequest { chain, tenant: 0, now_ms });
    let mut places: Vec<usize> = (0..chain.len()).collect();
    if policy.takes_last_first() {
        places.reverse();
    }
    for place in places {
        let parent = place.checked_sub(1).map(|before| chain[before].key);
        if policy.contains(chain[place].key) {
            policy.touch(chain[place].key);
        } else if policy.admits(&chain[place], parent, policy.len() >= capacity) {
            if policy.len() >= capacity {
                policy.evict(&mut |_| true).expect("somebody may leave");
            }
            policy.insert(&chain[place], parent);
        }
    }
    hits
}

fn chain(conversation: u64, blocks: u64) -> Vec<PolicyBlock> {
    (0..blocks).map(|depth| block(conversation * 10_000 + depth)).collect()
}

fn eager() -> PegaflowConfig {
    PegaflowConfig { write_hurdle: 0.0, ..PegaflowConfig::default() }
}

#[test]
fn names_are_read_as_they_are_written() {
    for choice in PolicyChoice::ALL {
        assert_eq!(choice.name().parse(), Ok(choice));
    }
    assert!("belady".parse::<PolicyChoice>().is_err());
}

#[test]
fn every_policy_keeps_to_its_capacity_and_says_who_left() {
    for choice in PolicyChoice::ALL {
        let mut policy = choice.build(50, eager());
        let mut random = SplitMix::new(7);
        let mut here = std::collections::HashSet::new();
        for now in 0..2000 {
            let chain = chain(random.below(40) as u64, 1 + random.below(12) as u64);
            policy.request(&PolicyRequest { chain: &chain, tenant: 0, now_ms: now * 100 });
            let mut parent = None;
            for block in &chain {
                if policy.contains(block.key) {
                    policy.touch(block.key);
                } else if policy.admits(block, parent, here.len() >= 50) {
                    if here.len() >= 50 {
                        let left = policy.evict(&mut |_| true).expect("nobody is pinned");
                        assert!(here.remove(&left), "{choice}: who left was not here");
                    }
                    policy.insert(block, parent);
                    here.insert(block.key);
                }
                parent = Some(block.key);
            }
            if random.below(20) == 0 {
                let gone = chain[0].key;
                policy.remove(gone);
                here.remove(&gone);
            }
            assert_eq!(policy.len(), here.len(), "{choice}");
        }
        assert!(here.iter().all(|key| policy.contains(*key)), "{choice}");
    }
}

#[test]
fn pinned_blocks_stay() {
    for choice in PolicyChoice::ALL {
        let mut policy = choice.build(8, eager());
        ask(policy.as_mut(), &chain(1, 1), 0, 8);
        for other in 2..9 {
            ask(policy.as_mut(), &chain(other, 1), other * 1000, 8);
        }
        let pinned = block(10_000).key;
        let mut left = Vec::new();
        while let Some(key) = policy.evict(&mut |key| key != pinned) {
            left.push(key);
            assert!(left.len() < 9, "{choice}");
        }
        assert!(!left.contains(&pinned) && policy.contains(pinned), "{choice}");
        assert_eq!(left.len(), 7, "{choice}");
    }
}

#[test]
fn a_search_among_pinned_blocks_ends() {
    for choice in PolicyChoice::ALL {
        let mut policy = choice.build(6000, eager());
        for now in 0..6000 {
            ask(policy.as_mut(), &chain(now, 1), now, 6000);
        }
        let mut asked = 0;
        let mut is_pinned = |_| {
            asked += 1;
            false
        };
        assert_eq!(policy.evict(&mut is_pinned), None, "{choice}");
        assert!(asked <= 4 * least_recent::PINNED_MAX, "{choice} asked {asked} times");
        assert_eq!(policy.len(), 6000, "{choice}");
    }
}

#[test]
fn ours_that_has_learned_nothing_is_least_recently_used_leaves_first() {
    let mut policy = PegaflowPolicy::new(eager());
    for conversation in 0..4 {
        ask(&mut policy, &chain(conversation, 3), conversation * 10_000, 12);
    }
    ask(&mut policy, &chain(0, 3), 60_000, 12);
    let order: Vec<u64> = std::iter::from_fn(|| policy.evict(&mut |_| true)).collect();
    let expected: Vec<u64> =
        [1, 2, 3, 0].iter().flat_map(|at| chain(*at, 3).into_iter().rev().map(|block| block.key)).collect();
    assert_eq!(order, expected);
}

#[test]
fn ours_never_parts_a_block_from_its_ancestors() {
    for seed in 1..20 {
        let mut policy = PegaflowPolicy::new(PegaflowConfig { remembered_max: 64, ..PegaflowConfig::default() });
        let mut random = SplitMix::new(seed);
        let mut asked = Vec::new();
        for now in 0..1500 {
            let mut request = chain(0, 1 + random.below(6) as u64);
            request.extend(chain(1 + random.below(30) as u64, random.below(10) as u64));
            // A key covers all blocks before it.
            let mut key = 0;
            for block in &mut request {
                key = SplitMix::mix(key ^ block.key);
                block.key = key;
            }
            ask(&mut policy, &request, now * 500, 60);
            assert!(policy.len() <= 60);
            asked.push(request);
        }
        for request in asked {
            let hits = request.iter().take_while(|block| policy.contains(block.key)).count();
            assert!(request[hits..].iter().all(|block| !policy.contains(block.key)), "a hole; seed {seed}");
        }
    }
}

/// Conversations that go on after a minute, between prompts that nobody ever continues. The first are recognised by their
/// length only.
fn mixed(policy: &mut dyn Policy, rounds: std::ops::Range<u64>, capacity: usize) -> (usize, usize) {
    let (mut hits, mut all) = (0, 0);
    for round in rounds {
        let now_ms = round * 1000;
        for once in 0..4 {
            ask(policy, &chain(1_000_000 + round * 4 + once, 20), now_ms, capacity);
        }
        let kept = chain(2_000_000 + round % 60 + round / 120 * 60, 5);
        all += 5;
        hits += ask(policy, &kept, now_ms, capacity);
    }
    (hits, all)
}

#[test]
fn ours_learns_who_comes_back_and_takes_it_along() {
    let capacity = 400;
    let mut lru = PolicyChoice::Lru.build(capacity, eager());
    let (lru_hits, _) = mixed(lru.as_mut(), 0..1200, capacity as usize);
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    let (hits, all) = mixed(&mut policy, 0..1200, capacity as usize);
    assert_eq!(lru_hits, 0);
    assert!(hits * 10 > all * 3, "{hits} of {all}");

    let first = 60..240;
    let (fresh_hits, _) = mixed(&mut PegaflowPolicy::new(PegaflowConfig::default()), first.clone(), capacity as usize);
    let mut warm = PegaflowPolicy::new(PegaflowConfig::default());
    assert!(warm.restore(&policy.note()));
    let (warm_hits, _) = mixed(&mut warm, first, capacity as usize);
    assert!(warm_hits > fresh_hits, "{warm_hits} with a note, {fresh_hits} without");
    assert!(!warm.restore(&[1, 2, 3]) && !warm.restore(&[]));
}

#[test]
fn deep_blocks_stay_longer_when_recomputing_them_costs_more() {
    let config = PegaflowConfig { recompute_knee_blocks: 1.0, ..eager() };
    let mut policy = PegaflowPolicy::new(config);
    ask(&mut policy, &chain(1, 8), 0, 100);
    ask(&mut policy, &chain(2, 1), 10, 100);
    assert_eq!(policy.evict(&mut |_| true), Some(block(20_000).key));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || {
        let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
        mixed(&mut policy, 0..300, 300);
        (policy.note(), std::iter::from_fn(|| policy.evict(&mut |_| true)).collect::<Vec<_>>())
    };
    assert_eq!(run(), run());
}
