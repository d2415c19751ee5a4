//! What `pegaflow size` tells. The names are the keys of its JSON.

use pegaflow_engine::ByteSize;
use serde::Serialize;

use super::model::{Attention, Model};

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    pub(super) model: ModelReport,
    pub(super) workers: u64,
    /// Of all workers, as are all sizes of blocks.
    pub(super) bytes_per_token: u64,
    pub(super) block_tokens: u64,
    pub(super) block_bytes: u64,
    /// With headers and padding, compressed.
    pub(super) block_stored_bytes: u64,
    pub(super) dram: Tier,
    pub(super) nvme: Option<Tier>,
    pub(super) prefill: Prefill,
    /// Drives that read faster than this are worth loading from.
    pub(super) break_even_bytes_per_s: f64,
    pub(super) drive: Option<Drive>,
    pub(super) memory: Memory,
    /// RLIMIT_MEMLOCK of the server, unless it has CAP_IPC_LOCK.
    pub(super) memlock_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ModelReport {
    pub(super) kind: String,
    pub(super) layers: u64,
    pub(super) attention: &'static str,
    pub(super) kv_heads: Option<u64>,
    /// Numbers of a key or of a value, or of the latent vector.
    pub(super) head_dim: u64,
    pub(super) number_bytes: u64,
    pub(super) active_weights: f64,
}

/// What fits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Tier {
    pub(super) bytes: u64,
    pub(super) blocks: u64,
    pub(super) tokens: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Prefill {
    pub(super) gpu: String,
    pub(super) prompt_tokens: u64,
    pub(super) tokens_per_s: f64,
    pub(super) is_estimate: bool,
}

/// The drive that there is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Drive {
    pub(super) read_bytes_per_s: u64,
    pub(super) load_s: f64,
    pub(super) compute_s: f64,
    pub(super) is_worth_loading: bool,
}

/// Of the server.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Memory {
    pub(super) dram_bytes: u64,
    pub(super) index_bytes: u64,
    pub(super) rocksdb_bytes: u64,
    pub(super) policy_bytes: u64,
    pub(super) total_bytes: u64,
}

impl ModelReport {
    pub(super) fn new(model: &Model) -> Self {
        let (attention, kv_heads, head_dim) = match model.attention {
            Attention::Heads { kv_heads, head_dim } => ("heads", Some(kv_heads), head_dim),
            Attention::Latent { numbers } => ("latent", None, numbers),
        };
        Self {
            kind: model.kind.clone(),
            layers: model.layers,
            attention,
            kv_heads,
            head_dim,
            number_bytes: model.number_bytes,
            active_weights: model.active_weights,
        }
    }
}

impl Drive {
    pub(super) fn new(read: u64, stored_per_token: f64, tokens_per_s: f64, prompt_tokens: u64) -> Self {
        let (load_s, compute_s) =
            (prompt_tokens as f64 * stored_per_token / read.max(1) as f64, prompt_tokens as f64 / tokens_per_s);
        Self { read_bytes_per_s: read, load_s, compute_s, is_worth_loading: load_s < compute_s }
    }
}

impl Memory {
    pub(super) fn new(dram_bytes: u64, index_bytes: u64, rocksdb_bytes: u64, policy_bytes: u64) -> Self {
        let total_bytes = dram_bytes + index_bytes + rocksdb_bytes + policy_bytes;
        Self { dram_bytes, index_bytes, rocksdb_bytes, policy_bytes, total_bytes }
    }
}

impl Report {
    /// For people.
    pub(super) fn print(&self) {
        let size = |bytes: u64| ByteSize(bytes).to_string();
        let per_second = |bytes: f64| format!("{:.2} GB/s", bytes / 1e9);
        let model = &self.model;
        let kept = match model.kv_heads {
            Some(heads) => format!("{heads} KV heads of {}", model.head_dim),
            None => format!("a latent vector of {} (MLA, kept by every GPU)", model.head_dim),
        };
        let numbers = format!("{} layers, {kept}, {} bytes each", model.layers, model.number_bytes);
        line("model", &format!("{}: {numbers}; computes with {:.1}e9 weights", model.kind, model.active_weights / 1e9));
        let gpus = if self.workers == 1 { String::new() } else { format!(", of {} GPUs together", self.workers) };
        line("a token", &format!("{}{gpus}", size(self.bytes_per_token)));
        let on_drive = if self.nvme.is_some() {
            format!("; {} on the drive", size(self.block_stored_bytes))
        } else {
            String::new()
        };
        line("a block", &format!("{} tokens, {}{on_drive}", self.block_tokens, size(self.block_bytes)));
        let tier = |tier: &Tier| {
            format!("{}: {} tokens in {} blocks", size(tier.bytes), grouped(tier.tokens), grouped(tier.blocks))
        };
        line("DRAM", &tier(&self.dram));
        if let Some(nvme) = &self.nvme {
            line("NVMe", &tier(nvme));
        }
        let prefill = &self.prefill;
        let speed = grouped(prefill.tokens_per_s as u64);
        let how = if prefill.is_estimate {
            format!("estimated for {} x {}", self.workers, prefill.gpu)
        } else {
            "as given".into()
        };
        line("computing", &format!("{speed} tokens/s of prompts of {} ({how})", prefill.prompt_tokens));
        line(
            "break-even",
            &format!("{}: loading is faster from drives that read more", per_second(self.break_even_bytes_per_s)),
        );
        if let Some(drive) = &self.drive {
            let verdict = if drive.is_worth_loading {
                "loading pays"
            } else {
                "computing is faster; the drive keeps what DRAM needs after a restart"
            };
            let times =
                format!("{:.0} ms to load a prompt, {:.0} ms to compute it", drive.load_s * 1e3, drive.compute_s * 1e3);
            line("this drive", &format!("{}: {times}: {verdict}", per_second(drive.read_bytes_per_s as f64)));
        }
        let memory = &self.memory;
        let parts = format!(
            "DRAM {}, index {}, RocksDB {}, policies {}",
            size(memory.dram_bytes),
            size(memory.index_bytes),
            size(memory.rocksdb_bytes),
            size(memory.policy_bytes)
        );
        line("memory", &format!("{} for the server: {parts}", size(memory.total_bytes)));
        if self.memlock_bytes > 0 {
            let kib = self.memlock_bytes.div_ceil(1024);
            line(
                "memlock",
                &format!("{}: ulimit -l {kib}, or LimitMEMLOCK={}", size(self.memlock_bytes), self.memlock_bytes),
            );
        }
    }
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let parts: Vec<&[u8]> = digits.as_bytes().rchunks(3).rev().collect();
    parts.iter().map(|part| String::from_utf8_lossy(part)).collect::<Vec<_>>().join(",")
}

fn line(name: &str, text: &str) {
    println!("{name:<12} {text}");
}
