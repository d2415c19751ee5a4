//! Runs all replays of a command, as many at a time as there are cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use pegaflow_engine::{PegaflowConfig, PolicyChoice, ReplayOutcome, ReplayTier, Trace, replay, replay_optimal};

/// Blocks that our policy remembers, at least; else as many as the tier has.
const REMEMBERED_MIN: u64 = 1 << 16;

/// What is to be replayed.
pub(super) struct Setup<'a> {
    pub(super) policies: &'a [PolicyChoice],
    /// Sizes as they were written, and in blocks.
    pub(super) sizes: &'a [(String, u64)],
    pub(super) dram: Option<u64>,
    pub(super) hurdles: &'a [f32],
    pub(super) write_hurdle: f32,
    pub(super) seed: u64,
}

/// Who was replayed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Who {
    Policy(PolicyChoice),
    /// Ours with another hurdle.
    Hurdle(f32),
    Optimal,
}

/// One replay.
pub(super) struct Done {
    pub(super) who: Who,
    /// The size as it was written, and in blocks.
    pub(super) size: (String, u64),
    pub(super) outcome: ReplayOutcome,
}

/// All replays, in the order in which they are shown.
pub(super) fn all(trace: &Trace, setup: &Setup<'_>) -> Vec<Done> {
    let who = setup.policies.iter().map(|policy| Who::Policy(*policy));
    let who: Vec<Who> =
        who.chain([Who::Optimal]).chain(setup.hurdles.iter().map(|hurdle| Who::Hurdle(*hurdle))).collect();
    let jobs: Vec<_> = setup.sizes.iter().flat_map(|size| who.iter().map(move |who| (*who, size))).collect();
    let bar = ProgressBar::new((jobs.len() * trace.len()) as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent} % of {len} requests, {eta} left") {
        bar.set_style(style);
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len()) {
            scope.spawn(|| {
                while let Some((who, size)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = one(trace, setup, *who, size.1, &bar);
                    if let Ok(mut done) = done.lock() {
                        done.push(Done { who: *who, size: (*size).clone(), outcome });
                    }
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut done = done.into_inner().unwrap_or_default();
    let place = |done: &Done| jobs.iter().position(|(who, size)| *who == done.who && size.0 == done.size.0);
    done.sort_by_key(place);
    done
}

fn one(trace: &Trace, setup: &Setup<'_>, who: Who, capacity: u64, bar: &ProgressBar) -> ReplayOutcome {
    let mut last = 0;
    let mut progress = |requests: usize| {
        bar.inc((requests - last) as u64);
        last = requests;
    };
    let (policy, write_hurdle) = match who {
        Who::Optimal => {
            // One tier: what is in DRAM and on the drive counts as one.
            let outcome = replay_optimal(trace, capacity);
            progress(trace.len());
            return outcome;
        }
        Who::Policy(policy) => (policy, setup.write_hurdle),
        Who::Hurdle(hurdle) => (PolicyChoice::Pegaflow, hurdle),
    };
    let tier = |capacity: u64, write_hurdle: f32| {
        let remembered_max = capacity.max(REMEMBERED_MIN) as usize;
        let config = PegaflowConfig { write_hurdle, remembered_max, seed: setup.seed, ..PegaflowConfig::default() };
        ReplayTier { policy, capacity, config }
    };
    let dram = setup.dram.map(|capacity| tier(capacity, 1.0));
    let tiers: Vec<ReplayTier> = dram.into_iter().chain([tier(capacity, write_hurdle)]).collect();
    let outcome = replay(trace, &tiers, &mut progress);
    progress(trace.len());
    outcome
}
