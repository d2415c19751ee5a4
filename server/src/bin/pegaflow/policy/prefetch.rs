//! `pegaflow policy prefetch`: how much of what requests find on the drive is in DRAM by the time they are scheduled.

use std::path::PathBuf;

use clap::Args;
use pegaflow_engine::{
    ByteSize, PegaflowConfig, PolicyChoice, PrefetchModel, PrefetchOutcome, ReplayTier, Result, Synthetic,
    replay_prefetch,
};
use serde_json::{Map, Value, json};

use super::{blocks_of, once, source, wrong};

#[derive(Debug, Args)]
pub(crate) struct PrefetchOptions {
    /// As of `pegaflow policy replay`; its times count.
    #[arg(value_name = "TRACE")]
    trace: Option<PathBuf>,
    /// A workload that is made up, instead of a trace: chat, agents, rag or scans.
    #[arg(long, value_name = "NAME", conflicts_with = "trace")]
    synthetic: Option<Synthetic>,
    /// The seed of all that is random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Size of DRAM: a number of blocks, or of bytes, such as 64GiB.
    #[arg(long, value_name = "SIZE")]
    dram: String,
    /// Size of the drive, likewise.
    #[arg(long, value_name = "SIZE")]
    drive: String,
    /// Bytes of a block. Default: one of 512 tokens of an 8B model with 8 KV heads.
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    block_bytes: ByteSize,
    /// Tokens of a block.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    block_tokens: u32,
    /// What drives read in a second.
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_values = ["2GB", "7GB", "14GB"])]
    drive_speeds: Vec<ByteSize>,
    /// Tokens that the engine computes in a second.
    #[arg(long, value_name = "TOKENS", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..))]
    prefill_speed: u32,
    /// Requests that are looked up ahead at a time; 0 fetches nothing.
    #[arg(long, value_name = "REQUESTS", default_value_t = 8)]
    ahead: usize,
    /// Only these policies.
    #[arg(long, value_delimiter = ',', default_values_t = [PolicyChoice::Lru, PolicyChoice::Pegaflow])]
    policies: Vec<PolicyChoice>,
}

pub(super) fn prefetch(options: &PrefetchOptions, is_json: bool) -> Result<()> {
    let block_bytes = options.block_bytes;
    if block_bytes.0 == 0 || options.drive_speeds.iter().any(|speed| speed.0 == 0) {
        return Err(wrong("--block-bytes and --drive-speeds: at least one byte"));
    }
    let capacities = [
        blocks_of("--dram", options.dram.trim(), block_bytes)?,
        blocks_of("--drive", options.drive.trim(), block_bytes)?,
    ];
    let (name, trace) = source(options.trace.as_deref(), options.synthetic, options.seed)?;
    let (mut policies, mut speeds) = (Vec::new(), Vec::new());
    options.policies.iter().for_each(|policy| once(&mut policies, *policy));
    options.drive_speeds.iter().for_each(|speed| once(&mut speeds, *speed));
    if !is_json {
        println!(
            "{:>10}  {:<9} {:>7} {:>8} {:>11} {:>7} {:>14} {:>8} {:>8} {:>8}",
            "drive",
            "policy",
            "hits",
            "waited",
            "drive hits",
            "ready",
            "ready, waited",
            "fetched",
            "in vain",
            "no room"
        );
    }
    let mut json = Map::new();
    for policy in policies {
        let mut of_policy = Map::new();
        for speed in &speeds {
            let model = PrefetchModel {
                read_us: micros(block_bytes.0, speed.0),
                compute_us: micros(options.block_tokens.into(), options.prefill_speed.into()),
                ahead_max: options.ahead,
            };
            let tiers = capacities.map(|capacity| ReplayTier {
                policy,
                capacity,
                config: PegaflowConfig {
                    remembered_max: capacity.max(1 << 16) as usize,
                    seed: options.seed,
                    ..PegaflowConfig::default()
                },
            });
            let outcome = replay_prefetch(&trace, tiers, model, &mut |_| ());
            if !is_json {
                row(*speed, policy, &outcome);
            }
            of_policy.insert(speed.to_string(), figures(&outcome));
        }
        json.insert(policy.name().into(), Value::Object(of_policy));
    }
    println!(
        "{}",
        json!({ "trace": name, "dram_blocks": capacities[0], "drive_blocks": capacities[1], "policies": json })
    );
    Ok(())
}

/// How long `amount` takes, in microseconds; at least one.
fn micros(amount: u64, per_second: u64) -> u64 {
    ((amount as f64 / per_second as f64 * 1e6).round() as u64).max(1)
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn row(speed: ByteSize, policy: PolicyChoice, outcome: &PrefetchOutcome) {
    println!(
        "{:>8}/s  {:<9} {:>7.4} {:>8.4} {:>11} {:>7.4} {:>14.4} {:>8} {:>8.4} {:>8}",
        speed.to_string(),
        policy.name(),
        share(outcome.hits, outcome.references),
        share(outcome.waited, outcome.requests),
        outcome.drive_hits,
        share(outcome.ready, outcome.drive_hits),
        share(outcome.ready, outcome.waited_drive_hits),
        outcome.fetched,
        share(outcome.wasted, outcome.fetched),
        outcome.no_room
    );
}

fn figures(outcome: &PrefetchOutcome) -> Value {
    json!({
        "hit": share(outcome.hits, outcome.references),
        "waited": share(outcome.waited, outcome.requests),
        "wait_s": outcome.waited_us as f64 / 1e6 / outcome.requests.max(1) as f64,
        "drive_hits": outcome.drive_hits,
        "ready": share(outcome.ready, outcome.drive_hits),
        "ready_of_waited": share(outcome.ready, outcome.waited_drive_hits),
        "fetched": outcome.fetched,
        "in_vain": share(outcome.wasted, outcome.fetched),
        "no_room": outcome.no_room,
    })
}
