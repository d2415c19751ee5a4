//! What a model keeps for each token, from its `config.json` as it is on Hugging Face: layers, heads, and how many numbers
//! each of them has. A model whose layers do not all keep every token is refused, as the connector refuses it.

use pegaflow_engine::{Error, ErrorKind, Result};
use serde_json::Value;

/// Fields that only models with other layers than attention have.
const NOT_ATTENTION: [&str; 13] = [
    "hybrid_override_pattern",
    "layers_block_type",
    "attn_layer_indices",
    "attn_layer_period",
    "full_attention_interval",
    "linear_attn_config",
    "linear_num_key_heads",
    "mamba_d_state",
    "mamba_d_ssm",
    "ssm_state_size",
    "ssm_cfg",
    "state_size",
    "wkv_head_size",
];
/// Models whose feed-forward layers have two matrices; all others have a gate, too.
const WITHOUT_GATE: [&str; 9] =
    ["gpt2", "gpt_neox", "gptj", "opt", "falcon", "bloom", "gpt_bigcode", "starcoder2", "phi"];
/// More of anything, more layers, and more bytes of a token are no model.
const NUMBER_MAX: u64 = 1 << 20;
const LAYERS_MAX: u64 = 1 << 12;
const TOKEN_BYTES_MAX: u64 = 1 << 30;

/// What attention keeps of a token, in each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attention {
    /// A key and a value for each head.
    Heads { kv_heads: u64, head_dim: u64 },
    /// One latent vector, which every worker keeps (MLA).
    Latent { numbers: u64 },
}

/// How numbers of the KV cache are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum KvDtype {
    /// As vLLM takes it from the model: two bytes, or one where the checkpoint says so.
    #[default]
    Auto,
    Bfloat16,
    Float16,
    Float32,
    Fp8,
}

/// A model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Model {
    pub(super) kind: String,
    pub(super) layers: u64,
    pub(super) attention: Attention,
    /// Bytes of a number.
    pub(super) number_bytes: u64,
    /// Weights that compute a token, without embeddings; of experts those that are asked. An estimate.
    pub(super) active_weights: f64,
    /// Numbers of all query heads of a layer: attention's own work grows with them.
    pub(super) query_numbers: u64,
}

impl Model {
    /// Reads it. `all_tokens`: vLLM runs with `--disable-hybrid-kv-cache-manager`, so that sliding windows keep all tokens.
    ///
    /// # Errors
    /// `Unsupported` with why its cache can not be kept, `InvalidInput` with what is missing.
    pub(super) fn read(config: &Value, dtype: KvDtype, all_tokens: bool) -> Result<Self> {
        // Models that see have the one that speaks inside.
        let inner = ["text_config", "llm_config", "language_config"].into_iter().find_map(|name| config.get(name));
        let of = Fields { inner: inner.filter(|inner| inner.is_object()).unwrap_or(config), outer: config };
        if !of.inner.is_object() {
            return Err(Error::new(ErrorKind::InvalidInput, "the model's configuration is no JSON object"));
        }
        refuse(&of, all_tokens)?;
        let layers = of.needed(&["num_hidden_layers", "n_layer", "n_layers", "num_layers"])?.min(LAYERS_MAX);
        let hidden = of.needed(&["hidden_size", "n_embd", "d_model"])?;
        let heads = of.needed(&["num_attention_heads", "n_head", "n_heads"])?;
        let (attention, of_attention, query_numbers) = match of.number(&["kv_lora_rank"])? {
            Some(rank) => latent(&of, hidden, heads, rank)?,
            None => {
                let is_single = of.get("multi_query") == Some(&Value::Bool(true))
                    && of.get("new_decoder_architecture") != Some(&Value::Bool(true));
                let kv_heads = of.number(&["num_key_value_heads", "num_kv_heads", "n_head_kv"])?;
                let kv_heads = if is_single { 1 } else { kv_heads.unwrap_or(heads) };
                let head_dim = of.number(&["head_dim", "attention_head_dim"])?.unwrap_or(hidden / heads);
                if head_dim == 0 || kv_heads > heads {
                    let message = format!("{heads} heads of {hidden} numbers and {kv_heads} KV heads are no model");
                    return Err(Error::new(ErrorKind::InvalidInput, message));
                }
                let weights = 2.0 * (hidden * head_dim) as f64 * (heads + kv_heads) as f64;
                (Attention::Heads { kv_heads, head_dim }, weights, heads * head_dim)
            }
        };
        let active_weights = layers as f64 * of_attention + feed_forward(&of, hidden, layers)?;
        let number_bytes = number_bytes(&of, dtype);
        let kind = of.text("model_type").unwrap_or("unknown").to_owned();
        Ok(Self { kind, layers, attention, number_bytes, active_weights, query_numbers })
    }

    /// Bytes of a token in one worker of `workers` (tensor parallel).
    ///
    /// # Errors
    /// `InvalidInput` if the heads can not be dealt out evenly.
    pub(super) fn worker_bytes(&self, workers: u64) -> Result<u64> {
        let numbers = match self.attention {
            Attention::Latent { numbers } => numbers,
            Attention::Heads { kv_heads, head_dim } => {
                if !kv_heads.is_multiple_of(workers) && !workers.is_multiple_of(kv_heads) {
                    let message = format!("{workers} GPUs can not share {kv_heads} KV heads evenly");
                    return Err(Error::new(ErrorKind::InvalidInput, message));
                }
                2 * kv_heads.div_ceil(workers) * head_dim
            }
        };
        let bytes = self.layers * numbers * self.number_bytes;
        if bytes > TOKEN_BYTES_MAX {
            let message = format!("a token of this model would take {bytes} bytes; {TOKEN_BYTES_MAX} are possible");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(bytes)
    }

    /// Operations that computing a token of a prompt takes, in the mean over a prompt of that many tokens.
    pub(super) fn operations(&self, prompt_tokens: u64) -> f64 {
        // Two for each weight; two for each number of a query and each token before it, of which half are there, twice.
        2.0 * self.active_weights + 2.0 * (self.layers * self.query_numbers) as f64 * prompt_tokens as f64
    }
}

/// The fields of a configuration; a model within another one has its own first.
struct Fields<'a> {
    inner: &'a Value,
    outer: &'a Value,
}

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        let found = self.inner.get(name).or_else(|| self.outer.get(name));
        found.filter(|value| !value.is_null())
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        self.get(name).and_then(Value::as_str)
    }

    fn number(&self, names: &[&str]) -> Result<Option<u64>> {
        let Some((name, value)) = names.iter().find_map(|name| Some((name, self.get(name)?))) else { return Ok(None) };
        match value.as_u64().filter(|number| (1..=NUMBER_MAX).contains(number)) {
            Some(number) => Ok(Some(number)),
            None if value.is_array() => Err(refused(format!("its layers differ ({name} is a list)"))),
            None => {
                let message = format!("{name} is {value} in the model's configuration; 1 to {NUMBER_MAX} is possible");
                Err(Error::new(ErrorKind::InvalidInput, message))
            }
        }
    }

    fn needed(&self, names: &[&str]) -> Result<u64> {
        self.number(names)?.ok_or_else(|| {
            let message = format!("the model's configuration does not say {}", names.join(" or "));
            Error::new(ErrorKind::InvalidInput, message)
        })
    }
}

fn refused(why: String) -> Error {
    Error::new(ErrorKind::Unsupported, format!("PegaFlow does not keep the KV cache of this model: {why}"))
}

/// What keeps its cache from being kept.
fn refuse(of: &Fields<'_>, all_tokens: bool) -> Result<()> {
    if of.get("is_encoder_decoder") == Some(&Value::Bool(true)) {
        return Err(refused("it has an encoder, and a cache for what that says".into()));
    }
    if let Some(field) = NOT_ATTENTION.into_iter().find(|name| of.get(name).is_some()) {
        return Err(refused(format!("it is a hybrid: not all of its layers are attention ({field})")));
    }
    if of.get("index_topk").is_some() {
        return Err(refused("it has a second cache, which says where attention looks (index_topk)".into()));
    }
    if of.get("block_configs").is_some() {
        return Err(refused("its layers differ (block_configs)".into()));
    }
    let kinds = of.get("layer_types").and_then(Value::as_array).into_iter().flatten();
    let other = kinds.filter_map(Value::as_str).find(|kind| !["full_attention", "attention"].contains(kind));
    if let Some(kind) = other.filter(|kind| !["sliding_attention", "chunked_attention"].contains(kind)) {
        return Err(refused(format!(
            "it is a hybrid: not all of its layers are full attention (layer_types has {kind})"
        )));
    }
    let is_listed = of.get("layer_types").is_some();
    let window =
        of.get("sliding_window").filter(|_| !is_listed && of.get("use_sliding_window") != Some(&Value::Bool(false)));
    let window = window.or_else(|| of.get("attention_chunk_size").filter(|_| !is_listed));
    let what = match (other, window) {
        (Some(kind), _) => format!("layer_types has {kind}"),
        (None, Some(window)) => format!("windows of {window} tokens"),
        (None, None) => return Ok(()),
    };
    if all_tokens {
        return Ok(());
    }
    let way = "start vLLM with --disable-hybrid-kv-cache-manager, which keeps every token, and give \
               --disable-hybrid-kv-cache-manager here, too";
    Err(refused(format!("it is a hybrid: layers forget what is behind their window ({what}); {way}")))
}

/// Of MLA: what is kept, the weights of a layer, and the numbers of all queries.
fn latent(of: &Fields<'_>, hidden: u64, heads: u64, rank: u64) -> Result<(Attention, f64, u64)> {
    let rope = of.needed(&["qk_rope_head_dim"])?;
    let (nope, value) = (of.needed(&["qk_nope_head_dim"])?, of.needed(&["v_head_dim"])?);
    let product = |numbers: u64, more: u64| numbers as f64 * more as f64;
    let query = match of.number(&["q_lora_rank"])? {
        Some(rank) => product(rank, hidden + heads * (nope + rope)),
        None => product(hidden, heads * (nope + rope)),
    };
    let latent = product(hidden, rank + rope) + product(rank, heads * (nope + value));
    let weights = query + latent + product(heads * value, hidden);
    Ok((Attention::Latent { numbers: rank + rope }, weights, heads * (nope + rope + value) / 2))
}

/// Weights of all feed-forward layers that compute a token.
fn feed_forward(of: &Fields<'_>, hidden: u64, layers: u64) -> Result<f64> {
    let kind = of.text("model_type").unwrap_or_default();
    let matrices = if WITHOUT_GATE.contains(&kind) { 2 } else { 3 };
    let weights = |layers: u64, wide: u64| (layers * matrices * hidden) as f64 * wide as f64;
    let wide = of.number(&["intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"])?.unwrap_or(4 * hidden);
    let asked = of.number(&["num_experts_per_tok", "num_experts_per_token", "moe_topk"])?;
    let Some(asked) = asked else { return Ok(weights(layers, wide)) };
    let of_expert = of.number(&["moe_intermediate_size", "expert_ffn_hidden_size"])?.unwrap_or(wide);
    let small = |name: &str| of.get(name).and_then(Value::as_u64).unwrap_or(0).min(NUMBER_MAX);
    let shared = match of.number(&["shared_expert_intermediate_size"])? {
        Some(shared) => shared,
        None => small("n_shared_experts") * of_expert,
    };
    let dense = small("first_k_dense_replace").min(layers);
    Ok(weights(dense, wide) + weights(layers - dense, asked * of_expert + shared))
}

/// vLLM's rule: models of four bytes run with two.
fn number_bytes(of: &Fields<'_>, dtype: KvDtype) -> u64 {
    let scheme = of.get("quantization_config").and_then(|quantization| quantization.get("kv_cache_scheme"));
    match dtype {
        KvDtype::Fp8 => 1,
        KvDtype::Bfloat16 | KvDtype::Float16 => 2,
        KvDtype::Float32 => 4,
        KvDtype::Auto if scheme.and_then(|scheme| scheme.get("num_bits")).and_then(Value::as_u64) == Some(8) => 1,
        KvDtype::Auto => 2,
    }
}
