"""What the scheduler's side tells the workers each step, and what they tell it back. Values only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

PLACE_BYTES = 4


@dataclass
class LoadOrder:
    """Blocks to load for one request."""

    operation: int
    request_id: str
    lease: int
    indices: list[int]
    """Places among the keys of the lookup that took the lease."""
    blocks: list[int]
    """Where they go in vLLM's memory."""
    arena: bytes = b""
    """The arena from which the workers copy themselves; empty if the cache is to do the load."""
    places: bytes = b""
    """Where the blocks lie in that arena: a number of four bytes for each, shard after shard."""
    deadline: float = 0.0
    """Until when the blocks stay there, on the host's monotonic clock."""
    is_sync: bool = False
    """Whether vLLM computes the request in this very step: the load has to be ordered before the forward, and cannot
    fail."""

    def places_of(self, shard: int) -> bytes:
        """The part of `places` that one worker needs."""
        size = len(self.blocks) * PLACE_BYTES
        return self.places[shard * size : (shard + 1) * size]


@dataclass
class SaveOrder:
    """A run of blocks of one request to save, ancestors first."""

    operation: int
    request_id: str
    parent: bytes
    depth: int
    keys: bytes
    blocks: list[int]
    tenant: str | None = None
    """On whose behalf; only lookups on the same behalf find it."""


@dataclass
class PegaMetadata(KVConnectorMetadata):
    """One step's orders."""

    instance: str
    """Under which name the workers register; a new one starts a new epoch."""
    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    """Final once this step's forward has run."""
    cancelled: list[int] = field(default_factory=list)
    """Loads whose request is gone: they may end early."""
    preempted: list[str] = field(default_factory=list)
    """Requests whose blocks are free from now on: their saves must have ended before the step runs."""
    finished: list[str] = field(default_factory=list)
    """Finished requests whose blocks vLLM keeps until it is told that their saves have ended."""


@dataclass
class PegaWorkerMetadata(KVConnectorWorkerMetadata):
    """What ended in the workers; counted, because an operation has ended when it has in every worker."""

    saves: Counter[int] = field(default_factory=Counter)
    """Saves that ended, by operation."""
    dropped: set[int] = field(default_factory=set)
    """Saves of which a worker dropped something: what follows in their chains is not worth saving."""
    failed_loads: set[str] = field(default_factory=set)
    """Requests of which a load failed, wholly or in part."""
    arenas: Counter[bytes] = field(default_factory=Counter)
    """How many workers more, or fewer, than before can copy out of an arena themselves."""
    refused: str = ""
    """Why a worker does not cache at all; empty if it does."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> PegaWorkerMetadata:
        """Both together."""
        if not isinstance(other, PegaWorkerMetadata):
            raise TypeError(f"cannot aggregate {type(other).__name__} into PegaWorkerMetadata")
        arenas = Counter(self.arenas)
        arenas.update(other.arenas)  # a sum of counters would lose what is negative
        return PegaWorkerMetadata(
            self.saves + other.saves,
            self.dropped | other.dropped,
            self.failed_loads | other.failed_loads,
            arenas,
            self.refused or other.refused,
        )
