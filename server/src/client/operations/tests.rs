use std::collections::HashMap;
use std::ptr::NonNull;

use pegaflow_engine::{BlockKey, Fragment, HostMemory};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::completions::CompletionResult;
use super::*;

const TIMEOUT: Duration = Duration::from_secs(60);

fn memory() -> Arc<dyn DeviceMemory> {
    let fragments = vec![Fragment { offset: 0, stride: 64, bytes: 64 }];
    let bytes = Box::leak(vec![0u8; 64 * 32].into_boxed_slice());
    memory_of(bytes, fragments)
}

#[expect(unsafe_code, reason = "registers memory of the test")]
fn memory_of(bytes: &'static mut [u8], fragments: Vec<Fragment>) -> Arc<dyn DeviceMemory> {
    let start = NonNull::new(bytes.as_mut_ptr()).expect("not null");
    // SAFETY: the bytes were leaked, so they stay, and nobody else uses them.
    Arc::new(unsafe { HostMemory::new(start, 64 * 32, fragments, 32, Box::new(())) }.expect("fits"))
}

struct Machine {
    operations: Operations,
    completions: Arc<Completions>,
    kv: Arc<dyn DeviceMemory>,
    now: Instant,
}

impl Machine {
    fn new() -> Self {
        let completions = Arc::new(Completions::default());
        let mut operations = Operations::new(Arc::clone(&completions), TIMEOUT);
        operations.session_ready(7);
        Self { operations, completions, kv: memory(), now: Instant::now() }
    }

    fn load(&mut self, id: u64, blocks: std::ops::Range<u32>) {
        let blocks = blocks.map(|block| LoadBlock { index: block, block }).collect();
        self.submit(id, Work::Load { lease: LeaseId(9), shard: 0, blocks });
    }

    fn save(&mut self, id: u64, blocks: std::ops::Range<u32>) {
        let key = |block: u32| BlockKey::from_bytes([block as u8 + 1; 32]);
        let blocks =
            blocks.map(|block| BlockSave { key: key(block), parent: BlockKey::ROOT, depth: block, block }).collect();
        self.submit(id, Work::Save { target: pegaflow_engine::InstanceId("i".into()).into(), blocks });
    }

    fn submit(&mut self, id: u64, work: Work) {
        self.completions.accept(OperationId(id)).expect("not in use");
        self.operations.submit(OperationId(id), work, Arc::clone(&self.kv), None, self.now);
    }

    /// The one load that is sent now, by its number on the wire.
    fn sent_load(&mut self) -> u64 {
        match self.operations.pump().pop() {
            Some(Action::Load { wire, .. }) => wire,
            _ => panic!("no load"),
        }
    }

    fn order(&mut self, order: u64, wire: u64, is_load: bool, blocks: &[u32]) -> Option<Action> {
        let places = blocks.iter().map(|block| block + 100).collect();
        let blocks = blocks.to_vec();
        self.operations.ordered(proto::CopyOrder { order, operation: wire, is_load, blocks, places });
        self.operations.pump().pop()
    }

    fn copy(&mut self, order: u64, wire: u64, blocks: &[u32]) -> CopyJob {
        match self.order(order, wire, true, blocks) {
            Some(Action::Copy(job)) => job,
            _ => panic!("no copy"),
        }
    }

    fn ended(&mut self) -> Vec<(u64, CompletionResult)> {
        self.completions.fetch().into_iter().map(|done| (done.operation.0, done.result)).collect()
    }
}

fn failed(blocks: impl IntoIterator<Item = u32>) -> CompletionResult {
    let failed = blocks.into_iter().collect();
    CompletionResult::Load(LoadOutcome { loaded_dram: 0, loaded_nvme: 0, failed })
}

fn is_refused(action: Option<Action>, expected: u64) -> bool {
    matches!(action, Some(Action::CopyEnded { order, is_complete: false }) if order == expected)
}

#[test]
fn a_load_copies_what_is_ordered_and_ends_when_the_server_says_so() {
    let mut machine = Machine::new();
    machine.load(1, 0..3);
    let wire = machine.sent_load();
    let job = machine.copy(5, wire, &[0, 2]);
    assert_eq!(job.blocks, [(0, Place(100)), (2, Place(102))]);
    machine.operations.copied(job.order, job.wire, true);
    assert!(matches!(machine.operations.pump()[..], [Action::CopyEnded { order: 5, is_complete: true }]));
    assert!(machine.ended().is_empty());
    machine.operations.load_ended(proto::LoadEnded {
        operation: wire,
        loaded_dram: 2,
        loaded_nvme: 0,
        failed: vec![1],
    });
    let outcome = LoadOutcome { loaded_dram: 2, loaded_nvme: 0, failed: vec![1] };
    assert_eq!(machine.ended(), [(1, CompletionResult::Load(outcome))]);
    assert!(machine.operations.is_idle());
}

#[test]
fn a_given_up_load_ends_after_its_copy_and_copies_nothing_more() {
    for lose_session in [false, true] {
        let mut machine = Machine::new();
        machine.load(1, 0..3);
        let wire = machine.sent_load();
        let job = machine.copy(5, wire, &[0]);
        if lose_session {
            machine.operations.session_lost();
            machine.operations.session_ready(8);
        } else {
            machine.operations.cancel(OperationId(1));
            assert!(matches!(&machine.operations.pump()[..], [Action::Cancel { wires }] if wires == &[wire]));
        }
        assert!(job.cancelled.load(Ordering::Acquire));
        assert!(machine.ended().is_empty(), "its copy may still write");
        machine.operations.copied(job.order, job.wire, false);
        assert_eq!(machine.ended(), [(1, failed(0..3))]);
        let told = machine.operations.pump().len();
        assert_eq!(told, usize::from(!lose_session), "a session that is over is told nothing");
        // The number may be used again at once; late orders of the old operation are not orders of the new one.
        machine.load(1, 0..3);
        let fresh = machine.sent_load();
        assert!(is_refused(machine.order(6, wire, true, &[0]), 6));
        assert_ne!(fresh, wire);
    }
}

#[test]
fn orders_that_are_not_the_operations_own_are_refused() {
    let mut machine = Machine::new();
    machine.load(1, 0..3);
    let wire = machine.sent_load();
    assert!(is_refused(machine.order(1, wire, true, &[3]), 1), "another's block");
    assert!(is_refused(machine.order(2, wire, false, &[0]), 2), "the wrong way");
    assert!(is_refused(machine.order(3, wire + 9, true, &[0]), 3), "no such operation");
    let job = machine.copy(4, wire, &[0]);
    assert!(is_refused(machine.order(5, wire, true, &[1]), 5), "one at a time");
    machine.operations.copied(job.order, job.wire, true);
}

#[test]
fn saves_reach_the_server_one_at_a_time_and_in_order() {
    let mut machine = Machine::new();
    (1..=3).for_each(|id| machine.save(id, 0..4));
    for _ in 0..3 {
        let actions = machine.operations.pump();
        let [Action::Save { wire, .. }] = &actions[..] else { panic!("one at a time") };
        machine.operations.answered(*wire, true);
        machine.operations.save_ended(&proto::SaveEnded { operation: *wire, saved: 4, present: 0, dropped: 0 });
    }
    let ids: Vec<u64> = machine.ended().into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, [1, 2, 3]);
}

#[test]
fn without_a_session_everything_ends_at_once() {
    let mut machine = Machine::new();
    machine.operations.session_lost();
    machine.load(1, 0..2);
    machine.save(2, 0..2);
    let dropped = CompletionResult::Save(SaveOutcome { saved: 0, present: 0, dropped: 2 });
    assert_eq!(machine.ended(), [(1, failed(0..2)), (2, dropped)]);
    assert!(machine.operations.pump().is_empty());
}

#[test]
fn what_takes_too_long_is_cancelled() {
    let mut machine = Machine::new();
    machine.load(1, 0..2);
    let wire = machine.sent_load();
    machine.operations.tick(machine.now);
    assert!(machine.ended().is_empty());
    machine.operations.tick(machine.now + TIMEOUT);
    assert!(matches!(&machine.operations.pump()[..], [Action::Cancel { wires }] if wires == &[wire]));
    assert_eq!(machine.ended(), [(1, failed(0..2))]);
}

/// Whatever happens in whatever order: every operation completes once, and never while its copy runs.
#[test]
fn no_operation_ends_while_its_copy_runs() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut machine = Machine::new();
    let mut submitted = 0;
    let mut completed = HashSet::new();
    let mut copying: HashMap<u64, (CopyJob, u64)> = HashMap::new();
    let mut on_server: Vec<(u64, u64, bool)> = Vec::new();
    let mut order = 0;
    for step in 0..20_000 {
        let is_over = step > 18_000;
        match random.random_range(0..8) {
            0 if !is_over => {
                submitted += 1;
                machine.load(submitted, 0..4);
            }
            1 if !is_over => {
                submitted += 1;
                machine.save(submitted, 0..4);
            }
            2 => machine.operations.cancel(OperationId(random.random_range(0..=submitted))),
            3 if random.random_ratio(1, 20) => {
                machine.operations.session_lost();
                on_server.clear();
                machine.operations.session_ready(7);
            }
            4 | 5 if !on_server.is_empty() => {
                let at = random.random_range(0..on_server.len());
                let (wire, id, is_load) = on_server[at];
                order += 1;
                if random.random_bool(0.5)
                    && let Some(Action::Copy(job)) = machine.order(order, wire, is_load, &[1, 2])
                {
                    copying.insert(order, (job, id));
                }
            }
            6 if !copying.is_empty() => {
                let key = *copying.keys().next().expect("one");
                let (job, _) = copying.remove(&key).expect("one");
                machine.operations.copied(job.order, job.wire, random.random_bool(0.9));
            }
            _ if !on_server.is_empty() => {
                let at = random.random_range(0..on_server.len());
                let (wire, id, is_load) = on_server[at];
                if !copying.values().any(|(_, copied)| *copied == id) {
                    on_server.swap_remove(at);
                    if is_load {
                        machine.operations.load_ended(proto::LoadEnded { operation: wire, ..Default::default() });
                    } else {
                        machine.operations.save_ended(&proto::SaveEnded { operation: wire, ..Default::default() });
                    }
                }
            }
            _ => {}
        }
        for action in machine.operations.pump() {
            match action {
                Action::Load { wire, .. } => on_server.push((wire, machine.operations.operations[&wire].id.0, true)),
                Action::Save { wire, .. } => {
                    on_server.push((wire, machine.operations.operations[&wire].id.0, false));
                    machine.operations.answered(wire, true);
                }
                _ => {}
            }
        }
        for (id, _) in machine.ended() {
            assert!(!copying.values().any(|(_, copied)| *copied == id), "operation {id} ended while its copy ran");
            assert!(completed.insert(id), "operation {id} ended twice");
        }
    }
    machine.operations.session_lost();
    for (job, _) in copying.into_values() {
        machine.operations.copied(job.order, job.wire, false);
    }
    completed.extend(machine.ended().into_iter().map(|(id, _)| id));
    assert_eq!(completed.len() as u64, submitted);
}
