"""Identity: the descriptor of the namespace under which a worker's blocks are exchangeable, from what is loaded and
never from a declared name only; and the content digests of LoRA adapters.
"""

from __future__ import annotations

import json
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pegaflow import _native
from pegaflow.connector import compat
from pegaflow.errors import PegaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.pegaflow")

# In this order: a directory that has files of several formats is loaded from the first.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Load formats that read exactly the files of the model's directory.
_FILE_LOAD_FORMATS = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "pt", "mistral", "gguf", "runai_streamer"}
)
# Quantizations whose tensors are all floating point.
_DRAWN_QUANTIZATIONS = (None, "fp8")
# What vLLM calls the types of a KV cache, and what the store calls them.
_KV_DTYPES = {"bfloat16": "bf16", "float16": "f16", "half": "f16", "fp8": "fp8", "fp8_e4m3": "fp8"}
# Fields of config.json that say nothing about the computation.
_VOLATILE_CONFIG = frozenset({"_name_or_path", "transformers_version", "use_cache", "_commit_hash"})


class UnknownIdentityError(Exception):
    """What is loaded has no identity that survives a restart. The text says why, and what to do about it."""


def namespace_of(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """The fields that together decide whether a block's bytes may be used. Raises `UnknownIdentityError`."""
    if problem := compat.kv_scales_problem(vllm_config):
        raise UnknownIdentityError(problem)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    specs = compat.layer_specs(kv_cache_config)
    names = list(specs)
    layout = compat.layout_of_layers(vllm_config, kv_caches, names, kv_cache_config.num_blocks)
    if parallel.pipeline_parallel_size > 1:
        # Every stage has other layers; the descriptor must be the same for all, so it names the split, not the layers.
        import os

        layout = sorted({entry.partition(":")[2] for entry in layout[:-1]}) + layout[-1:]
        layout.append(f"partition {os.environ.get('VLLM_PP_LAYER_PARTITION', 'even')}")
    fields: dict[str, Any] = {
        "kind": "vllm",
        "key_chain": _native.KEY_CHAIN_VERSION,
        "weights": _weights(vllm_config, compat.device_of(kv_caches)),
        "model_config": _model_config(model),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "kv_cache_dtype": vllm_config.cache_config.cache_dtype,
        "kv_dtype": kv_dtype(str(vllm_config.cache_config.cache_dtype), model.dtype),
        "block_size": kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
        "layout": layout,
        "cpu": _cpu() if compat.device_of(kv_caches) is None else None,
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "speculative": _speculative(vllm_config),
    }
    return {name: value if isinstance(value, str) else _canonical(value) for name, value in fields.items()}


def kv_dtype(cache_dtype: str, model_dtype: object) -> str:
    """What the numbers in the blocks are, by the store's names: it compresses by this.

    From the configuration alone, so that all workers say the same. A wrong one costs compression, nothing else.
    """
    name = str(model_dtype) if cache_dtype == "auto" else cache_dtype
    return _KV_DTYPES.get(name.removeprefix("torch."), "unknown")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _weights(vllm_config: VllmConfig, device: int | None) -> str:
    model, load_format = vllm_config.model_config, _load_format(vllm_config)
    if load_format == "dummy":
        return _dummy_weights(model, device)
    if load_format not in _FILE_LOAD_FORMATS:
        raise UnknownIdentityError(
            f"weights loaded with load_format '{load_format}' cannot be identified; use one of "
            f"{', '.join(sorted(_FILE_LOAD_FORMATS))}"
        )
    directory = directory_of(model.model, model.revision, vllm_config.load_config.download_dir)
    return _native.digest_weights(weight_files(directory))


def _dummy_weights(model: ModelConfig, device: int | None) -> str:
    """vLLM draws every dummy tensor from torch's generator with a fixed seed, by its size only: they are the same in
    every process, whichever rank. What torch draws depends on the device; on a GPU also on the number of its
    processors.
    """
    if model.quantization not in _DRAWN_QUANTIZATIONS:
        # Whole numbers are left as the memory happened to be.
        raise UnknownIdentityError(f"dummy weights with quantization '{model.quantization}' differ from start to start")
    identity = f"dummy seed={model.seed} torch={torch.__version__}"
    if device is None:
        return identity
    gpu = torch.cuda.get_device_properties(device)
    return f"{identity} gpu={gpu.name} processors={gpu.multi_processor_count}"


def _load_format(vllm_config: VllmConfig) -> str:
    load_format = vllm_config.load_config.load_format
    return str(getattr(load_format, "value", load_format))


def weight_sets(vllm_config: VllmConfig) -> list[list[Path]]:
    """The weight files of the model, and those of a drafter; none of dummy weights. Raises `UnknownIdentityError`."""
    if _load_format(vllm_config) == "dummy":
        return []
    models = [vllm_config.model_config]
    if (draft := _draft_model(vllm_config)) is not None:
        models.append(draft)
    download_dir = vllm_config.load_config.download_dir
    return [weight_files(directory_of(model.model, model.revision, download_dir)) for model in models]


def directory_of(name: str, revision: str | None, download_dir: str | None) -> Path:
    """Where the files of a model are: a local path, or the snapshot in Hugging Face's cache that vLLM loaded."""
    path = Path(name)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, cache_dir=download_dir, local_files_only=True))
    except Exception as error:
        raise UnknownIdentityError(
            f"the files of '{name}' are neither a local path nor in Hugging Face's cache ({error}); give vLLM a local "
            "directory"
        ) from error


def weight_files(path: Path) -> list[Path]:
    """The weight files at a path: the file itself, or those of the first format that the directory has."""
    if path.is_file():
        return [path]
    for suffix in _WEIGHT_SUFFIXES:
        files = sorted(file for file in path.iterdir() if file.suffix == suffix and file.is_file())
        if files:
            return files
    raise UnknownIdentityError(f"{path} has no weight files ({', '.join(_WEIGHT_SUFFIXES)})")


def _model_config(model: ModelConfig) -> Any:
    """What decides the computation: the model's own configuration file, and what the operator overrode in it."""
    if callable(model.hf_overrides):
        raise UnknownIdentityError("hf_overrides is a function, which has no identity; give a dictionary")
    try:
        config = config_of(directory_of(model.model, model.revision, None))
    except (UnknownIdentityError, OSError, ValueError):
        config = _lasting(model.hf_config.to_dict())
    return {"config": config, "overrides": model.hf_overrides or {}, "max_position": _rope(model)}


def config_of(directory: Path) -> dict[str, Any]:
    """What a model's `config.json` says of the computation. Raises `OSError` and `ValueError`."""
    return _lasting(json.loads((directory / "config.json").read_text()))


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _VOLATILE_CONFIG}


def _rope(model: ModelConfig) -> Any:
    """Position scaling as vLLM resolved it; it may come from arguments as well as from the file."""
    config = model.hf_text_config
    return {name: getattr(config, name, None) for name in ("rope_theta", "rope_scaling", "rope_parameters")}


def _cpu() -> dict[str, str]:
    """What CPU kernels choose their block packing by."""
    return {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}


def _speculative(vllm_config: VllmConfig) -> Any:
    """A drafter may have layers of its own in the blocks."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return None
    identity = {"method": speculative.method, "tokens": speculative.num_speculative_tokens}
    if (draft := _draft_model(vllm_config)) is not None:
        directory = directory_of(draft.model, draft.revision, vllm_config.load_config.download_dir)
        identity["weights"] = _native.digest_weights(weight_files(directory))
    return identity


def _draft_model(vllm_config: VllmConfig) -> ModelConfig | None:
    """The drafter, if its weights are in files of its own."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config if speculative is not None else None
    return draft if draft is not None and draft.model != vllm_config.model_config.model else None


class LoraDigests:
    """The content digests of LoRA adapters, each computed once.

    An adapter whose files changed after its digest was taken has none from then on: nobody can tell which of the two
    contents the workers have.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[Any, str | None]] = {}

    def digest_of(self, request: Any) -> str | None:
        """The digest of the adapter of a LoRA request, or `None` if it has no stable identity."""
        adapter = (request.lora_path, request.lora_int_id)
        try:
            files = self._files(request.lora_path)
            signature = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        except (OSError, UnknownIdentityError) as error:
            logger.warning("PegaFlow: requests with LoRA adapter %s are not cached: %s", request.lora_name, error)
            return None
        if adapter not in self._known:
            self._known[adapter] = (signature, self._compute(files))
        known_signature, digest = self._known[adapter]
        if known_signature != signature:
            self._known[adapter] = (known_signature, None)
            return None
        return digest

    @staticmethod
    def _files(path: str) -> list[Path]:
        directory = directory_of(path, None, None)
        config = [file for file in [directory / "adapter_config.json"] if file.exists()]
        return weight_files(directory) + config

    @staticmethod
    def _compute(files: list[Path]) -> str | None:
        try:
            weights = _native.digest_weights([file for file in files if file.suffix != ".json"])
            config = b"".join(file.read_bytes() for file in files if file.suffix == ".json")
        except (OSError, PegaError) as error:
            logger.warning("PegaFlow: a LoRA adapter cannot be read: %s", error)
            return None
        return _native.content_digest(weights.encode() + config)
