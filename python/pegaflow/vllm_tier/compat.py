"""Every difference of vLLM's tiering between the versions 0.26 to 0.33, each with the version that it is for."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.kv_offload import base as offload_base
from vllm.v1.kv_offload.tiering.base import JobResult

from pegaflow.connector.compat import VERSION
from pegaflow.vllm_tier.chains import hash_bytes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.kv_offload.tiering.base import TransferJob

_SEEDS_HASHES_ALIKE: Final = VERSION >= (0, 29)
"""0.29 on: block hashes of cryptographic algorithms begin with a fixed seed, others with one of the process, as all did
before."""
_CRYPTOGRAPHIC_HASH_BYTES: Final = 32

_HAS_PLACES: Final = VERSION >= (0, 32)
"""0.32 on (not in 0.30): the context of a request knows the place of each chunk."""

_HAS_BACKPRESSURE: Final = VERSION >= (0, 32)
"""0.32 on (not in 0.30): a tier takes a detector of back-pressure, and reports the bytes of a job."""

_HAS_CANONICAL_LAYOUTS: Final = VERSION >= (0, 28)
"""0.28 on (not in 0.26): the configuration says whether a block's bytes depend on the parallel sizes."""

_HAS_GROUP_IDS: Final = VERSION >= (0, 30)
"""0.30 on (not in 0.28): groups have numbers of their own, and the configuration names the layout. Before: they are
numbered in their order."""


def storage_medium() -> Any:
    """The medium of a tier on drives. 0.28 on: one of an enumeration. Before: a text, that of vLLM's own such tier."""
    media = getattr(offload_base, "Medium", None)
    return "FS" if media is None else media.STORAGE


def chunks_of(job: TransferJob) -> list[int]:
    """The rows of a job in vLLM's tier in host memory. Before 0.28 they were called blocks."""
    return [int(chunk) for chunk in (job.chunk_ids if hasattr(job, "chunk_ids") else job.block_ids)]


def base_arguments(detector: Any) -> tuple[Any, ...]:
    """What the constructor of `SecondaryTierManager` takes after the tier's type."""
    return (detector,) if _HAS_BACKPRESSURE else ()


def end_tokens(context: Any, keys: Sequence[bytes]) -> list[int | None]:
    """The token after each chunk's last one in its request; `None` where vLLM does not say."""
    if not _HAS_PLACES:
        return [None] * len(keys)
    return [context.get_offload_key_position(key) for key in keys]


def block_tokens(config: OffloadingConfig) -> dict[int, int]:
    """The tokens of a block, by group."""
    if not _HAS_GROUP_IDS:
        return {number: group.tokens_per_block for number, group in enumerate(config.groups)}
    return {group.group_id: group.tokens_per_block for group in config.groups}


def layout_of(config: OffloadingConfig) -> str:
    """How the bytes of a chunk are laid out, as far as vLLM says."""
    if not _HAS_CANONICAL_LAYOUTS:
        return f"default agnostic={config.parallel.is_parallelism_agnostic}"
    name = config.kv_cache_layout if _HAS_GROUP_IDS else "default"
    return f"{name} canonical={config.canonical_layout} replicated={config.replicated_layout}"


def job_result(job: int, *, success: bool, successful_keys: Any, seconds: float, transferred: int) -> JobResult:
    """What is told of a job that ended."""
    told = {"successful_keys": successful_keys, "transfer_time": seconds, "transfer_bytes": transferred}
    known = {field.name for field in dataclasses.fields(JobResult)}
    return JobResult(job_id=job, success=success, **{name: value for name, value in told.items() if name in known})


def has_lasting_hashes(key: bytes) -> bool:
    """Whether the same tokens have the same key in another process."""
    if os.environ.get("PYTHONHASHSEED", "random") not in ("", "random"):
        return True
    return _SEEDS_HASHES_ALIKE and hash_bytes_of(key) >= _CRYPTOGRAPHIC_HASH_BYTES
