"""Makes a tiny Llama that is good for one thing: a wrong byte in its KV cache changes the tokens that it says.

Its weights are random but of real size (a model with near-zero weights says the same whatever the cache holds),
drawn from a fixed seed, so every run makes the same model. The tokenizer is byte-level without merges: one byte is
one token.

usage: model.py FOLDER        (in an environment with torch, safetensors and tokenizers)
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SEED = 20_250
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 128, 256, 3, 512
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
CONTEXT = 4096


def weights() -> dict[str, torch.Tensor]:
    """All tensors under their names in a Llama checkpoint, float32."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(rows: int, columns: int, spread: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * spread

    tensors = {
        "model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN, 1.0),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": drawn(VOCABULARY, HIDDEN, 0.2),
    }
    for layer in range(LAYERS):
        # Values and outputs are spread wider than queries and keys: what attention reads outweighs the residual.
        parts = {
            "input_layernorm": torch.ones(HIDDEN),
            "self_attn.q_proj": drawn(HEADS * HEAD_SIZE, HIDDEN, 0.15),
            "self_attn.k_proj": drawn(KV_HEADS * HEAD_SIZE, HIDDEN, 0.15),
            "self_attn.v_proj": drawn(KV_HEADS * HEAD_SIZE, HIDDEN, 0.3),
            "self_attn.o_proj": drawn(HIDDEN, HEADS * HEAD_SIZE, 0.3),
            "post_attention_layernorm": torch.ones(HIDDEN),
            "mlp.gate_proj": drawn(INTERMEDIATE, HIDDEN, 0.1),
            "mlp.up_proj": drawn(INTERMEDIATE, HIDDEN, 0.1),
            "mlp.down_proj": drawn(HIDDEN, INTERMEDIATE, 0.1),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()}
    return tensors


def config() -> dict[str, object]:
    """What transformers and vLLM read as `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def tokenizer() -> Tokenizer:
    """One token for each byte, after three special ones; the rest of the vocabulary is never produced by text."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused_{number}>" for number in range(len(names), VOCABULARY)]
    vocabulary = {name: number for number, name in enumerate(names)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return bytewise


def make(folder: Path) -> None:
    """Writes the model into `folder`; an interrupted run leaves no half-made model there."""
    if (folder / "config.json").exists():
        return
    temporary = folder.with_name(folder.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights(), temporary / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(temporary / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about_tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **special}
    (temporary / "tokenizer_config.json").write_text(json.dumps(about_tokens, indent=1))
    (temporary / "config.json").write_text(json.dumps(config(), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: model.py FOLDER")
    make(Path(sys.argv[1]))
