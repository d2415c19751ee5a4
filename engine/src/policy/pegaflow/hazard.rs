//! How likely a block is to be used in the next moment, given its class and its age: proportional hazards (Cox,
//! "Regression models and life-tables", 1972) with a piecewise constant base, fitted to a sliding window of sightings.
//!
//! `hazard(class, age) = base[rhythm][age] * product of weight[feature][value]`. Each factor is the number of uses that
//! were seen over the number that the other factors expect, drawn towards its prior as if a few uses more had been seen
//! that agree with it (a gamma prior); so little evidence changes little. The fit goes through the factors in turns
//! (iterative proportional fitting), once, and starts from the last one.

use std::collections::VecDeque;

use super::age::{AGES, begin, step, width};
use super::class::{Class, FEATURES, RHYTHMS, VALUES};

/// Sightings that are remembered.
const SIGHTINGS_MAX: usize = 1 << 16;
/// The weight of priors, in uses.
const PRIOR_USES: f32 = 3.0;
const PRIOR_USES_GLOBAL: f32 = 2.0;
/// Before anything was seen: this many uses a second of the youngest, falling with age, so that the oldest leave first.
const FRESH_HAZARD: f32 = 0.1;
/// Weights and hazards stay within these bounds, so that nothing overflows.
const FACTOR_MIN: f32 = 1e-4;
const FACTOR_MAX: f32 = 1e4;
const HAZARD_MIN: f32 = 1e-9;

const NOTE_VERSION: u8 = 1;

/// What became of a block after a use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sighting {
    pub(super) class: Class,
    /// For how many seconds it was watched.
    pub(super) age: f32,
    /// Whether it was used at the end of that time.
    pub(super) is_use: bool,
}

/// The factors.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Factors {
    base: Vec<[f32; AGES]>,
    weights: [[f32; VALUES]; FEATURES],
    /// Logarithms of the weights, to base 2.
    doublings: [[f32; VALUES]; FEATURES],
}

impl Factors {
    fn fresh() -> Self {
        let falling = std::array::from_fn(|at| FRESH_HAZARD / (1.0 + begin(at) + width(at) / 2.0));
        Self { base: vec![falling; RHYTHMS], weights: [[1.0; VALUES]; FEATURES], doublings: [[0.0; VALUES]; FEATURES] }
    }

    /// To be called when weights have changed.
    fn weighed(&mut self) {
        self.doublings = self.weights.map(|weights| weights.map(f32::log2));
    }

    /// How much more likely than the base a class is to be used.
    fn multiplier(&self, class: Class) -> f32 {
        self.weights.iter().enumerate().map(|(feature, weights)| weights[class.value(feature)]).product()
    }

    /// The same as a logarithm to base 2.
    pub(super) fn doublings(&self, class: Class) -> f32 {
        self.doublings.iter().enumerate().map(|(feature, doublings)| doublings[class.value(feature)]).sum()
    }

    /// Uses a second of a rhythm, for each step of age.
    pub(super) fn base(&self, rhythm: usize) -> &[f32; AGES] {
        &self.base[rhythm % RHYTHMS]
    }
}

/// Learns the factors.
pub(super) struct Hazard {
    factors: Factors,
    /// What is believed without evidence.
    prior: Factors,
    /// Whether the prior comes from an earlier run, and says more than that hazards fall.
    has_note: bool,
    window: VecDeque<Sighting>,
}

impl Hazard {
    pub(super) fn new() -> Self {
        let fresh = Factors::fresh();
        Self { factors: fresh.clone(), prior: fresh, has_note: false, window: VecDeque::new() }
    }

    pub(super) fn factors(&self) -> &Factors {
        &self.factors
    }

    pub(super) fn add(&mut self, sighting: Sighting) {
        if self.window.len() == SIGHTINGS_MAX {
            self.window.pop_front();
        }
        self.window.push_back(sighting);
    }

    pub(super) fn sightings(&self) -> usize {
        self.window.len()
    }

    /// Fits the factors to the window and to those that are still watched. The memory that it works with, up to 3 MiB for
    /// each policy, is given back: it is needed rarely.
    pub(super) fn fit(&mut self, watched: impl Iterator<Item = Sighting>) {
        let mut seen = Vec::new();
        seen.extend(self.window.iter().copied().chain(watched).map(|sighting| Seen::new(sighting, &self.factors)));
        self.fit_base(&seen);
        let cumulative: Vec<[f32; AGES]> = self.factors.base.iter().map(cumulate).collect();
        let mut counts = [[Count::default(); VALUES]; FEATURES];
        for seen in &mut seen {
            let rhythm = seen.class.rhythm();
            seen.expected *= cumulative[rhythm][seen.step] + self.factors.base[rhythm][seen.step] * seen.in_step;
            for (feature, counts) in counts.iter_mut().enumerate() {
                let count = &mut counts[seen.class.value(feature)];
                count.sightings += 1;
                count.uses += u32::from(seen.is_use);
            }
        }
        for (feature, counts) in counts.iter().enumerate() {
            self.fit_weights(feature, &mut seen, counts);
        }
        self.factors.weighed();
    }

    fn fit_base(&mut self, seen: &[Seen]) {
        let mut uses = vec![[0.0f64; AGES]; RHYTHMS];
        let mut ends = vec![[0.0f64; AGES]; RHYTHMS];
        let mut time = vec![[0.0f64; AGES]; RHYTHMS];
        for seen in seen {
            let (rhythm, at) = (seen.class.rhythm(), seen.step);
            ends[rhythm][at] += f64::from(seen.expected);
            time[rhythm][at] += f64::from(seen.expected * seen.in_step);
            uses[rhythm][at] += f64::from(u8::from(seen.is_use));
        }
        // Who ended in a later step has been through all of the earlier ones.
        for (time, ends) in time.iter_mut().zip(&ends) {
            let mut later = 0.0;
            for at in (0..AGES).rev() {
                time[at] += later * f64::from(width(at));
                later += ends[at];
            }
        }
        for at in 0..AGES {
            let sum = |of: &[[f64; AGES]]| of.iter().map(|rhythm| rhythm[at]).sum::<f64>() as f32;
            let prior = Factors::fresh().base[0][at];
            let shared = (sum(&uses) + PRIOR_USES_GLOBAL) / (sum(&time) + PRIOR_USES_GLOBAL / prior);
            for rhythm in 0..RHYTHMS {
                let prior = if self.has_note { self.prior.base[rhythm][at] } else { shared };
                let own = (uses[rhythm][at] as f32 + PRIOR_USES) / (time[rhythm][at] as f32 + PRIOR_USES / prior);
                self.factors.base[rhythm][at] = own.max(HAZARD_MIN);
            }
        }
    }

    fn fit_weights(&mut self, feature: usize, seen: &mut [Seen], counts: &[Count; VALUES]) {
        let weights = &mut self.factors.weights[feature];
        // Two sums of each, in turns, so that the next need not wait for the last.
        let mut expected = [[0.0f64; VALUES]; 2];
        for (at, seen) in seen.iter().enumerate() {
            expected[at % 2][seen.class.value(feature)] += f64::from(seen.expected);
        }
        let mut fitted = [1.0; VALUES];
        for value in 0..VALUES {
            let prior = self.prior.weights[feature][value];
            let expected = (expected[0][value] + expected[1][value]) as f32 / weights[value];
            fitted[value] = (counts[value].uses as f32 + PRIOR_USES) / (expected + PRIOR_USES / prior);
        }
        // Only ratios of weights mean anything: their mean stays at one, so that the base is that of the common block.
        let mean = (0..VALUES).map(|value| counts[value].sightings as f32 * fitted[value].ln()).sum::<f32>()
            / seen.len().max(1) as f32;
        let mut changes = [1.0; VALUES];
        for value in 0..VALUES {
            let normal = (fitted[value] / mean.exp()).clamp(FACTOR_MIN, FACTOR_MAX);
            changes[value] = normal / weights[value];
            weights[value] = normal;
        }
        for seen in seen {
            seen.expected *= changes[seen.class.value(feature)];
        }
    }

    /// What was learned, for a later run.
    pub(super) fn note(&self) -> Vec<u8> {
        let factors = self.factors.base.iter().flatten().chain(self.factors.weights.iter().flatten());
        std::iter::once(NOTE_VERSION).chain(factors.flat_map(|factor| factor.to_le_bytes())).collect()
    }

    /// Believes the note of an earlier run until there is newer evidence. False, and nothing changed, if it is not one.
    pub(super) fn restore(&mut self, note: &[u8]) -> bool {
        let Some((&NOTE_VERSION, bytes)) = note.split_first() else { return false };
        let (numbers, rest) = bytes.as_chunks::<4>();
        if numbers.len() != RHYTHMS * AGES + FEATURES * VALUES || !rest.is_empty() {
            return false;
        }
        let mut numbers = numbers.iter().map(|number| f32::from_le_bytes(*number));
        let mut factors = Factors::fresh();
        let places = factors.base.iter_mut().flatten().map(|place| (place, HAZARD_MIN));
        for (place, least) in places.chain(factors.weights.iter_mut().flatten().map(|place| (place, FACTOR_MIN))) {
            let Some(number) = numbers.next().filter(|number| number.is_finite()) else { return false };
            *place = number.clamp(least, FACTOR_MAX);
        }
        factors.weighed();
        (self.factors, self.prior, self.has_note) = (factors.clone(), factors, true);
        true
    }
}

/// A sighting with its age taken apart.
struct Seen {
    class: Class,
    step: usize,
    /// Seconds since the step began.
    in_step: f32,
    /// The multiplier of its class; once the base is known, how many uses were to be expected.
    expected: f32,
    is_use: bool,
}

impl Seen {
    fn new(sighting: Sighting, factors: &Factors) -> Self {
        let step = step(sighting.age);
        let in_step = (sighting.age - begin(step)).clamp(0.0, width(step));
        let expected = factors.multiplier(sighting.class);
        Self { class: sighting.class, step, in_step, expected, is_use: sighting.is_use }
    }
}

/// Of the sightings with one value of a feature.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    sightings: u32,
    uses: u32,
}

/// Expected uses before each step begins.
fn cumulate(base: &[f32; AGES]) -> [f32; AGES] {
    let mut sum = 0.0;
    std::array::from_fn(|at| {
        let before = sum;
        sum += base[at] * width(at);
        before
    })
}

#[cfg(test)]
mod tests;
