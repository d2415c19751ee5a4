//! Replays a trace through DRAM and a drive with its own times: what of that which requests find on the drive is in DRAM
//! when they are scheduled, because it was fetched while they waited. The policies are the engine's own; the inference engine
//! is a model.
//!
//! **The model.** Requests are scheduled in order, each when the prefill of the one before it has ended; a prefill takes so long
//! for each block that was not found. Loads go on beside prefills. Whoever has to wait is looked up when it arrives, a few at a
//! time, as the connector does. The drive reads one block after the other: loads first, then what is fetched, in order.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{ReplayTier, Trace, TraceRequest, bring_in};
use crate::policy::{Policy, PolicyBlock, PolicyRequest};
use crate::residency::ASKED_WORTH;

/// Blocks that were fetched and not used yet take no more than this part of DRAM, as in the engine.
const READY_PART: usize = 4;

/// Time in microseconds.
type Us = u64;

/// How fast things are.
#[derive(Debug, Clone, Copy)]
pub struct PrefetchModel {
    /// Microseconds to read a block from the drive.
    pub read_us: u64,
    /// Microseconds to compute a block.
    pub compute_us: u64,
    /// Requests looked up ahead at a time; 0: nothing is fetched. The connector's: 8.
    pub ahead_max: usize,
}

/// What a replay with fetches came to. All numbers are blocks, if not said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefetchOutcome {
    /// References.
    pub references: u64,
    /// Found when the request was scheduled, in any tier.
    pub hits: u64,
    /// Found on the drive and not in DRAM when the request arrived.
    pub drive_hits: u64,
    /// Those of them that were in DRAM when it was scheduled.
    pub ready: u64,
    /// Fetched.
    pub fetched: u64,
    /// Fetched, and gone before a request used them, or not used by the end.
    pub wasted: u64,
    /// Not fetched because everything in DRAM was worth more.
    pub no_room: u64,
    /// Requests.
    pub requests: u64,
    /// Requests that had to wait to be scheduled.
    pub waited: u64,
    /// Microseconds that they waited in all.
    pub waited_us: u64,
    /// `drive_hits` of requests that had to wait.
    pub waited_drive_hits: u64,
}

/// A request that is looked up ahead.
struct Wish {
    request: usize,
    /// Blocks to read, first to last.
    reads: VecDeque<PolicyBlock>,
    parents: HashMap<u64, u64>,
    since: Us,
    /// What counted as the past when it came, for policies that know only an order.
    asked_at: u64,
    held: Vec<u64>,
    /// Blocks that it has brought.
    ready: usize,
}

struct Sim<'a> {
    requests: Vec<TraceRequest<'a>>,
    model: PrefetchModel,
    dram: Box<dyn Policy>,
    drive: Box<dyn Policy>,
    dram_blocks: usize,
    drive_blocks: usize,
    /// When each block in DRAM was used last, counted in uses.
    used: HashMap<u64, u64>,
    uses: u64,
    /// Fetched and not used yet.
    fetched: HashSet<u64>,
    /// By block, how many of those looked up ahead hold it.
    held: HashMap<u64, u32>,
    wishes: VecDeque<Wish>,
    /// Blocks that they have brought.
    ready: usize,
    /// Scheduled next, in order; and those of them that were found on the drive when they arrived.
    queue: VecDeque<(usize, HashSet<u64>)>,
    not_looked_up: VecDeque<usize>,
    drive_free: Us,
    engine_free: Us,
    outcome: PrefetchOutcome,
}

/// Replays a trace. `progress` is called with the number of requests done, now and then.
pub fn replay_prefetch(
    trace: &Trace,
    [dram, drive]: [ReplayTier; 2],
    model: PrefetchModel,
    progress: &mut dyn FnMut(usize),
) -> PrefetchOutcome {
    let mut sim = Sim {
        requests: trace.requests().collect(),
        model,
        dram: dram.policy.build(dram.capacity, dram.config),
        drive: drive.policy.build(drive.capacity, drive.config),
        dram_blocks: dram.capacity as usize,
        drive_blocks: drive.capacity as usize,
        used: HashMap::new(),
        uses: 0,
        fetched: HashSet::new(),
        held: HashMap::new(),
        wishes: VecDeque::new(),
        ready: 0,
        queue: VecDeque::new(),
        not_looked_up: VecDeque::new(),
        drive_free: 0,
        engine_free: 0,
        outcome: PrefetchOutcome { references: trace.references() as u64, ..PrefetchOutcome::default() },
    };
    for at in 0..sim.requests.len() {
        sim.schedule_until(sim.requests[at].now_ms * 1000);
        sim.arrive(at);
        if at % 256 == 0 {
            progress(at);
        }
    }
    sim.schedule_until(Us::MAX);
    sim.outcome.wasted += sim.fetched.len() as u64;
    sim.outcome
}

impl Sim<'_> {
    /// Schedules whoever is next, as long as that is not after `until`.
    fn schedule_until(&mut self, until: Us) {
        while let Some((next, _)) = self.queue.front() {
            let at = self.engine_free.max(self.requests[*next].now_ms * 1000);
            if at > until {
                break;
            }
            self.fetch_until(at);
            if let Some((next, on_drive)) = self.queue.pop_front() {
                self.schedule(next, &on_drive, at);
            }
            self.look_ahead(at);
        }
        if until < Us::MAX {
            self.fetch_until(until);
        }
    }

    fn arrive(&mut self, at: usize) {
        let request = self.requests[at];
        let now = request.now_ms * 1000;
        let on_drive: HashSet<u64> = self.found(at).filter(|key| !self.dram.contains(*key)).collect();
        self.outcome.requests += 1;
        self.outcome.drive_hits += on_drive.len() as u64;
        if self.queue.is_empty() && self.engine_free <= now {
            return self.schedule(at, &on_drive, now);
        }
        self.outcome.waited += 1;
        self.outcome.waited_drive_hits += on_drive.len() as u64;
        self.queue.push_back((at, on_drive));
        self.not_looked_up.push_back(at);
        self.look_ahead(now);
    }

    /// The keys of a request's blocks up to the first that is nowhere.
    fn found(&self, at: usize) -> impl Iterator<Item = u64> + '_ {
        let keys = self.requests[at].blocks.iter().map(|block| block.key);
        keys.take_while(|key| self.dram.contains(*key) || self.drive.contains(*key))
    }

    fn look_ahead(&mut self, now: Us) {
        while self.wishes.len() < self.model.ahead_max
            && let Some(at) = self.not_looked_up.pop_front()
        {
            self.ask(at, now);
            let found: HashSet<u64> = self.found(at).collect();
            let held: Vec<u64> = found.iter().copied().filter(|key| self.dram.contains(*key)).collect();
            held.iter().for_each(|key| *self.held.entry(*key).or_default() += 1);
            let chain = self.requests[at].blocks;
            let is_wanted = |block: &&PolicyBlock| found.contains(&block.key) && !self.dram.contains(block.key);
            let reads = chain.iter().filter(is_wanted).copied().collect();
            let parents = chain.windows(2).map(|pair| (pair[1].key, pair[0].key)).collect();
            self.wishes.push_back(Wish {
                request: at,
                reads,
                parents,
                since: now,
                asked_at: self.uses,
                held,
                ready: 0,
            });
        }
    }

    /// Tells the policies of a request.
    fn ask(&mut self, at: usize, now: Us) {
        let TraceRequest { tenant, blocks, .. } = self.requests[at];
        let asked = PolicyRequest { chain: blocks, tenant, now_ms: now / 1000 };
        self.dram.request(&asked);
        self.drive.request(&asked);
    }

    /// Lets the drive read what is to be fetched.
    fn fetch_until(&mut self, until: Us) {
        while let Some(at) = self.wishes.iter().position(|wish| !wish.reads.is_empty()) {
            if self.ready >= (self.dram_blocks / READY_PART).max(1) {
                return;
            }
            let begin = self.drive_free.max(self.wishes[at].since);
            if begin.saturating_add(self.model.read_us) > until {
                return;
            }
            let Some(block) = self.wishes[at].reads.pop_front() else { return };
            if self.dram.contains(block.key) {
                continue;
            }
            if !self.make_room(&block, self.wishes[at].asked_at) {
                self.outcome.no_room += 1 + self.wishes[at].reads.len() as u64;
                self.wishes[at].reads.clear();
                continue;
            }
            self.drive_free = begin + self.model.read_us;
            let parent = self.wishes[at].parents.get(&block.key).copied();
            self.dram.admits(&block, parent, false);
            self.dram.insert(&block, parent);
            self.fetched.insert(block.key);
            self.outcome.fetched += 1;
            self.wishes[at].ready += 1;
            self.ready += 1;
        }
    }

    /// As `Residency::alloc_colder` does.
    fn make_room(&mut self, newcomer: &PolicyBlock, asked_at: u64) -> bool {
        if self.dram.len() < self.dram_blocks {
            return true;
        }
        let (held, fetched, used) = (&self.held, &self.fetched, &self.used);
        let mut may_leave = |key: u64| !held.contains_key(&key) && !fetched.contains(&key);
        let left = if self.dram.takes_last_first() {
            self.dram.evict(&mut |key| may_leave(key) && used.get(&key).is_none_or(|used| *used < asked_at))
        } else {
            self.dram.evict_for(newcomer, ASKED_WORTH, &mut may_leave)
        };
        if let Some(left) = left {
            self.used.remove(&left);
        }
        left.is_some()
    }

    fn schedule(&mut self, at: usize, on_drive: &HashSet<u64>, now: Us) {
        let request = self.requests[at];
        self.outcome.waited_us += now - request.now_ms * 1000;
        match self.wishes.iter().position(|wish| wish.request == at) {
            Some(place) => {
                let wish = self.wishes.remove(place);
                self.ready -= wish.as_ref().map_or(0, |wish| wish.ready);
                // Reads that could not begin for want of room begin now.
                self.wishes.iter_mut().for_each(|wish| wish.since = wish.since.max(now));
                for key in wish.map(|wish| wish.held).unwrap_or_default() {
                    if let Some(count) = self.held.get_mut(&key) {
                        *count -= 1;
                    }
                    if self.held.get(&key) == Some(&0) {
                        self.held.remove(&key);
                    }
                }
            }
            None => {
                self.not_looked_up.retain(|other| *other != at);
                self.ask(at, now);
            }
        }
        let found: Vec<u64> = self.found(at).collect();
        let to_read = found.iter().filter(|key| !self.dram.contains(**key)).count() as u64;
        self.outcome.hits += found.len() as u64;
        for key in found.iter().filter(|key| self.dram.contains(**key)) {
            self.outcome.ready += u64::from(on_drive.contains(key));
            self.fetched.remove(key);
        }
        self.drive_free = self.drive_free.max(now) + to_read * self.model.read_us;
        let missing = request.blocks.len() as u64 - found.len() as u64;
        self.engine_free = self.engine_free.max(now) + missing * self.model.compute_us;
        let held = &self.held;
        bring_in(self.dram.as_mut(), request.blocks, self.dram_blocks, &mut |key| !held.contains_key(&key));
        bring_in(self.drive.as_mut(), request.blocks, self.drive_blocks, &mut |_| true);
        for block in request.blocks.iter().rev() {
            self.uses += 1;
            self.used.insert(block.key, self.uses);
        }
        let before = self.fetched.len();
        self.fetched.retain(|key| self.dram.contains(*key));
        self.outcome.wasted += (before - self.fetched.len()) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{PegaflowConfig, PolicyChoice};

    const MODEL: PrefetchModel = PrefetchModel { read_us: 1000, compute_us: 10_000, ahead_max: 8 };

    fn tiers(policy: PolicyChoice, dram: u64, drive: u64) -> [ReplayTier; 2] {
        [dram, drive].map(|capacity| ReplayTier { policy, capacity, config: PegaflowConfig::default() })
    }

    /// Forty conversations of ten blocks, then each once more with ten new ones.
    fn twice(gap_ms: u64) -> Trace {
        let mut trace = Trace::default();
        for round in 0..2 {
            for chat in 0..40u64 {
                let now_ms = round * 1_000_000 + chat * gap_ms;
                let new = round * 10;
                trace.push(now_ms, 0, (0..10 + new).map(|block| chat * 100 + block + 1));
            }
        }
        trace
    }

    fn run(gap_ms: u64, dram: u64, model: PrefetchModel) -> PrefetchOutcome {
        replay_prefetch(&twice(gap_ms), tiers(PolicyChoice::Pegaflow, dram, 4000), model, &mut |_| ())
    }

    #[test]
    fn who_waits_finds_its_blocks_in_dram_and_who_does_not_finds_them_on_the_drive() {
        // All at once: one after the other is computed, 100 ms each, while 10 ms of reads go on for the next.
        let roomy = run(0, 1000, MODEL);
        assert_eq!((roomy.requests, roomy.waited, roomy.hits), (80, 78, 400));
        assert_eq!((roomy.drive_hits, roomy.fetched), (0, 0), "DRAM has all of it: {roomy:?}");
        let crowd = run(0, 160, MODEL);
        assert!(crowd.drive_hits >= 240 && crowd.ready * 10 >= crowd.drive_hits * 7, "{crowd:?}");
        assert!(crowd.fetched >= crowd.ready && crowd.wasted * 10 <= crowd.fetched, "{crowd:?}");
        // A second apart nobody waits.
        let alone = run(1000, 160, MODEL);
        assert_eq!((alone.waited, alone.fetched, alone.ready), (0, 0, 0));
        assert!(alone.drive_hits >= 240, "{alone:?}");
        let off = run(0, 160, PrefetchModel { ahead_max: 0, ..MODEL });
        assert_eq!((off.fetched, off.hits), (0, 400));
    }

    #[test]
    fn a_drive_that_is_too_slow_is_late() {
        let (late, fast) = (run(0, 160, PrefetchModel { read_us: 20_000, ..MODEL }), run(0, 160, MODEL));
        assert!(late.ready < fast.ready, "{late:?} {fast:?}");
    }

    #[test]
    fn the_same_again_is_the_same() {
        let run = || replay_prefetch(&twice(30), tiers(PolicyChoice::Pegaflow, 60, 500), MODEL, &mut |_| ());
        assert_eq!(run(), run());
    }
}
