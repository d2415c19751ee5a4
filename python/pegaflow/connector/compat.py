"""Every difference between the versions of vLLM, 0.26 to 0.33, each with the version that it is for. Nothing else in
the package asks which version is there, or whether vLLM has a field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import vllm
from vllm.v1.core import kv_cache_utils

from pegaflow.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

OLDEST: Final = (0, 26)
NEWEST: Final = (0, 33)


def _version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


VERSION: Final = _version(vllm.__version__)

HAS_TRANSFER_RESULTS: Final = VERSION >= (0, 30)
"""0.30 on: `get_transfer_results` reports failed requests. Before: `get_finished` and the ids of the failed blocks, of
which vLLM keeps the good ones before the first bad one."""

_TAGS_EXTRA_KEYS: Final = VERSION >= (0, 31)
"""0.31 on: the extra keys of a block are tuples that say what they are. Before: bare values, told apart by type."""

_HAS_HIT_SOURCES: Final = VERSION >= (0, 32)
"""0.32 on: vLLM asks from which tier a hit comes."""

_HAS_LAYOUT_STRIDES: Final = VERSION >= (0, 29)
"""0.29 on: `KVCacheTensor` has `layers`, `layer_stride` and `block_stride`. Before: `shared_by`, and a `block_stride`
of 0 for one contiguous tensor a layer."""

if HAS_TRANSFER_RESULTS:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults


def check_version() -> None:
    """Refuses versions that the connector was not made for.

    Raises `UnsupportedError` for one that is too old. A newer one may work; the caller is told by the return of
    `is_newer_than_known`.
    """
    if VERSION < OLDEST:
        raise UnsupportedError(
            f"vLLM {vllm.__version__} is too old; PegaFlow needs {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        )


def is_newer_than_known() -> bool:
    """Whether this vLLM is newer than every version that was looked at."""
    return VERSION > NEWEST


def transfer_results(sending: set[str], receiving: set[str], failed: set[str]) -> Any:
    """0.30 on: what `get_transfer_results` returns. A failed request is in `receiving` as well."""
    return KVConnectorTransferResults(finished_sending=sending, finished_recving=receiving, failed_recving=failed)


def hit_sources(dram_tokens: int, nvme_tokens: int) -> dict[Any, int]:
    """0.32 on: what `get_external_cache_hit_sources` returns: tokens by tier, without zeros."""
    if not _HAS_HIT_SOURCES:
        return {}
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    sources = {CacheHitSource.HOST: dram_tokens, CacheHitSource.DISK: nvme_tokens}
    return {source: tokens for source, tokens in sources.items() if tokens}


def preempted_requests(output: SchedulerOutput) -> set[str]:
    """The requests preempted in this step. All versions; `None` where there are none."""
    return output.preempted_req_ids or set()


def is_resumable(request: Request) -> bool:
    """Whether a request's tokens may change: a streaming session replaces some of them. All versions."""
    return bool(request.resumable)


def may_read_cache(request: Request) -> bool:
    """Whether the request allows cached tokens. All versions; from 0.32 vLLM also checks itself."""
    return not request.skip_reading_prefix_cache


# --- extra keys -------------------------------------------------------------------------------------------------------

# Content digests of multimodal items: BLAKE3, SHA-256 or SHA-512. Anything else is a name that somebody gave.
_CONTENT_DIGEST = re.compile(r"(?:[0-9a-f]{64}|[0-9a-f]{128})\Z")


class UncacheableError(Exception):
    """The bytes of a request's blocks depend on something that has no stable identity. The text says on what."""


def extra_of_block(request: Request, start: int, end: int, mm_index: int, lora_digest: str | None) -> tuple[bytes, int]:
    """What the bytes of the block of tokens `start` to `end` depend on besides its tokens and its ancestors, in one
    encoding for all versions; and the multimodal index for the next block.

    A LoRA adapter stands in it by the digest of its content. Raises `UncacheableError`.
    """
    keys, mm_index = kv_cache_utils.generate_block_hash_extra_keys(request, start, end, mm_index)
    fields = _tagged(keys or (), request) if _TAGS_EXTRA_KEYS else _untagged(keys or (), request)
    if request.lora_request is not None:
        if lora_digest is None:
            raise UncacheableError("a LoRA adapter whose files cannot be read")
        fields.append(("lora", lora_digest.encode()))
    encoded = bytearray()
    for tag, value in sorted(fields):
        for part in (tag.encode(), value):
            encoded += len(part).to_bytes(4, "little") + part
    return bytes(encoded), mm_index


def _tagged(keys: tuple[Any, ...], request: Request) -> list[tuple[str, bytes]]:
    """0.31 on."""
    fields = []
    for key in keys:
        match key:
            case ("mm", str(identifier), int(offset)):
                fields.append(_multimodal(identifier, offset))
            case ("lora", str(name), *_) if request.lora_request is not None and name == request.lora_request.lora_name:
                pass
            case ("cache_salt", str(salt)):
                fields.append(("salt", salt.encode()))
            case ("prompt_embeds", bytes(digest)):
                fields.append(("embeds", digest))
            case _:
                raise UncacheableError(f"an extra key of a kind that PegaFlow does not know: {_kind(key)}")
    return fields


def _untagged(keys: tuple[Any, ...], request: Request) -> list[tuple[str, bytes]]:
    """0.26 to 0.30: LoRA name, (identifier, offset) of multimodal items, salt, digest of embeddings, in this order."""
    fields = []
    rest = list(keys)
    if request.lora_request is not None and rest and rest[0] == request.lora_request.lora_name:
        rest = rest[1:]
    for key in rest:
        match key:
            case (str(identifier), int(offset)):
                fields.append(_multimodal(identifier, offset))
            case str(salt) if salt == request.cache_salt:
                fields.append(("salt", salt.encode()))
            case bytes(digest):
                fields.append(("embeds", digest))
            case _:
                raise UncacheableError(f"an extra key of a kind that PegaFlow does not know: {_kind(key)}")
    return fields


def _multimodal(identifier: str, offset: int) -> tuple[str, bytes]:
    if not _CONTENT_DIGEST.match(identifier):
        raise UncacheableError("a multimodal item that is named by the caller instead of by its content")
    # Negative for a block that starts inside the item.
    return "mm", offset.to_bytes(8, "little", signed=True) + identifier.encode()


def _kind(key: Any) -> str:
    return f"{type(key).__name__} {key[0]!r}" if isinstance(key, tuple) and key else type(key).__name__


# --- KV cache geometry ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMemory:
    """Where one layer's part of every block lies."""

    name: str
    start: int
    """The address of block 0."""
    page_bytes: int
    """The layer's bytes of one block."""
    stride: int
    """How far apart the parts of neighbouring blocks are, in bytes."""
    blocks: int

    @property
    def range_bytes(self) -> int:
        """The bytes from the first block's part to the end of the last one's."""
        return (self.blocks - 1) * self.stride + self.page_bytes


_WHOLE_BLOCK_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")


def group_problem(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why this model's KV cache cannot be kept by this version of PegaFlow; `None` if it can."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups; one is supported (--disable-hybrid-kv-cache-manager)"
    spec = groups[0].kv_cache_spec
    specs = spec.kv_cache_specs.values() if type(spec).__name__ == "UniformTypeKVCacheSpecs" else [spec]
    kinds = {type(one).__name__ for one in specs}
    if not kinds <= set(_WHOLE_BLOCK_SPECS):
        supported = " and ".join(_WHOLE_BLOCK_SPECS)
        return f"the model's KV cache is of kind {', '.join(sorted(kinds))}; {supported} are supported"
    parallel = vllm_config.parallel_config
    shape = {
        "decode context parallel": parallel.decode_context_parallel_size,
        "prefill context parallel": parallel.prefill_context_parallel_size,
    }
    for name, size in shape.items():
        if size > 1:
            return f"{name} size is {size}; 1 is supported"
    return None


def layer_specs(kv_cache_config: KVCacheConfig) -> dict[str, Any]:
    """The spec of every layer of the one group, in vLLM's order. All versions."""
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    if type(spec).__name__ == "UniformTypeKVCacheSpecs":
        return {name: spec.kv_cache_specs[name] for name in group.layer_names}
    return dict.fromkeys(group.layer_names, spec)


def layer_memory(kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]) -> list[LayerMemory]:
    """Where the blocks of every layer lie, from `kv_cache_config` and never from shapes.

    Raises `UnsupportedError` if a layer's memory is not on the CPU, or the tensor contradicts the configuration.
    """
    strides: dict[str, int] = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        for name in tensor.layers if _HAS_LAYOUT_STRIDES else tensor.shared_by:
            strides[name] = tensor.block_stride
    memory = []
    for name, spec in layer_specs(kv_cache_config).items():
        if name not in kv_caches:
            raise UnsupportedError(f"layer {name} has no KV cache of its own")
        tensor = kv_caches[name]
        if tensor.device.type != "cpu":
            raise UnsupportedError(
                f"the KV cache is on device '{tensor.device}'; this version of PegaFlow keeps KV caches in host memory "
                "(vLLM on CPU) only"
            )
        page = spec.page_size_bytes
        layer = LayerMemory(name, tensor.data_ptr(), page, strides.get(name) or page, kv_cache_config.num_blocks)
        storage = tensor.untyped_storage()
        inside = storage.data_ptr() + storage.nbytes() - layer.start
        if layer.range_bytes > inside or tensor.numel() * tensor.element_size() != page * layer.blocks:
            raise UnsupportedError(
                f"layer {name} has {tensor.numel() * tensor.element_size()} bytes in a memory of {inside}, but "
                f"{layer.blocks} blocks of {page} bytes, {layer.stride} apart, were expected"
            )
        if layer.stride == page and not tensor.is_contiguous():
            raise UnsupportedError(f"layer {name} is laid out with strides {tensor.stride()}; whole blocks are needed")
        memory.append(layer)
    return memory


# --- identity ---------------------------------------------------------------------------------------------------------


def layout_of_layers(vllm_config: VllmConfig, kv_caches: Mapping[str, torch.Tensor], names: list[str]) -> list[str]:
    """How the bytes of each layer's blocks are laid out: attention backend, its instruction set where it has one, the
    shape without the number of blocks, and the version of vLLM, because a backend may pack its blocks differently in
    the next one without a sign of it in any of these.
    """
    layers = vllm_config.compilation_config.static_forward_context
    described = []
    for name in names:
        layer = layers.get(name)
        backend = layer.get_attn_backend().get_name() if layer is not None else "unknown"
        # CPU_ATTN: on the implementation in 0.26, on the layer in 0.32.
        isa = getattr(layer, "isa", None) or getattr(getattr(layer, "impl", None), "isa", None) or "-"
        tensor = kv_caches[name]
        described.append(f"{name}:{backend}:{isa}:{tensor.dtype}:{list(tensor.shape[1:])}:{list(tensor.stride()[1:])}")
    described.append(f"vllm-{VERSION[0]}.{VERSION[1]}")
    return described


def kv_scales_problem(vllm_config: VllmConfig) -> str | None:
    """Why the scales of a quantized KV cache have no stable identity. Later than 0.26 nothing calculates them."""
    cache = vllm_config.cache_config
    if str(cache.cache_dtype) != "auto" and getattr(cache, "calculate_kv_scales", False):
        return "calculate_kv_scales takes the scales from the first requests, so they differ from run to run"
    return None
