"""Models by their shape only: vLLM draws their weights, nothing is fetched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Shape:
    """A model: its `config.json`, and how many bytes of KV cache a token has in bfloat16, all layers and heads."""

    config: dict[str, Any]
    kv_bytes_per_token: int

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self.config["vocab_size"])


SHAPES = {
    # As Llama-3.1-8B.
    "llama-8b": Shape(
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        32 * 2 * 8 * 128 * 2,
    ),
    # Latent attention as DeepSeek-V2-Lite has it, with dense layers only.
    "mla": Shape(
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "first_k_dense_replace": 12,
            "moe_layer_freq": 1,
            "vocab_size": 102400,
            "max_position_embeddings": 163840,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-06,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "initializer_range": 0.02,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
        },
        12 * (512 + 64) * 2,
    ),
    # Layers with a sliding window between layers without, as Gemma 3 and gpt-oss have them; here as in a small Gemma 3.
    # vLLM gives all of them whole blocks for a connector without groups.
    "hybrid": Shape(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-06,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "initializer_range": 0.02,
            "vocab_size": 65536,
            "max_position_embeddings": 131072,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        18 * 2 * 4 * 256 * 2,
    ),
    # For a machine without a GPU.
    "tiny": Shape(
        {
            **_LLAMA,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 2048,
            "max_position_embeddings": 16384,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        3 * 2 * 2 * 32 * 2,
    ),
}


def write(name: str, folder: Path) -> Path:
    """Writes the model's configuration below `folder`; returns the model's own folder."""
    model = folder / name
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(SHAPES[name].config, indent=1))
    return model
