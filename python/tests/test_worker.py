"""The worker's side: every operation is reported once, and never before its copies have ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch

from pegaflow.connector import worker as worker_module
from pegaflow.connector.compat import LayerMemory
from pegaflow.connector.identity import UnknownIdentityError
from pegaflow.connector.metadata import LoadOrder, PegaMetadata, PegaWorkerMetadata, SaveOrder
from pegaflow.connector.worker import FLIP_ENV, PegaWorker, geometry_of

BLOCKS, PAGE = 8, 64


def save_of(operation: int, request: str, blocks: list[int]) -> SaveOrder:
    keys = b"".join(bytes([operation, block]) * 16 for block in blocks)
    return SaveOrder(operation, request, bytes(32), 0, keys, blocks)


def load_of(cache: Any, operation: int, request: str, blocks: list[int]) -> LoadOrder:
    cache.leases.add(operation)
    return LoadOrder(operation, request, operation, list(range(len(blocks))), blocks)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"layer.{index}": torch.zeros(BLOCKS, PAGE, dtype=torch.uint8) for index in range(2)}


@pytest.fixture
def worker(cache: Any, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> PegaWorker:
    layers = [LayerMemory(name, tensor.data_ptr(), PAGE, PAGE, BLOCKS) for name, tensor in tensors.items()]
    monkeypatch.setattr(worker_module.compat, "layer_memory", lambda *_: layers)
    monkeypatch.setattr(worker_module, "namespace_of", lambda *_: {"weights": "digest"})
    worker = PegaWorker(cache, shard=1, shards=2)
    worker.register(SimpleNamespace(), SimpleNamespace(), tensors, "engine/0")
    return worker


def run_step(worker: PegaWorker, **orders: Any) -> tuple[set[str], set[str], set[str]]:
    """One step, in the order in which vLLM 0.29 and later call the hooks."""
    meta = PegaMetadata(**({"instance": "engine/0"} | orders))
    worker.fence(meta.preempted)
    worker.bind(meta)
    worker.start_loads(meta.loads)
    worker.start_saves()
    return worker.finished()


def test_the_whole_memory_is_registered_once(worker: PegaWorker, cache: Any, tensors: Any) -> None:
    run_step(worker)
    (registered,) = cache.named("register")
    assert registered["ranges"] == [(tensor.data_ptr(), BLOCKS * PAGE) for tensor in tensors.values()]
    assert registered["fragments"] == [(0, 0, PAGE, PAGE), (1, 0, PAGE, PAGE)]
    assert (registered["block_bytes"], registered["blocks"]) == (2 * PAGE, BLOCKS)
    assert (registered["shard"], registered["shards"]) == (1, 2)
    assert registered["owner"] is tensors


def test_layers_that_share_memory_count_once() -> None:
    layers = [LayerMemory("a", 4096, PAGE, PAGE, BLOCKS), LayerMemory("b", 4096, PAGE, PAGE, BLOCKS)]
    assert geometry_of(layers, None).block_bytes == PAGE


def test_saves_start_after_the_forward_and_are_told_when_all_have_ended(worker: PegaWorker, cache: Any) -> None:
    worker.bind(PegaMetadata("engine/0", saves=[save_of(1, "r", [2]), save_of(2, "r", [3])]))
    assert cache.named("save") == []
    worker.start_saves()
    worker.start_saves()
    assert [operation for operation, *_ in cache.named("save")] == [1, 2]
    assert run_step(worker, finished=["r"]) == (set(), set(), set())
    cache.end(1)
    assert run_step(worker) == (set(), set(), set())
    cache.end(2)
    assert run_step(worker) == ({"r"}, set(), set())
    assert run_step(worker) == (set(), set(), set())
    meta = worker.worker_meta()
    assert meta is not None
    assert meta.saves == {1: 1, 2: 1}
    assert worker.worker_meta() is None


def test_a_request_whose_saves_ended_before_is_told_at_once(worker: PegaWorker, cache: Any) -> None:
    run_step(worker, saves=[save_of(1, "r", [2])])
    cache.end(1)
    assert run_step(worker, finished=["r"]) == ({"r"}, set(), set())


def test_a_save_in_the_step_in_which_its_request_is_finished(worker: PegaWorker, cache: Any) -> None:
    assert run_step(worker, saves=[save_of(1, "r", [2])], finished=["r"]) == (set(), set(), set())
    cache.end(1)
    assert run_step(worker) == ({"r"}, set(), set())


def test_a_save_that_is_refused_frees_its_request(worker: PegaWorker, cache: Any) -> None:
    cache.is_there = False
    assert run_step(worker, saves=[save_of(1, "r", [2, 3])], finished=["r"]) == ({"r"}, set(), set())
    meta = worker.worker_meta()
    assert meta is not None
    assert meta.dropped == {1}
    assert worker.stats.data["saved_blocks:dropped"] == 2


def test_a_load_is_told_when_it_has_ended(worker: PegaWorker, cache: Any) -> None:
    assert run_step(worker, loads=[load_of(cache, 1, "r", [4, 5])]) == (set(), set(), set())
    assert cache.named("load") == [(1, 1, [0, 1], [4, 5])]
    cache.end(1)
    assert run_step(worker) == (set(), {"r"}, set())
    assert worker.failed_blocks() == set()
    assert worker.worker_meta() is None


def test_a_failed_load_is_told_as_request_and_as_blocks(worker: PegaWorker, cache: Any) -> None:
    run_step(worker, loads=[load_of(cache, 1, "r", [4, 5, 6])])
    cache.end(1, failed=[5])
    assert run_step(worker) == (set(), {"r"}, {"r"})
    assert worker.failed_blocks() == {5}
    assert worker.failed_blocks() == set()
    meta = worker.worker_meta()
    assert meta is not None
    assert meta.failed_loads == {"r"}


def test_a_load_that_cannot_start_has_failed(worker: PegaWorker, cache: Any) -> None:
    order = load_of(cache, 1, "r", [4, 5])
    cache.leases.clear()
    assert run_step(worker, loads=[order]) == (set(), {"r"}, {"r"})
    assert worker.failed_blocks() == {4, 5}


def test_an_aborted_load_is_told_only_after_its_copies_have_ended(worker: PegaWorker, cache: Any) -> None:
    run_step(worker, loads=[load_of(cache, 1, "r", [4, 5])])
    cache.ends_when_cancelled = False
    for _ in range(3):
        assert run_step(worker, cancelled=[1]) == (set(), set(), set())
    cache.end(1)
    # Nobody may rely on part of it.
    assert run_step(worker) == (set(), {"r"}, {"r"})


def test_a_fence_waits_until_copies_have_ended(worker: PegaWorker, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_step(worker, saves=[save_of(1, "r", [2]), save_of(2, "other", [3])])
    cache.ends_when_cancelled = False
    polls = []

    def poll(wait: float = 0.0) -> list[Any]:
        polls.append(wait)
        if len(polls) == 4:
            cache.end(1)
        ended, cache.ended = cache.ended, []
        return ended

    monkeypatch.setattr(cache, "poll", poll)
    worker.fence(["r"])
    assert cache.named("cancel") == [1]
    assert len(polls) == 4


def test_a_cache_that_does_not_end_its_copies_stops_the_worker(
    worker: PegaWorker, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step(worker, saves=[save_of(1, "r", [2])])
    cache.ends_when_cancelled = False
    monkeypatch.setattr(worker_module, "_FENCE_LIMIT_S", 0.0)
    with pytest.raises(RuntimeError, match="1 copies of preempted requests have not ended"):
        worker.fence(["r"])


def test_a_fence_takes_back_saves_that_were_not_started(worker: PegaWorker, cache: Any) -> None:
    worker.bind(PegaMetadata("engine/0", saves=[save_of(1, "r", [2])]))
    worker.fence(["r"])
    worker.start_saves()
    assert cache.named("save") == []


def test_a_worker_registers_when_the_server_comes(cache: Any, worker: PegaWorker, monkeypatch: Any) -> None:
    cache.is_there = False
    now = [100.0]
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: now[0])
    assert run_step(worker, instance="engine/0#1", saves=[save_of(1, "r", [2])])[0] == set()
    assert worker.worker_meta().dropped == {1}  # type: ignore[union-attr]
    cache.is_there = True
    run_step(worker, instance="engine/0#1")
    assert len(cache.named("register")) == 1
    now[0] += 2
    run_step(worker, instance="engine/0#1", saves=[save_of(2, "r", [2])])
    assert cache.named("register")[1]["descriptor"] == {"weights": "digest", "epoch": "1"}
    assert [operation for operation, *_ in cache.named("save")] == [2]


def test_weights_without_identity_are_not_cached(cache: Any, tensors: Any, monkeypatch: Any) -> None:
    def unknown(*_: Any) -> dict[str, str]:
        raise UnknownIdentityError("drawn at random")

    layers = [LayerMemory("a", 4096, PAGE, PAGE, BLOCKS)]
    monkeypatch.setattr(worker_module.compat, "layer_memory", lambda *_: layers)
    monkeypatch.setattr(worker_module, "namespace_of", unknown)
    worker = PegaWorker(cache, shard=0, shards=1)
    worker.register(SimpleNamespace(), SimpleNamespace(), tensors, "engine/0")
    assert run_step(worker, saves=[save_of(1, "r", [2])], finished=["r"]) == ({"r"}, set(), set())
    meta = worker.worker_meta()
    assert meta is not None
    assert meta.refused == "drawn at random"
    assert cache.calls == []


def test_the_flip_for_tests_spoils_what_was_loaded(worker: PegaWorker, cache: Any, tensors: Any) -> None:
    worker._flips = True
    run_step(worker, loads=[load_of(cache, 1, "r", [4, 5])])
    cache.end(1, failed=[5])
    run_step(worker)
    for tensor in tensors.values():
        assert (tensor[4] == 0x80).all()
        assert not tensor[[0, 1, 2, 3, 5, 6, 7]].any()
    assert FLIP_ENV == "PEGAFLOW_TEST_FLIP_LOADED"


def test_reports_of_workers_are_added_up() -> None:
    one = PegaWorkerMetadata(failed_loads={"r"}, refused="")
    one.saves.update([1, 2])
    two = PegaWorkerMetadata(dropped={2}, refused="why")
    two.saves.update([2])
    both = one.aggregate(two)
    assert (both.saves, both.dropped, both.failed_loads, both.refused) == ({1: 1, 2: 2}, {2}, {"r"}, "why")


def test_closing_cancels_and_ends_the_session(worker: PegaWorker, cache: Any) -> None:
    run_step(worker, saves=[save_of(1, "r", [2])])
    worker.close(1.0)
    assert cache.named("cancel") == [1]
    assert cache.named("close") == [1.0]
