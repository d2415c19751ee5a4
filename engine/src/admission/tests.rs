use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const HOUR_MS: u64 = 3_600_000;

struct SetClock(Arc<AtomicU64>);

impl Clock for SetClock {
    fn unix_ms(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

fn admission(bytes_per_day: Option<u64>, note: Option<&[u8]>, now: &Arc<AtomicU64>) -> Admission {
    Admission::new(bytes_per_day, note, Box::new(SeenBefore::new()), Box::new(SetClock(Arc::clone(now))))
}

fn offer(fingerprint: u64) -> Offer {
    Offer { fingerprint, has_parent: true, worth: None }
}

fn written(written_bytes: u64) -> WriteVolume {
    WriteVolume { written_bytes, queued_bytes: 0 }
}

#[test]
fn the_emptier_the_budget_the_more_often_a_block_must_have_been_seen() {
    let mut policy = SeenBefore::new();
    let mut sights_needed =
        |fingerprint: u64, fill: f64| (1..=20).find(|_| policy.admit(&offer(fingerprint), fill).is_ok());
    assert_eq!(sights_needed(1, 1.0), Some(1));
    assert_eq!(sights_needed(2, 0.5), Some(1));
    assert_eq!(sights_needed(3, 0.49), Some(2));
    assert_eq!(sights_needed(4, 0.2), Some(3));
    assert_eq!(sights_needed(5, 0.001), Some(4));
    assert_eq!(sights_needed(6, 0.0), None);
    assert_eq!(sights_needed(7, -3.0), None);
    // Seen while nothing could be spent counts afterwards.
    assert_eq!(sights_needed(7, 0.001), Some(1));
    assert_eq!(policy.admit(&Offer { has_parent: false, ..offer(8) }, 1.0), Err(Refusal::Ancestor));
    assert!(policy.admit(&offer(8), 0.4).is_ok(), "seen twice");
    for fingerprint in 100..200_000 {
        assert_eq!(policy.admit(&offer(fingerprint), 0.4), Err(Refusal::Unproven));
    }
    assert_eq!(policy.ghosts.len(), GHOSTS_MAX.get());
}

#[test]
fn without_a_budget_everything_is_admitted_and_counted() {
    let now = Arc::new(AtomicU64::new(HOUR_MS * 1000));
    let admission = admission(None, None, &now);
    let orphan = Offer { has_parent: false, ..offer(1) };
    assert!(admission.offer(&orphan, written(100 * GIB)).0.is_ok());
    assert_eq!(admission.status(written(101 * GIB)), BudgetStatus { bytes_per_day: 0, spent_day_bytes: 101 * GIB });
}

#[test]
fn bytes_on_their_way_and_bytes_of_others_count() {
    let now = Arc::new(AtomicU64::new(HOUR_MS * 1000));
    let admission = admission(Some(24 * GIB), None, &now);
    assert!(admission.offer(&offer(1), WriteVolume { written_bytes: 0, queued_bytes: GIB / 2 }).0.is_ok());
    let queued = WriteVolume { written_bytes: 0, queued_bytes: GIB };
    assert_eq!(admission.offer(&offer(2), queued).0, Err(Refusal::Budget));
    // Objects, tombstones, records written again: whatever the store wrote.
    assert_eq!(admission.offer(&offer(3), written(GIB)).0, Err(Refusal::Budget));
    assert_eq!(admission.refused_budget.get(), 2);
    now.fetch_add(HOUR_MS, Ordering::Relaxed);
    assert!(admission.offer(&offer(3), written(GIB)).0.is_ok());
    assert_eq!(admission.status(written(GIB)), BudgetStatus { bytes_per_day: 24 * GIB, spent_day_bytes: GIB });
}

/// A day of more blocks than the budget allows, with restarts and crashes: never more than the budget and one burst, and
/// what is written is what is asked for again.
#[test]
fn the_budget_holds_over_restarts_and_goes_to_what_is_reused() {
    const BLOCK: u64 = 2 * MIB;
    let budget = 24 * GIB;
    let now = Arc::new(AtomicU64::new(HOUR_MS * 1000));
    let mut rng = SmallRng::seed_from_u64(11);
    let (mut total, mut since_open, mut note) = (0, 0, None);
    let (mut written_sights, mut refused_sights, mut seen) = ((0u64, 0u64), (0u64, 0u64), HashMap::new());
    let mut gate = admission(Some(budget), None, &now);
    for step in 0..200_000u64 {
        now.fetch_add(432, Ordering::Relaxed);
        if step % 20_000 == 19_999 {
            // In order, or not.
            if step % 40_000 == 19_999 {
                note = Some(gate.last_note(written(since_open)));
            }
            gate = admission(Some(budget), note.as_deref(), &now);
            since_open = 0;
        }
        // One in four is one of 2,000 that come again and again.
        let fingerprint = if rng.random_ratio(1, 4) { rng.random_range(1..2000) } else { step + 1_000_000 };
        let (verdict, due) = gate.offer(&offer(fingerprint), written(since_open));
        note = due.or(note);
        let sights = seen.entry(fingerprint).or_insert(0u64);
        *sights += 1;
        if verdict.is_ok() {
            total += BLOCK;
            since_open += BLOCK;
            written_sights = (written_sights.0 + *sights, written_sights.1 + 1);
        } else {
            refused_sights = (refused_sights.0 + *sights, refused_sights.1 + 1);
        }
    }
    // 200,000 steps of 432 ms are a day; a burst is an hour's worth.
    assert!(total <= budget + budget / 24 + BLOCK, "{total} bytes of {budget}");
    assert!(total >= budget * 9 / 10, "{total} bytes of {budget}: what may be spent is spent");
    let mean = |(sum, count): (u64, u64)| sum as f64 / count as f64;
    println!("sights of a block: {:.1} if written, {:.1} if refused", mean(written_sights), mean(refused_sights));
    assert!(mean(written_sights) > 2.0 * mean(refused_sights));
}

#[test]
fn with_a_short_budget_the_blocks_that_are_worth_most_need_not_be_seen_twice() {
    let mut policy = ByWorth::new();
    let mut rng = SmallRng::seed_from_u64(3);
    // Worth from 1/256 to 1, evenly over its logarithm.
    let mut admitted_at = |fill: f64| {
        let (mut sum, mut count) = (0.0, 0);
        for _ in 0..4000 {
            let doublings = rng.random_range(-8.0f32..0.0);
            let offer = Offer { worth: Some(doublings.exp2()), ..offer(rng.random()) };
            if policy.admit(&offer, fill).is_ok() {
                (sum, count) = (sum + f64::from(doublings), count + 1);
            }
        }
        (sum / f64::from(count.max(1)), f64::from(count) / 4000.0)
    };
    let (_, all) = admitted_at(0.6);
    assert_eq!(all, 1.0);
    let (mean, share) = admitted_at(0.2);
    assert!((0.3..0.45).contains(&share) && mean > -2.0, "{share} of them, {mean}");
    let (mean, share) = admitted_at(0.05);
    assert!((0.03..0.15).contains(&share) && mean > -0.6, "{share} of them, {mean}");
    assert_eq!(admitted_at(0.0).1, 0.0);
    let orphan = Offer { has_parent: false, worth: Some(100.0), ..offer(1) };
    assert_eq!(policy.admit(&orphan, 0.4), Err(Refusal::Ancestor));
    // All alike: then nobody is among the best, and only those that were seen before are written.
    let mut policy = ByWorth::new();
    let alike = |fingerprint| Offer { worth: Some(0.5), ..offer(fingerprint) };
    assert!((1..2000).all(|fingerprint| policy.admit(&alike(fingerprint), 0.4) == Err(Refusal::Unproven)));
    assert!(policy.admit(&alike(1), 0.4).is_ok());
}
