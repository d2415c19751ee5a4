"""Statistics and Prometheus metrics, through vLLM's own hooks: counters that are added up over workers and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Name, label of its series, what it counts. The statistics count under NAME, or NAME:VALUE-OF-THE-LABEL.
_COUNTERS: dict[str, tuple[str | None, str]] = {
    "lookups": ("result", "Lookups in the cache, by result: hit, miss or error."),
    "lookup_blocks": (None, "Full blocks of prompts that were looked up."),
    "decisions": ("verdict", "Found prefixes, by what was decided: load or recompute."),
    "hit_blocks": (None, "Full blocks of prompts that were found."),
    "ahead_lookups": (None, "Requests that were looked up while they waited in the engine's queue."),
    "held_back_requests": (None, "Requests that waited a moment longer for blocks that were about to be in DRAM."),
    "handoffs": (
        "result",
        "Requests that waited for blocks of another engine (waited), and those that waited in vain (late).",
    ),
    "loads": ("way", "Loads, by way: sync (within the step that needs them), direct (by the worker itself) or cache."),
    "loaded_blocks": ("tier", "Blocks loaded into the engine, by the tier that they came from."),
    "load_failed_blocks": (None, "Blocks whose load failed; the engine computed them."),
    "offered_blocks": (None, "Blocks offered to the cache, in all workers."),
    "saved_blocks": (
        "result",
        "Blocks offered to the cache, in all workers, by result: saved, present, dropped, or withdrawn (freed before).",
    ),
    "uncacheable_requests": (None, "Requests whose blocks depend on something without a stable identity."),
}


class PegaStats(KVConnectorStats):
    """Counts since they were last taken."""

    data: dict[str, int]

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a counter: `NAME` or `NAME:LABEL`."""
        if amount:
            self.data[name] = self.data.get(name, 0) + amount

    def reset(self) -> None:
        """Forgets all counts."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> PegaStats:
        """Adds another's counts to these."""
        for name, amount in other.data.items():
            self.count(name, amount)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counts as they are logged."""
        return dict(sorted(self.data.items()))

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def take(self) -> PegaStats | None:
        """The counts so far, which start anew; `None` if there are none."""
        if self.is_empty():
            return None
        taken = PegaStats(data=self.data)
        self.data = {}
        return taken


class PegaPromMetrics(KVConnectorPromMetrics):
    """The counters as Prometheus metrics `vllm:pegaflow_NAME`, with vLLM's own labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labelvalues = per_engine_labelvalues
        make = metric_types[Counter]
        self._counters = {
            name: make(
                name=f"vllm:pegaflow_{name}",
                documentation=text,
                labelnames=[*labelnames, label] if label else labelnames,
            )
            for name, (label, text) in _COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval's counts."""
        for series, amount in transfer_stats_data.items():
            name, _, label = series.partition(":")
            if name in self._counters:
                values = [*self._labelvalues[engine_idx], *([label] if label else [])]
                self._counters[name].labels(*values).inc(amount)
