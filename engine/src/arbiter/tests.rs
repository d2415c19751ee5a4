//! What the arbiter promises, in small worlds without noise; `make bench-arbiter` has large ones with it.

use super::*;
use crate::policy::SplitMix;

const TOKEN_BYTES: u64 = 131_072;

struct World {
    arbiter: Arbiter,
    now_s: f64,
    drive_bytes_per_s: f64,
    tokens_per_s: f64,
}

impl World {
    fn new(drive_bytes_per_s: f64, tokens_per_s: f64, seed: u64) -> Self {
        let arbiter = Arbiter::new(ArbiterConfig { seed, ..ArbiterConfig::default() });
        Self { arbiter, now_s: 0.0, drive_bytes_per_s, tokens_per_s }
    }

    fn load_s(&self, tokens: u32) -> f64 {
        if tokens == 0 { 0.0 } else { 0.004 + f64::from(tokens) * TOKEN_BYTES as f64 / self.drive_bytes_per_s }
    }

    fn compute_s(&self, tokens: u32) -> f64 {
        f64::from(tokens) / self.tokens_per_s
    }

    /// One request a second after the one before, with 100 tokens behind what was found; what it takes is known at once.
    /// The decision, and its time over the best.
    fn serve(&mut self, tokens: u32) -> (Decision, f64) {
        self.now_s += 1.0;
        let now = Duration::from_secs_f64(self.now_s);
        let decision = self.arbiter.decide(found(tokens, 0.0), now);
        let (all_loaded, all_computed) = (self.load_s(tokens), self.compute_s(tokens));
        let is_load = decision.choice == Choice::Load;
        if is_load {
            self.arbiter.load_began(decision.id, now);
            self.arbiter.loaded(decision.id, Duration::from_secs_f64(all_loaded), now);
        }
        if decision.read_bytes > 0 {
            let took = 0.004 + decision.read_bytes as f64 / self.drive_bytes_per_s;
            self.arbiter.was_read(decision.read_bytes, 0, Some(Duration::from_secs_f64(took)), now);
        }
        let computed = if is_load { tokens..tokens + 100 } else { 0..tokens + 100 };
        let took = Duration::from_secs_f64(self.compute_s(computed.len() as u32));
        self.arbiter.computed(Some(decision.id), computed, 0.0, took, now);
        (decision, if is_load { all_loaded } else { all_computed } / all_loaded.min(all_computed))
    }

    fn mean_over(&mut self, random: &mut SplitMix, requests: u32) -> f64 {
        let ratios = (0..requests).map(|_| self.serve(256 << random.below(8)).1);
        ratios.sum::<f64>() / f64::from(requests)
    }
}

fn found(tokens: u32, load_share: f32) -> FoundPrefix {
    FoundPrefix {
        request: 7,
        first_token: 0,
        end_token: tokens,
        dram_end_token: 0,
        is_placed: false,
        link_bytes_per_token: TOKEN_BYTES,
        stored_bytes_per_token: TOKEN_BYTES,
        queued_bytes: 0,
        drive_read_bytes: 0,
        load_share,
    }
}

/// One for which both ways are known: 1 ms a token from the drive, and so much to compute it.
fn taught(compute_ms: f64) -> World {
    let mut world = World::new(TOKEN_BYTES as f64 * 1000.0, 1000.0 / compute_ms, 1);
    world.arbiter.tell_speeds(TierSpeeds { drive_bytes_per_second: TOKEN_BYTES * 1000, ..TierSpeeds::default() });
    for step in 0..200 {
        world.serve(1024 << (step % 4));
    }
    world
}

#[test]
fn it_finds_the_faster_way_and_stays_near_it() {
    for seed in 0..40 {
        let mut random = SplitMix::new(seed);
        let drive = 1e8 * 140f64.powf(random.unit());
        let prefill = 1e3 * 100f64.powf(random.unit());
        let mut world = World::new(drive, prefill, seed);
        world.mean_over(&mut random, 180);
        let mean = world.mean_over(&mut random, 600);
        assert!(mean < 1.05, "seed {seed}: {mean} of the best at {drive} bytes/s and {prefill} tokens/s");
    }
}

#[test]
fn it_recovers_within_a_minute_when_the_drive_changes_tenfold() {
    for seed in 0..40 {
        let mut random = SplitMix::new(seed);
        let (slow, fast) = (3e8, 3e9);
        for (before, after) in [(slow, fast), (fast, slow)] {
            let mut world = World::new(before, 7e3, seed);
            world.mean_over(&mut random, 300);
            world.drive_bytes_per_s = after;
            world.mean_over(&mut random, 60);
            let mean = world.mean_over(&mut random, 100);
            assert!(mean < 1.05, "seed {seed}: {mean} of the best after a step from {before} to {after}");
        }
    }
}

#[test]
fn probes_add_little() {
    for seed in 0..20 {
        let mut random = SplitMix::new(seed);
        let mut world = World::new(1e9, 1e3 * 100f64.powf(random.unit()), seed);
        world.mean_over(&mut random, 200);
        let (mut added, mut best) = (0.0, 0.0);
        for _ in 0..2000 {
            let tokens = 256 << random.below(8);
            let (_, ratio) = world.serve(tokens);
            let best_s = world.load_s(tokens).min(world.compute_s(tokens));
            added += (ratio - 1.0) * best_s;
            best += best_s;
        }
        assert!(added < 0.03 * best, "seed {seed}: {added} s added to {best} s");
    }
}

#[test]
fn the_drive_is_looked_at_beside_requests_that_are_computed() {
    let mut world = World::new(1e8, 7e3, 1);
    let reads = (0..300).filter(|_| world.serve(4096).0.read_bytes > 0).count();
    assert!((15..60).contains(&reads), "{reads} reads in 300 s");
    let none = (0..300).filter(|_| world.serve(4096).0.choice == Choice::Load).count();
    assert_eq!(none, 0, "no request pays for it");
    // One that never ends keeps others back, for a while.
    let silent = (0..60).map(|step| {
        let decision = world.arbiter.decide(found(4096, 0.0), Duration::from_secs(1000 + step));
        u32::from(decision.read_bytes > 0)
    });
    assert_eq!(silent.sum::<u32>(), 1);
}

#[test]
fn one_stall_does_not_turn_it_away() {
    let mut world = taught(5.0);
    let decision = world.arbiter.decide(found(4096, 0.0), Duration::from_secs(300));
    assert_eq!(decision.preferred, Choice::Load);
    world.arbiter.loaded(decision.id, Duration::from_secs(200), Duration::from_secs(500));
    let decision = world.arbiter.decide(found(4096, 0.0), Duration::from_secs(501));
    assert_eq!(decision.preferred, Choice::Load);
}

#[test]
fn an_overdue_load_counts_before_it_ends() {
    let mut world = taught(5.0);
    let late = world.arbiter.decide(found(4096, 0.0), Duration::from_secs(300));
    assert_eq!(late.preferred, Choice::Load);
    // While it waits for its turn it is not late.
    assert_eq!(world.arbiter.decide(found(4096, 0.0), Duration::from_secs(330)).preferred, Choice::Load);
    world.arbiter.load_began(late.id, Duration::from_secs(330));
    assert_eq!(world.arbiter.decide(found(4096, 0.0), Duration::from_secs(331)).preferred, Choice::Load);
    let decision = world.arbiter.decide(found(4096, 0.0), Duration::from_secs(360));
    assert_eq!(decision.preferred, Choice::Recompute, "{decision}");
    world.arbiter.abandoned(late.id);
    assert_eq!(world.arbiter.decide(found(4096, 0.0), Duration::from_secs(361)).preferred, Choice::Load);
}

#[test]
fn on_a_busy_gpu_a_load_wins_that_is_slower_alone() {
    let mut world = taught(0.7);
    let now = Duration::from_secs(300);
    assert_eq!(world.arbiter.decide(found(8192, 0.0), now).preferred, Choice::Recompute);
    assert_eq!(world.arbiter.decide(found(8192, 0.6), now).preferred, Choice::Load);
}

#[test]
fn what_is_not_known_is_loaded() {
    let mut arbiter = Arbiter::new(ArbiterConfig::default());
    let second = |step: u64| Duration::from_secs(step);
    let ask = |arbiter: &mut Arbiter, step| {
        let decision = arbiter.decide(found(4096, 0.0), second(step));
        (decision.choice, decision.reason)
    };
    assert_eq!(ask(&mut arbiter, 1), (Choice::Load, Reason::NotMeasured));
    // Loading is seen to be slow, but not what computing takes.
    let decision = arbiter.decide(found(4096, 0.0), second(2));
    arbiter.loaded(decision.id, second(60), second(62));
    assert_eq!(ask(&mut arbiter, 63), (Choice::Load, Reason::NotMeasured));
    arbiter.computed(None, 0..4096, 0.0, second(1), second(64));
    assert_eq!(ask(&mut arbiter, 65), (Choice::Recompute, Reason::Faster));
    // The other way round: computing is known to be fast, loading is not known.
    let mut arbiter = Arbiter::new(ArbiterConfig::default());
    arbiter.computed(None, 0..4096, 0.0, Duration::from_millis(1), second(1));
    assert_eq!(ask(&mut arbiter, 2), (Choice::Load, Reason::NotMeasured));
}

#[test]
fn a_successor_knows_what_was_learned_and_nothing_else() {
    let world = taught(0.7);
    let mut successor = world.arbiter.successor(ArbiterConfig::default());
    assert_eq!(successor.decisions().count(), 0);
    let decision = successor.decide(found(8192, 0.0), Duration::from_secs(300));
    assert_eq!((decision.id, decision.preferred, decision.reason), (1, Choice::Recompute, Reason::Faster));
}

#[test]
fn what_workers_copy_themselves_is_loaded() {
    let mut world = taught(0.01);
    let placed = FoundPrefix { is_placed: true, dram_end_token: 1024, ..found(1024, 0.0) };
    let decision = world.arbiter.decide(placed, Duration::from_secs(300));
    assert_eq!((decision.choice, decision.reason), (Choice::Load, Reason::Placed));
    world.arbiter.set_load_policy(LoadPolicy::Never);
    assert_eq!(world.arbiter.decide(placed, Duration::from_secs(301)).choice, Choice::Recompute);
}

#[test]
fn what_is_queued_on_the_drive_counts() {
    let mut world = taught(2.0);
    let now = Duration::from_secs(300);
    assert_eq!(world.arbiter.decide(found(1024, 0.0), now).preferred, Choice::Load);
    let behind = FoundPrefix { queued_bytes: 4096 * TOKEN_BYTES, ..found(1024, 0.0) };
    assert_eq!(world.arbiter.decide(behind, now).preferred, Choice::Recompute);
    let in_dram = FoundPrefix { dram_end_token: 1024, ..behind };
    world.arbiter.tell_speeds(TierSpeeds { link_bytes_per_second: 20_000_000_000, ..TierSpeeds::default() });
    assert_eq!(world.arbiter.decide(in_dram, now).preferred, Choice::Load);
}

#[test]
fn policies_outrank_estimates_but_are_recorded_beside_them() {
    let now = Duration::from_secs(300);
    for (compute_ms, preferred) in [(5.0, Choice::Load), (0.7, Choice::Recompute)] {
        let mut world = taught(compute_ms);
        for (policy, choice, reason) in [
            (LoadPolicy::Never, Choice::Recompute, Reason::Policy),
            (LoadPolicy::Always, Choice::Load, Reason::Policy),
            (LoadPolicy::Shadow, Choice::Load, Reason::Shadow),
            (LoadPolicy::Auto, preferred, Reason::Faster),
        ] {
            world.arbiter.set_load_policy(policy);
            let decision = world.arbiter.decide(found(8192, 0.0), now);
            assert_eq!((decision.choice, decision.preferred, decision.reason), (choice, preferred, reason), "{policy}");
            let nothing = world.arbiter.decide(found(0, 0.0), now);
            assert_eq!((nothing.choice, nothing.reason), (Choice::Recompute, Reason::Nothing));
        }
    }
}

#[test]
fn decisions_are_explained_afterwards_and_mistakes_are_told() {
    let mut world = taught(5.0);
    let now = Duration::from_secs(300);
    let question = FoundPrefix { request: 42, ..found(1024, 0.5) };
    let id = world.arbiter.decide(question, now).id;
    let ended = world.arbiter.loaded(id, Duration::from_millis(1030), now).expect("it is kept");
    assert!(!ended.is_mistake(), "{ended}");
    assert!(world.arbiter.loaded(id, Duration::from_secs(9), now).is_none(), "told twice");
    let kept = world.arbiter.explain(42).expect("it is kept");
    assert_eq!((kept.id, kept.observed_load), (id, Some(Duration::from_millis(1030))));
    let text = kept.to_string();
    assert!(text.contains("load: ") && text.contains("at 50 % load") && text.contains("took 1030.0 ms"), "{text}");
    assert!(world.arbiter.explain(43).is_none());
    let id = world.arbiter.decide(question, now).id;
    assert!(world.arbiter.loaded(id, Duration::from_secs(60), now).is_some_and(|ended| ended.is_mistake()));
    // Of what was computed only the part counts that had been found.
    let mut world = taught(0.7);
    let id = world.arbiter.decide(found(1024, 0.0), now).id;
    assert!(world.arbiter.computed(Some(id), 1024..2048, 0.0, Duration::from_secs(1), now).is_none());
    let ended = world.arbiter.computed(Some(id), 0..2048, 0.0, Duration::from_secs(4), now).expect("it is kept");
    let observed = ended.observed_recompute.expect("set").as_secs_f64();
    assert!((1.9..2.1).contains(&observed) && ended.is_mistake(), "{ended}");
}

#[test]
fn names_of_policies_are_read_back() {
    for policy in LoadPolicy::ALL {
        assert_eq!(policy.to_string().parse::<LoadPolicy>().expect("known"), policy);
    }
    assert!("sometimes".parse::<LoadPolicy>().is_err());
}

#[test]
fn the_same_seed_makes_the_same_decisions() {
    let history = |seed: u64| {
        let mut world = World::new(1e9, 7e3, seed);
        (0..400u32).map(|step| world.serve(256 << (step * 7 % 8)).0).collect::<Vec<_>>()
    };
    assert_eq!(history(3), history(3));
    assert_ne!(history(3), history(4));
}

#[test]
fn memory_is_bounded_and_answers_are_sound_whatever_is_asked() {
    let seed = 5;
    let mut random = SplitMix::new(seed);
    let mut arbiter = Arbiter::new(ArbiterConfig { seed, decisions_max: 100, ..ArbiterConfig::default() });
    for step in 0..20_000u64 {
        let any = |random: &mut SplitMix| random.next() >> random.below(64);
        let question = FoundPrefix {
            request: any(&mut random),
            first_token: any(&mut random) as u32,
            end_token: any(&mut random) as u32,
            dram_end_token: any(&mut random) as u32,
            is_placed: random.below(2) == 0,
            link_bytes_per_token: any(&mut random),
            stored_bytes_per_token: any(&mut random),
            queued_bytes: any(&mut random),
            drive_read_bytes: any(&mut random),
            load_share: f32::from_bits(any(&mut random) as u32),
        };
        let now = Duration::from_millis(step * 10);
        let decision = arbiter.decide(question, now);
        let found = decision.found;
        assert!(decision.predicted_load > Duration::ZERO || found.end_token == found.first_token);
        assert!(decision.read_bytes <= READ_BYTES_MAX as u64, "step {step}: {question:?}");
        let took = Duration::from_nanos(any(&mut random));
        arbiter.load_began(decision.id, now);
        match random.below(5) {
            0 => {
                let _ended = arbiter.loaded(decision.id, took, now);
            }
            1 => {
                let tokens = found.first_token..found.end_token;
                let _ended = arbiter.computed(Some(decision.id), tokens, question.load_share, took, now);
            }
            2 => arbiter.abandoned(any(&mut random)),
            3 => arbiter.was_read(any(&mut random), any(&mut random), Some(took), now),
            _ => {}
        }
        assert!(arbiter.running.len() <= RUNNING_MAX && arbiter.decisions().count() <= 100);
    }
}
