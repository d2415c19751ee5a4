//! Every single operation of a fixed workload fails once, in every way: a first run counts the operations, then one run
//! for each of them and each way. The workload makes, fills, closes, kills, recovers and opens a store in which regions are
//! given up.

use super::history::{BLOCK_BYTES, End, History, OBJECTS, Simulator, Step};
use super::model::Fact;
use super::{SimFailure, SimFailureKind};
use crate::block::RecordKind;
use crate::nvme::io::{FaultAction, IoKind, SimOperation};

/// What a sweep has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SweepTally {
    /// Operations of the workload.
    pub operations: u64,
    /// Runs with one failed operation.
    pub runs: u64,
    /// Of these, runs in which the fault happened.
    pub fired: u64,
}

/// What is asked of a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Demand {
    /// Nobody notices.
    Unnoticed,
    /// Nothing durable is lost, nothing old comes back.
    Strict,
    /// No wrong byte: the drive lied, or lost what it had.
    Bytes,
}

/// The ways in which an operation can fail, and what is asked then.
fn ways(what: SimOperation) -> Vec<(FaultAction, Demand)> {
    let errors = |demand| [libc::EIO, libc::ENOSPC].map(|errno| (FaultAction::Errno(errno), demand));
    match what {
        SimOperation::Drive(IoKind::Sync) => {
            let mut ways = errors(Demand::Strict).to_vec();
            ways.extend([(FaultAction::Interrupted, Demand::Strict), (FaultAction::Lost, Demand::Bytes)]);
            ways
        }
        SimOperation::Drive(kind) => {
            let demand = if kind == IoKind::Write { Demand::Strict } else { Demand::Bytes };
            let mut ways = errors(demand).to_vec();
            ways.extend([
                (FaultAction::Interrupted, Demand::Unnoticed),
                (FaultAction::Short { bytes: 4096 }, Demand::Unnoticed),
                (FaultAction::Torn { bytes: 4096 }, demand),
                (FaultAction::Lost, Demand::Bytes),
                (FaultAction::FlipBit { byte: 100, bit: 3 }, Demand::Bytes),
                (FaultAction::FlipBit { byte: 4096 + 500, bit: 6 }, Demand::Bytes),
                (FaultAction::Misdirected { by: 8192 }, Demand::Bytes),
            ]);
            ways
        }
        SimOperation::IndexRead => errors(Demand::Bytes).to_vec(),
        SimOperation::IndexWrite | SimOperation::SmallFile => errors(Demand::Strict).to_vec(),
    }
}

impl Simulator {
    /// Runs the sweep; of the operations every `stride`th one, from `first` on.
    ///
    /// # Errors
    /// What was wrong; the seed is the number of the operation that failed.
    pub fn sweep(&self, first: usize, stride: usize) -> Result<SweepTally, SimFailure> {
        let history = self.guarded(0, |path, arena| {
            let mut history = self.with_key(History::new(path, 0, arena, false));
            history.script()?;
            Ok(history.world.disk().history())
        })?;
        let mut tally = SweepTally { operations: history.len() as u64, ..SweepTally::default() };
        for (number, what) in history.iter().enumerate().skip(first).step_by(stride.max(1)) {
            for (action, demand) in ways(*what) {
                tally.runs += 1;
                tally.fired += self.sweep_one(number as u64 + 1, action, demand).map_err(|mut failure| {
                    failure.message = format!("{what:?} fails with {action:?}: {}", failure.message);
                    failure
                })?;
            }
        }
        Ok(tally)
    }

    fn sweep_one(&self, number: u64, action: FaultAction, demand: Demand) -> Result<u64, SimFailure> {
        self.guarded(number, |path, arena| {
            let mut history = self.with_key(History::new(path, 0, arena, false));
            history.world.disk().inject(number, action);
            history.is_lied_to = demand == Demand::Bytes;
            history.script()?;
            let fired = history.world.disk().fired();
            if demand == Demand::Unnoticed && (history.has_failed || fired != 1) {
                return Err((SimFailureKind::Refused, "it was not tried again".to_owned()));
            }
            Ok(fired)
        })
    }
}

impl History {
    /// The workload.
    fn script(&mut self) -> Step {
        self.world.config.capacity_bytes = 6 * self.world.config.region_bytes;
        self.world.config.queue_depth = 4;
        self.step(0..4, 3000)?;
        self.remove_one(1)?;
        self.step(0..2, 5000)?;
        self.end(End::Close)?;
        for round in 0..3 {
            self.step(2..6, 13_000)?;
            self.remove_one(round)?;
            self.step(5..9, 9000)?;
        }
        self.end(End::Kill)?;
        self.step(0..3, 2000)?;
        self.end(End::PowerLoss)?;
        self.step(3..6, 20_000)?;
        self.end(End::Close)?;
        if self.open(false)? { self.end(End::Close) } else { Ok(()) }
    }

    /// Writes objects and blocks, and makes them durable.
    fn step(&mut self, names: std::ops::Range<u64>, bytes: usize) -> Step {
        self.be_open()?;
        for name in names {
            self.version += 1;
            let fact = Fact::There { version: self.version, bytes: bytes + name as usize };
            self.append(name, RecordKind::Object, fact)?;
            self.catch_up()?;
        }
        let block = OBJECTS + self.version % 3;
        self.append(block, RecordKind::Kv, Fact::There { version: 0, bytes: BLOCK_BYTES })?;
        self.flush()
    }

    fn remove_one(&mut self, name: u64) -> Step {
        self.be_open()?;
        self.append(name, RecordKind::Tombstone, Fact::Absent)?;
        self.flush()
    }

    /// A store that fails is opened again.
    fn be_open(&mut self) -> Step {
        if self.world.store.as_ref().is_some_and(|store| store.poisoned().is_some()) {
            self.end(End::PowerLoss)?;
        }
        if self.world.store.is_none() {
            self.open(false)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Step {
        self.catch_up()?;
        self.world.flush_soon();
        self.catch_up()?;
        while self.world.disk().step() {
            self.catch_up()?;
        }
        Ok(())
    }
}
