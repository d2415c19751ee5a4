"""`PegaTier`: vLLM's interface of a secondary tier. Everything that could wait is handed to the tier's own thread.

All methods run in vLLM's scheduler process and return at once, except `drain_jobs` and `shutdown`, which vLLM calls to
wait: both end within a bound.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingEvent,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager

from pegaflow.connector.config import KillSwitch
from pegaflow.connector.port import open_cache
from pegaflow.vllm_tier import compat
from pegaflow.vllm_tier.chains import ROOT, Chains, Run
from pegaflow.vllm_tier.courier import GROUP, SHARD, Courier, Lookup, Touch, Transfer
from pegaflow.vllm_tier.identity import namespace_of
from pegaflow.vllm_tier.lookups import Lookups
from pegaflow.vllm_tier.memory import PrimaryMemory
from pegaflow.vllm_tier.settings import TierSettings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from vllm.v1.kv_offload.base import (
        OffloadingMetricMetadata,
        OffloadingSpec,
        OffloadKey,
        ReqContext,
        ScheduleEndContext,
    )
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
    from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

    from pegaflow.connector.port import CachePort
    from pegaflow.vllm_tier.courier import Finished

logger = logging.getLogger("vllm.pegaflow")

_BATCH_KEYS_MAX = 8_192
_EVENTS_MAX = 65_536
# The cache ends operations itself after a minute; vLLM has to wait for them.
_DRAIN_LIMIT_S = 120.0
_METRICS = {
    "lookup": (
        "vllm:kv_offload_pegaflow_missed_lookups",
        "Chunks that counted as misses without being looked up, by reason: queue (full), timeout, error, stopped.",
    ),
    "store": (
        "vllm:kv_offload_pegaflow_dropped_stores",
        "Chunks that were not stored, by reason: queue (full), cache (dropped by it, or not there), off, stopped.",
    ),
    "load": (
        "vllm:kv_offload_pegaflow_failed_loads",
        "Chunks that were not loaded, by reason: queue (full), cache (gone, failed, or not there), off, stopped.",
    ),
}


class PegaTier(SecondaryTierManager):
    """Keeps the chunks of vLLM's tier in host memory in PegaFlow: in a store of its own, or in that of a server."""

    medium = compat.storage_medium()

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **entry: Any,
    ) -> None:
        # vLLM 0.26 and 0.27 hand it on.
        entry.pop("module_path", None)
        settings = TierSettings.from_entry(entry)
        super().__init__(offloading_spec, primary_kv_view, tier_type, *compat.base_arguments(backpressure_detector))
        self.locality = Locality(settings.locality) if settings.locality else None
        self._settings = settings
        self._kill_switch = KillSwitch(settings.as_connector())
        self._lookups = Lookups(settings.lookup_timeout_ms / 1e3)
        chunk_blocks = offloading_spec.config.cache.blocks_per_chunk
        blocks = compat.block_tokens(offloading_spec.config)
        self._chains = Chains({group: tokens * chunk_blocks for group, tokens in blocks.items()})
        self._in_flight: set[int] = set()
        has_events = settings.enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if has_events else None
        self._has_warned_of_hashes = False
        self._memory: PrimaryMemory | None = None
        self._chunk_bytes = 0
        self._cache: CachePort | None = None
        self._courier: Courier | None = None
        try:
            self._open(offloading_spec, primary_kv_view)
        except BaseException:
            try:
                self.shutdown()
            except Exception:
                logger.exception("PegaFlow: the tier could not be closed after its start had failed")
            raise

    def _open(self, spec: OffloadingSpec, view: memoryview) -> None:
        settings, config = self._settings, spec.config
        self._memory = memory = PrimaryMemory(view)
        self._chunk_bytes = memory.chunk_bytes
        # First: it may refuse, and nothing is open yet.
        descriptor = namespace_of(config, settings, memory.chunk_bytes)
        name = f"vllm tier {config.engine_id}"
        self._cache = open_cache(settings.as_connector(), name, shares_process=True)
        self._cache.register_worker(
            instance=name,
            descriptor=descriptor,
            group=GROUP,
            block_bytes=memory.chunk_bytes,
            shards=1,
            shard=SHARD,
            ranges=[(memory.address, memory.bytes)],
            fragments=[(0, 0, memory.stride_bytes, memory.chunk_bytes)],
            blocks=memory.chunks,
            owner=memory,
            device=None,
        )
        self._courier = Courier(
            self._cache,
            name,
            has_one_group=len(config.groups) == 1,
            queue_jobs=settings.queue_jobs,
            in_flight_jobs=settings.in_flight_jobs,
        )
        self._courier.start()
        logger.info(
            "PegaFlow: tier of %d chunks of %d bytes, %s",
            memory.chunks,
            memory.chunk_bytes,
            f"a store of its own at {settings.path}" if settings.path else "in a server's store",
        )

    # --- lookups ------------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:  # noqa: ARG002
        """A request has arrived; the tier takes chunks as they fill up."""
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a chunk is there; `RETRY` until the tier's thread has found out."""
        if self._courier is None or self._kill_switch.is_off(time.monotonic()):
            return LookupResult.MISS
        self._take_answers(self._courier)
        is_there = self._lookups.ask(key, req_context.req_id)
        if is_there is None:
            return LookupResult.RETRY
        if not is_there:
            return LookupResult.MISS
        (end_token,) = compat.end_tokens(req_context, [key])
        self._chains.found(req_context.req_id, key, end_token)
        return LookupResult.HIT

    def on_schedule_end(self, context: ScheduleEndContext) -> None:  # noqa: ARG002
        """A step has been scheduled: what was asked for in it goes to the tier's thread while vLLM computes."""
        courier = self._courier
        if courier is None:
            return
        batch: list[bytes] = list(self._lookups.take_batch())
        for start in range(0, len(batch), _BATCH_KEYS_MAX):
            part = batch[start : start + _BATCH_KEYS_MAX]
            if not courier.ask(Lookup(part)):
                self._lookups.tell(part, are_there=False, is_guess=True)
                courier.count("lookup", "queue", len(part))
        self._take_answers(courier)

    def _take_answers(self, courier: Courier) -> None:
        for answer in courier.take_answers():
            self._lookups.tell(answer.present, are_there=True)
            self._lookups.tell(answer.absent, are_there=False)
            self._lookups.tell(answer.unknown, are_there=False, is_guess=True)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:  # noqa: ARG002
        """Chunks were used: the store's policy is told, unless there is more urgent work."""
        if self._courier is not None and keys and not self._kill_switch.is_off(time.monotonic()):
            self._courier.ask(Touch(list(keys)))

    def on_request_finished(self, req_context: ReqContext) -> None:
        """A request has ended: what is known for its sake is forgotten."""
        self._lookups.forget(req_context.req_id)
        self._chains.forget(req_context.req_id)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Stores chunks out of vLLM's tier in host memory."""
        context, keys = job_metadata.req_context, list(job_metadata.keys)
        self._warn_of_hashes(keys)
        runs = self._chains.runs(context.req_id, keys, compat.chunks_of(job_metadata), compat.end_tokens(context, keys))
        self._submit(Transfer(job_metadata.job_id, is_load=False, runs=runs))

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Loads chunks into vLLM's tier in host memory."""
        run = Run(ROOT, 0, list(job_metadata.keys), compat.chunks_of(job_metadata))
        self._submit(Transfer(job_metadata.job_id, is_load=True, runs=[run]))

    def _submit(self, transfer: Transfer) -> None:
        if self._courier is None:
            raise RuntimeError("PegaFlow: a job was submitted to a tier that is shut down")
        self._in_flight.add(transfer.job)
        self._courier.transfer(transfer, is_off=self._kill_switch.is_off(time.monotonic()))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The jobs that ended since the last call: no copy of theirs runs any more."""
        if self._courier is None:
            return []
        return [self._result(finished) for finished in self._courier.take_finished()]

    def _result(self, finished: Finished) -> JobResult:
        self._in_flight.discard(finished.job)
        good: list[Any] = [key for key in finished.keys if key not in finished.failed]
        if finished.is_load:
            # Asked again, vLLM would be told that they are there, and load them in vain for ever.
            self._lookups.tell(finished.failed, are_there=False, is_guess=True)
        else:
            self._lookups.tell(good, are_there=True)
            if self._events is not None and good and len(self._events) < _EVENTS_MAX:
                self._events.append(
                    OffloadingEvent(keys=good, medium=self.medium, removed=False, locality=self.locality)
                )
        return compat.job_result(
            finished.job,
            success=not finished.failed,
            successful_keys=tuple(good) if finished.failed and good and finished.is_load else None,
            seconds=finished.seconds,
            transferred=len(good) * self._chunk_bytes,
        )

    def has_pending_work(self) -> bool:
        """Whether vLLM has to go on asking: a job was not reported yet."""
        return bool(self._in_flight)

    def drain_jobs(self) -> None:
        """Returns when no copy touches vLLM's memory: jobs that have not begun fail.

        Raises `RuntimeError` if they do not end in two minutes.
        """
        if self._courier is not None:
            self._courier.drain(_DRAIN_LIMIT_S)

    def _warn_of_hashes(self, keys: list[OffloadKey]) -> None:
        if self._has_warned_of_hashes or not keys or compat.has_lasting_hashes(keys[0]):
            return
        self._has_warned_of_hashes = True
        logger.warning(
            "PegaFlow: nothing will be found after a restart, because each process seeds vLLM's block hashes anew; "
            "set PYTHONHASHSEED, or start a vLLM of 0.29 or later with --prefix-caching-hash-algo sha256"
        )

    # --- what is told -------------------------------------------------------------------------------------------------

    def take_events(self) -> Iterable[OffloadingEvent]:
        """The chunks that were stored since the last call."""
        if self._events is None:
            return ()
        events, self._events = self._events, []
        return events

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:  # noqa: ARG003
        """The Prometheus metrics: what was not done, and why."""
        return {name: OffloadingCounterMetadata(text, labelnames=("reason",)) for name, text in _METRICS.values()}

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Counts since the last call."""
        if self._courier is None:
            return None
        counts = self._courier.take_counts()
        counts["lookup", "timeout"] += self._lookups.timeouts
        self._lookups.timeouts = 0
        stats = OffloadingConnectorStats()
        for (what, why), blocks in counts.items():
            if blocks:
                stats.increase_counter(_METRICS[what][0], blocks, (why,))
        return None if stats.is_empty() else stats

    # --- the end ------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Ends the thread and closes the cache. A second call does nothing.

        Raises `RuntimeError` if copies still run at the bound: vLLM then keeps its memory, and so does the tier.
        """
        deadline = time.monotonic() + self._settings.shutdown_timeout_ms / 1e3
        courier, self._courier = self._courier, None
        cache, self._cache = self._cache, None
        memory, self._memory = self._memory, None
        has_ended = courier is None or courier.stop(max(0.1, (deadline - time.monotonic()) / 2))
        try:
            if cache is not None:
                cache.close(max(0.1, deadline - time.monotonic()))
        finally:
            if has_ended and memory is not None:
                memory.release()
        if not has_ended:
            raise RuntimeError(
                f"PegaFlow: copies of the tier have not ended in {self._settings.shutdown_timeout_ms} ms; "
                "their memory is kept"
            )
