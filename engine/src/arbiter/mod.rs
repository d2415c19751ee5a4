//! Whether a prefix that was found is loaded or computed: what takes less time, by estimates that are learned from every
//! load and every computation and tried again now and then. Pure logic: time comes with each call, the random source from
//! a seed, and memory is bounded. It knows nothing of tiers or engines but what it is told.
//!
//! All or nothing: the head of a prefix is the cheapest to compute, so a split never pays. Only a probe splits: it has a
//! part of the prefix the other way, as large as costs its request 2 % at most.

mod compute_time;
mod estimate;
mod load_time;
mod probe;
mod record;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use self::compute_time::ComputeTime;
use self::load_time::{LoadTime, LoadWork, Path};
use self::probe::{PROBE_PATIENCE_S, Prober, Rival};

pub use self::record::{Choice, Decision, FoundPrefix, LoadPolicy, Reason, TierSpeeds};

/// By how much slower a load may be that frees a GPU which others want wholly; in proportion where they want less.
const FREED_GPU: f64 = 0.02;
/// From this multiple of its prediction on, what has not ended counts as evidence.
const OVERDUE: f64 = 2.0;
/// Nothing is late that is predicted to take less, until it takes twice this.
const LATE_FROM_S: f64 = 0.01;
const RUNNING_MAX: usize = 256;
/// What was never reported is forgotten.
const RUNNING_MAX_S: f64 = 600.0;
/// A computation of fewer tokens takes as long as one of so many: a forward pass reads all weights.
const COMPUTE_TOKENS_MIN: u32 = 64;
/// Probes are of the prefix, its half, its quarter and so on.
const PARTS_MAX: usize = 20;
/// A load of unknown speed may take so many times what is assumed.
const CAUTION: f64 = 8.0;
/// A probe takes so many times the fixed time, or it would not show that drives have become ten times faster.
const TELLING: f64 = 4.0;

/// Settings of an arbiter.
#[derive(Debug, Clone)]
pub struct ArbiterConfig {
    /// Whether found prefixes are loaded. Default: auto.
    pub load_policy: LoadPolicy,
    /// Decide, but load nothing. Default: false.
    pub is_shadow: bool,
    /// Seed of random choices. Default: 0.
    pub seed: u64,
    /// How many decisions are kept to be explained, of 200 bytes each. Default: 4,096. Minimum: 1.
    pub decisions_max: usize,
}

impl Default for ArbiterConfig {
    fn default() -> Self {
        Self { load_policy: LoadPolicy::Auto, is_shadow: false, seed: 0, decisions_max: 4096 }
    }
}

/// A way to have a prefix that is learned for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Load(Path),
    Compute,
}

impl Way {
    fn place(self) -> usize {
        match self {
            Self::Load(Path::Dram) => 0,
            Self::Load(Path::Drive) => 1,
            Self::Compute => 2,
        }
    }
}

/// What was decided and has not ended.
#[derive(Debug, Clone, Copy)]
struct Running {
    id: u64,
    way: Way,
    since_s: f64,
    found: FoundPrefix,
    load_tokens: u32,
    is_probe: bool,
}

/// Decides between loading and computing, for one engine.
pub struct Arbiter {
    config: ArbiterConfig,
    load: LoadTime,
    compute: ComputeTime,
    prober: Prober,
    running: Vec<Running>,
    /// By how much what runs is later than is predicted of it by now, by way; 1 where nothing is.
    late: [f64; 3],
    decisions: VecDeque<Decision>,
    next_id: u64,
}

impl Arbiter {
    /// One that has seen nothing.
    pub fn new(config: ArbiterConfig) -> Self {
        Self {
            prober: Prober::new(config.seed),
            config,
            load: LoadTime::new(),
            compute: ComputeTime::new(),
            running: Vec::new(),
            late: [1.0; 3],
            decisions: VecDeque::new(),
            next_id: 1,
        }
    }

    /// Changes the policy from the next decision on.
    pub fn set_load_policy(&mut self, policy: LoadPolicy) {
        self.config.load_policy = policy;
    }

    /// Turns shadow mode on or off from the next decision on.
    pub fn set_shadow(&mut self, is_shadow: bool) {
        self.config.is_shadow = is_shadow;
    }

    /// Takes in how fast the tiers are by somebody else's measurement. What is unchanged since the last call does not
    /// outweigh what loads have shown.
    pub fn tell_speeds(&mut self, speeds: TierSpeeds) {
        self.load.tell(speeds);
    }

    /// Decides. `now` is the time since any fixed time, and never runs backwards.
    pub fn decide(&mut self, found: FoundPrefix, now: Duration) -> Decision {
        let now_s = now.as_secs_f64();
        let found = sound(found);
        let tokens = found.end_token - found.first_token;
        self.load.look(&found, now_s);
        self.look_at_running(now_s);
        let load_s = self.load_seconds(&found, tokens);
        let compute_s = self.compute_seconds(&found, found.first_token..found.end_token);
        let path = self.load.path(&LoadWork::new(&found, tokens));
        let (preferred, why) = self.prefer(load_s, compute_s, path, found.load_share.into());
        let (mut choice, mut reason) = (preferred, why);
        let mut load_tokens = if choice == Choice::Load { tokens } else { 0 };
        if tokens == 0 {
            (choice, reason, load_tokens) = (Choice::Recompute, Reason::Nothing, 0);
        } else if self.config.is_shadow || self.config.load_policy == LoadPolicy::Never {
            (choice, load_tokens) = (Choice::Recompute, 0);
            reason = if self.config.is_shadow { Reason::Shadow } else { Reason::Policy };
        } else if self.config.load_policy == LoadPolicy::Always {
            (choice, reason, load_tokens) = (Choice::Load, Reason::Policy, tokens);
        } else if let Some(probed) = self.probe(&found, preferred, path, load_s, compute_s, now_s) {
            reason = Reason::Probe;
            (choice, load_tokens) = match preferred {
                Choice::Load => (Choice::Recompute, tokens - probed),
                Choice::Recompute => (Choice::Load, probed),
            };
        }
        let decision = Decision {
            id: self.next_id,
            at: now,
            found,
            predicted_load: seconds(load_s),
            predicted_recompute: seconds(compute_s),
            choice,
            preferred,
            load_tokens,
            reason,
            observed_load: None,
            observed_compute: None,
        };
        self.next_id += 1;
        self.start(&decision, now_s);
        if self.decisions.len() >= self.config.decisions_max.max(1) {
            self.decisions.pop_front();
        }
        self.decisions.push_back(decision);
        decision
    }

    /// The load of a decision has ended well, `took` after the decision.
    pub fn loaded(&mut self, id: u64, took: Duration, now: Duration) {
        self.end_running(id, |way| way != Way::Compute);
        let Some(decision) = self.decision_mut(id) else { return };
        if decision.load_tokens == 0 || decision.observed_load.replace(took).is_some() {
            return;
        }
        let work = LoadWork::new(&decision.found, decision.load_tokens);
        self.load.observe(&work, took.as_secs_f64(), now.as_secs_f64());
    }

    /// The engine has computed `tokens` of a request in `took`, while others wanted `load_share` of the GPU. With `id`
    /// where the request had a decision, also for tokens behind those found.
    pub fn computed(&mut self, id: Option<u64>, tokens: Range<u32>, load_share: f32, took: Duration, now: Duration) {
        if let Some(id) = id {
            self.end_running(id, |way| way == Way::Compute);
            if let Some(decision) = self.decision_mut(id) {
                decision.observed_compute = Some(took);
            }
        }
        if tokens.len() < COMPUTE_TOKENS_MIN as usize {
            return;
        }
        self.compute.observe(&tokens, share(load_share).into(), took.as_secs_f64(), now.as_secs_f64());
    }

    /// Nothing more will be heard of a decision: its request is over, or its load has failed.
    pub fn abandoned(&mut self, id: u64) {
        self.end_running(id, |_| true);
    }

    /// The latest decision for a request, by the asker's name for it, if it is kept.
    pub fn explain(&self, request: u64) -> Option<&Decision> {
        self.decisions.iter().rev().find(|decision| decision.found.request == request)
    }

    /// The decisions that are kept, oldest first.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.decisions.iter()
    }

    fn prefer(&self, load_s: f64, compute_s: f64, path: Path, load_share: f64) -> (Choice, Reason) {
        if !self.load.is_known(path) {
            (Choice::Recompute, Reason::NotMeasured)
        } else if load_s <= compute_s {
            (Choice::Load, Reason::Faster)
        } else if load_s <= compute_s * (1.0 + FREED_GPU * load_share) {
            (Choice::Load, Reason::FreesGpu)
        } else {
            (Choice::Recompute, Reason::Faster)
        }
    }

    /// How many tokens to have the other way, if it is to be tried.
    fn probe(
        &mut self,
        found: &FoundPrefix,
        preferred: Choice,
        path: Path,
        load_s: f64,
        compute_s: f64,
        now_s: f64,
    ) -> Option<u32> {
        let (best_s, rival_s, way) = match preferred {
            Choice::Load => (load_s, compute_s, Way::Compute),
            Choice::Recompute => (compute_s, load_s, Way::Load(path)),
        };
        self.prober.save_up(best_s, now_s);
        let is_running = |running: &Running| running.way == way && now_s - running.since_s < PROBE_PATIENCE_S;
        if self.running.iter().any(|running| running.is_probe && is_running(running)) {
            return None;
        }
        let (seen_s, is_in_doubt) = match way {
            Way::Load(path) => (self.load.of(path).seen_s(), self.load.of(path).is_in_doubt()),
            Way::Compute => (self.compute.seen_s(found.load_share.into()), self.compute.alone().is_in_doubt()),
        };
        let rival = Rival { seen_s, is_in_doubt, seconds: rival_s };
        let parts = self.parts(found, way, load_s);
        self.prober.choose(rival, best_s, &parts, now_s)
    }

    /// What could be probed, from the largest to the smallest, with the seconds that each would add.
    fn parts(&self, found: &FoundPrefix, way: Way, load_s: f64) -> Vec<(u32, f64)> {
        let tokens = found.end_token - found.first_token;
        let sizes = (0..PARTS_MAX).map(|halvings| round_down(tokens >> halvings, found.block_tokens, tokens));
        let mut parts: Vec<(u32, f64)> = Vec::new();
        for part in sizes.take_while(|part| *part > 0) {
            if parts.last().is_some_and(|(before, _)| *before == part) {
                break;
            }
            let added = match way {
                Way::Load(path) => {
                    let work = LoadWork::new(found, part);
                    let is_telling = self.load.predict(&work) >= TELLING * self.load.of(path).terms()[0];
                    if part < tokens && (self.load.path(&work) != path || !is_telling) {
                        break;
                    }
                    let saved = found.first_token..found.first_token + part;
                    let caution = if self.load.is_known(path) { 1.0 } else { CAUTION };
                    self.load_seconds(found, part) * caution - self.compute_seconds(found, saved)
                }
                Way::Compute => {
                    if part < tokens && part < COMPUTE_TOKENS_MIN {
                        break;
                    }
                    let tail = found.end_token - part..found.end_token;
                    let saved = load_s - self.load_seconds(found, tokens - part);
                    self.compute_seconds(found, tail) - saved
                }
            };
            parts.push((part, added));
        }
        parts
    }

    fn load_seconds(&self, found: &FoundPrefix, tokens: u32) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let work = LoadWork::new(found, tokens);
        self.load.predict(&work) * self.late[Way::Load(self.load.path(&work)).place()]
    }

    fn compute_seconds(&self, found: &FoundPrefix, tokens: Range<u32>) -> f64 {
        self.compute.predict(&tokens, found.load_share.into()) * self.late[Way::Compute.place()]
    }

    /// Looks at what is overdue: it counts before it ends.
    fn look_at_running(&mut self, now_s: f64) {
        self.running.retain(|running| now_s - running.since_s < RUNNING_MAX_S);
        self.late = [1.0; 3];
        for running in &self.running {
            let found = &running.found;
            let predicted_s = match running.way {
                Way::Load(_) => self.load.predict(&LoadWork::new(found, running.load_tokens)),
                Way::Compute => self.compute.predict(&(found.first_token..found.end_token), found.load_share.into()),
            };
            let late = (now_s - running.since_s) / predicted_s.max(LATE_FROM_S);
            let is_news = match running.way {
                Way::Load(path) => self.load.may_be_late(path, running.since_s, now_s),
                Way::Compute => running.since_s >= self.compute.alone().changed_s(),
            };
            if late >= OVERDUE && is_news {
                self.late[running.way.place()] = self.late[running.way.place()].max(late);
            }
        }
    }

    fn start(&mut self, decision: &Decision, now_s: f64) {
        let found = decision.found;
        let way = if decision.load_tokens > 0 {
            Way::Load(self.load.path(&LoadWork::new(&found, decision.load_tokens)))
        } else if decision.computed_tokens() > 0 {
            Way::Compute
        } else {
            return;
        };
        if self.running.len() >= RUNNING_MAX {
            self.running.remove(0);
        }
        let is_probe = decision.reason == Reason::Probe;
        self.running.push(Running {
            id: decision.id,
            way,
            since_s: now_s,
            found,
            load_tokens: decision.load_tokens,
            is_probe,
        });
    }

    fn end_running(&mut self, id: u64, is_meant: impl Fn(Way) -> bool) {
        self.running.retain(|running| running.id != id || !is_meant(running.way));
    }

    fn decision_mut(&mut self, id: u64) -> Option<&mut Decision> {
        let first = self.decisions.front()?.id;
        let place = usize::try_from(id.checked_sub(first)?).ok()?;
        self.decisions.get_mut(place)
    }
}

/// The question with what cannot be made whole.
fn sound(found: FoundPrefix) -> FoundPrefix {
    let end_token = found.end_token.max(found.first_token);
    FoundPrefix {
        end_token,
        dram_end_token: found.dram_end_token.clamp(found.first_token, end_token),
        block_tokens: found.block_tokens.max(1),
        load_share: share(found.load_share),
        ..found
    }
}

fn share(load_share: f32) -> f32 {
    if load_share.is_finite() { load_share.clamp(0.0, 1.0) } else { 0.0 }
}

/// Whole blocks; all is all, with whatever it ends.
fn round_down(part: u32, block: u32, all: u32) -> u32 {
    if part == all { all } else { part / block * block }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
