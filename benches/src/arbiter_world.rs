//! A made-up engine with drives, for the arbiter: requests that find a prefix and compute what comes behind it, what it
//! truly takes to load or to compute it, noise, and drives that change their speed. The arbiter sees only what the engine
//! would tell it. Same seed, same history.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use pegaflow_engine::{Arbiter, ArbiterConfig, Choice, Decision, FoundPrefix, Reason, TierSpeeds};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCK_TOKENS: u32 = 16;
/// An 8B model with grouped attention in 16 bits.
const BYTES_PER_TOKEN: u64 = 131_072;
/// What every request computes behind the prefix: its own question.
const SUFFIX_TOKENS: Range<u32> = 64..1024;
/// With a codec of ratio 1.4.
const STORED_BYTES_PER_TOKEN: u64 = 93_622;
const LINK_BYTES_PER_S: f64 = 50e9;
const LOAD_FIXED_S: f64 = 0.004;
/// At this position a token costs twice as much as the first.
const DOUBLING_TOKENS: f64 = 40_000.0;
/// Windows of so many requests say whether the arbiter has recovered.
const WINDOW: usize = 20;
/// 256 to 131,072 tokens, by doublings.
pub const LENGTHS: u32 = 10;

/// By which law a busy GPU stretches a computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stretch {
    /// Everybody gets an equal share: `1 / (1 - load)`, at most 20.
    Shared,
    /// `1 + 3 load`.
    Linear,
    /// `1 + 9 load^2`.
    Square,
}

impl Stretch {
    fn at(self, load_share: f64) -> f64 {
        match self {
            Self::Shared => 1.0 / (1.0 - load_share).max(0.05),
            Self::Linear => 1.0 + 3.0 * load_share,
            Self::Square => 1.0 + 9.0 * load_share * load_share,
        }
    }
}

/// What the arbiter is told of the drives before the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Nothing.
    Nothing,
    /// The truth.
    Truth,
    /// Ten times too much.
    TooMuch,
    /// A tenth.
    TooLittle,
}

/// A world.
#[derive(Debug, Clone, Copy)]
pub struct World {
    /// All drives together.
    pub drive_bytes_per_s: f64,
    /// At the start of a prompt on an idle GPU.
    pub prefill_tokens_per_s: f64,
    /// 0 to 1; `None`: another one for each request.
    pub load_share: Option<f64>,
    /// What load does.
    pub stretch: Stretch,
    /// Standard deviation of the logarithm of what is measured.
    pub noise: f64,
    /// Requests per second.
    pub rate: f64,
    /// Only prompts of this many doublings of 256 tokens; `None`: all lengths, each doubling as often.
    pub length: Option<u32>,
    /// What the arbiter is told.
    pub told: Told,
    /// The drives change to this multiple of their speed after the steady phase.
    pub step: f64,
    /// Requests of each phase: warm-up, steady, after the step. The last lasts at least three minutes.
    pub requests: usize,
    /// Seed of everything.
    pub seed: u64,
    /// Writes decisions to standard error that cost this many times the best, and all probes.
    pub shown_from: Option<f64>,
}

/// What a world came to. Ratios are of the time that the decision costs, without noise, to the best of loading and
/// computing all that was found; probes count.
#[derive(Debug, Clone, Default)]
pub struct WorldOutcome {
    /// The worst mean of a class of requests (by length, and whether all is in DRAM): the steady phase, and from 60 s after
    /// the step.
    pub worst_class: f64,
    /// The mean over all of these requests.
    pub mean: f64,
    /// The sum of times over the sum of the best.
    pub total: f64,
    /// The worst single request, without probes.
    pub worst_request: f64,
    /// The worst single probe.
    pub worst_probe: f64,
    /// Share of probes.
    pub probes: f64,
    /// Seconds after the step until the last bad request of the last bad window (mean above 1.05 over 20 requests).
    /// Probes go into the other figures, not into this one.
    pub recovery_s: f64,
    /// Decisions made.
    pub decisions: u64,
}

/// An answer that is on its way back to the arbiter.
enum Report {
    Loaded(u64, Duration),
    Computed(u64, Range<u32>, f32, Duration),
    /// Read beside a request: bytes, those queued before, how long.
    Read(u64, u64, Duration),
}

/// What waits for the drives.
struct AtDrive {
    what: DriveWork,
    since_s: f64,
    /// Up to which byte of all that the drives read.
    end: f64,
    /// What comes after.
    last_s: f64,
}

#[derive(Clone, Copy)]
enum DriveWork {
    Load(u64),
    Read(u64, u64),
}

struct Run {
    world: World,
    random: SmallRng,
    arbiter: Arbiter,
    now_s: f64,
    drive_bytes_per_s: f64,
    queued_bytes: f64,
    /// All that the drives have read.
    drive_read_bytes: f64,
    /// In order.
    at_drive: VecDeque<AtDrive>,
    reports: BinaryHeap<Reverse<(u64, u64)>>,
    waiting: HashMap<u64, Report>,
    next_report: u64,
}

struct Served {
    at_s: f64,
    class: (u32, bool),
    ratio: f64,
    seconds: f64,
    best_s: f64,
    is_probe: bool,
}

impl World {
    /// Runs all three phases.
    pub fn run(&self) -> WorldOutcome {
        let config = ArbiterConfig { seed: self.seed, decisions_max: 8192, ..ArbiterConfig::default() };
        let mut run = Run {
            world: *self,
            random: SmallRng::seed_from_u64(self.seed),
            arbiter: Arbiter::new(config),
            now_s: 0.0,
            drive_bytes_per_s: self.drive_bytes_per_s,
            queued_bytes: 0.0,
            drive_read_bytes: 0.0,
            at_drive: VecDeque::new(),
            reports: BinaryHeap::new(),
            waiting: HashMap::new(),
            next_report: 0,
        };
        let told = match self.told {
            Told::Nothing => 0.0,
            Told::Truth => self.drive_bytes_per_s,
            Told::TooMuch => self.drive_bytes_per_s * 10.0,
            Told::TooLittle => self.drive_bytes_per_s / 10.0,
        };
        run.arbiter.tell_speeds(TierSpeeds { drive_bytes_per_second: told as u64, ..TierSpeeds::default() });
        let warm_up = run.serve(self.requests, 180.0);
        let steady = run.serve(self.requests, 0.0);
        run.drive_bytes_per_s *= self.step;
        let step_s = run.now_s;
        let after = run.serve(self.requests, 180.0);
        let settled: Vec<&Served> =
            steady.iter().chain(after.iter().filter(|served| served.at_s >= step_s + 60.0)).collect();
        let mut outcome = judge(&settled);
        outcome.recovery_s = recovery(&after, step_s);
        outcome.decisions = (warm_up.len() + steady.len() + after.len()) as u64;
        outcome
    }
}

fn judge(settled: &[&Served]) -> WorldOutcome {
    let mut classes: HashMap<(u32, bool), (f64, f64)> = HashMap::new();
    let mut outcome = WorldOutcome::default();
    let (mut seconds, mut best_s) = (0.0, 0.0);
    for served in settled {
        let class = classes.entry(served.class).or_default();
        *class = (class.0 + served.ratio, class.1 + 1.0);
        outcome.mean += served.ratio / settled.len() as f64;
        outcome.probes += f64::from(u8::from(served.is_probe)) / settled.len() as f64;
        let worst = if served.is_probe { &mut outcome.worst_probe } else { &mut outcome.worst_request };
        *worst = worst.max(served.ratio);
        seconds += served.seconds;
        best_s += served.best_s;
    }
    outcome.worst_class = classes.values().map(|(sum, count)| sum / count).fold(0.0, f64::max);
    outcome.total = seconds / best_s;
    outcome
}

fn recovery(after: &[Served], step_s: f64) -> f64 {
    let usual: Vec<&Served> = after.iter().filter(|served| !served.is_probe).collect();
    let is_bad = |window: &&[&Served]| window.iter().map(|served| served.ratio).sum::<f64>() > 1.05 * WINDOW as f64;
    let last_bad = usual.windows(WINDOW).rfind(is_bad);
    let last_request = last_bad.and_then(|window| window.iter().rev().find(|served| served.ratio > 1.05));
    last_request.map_or(0.0, |served| served.at_s - step_s)
}

impl Run {
    /// Serves so many requests, and more until the time is over.
    fn serve(&mut self, requests: usize, time_s: f64) -> Vec<Served> {
        let end_s = self.now_s + time_s;
        let mut served = Vec::with_capacity(requests);
        while served.len() < requests || self.now_s < end_s {
            served.push(self.serve_one());
        }
        served
    }

    fn serve_one(&mut self) -> Served {
        let pause_s = -(1.0 - self.random.random::<f64>()).ln() / self.world.rate;
        self.now_s += pause_s;
        self.read_drive(pause_s);
        self.deliver();
        let doubling = self.world.length.unwrap_or_else(|| self.random.random_range(0..LENGTHS));
        let load_share = self.world.load_share.unwrap_or_else(|| self.random.random());
        let (found, class) = self.find(doubling, load_share);
        let all_loaded = self.load_s(&found, load_share);
        let all_computed = self.compute_s(&(found.first_token..found.end_token), load_share);
        let decision = self.arbiter.decide(found, Duration::from_secs_f64(self.now_s));
        let is_load = decision.choice == Choice::Load;
        let seconds = if is_load { all_loaded } else { all_computed };
        let loaded_s = if is_load { self.load(&decision, all_loaded) } else { 0.0 };
        if decision.read_bytes > 0 {
            let queued = self.queued_bytes;
            self.queued_bytes += decision.read_bytes as f64;
            let end = self.drive_read_bytes + self.queued_bytes;
            let what = DriveWork::Read(decision.read_bytes, queued as u64);
            self.at_drive.push_back(AtDrive { what, since_s: self.now_s, end, last_s: LOAD_FIXED_S });
        }
        // What is behind the prefix is computed in any case, and does not count.
        let suffix = found.end_token + self.random.random_range(SUFFIX_TOKENS);
        let computed = if is_load { found.end_token..suffix } else { found.first_token..suffix };
        let took_s = self.compute_s(&computed, load_share) * self.noise();
        let took = Duration::from_secs_f64(took_s);
        self.report(loaded_s + took_s, Report::Computed(decision.id, computed, found.load_share, took));
        let best_s = all_loaded.min(all_computed);
        let is_probe = decision.reason == Reason::Probe;
        if self.world.shown_from.is_some_and(|from| is_probe || seconds >= from * best_s) {
            let truth = format!("{:.1} ms to load, {:.1} ms to compute", all_loaded * 1e3, all_computed * 1e3);
            eprintln!("{:.3} s, {:.2} of the best: {decision}; in truth {truth}", self.now_s, seconds / best_s);
        }
        Served { at_s: self.now_s, class, ratio: seconds / best_s, seconds, best_s, is_probe }
    }

    /// Begins a load; how long it takes with noise, if the drives stay as they are.
    fn load(&mut self, decision: &Decision, load_s: f64) -> f64 {
        let noisy_s = load_s * self.noise();
        self.arbiter.load_began(decision.id, Duration::from_secs_f64(self.now_s));
        let own = drive_bytes(&decision.found);
        if own > 0.0 {
            // The drives may change their speed before they come to it.
            self.queued_bytes += own * noisy_s / load_s;
            let end = self.drive_read_bytes + self.queued_bytes;
            let last_s = LOAD_FIXED_S * (1.0 + f64::from(decision.found.load_share)) + link_s(decision.tokens()) * 0.01;
            let what = DriveWork::Load(decision.id);
            self.at_drive.push_back(AtDrive { what, since_s: self.now_s, end, last_s });
        } else {
            self.report(noisy_s, Report::Loaded(decision.id, Duration::from_secs_f64(noisy_s)));
        }
        noisy_s
    }

    /// A prefix: three of ten are in DRAM, two are half there; one of four begins behind what the engine has itself.
    fn find(&mut self, doubling: u32, load_share: f64) -> (FoundPrefix, (u32, bool)) {
        let end_token = 256u32 << doubling;
        let has_some = self.random.random_bool(0.25);
        let first_token = if has_some { self.random.random_range(0..end_token / 32) * BLOCK_TOKENS } else { 0 };
        let place: f64 = self.random.random();
        let dram_end_token = match place {
            ..0.3 => end_token,
            ..0.5 => first_token + (end_token - first_token) / 2 / BLOCK_TOKENS * BLOCK_TOKENS,
            _ => first_token,
        };
        let jitter = self.random.random_range(-0.03..0.03);
        let found = FoundPrefix {
            request: 0,
            first_token,
            end_token,
            dram_end_token,
            is_placed: false,
            link_bytes_per_token: BYTES_PER_TOKEN,
            stored_bytes_per_token: STORED_BYTES_PER_TOKEN,
            queued_bytes: self.queued_bytes as u64,
            drive_read_bytes: self.drive_read_bytes as u64,
            load_share: (load_share + jitter) as f32,
        };
        (found, (doubling, dram_end_token == end_token))
    }

    /// Lets the drives read for so long.
    fn read_drive(&mut self, pause_s: f64) {
        let (from_s, from_bytes) = (self.now_s - pause_s, self.drive_read_bytes);
        let bytes = self.queued_bytes.min(pause_s * self.drive_bytes_per_s);
        self.queued_bytes -= bytes;
        self.drive_read_bytes += bytes;
        // What is left is a rounding error.
        let reached = if self.queued_bytes > 0.0 { self.drive_read_bytes } else { f64::INFINITY };
        while self.at_drive.front().is_some_and(|next| next.end <= reached) {
            let Some(AtDrive { what, since_s, end, last_s }) = self.at_drive.pop_front() else { break };
            let ended_s = from_s + (end - from_bytes).max(0.0) / self.drive_bytes_per_s + last_s;
            let took = Duration::from_secs_f64(ended_s - since_s);
            let report = match what {
                DriveWork::Load(id) => Report::Loaded(id, took),
                DriveWork::Read(bytes, queued) => Report::Read(bytes, queued, took),
            };
            self.report(ended_s - self.now_s, report);
        }
    }

    fn load_s(&self, found: &FoundPrefix, load_share: f64) -> f64 {
        let own = drive_bytes(found);
        let drive_s = if own > 0.0 { (own + self.queued_bytes) / self.drive_bytes_per_s } else { 0.0 };
        LOAD_FIXED_S * (1.0 + load_share) + link_s(found.end_token - found.first_token).max(drive_s)
    }

    fn compute_s(&self, tokens: &Range<u32>, load_share: f64) -> f64 {
        let (first, end) = (f64::from(tokens.start), f64::from(tokens.end));
        let work = end - first + (end * end - first * first) / 2.0 / DOUBLING_TOKENS;
        work / self.world.prefill_tokens_per_s * self.world.stretch.at(load_share)
    }

    /// Log-normal, with a mean of one.
    fn noise(&mut self) -> f64 {
        let (one, other): (f64, f64) = (1.0 - self.random.random::<f64>(), self.random.random());
        let normal = (-2.0 * one.ln()).sqrt() * (std::f64::consts::TAU * other).cos();
        (self.world.noise * normal - self.world.noise * self.world.noise / 2.0).exp()
    }

    fn report(&mut self, after_s: f64, report: Report) {
        let at_ns = ((self.now_s + after_s) * 1e9) as u64;
        self.reports.push(Reverse((at_ns, self.next_report)));
        self.waiting.insert(self.next_report, report);
        self.next_report += 1;
    }

    /// Tells the arbiter what has ended by now.
    fn deliver(&mut self) {
        let now_ns = (self.now_s * 1e9) as u64;
        while let Some(Reverse((at_ns, number))) = self.reports.peek().copied().filter(|next| next.0.0 <= now_ns) {
            self.reports.pop();
            let at = Duration::from_nanos(at_ns);
            match self.waiting.remove(&number) {
                Some(Report::Loaded(id, took)) => {
                    let _ended = self.arbiter.loaded(id, took, at);
                }
                Some(Report::Computed(id, tokens, share, took)) => {
                    let _ended = self.arbiter.computed(Some(id), tokens, share, took, at);
                }
                Some(Report::Read(bytes, queued, took)) => self.arbiter.was_read(bytes, queued, Some(took), at),
                None => {}
            }
        }
    }
}

fn link_s(tokens: u32) -> f64 {
    f64::from(tokens) * BYTES_PER_TOKEN as f64 / LINK_BYTES_PER_S
}

fn drive_bytes(found: &FoundPrefix) -> f64 {
    let tokens = found.end_token - found.first_token;
    let in_dram = found.dram_end_token.saturating_sub(found.first_token).min(tokens);
    f64::from(tokens - in_dram) * STORED_BYTES_PER_TOKEN as f64
}
