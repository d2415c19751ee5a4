"""Every difference between the versions of vLLM, 0.26 to 0.33, each with the version that it is for. Nothing else in
the package asks which version is there, or whether vLLM has a field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import vllm
from vllm.distributed import kv_events
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core import kv_cache_utils

from pegaflow.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


def local_blocks(request: Request, block_pool: Any) -> int:
    """About how many blocks from the first on vLLM's own cache has. All versions.

    Later blocks leave it before earlier ones, so the end is searched for by halves. 0 where the cache is not known.
    """
    hashes = request.block_hashes
    if block_pool is None or not hashes:
        return 0
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high) // 2
        if block_pool.get_cached_block(hashes[middle], [0]):
            low = middle + 1
        else:
            high = middle
    return low


# --- KV events --------------------------------------------------------------------------------------------------------


def _labels(event: Any) -> dict[str, Any]:
    """What an event says besides: the only group, and whose blocks they are, as far as this vLLM has fields for it."""
    labels = {"group_idx": 0, "locality": "LOCAL", "ownership": "pegaflow"}
    return {name: value for name, value in labels.items() if name in event.__struct_fields__}


_STORED_LABELS: Final = _labels(BlockStored)
_REMOVED_LABELS: Final = _labels(BlockRemoved)

MEDIUM_DRAM: Final = "CPU"
MEDIUM_NVME: Final = "STORAGE" if "MEDIUM_STORAGE" in vars(kv_events) else "FS"
"""The tiers by the names that vLLM's own offloading gives to such media. Some early versions: `FS`."""


def wants_kv_events(config: VllmConfig) -> bool:
    """Whether vLLM publishes KV events. All versions."""
    return config.kv_events_config is not None and bool(config.kv_events_config.enable_kv_cache_events)


def block_hashes(request: Request, block_size: int) -> Sequence[bytes]:
    """vLLM's hashes of the request's blocks; none without prefix caching, or if they are of smaller blocks."""
    hashes: Sequence[bytes] = request.block_hashes
    return hashes if len(hashes) <= request.num_tokens // block_size else ()


def event_extra_keys(request: Request, start: int, end: int) -> tuple[Any, ...] | None:
    """What a block's hash has besides tokens, as events have it: untagged in all versions."""
    if not (request.lora_request or request.mm_features or request.cache_salt or request.prompt_embeds is not None):
        return None
    keys: tuple[Any, ...] | None
    keys, _ = kv_cache_utils.generate_block_hash_extra_keys(request, start, end, 0)
    if _TAGS_EXTRA_KEYS:
        (keys,) = kv_cache_utils.to_event_extra_keys([keys])
    return keys


def block_stored(
    *,
    hashes: Sequence[bytes],
    parent: bytes | None,
    token_ids: list[int],
    block_size: int,
    lora: tuple[int, str] | None,
    medium: str,
    extra_keys: list[tuple[Any, ...] | None],
) -> Any:
    """vLLM's event for blocks that are there now, with hashes as in its own events."""
    return BlockStored(
        block_hashes=[kv_cache_utils.maybe_convert_block_hash(block_hash) for block_hash in hashes],
        parent_block_hash=kv_cache_utils.maybe_convert_block_hash(parent) if parent is not None else None,
        token_ids=token_ids,
        block_size=block_size,
        lora_id=lora[0] if lora is not None else None,
        medium=medium,
        lora_name=lora[1] if lora is not None else None,
        extra_keys=extra_keys,
        **_STORED_LABELS,
    )


def block_removed(hashes: Sequence[bytes], medium: str) -> Any:
    """vLLM's event for blocks that have gone."""
    converted = [kv_cache_utils.maybe_convert_block_hash(block_hash) for block_hash in hashes]
    return BlockRemoved(block_hashes=converted, medium=medium, **_REMOVED_LABELS)


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

_COPY_UNIT = 16
"""Bytes that a GPU moves at once: pieces of blocks on a GPU start and end at multiples of it."""


@dataclass(frozen=True)
class Piece:
    """A run of bytes that every block has, somewhere in a layer's memory."""

    offset: int
    """Where block 0's begins, from the layer's first byte on."""
    stride: int
    """How far apart those of neighbouring blocks are, in bytes."""
    length: int


@dataclass(frozen=True)
class LayerMemory:
    """Where one layer's part of every block lies."""

    name: str
    memory: int
    """The address of the allocation, which other layers may share."""
    start: int
    """The address of the layer's first byte."""
    pieces: tuple[Piece, ...]
    """In the order in which they make up the layer's part of a block. One, unless K and V, or heads, lie apart."""
    blocks: int

    @property
    def end(self) -> int:
        """The address after the last block's last byte."""
        return self.start + max(piece.offset + (self.blocks - 1) * piece.stride + piece.length for piece in self.pieces)


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


def device_of(kv_caches: Mapping[str, torch.Tensor]) -> int | None:
    """The CUDA ordinal of the device that holds the KV cache; `None` for host memory.

    The ordinal counts as torch does: among the devices that CUDA_VISIBLE_DEVICES leaves to this process. How the memory
    was allocated does not matter (expandable segments are as good): copies run in this process, at plain device
    addresses. Raises `UnsupportedError` for other devices.
    """
    devices = {tensor.device for tensor in kv_caches.values()}
    kinds = {device.type for device in devices}
    if kinds == {"cpu"}:
        return None
    if kinds != {"cuda"} or len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices)) or "none"
        raise UnsupportedError(f"the KV cache is on {names}; one CUDA device or host memory is supported")
    index = devices.pop().index
    if index is None:
        raise UnsupportedError("the KV cache is on a CUDA device without a number")
    return int(index)


def raw_stream(device: int | None) -> int:
    """The `CUstream` on which vLLM computes, as a number. 0 is CUDA's default stream, or that there is no GPU."""
    return 0 if device is None else int(torch.cuda.current_stream(device).cuda_stream)


def pieces_of(
    shape: Sequence[int], strides: Sequence[int], element_bytes: int, blocks: int, page_bytes: int
) -> tuple[Piece, ...]:
    """The pieces of a layer's blocks, from its tensor's shape and strides (in elements).

    The blocks are dimension 0, or dimension 1 behind one of two planes for K and V. An attention kernel may use smaller
    blocks than vLLM's scheduler: then that dimension is a multiple of `blocks`. Everything else may lie in any order.
    Raises `UnsupportedError` if the pieces do not add up to `page_bytes`.
    """
    fitting = {}
    for dimension in _block_dimensions(shape, blocks):
        pieces = _pieces_along(dimension, shape, strides, element_bytes, blocks)
        if pieces and sum(piece.length for piece in pieces) == page_bytes:
            fitting[dimension] = pieces
    if len(fitting) != 1:
        found = f"fits along dimensions {sorted(fitting)}" if fitting else "does not fit"
        raise UnsupportedError(
            f"a KV cache of shape {list(shape)} and strides {list(strides)}, with elements of {element_bytes} bytes, "
            f"{found}: {blocks} blocks of {page_bytes} bytes were expected"
        )
    return next(iter(fitting.values()))


def _block_dimensions(shape: Sequence[int], blocks: int) -> list[int]:
    """The dimensions that may number the blocks."""
    candidates = [0, 1] if len(shape) > 1 and shape[0] == 2 else [0]
    return [dimension for dimension in candidates if shape[dimension] >= blocks and shape[dimension] % blocks == 0]


def _pieces_along(
    dimension: int, shape: Sequence[int], strides: Sequence[int], element_bytes: int, blocks: int
) -> tuple[Piece, ...]:
    """The pieces if blocks are numbered along `dimension`; none if that cannot be."""
    kernel_blocks, kernel_stride = shape[dimension] // blocks, strides[dimension] * element_bytes
    axes = [(stride * element_bytes, size) for stride, size in zip(strides, shape, strict=True) if size > 1]
    if shape[dimension] > 1:
        axes.remove((kernel_stride, shape[dimension]))
    if kernel_blocks > 1:
        axes.append((kernel_stride, kernel_blocks))
    length, apart = element_bytes, []
    for stride, size in sorted(axes):
        if stride == length:
            length *= size
        else:
            apart.append((stride, size))
    block_stride = kernel_stride * kernel_blocks
    if length > block_stride or any(stride < length for stride, _ in apart):
        return ()
    offsets = [0]
    for stride, size in sorted(apart, reverse=True):
        offsets = [offset + index * stride for offset in offsets for index in range(size)]
    return tuple(Piece(offset, block_stride, length) for offset in offsets)


def layer_memory(kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]) -> list[LayerMemory]:
    """Where the blocks of every layer lie: sizes from `kv_cache_config`, the order from the tensors' strides.

    Raises `UnsupportedError` if the two contradict each other.
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
        try:
            pieces = pieces_of(
                tensor.shape, tensor.stride(), tensor.element_size(), kv_cache_config.num_blocks, spec.page_size_bytes
            )
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {name}: {error}") from None
        storage = tensor.untyped_storage()
        layer = LayerMemory(name, storage.data_ptr(), tensor.data_ptr(), pieces, kv_cache_config.num_blocks)
        if layer.end > storage.data_ptr() + storage.nbytes():
            raise UnsupportedError(
                f"layer {name}: its blocks end {layer.end - layer.memory} bytes into a memory of {storage.nbytes()}"
            )
        declared = strides.get(name, 0)
        if declared and len(pieces) == 1 and pieces[0].stride != declared:
            raise UnsupportedError(
                f"layer {name}: its blocks are {pieces[0].stride} bytes apart, but vLLM's configuration says {declared}"
            )
        if tensor.device.type != "cpu":
            _check_alignment(layer)
        memory.append(layer)
    return memory


def _check_alignment(layer: LayerMemory) -> None:
    for piece in layer.pieces:
        if any(value % _COPY_UNIT for value in (layer.start + piece.offset, piece.stride, piece.length)):
            raise UnsupportedError(
                f"layer {layer.name}: a piece of {piece.length} bytes at {layer.start + piece.offset:#x}, "
                f"{piece.stride} bytes from block to block; multiples of {_COPY_UNIT} are needed"
            )


def block_bytes(kv_cache_config: KVCacheConfig) -> int:
    """The bytes of one block in one worker, as the scheduler's side can know them."""
    return sum(int(spec.page_size_bytes) for spec in layer_specs(kv_cache_config).values())


# --- memory in which a block is one piece -----------------------------------------------------------------------------


def required_layout(vllm_config: VllmConfig) -> str | None:
    """0.29 on: the layout in which all layers of a block lie together. Where a backend cannot have it vLLM says so and
    goes on with another. Before, such a request would be an error; see `prefers_cross_layer_blocks`.
    """
    return "BLHNC" if _HAS_LAYOUT_STRIDES and vllm_config.device_config.device_type == "cuda" else None


def prefers_cross_layer_blocks() -> bool:
    """0.26 to 0.28, model runner V1: whether to ask for one memory for all layers. With heads outside of layers, as
    "HND" has them there, the pieces would be smaller than with a memory for each layer.
    """
    if _HAS_LAYOUT_STRIDES:
        return False
    from vllm.v1.attention.backends.utils import get_kv_cache_layout

    return bool(get_kv_cache_layout() == "NHD")


def cross_layer_views(kv_cache_config: KVCacheConfig, memory: torch.Tensor, backend: Any) -> dict[str, torch.Tensor]:
    """0.26 to 0.28: each layer's part of a memory that all layers share, as `register_kv_caches` would get it."""
    order = backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    layers = memory.permute(*(order.index(dimension) for dimension in range(len(order))))
    return {
        name: layers[index]
        for index, tensor in enumerate(kv_cache_config.kv_cache_tensors)
        for name in tensor.shared_by
    }


def memory_problem(vllm_config: VllmConfig) -> str | None:
    """Why the KV cache's memory cannot be copied at any time; `None` if it can."""
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "with enable_sleep_mode vLLM takes the KV cache's memory away while copies may run; start it without"
    return None


# --- identity ---------------------------------------------------------------------------------------------------------


def layout_of_layers(
    vllm_config: VllmConfig, kv_caches: Mapping[str, torch.Tensor], names: list[str], blocks: int
) -> list[str]:
    """How the bytes of each layer's blocks are laid out: attention backend, its instruction set where it has one, the
    shape without the number of blocks, and the version of vLLM, because a backend may pack its blocks differently in
    the next one without a sign of it in any of these.

    No GPU stands in it: a backend packs blocks alike on all that it runs on; where it needs another order (HND instead
    of NHD, for example) the strides show it.
    """
    layers = vllm_config.compilation_config.static_forward_context
    described = []
    for name in names:
        layer = layers.get(name)
        backend = layer.get_attn_backend().get_name() if layer is not None else "unknown"
        # CPU_ATTN: on the implementation in 0.26, on the layer in 0.32.
        isa = getattr(layer, "isa", None) or getattr(getattr(layer, "impl", None), "isa", None) or "-"
        tensor = kv_caches[name]
        described.append(
            f"{name}:{backend}:{isa}:{tensor.dtype}:{_block_layout(tensor.shape, tensor.stride(), blocks)}"
        )
    described.append(f"vllm-{VERSION[0]}.{VERSION[1]}")
    return described


def _block_layout(shape: Sequence[int], strides: Sequence[int], blocks: int) -> str:
    """The shape and the strides of one block: the same however many blocks there are.

    Planes outside of the blocks (K and V, or heads) are as far apart as there are blocks, so they stand in it by their
    order only.
    """
    dimension = (_block_dimensions(shape, blocks) or [0])[0]
    others = [axis for axis in range(len(shape)) if axis != dimension]
    outside = sorted({strides[axis] for axis in others if strides[axis] > strides[dimension]})
    inner: list[int | str] = [
        f"plane {outside.index(strides[axis])}" if strides[axis] in outside else strides[axis] for axis in others
    ]
    return f"{[shape[axis] for axis in others]}:{inner}"


def kv_scales_problem(vllm_config: VllmConfig) -> str | None:
    """Why the scales of a quantized KV cache have no stable identity. Later than 0.26 nothing calculates them."""
    cache = vllm_config.cache_config
    if str(cache.cache_dtype) != "auto" and getattr(cache, "calculate_kv_scales", False):
        return "calculate_kv_scales takes the scales from the first requests, so they differ from run to run"
    return None
