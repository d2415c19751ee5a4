//! `pegaflow size`: what a model needs and gets, before anything is bought or started. Everything follows from the model's
//! configuration, the layout of the store and figures of docs/performance.md; nothing is measured here.

mod gpu;
mod model;
mod report;

use std::path::PathBuf;

use clap::Args;
use pegaflow_engine::{ByteSize, Error, ErrorKind, NvmeConfig, Result};
use serde_json::Value;

use gpu::{Gpu, PREFILL_SHARE};
use model::{KvDtype, Model};
use report::{Drive, Memory, Prefill, Report, Tier};

/// A page, and the header of a record or of a slot of DRAM, which has one.
const PAGE: u64 = 4096;
/// Pages at the beginning of a region.
const REGION_HEADER_PAGES: u64 = 2;
/// Regions without records that count: one is kept in reserve, and one is being filled.
const REGIONS_IN_USE_OTHERWISE: u64 = 2;
/// What a record takes of the index in memory, at most.
const INDEX_BYTES: u64 = 48;
/// RocksDB's cache and memtables.
const ROCKSDB_BYTES: u64 = 104 << 20;
/// What a policy keeps of a block, of so many on the drive at most, and what it takes by itself.
const POLICY_BYTES: u64 = 93;
const POLICY_DRIVE_BLOCKS_MAX: u64 = 1 << 20;
const POLICY_OWN_BYTES: u64 = 11 << 20;
/// The rings' own memory, beside DRAM, which is registered with them.
const RING_BYTES: u64 = 16 << 20;
/// A configuration is a few kilobytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// The model, the machine, and how vLLM is started.
#[derive(Debug, Args)]
pub(crate) struct SizeOptions {
    /// The model's config.json as it is on Hugging Face, or the directory with it.
    #[arg(long, value_name = "CONFIG")]
    model: PathBuf,
    /// a10, a30, a40, a100, b200, b300, gb200, gh200, h20, h100, h100-nvl, h100-pcie, h200, l4, l40s, rtx-4090; or the
    /// dense bfloat16 teraflops of another one.
    #[arg(long, value_name = "GPU")]
    gpu: Gpu,
    /// GPUs of one engine (vLLM's --tensor-parallel-size).
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    gpus: u64,
    /// DRAM for blocks, as of `serve`.
    #[arg(long, value_name = "SIZE")]
    dram: ByteSize,
    /// All drives together, as of `serve`; none: DRAM only.
    #[arg(long, value_name = "SIZE")]
    nvme: Option<ByteSize>,
    /// Bytes that the drives read in a second, together, such as 6.5GB: `pegaflow doctor` measures that.
    #[arg(long, value_name = "SIZE", requires = "nvme")]
    drive_read: Option<ByteSize>,
    /// Bytes of a region, as of `serve`. Default: what a new store would have.
    #[arg(long, value_name = "SIZE")]
    region: Option<ByteSize>,
    /// Tokens of a block (vLLM's --block-size).
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=4096))]
    block_tokens: u64,
    /// How vLLM stores the KV cache (its --kv-cache-dtype; auto: two bytes, or one where the checkpoint says so).
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t)]
    kv_dtype: KvDtype,
    /// How many times smaller blocks are on the drive than in DRAM: about 1.45 for bfloat16, 1.15 for fp8, where they are
    /// compressed (`--codec`).
    #[arg(long, value_name = "RATIO", default_value_t = 1.0, value_parser = ratio)]
    ratio: f64,
    /// Tokens of the prompt that is computed or loaded, for the speed of both.
    #[arg(long, value_name = "TOKENS", default_value_t = 8192, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    prompt_tokens: u64,
    /// Tokens of prompts that the engine computes in a second, if that is known. Default: an estimate.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    prefill_speed: Option<u64>,
    /// vLLM is started with it: sliding windows keep every token.
    #[arg(long)]
    disable_hybrid_kv_cache_manager: bool,
}

fn ratio(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|ratio| (1.0..=100.0).contains(ratio)).ok_or_else(|| "give 1 to 100".to_owned())
}

/// Tells it.
///
/// # Errors
/// `NotFound` without the file, `InvalidInput` for what can not be, `Unsupported` for a model whose cache can not be kept.
pub(crate) fn size(options: &SizeOptions, is_json: bool) -> Result<()> {
    let path = if options.model.is_dir() { options.model.join("config.json") } else { options.model.clone() };
    let bytes = std::fs::metadata(&path).map_err(|error| super::cannot_read(&path, error))?.len();
    if bytes > CONFIG_BYTES_MAX {
        return Err(wrong(format!("{} has {bytes} bytes; a config.json has a few thousand", path.display())));
    }
    let text = std::fs::read(&path).map_err(|error| super::cannot_read(&path, error))?;
    let config: Value =
        serde_json::from_slice(&text).map_err(|error| wrong(format!("{} is no JSON: {error}", path.display())))?;
    let model = Model::read(&config, options.kv_dtype, options.disable_hybrid_kv_cache_manager)?;
    let report = report(&model, options)?;
    if is_json {
        println!("{}", serde_json::to_value(&report).unwrap_or_default());
    } else {
        report.print();
    }
    Ok(())
}

fn wrong(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

fn report(model: &Model, options: &SizeOptions) -> Result<Report> {
    let workers = options.gpus;
    let of_worker = model.worker_bytes(workers)?;
    let payload = of_worker * options.block_tokens;
    // Both begin with a header of one page, and are whole pages.
    let slot = PAGE + payload.next_multiple_of(PAGE);
    let record = PAGE + ((payload as f64 / options.ratio).ceil() as u64).next_multiple_of(PAGE);
    let tier = |bytes: u64, records: u64| {
        let blocks = records / workers;
        Tier { bytes, blocks, tokens: blocks * options.block_tokens }
    };
    let dram = tier(options.dram.0, options.dram.0 / slot);
    let nvme = options.nvme.map(|nvme| -> Result<Tier> {
        let region = NvmeConfig { region: options.region, ..NvmeConfig::new("", nvme) }.region_bytes();
        let in_region = (region / PAGE).saturating_sub(REGION_HEADER_PAGES) / (record / PAGE);
        if in_region == 0 {
            let message = format!(
                "a block takes {} of the drive, a region has {}; give --region, or smaller blocks",
                ByteSize(record),
                ByteSize(region)
            );
            return Err(wrong(message));
        }
        let regions = (nvme.0 / region).saturating_sub(REGIONS_IN_USE_OTHERWISE);
        Ok(tier(nvme.0, regions * in_region))
    });
    let nvme = nvme.transpose()?;
    let tokens_per_s = match options.prefill_speed {
        Some(speed) => speed as f64,
        None => {
            let operations = options.gpu.teraflops * 1e12 * PREFILL_SHARE * workers as f64;
            operations / model.operations(options.prompt_tokens)
        }
    };
    let stored_per_token = record as f64 * workers as f64 / options.block_tokens as f64;
    let drive =
        options.drive_read.map(|read| Drive::new(read.0, stored_per_token, tokens_per_s, options.prompt_tokens));
    let drive_records = nvme.as_ref().map_or(0, |nvme| nvme.blocks * workers);
    let policy = |blocks: u64| blocks * POLICY_BYTES + POLICY_OWN_BYTES;
    let has_drive = nvme.is_some();
    let memory = Memory::new(
        dram.bytes,
        drive_records * INDEX_BYTES,
        if has_drive { ROCKSDB_BYTES } else { 0 },
        policy(dram.blocks * workers) + if has_drive { policy(drive_records.min(POLICY_DRIVE_BLOCKS_MAX)) } else { 0 },
    );
    Ok(Report {
        model: report::ModelReport::new(model),
        workers,
        bytes_per_token: of_worker * workers,
        block_tokens: options.block_tokens,
        block_bytes: payload * workers,
        block_stored_bytes: record * workers,
        memlock_bytes: if has_drive { dram.bytes + RING_BYTES } else { 0 },
        dram,
        nvme,
        prefill: Prefill {
            gpu: options.gpu.name.clone(),
            prompt_tokens: options.prompt_tokens,
            tokens_per_s: tokens_per_s.round(),
            is_estimate: options.prefill_speed.is_none(),
        },
        break_even_bytes_per_s: (stored_per_token * tokens_per_s).round(),
        drive,
        memory,
    })
}

#[cfg(test)]
mod tests;
