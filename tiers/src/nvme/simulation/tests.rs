//! Short runs of everything that `make torture` runs in full, and the proof that each protection is needed.

mod scenarios;
mod switched_off;

use super::*;

/// Where names lie: in memory where there is such a file system.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

fn simulator(directory: &tempfile::TempDir) -> Simulator {
    let (is_told, bias) = (std::env::var("TELL").is_ok(), bias_from_environment());
    let options = SimOptions { is_told, bias, ..SimOptions::new(directory.path()) };
    Simulator::new(options).expect("memory")
}

fn bias_from_environment() -> SimBias {
    match std::env::var("BIAS").as_deref() {
        Ok("drives") => SimBias::Drives,
        Ok("faults") => SimBias::Faults,
        Ok("kills") => SimBias::Kills,
        Ok("purges") => SimBias::Purges,
        _ => SimBias::None,
    }
}

fn seeds_from_environment(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("FIRST").unwrap_or(0);
            first..first + number("SEEDS").unwrap_or(default)
        }
    }
}

#[test]
fn nothing_is_lost_and_nothing_is_wrong_whatever_the_power_does() {
    let directory = directory();
    let simulator = simulator(&directory);
    let mut tally = SimTally::default();
    let started = std::time::Instant::now();
    let mut failures = Vec::new();
    for seed in seeds_from_environment(300) {
        match simulator.run(seed) {
            Ok(one) => tally.add(&one),
            Err(failure) => {
                eprintln!("{failure}");
                failures.push(failure.to_string());
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    let has_met_all = tally.reclaimed > 0 && tally.crashes_in_open > 0 && tally.kept_tombstones > 0;
    assert!(has_met_all || tally.seeds < 100, "{tally:?}");
    println!("{tally:?} in {:?}", started.elapsed());
}

#[test]
fn an_encrypted_store_keeps_its_promises_too() {
    let directory = directory();
    let is_encrypted = true;
    let options = || SimOptions { is_encrypted, bias: bias_from_environment(), ..SimOptions::new(directory.path()) };
    let simulator = Simulator::new(options()).expect("memory");
    let mut tally = SimTally::default();
    for seed in seeds_from_environment(150) {
        tally.add(&simulator.run(seed).unwrap_or_else(|failure| panic!("{failure}")));
    }
    assert!(tally.reclaimed > 0 && tally.rebuilt > 0 || tally.seeds < 100, "{tally:?}");
    let flips = simulator.flips(16, 500).unwrap_or_else(|failure| panic!("{failure}"));
    let tears = simulator.tears(64).unwrap_or_else(|failure| panic!("{failure}"));
    let sweep = simulator.sweep(5, 23).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{tally:?} {flips:?} {tears:?} {sweep:?}");
}

#[test]
fn what_was_purged_does_not_come_back_whatever_the_power_does() {
    let directory = directory();
    let mut tally = SimTally::default();
    for is_encrypted in [false, true] {
        let options = SimOptions { is_encrypted, bias: SimBias::Purges, ..SimOptions::new(directory.path()) };
        let simulator = Simulator::new(options).expect("memory");
        for seed in seeds_from_environment(300) {
            tally.add(&simulator.run(seed).unwrap_or_else(|failure| panic!("encrypted {is_encrypted}: {failure}")));
        }
    }
    assert!(tally.purges > 100 && tally.rebuilt > 0 || tally.seeds < 100, "{tally:?}");
    println!("{tally:?}");
}

/// Histories that failed once, because of the store or of the oracle.
#[test]
fn what_failed_once_does_not_fail_again() {
    let directory = directory();
    let seeds = [(SimBias::Drives, 21_735), (SimBias::None, 24_542)];
    for (bias, seed) in seeds {
        let simulator = Simulator::new(SimOptions { bias, ..SimOptions::new(directory.path()) }).expect("memory");
        simulator.run(seed).unwrap_or_else(|failure| panic!("{bias:?}: {failure}"));
    }
}

#[test]
fn a_seed_is_one_history() {
    let directory = directory();
    let simulator = simulator(&directory);
    for seed in seeds_from_environment(60) {
        assert_eq!(simulator.run(seed), simulator.run(seed), "seed {seed}");
    }
}

#[test]
fn each_operation_may_fail_in_every_way() {
    let directory = directory();
    let tally = simulator(&directory).sweep(3, 11).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{tally:?}");
    assert!(tally.operations > 300 && tally.fired > tally.runs / 2, "{tally:?}");
}

#[test]
fn each_flipped_bit_is_a_miss_and_takes_nothing_with_it() {
    let directory = directory();
    let tally = simulator(&directory).flips(16, 500).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{tally:?}");
}

#[test]
fn a_log_may_be_cut_at_every_sector() {
    let directory = directory();
    let tally = simulator(&directory).tears(16).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{tally:?}");
    assert!(tally.right > tally.torn_cuts && tally.missing > tally.torn_cuts, "{tally:?}");
}
