//! Whether a prefix that was found is loaded or computed: what takes less time, by estimates that are learned from every
//! load and every computation and tried again now and then. Pure logic: time comes with each call, the random source from
//! a seed, and memory is bounded. It knows nothing of tiers or engines but what it is told.
//!
//! All or nothing: the head of a prefix is the cheapest to compute, so a split never pays. What is not known is loaded.

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
const COMPUTE_TOKENS_MIN: usize = 64;
/// What is read beside a request, at least and at most. Sizes differ, or the fixed time could not be told from the speed.
const READ_BYTES_MIN: f64 = 4_194_304.0;
const READ_BYTES_MAX: f64 = 33_554_432.0;
/// The next read waits so many times as long as the last one took of the drives' time, but never longer than this.
const READ_REST: f64 = 20.0;
const READ_REST_MAX_S: f64 = 300.0;

/// Settings of an arbiter.
#[derive(Debug, Clone)]
pub struct ArbiterConfig {
    /// Whether found prefixes are loaded. Default: auto.
    pub load_policy: LoadPolicy,
    /// Seed of random choices. Default: 0.
    pub seed: u64,
    /// How many decisions are kept to be explained, of 200 bytes each. Default: 4,096. Minimum: 1.
    pub decisions_max: usize,
}

impl Default for ArbiterConfig {
    fn default() -> Self {
        Self { load_policy: LoadPolicy::Auto, seed: 0, decisions_max: 4096 }
    }
}

/// A load that has begun and has not ended.
#[derive(Debug, Clone, Copy)]
struct Running {
    id: u64,
    path: Path,
    since_s: f64,
    predicted_s: f64,
}

/// Decides between loading and computing, for one engine.
pub struct Arbiter {
    config: ArbiterConfig,
    load: LoadTime,
    compute: ComputeTime,
    prober: Prober,
    running: Vec<Running>,
    /// When the read began that goes on beside requests.
    reading_since_s: Option<f64>,
    next_read_s: f64,
    /// When a way was last taken on trial, whatever became of it: DRAM, drive, computing.
    probed_s: [f64; 3],
    /// By how much what runs is later than was predicted of it, by path; 1 where nothing is.
    late: [f64; 2],
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
            reading_since_s: None,
            next_read_s: f64::NEG_INFINITY,
            probed_s: [f64::NEG_INFINITY; 3],
            late: [1.0; 2],
            decisions: VecDeque::new(),
            next_id: 1,
        }
    }

    /// One that begins with what this one has learned, but none of its decisions: for another engine with the same model.
    pub fn successor(&self, config: ArbiterConfig) -> Self {
        Self { load: self.load.clone(), compute: self.compute.clone(), ..Self::new(config) }
    }

    /// Changes the policy from the next decision on.
    pub fn set_load_policy(&mut self, policy: LoadPolicy) {
        self.config.load_policy = policy;
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
        self.load.look(&found, now_s);
        self.look_at_running(now_s);
        let work = LoadWork::new(&found);
        let path = self.load.path(&work);
        let load_s = self.load.predict(&work) * self.late[place(path)];
        let compute_s = self.compute.predict(&(found.first_token..found.end_token), found.load_share.into());
        let (preferred, why) = self.prefer(load_s, compute_s, path, found.load_share.into());
        let (mut choice, mut reason, mut read_bytes) = (preferred, why, 0);
        match self.config.load_policy {
            _ if found.end_token == found.first_token => (choice, reason) = (Choice::Recompute, Reason::Nothing),
            LoadPolicy::Never => (choice, reason) = (Choice::Recompute, Reason::Policy),
            LoadPolicy::Always => (choice, reason) = (Choice::Load, Reason::Policy),
            LoadPolicy::Shadow => (choice, reason) = (Choice::Load, Reason::Shadow),
            LoadPolicy::Auto if found.is_placed => (choice, reason) = (Choice::Load, Reason::Placed),
            LoadPolicy::Auto => {
                let is_wanted =
                    why != Reason::NotMeasured && self.wants_probe(preferred, path, &work, [load_s, compute_s], now_s);
                if is_wanted && preferred == Choice::Recompute && path == Path::Drive {
                    read_bytes = self.read_bytes(&work);
                    self.reading_since_s = Some(now_s);
                } else if is_wanted {
                    reason = Reason::Probe;
                    choice = if preferred == Choice::Load { Choice::Recompute } else { Choice::Load };
                }
            }
        }
        let decision = Decision {
            id: self.next_id,
            at: now,
            found,
            predicted_load: seconds(load_s),
            predicted_recompute: seconds(compute_s),
            choice,
            preferred,
            reason,
            read_bytes,
            observed_load: None,
            observed_recompute: None,
        };
        self.next_id += 1;
        if self.decisions.len() >= self.config.decisions_max.max(1) {
            self.decisions.pop_front();
        }
        self.decisions.push_back(decision);
        decision
    }

    /// The load of a decision begins: from now on it can be late.
    pub fn load_began(&mut self, id: u64, now: Duration) {
        let Some(decision) = self.decision_mut(id) else { return };
        let work = LoadWork::new(&decision.found);
        if self.running.len() >= RUNNING_MAX {
            self.running.remove(0);
        }
        let (path, predicted_s) = (self.load.path(&work), self.load.predict(&work));
        self.running.push(Running { id, path, since_s: now.as_secs_f64(), predicted_s });
    }

    /// The load of a decision has ended well, `took` after it began. The decision with it, if it is kept.
    pub fn loaded(&mut self, id: u64, took: Duration, now: Duration) -> Option<Decision> {
        self.running.retain(|running| running.id != id);
        let decision = self.decision_mut(id)?;
        if decision.observed_load.is_some() {
            return None;
        }
        decision.observed_load = Some(took);
        let decision = *decision;
        self.load.observe(&LoadWork::new(&decision.found), took.as_secs_f64(), now.as_secs_f64());
        Some(decision)
    }

    /// The load of a decision will not end well, or never began: it says nothing.
    pub fn abandoned(&mut self, id: u64) {
        self.running.retain(|running| running.id != id);
    }

    /// What was to be read beside a request has ended: so many bytes behind `queued_bytes` of others, in this time. `None`:
    /// it failed, or was not done.
    pub fn was_read(&mut self, bytes: u64, queued_bytes: u64, took: Option<Duration>, now: Duration) {
        self.reading_since_s = None;
        if let Some(took) = took.filter(|_| bytes > 0) {
            let (own, all) = (bytes as f64, bytes as f64 + queued_bytes as f64);
            let (took_s, now_s) = (took.as_secs_f64(), now.as_secs_f64());
            self.next_read_s = now_s + (READ_REST * took_s * own / all).min(READ_REST_MAX_S);
            self.load.observe_read(all, took_s, now_s);
        }
    }

    /// The drives have read so many bytes in this time, ahead of a load that therefore says nothing of them.
    pub fn was_fetched(&mut self, bytes: u64, took: Duration, now: Duration) {
        if bytes as f64 >= READ_BYTES_MIN {
            self.load.observe_read(bytes as f64, took.as_secs_f64(), now.as_secs_f64());
        }
    }

    /// The engine has computed these tokens of a request in `took`, while others wanted `load_share` of the GPU. With `id`
    /// where the request had a decision; the decision with it, if what was found was computed and it is kept.
    pub fn computed(
        &mut self,
        id: Option<u64>,
        tokens: Range<u32>,
        load_share: f32,
        took: Duration,
        now: Duration,
    ) -> Option<Decision> {
        if tokens.len() < COMPUTE_TOKENS_MIN {
            return None;
        }
        let load_share = f64::from(share(load_share));
        self.compute.observe(&tokens, load_share, took.as_secs_f64(), now.as_secs_f64());
        let found = self.decision_mut(id?)?.found;
        if tokens.start > found.first_token || tokens.end < found.end_token || found.end_token == found.first_token {
            return None;
        }
        let part = self.compute.predict(&(found.first_token..found.end_token), load_share)
            / self.compute.predict(&tokens, load_share);
        let decision = self.decision_mut(id?)?;
        let is_first = decision.observed_recompute.replace(seconds(took.as_secs_f64() * part)).is_none();
        is_first.then_some(*decision)
    }

    /// The latest decision for a request, by the asker's name for it, if it is kept.
    pub fn explain(&self, request: u64) -> Option<&Decision> {
        self.decisions.iter().rev().find(|decision| decision.found.request == request)
    }

    /// The decisions that are kept, oldest first.
    pub fn decisions(&self) -> impl DoubleEndedIterator<Item = &Decision> {
        self.decisions.iter()
    }

    fn prefer(&self, load_s: f64, compute_s: f64, path: Path, load_share: f64) -> (Choice, Reason) {
        if !self.load.is_known(path) || !self.compute.alone().has_samples() {
            (Choice::Load, Reason::NotMeasured)
        } else if load_s <= compute_s {
            (Choice::Load, Reason::Faster)
        } else if load_s <= compute_s * (1.0 + FREED_GPU * load_share) {
            (Choice::Load, Reason::FreesGpu)
        } else {
            (Choice::Recompute, Reason::Faster)
        }
    }

    /// Whether the way that is not preferred is to be tried. From the drive something is read beside the request, which
    /// costs it nothing; otherwise the whole prefix is had that way.
    fn wants_probe(
        &mut self,
        preferred: Choice,
        path: Path,
        work: &LoadWork,
        [load_s, compute_s]: [f64; 2],
        now_s: f64,
    ) -> bool {
        let (best_s, rival_s) = if preferred == Choice::Load { (load_s, compute_s) } else { (compute_s, load_s) };
        self.prober.save_up(best_s, now_s);
        let (seen_s, is_in_doubt, way) = match preferred {
            Choice::Load => (self.compute.alone().seen_s(), self.compute.alone().is_in_doubt(), 2),
            Choice::Recompute => (self.load.of(path).seen_s(), self.load.of(path).is_in_doubt(), place(path)),
        };
        let rival = Rival { seen_s, is_in_doubt, seconds: rival_s };
        let is_read = preferred == Choice::Recompute && path == Path::Drive;
        if is_read {
            let is_reading = self.reading_since_s.is_some_and(|since_s| now_s - since_s < READ_REST_MAX_S);
            let is_busy = is_reading || now_s < self.next_read_s;
            return !is_busy && work.stored_bytes() > 0.0 && self.prober.is_due(rival, best_s, now_s);
        }
        let wanted = now_s - self.probed_s[way] >= PROBE_PATIENCE_S && self.prober.pays(rival, best_s, now_s);
        if wanted {
            self.probed_s[way] = now_s;
        }
        wanted
    }

    /// How much to read.
    fn read_bytes(&mut self, work: &LoadWork) -> u64 {
        let wanted = READ_BYTES_MIN * (READ_BYTES_MAX / READ_BYTES_MIN).powf(self.prober.unit());
        wanted.min(work.stored_bytes()).max(1.0) as u64
    }

    /// Looks at what is overdue: it counts before it ends.
    fn look_at_running(&mut self, now_s: f64) {
        self.running.retain(|running| now_s - running.since_s < RUNNING_MAX_S);
        self.late = [1.0; 2];
        for running in &self.running {
            let late = (now_s - running.since_s) / running.predicted_s.max(LATE_FROM_S);
            if late >= OVERDUE && self.load.may_be_late(running.path, running.since_s, now_s) {
                let of_path = &mut self.late[place(running.path)];
                *of_path = of_path.max(late);
            }
        }
    }

    fn decision_mut(&mut self, id: u64) -> Option<&mut Decision> {
        let first = self.decisions.front()?.id;
        let place = usize::try_from(id.checked_sub(first)?).ok()?;
        self.decisions.get_mut(place)
    }
}

fn place(path: Path) -> usize {
    match path {
        Path::Dram => 0,
        Path::Drive => 1,
    }
}

/// The question with what cannot be made whole.
fn sound(found: FoundPrefix) -> FoundPrefix {
    let end_token = found.end_token.max(found.first_token);
    FoundPrefix {
        end_token,
        dram_end_token: found.dram_end_token.clamp(found.first_token, end_token),
        load_share: share(found.load_share),
        ..found
    }
}

fn share(load_share: f32) -> f32 {
    if load_share.is_finite() { load_share.clamp(0.0, 1.0) } else { 0.0 }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
