"""What the tests of the tier share: a model's files, vLLM's configuration of offloading, and a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("vllm.v1.kv_offload.tiering.factory", reason="no vLLM with tiering here", exc_type=ImportError)

from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering import base as tiering_base
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from pegaflow.connector.compat import VERSION
from pegaflow.vllm_tier import PegaTier

if VERSION < (0, 28):
    pytest.importorskip("pegaflow.vllm_tier.spec")  # vLLM's factory takes no `module_path`

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.kv_offload.tiering.base import TransferJob

CHUNK_BYTES, CHUNKS, TOKENS = 8192, 32, 16
WAIT_S = 20.0


def write_model(folder: Path, weight: int = 1, **config: Any) -> Path:
    """A folder that looks like a model."""
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes([weight]) * 64
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def spec_of(model: Path | str, *, groups: int = 1, events: bool = False, **extra: Any) -> TieringOffloadingSpec:
    """vLLM's own specification of tiering, for a model with chunks of `CHUNK_BYTES`."""
    # 0.26 knows neither the groups' own numbers, nor layouts, nor data parallel ranks.
    is_old = VERSION < (0, 28)
    layout: dict[str, Any] = {} if is_old else {"kv_cache_layout": "LBHNC"}
    parallel = (0, 1, 1, 1, 1, 1, 0, False) if is_old else (0, 1, 1, 1, 1, 1, 0, 1, None, False)
    return TieringOffloadingSpec(
        OffloadingConfig(
            groups=tuple(
                OffloadingGroupConfig(TOKENS, (f"layer.{number}",), *(() if is_old else (number,)))
                for number in range(groups)
            ),
            worker_kv_bytes_per_block=CHUNK_BYTES,
            enable_kv_cache_events=events,
            extra_config={"cpu_bytes_to_use": CHUNKS * CHUNK_BYTES, **extra},
            engine_id=f"test-{uuid.uuid4().hex}",
            model=OffloadingModelConfig(str(model), "bfloat16"),
            cache=OffloadingCacheConfig(TOKENS, 1),
            parallel=OffloadingParallelConfig(*parallel),
            **layout,
        )
    )


def chunk(number: int) -> bytes:
    """The bytes of a chunk: no two have the same."""
    return np.random.default_rng(number).integers(0, 256, CHUNK_BYTES, dtype=np.uint8).tobytes()


def key_of(number: int, group: int = 0) -> Any:
    """The key of a chunk, as vLLM makes it of a SHA-256."""
    return make_offload_key(number.to_bytes(32, "big"), group)


def context_of(request: str, keys: Sequence[Any] = ()) -> ReqContext:
    """A request whose chunks are these, from the first on."""
    context = ReqContext(request)
    for place, key in enumerate(keys if hasattr(context, "set_offload_key_position") else ()):
        context.set_offload_key_position(key, (place + 1) * TOKENS)
    return context


@dataclass
class Host:
    """vLLM's tier in host memory, and a `PegaTier` below it."""

    model: Path
    where: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    events: bool = False
    jobs: int = 0

    def __post_init__(self) -> None:
        self.rows = np.zeros((CHUNKS, CHUNK_BYTES), np.int8)
        self.view = memoryview(self.rows)
        spec = spec_of(self.model, groups=self.groups, events=self.events)
        self.tier = PegaTier(spec, self.view, "PegaTier", None, **self.where, **self.options)

    def job(self, keys: Sequence[Any], context: ReqContext, *, is_load: bool, first: int = 0) -> TransferJob:
        """A job over the rows from `first` on."""
        self.jobs += 1
        kind: type[TransferJob] = getattr(tiering_base, "TransferJob", None) or tiering_base.JobMetadata
        return kind(self.jobs, list(keys), np.arange(first, first + len(keys), dtype=np.int32), is_load, context)

    def fill(self, numbers: Sequence[int], first: int = 0) -> None:
        """Puts chunks into rows."""
        for row, number in enumerate(numbers, start=first):
            self.rows[row] = np.frombuffer(chunk(number), np.int8)

    def row(self, row: int) -> bytes:
        """The bytes of a row."""
        return self.rows[row].tobytes()

    def finished(self, count: int = 1) -> list[Any]:
        """The next jobs that end."""
        results: list[Any] = []
        deadline = time.monotonic() + WAIT_S
        while len(results) < count and time.monotonic() < deadline:
            results += self.tier.get_finished_jobs()
            time.sleep(0.001)
        assert len(results) == count, results
        return results

    def store(self, numbers: Sequence[int], request: str = "storing", first: int = 0, group: int = 0) -> Any:
        """Stores chunks out of rows; the job's result."""
        self.fill(numbers, first)
        keys = [key_of(number, group) for number in numbers]
        self.tier.submit_store(self.job(keys, context_of(request, keys), is_load=False, first=first))
        (result,) = self.finished()
        return result

    def load(self, numbers: Sequence[int], first: int = 0, group: int = 0) -> Any:
        """Loads chunks into rows; the job's result."""
        keys = [key_of(number, group) for number in numbers]
        self.tier.submit_load(self.job(keys, context_of("loading", keys), is_load=True, first=first))
        (result,) = self.finished()
        return result

    def look_up(self, numbers: Sequence[int], request: str = "asking", group: int = 0) -> list[LookupResult]:
        """What the tier says of chunks in the end, asked step after step as vLLM does."""
        keys = [key_of(number, group) for number in numbers]
        context = context_of(request, keys)
        deadline = time.monotonic() + WAIT_S
        while True:
            results = [self.tier.lookup(key, context) for key in keys]
            self.end_step()
            if LookupResult.RETRY not in results or time.monotonic() > deadline:
                return results
            time.sleep(0.001)

    def end_step(self) -> None:
        """The end of a step of vLLM's scheduler."""
        self.tier.on_schedule_end(ScheduleEndContext((), ()))

    def counts(self) -> dict[str, int | float]:
        """The tier's counters since the last call, without their common prefix."""
        stats = self.tier.get_stats()
        return {} if stats is None else {name.split("pegaflow_")[1]: n for name, n in stats.reduce().items()}


def server_binary() -> Path | None:
    """`pegaflow-server`, if the wheel is installed."""
    binary = Path(os.environ.get("PEGAFLOW_SERVER_BINARY") or Path(sys.executable).with_name("pegaflow-server"))
    return binary if binary.is_file() else None


class Server:
    """A `pegaflow-server` with a store."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.socket = socket
        self._command = [server_binary(), "--socket", socket, "--http", "off", "--dram", "64MiB"]
        self._command += ["--path", folder / "served", "--capacity", "256MiB"]
        self.start()

    def start(self) -> None:
        """Starts it; returns when it serves."""
        self._process = subprocess.Popen(
            [str(part) for part in self._command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline())["ready"]

    def stop(self) -> None:
        """Ends it in order."""
        self._process.terminate()
        self._process.wait(WAIT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()


class StuckCache:
    """A cache of which every call takes as long as a test likes; operations never end before."""

    def __init__(self) -> None:
        self.freed = threading.Event()
        self.saves: list[int] = []
        self.is_closed = False
        self.refuses = False

    def register_worker(self, **worker: Any) -> None:
        if self.refuses:
            raise ValueError("no")

    def lookup(self, *_: Any, **__: Any) -> Any:
        self.freed.wait(WAIT_S)
        return 0, 0, None, None, b"", 0, 0.0

    def save(self, operation: int, *_: Any, **__: Any) -> None:
        self.saves.append(operation)

    load = save

    def cancel(self, operation: int) -> None:
        pass

    def release(self, lease: int) -> None:
        pass

    def poll(self, wait: float = 0.0) -> list[Any]:
        if not self.freed.is_set():
            time.sleep(min(wait, 0.001))
            return []
        from conftest import Done

        ended, self.saves = [Done(operation, saved=1) for operation in self.saves], []
        return ended

    def close(self, timeout: float) -> None:
        self.is_closed = True
