"""PegaFlow as an L2 adapter of LMCache 0.5 (its `plugin` type): objects of its L1 cache in a store that is bounded in
bytes, checked when it is read, and durable.

`{"type": "plugin", "module_path": "pegaflow.lmcache_l2", "class_name": "PegaL2Adapter", "adapter_params": {"path":
"/mnt/nvme/lmcache", "nvme": "512GiB", "dram": "8GiB"}}`. The engine runs in LMCache's server; one engine to a store.

Submitting never waits: stores and loads are cut into pieces for a few threads, each one native call, and what finds
their queue full has failed, and is counted. A lookup asks an index in memory, so it is answered at once. LMCache locks
objects between a lookup and their load; here they stay by being used, and a load of what is gone all the same fails,
which LMCache expects. Its keys say nothing of weights and types: `namespace` is for that.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from pegaflow import door_settings
from pegaflow.engine import PegaEngine
from pegaflow.errors import PegaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger("pegaflow.lmcache")

_PIECE_KEYS = 16
_LOOKUP_KEYS_AT_ONCE = 4_096
"""A lookup of more goes to a thread: this many take LMCache's thread some milliseconds."""
_CLOSE_S = 60.0


@dataclass(frozen=True)
class AdapterSettings:
    """The settings: what stands in `adapter_params`."""

    path: str = ""
    """The store's directory, on ext4 or XFS; made if missing."""
    nvme: str | int = "16GiB"
    """Size of the store on the drive, taken at once."""
    dram: str | int = "1GiB"
    """Memory for objects, beside LMCache's L1. At least 16 MiB."""
    namespace: str = ""
    """Keeps what it names apart: set it to another text when weights, types or layout change under the same model
    name."""
    threads: int = 4
    """Pieces of work that are stored or loaded at a time. 1 to 64."""
    queue_pieces: int = 4_096
    """Pieces of work that may wait, of 16 objects each. 1 to 65,536."""

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> AdapterSettings:
        """Reads and checks `adapter_params`; one error names everything that is wrong with them."""
        known = (field.name for field in fields(cls))
        numbers = {"threads": 64, "queue_pieces": 65_536}
        door_settings.check("PegaL2Adapter", "adapter_params", params, known, numbers)
        return cls(**params)


@dataclass
class Task:
    """A batch of LMCache: done when all its pieces are."""

    number: int
    kind: str
    keys: Sequence[ObjectKey]
    objects: Sequence[MemoryObj]
    pending: int
    done: set[int] = field(default_factory=set)
    """Places of the keys with which all went well."""
    stored: list[int] = field(default_factory=list)
    """Places of those that were not there before."""

    def bitmap(self) -> Bitmap:
        """The same as LMCache has it."""
        bits = Bitmap(len(self.keys))
        for place in self.done:
            bits.set(place)
        return bits


class PegaL2Adapter(L2AdapterInterface):
    """Stores, finds and loads LMCache's objects in a `PegaEngine`."""

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: L1MemoryDesc | None = None) -> None:  # noqa: ARG002
        self._settings = settings = AdapterSettings.from_params(params)
        # 0: LMCache does not evict. The store bounds itself, and knows what is used.
        super().__init__(max_capacity_bytes=0)
        self._engine = PegaEngine(Path(settings.path).expanduser(), dram=settings.dram, nvme=settings.nvme)
        self._events = {kind: create_event_notifier() for kind in ("store", "lookup", "load")}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        """Guards the tasks and what came of them."""
        self._results: dict[str, dict[int, Any]] = {kind: {} for kind in self._events}
        self._counts: Counter[str] = Counter()
        self._is_closed = False
        self._queue: queue.Queue[tuple[Task, range] | None] = queue.Queue(settings.queue_pieces)
        self._threads = [
            threading.Thread(target=self._work, name=f"pegaflow-l2-{number}", daemon=True)
            for number in range(settings.threads)
        ]
        for thread in self._threads:
            thread.start()

    # --- LMCache's side: never waits ----------------------------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        """Signalled when stores have ended."""
        return int(self._events["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Signalled when lookups have ended."""
        return int(self._events["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        """Signalled when loads have ended."""
        return int(self._events["load"].fileno())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Stores objects; those that are there already are left as they are."""
        return self._submit("store", keys, objects, _PIECE_KEYS)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """The stores that ended since the last call."""
        with self._lock:
            ended, self._results["store"] = self._results["store"], {}
        return ended

    def submit_lookup_and_lock_task(
        self,
        keys: list[ObjectKey],
        group_layout_descs: dict[int, MemoryLayoutDesc],  # noqa: ARG002
    ) -> int:
        """Finds out which objects are there."""
        if len(keys) <= _LOOKUP_KEYS_AT_ONCE and not self._is_closed:
            task = Task(next(self._numbers), "lookup", keys, [], pending=1)
            self._do(task, range(len(keys)))
            return task.number
        return self._submit("lookup", keys, [], _LOOKUP_KEYS_AT_ONCE)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """What a lookup found, once; `None` before."""
        return self._result("lookup", task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Objects are not locked."""

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Loads objects into memory that LMCache gives."""
        return self._submit("load", keys, objects, _PIECE_KEYS)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which objects of a load arrived, once; `None` before."""
        return self._result("load", task_id)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Removes objects."""
        gone = [key for key in keys if self._removed(key)]
        if gone:
            self._notify_keys_deleted(gone, [0] * len(gone))

    def get_usage(self) -> AdapterUsage:
        """What the store holds. It bounds itself, so it has no capacity that LMCache would have to keep."""
        stats = self._engine.stats()
        used = int(stats["nvme_used_bytes"] or stats["dram_used_bytes"])
        return AdapterUsage(total_bytes_used=used, total_capacity_bytes=0)

    def report_status(self) -> dict[str, Any]:
        """Health, counters of what failed, and the engine's statistics."""
        with self._lock:
            counts = dict(self._counts)
        return {
            "is_healthy": not self._is_closed,
            "type": type(self).__name__,
            "waiting_pieces": self._queue.qsize(),
            "failed": counts,
            "engine": {} if self._is_closed else self._engine.stats(),
        }

    def close(self) -> None:
        """Ends within a minute: what has not begun fails, what runs is waited for. A second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        deadline = time.monotonic() + _CLOSE_S
        self._refuse_waiting()
        for _ in self._threads:
            self._queue.put(None, timeout=_CLOSE_S)  # there is room: nothing comes any more
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.error("PegaFlow: objects are still being copied after %.0f s; the store is left open", _CLOSE_S)
            return
        self._engine.close(max(1.0, deadline - time.monotonic()))
        for event in self._events.values():
            event.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _submit(self, kind: str, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj], piece_keys: int) -> int:
        pieces = [range(first, min(first + piece_keys, len(keys))) for first in range(0, len(keys), piece_keys)]
        task = Task(next(self._numbers), kind, keys, objects, pending=len(pieces))
        if not pieces:
            self._ended(task)
        for piece in pieces:
            try:
                if self._is_closed:
                    raise queue.Full
                self._queue.put_nowait((task, piece))
            except queue.Full:
                self._failed(kind, "queue", len(piece))
                self._piece_done(task)
        return task.number

    def _result(self, kind: str, task_id: int) -> Any:
        with self._lock:
            return self._results[kind].pop(task_id, None)

    def _work(self) -> None:
        """A thread: works off pieces until there is a `None`."""
        while (item := self._queue.get()) is not None:
            self._do(*item)

    def _do(self, task: Task, piece: range) -> None:
        """One piece, whatever comes of it."""
        try:
            names = [self._name(task.keys[place]) for place in piece]
            outcomes = self._call(task, piece, names)
        except PegaError as error:
            outcomes = [error.kind] * len(piece)
        except Exception:
            outcomes = ["unexpected"] * len(piece)
            logger.exception("PegaFlow: %s of %d objects failed", task.kind, len(piece))
        for place, outcome in zip(piece, outcomes, strict=True):
            if isinstance(outcome, str):
                self._failed(task.kind, outcome, 1)
            elif outcome or task.kind == "store":
                task.done.add(place)
                if task.kind == "store" and outcome:
                    task.stored.append(place)
        self._piece_done(task)

    def _call(self, task: Task, piece: range, names: list[bytes]) -> Sequence[bool | str]:
        """The native call of a piece: of each object whether it was stored, found or loaded, or why that failed."""
        if task.kind == "lookup":
            return self._engine.contains_each(names)
        buffers = [task.objects[place].byte_array for place in piece]
        if task.kind == "store":
            return self._engine.put_new(names, buffers)
        outcomes = self._engine.get_into(names, buffers)
        for name, outcome in zip(names, outcomes, strict=True):
            if outcome == "size":
                logger.warning("PegaFlow: an object is not as long as the memory for it; removed")
                self._engine.remove(name)
        return outcomes

    def _removed(self, key: ObjectKey) -> bool:
        try:
            return self._engine.remove(self._name(key))
        except PegaError as error:
            self._failed("delete", error.kind, 1)
            return False

    def _name(self, key: ObjectKey) -> bytes:
        """An object's name in the store. No part but the last can hold a zero byte."""
        parts = (self._settings.namespace, key.model_name, key.cache_salt, f"{key.kv_rank}", f"{key.object_group_id}")
        return b"\0".join([b"lmcache", *(part.encode() for part in parts), key.chunk_hash])

    def _failed(self, kind: str, why: str, count: int) -> None:
        with self._lock:
            self._counts[f"{kind}:{why}"] += count

    def _refuse_waiting(self) -> None:
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                self._failed(item[0].kind, "closed", len(item[1]))
                self._piece_done(item[0])

    def _piece_done(self, task: Task) -> None:
        with self._lock:
            task.pending -= 1
            if task.pending:
                return
        self._ended(task)

    def _ended(self, task: Task) -> None:
        """All pieces are done: tells LMCache's listeners, then whoever waits."""
        places = sorted(task.stored if task.kind == "store" else task.done)
        keys = [task.keys[place] for place in places]
        sizes = [task.objects[place].get_size() for place in places] if task.kind == "store" else []
        if task.kind == "store" and keys:
            self._notify_keys_stored(keys, sizes)
        elif task.kind == "load" and keys:
            self._notify_keys_accessed(keys)
        is_success = len(task.done) == len(task.keys)
        result = L2StoreResult(is_success, sum(sizes)) if task.kind == "store" else task.bitmap()
        with self._lock:
            self._results[task.kind][task.number] = result
        self._events[task.kind].notify()
