//! `pegaflow policy`: replays traces through the policies of the engine, and measures what the policies cost. Needs no
//! server.

mod cost;
mod plot;
mod report;
mod run;
mod trace_file;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use pegaflow_engine::{ByteSize, Error, ErrorKind, PolicyChoice, Result, Synthetic};

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Replays a trace of requests: what each policy finds and writes, for tiers of several sizes, and what could be found
    /// if the future were known.
    ///
    /// The last line of output is one JSON object.
    Replay(ReplayOptions),
    /// Measures time and memory for each block, at any number of blocks.
    Cost {
        /// Blocks in the tier.
        #[arg(long, default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1000..=100_000_000))]
        blocks: u64,
        /// Only these policies.
        #[arg(long, value_delimiter = ',', default_values_t = PolicyChoice::ALL)]
        policies: Vec<PolicyChoice>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ReplayOptions {
    /// A JSON object a line, with `timestamp` (ms) and `hash_ids` (one number for each block, which stands for all blocks
    /// before it too); plain, or compressed with zstd.
    #[arg(value_name = "TRACE", required_unless_present = "synthetic")]
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
    #[arg(long, default_value_t = 1.0)]
    write_hurdle: f32,
    /// Several of them: hit ratio against writes.
    #[arg(long, value_name = "HURDLES", value_delimiter = ',')]
    pareto: Vec<f32>,
    /// Draws hit ratio against size, as PATH.svg and PATH.png.
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
}

pub(crate) fn policy(command: &PolicyCommand) -> Result<()> {
    match command {
        PolicyCommand::Replay(options) => replay(options),
        PolicyCommand::Cost { blocks, policies } => {
            cost::measure(*blocks, policies);
            Ok(())
        }
    }
}

fn replay(options: &ReplayOptions) -> Result<()> {
    let capacity = |text: &String| blocks_of(text, options.block_bytes);
    let sizes =
        options.capacities.iter().map(|text| Ok((text.clone(), capacity(text)?))).collect::<Result<Vec<_>>>()?;
    let dram = options.dram.as_ref().map(capacity).transpose()?;
    let (name, trace) = match (&options.trace, options.synthetic) {
        (Some(path), _) => (path.display().to_string(), trace_file::read(path)?),
        (None, Some(workload)) => (workload.name().to_string(), workload.trace(options.seed)),
        (None, None) => return Err(Error::new(ErrorKind::InvalidInput, "neither a trace nor --synthetic is given")),
    };
    eprintln!(
        "{name}: {} requests, {} references to {} blocks",
        trace.len(),
        trace.references(),
        trace.unique_blocks()
    );
    let setup = run::Setup {
        policies: &options.policies,
        sizes: &sizes,
        dram,
        hurdles: &options.pareto,
        write_hurdle: options.write_hurdle,
        seed: options.seed,
    };
    let results = run::all(&trace, &setup);
    report::print(&results, dram.is_some());
    if let Some(path) = &options.plot {
        for file in plot::write(path, &name, &results)? {
            println!("drawn: {}", file.display());
        }
    }
    println!("{}", report::json(&name, &results));
    Ok(())
}

/// A number of blocks, or of bytes.
fn blocks_of(text: &String, block_bytes: ByteSize) -> Result<u64> {
    let blocks = match text.parse::<u64>() {
        Ok(blocks) => blocks,
        Err(_) => text.parse::<ByteSize>()?.0 / block_bytes.0.max(1),
    };
    if blocks == 0 || blocks > u64::from(u32::MAX) {
        let message = format!("'{text}' is {blocks} blocks; a tier has from 1 to {} blocks", u32::MAX);
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(blocks)
}
