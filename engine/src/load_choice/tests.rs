//! The bookkeeping between engine and arbiter, on a clock that the test moves.

use super::*;
use crate::api::ComputedTokens;

const MODEL: NamespaceHandle = NamespaceHandle(1);

struct World {
    choice: Arc<LoadChoice>,
    now_ms: Arc<AtomicU64>,
}

impl World {
    fn new(policy: LoadPolicy) -> Self {
        let now_ms = Arc::new(AtomicU64::new(1000));
        let clock = Arc::clone(&now_ms);
        let choice =
            LoadChoice::with_clock(policy, Box::new(move || Duration::from_millis(clock.load(Ordering::Relaxed))));
        Self { choice, now_ms }
    }

    fn wait_ms(&self, time: u64) {
        self.now_ms.fetch_add(time, Ordering::Relaxed);
    }

    fn ask(&self, instance: &str, question: &LoadQuestion) -> Decision {
        let found = FoundBytes { blocks: 64, block_bytes: 1 << 20, stored_bytes: 64 << 20, ..FoundBytes::default() };
        self.choice.decide(&name(instance), MODEL, question, found, Vec::new)
    }

    /// A load of one shard that takes so long.
    fn load(&self, instance: &str, decision: &Decision, took_ms: u64, loaded: usize) {
        let watch = LoadWatch::new(&self.choice, &name(instance), decision.id, 64, 1);
        watch.began();
        self.wait_ms(took_ms);
        watch.shard_ended(loaded);
    }

    /// Loading takes 4 s, computing 1 s.
    fn taught() -> Self {
        let world = Self::new(LoadPolicy::Auto);
        let first = world.ask("a", &question("r"));
        world.load("a", &first, 4000, 64);
        world.ask("a", &LoadQuestion { computed: vec![computed(0, 1000)], ..question("r") });
        world
    }
}

fn name(instance: &str) -> InstanceId {
    InstanceId(instance.into())
}

fn question(request: &str) -> LoadQuestion {
    LoadQuestion { request: request.into(), block_tokens: 16, ..LoadQuestion::default() }
}

fn computed(decision: u64, took_ms: u64) -> ComputedTokens {
    let took = Duration::from_millis(took_ms);
    ComputedTokens { decision, first_token: 0, end_token: 1024, load_share: 0.0, took }
}

#[test]
fn what_is_not_known_is_loaded_and_what_is_slower_than_computing_is_not() {
    let world = World::new(LoadPolicy::Auto);
    let first = world.ask("a", &question("r1"));
    assert_eq!(first.choice, Choice::Load);
    world.load("a", &first, 4000, 64);
    assert_eq!(world.ask("a", &question("r2")).choice, Choice::Load, "what computing takes is not known");
    let third = world.ask("a", &LoadQuestion { computed: vec![computed(0, 1000)], ..question("r3-abc") });
    assert_eq!(third.choice, Choice::Recompute, "{third}");
    let explained = world.choice.explain(Some("r3"), 10);
    assert_eq!(explained.len(), 1);
    assert!(explained[0].text.starts_with("recompute: it is faster; 1024 tokens found"), "{}", explained[0].text);
    assert_eq!((explained[0].instance.as_str(), explained[0].request.as_str()), ("a", "r3-abc"));
    assert!(world.choice.explain(Some("r"), 10).is_empty(), "not a prefix of a name");
    assert_eq!(world.choice.explain(None, 2).len(), 2);
    // It took longer than loading would have.
    world.choice.hear(&name("a"), MODEL, &LoadQuestion { computed: vec![computed(third.id, 9000)], ..question("") });
    assert!(world.choice.explain(Some("r3-abc"), 1)[0].is_mistake);
    let counters = &world.choice.counters;
    assert_eq!((counters.loads.get(), counters.recomputes.get(), counters.mistaken_recomputes.get()), (2, 1, 1));
}

#[test]
fn the_engines_never_outranks_askers_and_theirs_the_rest() {
    use LoadPolicy::{Always, Auto, Never, Shadow};
    let world = World::taught();
    for (ours, theirs, expected) in [
        (Auto, None, Choice::Recompute),
        (Auto, Some(Always), Choice::Load),
        (Auto, Some(Shadow), Choice::Load),
        (Shadow, None, Choice::Load),
        (Always, Some(Never), Choice::Recompute),
        (Always, None, Choice::Load),
        (Never, Some(Always), Choice::Recompute),
    ] {
        world.choice.set_policy(ours);
        assert_eq!(world.choice.policy(), ours);
        let decision = world.ask("a", &LoadQuestion { policy: theirs, ..question("r") });
        assert_eq!((decision.choice, decision.preferred), (expected, Choice::Recompute), "{ours} {theirs:?}");
    }
}

#[test]
fn a_load_counts_when_all_shards_have_loaded_all_of_it() {
    for (shards, loaded, counts) in
        [(1, vec![64], true), (2, vec![64, 64], true), (2, vec![64, 63], false), (2, vec![64], false)]
    {
        let world = World::new(LoadPolicy::Auto);
        let decision = world.ask("a", &question("r"));
        let watch = LoadWatch::new(&world.choice, &name("a"), decision.id, 64, shards);
        watch.began();
        for blocks in &loaded {
            world.wait_ms(500);
            watch.shard_ended(*blocks);
        }
        drop(watch);
        let observed = world.choice.explain(Some("r"), 1)[0].decision.observed_load;
        let expected = counts.then(|| Duration::from_millis(500 * loaded.len() as u64));
        assert_eq!(observed, expected, "{shards} {loaded:?}");
    }
}

#[test]
fn a_new_instance_of_the_same_model_begins_with_what_is_known() {
    let world = World::taught();
    assert_eq!(world.ask("b", &question("r")).choice, Choice::Recompute);
    let found = FoundBytes { blocks: 64, block_bytes: 1 << 20, stored_bytes: 64 << 20, ..FoundBytes::default() };
    let other = world.choice.decide(&name("c"), NamespaceHandle(2), &question("r"), found, Vec::new);
    assert_eq!(other.choice, Choice::Load);
}

#[test]
fn memory_is_bounded() {
    let world = World::new(LoadPolicy::Auto);
    for number in 0..200 {
        world.wait_ms(1);
        world.ask(&format!("i{number}"), &question("r"));
    }
    assert_eq!(world.choice.state.lock().judges.len(), INSTANCES_MAX);
    assert_eq!(world.choice.explain(Some("r"), 1000).len(), INSTANCES_MAX);
    for _ in 0..3000 {
        world.ask("i199", &question(&"é".repeat(1000)));
    }
    let state = world.choice.state.lock();
    let judge = state.judges.get(&name("i199")).expect("used last");
    assert_eq!((judge.names.len(), judge.arbiter.decisions().count()), (DECISIONS_MAX, DECISIONS_MAX));
    assert!(judge.names.iter().all(|(_, name)| name.len() <= REQUEST_BYTES_MAX));
    let pairs = judge.arbiter.decisions().zip(&judge.names);
    assert!(pairs.into_iter().all(|(decision, (id, _))| decision.id == *id), "names belong to their decisions");
}

#[test]
fn the_queue_is_empty_when_loads_have_ended_however() {
    let world = World::new(LoadPolicy::Auto);
    let mut ends = QueuedReads::new(&world.choice, 1001, 10);
    let cancelled = QueuedReads::new(&world.choice, 77, 7);
    assert_eq!(world.choice.queued_bytes(), 1078);
    ends.ended(4);
    assert_eq!((world.choice.queued_bytes(), world.choice.read_bytes.load(Ordering::Relaxed)), (678, 400));
    ends.ended(1000);
    drop((ends, cancelled));
    assert_eq!(world.choice.queued_bytes(), 0);
}
