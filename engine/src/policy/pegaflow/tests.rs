//! What only shows inside: bounds on memory, and what is learned from what.

use super::*;

fn block(number: u64) -> PolicyBlock {
    PolicyBlock { key: SplitMix::mix(number), bytes: 1 }
}

fn ask(policy: &mut PegaflowPolicy, chain: &[PolicyBlock], tenant: u64, now_ms: u64) {
    policy.request(&PolicyRequest { chain, tenant, now_ms });
    let mut parent = None;
    for block in chain {
        policy.insert(block, parent);
        parent = Some(block.key);
    }
}

#[test]
fn no_more_are_remembered_than_may_be() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig { remembered_max: 64, ..PegaflowConfig::default() });
    for now in 0..500 {
        let chain: Vec<PolicyBlock> = (0..10).map(|depth| block(now * 10 + depth)).collect();
        ask(&mut policy, &chain, 0, now * 1000);
        while policy.len() > 50 {
            policy.evict(&mut |_| true).expect("nobody is pinned");
        }
    }
    assert!(policy.tree.nodes.len() <= 50 + 64 + 4 * 10, "{} nodes", policy.tree.nodes.len());
    assert!(policy.watch.len() <= policy.tree.nodes.len(), "who was forgotten is watched: {}", policy.watch.len());
}

#[test]
fn fewer_are_remembered_when_memory_is_shared() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig { remembered_max: 1000, ..PegaflowConfig::default() });
    let fill = |policy: &mut PegaflowPolicy, from: u64| {
        for now in from..from + 500 {
            let chain: Vec<PolicyBlock> = (0..10).map(|depth| block(now * 10 + depth)).collect();
            policy.request(&PolicyRequest { chain: &chain, tenant: 0, now_ms: now * 1000 });
        }
    };
    fill(&mut policy, 0);
    assert!((1000..=1010).contains(&policy.tree.known()), "{} known", policy.tree.known());
    policy.remember_at_most(100);
    fill(&mut policy, 500);
    assert!((100..=110).contains(&policy.tree.known()), "{} known", policy.tree.known());
    policy.remember_at_most(usize::MAX);
    fill(&mut policy, 1000);
    assert!((1000..=1010).contains(&policy.tree.known()), "more than the configuration allows");
}

#[test]
fn who_has_descendants_here_is_not_forgotten() {
    let mut tree = Tree::new(1);
    let [parent, child] = [1, 2].map(|key| tree.add(key, 0));
    tree.enter(parent, NONE, 1);
    tree.enter(child, parent, 1);
    assert_eq!(tree.leave(parent), None);
    tree.add(3, 0);
    tree.add(4, 0);
    tree.forget(100, |_| {});
    assert_eq!(tree.find(1), Some(parent));
    assert_eq!(tree.leave(child), None, "a parent that is not here is no leaf");
    tree.forget(100, |_| {});
    assert_eq!([1, 3].map(|key| tree.find(key)), [None, None]);
}

#[test]
fn who_is_asked_for_again_is_remembered_longer() {
    let mut tree = Tree::new(1);
    let [used, other, last] = [1, 2, 3].map(|key| tree.add(key, 0));
    tree.nodes[used as usize].was_used = true;
    tree.forget(2, |_| {});
    assert_eq!([1, 2, 3].map(|key| tree.find(key)), [Some(used), None, Some(last)]);
    assert_eq!(tree.add(4, 0), other, "its place is used again");
    tree.forget(100, |_| {});
    assert_eq!([1, 3].map(|key| tree.find(key)), [None, None], "once");
}

#[test]
fn a_place_among_the_watched_that_was_lost_is_not_believed() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    ask(&mut policy, &[block(1)], 0, 0);
    ask(&mut policy, &[block(2)], 0, 0);
    let [first, second] = [1, 2].map(|number| policy.tree.find(block(number).key).expect("known"));
    let place = policy.tree.nodes[first as usize].watched;
    assert_ne!(place, NONE);
    while policy.tree.nodes[second as usize].watched != place {
        policy.watch_one(second);
    }
    assert_eq!(policy.tree.nodes[first as usize].watched, NONE);
    assert!(policy.watch.len() <= 1 << 16 && policy.hazard.sightings() <= 1 << 16);
    (0..1 << 17).for_each(|_| policy.watch_one(second));
    assert!(policy.watch.len() <= 1 << 16 && policy.hazard.sightings() <= 1 << 16);
}

#[test]
fn what_tells_blocks_apart_comes_from_the_request() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    let mut class = |number: u64, tenant: u64, now_ms: u64| {
        ask(&mut policy, &[block(number)], tenant, now_ms);
        policy.tree.nodes[policy.tree.find(block(number).key).expect("known") as usize].class
    };
    let (one, same, other) = (class(1, 1, 0), class(2, 1, 0), class(3, 2, 0));
    assert!(one == same && one != other, "tenants");
    let (soon, late) = (class(2, 1, 5000), class(3, 1, 500_000));
    assert_ne!(soon.rhythm(), late.rhythm());
}

#[test]
fn time_that_runs_backwards_stands_still() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    for (number, now_ms) in [50_000, 100_000, 0, 70_000, u64::MAX, 3].into_iter().enumerate() {
        let before = policy.now;
        ask(&mut policy, &[block(0), block(1 + number as u64)], 0, now_ms);
        assert!(policy.now >= before);
    }
    assert_eq!(std::iter::from_fn(|| policy.evict(&mut |_| true)).count(), 7);
}

#[test]
fn a_block_twice_in_a_chain_is_one_block() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    ask(&mut policy, &[block(1), block(2), block(1)], 0, 0);
    assert_eq!((policy.len(), policy.tree.nodes.len()), (2, 2));
    let order = [policy.evict(&mut |_| true), policy.evict(&mut |_| true), policy.evict(&mut |_| true)];
    assert_eq!(order, [Some(block(2).key), Some(block(1).key), None]);
}

#[test]
fn of_equals_the_larger_leaves_first() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    ask(&mut policy, &[block(1)], 0, 0);
    ask(&mut policy, &[PolicyBlock { bytes: 8, ..block(2) }], 0, 100);
    assert_eq!(policy.evict(&mut |_| true), Some(block(2).key));
}

#[test]
fn a_full_tier_takes_nobody_whose_parent_would_leave_for_it_or_is_not_there() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig { write_hurdle: 0.0, ..PegaflowConfig::default() });
    let chain = [block(1), block(2), block(3)];
    policy.request(&PolicyRequest { chain: &chain, tenant: 0, now_ms: 0 });
    assert!(!policy.admits(&chain[1], Some(chain[0].key), false), "an orphan");
    assert!(policy.admits(&chain[0], None, false));
    policy.insert(&chain[0], None);
    assert!(!policy.admits(&chain[1], Some(chain[0].key), true), "only its parent could leave");
    assert!(policy.admits(&chain[1], Some(chain[0].key), false));
}

#[test]
fn what_is_learned_counts_from_then_on() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    ask(&mut policy, &[block(1)], 0, 0);
    let at = policy.tree.find(block(1).key).expect("known");
    let class = policy.tree.nodes[at as usize].class;
    let fresh = policy.worth_of(at, 1);
    for _ in 0..2000 {
        policy.hazard.add(hazard::Sighting { class, age: 0.5, is_use: true });
    }
    policy.news = 2000;
    policy.fit_if_due();
    let learned = policy.worth_of(at, 1);
    assert!(learned > 4.0 * fresh, "{learned} after {fresh}");

    let mut later = PegaflowPolicy::new(PegaflowConfig::default());
    ask(&mut later, &[block(1)], 0, 0);
    assert_eq!(later.worth_of(at, 1), fresh);
    assert!(later.restore(&policy.note()));
    assert_eq!(later.worth_of(at, 1), learned);
}

#[test]
fn what_the_model_wrote_behind_a_prompt_is_the_end_of_its_request() {
    let mut policy = PegaflowPolicy::new(PegaflowConfig::default());
    ask(&mut policy, &[block(1), block(2)], 3, 0);
    policy.request(&PolicyRequest { chain: &[], tenant: 0, now_ms: 60_000 });
    policy.insert(&block(3), Some(block(2).key));
    policy.insert(&block(5), Some(block(4).key));
    let node = |policy: &PegaflowPolicy, number: u64| {
        policy.tree.nodes[policy.tree.find(block(number).key).expect("known") as usize]
    };
    let (prompt, written) = (node(&policy, 2), node(&policy, 3));
    assert_eq!((written.class, written.turn, written.depth), (prompt.class, 1, 2));
    assert_eq!(written.last, policy.now, "it is as young as it is");
    assert!(!node(&policy, 4).is_here && node(&policy, 5).is_here, "a parent may come later");
    ask(&mut policy, &[1, 2, 3, 6].map(block), 3, 120_000);
    assert_eq!((node(&policy, 6).turn, node(&policy, 6).class.rhythm() > 0), (2, true), "the conversation goes on");
}
