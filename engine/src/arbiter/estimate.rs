//! Learns `seconds = a * x + b * y` while it is used: least squares of relative errors over what was seen lately. A single
//! surprise moves it little; a second one of the same sign makes it forget what was before. Nothing is lost by waiting:
//! evidence fades only when there is newer.

/// Evidence counts half after so long, where there is newer.
const HALF_LIFE_S: f64 = 60.0;
/// So many samples count at most.
const WINDOW: f64 = 60.0;
/// From this factor on a sample is a surprise, or from three standard deviations on, if they are more; but always from
/// the larger factor on.
pub(super) const SURPRISE: f64 = 1.5;
const SURPRISE_MAX: f64 = 2.5;
const DEVIATIONS: f64 = 3.0;
/// Of the mean deviation, to a standard deviation of normal noise.
const TO_STANDARD: f64 = 1.25;
/// The share of the newest sample in what is known of noise.
const NOISE_GAIN: f64 = 0.05;
/// A term that contributes less than this to a sample may still be moved as if it contributed so much.
const SHARE_MIN: f64 = 0.005;
/// Below this share a term cannot be what has changed.
const JUMP_SHARE_MIN: f64 = 0.2;

/// What was seen: the two quantities and the time they took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub(super) x: [f64; 2],
    pub(super) seconds: f64,
}

impl Sample {
    fn since_s(&self, now_s: f64) -> f64 {
        now_s - self.seconds
    }
}

/// How a sample was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is as expected, more or less.
    Usual,
    /// It is far from what was expected, for the first time: another is wanted soon.
    Surprise,
    /// The second surprise of the same sign: what was known before is forgotten.
    Changed,
}

#[derive(Debug, Clone)]
pub(super) struct TwoTerm {
    terms: [f64; 2],
    floors: [f64; 2],
    /// How much each resists being moved where samples do not tell them apart.
    stiffness: [f64; 2],
    /// The normal equations: `[aa, ab, bb]` and the right side.
    matrix: [f64; 3],
    right: [f64; 2],
    doubt: Option<Sample>,
    samples: u64,
    /// Somebody has told a term: it is more than a guess.
    is_told: bool,
    seen_s: f64,
    /// When the first of the surprises began that made it forget: what began before says nothing.
    changed_s: f64,
    doubt_since_s: f64,
    /// The mean deviation of the logarithm from what was expected.
    deviation: f64,
}

impl TwoTerm {
    pub(super) fn new(terms: [f64; 2], floors: [f64; 2], stiffness: [f64; 2]) -> Self {
        Self {
            terms,
            floors,
            stiffness,
            matrix: [0.0; 3],
            right: [0.0; 2],
            doubt: None,
            samples: 0,
            is_told: false,
            seen_s: f64::NEG_INFINITY,
            changed_s: f64::NEG_INFINITY,
            doubt_since_s: f64::NEG_INFINITY,
            deviation: 0.0,
        }
    }

    pub(super) fn predict(&self, x: [f64; 2]) -> f64 {
        self.terms[0] * x[0] + self.terms[1] * x[1]
    }

    pub(super) fn terms(&self) -> [f64; 2] {
        self.terms
    }

    /// Whether it knows more than it was told at the start.
    pub(super) fn has_samples(&self) -> bool {
        self.samples > 0
    }

    /// When the last sample came.
    pub(super) fn seen_s(&self) -> f64 {
        self.seen_s
    }

    /// What began before this says nothing.
    pub(super) fn changed_s(&self) -> f64 {
        self.changed_s
    }

    /// Whether the last sample was a surprise that waits for a second one.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    /// Takes another value for one term on somebody else's word.
    pub(super) fn believe(&mut self, term: usize, value: f64) {
        self.terms[term] = value.max(self.floors[term]);
        self.is_told = true;
        self.forget();
    }

    /// Takes in a sample that counts `weight`, from 0 to 1.
    pub(super) fn observe(&mut self, sample: Sample, weight: f64, now_s: f64) -> Taken {
        let expected = self.predict(sample.x);
        let is_number = sample.seconds.is_finite() && sample.seconds > 0.0 && expected > 0.0;
        if !is_number || !sample.x.iter().all(|x| x.is_finite() && *x >= 0.0) {
            return Taken::Usual;
        }
        let since_s = sample.since_s(now_s);
        if since_s < self.changed_s {
            return Taken::Usual;
        }
        let fade = if self.samples == 0 { 1.0 } else { 0.5f64.powf((now_s - self.seen_s).max(0.0) / HALF_LIFE_S) };
        self.fade(fade * (1.0 - 1.0 / WINDOW));
        self.seen_s = now_s;
        self.samples += 1;
        let ratio = sample.seconds / expected;
        let surprise = (DEVIATIONS * TO_STANDARD * self.deviation).exp().clamp(SURPRISE, SURPRISE_MAX);
        if self.samples > 1 {
            self.deviation += NOISE_GAIN * (ratio.ln().abs().min(SURPRISE.ln()) - self.deviation);
        }
        let taken = if self.samples == 1 {
            if !self.is_told && !(1.0 / surprise..=surprise).contains(&ratio) {
                // What was before is a guess.
                self.jump(ratio, sample.x);
            }
            self.add(sample, 1.0, sample.seconds);
            Taken::Usual
        } else if (1.0 / surprise..=surprise).contains(&ratio) {
            self.doubt = None;
            self.add(sample, weight, expected);
            Taken::Usual
        } else if let Some(first) = self.doubt.take().filter(|first| is_same_side(self.predict(first.x), *first, ratio))
        {
            self.changed_s = self.doubt_since_s.min(since_s);
            let off = (ratio * first.seconds / self.predict(first.x)).sqrt();
            self.forget();
            self.jump(off, sample.x);
            self.add(first, 1.0, first.seconds);
            self.add(sample, 1.0, sample.seconds);
            Taken::Changed
        } else {
            self.doubt = Some(sample);
            self.doubt_since_s = since_s;
            let clipped = Sample { seconds: expected * ratio.clamp(1.0 / surprise, surprise), ..sample };
            self.add(clipped, weight, expected);
            Taken::Surprise
        };
        self.solve(sample.x);
        taken
    }

    /// Everything takes `off` times as long: because of the second term if it resists less and matters there.
    fn jump(&mut self, off: f64, x: [f64; 2]) {
        let second = self.terms[1] * x[1];
        if self.stiffness[0] > self.stiffness[1] && second > JUMP_SHARE_MIN * self.predict(x) {
            let moved = self.terms[1] + (off - 1.0) * self.predict(x) / x[1];
            self.terms[1] = moved.max(self.terms[1] * off / 2.0).max(self.floors[1]);
        } else {
            let first = (off * self.predict(x) - second) / x[0].max(f64::MIN_POSITIVE);
            let is_first = self.stiffness[0] > self.stiffness[1] && first > self.floors[0];
            self.terms = if is_first {
                [first, self.terms[1]]
            } else {
                [0, 1].map(|term| (self.terms[term] * off).max(self.floors[term]))
            };
        }
    }

    fn fade(&mut self, factor: f64) {
        self.matrix.iter_mut().chain(&mut self.right).for_each(|sum| *sum *= factor);
    }

    fn forget(&mut self) {
        self.fade(0.0);
        self.doubt = None;
    }

    fn add(&mut self, sample: Sample, weight: f64, scale: f64) {
        let weight = weight / (scale * scale);
        let [x, y] = sample.x;
        self.matrix[0] += weight * x * x;
        self.matrix[1] += weight * x * y;
        self.matrix[2] += weight * y * y;
        self.right[0] += weight * x * sample.seconds;
        self.right[1] += weight * y * sample.seconds;
    }

    /// The least squares near the terms of before: each resists in proportion to what it contributes at `x`.
    fn solve(&mut self, x: [f64; 2]) {
        let before = self.terms;
        let expected = self.predict(x);
        let resists = |term: usize| {
            let share = if x[term] > 0.0 { SHARE_MIN * expected / x[term] } else { f64::INFINITY };
            let scale = if share.is_finite() { before[term].max(share) } else { before[term] };
            self.stiffness[term] / (scale * scale)
        };
        let resistance = [resists(0), resists(1)];
        let [aa, ab, bb] = [self.matrix[0] + resistance[0], self.matrix[1], self.matrix[2] + resistance[1]];
        let right = [0, 1].map(|term| self.right[term] + resistance[term] * before[term]);
        let determinant = aa * bb - ab * ab;
        if determinant.is_nan() || determinant <= 0.0 {
            return;
        }
        let solved = [(right[0] * bb - right[1] * ab) / determinant, (right[1] * aa - right[0] * ab) / determinant];
        self.terms = match [solved[0] < self.floors[0], solved[1] < self.floors[1]] {
            [true, _] => [self.floors[0], ((right[1] - ab * self.floors[0]) / bb).max(self.floors[1])],
            [_, true] => [((right[0] - ab * self.floors[1]) / aa).max(self.floors[0]), self.floors[1]],
            _ => solved,
        };
    }
}

/// Whether the first surprise still is one, of the same sign as the ratio of the second.
fn is_same_side(expected: f64, first: Sample, ratio: f64) -> bool {
    (first.seconds / expected > 1.0) == (ratio > 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive() -> TwoTerm {
        TwoTerm::new([0.005, 1e-9], [1e-5, 1e-12], [0.3, 0.1])
    }

    fn sample(bytes: f64, per_byte: f64) -> Sample {
        Sample { x: [1.0, bytes], seconds: 0.002 + bytes * per_byte }
    }

    #[test]
    fn it_finds_both_terms() {
        let mut estimate = drive();
        for step in 0..60u32 {
            estimate.observe(sample(1e6 * f64::from(1 << (step % 10)), 4e-10), 1.0, f64::from(step));
        }
        let [fixed, per_byte] = estimate.terms();
        assert!((fixed - 0.002).abs() < 2e-4 && (per_byte - 4e-10).abs() < 2e-11, "{fixed} {per_byte}");
    }

    #[test]
    fn one_surprise_moves_it_little_and_two_convince_it() {
        let mut estimate = drive();
        for step in 0..30u32 {
            assert_eq!(estimate.observe(sample(1e9, 1e-9), 1.0, f64::from(step)), Taken::Usual);
        }
        let before = estimate.predict([1.0, 1e9]);
        assert_eq!(estimate.observe(sample(1e9, 1e-7), 1.0, 30.0), Taken::Surprise);
        let after = estimate.predict([1.0, 1e9]);
        assert!(after < before * 1.05, "{before} {after}");
        assert!(estimate.is_in_doubt());
        assert_eq!(estimate.observe(sample(1e9, 1e-8), 1.0, 31.0), Taken::Changed);
        let changed = estimate.predict([1.0, 1e9]);
        assert!(changed > 8.0 * before, "{before} {changed}");
        for step in 0..3u32 {
            estimate.observe(sample(1e9, 1e-9), 1.0, 32.0 + f64::from(step));
        }
        let back = estimate.predict([1.0, 1e9]);
        assert!((back / before - 1.0).abs() < 0.1, "{before} {back}");
    }

    #[test]
    fn the_first_sample_outweighs_a_guess_but_not_what_was_told() {
        let mut estimate = drive();
        estimate.observe(sample(1e9, 1e-7), 1.0, 1.0);
        assert!(estimate.predict([1.0, 1e9]) > 90.0, "{:?}", estimate.terms());
        let mut estimate = drive();
        estimate.believe(1, 1e-9);
        estimate.observe(sample(1e9, 1e-7), 1.0, 1.0);
        assert!(estimate.predict([1.0, 1e9]) < 3.0, "{:?}", estimate.terms());
    }

    #[test]
    fn small_samples_do_not_make_up_a_slope() {
        let mut estimate = drive();
        for step in 0..20u32 {
            estimate.observe(sample(1e9, 1e-9), 1.0, f64::from(step));
        }
        for step in 0..20u32 {
            let jitter = if step % 2 == 0 { 1.1 } else { 0.9 };
            let small = sample(1e4, 1e-9);
            estimate.observe(Sample { seconds: small.seconds * jitter, ..small }, 1.0, f64::from(20 + step));
        }
        let slope = estimate.terms()[1];
        assert!((slope - 1e-9).abs() < 1e-10, "{slope}");
    }

    #[test]
    fn nonsense_is_ignored() {
        let mut estimate = drive();
        for seconds in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            estimate.observe(Sample { x: [1.0, 1e9], seconds }, 1.0, 1.0);
        }
        estimate.observe(Sample { x: [f64::NAN, 1.0], seconds: 1.0 }, 1.0, 1.0);
        assert!(!estimate.has_samples());
        assert_eq!(estimate.terms(), [0.005, 1e-9]);
    }
}
