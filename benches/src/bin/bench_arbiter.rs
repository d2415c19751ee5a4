//! How far the arbiter's decisions are from the best ones, over speeds, loads, lengths and noise, and how long it takes to
//! find out that the drives have changed: in simulation (`pegaflow_benches::World`). Progress goes to standard error, one
//! JSON object to standard output, as its last line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use pegaflow_benches::{LENGTHS, Stretch, Told, World, WorldOutcome};
use serde_json::{Value, json};

const DRIVES_GBPS: [f64; 6] = [0.1, 0.4, 1.0, 3.0, 7.0, 14.0];
const PREFILLS: [f64; 5] = [1e3, 3e3, 1e4, 3e4, 1e5];
const LOADS: [Option<f64>; 6] = [Some(0.0), Some(0.3), Some(0.6), Some(0.9), Some(1.0), None];
const STRETCHES: [Stretch; 3] = [Stretch::Shared, Stretch::Linear, Stretch::Square];
const TOLD: [Told; 4] = [Told::Nothing, Told::Truth, Told::TooMuch, Told::TooLittle];
/// The bars: of the mean of a world and of its sum of times to the best, and of the time until it has recovered.
const WORST_MAX: f64 = 1.05;
const RECOVERY_S_MAX: f64 = 60.0;

/// Simulates the arbiter over drive speeds, prefill speeds, loads, prompt lengths and noise.
#[derive(Parser)]
struct Arguments {
    /// The seed of everything.
    #[arg(long, env = "SEED", default_value_t = 1)]
    seed: u64,
    /// Requests of a phase.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    requests: u64,
    /// Only every how manyth case.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    stride: u64,
    /// Only this case, with its bad decisions and probes.
    #[arg(long)]
    case: Option<usize>,
    /// Prints the worst so many cases.
    #[arg(long, default_value_t = 5)]
    show: usize,
    /// What `make load-or-compute` has printed: its last line has "zero_hit_overhead", measured with a real vLLM.
    #[arg(long)]
    zero_hit: Option<PathBuf>,
}

fn zero_hit(arguments: &Arguments) -> Result<Value> {
    let Some(path) = &arguments.zero_hit else { return Ok(Value::Null) };
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let last = text.lines().next_back().unwrap_or_default();
    let measured: Value = serde_json::from_str(last).with_context(|| format!("{} ends in no JSON", path.display()))?;
    Ok(measured["zero_hit_overhead"].clone())
}

fn worlds(arguments: &Arguments) -> Vec<World> {
    let mut worlds = Vec::new();
    for drive in DRIVES_GBPS {
        for prefill in PREFILLS {
            for load_share in LOADS {
                let stretches = if load_share == Some(0.0) { &STRETCHES[..1] } else { &STRETCHES[..] };
                for stretch in stretches {
                    for noise in [0.05, 0.2] {
                        let steps = [0.1, 10.0].into_iter().filter(|step| (0.1..=14.0).contains(&(drive * step)));
                        for step in steps {
                            let number = worlds.len();
                            worlds.push(World {
                                drive_bytes_per_s: drive * 1e9,
                                prefill_tokens_per_s: prefill,
                                load_share,
                                stretch: *stretch,
                                noise,
                                rate: if number % 3 == 0 { 0.5 } else { 5.0 },
                                length: (number % 7 == 3).then_some((number / 7) as u32 % LENGTHS),
                                told: TOLD[number / 5 % TOLD.len()],
                                step,
                                requests: arguments.requests as usize,
                                seed: arguments.seed.wrapping_mul(1_000_003).wrapping_add(number as u64),
                                shown_from: (arguments.case == Some(number)).then_some(1.05),
                            });
                        }
                    }
                }
            }
        }
    }
    if arguments.case.is_some() {
        worlds.retain(|world| world.shown_from.is_some());
    }
    worlds.into_iter().step_by(arguments.stride as usize).collect()
}

fn show(name: &str, runs: &[(World, WorldOutcome)], count: usize, key: impl Fn(&WorldOutcome) -> f64) {
    let mut order: Vec<&(World, WorldOutcome)> = runs.iter().collect();
    order.sort_by(|one, other| key(&other.1).total_cmp(&key(&one.1)));
    for (world, outcome) in order.into_iter().take(count) {
        eprintln!("{name} {:.3}: {world:?} {outcome:?}", key(outcome));
    }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let zero_hit = zero_hit(&arguments)?;
    let worlds = worlds(&arguments);
    let started = Instant::now();
    let mut runs = Vec::new();
    for (number, world) in worlds.iter().enumerate() {
        runs.push((*world, world.run()));
        if (number + 1) % 500 == 0 {
            eprintln!("{} of {} cases, {:.0} s", number + 1, worlds.len(), started.elapsed().as_secs_f64());
        }
    }
    show("class", &runs, arguments.show, |outcome| outcome.worst_class);
    show("recovery", &runs, arguments.show, |outcome| outcome.recovery_s);
    let most = |key: &dyn Fn(&WorldOutcome) -> f64| runs.iter().map(|(_, outcome)| key(outcome)).fold(0.0, f64::max);
    let mean = |key: &dyn Fn(&WorldOutcome) -> f64| {
        runs.iter().map(|(_, outcome)| key(outcome)).sum::<f64>() / runs.len().max(1) as f64
    };
    let share = |is_over: &dyn Fn(&WorldOutcome) -> bool| runs.iter().filter(|(_, outcome)| is_over(outcome)).count();
    let worst = most(&|outcome| outcome.mean.max(outcome.total));
    let recovery_s = most(&|outcome| outcome.recovery_s);
    println!(
        "{}",
        json!({
            "cases": runs.len(),
            "worst_over_best": worst,
            "recovery_s_max": recovery_s,
            "zero_hit_overhead": zero_hit,
            "mean_over_best": mean(&|outcome| outcome.mean),
            "worst_class_over_best": most(&|outcome| outcome.worst_class),
            "worst_request_over_best": most(&|outcome| outcome.worst_request),
            "worst_probe_over_best": most(&|outcome| outcome.worst_probe),
            "probe_share": mean(&|outcome| outcome.probes),
            "cases_above_best": share(&|outcome| outcome.mean.max(outcome.total) > WORST_MAX),
            "cases_class_above_best": share(&|outcome| outcome.worst_class > WORST_MAX),
            "cases_recovered_late": share(&|outcome| outcome.recovery_s > RECOVERY_S_MAX),
            "decisions": runs.iter().map(|(_, outcome)| outcome.decisions).sum::<u64>(),
            "seed": arguments.seed,
        })
    );
    let is_met = worst <= WORST_MAX && recovery_s <= RECOVERY_S_MAX;
    Ok(if is_met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
