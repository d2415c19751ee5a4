//! How long the engine takes to compute a range of tokens: so much a token, and so much for each token it attends to,
//! stretched by what the GPU does for others.

use std::ops::Range;

use super::estimate::{SURPRISE, Sample, Taken, TwoTerm};

/// A GPU that is wanted wholly by others still gives a request this share.
const SHARE_LEFT_MIN: f64 = 0.05;
/// What is known of stretching is kept for each tenth of load.
const KNOTS: usize = 11;
/// The share of a sample in a knot: at first, and after many.
const GAIN_FIRST: f64 = 0.3;
const GAIN_LAST: f64 = 0.08;
/// So many samples halve the first gain.
const GAIN_HALVED: f64 = 5.0;
const STRETCH_LN_MAX: f64 = 5.0;

#[derive(Debug, Clone)]
pub(super) struct ComputeTime {
    /// By token, and by token attended to, on an idle GPU.
    alone: TwoTerm,
    /// The logarithm of how much longer it takes, by load. At first as if everybody got an equal share.
    stretched: [f64; KNOTS],
    /// How many samples each knot has, since the last change.
    samples: [f64; KNOTS],
}

impl ComputeTime {
    pub(super) fn new() -> Self {
        let shared = |knot: usize| -(1.0 - knot as f64 / (KNOTS - 1) as f64).max(SHARE_LEFT_MIN).ln();
        Self {
            alone: TwoTerm::new([1e-4, 2e-9], [1e-8, 1e-16], [0.2, 0.2]),
            stretched: std::array::from_fn(shared),
            samples: [0.0; KNOTS],
        }
    }

    pub(super) fn predict(&self, tokens: &Range<u32>, load_share: f64) -> f64 {
        self.alone.predict(work(tokens)) * self.stretch(load_share)
    }

    pub(super) fn alone(&self) -> &TwoTerm {
        &self.alone
    }

    pub(super) fn observe(&mut self, tokens: &Range<u32>, load_share: f64, seconds: f64, now_s: f64) -> Taken {
        let stretch = self.stretch(load_share);
        let ratio = seconds / self.predict(tokens, load_share);
        // A busy GPU says less of how fast an idle one is.
        let weight = (1.0 - load_share).max(0.3);
        let sample = Sample { x: work(tokens), seconds: seconds / stretch };
        let taken = self.alone.observe(sample, weight, now_s);
        if ratio.is_finite() && ratio > 0.0 {
            if taken == Taken::Changed {
                self.samples = [0.0; KNOTS];
            }
            let off = ratio.clamp(1.0 / SURPRISE, SURPRISE).ln();
            for (knot, share) in knots(load_share).into_iter().filter(|(knot, _)| *knot > 0) {
                let gain = (GAIN_FIRST / (1.0 + self.samples[knot] / GAIN_HALVED)).max(GAIN_LAST);
                self.samples[knot] += share;
                self.stretched[knot] = (self.stretched[knot] + share * gain * off).clamp(-1.0, STRETCH_LN_MAX);
            }
        }
        taken
    }

    /// Between two tenths of load in proportion.
    fn stretch(&self, load_share: f64) -> f64 {
        knots(load_share).into_iter().map(|(knot, share)| share * self.stretched[knot]).sum::<f64>().exp()
    }
}

/// The two knots next to a load, and how near it is to each.
fn knots(load_share: f64) -> [(usize, f64); 2] {
    let place = load_share.clamp(0.0, 1.0) * (KNOTS - 1) as f64;
    let below = (place as usize).min(KNOTS - 2);
    let share = place - below as f64;
    [(below, 1.0 - share), (below + 1, share)]
}

fn work(tokens: &Range<u32>) -> [f64; 2] {
    let (first, end) = (f64::from(tokens.start), f64::from(tokens.end));
    [end - first, (end * end - first * first) / 2.0]
}
