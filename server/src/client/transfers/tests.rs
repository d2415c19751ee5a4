use std::collections::{HashMap, HashSet};

use pegaflow_engine::BlockKey;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::completions::CompletionResult;
use super::*;
use crate::shared_memory;

const TIMEOUT: Duration = Duration::from_secs(60);

fn memory(blocks: u32) -> Arc<HostMemory> {
    shared_memory::create(64, blocks, None).expect("memory").0
}

struct Machine {
    transfers: Transfers,
    completions: Arc<Completions>,
    kv: Arc<HostMemory>,
    now: Instant,
}

impl Machine {
    /// A worker of 32 blocks with a session of `slots` slots.
    fn new(slots: u32) -> Self {
        let completions = Arc::new(Completions::default());
        let mut transfers = Transfers::new(Arc::clone(&completions), TIMEOUT);
        transfers.session_ready(7, Pool::new(0, memory(slots)));
        Self { transfers, completions, kv: memory(32), now: Instant::now() }
    }

    fn load(&mut self, operation: u64, blocks: std::ops::Range<u32>) {
        let blocks = blocks.map(|block| LoadBlock { index: block, block }).collect();
        self.submit(operation, Work::Load { lease: LeaseId(9), shard: 0, blocks });
    }

    fn save(&mut self, operation: u64, blocks: std::ops::Range<u32>) {
        let key = |block: u32| BlockKey::from_bytes([block as u8 + 1; 32]);
        let blocks =
            blocks.map(|block| BlockSave { key: key(block), parent: BlockKey::ROOT, depth: block, block }).collect();
        let work = Work::Save { instance: InstanceId("i".into()), group: 0, shard: 0, blocks };
        self.submit(operation, work);
    }

    fn submit(&mut self, operation: u64, work: Work) {
        self.completions.accept(OperationId(operation)).expect("not in use");
        self.transfers.submit(OperationId(operation), work, Arc::clone(&self.kv), self.now);
    }

    fn cancel(&mut self, operation: u64) {
        self.transfers.cancel(OperationId(operation), self.now);
    }

    fn load_sent(&mut self) -> proto::LoadRequest {
        match self.transfers.pump().pop() {
            Some(Action::Load { request, .. }) => request,
            _ => panic!("no load"),
        }
    }

    fn copy(&mut self) -> CopyJob {
        match self.transfers.pump().pop() {
            Some(Action::Copy(job)) => job,
            _ => panic!("no copy"),
        }
    }

    fn loaded(&mut self, request: &proto::LoadRequest, failed: Vec<u32>) {
        let loaded_dram = (request.slots.len() - failed.len()) as u32;
        let operation = request.operation;
        self.transfers.load_ended(&proto::LoadEnded { operation, loaded_dram, loaded_nvme: 0, failed });
    }

    fn copied(&mut self, job: CopyJob) {
        self.transfers.copied(&Copied { chunk: job.chunk, is_complete: true });
    }

    fn ended(&mut self) -> Vec<(u64, CompletionResult)> {
        self.completions.fetch().into_iter().map(|done| (done.operation.0, done.result)).collect()
    }

    fn free(&self) -> usize {
        self.transfers.pool.as_ref().map_or(0, |pool| pool.free.len())
    }
}

fn load_result(loaded_dram: u32, failed: impl IntoIterator<Item = u32>) -> CompletionResult {
    CompletionResult::Load(LoadOutcome { loaded_dram, loaded_nvme: 0, failed: failed.into_iter().collect() })
}

fn dropped(dropped: u32) -> CompletionResult {
    CompletionResult::Save(SaveOutcome { saved: 0, present: 0, dropped })
}

#[test]
fn a_load_larger_than_staging_goes_in_parts_and_only_the_last_consumes_the_lease() {
    let mut machine = Machine::new(4);
    machine.load(1, 0..10);
    let mut parts = Vec::new();
    for _ in 0..3 {
        let request = machine.load_sent();
        assert!(machine.transfers.pump().is_empty(), "no slots, no more chunks");
        parts.push((request.indexes.clone(), request.is_part));
        machine.loaded(&request, vec![request.slots[1]]);
        let job = machine.copy();
        assert_eq!(job.blocks.len(), request.slots.len() - 1, "what failed is not copied");
        assert!(machine.ended().is_empty(), "a copy is running");
        machine.copied(job);
    }
    assert_eq!(parts, [(vec![0, 1, 2, 3], true), (vec![4, 5, 6, 7], true), (vec![8, 9], false)]);
    assert_eq!(machine.ended(), [(1, load_result(7, [1, 5, 9]))]);
    assert_eq!(machine.free(), 4);
}

#[test]
fn saves_reach_the_server_one_at_a_time_and_in_order() {
    let mut machine = Machine::new(8);
    machine.save(1, 0..6);
    machine.save(2, 6..8);
    let mut jobs: Vec<CopyJob> = Vec::new();
    for action in machine.transfers.pump() {
        match action {
            Action::Copy(job) => jobs.push(job),
            _ => panic!("nothing is staged yet"),
        }
    }
    assert_eq!(jobs.len(), 3, "4 + 2 blocks of the first, 2 of the second");
    jobs.into_iter().rev().for_each(|job| machine.copied(job));
    let mut keys = Vec::new();
    for _ in 0..3 {
        let actions = machine.transfers.pump();
        let [Action::Save { chunk, request }] = &actions[..] else { panic!("one at a time") };
        keys.extend(request.depths.clone());
        machine.transfers.answered(*chunk, true);
        let saved = request.slots.len() as u32;
        machine.transfers.save_ended(&proto::SaveEnded { operation: *chunk, saved, present: 0, dropped: 0 });
    }
    assert_eq!(keys, (0..8).collect::<Vec<_>>());
    let saved = |saved| CompletionResult::Save(SaveOutcome { saved, present: 0, dropped: 0 });
    assert_eq!(machine.ended(), [(1, saved(6)), (2, saved(2))]);
    assert_eq!(machine.free(), 8);
}

#[test]
fn a_cancelled_load_completes_at_once_but_its_slots_stay_with_the_server() {
    let mut machine = Machine::new(4);
    machine.load(1, 0..10);
    let request = machine.load_sent();
    machine.cancel(1);
    assert_eq!(machine.ended(), [(1, load_result(0, (4..10).chain(0..4)))]);
    assert!(matches!(&machine.transfers.pump()[..], [Action::Cancel { chunks }] if chunks == &[request.operation]));
    assert_eq!(machine.free(), 0, "the server may still write them");
    machine.load(2, 0..1);
    assert!(machine.transfers.pump().is_empty());
    machine.loaded(&request, vec![]);
    assert_eq!(machine.load_sent().slots.len(), 1);
}

#[test]
fn a_running_copy_holds_the_completion_back_whatever_happens() {
    for lose_session in [false, true] {
        let mut machine = Machine::new(4);
        machine.load(1, 0..6);
        let request = machine.load_sent();
        machine.loaded(&request, vec![]);
        let load = machine.copy();
        machine.save(2, 0..1);
        assert!(machine.transfers.pump().is_empty(), "all slots are in use");
        if lose_session {
            machine.transfers.session_lost();
        } else {
            machine.cancel(1);
        }
        let before: Vec<_> = machine.ended().into_iter().map(|(operation, _)| operation).collect();
        assert_eq!(before, if lose_session { vec![2] } else { vec![] });
        machine.copied(load);
        // What the server had delivered before is good; the rest is not.
        assert_eq!(machine.ended(), [(1, load_result(4, [4, 5]))]);
    }
    let mut machine = Machine::new(4);
    machine.save(1, 0..2);
    let job = machine.copy();
    machine.cancel(1);
    assert!(machine.ended().is_empty());
    machine.copied(job);
    assert_eq!(machine.ended(), [(1, dropped(2))]);
    assert_eq!(machine.free(), 4);
}

#[test]
fn without_a_session_everything_fails_at_once() {
    let mut machine = Machine::new(4);
    machine.load(1, 0..2);
    machine.load_sent();
    machine.transfers.session_lost();
    machine.load(2, 5..7);
    machine.save(3, 0..3);
    assert_eq!(machine.ended(), [(1, load_result(0, [0, 1])), (2, load_result(0, [5, 6])), (3, dropped(3))]);
    assert!(machine.transfers.is_idle() && machine.transfers.pump().is_empty());
    machine.transfers.session_ready(8, Pool::new(0, memory(2)));
    machine.load(4, 0..1);
    assert_eq!(machine.load_sent().session, 8);
}

#[test]
fn a_refused_chunk_fails_the_rest_and_gives_its_slots_back() {
    let mut machine = Machine::new(4);
    machine.load(1, 0..6);
    let request = machine.load_sent();
    machine.transfers.answered(request.operation, false);
    assert_eq!(machine.ended(), [(1, load_result(0, [0, 1, 2, 3, 4, 5]))]);
    machine.loaded(&request, vec![]);
    assert_eq!((machine.free(), machine.ended().len()), (4, 0), "a late event of it is ignored");
}

#[test]
fn an_operation_ends_at_its_deadline_and_a_silent_server_loses_its_session() {
    let mut machine = Machine::new(4);
    machine.load(1, 0..2);
    let request = machine.load_sent();
    let deadline = machine.transfers.next_deadline().expect("an operation");
    assert!(!machine.transfers.tick(deadline - Duration::from_millis(1)));
    assert!(machine.ended().is_empty());
    assert!(!machine.transfers.tick(deadline));
    assert_eq!(machine.ended(), [(1, load_result(0, [0, 1]))]);
    let give_up = machine.transfers.next_deadline().expect("an abandoned chunk");
    assert!(machine.transfers.tick(give_up), "the slots would never come back");
    machine.loaded(&request, vec![]);
    assert!(!machine.transfers.tick(give_up));
}

/// Random calls, events, answers and ends in random order: every operation completes exactly once, never while one of its
/// copies is running, accounts for each of its blocks, and no slot is lost.
#[test]
fn any_order_of_events_keeps_the_promises() {
    for seed in 0..300 {
        let mut run = RandomRun::new(seed);
        for _ in 0..400 {
            run.step();
        }
        run.finish();
    }
}

struct RandomRun {
    seed: u64,
    random: StdRng,
    machine: Machine,
    next: u64,
    /// Blocks of every operation that has not completed.
    open: HashMap<u64, u32>,
    copies: Vec<CopyJob>,
    /// Chunks that the server has: whether a load, and the slots.
    server: Vec<(u64, bool, Vec<u32>)>,
    unanswered: Vec<u64>,
    chunk_owner: HashMap<u64, HashSet<u64>>,
    slots: u32,
}

impl RandomRun {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let slots = random.random_range(1..9);
        Self {
            seed,
            random,
            machine: Machine::new(slots),
            next: 0,
            open: HashMap::new(),
            copies: Vec::new(),
            server: Vec::new(),
            unanswered: Vec::new(),
            chunk_owner: HashMap::new(),
            slots,
        }
    }

    fn step(&mut self) {
        match self.random.random_range(0..12) {
            0..3 => {
                self.next += 1;
                let from = self.random.random_range(0..20);
                let count = self.random.random_range(0..12);
                self.open.insert(self.next, count);
                if self.random.random_bool(0.5) {
                    self.machine.load(self.next, from..from + count);
                } else {
                    self.machine.save(self.next, from..from + count);
                }
            }
            3 => {
                let operation = self.random.random_range(0..self.next + 2);
                self.machine.cancel(operation);
            }
            4..7 if !self.copies.is_empty() => {
                let at = self.random.random_range(0..self.copies.len());
                let job = self.copies.swap_remove(at);
                self.machine.copied(job);
            }
            7..10 if !self.server.is_empty() => {
                let at = self.random.random_range(0..self.server.len());
                self.end_at_server(at);
            }
            10 if !self.unanswered.is_empty() => {
                let at = self.random.random_range(0..self.unanswered.len());
                let chunk = self.unanswered.swap_remove(at);
                let is_accepted = self.random.random_bool(0.7);
                if !is_accepted {
                    self.server.retain(|(number, ..)| *number != chunk);
                }
                self.machine.transfers.answered(chunk, is_accepted);
            }
            11 if self.random.random_bool(0.1) => {
                self.machine.transfers.session_lost();
                self.server.clear();
                self.unanswered.clear();
                self.machine.transfers.session_ready(self.next, Pool::new(0, memory(self.slots)));
            }
            _ => {}
        }
        self.act();
    }

    fn end_at_server(&mut self, at: usize) {
        let (operation, is_load, slots) = self.server.swap_remove(at);
        self.unanswered.retain(|chunk| *chunk != operation);
        let count = slots.len() as u32;
        if is_load {
            let failed: Vec<u32> = slots.into_iter().filter(|_| self.random.random_bool(0.2)).collect();
            let loaded_dram = count - failed.len() as u32;
            let ended = proto::LoadEnded { operation, loaded_dram, loaded_nvme: 0, failed };
            self.machine.transfers.load_ended(&ended);
        } else {
            let saved = self.random.random_range(0..=count);
            let ended = proto::SaveEnded { operation, saved, present: 0, dropped: count - saved };
            self.machine.transfers.save_ended(&ended);
        }
    }

    fn act(&mut self) {
        for action in self.machine.transfers.pump() {
            match action {
                Action::Load { chunk, request } => self.sent(chunk, true, request.slots),
                Action::Save { chunk, request } => self.sent(chunk, false, request.slots),
                Action::Copy(job) => {
                    let owner = self.machine.transfers.chunks.get(&job.chunk).and_then(|chunk| chunk.operation);
                    let owner = owner.expect("a copy belongs to an operation").0;
                    self.chunk_owner.entry(owner).or_default().insert(job.chunk);
                    self.copies.push(job);
                }
                Action::Cancel { .. } => {}
            }
        }
        let seed = self.seed;
        for (operation, result) in self.machine.ended() {
            let asked = self.open.remove(&operation).unwrap_or_else(|| panic!("seed {seed}: {operation} ended twice"));
            let counted = match result {
                CompletionResult::Load(load) => load.loaded_dram + load.failed.len() as u32,
                CompletionResult::Save(save) => save.saved + save.dropped,
            };
            assert_eq!(counted, asked, "seed {seed}: operation {operation}");
            let mine = self.chunk_owner.remove(&operation).unwrap_or_default();
            let running = self.copies.iter().any(|job| mine.contains(&job.chunk));
            assert!(!running, "seed {seed}: operation {operation} ended while copying");
        }
    }

    fn sent(&mut self, chunk: u64, is_load: bool, slots: Vec<u32>) {
        self.server.push((chunk, is_load, slots));
        self.unanswered.push(chunk);
    }

    fn finish(&mut self) {
        while !self.copies.is_empty() || !self.server.is_empty() {
            while let Some(job) = self.copies.pop() {
                self.machine.copied(job);
            }
            while !self.server.is_empty() {
                self.end_at_server(0);
            }
            self.act();
        }
        assert!(self.open.is_empty(), "seed {}: {:?} never ended", self.seed, self.open);
        assert_eq!(self.machine.free(), self.slots as usize, "seed {}: slots lost", self.seed);
        assert!(self.machine.transfers.chunks.is_empty());
    }
}
