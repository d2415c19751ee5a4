//! What a place in the tier is worth to a block: expected uses per second of occupation, if it is kept for the best length
//! of time. This is the Gittins index (Gittins, "Bandit processes and dynamic allocation indices", 1979) of a renewal
//! process, and where the hazard only falls it is the hazard itself. Beside the hazard it sees what is to come: a reader
//! needs a minute before the next question, so a block is not thrown away in its first ten seconds. Least hit density
//! (Beckmann and others, "LHD", NSDI 2018) is its nearest relative.

use super::age::{AGES, step, width};
use super::class::{Class, RHYTHMS};
use super::hazard::Factors;

/// Steps of the multiplier, four to a doubling.
const STEPS: usize = 80;
const STEPS_PER_DOUBLING: f32 = 4.0;
const STEP_OF_ONE: f32 = 48.0;

/// The index for each rhythm, multiplier and age, worked out when it is first asked for.
pub(super) struct Worth {
    table: Vec<[f32; AGES]>,
    is_known: Vec<bool>,
}

impl Worth {
    pub(super) fn new() -> Self {
        Self { table: vec![[0.0; AGES]; RHYTHMS * STEPS], is_known: vec![false; RHYTHMS * STEPS] }
    }

    /// The factors have changed.
    pub(super) fn forget(&mut self) {
        self.is_known.fill(false);
    }

    /// The index of a block of that class and age in seconds.
    pub(super) fn of(&mut self, factors: &Factors, class: Class, age: f32) -> f32 {
        // Rounded, since it is not negative.
        let place = factors.doublings(class) * STEPS_PER_DOUBLING + STEP_OF_ONE + 0.5;
        let place = (place.max(0.0) as usize).min(STEPS - 1);
        let row = class.rhythm() * STEPS + place;
        if !self.is_known[row] {
            let multiplier = ((place as f32 - STEP_OF_ONE) / STEPS_PER_DOUBLING).exp2();
            self.table[row] = indices(factors.base(class.rhythm()), multiplier);
            self.is_known[row] = true;
        }
        self.table[row][step(age)]
    }
}

/// The index at the beginning of each step.
fn indices(base: &[f32; AGES], multiplier: f32) -> [f32; AGES] {
    // For each step: the chance to be used in it, and the time spent in it, of those that reach it.
    let steps: [(f32, f32); AGES] = std::array::from_fn(|at| {
        let hazard = base[at] * multiplier;
        let used = -(-hazard * width(at)).exp_m1();
        (used, used / hazard)
    });
    std::array::from_fn(|from| {
        let (mut reach, mut uses, mut time, mut best) = (1.0f32, 0.0, 0.0, 0.0f32);
        for (used, spent) in &steps[from..] {
            uses += reach * used;
            time += reach * spent;
            best = best.max(uses / time);
            reach *= 1.0 - used;
        }
        best
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::pegaflow::age::begin;

    #[test]
    fn a_falling_hazard_is_its_own_index() {
        let falling = std::array::from_fn(|at| 0.1 / (1.0 + begin(at)));
        for (at, index) in indices(&falling, 2.0).into_iter().enumerate().take(AGES - 1) {
            let hazard = 2.0 * falling[at];
            assert!((index / hazard - 1.0).abs() < 1e-3, "step {at}: {index} for {hazard}");
        }
    }

    #[test]
    fn what_is_to_come_counts_before_it_comes() {
        // Nothing for a minute, then a use within seconds.
        let late = std::array::from_fn(|at| if (60.0..120.0).contains(&begin(at)) { 1.0 } else { 1e-9 });
        let index = indices(&late, 1.0);
        let after = |age: f32| index[step(age)];
        assert!(after(0.0) > 0.01 && after(30.0) > after(0.0) && after(200.0) < 1e-6, "{index:?}");
    }
}
