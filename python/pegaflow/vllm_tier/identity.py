"""The identity under which a tier's chunks are exchangeable: as much of it as vLLM lets a tier see.

A tier is told the model's name, the shape of its KV cache and the parallel sizes. The weights and the configuration are
read from the model's files. It is not told of dummy weights, overrides of the configuration, a revision and the content
of LoRA adapters: `revision` and `namespace` among the settings are for these; what can be noticed is refused.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import vllm
from vllm.platforms import current_platform

from pegaflow import _native
from pegaflow.connector.identity import UnknownIdentityError, config_of, directory_of, kv_dtype, weight_files
from pegaflow.errors import UnsupportedError
from pegaflow.vllm_tier import compat

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.v1.kv_offload.config import OffloadingConfig

    from pegaflow.vllm_tier.settings import TierSettings


def namespace_of(config: OffloadingConfig, settings: TierSettings, chunk_bytes: int) -> dict[str, str]:
    """The fields that together decide whether a chunk's bytes may be used.

    Raises `UnsupportedError` where the weights cannot be told apart from others.
    """
    try:
        directory = model_directory(config.model.name, settings.revision)
        weights = _native.digest_weights(weight_files(directory))
        model_config = config_of(directory)
    except (UnknownIdentityError, OSError, ValueError) as error:
        raise UnsupportedError(
            f"PegaTier cannot tell the weights of '{config.model.name}' apart from others: {error}"
        ) from error
    parallel = config.parallel
    fields: dict[str, Any] = {
        "kind": "vllm tier",
        "namespace": settings.namespace,
        "weights": weights,
        "model_config": model_config,
        "kv_cache_dtype": config.model.dtype,
        "kv_dtype": kv_dtype(config.model.dtype, config.model.dtype),
        "groups": _native.content_digest(
            repr([(group.tokens_per_block, group.layer_names) for group in config.groups]).encode()
        ),
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "chunk_bytes": chunk_bytes,
        "layout": compat.layout_of(config),
        "parallel": {name: getattr(parallel, f"{name}_size") for name in ("world", "tp", "pp", "pcp", "dcp")},
        "device": _device(),
        "vllm": vllm.__version__,
    }
    return {name: value if isinstance(value, str) else _canonical(value) for name, value in fields.items()}


def model_directory(name: str, revision: str) -> Path:
    """Where the model's files are. Raises `UnknownIdentityError`, also where there are several revisions of it and none
    is named: vLLM may have loaded another one than that which is found.
    """
    directory = directory_of(name, revision or None, None)
    snapshots = directory.parent
    if not revision and snapshots.name == "snapshots" and len(list(snapshots.iterdir())) > 1:
        raise UnknownIdentityError(
            f'{snapshots} has several revisions of it; give the tier the one that vLLM was started with as "revision"'
        )
    return directory


def _device() -> str:
    """What attention backends are chosen by, which decide how a block's bytes are laid out."""
    try:
        return str(current_platform.get_device_name())
    except (NotImplementedError, RuntimeError, AssertionError):
        return str(current_platform.device_type)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
