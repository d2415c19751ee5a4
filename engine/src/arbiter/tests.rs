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

    /// One request a second after the one before; what it takes is known at once. The decision, and its time over the best.
    fn serve(&mut self, tokens: u32) -> (Decision, f64) {
        self.now_s += 1.0;
        let now = Duration::from_secs_f64(self.now_s);
        let decision = self.arbiter.decide(found(tokens, 0.0), now);
        let (load_s, compute_s) = (self.load_s(decision.load_tokens), self.compute_s(decision.computed_tokens()));
        if load_s > 0.0 {
            self.arbiter.loaded(decision.id, Duration::from_secs_f64(load_s), now);
        }
        if compute_s > 0.0 {
            let range = decision.load_tokens..tokens;
            self.arbiter.computed(Some(decision.id), range, 0.0, Duration::from_secs_f64(compute_s), now);
        }
        (decision, (load_s + compute_s) / self.load_s(tokens).min(self.compute_s(tokens)))
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
        block_tokens: 16,
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
    assert_eq!(world.arbiter.decide(found(4096, 0.0), Duration::from_secs(301)).preferred, Choice::Load);
    let decision = world.arbiter.decide(found(4096, 0.0), Duration::from_secs(330));
    assert_eq!(decision.preferred, Choice::Recompute, "{decision}");
    world.arbiter.abandoned(late.id);
    world.arbiter.abandoned(late.id + 1);
    world.arbiter.abandoned(decision.id);
    assert_eq!(world.arbiter.decide(found(4096, 0.0), Duration::from_secs(331)).preferred, Choice::Load);
}

#[test]
fn on_a_busy_gpu_a_load_wins_that_is_slower_alone() {
    let mut world = taught(0.7);
    let now = Duration::from_secs(300);
    assert_eq!(world.arbiter.decide(found(8192, 0.0), now).preferred, Choice::Recompute);
    assert_eq!(world.arbiter.decide(found(8192, 0.6), now).preferred, Choice::Load);
}

#[test]
fn nothing_is_loaded_whole_before_a_load_was_seen() {
    let mut world = World::new(1e8, 1e5, 1);
    let (decision, _) = world.serve(131_072);
    assert!(decision.load_tokens < 16_384 && decision.preferred == Choice::Recompute, "{decision}");
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
fn policies_and_shadow_mode_outrank_estimates_but_are_recorded_beside_them() {
    let mut world = taught(5.0);
    let now = Duration::from_secs(300);
    world.arbiter.set_load_policy(LoadPolicy::Never);
    let never = world.arbiter.decide(found(1024, 0.0), now);
    assert_eq!((never.load_tokens, never.preferred, never.reason), (0, Choice::Load, Reason::Policy));
    world.arbiter.set_load_policy(LoadPolicy::Always);
    assert_eq!(world.arbiter.decide(found(1024, 0.0), now).load_tokens, 1024);
    world.arbiter.set_shadow(true);
    let shadow = world.arbiter.decide(found(1024, 0.0), now);
    assert_eq!((shadow.load_tokens, shadow.preferred, shadow.reason), (0, Choice::Load, Reason::Shadow));
    let nothing = world.arbiter.decide(found(0, 0.0), now);
    assert_eq!((nothing.load_tokens, nothing.reason), (0, Reason::Nothing));
}

#[test]
fn decisions_are_explained_afterwards() {
    let mut world = taught(5.0);
    let now = Duration::from_secs(300);
    world.arbiter.set_load_policy(LoadPolicy::Always);
    let question = FoundPrefix { request: 42, ..found(1024, 0.5) };
    let id = world.arbiter.decide(question, now).id;
    world.arbiter.loaded(id, Duration::from_millis(1030), now);
    let kept = world.arbiter.explain(42).expect("it is kept");
    assert_eq!((kept.id, kept.observed_load), (id, Some(Duration::from_millis(1030))));
    let text = kept.to_string();
    assert!(text.contains("load: ") && text.contains("at 50 % load") && text.contains("took 1030.0 ms"), "{text}");
    assert!(world.arbiter.explain(43).is_none());
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
            block_tokens: any(&mut random) as u32,
            link_bytes_per_token: any(&mut random),
            stored_bytes_per_token: any(&mut random),
            queued_bytes: any(&mut random),
            drive_read_bytes: any(&mut random),
            load_share: f32::from_bits(any(&mut random) as u32),
        };
        let now = Duration::from_millis(step * 10);
        let decision = arbiter.decide(question, now);
        let found = decision.found;
        assert!(decision.load_tokens <= found.end_token - found.first_token, "step {step}: {question:?}");
        let took = Duration::from_nanos(any(&mut random));
        match random.below(4) {
            0 => arbiter.loaded(decision.id, took, now),
            1 => {
                arbiter.computed(Some(decision.id), found.first_token..found.end_token, question.load_share, took, now)
            }
            2 => arbiter.abandoned(any(&mut random)),
            _ => {}
        }
        assert!(arbiter.running.len() <= RUNNING_MAX && arbiter.decisions().count() <= 100);
    }
}
