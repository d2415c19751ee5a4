//! Load or recompute, for the instances of this engine: one arbiter each, fed with what loads, reads and computations have
//! really taken. Pure bookkeeping behind one lock; whatever is not known here means "load".

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pegaflow_tiers::{DriveSpeed, NamespaceHandle};

use crate::api::{DecisionRecord, InstanceId, LoadQuestion};
use crate::arbiter::{Arbiter, ArbiterConfig, Choice, Decision, FoundPrefix, LoadPolicy, TierSpeeds};
use crate::counters::Counter;

/// The most arbiters; the one not used for longest goes first.
const INSTANCES_MAX: usize = 64;
/// Decisions that are kept for each of them.
const DECISIONS_MAX: usize = 1024;
/// How often the arbiter is told what the store knows of its drives.
const SPEEDS_INTERVAL: Duration = Duration::from_secs(5);
/// A request's name is cut here.
const REQUEST_BYTES_MAX: usize = 256;

/// Since any fixed time.
type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// What a lookup has found of a prefix, after the blocks that the asker has itself.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FoundBytes {
    pub(crate) blocks: u32,
    pub(crate) dram_blocks: u32,
    /// Of one block in one shard.
    pub(crate) block_bytes: u64,
    /// Of all blocks that are not in DRAM, in all shards, as they are stored.
    pub(crate) stored_bytes: u64,
    pub(crate) is_placed: bool,
}

/// Totals since open.
#[derive(Default)]
pub(crate) struct ChoiceCounters {
    pub(crate) loads: Counter,
    pub(crate) recomputes: Counter,
    pub(crate) mistaken_loads: Counter,
    pub(crate) mistaken_recomputes: Counter,
    /// Bytes read beside requests.
    pub(crate) read_bytes: Counter,
}

struct Judge {
    arbiter: Arbiter,
    namespace: NamespaceHandle,
    /// The askers' names for their requests, by decision, oldest first.
    names: VecDeque<(u64, Arc<str>)>,
    used: Duration,
    told: Option<Duration>,
}

struct State {
    policy: LoadPolicy,
    judges: HashMap<InstanceId, Judge>,
}

/// The arbiters, and what they have in common: the queue at the drives.
pub(crate) struct LoadChoice {
    state: Mutex<State>,
    clock: Clock,
    /// Of accepted loads, still to be read.
    queued_bytes: AtomicU64,
    read_bytes: AtomicU64,
    pub(crate) counters: ChoiceCounters,
}

impl LoadChoice {
    pub(crate) fn new(policy: LoadPolicy) -> Arc<Self> {
        let start = Instant::now();
        Self::with_clock(policy, Box::new(move || start.elapsed()))
    }

    fn with_clock(policy: LoadPolicy, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State { policy, judges: HashMap::new() }),
            clock,
            queued_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            counters: ChoiceCounters::default(),
        })
    }

    pub(crate) fn policy(&self) -> LoadPolicy {
        self.state.lock().policy
    }

    pub(crate) fn set_policy(&self, policy: LoadPolicy) {
        let before = std::mem::replace(&mut self.state.lock().policy, policy);
        tracing::info!(%before, %policy, "load policy");
    }

    /// Decides on what was found. `speeds` is asked now and then.
    pub(crate) fn decide(
        &self,
        instance: &InstanceId,
        namespace: NamespaceHandle,
        question: &LoadQuestion,
        found: FoundBytes,
        speeds: impl FnOnce() -> Vec<DriveSpeed>,
    ) -> Decision {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let policy = match (state.policy, question.policy) {
            (LoadPolicy::Never, _) => LoadPolicy::Never,
            (ours, theirs) => theirs.unwrap_or(ours),
        };
        let judge = state.judge(instance, namespace, now);
        if judge.told.is_none_or(|told| now.saturating_sub(told) >= SPEEDS_INTERVAL) {
            judge.told = Some(now);
            judge.arbiter.tell_speeds(tier_speeds(&speeds()));
        }
        judge.hear(question, now, &self.counters);
        judge.arbiter.set_load_policy(policy);
        let decision = judge.arbiter.decide(self.prefix(question, found), now);
        let request = question.request.as_str();
        let end = (0..=request.len().min(REQUEST_BYTES_MAX)).rev().find(|&end| request.is_char_boundary(end));
        let name = end.and_then(|end| request.get(..end)).unwrap_or_default();
        if judge.names.len() >= DECISIONS_MAX {
            judge.names.pop_front();
        }
        judge.names.push_back((decision.id, name.into()));
        match decision.choice {
            Choice::Load => self.counters.loads.add(1),
            Choice::Recompute => self.counters.recomputes.add(1),
        }
        decision
    }

    /// Takes in what an asker has computed, where there is nothing to decide.
    pub(crate) fn hear(&self, instance: &InstanceId, namespace: NamespaceHandle, question: &LoadQuestion) {
        if !question.computed.is_empty() {
            let now = (self.clock)();
            self.state.lock().judge(instance, namespace, now).hear(question, now, &self.counters);
        }
    }

    fn prefix(&self, question: &LoadQuestion, found: FoundBytes) -> FoundPrefix {
        let tokens = question.block_tokens.max(1);
        let first_token = question.first_block.saturating_mul(tokens);
        let at = |blocks: u32| first_token.saturating_add(blocks.saturating_mul(tokens));
        let drive_tokens = u64::from(found.blocks.saturating_sub(found.dram_blocks)) * u64::from(tokens);
        FoundPrefix {
            request: 0,
            first_token,
            end_token: at(found.blocks),
            dram_end_token: at(found.dram_blocks),
            is_placed: found.is_placed,
            link_bytes_per_token: found.block_bytes / u64::from(tokens),
            stored_bytes_per_token: found.stored_bytes.checked_div(drive_tokens).unwrap_or(0),
            queued_bytes: self.queued_bytes.load(Ordering::Relaxed),
            drive_read_bytes: self.read_bytes.load(Ordering::Relaxed),
            load_share: question.load_share,
        }
    }

    /// What is in the queue at the drives now.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.queued_bytes.load(Ordering::Relaxed)
    }

    /// What was to be read beside a request has ended; `None`: not as it should.
    pub(crate) fn was_read(&self, instance: &InstanceId, bytes: u64, queued: u64, took: Option<Duration>) {
        let now = (self.clock)();
        if let Some(judge) = self.state.lock().judges.get_mut(instance) {
            judge.arbiter.was_read(bytes, queued, took, now);
        }
        self.counters.read_bytes.add(bytes);
    }

    /// What loads have read from the drives so far.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Blocks were fetched for a request: so many bytes, and `beside_bytes` for others, in this time.
    pub(crate) fn was_fetched(&self, instance: &InstanceId, bytes: u64, beside_bytes: u64, took: Duration) {
        let now = (self.clock)();
        if let Some(judge) = self.state.lock().judges.get_mut(instance) {
            judge.arbiter.was_fetched(bytes + beside_bytes, took, now);
        }
    }

    /// The decisions for a request, or all, newest first: at most `limit`.
    pub(crate) fn explain(&self, request: Option<&str>, limit: usize) -> Vec<DecisionRecord> {
        let now = (self.clock)();
        let state = self.state.lock();
        let mut records: Vec<DecisionRecord> = Vec::new();
        for (instance, judge) in &state.judges {
            let pairs = judge.arbiter.decisions().rev().zip(judge.names.iter().rev());
            let meant = pairs.filter(|(_, (_, name))| request.is_none_or(|request| is_named(name, request)));
            records.extend(meant.take(limit).map(|(decision, (_, name))| DecisionRecord {
                instance: instance.to_string(),
                request: name.to_string(),
                ago_ms: u64::try_from(now.saturating_sub(decision.at).as_millis()).unwrap_or(u64::MAX),
                text: decision.to_string(),
                is_mistake: decision.is_mistake(),
                decision: *decision,
            }));
        }
        records.sort_by_key(|record| record.ago_ms);
        records.truncate(limit);
        records
    }

    fn load_began(&self, instance: &InstanceId, id: u64) {
        let now = (self.clock)();
        if let Some(judge) = self.state.lock().judges.get_mut(instance) {
            judge.arbiter.load_began(id, now);
        }
    }

    /// `took`: `None` if it did not end well, or not as it was decided.
    fn load_ended(&self, instance: &InstanceId, id: u64, took: Option<Duration>) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let Some(judge) = state.judges.get_mut(instance) else { return };
        match took {
            Some(took) => {
                let ended = judge.arbiter.loaded(id, took, now);
                self.counters.mistaken_loads.add(ended.is_some_and(|decision| decision.is_mistake()).into());
            }
            None => judge.arbiter.abandoned(id),
        }
    }
}

impl State {
    /// The arbiter of an instance. A new one begins with what another with the same model has learned.
    fn judge(&mut self, instance: &InstanceId, namespace: NamespaceHandle, now: Duration) -> &mut Judge {
        if !self.judges.contains_key(instance) && self.judges.len() >= INSTANCES_MAX {
            let oldest = self.judges.iter().min_by_key(|(_, judge)| judge.used).map(|(instance, _)| instance.clone());
            oldest.and_then(|oldest| self.judges.remove(&oldest));
        }
        let config = ArbiterConfig { decisions_max: DECISIONS_MAX, ..ArbiterConfig::default() };
        let alike = self.judges.values().filter(|judge| judge.namespace == namespace);
        let heir = if self.judges.contains_key(instance) { None } else { alike.max_by_key(|judge| judge.used) };
        let heir = heir.map(|judge| judge.arbiter.successor(config.clone()));
        let judge = self.judges.entry(instance.clone()).or_insert_with(|| Judge {
            arbiter: heir.unwrap_or_else(|| Arbiter::new(config)),
            namespace,
            names: VecDeque::new(),
            used: now,
            told: None,
        });
        judge.used = now;
        judge
    }
}

impl Judge {
    fn hear(&mut self, question: &LoadQuestion, now: Duration, counters: &ChoiceCounters) {
        for computed in &question.computed {
            let id = (computed.decision > 0).then_some(computed.decision);
            let tokens = computed.first_token..computed.end_token.max(computed.first_token);
            let ended = self.arbiter.computed(id, tokens, computed.load_share, computed.took, now);
            counters.mistaken_recomputes.add(ended.is_some_and(|decision| decision.is_mistake()).into());
        }
    }
}

/// vLLM appends a random part to the names that its users give.
fn is_named(name: &str, request: &str) -> bool {
    name.strip_prefix(request).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Unknown as long as one drive is.
fn tier_speeds(drives: &[DriveSpeed]) -> TierSpeeds {
    let is_known = !drives.is_empty() && drives.iter().all(|drive| drive.read_bytes_per_second > 0);
    let drive_bytes_per_second = drives.iter().map(|drive| drive.read_bytes_per_second).sum();
    TierSpeeds { drive_bytes_per_second: if is_known { drive_bytes_per_second } else { 0 }, ..TierSpeeds::default() }
}

/// A load that was decided: tells the arbiter how long it took, once all shards have ended. Dropped before, it says that
/// nothing will be heard of it.
pub(crate) struct LoadWatch {
    choice: Arc<LoadChoice>,
    instance: InstanceId,
    id: u64,
    /// What each shard must load for its time to count.
    blocks: usize,
    left: AtomicU32,
    is_bad: AtomicBool,
    /// Nanoseconds of the clock; 0: not yet.
    began: AtomicU64,
    is_told: AtomicBool,
}

impl LoadWatch {
    /// The number of the decision.
    pub(crate) fn decision(&self) -> u64 {
        self.id
    }

    pub(crate) fn new(
        choice: &Arc<LoadChoice>,
        instance: &InstanceId,
        id: u64,
        blocks: usize,
        shards: u16,
    ) -> Arc<Self> {
        Arc::new(Self {
            choice: Arc::clone(choice),
            instance: instance.clone(),
            id,
            blocks,
            left: AtomicU32::new(shards.into()),
            is_bad: AtomicBool::new(false),
            began: AtomicU64::new(0),
            is_told: AtomicBool::new(false),
        })
    }

    /// A shard's load was accepted.
    pub(crate) fn began(&self) {
        let now = nanos((self.choice.clock)());
        if self.began.compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.choice.load_began(&self.instance, self.id);
        }
    }

    /// A shard has loaded so many blocks.
    pub(crate) fn shard_ended(&self, loaded: usize) {
        if loaded != self.blocks {
            self.is_bad.store(true, Ordering::Release);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let since = Duration::from_nanos(self.began.load(Ordering::Acquire));
            let took = (self.choice.clock)().saturating_sub(since);
            self.tell(Some(took).filter(|_| !self.is_bad.load(Ordering::Acquire)));
        }
    }

    fn tell(&self, took: Option<Duration>) {
        if !self.is_told.swap(true, Ordering::AcqRel) {
            self.choice.load_ended(&self.instance, self.id, took);
        }
    }
}

impl Drop for LoadWatch {
    fn drop(&mut self) {
        self.tell(None);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}

/// What a load still has to read, as the arbiter sees it in the queue at the drives.
pub(crate) struct QueuedReads {
    choice: Arc<LoadChoice>,
    left: u64,
    each: u64,
}

impl QueuedReads {
    pub(crate) fn new(choice: &Arc<LoadChoice>, bytes: u64, reads: u64) -> Self {
        choice.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { choice: Arc::clone(choice), left: bytes, each: bytes.checked_div(reads).unwrap_or(0) }
    }

    /// So many of its reads have ended.
    pub(crate) fn ended(&mut self, reads: usize) {
        let bytes = self.not_needed(reads);
        self.choice.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many of its reads need not be done after all; their bytes.
    pub(crate) fn not_needed(&mut self, reads: usize) -> u64 {
        let bytes = self.each.saturating_mul(reads as u64).min(self.left);
        self.left -= bytes;
        self.choice.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        bytes
    }
}

impl Drop for QueuedReads {
    fn drop(&mut self) {
        self.choice.queued_bytes.fetch_sub(self.left, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
