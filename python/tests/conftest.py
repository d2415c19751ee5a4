"""Fixtures: a directory for stores, and stand-ins for vLLM's requests and for the cache."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pegaflow.errors import ClosedError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

KEY = 32


@pytest.fixture
def store_path() -> Iterator[Path]:
    """A directory for a store: beside the build output, because O_DIRECT wants a real file system."""
    base = Path(os.environ.get("CARGO_TARGET_DIR") or Path(__file__).parents[2] / "target") / "tmp"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix="python-") as folder:
        yield Path(folder) / "store"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """See `Clock`."""
    return Clock()


@dataclass
class Done:
    """A completion, as the native module gives it."""

    operation: int
    is_load: bool = False
    loaded_dram: int = 0
    loaded_nvme: int = 0
    failed: list[int] = field(default_factory=list)
    saved: int = 0
    present: int = 0
    dropped: int = 0


@dataclass
class FakeCache:
    """A cache in a dictionary. Operations end when a test says so."""

    stored: set[bytes] = field(default_factory=set)
    is_there: bool = True
    calls: list[tuple[str, Any]] = field(default_factory=list)
    leases: set[int] = field(default_factory=set)
    ended: list[Done] = field(default_factory=list)
    saves: dict[int, bytes] = field(default_factory=dict)
    loads: dict[int, list[int]] = field(default_factory=dict)
    ends_when_cancelled: bool = True
    worker_arena: bytes | None = None
    """The arena that the worker's device reaches."""
    dram_arena: bytes | None = None
    """The arena whose places lookups tell."""
    shards: int = 1
    refuses_placed: bool = False
    questions: list[Any] = field(default_factory=list)
    recommends_computing: bool = False
    prefetches: list[tuple[int, bool]] = field(default_factory=list)
    """Of each lookup: the tag, and whether what is found was to be fetched."""
    tenants: list[tuple[str, str | None]] = field(default_factory=list)
    """On whose behalf lookups and saves came."""
    fetch_s: float | None = None
    """What is found is on the drive, and takes so long to fetch."""
    on_drive: set[bytes] = field(default_factory=set)
    """Of what is stored, what is not in DRAM."""
    tags: dict[int, int] = field(default_factory=dict)

    def _reached(self) -> None:
        if not self.is_there:
            raise ClosedError("no server")

    def is_connected(self) -> bool:
        return self.is_there

    def register_worker(self, **worker: Any) -> None:
        self._reached()
        self.calls.append(("register", worker))

    def arena(self) -> bytes | None:
        return self.worker_arena

    def lookup(
        self,
        instance: str,
        group: int,
        keys: bytes,
        lease: float,
        tag: int,
        *,
        places: bool = False,
        question: Any = None,
        prefetch: bool = False,
        tenant: str | None = None,
    ) -> tuple[int, int, int | None, bytes | None, bytes, int, float]:
        self._reached()
        self.prefetches.append((tag, prefetch))
        self.tenants.append(("lookup", tenant))
        if question is not None:
            self.questions.append(question)
        self.calls.append(("lookup", (instance, len(keys) // KEY, lease, tag)))
        hit = 0
        while (hit + 1) * KEY <= len(keys) and keys[hit * KEY : (hit + 1) * KEY] in self.stored:
            hit += 1
        if not hit or not lease:
            return hit, hit, None, None, b"", 0, 0.0
        decision = len(self.questions) if question is not None and hit > question[1] else 0
        if decision and self.recommends_computing:
            return hit, hit, None, None, b"", decision, 0.0
        number = 1000 + len(self.calls)
        self.leases -= {self.tags.get(tag, 0)}
        self.tags[tag] = number
        self.leases.add(number)
        if self.fetch_s is not None:
            return hit, 0, number, None, b"", decision, self.fetch_s if prefetch else 0.0
        if not places or self.dram_arena is None:
            return hit, hit, number, None, b"", decision, 0.0
        # Shard 1's third block lies at 102.
        told = [100 * shard + block for shard in range(self.shards) for block in range(hit)]
        return hit, hit, number, self.dram_arena, b"".join(place.to_bytes(4, "little") for place in told), decision, 0.0

    def locate(self, instance: str, group: int, keys: bytes, *, tenant: str | None = None) -> bytes:
        self._reached()
        self.calls.append(("locate", (instance, len(keys) // KEY, tenant)))
        split = [keys[at : at + KEY] for at in range(0, len(keys), KEY)]
        return bytes((2 if key in self.on_drive else 1) if key in self.stored else 0 for key in split)

    def release(self, lease: int) -> None:
        self.leases.remove(lease)

    def load(
        self, operation: int, lease: int, shard: int, indices: Sequence[int], blocks: Sequence[int], stream: int = 0
    ) -> None:
        self._reached()
        if lease not in self.leases:
            raise NotFoundError("no such lease")
        self.leases.remove(lease)
        self.calls.append(("load", (operation, shard, list(indices), list(blocks))))
        self.calls.append(("stream", stream))
        self.loads[operation] = list(blocks)

    def load_placed(
        self,
        operation: int,
        lease: int,
        shard: int,
        arena: bytes,
        places: bytes,
        blocks: Sequence[int],
        *,
        remaining: float,
        stream: int,
        before: bool,
    ) -> None:
        if self.refuses_placed:
            raise NotFoundError("no such arena")
        told = [int.from_bytes(places[at : at + 4], "little") for at in range(0, len(places), 4)]
        self.calls.append(("load_placed", (operation, lease, shard, arena, told, list(blocks), before)))
        self.calls.append(("remaining", remaining))
        self.calls.append(("stream", stream))
        self.loads[operation] = list(blocks)

    def save(
        self,
        operation: int,
        instance: str,
        group: int,
        shard: int,
        *,
        parent: bytes,
        depth: int,
        keys: bytes,
        blocks: Sequence[int],
        stream: int = 0,
        tenant: str | None = None,
    ) -> None:
        self._reached()
        self.tenants.append(("save", tenant))
        self.calls.append(("save", (operation, instance, depth, list(blocks))))
        self.calls.append(("stream", stream))
        self.saves[operation] = keys

    def cancel(self, operation: int) -> None:
        self.calls.append(("cancel", operation))
        if self.ends_when_cancelled:
            self.end(operation, failed=self.loads.get(operation, []))

    def end(self, operation: int, *, failed: Sequence[int] = ()) -> None:
        """The operation ends; a save makes its blocks visible."""
        if operation in self.loads:
            blocks = self.loads.pop(operation)
            self.ended.append(Done(operation, True, loaded_dram=len(blocks) - len(failed), failed=list(failed)))
        elif operation in self.saves:
            keys = self.saves.pop(operation)
            self.stored |= {keys[at : at + KEY] for at in range(0, len(keys), KEY)}
            self.ended.append(Done(operation, saved=len(keys) // KEY))

    def poll(self, wait: float = 0.0) -> list[Done]:
        ended, self.ended = self.ended, []
        return ended

    def close(self, timeout: float) -> None:
        self.calls.append(("close", timeout))

    def named(self, name: str) -> list[Any]:
        """What was called by that name."""
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def cache() -> FakeCache:
    """An empty cache."""
    return FakeCache()


class FakeRequest(SimpleNamespace):
    """What the connector uses of vLLM's `Request`."""

    def __init__(self, request_id: str, prompt: Sequence[int], **others: Any) -> None:
        fields: dict[str, Any] = {
            "request_id": request_id,
            "all_token_ids": list(prompt),
            "num_prompt_tokens": len(prompt),
            "num_computed_tokens": 0,
            "num_preemptions": 0,
            "resumable": False,
            "skip_reading_prefix_cache": False,
            "lora_request": None,
            "mm_features": [],
            "cache_salt": None,
            "prompt_embeds": None,
            "kv_transfer_params": None,
            "_prompt_embeds_per_block_hashes": {},
            "block_hashes": [],
        }
        super().__init__(**(fields | others))

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - int(self.num_prompt_tokens)


@pytest.fixture
def make_request() -> type[FakeRequest]:
    """Makes requests: `make_request(id, prompt, **fields)`."""
    return FakeRequest


def _step(
    new: Mapping[str, tuple[list[int], int, int]] | None = None,
    cached: Mapping[str, tuple[list[int], int, int]] | None = None,
    preempted: set[str] | None = None,
    resumed: set[str] = frozenset(),  # type: ignore[assignment]
    finished: set[str] = frozenset(),  # type: ignore[assignment]
) -> SimpleNamespace:
    new, cached = new or {}, cached or {}
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=id_, block_ids=(blocks,), num_computed_tokens=computed)
            for id_, (blocks, computed, _) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached),
            resumed_req_ids=resumed,
            new_block_ids=[(blocks,) if blocks else None for blocks, _, _ in cached.values()],
            num_computed_tokens=[computed for _, computed, _ in cached.values()],
        ),
        num_scheduled_tokens={id_: count for id_, (_, _, count) in [*new.items(), *cached.items()]},
        total_num_scheduled_tokens=sum(count for _, _, count in [*new.values(), *cached.values()]),
        preempted_req_ids=preempted,
        finished_req_ids=finished,
    )


@pytest.fixture
def step() -> Any:
    """Makes a scheduler's output: `new` and `cached` map ids to (block ids, computed tokens, scheduled tokens)."""
    return _step


@pytest.fixture
def blocks() -> Any:
    """Makes vLLM's `KVCacheBlocks` from block ids."""
    return lambda ids: SimpleNamespace(get_block_ids=lambda: (list(ids),))
