use super::*;
use crate::policy::SplitMix;
use crate::policy::pegaflow::class::Evidence;

fn class(turn: u32, tenant: u64) -> Class {
    Class::new(&Evidence { gap: None, turn, blocks_after: 1, uses: 0, new_blocks: 4, blocks: 8, tenant })
}

/// Blocks with a constant hazard each, watched for at most a thousand seconds.
fn seen(hazard: &mut Hazard, class: Class, rate: f64, random: &mut SplitMix, sightings: usize) {
    for _ in 0..sightings {
        let age = -(1.0 - random.unit()).ln() / rate;
        hazard.add(Sighting { class, age: age.min(1000.0) as f32, is_use: age < 1000.0 });
    }
}

#[test]
fn the_fit_finds_the_hazards_that_were_there() {
    let mut random = SplitMix::new(3);
    let mut hazard = Hazard::new();
    let rates = [(1, 0, 0.001), (2, 0, 0.004), (1, 1, 0.01), (2, 1, 0.04)];
    for (turn, tenant, rate) in rates {
        seen(&mut hazard, class(turn, tenant), rate, &mut random, 4000);
    }
    for _ in 0..5 {
        hazard.fit(std::iter::empty());
    }
    for (turn, tenant, rate) in rates {
        let class = class(turn, tenant);
        let at = step((0.3 / rate) as f32);
        let fitted = hazard.factors().multiplier(class) * hazard.factors().base(class.rhythm())[at];
        assert!((f64::from(fitted) / rate).ln().abs() < 0.3, "turn {turn}, tenant {tenant}: {fitted} for {rate}");
    }
}

#[test]
fn without_evidence_hazards_only_fall_and_all_are_equal() {
    let mut hazard = Hazard::new();
    hazard.fit(std::iter::empty());
    let base = hazard.factors().base(0);
    assert!(base.windows(2).all(|pair| pair[1] < pair[0]));
    assert_eq!(hazard.factors().multiplier(class(5, 3)), 1.0);
}

#[test]
fn those_still_watched_count_as_not_used() {
    let mut random = SplitMix::new(3);
    let mut hazard = Hazard::new();
    seen(&mut hazard, class(1, 0), 0.1, &mut random, 500);
    let waiting = || std::iter::repeat_n(Sighting { class: class(2, 0), age: 500.0, is_use: false }, 500);
    hazard.fit(waiting());
    hazard.fit(waiting());
    assert!(hazard.factors().multiplier(class(2, 0)) < 0.2 * hazard.factors().multiplier(class(1, 0)));
}

#[test]
fn a_note_is_read_as_it_was_written_and_a_damaged_one_is_refused() {
    let mut random = SplitMix::new(3);
    let mut hazard = Hazard::new();
    seen(&mut hazard, class(1, 0), 0.1, &mut random, 500);
    hazard.fit(std::iter::empty());
    let note = hazard.note();
    let mut later = Hazard::new();
    assert!(later.restore(&note));
    assert_eq!(later.factors(), hazard.factors());
    let mut poisoned = note.clone();
    poisoned[1..5].copy_from_slice(&f32::NAN.to_le_bytes());
    let before = later.factors().clone();
    assert!(!later.restore(&poisoned) && !later.restore(&note[1..]) && !later.restore(&note[..note.len() - 1]));
    assert_eq!(later.factors(), &before);
}
