"""The worker's side: carries out each step's orders, and reports what ended.

It registers its memory and identity with the cache, starts loads and saves, and polls. It never waits, with one
exception: before a step may overwrite the blocks of a preempted request, the copies of them must have ended. On a GPU
copies are ordered by streams: each runs after what vLLM has queued when it is started.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pegaflow.connector import compat
from pegaflow.connector.identity import UnknownIdentityError, namespace_of
from pegaflow.connector.metadata import PegaWorkerMetadata
from pegaflow.connector.metrics import PegaStats
from pegaflow.connector.weights_check import WeightsCheck
from pegaflow.errors import GeometryMismatchError, InvalidInputError, PegaError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from pegaflow.connector.metadata import LoadOrder, PegaMetadata, SaveOrder
    from pegaflow.connector.port import CachePort, Ended

logger = logging.getLogger("vllm.pegaflow")

FLIP_ENV = "PEGAFLOW_TEST_FLIP_LOADED"
SKIP_ENV = "PEGAFLOW_TEST_SKIP_LOAD"
_GROUP = 0
# Copies of a cancelled operation end within one batch; a cache that takes longer than this is broken.
_FENCE_LIMIT_S = 60.0
_FENCE_WARNING_S = 5.0
_REGISTER_RETRY_S = 1.0
_SHARED_IDENTITY = "other weights share the sampled digest of these; the worker's error says more"


@dataclass
class Geometry:
    """The memory that is registered: one range for each allocation, and the fragments of every block in their order."""

    ranges: list[tuple[int, int]]
    """Address and bytes."""
    fragments: list[tuple[int, int, int, int]]
    """Number of the range, offset of block 0's in it, bytes from block to block, bytes."""
    block_bytes: int
    blocks: int
    owner: Mapping[str, torch.Tensor]
    device: int | None = None
    """The CUDA ordinal; none for host memory."""


@dataclass
class Loading:
    """A load in flight."""

    order: LoadOrder
    is_cancelled: bool = False


@dataclass
class Report:
    """What ended and was not reported yet."""

    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    meta: PegaWorkerMetadata = field(default_factory=PegaWorkerMetadata)


class PegaWorker:
    """The worker's side of the connector."""

    def __init__(
        self, cache: CachePort, shard: int, shards: int, *, verify_weights: bool = False, keeps_all: bool = False
    ) -> None:
        self._cache = cache
        self._shard = shard
        self._shards = shards
        self._geometry: Geometry | None = None
        self._descriptor: dict[str, str] | None = None
        self._instance = ""
        self._wanted_instance = ""
        self._next_register = 0.0
        self._refused = ""
        self._verifies_weights = verify_weights
        self._keeps_all = keeps_all
        self._check: WeightsCheck | None = None
        self._loads: dict[int, Loading] = {}
        self._saves: dict[int, str] = {}
        self._unsaved: list[SaveOrder] = []
        """Orders of this step, started when its forward has run."""
        self._finishing: set[str] = set()
        """Finished requests whose blocks vLLM keeps until they are reported."""
        self._report = Report()
        self._arena: bytes | None = None
        """What the scheduler's side was told."""
        self._arena_problem = ""
        self._flips = os.environ.get(FLIP_ENV) == "1"
        self._skips = os.environ.get(SKIP_ENV) == "1"
        self.stats = PegaStats()
        if self._flips:
            logger.error("PegaFlow: %s=1: EVERY LOADED BLOCK IS SPOILED ON PURPOSE; for tests only", FLIP_ENV)
        if self._skips:
            logger.error("PegaFlow: %s=1: NO BLOCK IS LOADED, BUT ALL ARE REPORTED; for tests only", SKIP_ENV)

    # --- registration -------------------------------------------------------------------------------------------------

    def register(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        kv_caches: Mapping[str, torch.Tensor],
        instance: str,
    ) -> None:
        """Takes vLLM's KV cache. Where it cannot be cached nothing is, and one warning says why; raises
        `UnsupportedError` where PegaFlow cannot work at all.
        """
        device = compat.device_of(kv_caches)
        self._geometry = geometry_of(compat.layer_memory(kv_cache_config, kv_caches), kv_caches, device)
        self._wanted_instance = instance
        if problem := compat.memory_problem(vllm_config):
            self._refuse(problem)
            return
        # Before the sampled digest is taken: what is checked later are the files as they were then.
        self._check = WeightsCheck.of(vllm_config) if self._verifies_weights else None
        try:
            self._descriptor = namespace_of(vllm_config, kv_cache_config, kv_caches)
        except (UnknownIdentityError, PegaError, OSError) as error:
            self._refuse(str(error))
            return
        self._register()

    def _register(self) -> None:
        """Registers under the wanted name; a cache that cannot be reached is asked again later."""
        geometry = self._geometry
        if geometry is None or self._descriptor is None or self._refused or self._instance == self._wanted_instance:
            return
        if time.monotonic() < self._next_register:
            return
        name, _, epoch = self._wanted_instance.partition("#")
        try:
            self._cache.register_worker(
                instance=self._wanted_instance,
                descriptor=self._descriptor | ({"epoch": epoch} if epoch else {}),
                group=_GROUP,
                block_bytes=geometry.block_bytes,
                shards=self._shards,
                shard=self._shard,
                ranges=geometry.ranges,
                fragments=geometry.fragments,
                blocks=geometry.blocks,
                owner=geometry.owner,
                device=geometry.device,
                keeps_all=self._keeps_all,
            )
        except (InvalidInputError, GeometryMismatchError, UnsupportedError) as error:
            self._refuse(str(error))
        except PegaError as error:
            self._next_register = time.monotonic() + _REGISTER_RETRY_S
            logger.warning("PegaFlow: worker %d of %s is not registered yet: %s", self._shard, name, error)
        else:
            self._instance = self._wanted_instance
            if self._check is not None:
                self._check.start()
            logger.info(
                "PegaFlow: worker %d of %d registered %d blocks of %d bytes in %d pieces, %s",
                self._shard, self._shards, geometry.blocks, geometry.block_bytes, len(geometry.fragments),
                "on the CPU" if geometry.device is None else f"on GPU {geometry.device}",
            )  # fmt: skip

    def _refuse(self, why: str) -> None:
        self._refused = why
        self._report.meta.refused = why
        logger.warning("PegaFlow: worker %d caches nothing: %s", self._shard, why)

    def _take_verdict(self) -> None:
        """If the weights turned out to share their identity with others: stops, and ends what runs."""
        if self._check is None or self._refused or not (verdict := self._check.verdict()):
            return
        self._refused = self._report.meta.refused = _SHARED_IDENTITY
        logger.error("PegaFlow: worker %d stops caching: %s", self._shard, verdict)
        for operation, load in [*self._loads.items()]:
            # What a forward waits for can be ended no more.
            if not load.order.is_sync:
                load.is_cancelled = True
                self._cancel(operation)
        for operation in [*self._saves]:
            self._cancel(operation)

    def _tell_arena(self) -> None:
        """Tells the scheduler's side which arena this worker can copy from; a GPU takes a while to reach one."""
        arena = None
        if self._instance and not self._refused:
            try:
                arena = self._cache.arena()
            except PegaError as error:
                if self._arena_problem != str(error):
                    self._arena_problem = str(error)
                    logger.warning("PegaFlow: worker %d does not copy from DRAM directly: %s", self._shard, error)
        if arena == self._arena:
            return
        for which, change in ((self._arena, -1), (arena, 1)):
            if which is not None:
                self._report.meta.arenas[which] += change
        self._arena = arena

    # --- a step -------------------------------------------------------------------------------------------------------

    def fence(self, requests: Iterable[str]) -> None:
        """Returns when no copy from or to the blocks of these requests runs any more: they are about to be reused.

        Raises `RuntimeError` if the cache does not end its copies: going on would save or compute wrong bytes.
        """
        gone = set(requests)
        if not gone:
            return

        def running() -> list[int]:
            saves = [operation for operation, request in self._saves.items() if request in gone]
            return saves + [operation for operation, load in self._loads.items() if load.order.request_id in gone]

        self._poll()
        for operation in running():
            load = self._loads.get(operation)
            # A forward that is under way may use what a synchronous load brings: its result still counts.
            if load is None or not load.order.is_sync:
                self._cancel(operation)
        start = time.monotonic()
        has_warned = False
        while left := running():
            waited = time.monotonic() - start
            if waited > _FENCE_LIMIT_S:
                raise RuntimeError(
                    f"PegaFlow: {len(left)} copies of preempted requests have not ended in {waited:.0f} s; stopping, "
                    "because their blocks may not be reused before"
                )
            if waited > _FENCE_WARNING_S and not has_warned:
                has_warned = True
                logger.warning("PegaFlow: waiting for %d copies of preempted requests", len(left))
            self._poll(wait=0.05)

    def bind(self, meta: PegaMetadata) -> None:
        """A step begins: takes its orders. Loads start with `start_loads`, saves with `start_saves`."""
        self._wanted_instance = meta.instance
        self._take_verdict()
        self._register()
        self._tell_arena()
        for operation in meta.cancelled:
            if load := self._loads.get(operation):
                load.is_cancelled = True
                self._cancel(operation)
        self._unsaved += meta.saves
        # Until it is started, too, a save keeps its request's blocks.
        self._saves.update({order.operation: order.request_id for order in meta.saves})
        self._finishing.update(meta.finished)

    def start_loads(self, orders: Iterable[LoadOrder]) -> None:
        """Starts the step's loads. Called before the step's forward if one of them is synchronous.

        Raises `RuntimeError` if a synchronous one cannot be started.
        """
        orders = list(orders)
        if not orders:
            return
        stream = self._stream()
        for order in orders:
            self._loads[order.operation] = Loading(order)
            try:
                if self._refused:
                    # Ordered before the scheduler's side knew.
                    raise UnsupportedError(self._refused)
                if self._skips:
                    logger.error("PegaFlow: skipped a load of %d blocks on purpose (%s=1)", len(order.blocks), SKIP_ENV)
                    self._load_ended(order.operation, len(order.blocks), 0, [])
                    continue
                self._start_load(order, stream)
            except PegaError as error:
                if order.is_sync:
                    raise _lost(order, str(error)) from error
                logger.debug("PegaFlow: load for %s: %s", order.request_id, error)
                self._load_ended(order.operation, 0, 0, order.blocks)
            else:
                if order.is_sync and self._flips:
                    # On the same stream: after the load, and before the forward.
                    self._flip(order.blocks)

    def _start_load(self, order: LoadOrder, stream: int) -> None:
        if order.arena:
            try:
                self._cache.load_placed(
                    order.operation,
                    order.lease,
                    self._shard,
                    order.arena,
                    order.places_of(self._shard),
                    order.blocks,
                    remaining=order.deadline - time.monotonic(),
                    stream=stream,
                    before=order.is_sync,
                )
            except PegaError as error:
                if order.is_sync:
                    raise
                logger.debug("PegaFlow: load for %s goes through the cache: %s", order.request_id, error)
            else:
                self.stats.count("loads:sync" if order.is_sync else "loads:direct")
                logger.debug(
                    "PegaFlow: worker %d copies %d blocks for %s", self._shard, len(order.blocks), order.request_id
                )
                return
        self._cache.load(order.operation, order.lease, self._shard, order.indices, order.blocks, stream)
        self.stats.count("loads:cache")

    def _stream(self) -> int:
        """The stream on which vLLM computes now."""
        return compat.raw_stream(self._geometry.device) if self._geometry is not None else 0

    def start_saves(self) -> None:
        """The step's forward has run, its blocks are complete: starts its saves. A second call does nothing."""
        orders, self._unsaved = self._unsaved, []
        stream = self._stream() if orders else 0
        for order in orders:
            count = len(order.blocks)
            if self._refused or self._instance != self._wanted_instance:
                self._save_ended(order.operation, 0, 0, count)
                continue
            try:
                self._cache.save(
                    order.operation,
                    self._instance,
                    _GROUP,
                    self._shard,
                    parent=order.parent,
                    depth=order.depth,
                    keys=order.keys,
                    blocks=order.blocks,
                    stream=stream,
                    tenant=order.tenant,
                )
            except PegaError as error:
                logger.debug("PegaFlow: save for %s: %s", order.request_id, error)
                self._save_ended(order.operation, 0, 0, count)

    # --- reports ------------------------------------------------------------------------------------------------------

    def finished(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose saves have ended and which were finished before; whose loads have ended; and of the latter
        those whose load failed. Each is told once.
        """
        self._take_verdict()
        self._poll()
        busy = set(self._saves.values())
        sent = {request for request in self._finishing if request not in busy}
        self._finishing -= sent
        received, self._report.received = self._report.received, set()
        failed, self._report.failed = self._report.failed, set()
        return sent, received, failed

    def failed_blocks(self) -> set[int]:
        """Blocks whose load failed, told once."""
        failed, self._report.failed_blocks = self._report.failed_blocks, set()
        return failed

    def worker_meta(self) -> PegaWorkerMetadata | None:
        """What the scheduler's side is to know, told once."""
        meta, self._report.meta = self._report.meta, PegaWorkerMetadata()
        return None if meta == PegaWorkerMetadata() else meta

    def close(self, timeout: float) -> None:
        """Cancels everything and ends the session once the copies have ended."""
        if self._check is not None:
            self._check.stop()
        for operation in [*self._loads, *self._saves]:
            self._cancel(operation)
        self._cache.close(timeout)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _cancel(self, operation: int) -> None:
        if any(order.operation == operation for order in self._unsaved):
            # Not started: there is nothing that could end by itself.
            kept = [order for order in self._unsaved if order.operation != operation]
            (cancelled,) = (order for order in self._unsaved if order.operation == operation)
            self._unsaved = kept
            self._save_ended(operation, 0, 0, len(cancelled.blocks))
            return
        try:
            self._cache.cancel(operation)
        except PegaError as error:
            logger.debug("PegaFlow: operation %d was not cancelled: %s", operation, error)

    def _poll(self, wait: float = 0.0) -> None:
        try:
            ended = self._cache.poll(wait)
        except PegaError as error:
            logger.warning("PegaFlow: the cache cannot be polled: %s", error)
            time.sleep(wait)
            return
        for completion in ended:
            self._take(completion)

    def _take(self, ended: Ended) -> None:
        if ended.is_load:
            self._load_ended(ended.operation, ended.loaded_dram, ended.loaded_nvme, ended.failed)
        else:
            self._save_ended(ended.operation, ended.saved, ended.present, ended.dropped)

    def _load_ended(self, operation: int, dram: int, nvme: int, failed: list[int]) -> None:
        load = self._loads.pop(operation, None)
        if load is None:
            return
        order = load.order
        if order.is_sync:
            # Nobody waits for its report, but a forward has used what it brought.
            if failed:
                raise _lost(order, f"{len(failed)} of {len(order.blocks)} blocks were not copied")
            self.stats.count("loaded_blocks:dram", dram)
            self.stats.count("loaded_blocks:nvme", nvme)
            return
        # Cancelled loads count as failed as a whole: nobody may rely on part of one.
        failed_blocks = set(order.blocks) if load.is_cancelled else set(failed)
        if self._flips:
            self._flip([block for block in order.blocks if block not in failed_blocks])
        self._report.received.add(order.request_id)
        if failed_blocks:
            self._report.failed.add(order.request_id)
            self._report.failed_blocks |= failed_blocks
            self._report.meta.failed_loads.add(order.request_id)
        self.stats.count("loaded_blocks:dram", dram)
        self.stats.count("loaded_blocks:nvme", nvme)
        self.stats.count("load_failed_blocks", len(failed_blocks))

    def _save_ended(self, operation: int, saved: int, present: int, dropped: int) -> None:
        if self._saves.pop(operation, None) is None:
            return
        self._report.meta.saves[operation] += 1
        if dropped:
            self._report.meta.dropped.add(operation)
        self.stats.count("saved_blocks:saved", saved)
        self.stats.count("saved_blocks:present", present)
        self.stats.count("saved_blocks:dropped", dropped)

    def _flip(self, blocks: list[int]) -> None:
        """Tests only: spoils loaded blocks, so that a check of the tokens can fail."""
        geometry = self._geometry
        if geometry is None:
            return
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in geometry.owner.values()}
        for range_, offset, stride, length in geometry.fragments:
            start = geometry.ranges[range_][0] + offset
            memory = max(address for address in storages if address <= start)
            tensor = storages[memory]
            view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            view.set_(tensor.untyped_storage(), start - memory, (geometry.blocks, length), (stride, 1))
            view[blocks] ^= 0x80
        logger.error("PegaFlow: spoiled %d loaded blocks on purpose (%s=1)", len(blocks), FLIP_ENV)


def _lost(order: LoadOrder, why: str) -> RuntimeError:
    return RuntimeError(
        f"PegaFlow: the synchronous load of {len(order.blocks)} blocks for request {order.request_id} failed: {why}. "
        'vLLM counts on them already, so it must stop; with "sync_loads": false failed loads are computed instead'
    )


def geometry_of(
    layers: list[compat.LayerMemory], owner: Mapping[str, torch.Tensor], device: int | None = None
) -> Geometry:
    """One range for each allocation, and the pieces of the layers in order; neighbours become one, and layers that
    share their memory count once.
    """
    distinct = list({layer.start: layer for layer in layers}.values())
    allocations: dict[int, list[compat.LayerMemory]] = {}
    for layer in distinct:
        allocations.setdefault(layer.memory, []).append(layer)
    starts = {memory: min(layer.start for layer in inside) for memory, inside in allocations.items()}
    numbers = {memory: number for number, memory in enumerate(allocations)}
    fragments: list[tuple[int, int, int, int]] = []
    for layer in distinct:
        for piece in layer.pieces:
            range_, offset = numbers[layer.memory], layer.start - starts[layer.memory] + piece.offset
            if fragments:
                last_range, last_offset, last_stride, last_length = fragments[-1]
                if (last_range, last_offset + last_length, last_stride) == (range_, offset, piece.stride):
                    fragments[-1] = (range_, last_offset, last_stride, last_length + piece.length)
                    continue
            fragments.append((range_, offset, piece.stride, piece.length))
    return Geometry(
        ranges=[
            (starts[memory], max(layer.end for layer in inside) - starts[memory])
            for memory, inside in allocations.items()
        ],
        fragments=fragments,
        block_bytes=sum(length for _, _, _, length in fragments),
        blocks=distinct[0].blocks,
        owner=owner,
        device=device,
    )
