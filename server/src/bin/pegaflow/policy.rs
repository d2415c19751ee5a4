//! `pegaflow policy`: replays traces through the policies of the engine, and measures what the policies cost. Needs no
//! server.

mod cost;
mod plot;
mod prefetch;
mod report;
mod run;
mod trace_file;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pegaflow_engine::{ByteSize, Error, ErrorKind, PolicyChoice, Result, Synthetic, Trace};

use prefetch::PrefetchOptions;

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Replays a trace of requests: what each policy finds and writes, for tiers of several sizes, and what could be found
    /// if the future were known.
    ///
    /// The last line of output is one JSON object.
    Replay(ReplayOptions),
    /// Replays a trace with its own times through DRAM and a drive: how much of what requests find on the drive was fetched
    /// to DRAM while they waited to be scheduled, and how much was fetched in vain. The engine is a model: requests are
    /// scheduled in order, each when the prefill of the one before it has ended.
    ///
    /// The last line of output is one JSON object.
    Prefetch(PrefetchOptions),
    /// Measures time and memory for each block, at any number of blocks.
    Cost {
        /// Blocks in the tier.
        #[arg(long, default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1000..=100_000_000))]
        blocks: u64,
        /// Only these policies.
        #[arg(long, value_delimiter = ',', default_values_t = PolicyChoice::ALL)]
        policies: Vec<PolicyChoice>,
        /// Blocks of so many namespaces, with their shares of the tier, as in DRAM; without it a policy alone.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1040))]
        namespaces: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ReplayOptions {
    /// A JSON object a line, with `timestamp` (ms) and `hash_ids` (one number for each block, which stands for all blocks
    /// before it too); plain, or compressed with zstd.
    #[arg(value_name = "TRACE")]
    trace: Option<PathBuf>,
    /// A workload that is made up, instead of a trace: chat, agents, rag or scans.
    #[arg(long, value_name = "NAME", conflicts_with = "trace")]
    synthetic: Option<Synthetic>,
    /// The seed of all that is random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Sizes of the tier: numbers of blocks, or of bytes, such as 64GiB.
    #[arg(long, value_name = "SIZES", value_delimiter = ',', required = true)]
    capacities: Vec<String>,
    /// How many bytes a block has, where sizes are given in bytes.
    #[arg(long, value_name = "SIZE", default_value = "2MiB")]
    block_bytes: ByteSize,
    /// A tier of DRAM of this size before the tier of `--capacities`, which then is the drive.
    #[arg(long, value_name = "SIZE")]
    dram: Option<String>,
    /// Only these policies.
    #[arg(long, value_delimiter = ',', default_values_t = PolicyChoice::ALL)]
    policies: Vec<PolicyChoice>,
    /// How many times a newcomer must be worth the block that would leave for it, for our policy. More saves writes.
    #[arg(long, value_name = "HURDLE", default_value_t = 1.0, value_parser = hurdle)]
    write_hurdle: f32,
    /// Several of them: hit ratio against writes.
    #[arg(long, value_name = "HURDLES", value_delimiter = ',', value_parser = hurdle)]
    pareto: Vec<f32>,
    /// Draws hit ratio against size, as PATH.svg and PATH.png.
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
}

/// Prints tables, and a JSON object as the last line; with `is_json` that object only.
pub(crate) fn policy(command: &PolicyCommand, is_json: bool) -> Result<()> {
    match command {
        PolicyCommand::Replay(options) => replay(options, is_json),
        PolicyCommand::Prefetch(options) => prefetch::prefetch(options, is_json),
        PolicyCommand::Cost { blocks, policies, namespaces } => {
            cost::measure(*blocks, policies, *namespaces, is_json);
            Ok(())
        }
    }
}

fn replay(options: &ReplayOptions, is_json: bool) -> Result<()> {
    if options.block_bytes.0 == 0 {
        return Err(wrong("--block-bytes: a block has at least one byte"));
    }
    let capacity = |option, text: &str| blocks_of(option, text, options.block_bytes);
    let mut sizes: Vec<(String, u64)> = Vec::new();
    for text in options.capacities.iter().map(|text| text.trim()) {
        let blocks = capacity("--capacities", text)?;
        once(&mut sizes, (text.to_owned(), blocks));
    }
    let dram = options.dram.as_deref().map(|text| capacity("--dram", text.trim())).transpose()?;
    let (mut policies, mut hurdles) = (Vec::new(), Vec::new());
    options.policies.iter().for_each(|policy| once(&mut policies, *policy));
    options.pareto.iter().for_each(|hurdle| once(&mut hurdles, *hurdle));
    // Before the replays, which may take minutes.
    options.plot.as_deref().map(plot::check).transpose()?;
    let (name, trace) = source(options.trace.as_deref(), options.synthetic, options.seed)?;
    let setup = run::Setup {
        policies: &policies,
        sizes: &sizes,
        dram,
        hurdles: &hurdles,
        write_hurdle: options.write_hurdle,
        seed: options.seed,
    };
    let results = run::all(&trace, &setup);
    let drawn = options.plot.as_deref().map(|path| plot::write(path, &name, &results)).transpose()?.unwrap_or_default();
    if !is_json {
        report::print(&results, dram.is_some());
        drawn.iter().for_each(|file| println!("drawn: {}", file.display()));
    }
    println!("{}", report::json(&name, &results));
    Ok(())
}

/// What is to be replayed, with its name.
fn source(trace: Option<&Path>, synthetic: Option<Synthetic>, seed: u64) -> Result<(String, Trace)> {
    let (name, trace) = match (trace, synthetic) {
        (Some(path), _) => (path.display().to_string(), trace_file::read(path)?),
        (None, Some(workload)) => (workload.name().to_string(), workload.trace(seed)),
        (None, None) => {
            return Err(wrong("what to replay? Give a TRACE, or --synthetic with chat, agents, rag or scans"));
        }
    };
    eprintln!(
        "{name}: {} requests, {} references to {} blocks",
        trace.len(),
        trace.references(),
        trace.unique_blocks()
    );
    Ok((name, trace))
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// What is named twice is replayed once.
fn once<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

fn hurdle(text: &str) -> std::result::Result<f32, String> {
    let hurdle = text.trim().parse::<f32>().ok().filter(|hurdle| hurdle.is_finite() && *hurdle >= 0.0);
    hurdle.ok_or_else(|| "a hurdle is a number from 0 on, such as 1.5".into())
}

/// A number of blocks, or of bytes.
fn blocks_of(option: &str, text: &str, block_bytes: ByteSize) -> Result<u64> {
    let bytes = text.parse::<ByteSize>();
    let blocks = match (text.parse::<u64>(), bytes) {
        (Ok(blocks), _) => blocks,
        (_, Ok(bytes)) if text.ends_with(|unit: char| unit.is_ascii_alphabetic()) => bytes.0 / block_bytes.0.max(1),
        _ => {
            let message = format!("{option}: '{text}' is no size; write a number of blocks, or of bytes such as 64GiB");
            return Err(wrong(message));
        }
    };
    match u32::try_from(blocks) {
        Ok(0) => Err(wrong(format!("{option}: '{text}' is less than a block (blocks have {block_bytes})"))),
        Ok(_) => Ok(blocks),
        Err(_) => Err(wrong(format!("{option}: '{text}' is {blocks} blocks; a tier has {} at most", u32::MAX))),
    }
}

#[cfg(test)]
mod tests;
