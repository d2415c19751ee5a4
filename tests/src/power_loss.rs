//! Power losses and damage on a simulated drive, on all cores: histories by their seeds, the sweep of failing operations,
//! flipped bits, torn logs. What is simulated is in `docs/reliability.md`.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use parking_lot::Mutex;
use pegaflow_tiers::{DamageTally, SimFailure, SimOptions, SimTally, Simulator, SweepTally};

/// Failures that are kept; more are only counted.
const FAILURES_MAX: usize = 20;
/// Random bytes of payload that are flipped.
const PAYLOAD_FLIPS: usize = 2000;

/// What was simulated, and what was wrong.
#[derive(Default)]
pub struct Simulated {
    /// The histories.
    pub tally: SimTally,
    /// How long they took.
    pub elapsed: Duration,
    /// The sweep of failing operations.
    pub sweep: SweepTally,
    /// Flipped bits and torn logs.
    pub damage: DamageTally,
    /// What was wrong, the first of it.
    pub failures: Vec<SimFailure>,
}

/// One history, told on standard error.
///
/// # Errors
/// If there is no memory for it.
pub fn replay(seed: u64, is_encrypted: bool) -> Result<Simulated> {
    let directory = memory_directory()?;
    let simulator = Simulator::new(SimOptions { is_told: true, is_encrypted, ..SimOptions::new(directory.path()) })?;
    let mut simulated = Simulated::default();
    match simulator.run(seed) {
        Ok(tally) => simulated.tally = tally,
        Err(failure) => simulated.failures.push(failure),
    }
    Ok(simulated)
}

/// The histories of `count` seeds from `first` on.
///
/// # Errors
/// If there is no memory for them.
pub fn histories(
    first: u64,
    count: u64,
    is_encrypted: bool,
    progress: &ProgressBar,
    into: &mut Simulated,
) -> Result<()> {
    let directory = memory_directory()?;
    let (next, tally, failures) = (AtomicU64::new(0), Mutex::new(SimTally::default()), Mutex::new(Vec::new()));
    let started = Instant::now();
    on_all_cores(directory.path(), is_encrypted, |simulator, _, _| {
        let mut own = SimTally::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            match simulator.run(first + number) {
                Ok(one) => own.add(&one),
                Err(failure) => {
                    progress.suspend(|| eprintln!("{failure} (again with --seed {})", failure.seed));
                    failures.lock().push(failure);
                }
            }
            progress.inc(1);
        }
        tally.lock().add(&own);
        Ok(())
    })?;
    into.tally.add(&tally.into_inner());
    into.elapsed += started.elapsed();
    into.keep(failures.into_inner());
    Ok(())
}

/// The sweep, the flips and the torn logs, in full (`stride` 1) or every `stride`th.
///
/// # Errors
/// If there is no memory for them.
pub fn damages(stride: usize, is_encrypted: bool, into: &mut Simulated) -> Result<()> {
    let directory = memory_directory()?;
    let found: Mutex<(SweepTally, DamageTally, Vec<SimFailure>)> = Mutex::default();
    on_all_cores(directory.path(), is_encrypted, |simulator, core, cores| {
        let swept = simulator.sweep(core * stride, cores * stride);
        let damaged = match core {
            0 => simulator.flips(stride, PAYLOAD_FLIPS / stride),
            1 => simulator.tears(stride),
            _ => Ok(DamageTally::default()),
        };
        let alone = if cores == 1 { simulator.tears(stride) } else { Ok(DamageTally::default()) };
        let mut found = found.lock();
        match swept {
            Ok(swept) => {
                found.0.operations = swept.operations;
                found.0.runs += swept.runs;
                found.0.fired += swept.fired;
            }
            Err(failure) => found.2.push(failure),
        }
        for damaged in [damaged, alone] {
            match damaged {
                Ok(damaged) => found.1.add(&damaged),
                Err(failure) => found.2.push(failure),
            }
        }
        Ok(())
    })?;
    let (sweep, damage, failures) = found.into_inner();
    (into.sweep, into.damage) = (sweep, damage);
    into.keep(failures);
    Ok(())
}

impl Simulated {
    fn keep(&mut self, failures: Vec<SimFailure>) {
        self.failures.extend(failures);
        self.failures.truncate(FAILURES_MAX);
    }
}

/// Runs `work` once for each core, with a simulator of its own, its number and how many there are.
fn on_all_cores(
    directory: &Path,
    is_encrypted: bool,
    work: impl Fn(&Simulator, usize, usize) -> Result<()> + Sync,
) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores)
            .map(|core| {
                let work = &work;
                let directory = directory.join(core.to_string());
                scope.spawn(move || {
                    std::fs::create_dir_all(&directory)?;
                    let options = SimOptions { is_encrypted, ..SimOptions::new(directory) };
                    work(&Simulator::new(options)?, core, cores)
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => anyhow::bail!("a thread of the simulation panicked"),
        })
    })
}

/// Where the real names of simulated files lie: in memory where there is such a file system.
fn memory_directory() -> Result<tempfile::TempDir> {
    let builder = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix("pegaflow-torture-");
        builder
    };
    builder().tempdir_in("/dev/shm").or_else(|_| builder().tempdir_in(".")).context("a directory for the simulation")
}
