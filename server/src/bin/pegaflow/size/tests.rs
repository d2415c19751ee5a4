//! Models as they are on Hugging Face, cut to the fields that count; their sizes are those that vLLM logs or papers state.

use clap::Parser;
use serde_json::json;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    options: SizeOptions,
}

fn options(more: &[&str]) -> SizeOptions {
    let base = ["size", "--model", "c", "--gpu", "h200", "--dram", "64GiB", "--nvme", "1TiB"];
    Line::try_parse_from(base.iter().chain(more)).expect("parses").options
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "vocab_size": 128256,
        "sliding_window": null
    })
}

fn deepseek() -> Value {
    json!({
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 61, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128
    })
}

fn with(mut config: Value, name: &str, value: Value) -> Value {
    config.as_object_mut().expect("an object").insert(name.into(), value);
    config
}

fn read(config: &Value) -> Result<Model> {
    Model::read(config, KvDtype::Auto, false)
}

fn token_bytes(config: &Value, workers: u64) -> u64 {
    read(config).expect("reads").worker_bytes(workers).expect("fits") * workers
}

#[test]
fn bytes_of_a_token_are_those_of_the_model() {
    assert_eq!(token_bytes(&llama(), 1), 131_072);
    assert_eq!(token_bytes(&llama(), 4), 131_072);
    assert_eq!(token_bytes(&llama(), 16), 262_144, "every head twice");
    let qwen = json!({
        "model_type": "qwen3", "hidden_size": 4096, "head_dim": 128, "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "intermediate_size": 12288, "sliding_window": 4096, "use_sliding_window": false
    });
    assert_eq!(token_bytes(&qwen, 1), 147_456);
    assert_eq!(token_bytes(&deepseek(), 1), 70_272);
    assert_eq!(token_bytes(&deepseek(), 8), 8 * 70_272, "every worker keeps the latent vector");
    let gpt2 = json!({ "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12 });
    assert_eq!(token_bytes(&gpt2, 1), 36_864);
    let falcon = json!({
        "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "multi_query": true
    });
    assert_eq!(token_bytes(&falcon, 1), 8192);
    let sees = json!({ "model_type": "llava", "text_config": llama() });
    assert_eq!(token_bytes(&sees, 1), 131_072);
    let of_checkpoint = with(llama(), "quantization_config", json!({ "kv_cache_scheme": { "num_bits": 8 } }));
    assert_eq!(token_bytes(&of_checkpoint, 1), 65_536);
    for (dtype, bytes) in [(KvDtype::Fp8, 65_536), (KvDtype::Float16, 131_072), (KvDtype::Float32, 262_144)] {
        assert_eq!(Model::read(&llama(), dtype, false).expect("reads").worker_bytes(1).expect("fits"), bytes);
    }
}

#[test]
fn models_whose_cache_is_not_kept_are_refused_with_why() {
    let refused = |config: &Value, why: &str| {
        let error = read(config).expect_err(why);
        assert!(error.kind() == ErrorKind::Unsupported && error.message().contains(why), "{error}");
    };
    let kinds = |kind: &str| with(llama(), "layer_types", json!(["full_attention", kind]));
    refused(&with(llama(), "mamba_d_state", json!(16)), "mamba_d_state");
    refused(&with(llama(), "full_attention_interval", json!(4)), "full_attention_interval");
    refused(&with(llama(), "is_encoder_decoder", json!(true)), "encoder");
    refused(&with(deepseek(), "index_topk", json!(2048)), "index_topk");
    refused(&with(llama(), "num_key_value_heads", json!([4, 8])), "differ");
    refused(&kinds("linear_attention"), "linear_attention");
    for windowed in [kinds("sliding_attention"), with(llama(), "sliding_window", json!(4096))] {
        refused(&windowed, "--disable-hybrid-kv-cache-manager");
        assert!(Model::read(&windowed, KvDtype::Auto, true).is_ok());
    }
    assert!(read(&with(kinds("full_attention"), "sliding_window", json!(4096))).is_ok(), "no layer has one");
    let linear = kinds("linear_attention");
    assert!(Model::read(&linear, KvDtype::Auto, true).is_err(), "these have no other way");
}

#[test]
fn what_is_no_model_is_named() {
    let wrong = |config: Value, why: &str| {
        let error = read(&config).and_then(|model| model.worker_bytes(3)).expect_err(why);
        assert!(error.kind() == ErrorKind::InvalidInput && error.message().contains(why), "{error}");
    };
    wrong(json!([]), "object");
    wrong(json!({ "hidden_size": 64 }), "num_hidden_layers");
    wrong(with(llama(), "num_hidden_layers", json!("many")), "many");
    wrong(with(llama(), "num_attention_heads", json!(0)), "num_attention_heads is 0");
    wrong(with(llama(), "num_key_value_heads", json!(64)), "64 KV heads");
    wrong(llama(), "3 GPUs");
    let huge = 1u64 << 20;
    let config =
        json!({ "num_hidden_layers": huge, "hidden_size": huge, "num_attention_heads": huge, "head_dim": huge });
    let error = read(&config).and_then(|model| model.worker_bytes(1)).expect_err("too large");
    assert!(error.message().contains("bytes"), "{error}");
}

/// The figures of docs/performance.md: Llama-3.1-8B on an H200 without a cache.
#[test]
fn computing_is_estimated_as_it_was_measured() {
    for (prompt, measured_ms) in [("2048", 55.0), ("8192", 217.1), ("32768", 1248.0)] {
        let report = report(&read(&llama()).expect("reads"), &options(&["--prompt-tokens", prompt])).expect("fits");
        let ms = prompt.parse::<f64>().expect("a number") / report.prefill.tokens_per_s * 1e3;
        assert!((ms / measured_ms - 1.0).abs() < 0.1, "{prompt}: {ms:.1} ms, measured {measured_ms}");
    }
    let weights = |config: &Value| read(config).expect("reads").active_weights / 1e9;
    assert!((weights(&llama()) - 6.98).abs() < 0.01, "{}", weights(&llama()));
    assert!((35.0..37.5).contains(&weights(&deepseek())), "{}", weights(&deepseek()));
}

#[test]
fn what_fits_is_counted_with_headers_and_padding() {
    let model = read(&llama()).expect("reads");
    let report_of = |more: &[&str]| report(&model, &options(more)).expect("fits");
    let told = report_of(&["--drive-read", "2.2GB"]);
    assert_eq!((told.block_bytes, told.block_stored_bytes), (2 << 20, (2 << 20) + 4096));
    assert_eq!(told.dram.blocks, (64 << 30) / ((2 << 20) + 4096));
    assert_eq!(told.dram.tokens, told.dram.blocks * 16);
    // Regions of 256 MiB have two pages of their own, and room for 127 blocks; two regions stay free.
    let nvme = told.nvme.expect("a drive");
    assert_eq!(nvme.blocks, (4096 - 2) * 127);
    assert_eq!(told.memory.index_bytes, nvme.blocks * 48);
    assert_eq!(told.memlock_bytes, (64 << 30) + RING_BYTES);
    // 131 KB a token and 37.7 thousand tokens a second: 5 GB/s.
    assert!((4.5e9..5.5e9).contains(&told.break_even_bytes_per_s), "{}", told.break_even_bytes_per_s);
    let drive = told.drive.expect("a drive");
    assert!(!drive.is_worth_loading && drive.load_s > drive.compute_s, "as it was on that host: {drive:?}");
    assert!(report_of(&["--drive-read", "14GB"]).drive.expect("a drive").is_worth_loading);
    let smaller = report_of(&["--ratio", "1.45"]);
    assert!(smaller.break_even_bytes_per_s < told.break_even_bytes_per_s / 1.4);
    assert!(smaller.nvme.expect("a drive").tokens > nvme.tokens * 14 / 10);
    let two = report_of(&["--gpus", "2"]);
    assert_eq!((two.block_bytes, two.block_stored_bytes), (2 << 20, 2 * ((1 << 20) + 4096)));
    assert!(report(&model, &options(&["--region", "1MiB"])).is_err(), "no block fits into a region");
}

#[test]
fn gpus_have_names_or_numbers() {
    let speed = |text: &str| text.parse::<Gpu>().map(|gpu| gpu.teraflops).ok();
    assert_eq!((speed("H100 PCIe"), speed("rtx_4090"), speed("420.5")), (Some(756.0), Some(165.2), Some(420.5)));
    assert_eq!((speed("0"), speed("h9000"), speed("")), (None, None, None));
}
