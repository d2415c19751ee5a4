//! How long the engine takes to compute a range of tokens: so much a token, and so much for each token it attends to,
//! stretched by what the GPU does for others.

use std::ops::Range;

use super::estimate::{SURPRISE, Sample, Taken, TwoTerm};

/// A GPU that is wanted wholly by others still gives a request this share.
const SHARE_LEFT_MIN: f64 = 0.05;
/// What is known of stretching is kept by load, in tenths.
const LOADS: usize = 11;
const GAIN: f64 = 0.15;

#[derive(Debug, Clone)]
pub(super) struct ComputeTime {
    /// By token, and by token attended to, on an idle GPU.
    alone: TwoTerm,
    /// By load: how much longer it took than `1 / (1 - load)` says.
    stretched: [f64; LOADS],
}

impl ComputeTime {
    pub(super) fn new() -> Self {
        Self { alone: TwoTerm::new([1e-4, 2e-9], [1e-8, 1e-16], [0.2, 0.2]), stretched: [1.0; LOADS] }
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
        let bucket = bucket(load_share);
        if bucket > 0 && ratio.is_finite() && ratio > 0.0 {
            self.stretched[bucket] *= ratio.clamp(1.0 / SURPRISE, SURPRISE).powf(GAIN);
            self.stretched[bucket] = self.stretched[bucket].clamp(0.05, 20.0);
        }
        taken
    }

    fn stretch(&self, load_share: f64) -> f64 {
        self.stretched[bucket(load_share)] / (1.0 - load_share).max(SHARE_LEFT_MIN)
    }
}

fn bucket(load_share: f64) -> usize {
    ((load_share * 10.0).round() as usize).min(LOADS - 1)
}

fn work(tokens: &Range<u32>) -> [f64; 2] {
    let (first, end) = (f64::from(tokens.start), f64::from(tokens.end));
    [end - first, (end * end - first * first) / 2.0]
}
