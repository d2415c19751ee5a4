"""`PegaKVConnector`: vLLM's hooks, handed to the scheduler's side or the worker's side. It decides nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from pegaflow.connector import compat
from pegaflow.connector.config import ConnectorConfig, KillSwitch
from pegaflow.connector.events import BlockEvents
from pegaflow.connector.metadata import PegaMetadata
from pegaflow.connector.metrics import PegaPromMetrics, PegaStats
from pegaflow.connector.port import open_cache
from pegaflow.connector.scheduler import PegaScheduler
from pegaflow.connector.worker import PegaWorker
from pegaflow.errors import PegaError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.pegaflow")

_CLOSE_TIMEOUT_S = 20.0


class PegaKVConnector(KVConnectorBase_V1):
    """Keeps vLLM's KV cache in PegaFlow. vLLM makes one for its scheduler and one for each worker."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.check_version()
        transfer = vllm_config.kv_transfer_config
        config = ConnectorConfig.from_extra(transfer.kv_connector_extra_config or {})
        if problem := compat.group_problem(vllm_config, kv_cache_config):
            raise UnsupportedError(f"PegaFlow cannot keep this model's KV cache: {problem}")
        if transfer.kv_load_failure_policy == "fail":
            # A failed load is a miss. vLLM's default would end the request with an error instead.
            transfer.kv_load_failure_policy = "recompute"
            logger.info("PegaFlow: kv_load_failure_policy is set to 'recompute' (it was 'fail', vLLM's default)")
        parallel = vllm_config.parallel_config
        workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        shares_process = workers == 1 and parallel.distributed_executor_backend in (None, "uni")
        side = "scheduler" if role == KVConnectorRole.SCHEDULER else f"worker {parallel.rank}"
        self._instance = f"{transfer.engine_id}/{parallel.data_parallel_rank}"
        cache = open_cache(config, f"vllm {side}", shares_process=shares_process)
        self._scheduler: PegaScheduler | None = None
        self._worker: PegaWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            if compat.is_newer_than_known():
                logger.warning("PegaFlow: vLLM %d.%d is newer than the versions it was made for", *compat.VERSION)
            block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            block_bytes = compat.block_bytes(kv_cache_config)
            self._scheduler = PegaScheduler(
                config,
                cache,
                self._instance,
                block_size,
                block_bytes,
                workers,
                KillSwitch(config),
                step_tokens_max=vllm_config.scheduler_config.max_num_batched_tokens,
                events=BlockEvents(cache, self._instance, block_size) if compat.wants_kv_events(vllm_config) else None,
            )
        else:
            shard = parallel.rank % workers
            # The shards share their files: one looks at them for all.
            verifies = config.verify_weights and shard == 0
            self._worker = PegaWorker(cache, shard, workers, verify_weights=verifies, keeps_all=config.prewarm)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a save that is lost is a miss later, nothing else."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Asks for memory in which a block is one piece, where there is such. 0.29 on."""
        return compat.required_layout(vllm_config)

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """As above. 0.26 to 0.28, model runner V1; V2 never asks."""
        return compat.prefers_cross_layer_blocks()

    # --- worker -------------------------------------------------------------------------------------------------------

    @property
    def _on_worker(self) -> PegaWorker:
        assert self._worker is not None, "a worker's hook was called on the scheduler's connector"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM has allocated its KV cache."""
        self._on_worker.register(self._vllm_config, self._kv_cache_config, kv_caches, self._instance)

    def register_cross_layers_kv_cache(self, kv_cache: torch.Tensor, attn_backend: Any) -> None:
        """As `register_kv_caches`, with one memory for all layers. 0.26 to 0.28."""
        self.register_kv_caches(compat.cross_layer_views(self._kv_cache_config, kv_cache, attn_backend))

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Blocks of preempted requests are about to be overwritten."""
        if isinstance(kv_connector_metadata, PegaMetadata):
            self._on_worker.fence(kv_connector_metadata.preempted)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, PegaMetadata):
            self._on_worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ARG002
        """Starts the step's loads. 0.26 to 0.28 call it before the forward; later ones only if a load is synchronous,
        else after it.
        """
        if self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            if isinstance(metadata, PegaMetadata):
                orders, metadata.loads = metadata.loads, []
                self._on_worker.start_loads(orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """What is loaded for the running step is ordered before all of it, by the stream."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Whole blocks are saved after the step, not layers during it."""

    def wait_for_save(self) -> None:
        """The step's blocks are complete: starts their saves, and does not wait for them."""
        self._on_worker.start_saves()

    def clear_connector_metadata(self) -> None:
        """A step ends. 0.26 to 0.28 leave out `wait_for_save` in steps without a forward."""
        if self._worker is not None:
            self._worker.start_saves()
        super().clear_connector_metadata()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        """What has ended. 0.26 to 0.29; failed blocks come with `get_block_ids_with_load_errors`."""
        sending, receiving, _ = self._on_worker.finished()
        return sending or None, receiving or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:  # noqa: ARG002
        """What has ended, with the requests whose load failed. 0.30 on."""
        results = compat.transfer_results(*self._on_worker.finished())
        self._on_worker.failed_blocks()  # told by request
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks whose load failed. 0.26 to 0.29; later versions are told by request."""
        return set() if compat.HAS_TRANSFER_RESULTS else self._on_worker.failed_blocks()

    def build_connector_worker_meta(self) -> Any:
        """What the scheduler's side is to know."""
        return self._on_worker.worker_meta()

    # --- scheduler ----------------------------------------------------------------------------------------------------

    @property
    def _on_scheduler(self) -> PegaScheduler:
        assert self._scheduler is not None, "a scheduler's hook was called on a worker's connector"
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """vLLM's own cache. 0.32 gives it with `bind_kv_cache_manager`, whose default calls this."""
        self._on_scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """A request has arrived. 0.26 on: all supported versions."""
        self._on_scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much can be loaded, and whether the request has to wait for it; `None`: ask again in a later step."""
        return self._on_scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM has blocks for what is to be loaded."""
        self._on_scheduler.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[Any, int]:
        """From which tiers the tokens come. 0.32 on."""
        sources = self._on_scheduler.hit_sources(request, num_external_tokens)
        return sources or super().get_external_cache_hit_sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PegaMetadata:
        """The step's orders."""
        return self._on_scheduler.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers report."""
        self._on_scheduler.update(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over; whether its blocks are still needed, and what is told to its asker."""
        return self._on_scheduler.ended(request, block_ids)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """KV events of what has changed since the last call."""
        return self._on_scheduler.take_events()

    def reset_cache(self) -> bool | None:
        """vLLM forgets its prefix cache, for example because the weights were changed."""
        self._on_scheduler.reset()
        return True

    # --- both ---------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> PegaStats | None:
        """Counts since the last call."""
        side = self._scheduler or self._worker
        return side.stats.take() if side is not None else None

    def shutdown(self) -> None:
        """vLLM stops."""
        side, self._scheduler, self._worker = self._scheduler or self._worker, None, None
        if side is not None:
            try:
                side.close(_CLOSE_TIMEOUT_S)
            except PegaError as error:
                logger.warning("PegaFlow: the cache was not closed in order: %s", error)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PegaStats:
        """Statistics out of what was sent between processes."""
        return PegaStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PegaPromMetrics:
        """The Prometheus metrics."""
        return PegaPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
