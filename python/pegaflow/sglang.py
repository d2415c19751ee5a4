"""PegaFlow as a storage backend of SGLang's HiCache (its dynamic loading): pages of its host memory in a store that is
bounded in bytes, checked when it is read, and durable.

`--hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "pegaflow", "module_path":
"pegaflow.sglang", "class_name": "PegaHiCache", "interface_v1": 1, "path": "/mnt/nvme/sglang", "nvme": "512GiB", "dram":
"8GiB"}'`. The engine runs in SGLang's scheduler processes: each rank has a store of its own, in a folder below `path`.

With `interface_v1` pages go straight between SGLang's host memory and the store's. SGLang calls from threads of its
own, a batch at a time; the objects of a batch are copied by a few threads. SGLang's keys are hashes of tokens alone:
what bytes mean besides stands in the names of the objects, as far as SGLang says it; `namespace` is for weights that
differ under one model name.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from pegaflow import door_settings
from pegaflow.engine import PegaEngine
from pegaflow.errors import ClosedError, InvalidInputError, PegaError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo

logger = logging.getLogger("pegaflow.sglang")

_EPOCH = b"sglang\0epoch"
# What SGLang itself reads of the extra configuration.
_OF_SGLANG = (
    "backend_name",
    "module_path",
    "class_name",
    "interface_v1",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "hicache_storage_pass_prefix_keys",
    "tp_lcm_size",
)


@dataclass(frozen=True)
class BackendSettings:
    """The settings: what stands in the extra configuration beside SGLang's own."""

    path: str = ""
    """The directory of the stores, on ext4 or XFS; made if missing."""
    nvme: str | int = "16GiB"
    """Size of each rank's store on the drive, taken at once."""
    dram: str | int = "1GiB"
    """Memory of each rank for objects, beside SGLang's host memory. At least 16 MiB."""
    namespace: str = ""
    """Keeps what it names apart: set it to another text when weights or types change under the same model name."""
    threads: int = 8
    """Objects that are stored or loaded at a time. 1 to 64."""

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> BackendSettings:
        """Reads and checks the extra configuration; one error names everything that is wrong with it."""
        given = {name: value for name, value in extra.items() if name not in _OF_SGLANG}
        known = (field.name for field in fields(cls))
        door_settings.check("PegaHiCache", "hicache-storage-backend-extra-config", given, known, {"threads": 64})
        return cls(**given)


class PegaHiCache(HiCacheStorage):
    """Stores, finds and loads the pages of one rank of SGLang in a `PegaEngine`."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        self._settings = settings = BackendSettings.from_extra(storage_config.extra_config or {})
        if problem := _problem(storage_config):
            raise UnsupportedError(f"PegaFlow cannot keep the pages of this SGLang: {problem}")
        rank = (
            f"tp{storage_config.tp_rank}-pp{storage_config.pp_rank}-cp{storage_config.attn_cp_rank}"
            f"-dp{storage_config.dp_rank}"
        )
        shape = f"{storage_config.tp_size}/{storage_config.pp_size}/{storage_config.attn_cp_size}"
        self._identity = [settings.namespace, storage_config.model_name or "", rank, shape]
        """What the bytes of a page depend on besides its key; completed when the host memory is known."""
        self._is_by_address = bool((storage_config.extra_config or {}).get("interface_v1", 0))
        self._pieces = 0
        """Objects of a page that SGLang gives by its addresses; 0: one object, given as a tensor."""
        self._is_closed = False
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        """Guards the counts and the epoch."""
        self._engine = PegaEngine(Path(settings.path).expanduser() / rank, dram=settings.dram, nvme=settings.nvme)
        self._epoch = int(bytes(self._engine.get(_EPOCH) or b"0"))
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="pegaflow-hicache")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """SGLang's host memory. Its layout decides what a page's bytes mean."""
        super().register_mem_pool_host(mem_pool_host)
        page = int(mem_pool_host.page_size)
        self._identity[4:] = [str(mem_pool_host.layout), str(mem_pool_host.dtype), str(page)]
        if not self._is_by_address:
            return
        try:
            self._pieces = len(mem_pool_host.get_page_buffer_meta(torch.arange(page))[0])
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise UnsupportedError(
                f"interface_v1 wants addresses of pages, which the layout '{mem_pool_host.layout}' does not give "
                f"({error}); use --hicache-mem-layout page_first, or leave out interface_v1"
            ) from error

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuses pools beside the one of the KV cache: states and sidecars, which have keys of their own."""
        if str(host_pool_name) != "kv":
            raise UnsupportedError(
                f"PegaFlow cannot keep the pages of this SGLang: the model has a pool '{host_pool_name}' beside its KV "
                "cache; use another storage backend"
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    # --- pages by address ---------------------------------------------------------------------------------------------

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,  # noqa: ARG002
    ) -> list[bool]:
        """Stores pages out of SGLang's host memory; those that are there already are left as they are."""
        places = self._places(keys, host_indices)
        return self._each("set", lambda place: self._set_pieces(*places[place]), len(keys))

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,  # noqa: ARG002
    ) -> list[bool]:
        """Loads pages into SGLang's host memory. One that is not wholly there is not there."""
        places = self._places(keys, host_indices)
        return self._each("get", lambda place: self._get_pieces(*places[place]), len(keys))

    # --- pages as tensors ---------------------------------------------------------------------------------------------

    def set(
        self,
        key: str,
        value: Any | None = None,
        target_location: Any | None = None,  # noqa: ARG002
        target_sizes: Any | None = None,  # noqa: ARG002
    ) -> bool:
        """Stores a page."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,  # noqa: ARG002
        target_sizes: Any | None = None,  # noqa: ARG002
    ) -> bool:
        """Stores pages; whether all are stored."""
        pages = list(values or [])
        if len(pages) != len(keys):
            raise InvalidInputError(f"{len(pages)} pages for {len(keys)} keys; give one for each")
        return all(self._each("set", lambda place: self._set_page(keys[place], pages[place]), len(keys)))

    def get(self, key: str, target_location: Any | None = None, target_sizes: Any | None = None) -> Any:  # noqa: ARG002
        """Loads a page into `target_location`, which is returned; `None` if it is not there."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Any | None = None,
        target_sizes: Any | None = None,  # noqa: ARG002
    ) -> list[Any]:
        """As `get`, for many."""
        targets = list(target_locations or [])
        if len(targets) != len(keys):
            raise InvalidInputError(f"{len(targets)} places for {len(keys)} keys; give one for each")
        loaded = self._each("get", lambda place: self._get_page(keys[place], targets[place]), len(keys))
        return [target if is_loaded else None for target, is_loaded in zip(targets, loaded, strict=True)]

    # --- both ---------------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page is there."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:  # noqa: ARG002
        """How many pages from the first on are there."""
        try:
            for place, key in enumerate(keys):
                if self._is_closed or not self._has(key):
                    return place
        except PegaError as error:
            self._failed("exists", error)
            return 0
        return len(keys)

    def clear(self) -> None:
        """Nothing that was stored before is found again, also after a restart; its room is used anew in time."""
        with self._lock:
            self._epoch += 1
            self._engine.put(_EPOCH, str(self._epoch).encode())
        self._engine.flush()

    def status(self) -> dict[str, Any]:
        """What failed, by operation and reason, and the engine's statistics."""
        with self._lock:
            counts = dict(self._counts)
        return {"failed": counts, "engine": self._engine.stats()}

    def close(self) -> None:
        """Ends within two minutes: what runs is waited for. A second call does nothing."""
        self._is_closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._engine.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _each(self, what: str, do: Callable[[int], bool], count: int) -> list[bool]:
        """Does it for each place at once; whether it went well. A failure is a miss, and is counted."""

        def one(place: int) -> bool:
            try:
                return do(place)
            except PegaError as error:
                self._failed(what, error)
                return False

        try:
            return list(self._threads.map(one, range(count)))
        except RuntimeError as error:  # the threads were ended
            self._failed(what, ClosedError(str(error)))
            return [False] * count

    def _failed(self, what: str, error: PegaError) -> None:
        with self._lock:
            self._counts[f"{what}:{error.kind}"] += 1
        logger.debug("PegaFlow: %s of a page: %s", what, error)

    def _names(self, key: str, pieces: int) -> list[bytes]:
        """The names of a page's objects. No part but the last can hold a zero byte."""
        parts = [part.encode() for part in self._identity]
        prefix = b"\0".join([b"sglang", str(self._epoch).encode(), *parts, str(pieces).encode()])
        return [b"\0".join([prefix, str(piece).encode(), key.encode()]) for piece in range(max(1, pieces))]

    def _places(self, keys: Sequence[str], host_indices: torch.Tensor) -> list[tuple[str, list[Any]]]:
        """Of each page its key, and its pieces in SGLang's memory."""
        if not self._pieces:
            raise InvalidInputError(
                "pages are given by address; set interface_v1 to 1, and register the host memory first"
            )
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        if len(addresses) != len(keys) * self._pieces or len(sizes) != len(addresses):
            raise InvalidInputError(
                f"{len(addresses)} addresses and {len(sizes)} sizes for {len(keys)} pages of {self._pieces} pieces"
            )
        # SGLang keeps the memory, and the pages locked, until the call returns.
        pieces = [(ctypes.c_ubyte * size).from_address(at) for at, size in zip(addresses, sizes, strict=True)]
        return [(key, pieces[at * self._pieces : (at + 1) * self._pieces]) for at, key in enumerate(keys)]

    def _set_pieces(self, key: str, pieces: Sequence[Any]) -> bool:
        for name, piece in zip(self._names(key, self._pieces), pieces, strict=True):
            if not self._engine.contains(name):
                self._engine.put(name, piece)
        return True

    def _get_pieces(self, key: str, pieces: Sequence[Any]) -> bool:
        names = self._names(key, self._pieces)
        return all(self._read(name, np.frombuffer(piece, np.uint8)) for name, piece in zip(names, pieces, strict=True))

    def _set_page(self, key: str, page: torch.Tensor) -> bool:
        (name,) = self._names(key, 0)
        if not self._engine.contains(name):
            self._engine.put(name, page)
        return True

    def _get_page(self, key: str, target: torch.Tensor) -> bool:
        (name,) = self._names(key, 0)
        return self._read(name, target.reshape(-1).view(torch.uint8).numpy())

    def _read(self, name: bytes, wanted: np.ndarray[Any, Any]) -> bool:
        found = self._engine.get(name)
        if found is None:
            return False
        if found.nbytes != wanted.nbytes:
            logger.warning("PegaFlow: a page has %d bytes in place of %d; removed", found.nbytes, wanted.nbytes)
            self._engine.remove(name)
            return False
        np.copyto(wanted, np.frombuffer(found, np.uint8))
        return True

    def _has(self, key: str) -> bool:
        """Whether all of a page is there."""
        return all(self._engine.contains(name) for name in self._names(key, self._pieces))


def _problem(config: HiCacheStorageConfig) -> str:
    """Why the pages of this SGLang cannot be kept; empty if they can."""
    problems: Iterable[tuple[bool, str]] = (
        (
            config.is_mla_model and config.tp_size > 1,
            f"{config.tp_size} ranks share the pages of an MLA model, and one writes them for all; each rank has a "
            "store of its own here; use --tp-size 1",
        ),
        (config.dcp_size > 1, "decode context parallelism shards pages in another way"),
        (config.should_split_heads, "tp_lcm_size splits pages by heads; leave it out"),
    )
    return "; ".join(text for is_there, text in problems if is_there)
