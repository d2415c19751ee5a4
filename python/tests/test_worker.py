"""The worker's side: every operation is reported once, and never before its copies have ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch

from pegaflow.connector import worker as worker_module
from pegaflow.connector.compat import LayerMemory, Piece
from pegaflow.connector.identity import UnknownIdentityError
from pegaflow.connector.metadata import LoadOrder, PegaMetadata, PegaWorkerMetadata, SaveOrder
from pegaflow.connector.worker import FLIP_ENV, SKIP_ENV, PegaWorker, geometry_of
from pegaflow.errors import UnsupportedError

BLOCKS, PAGE = 8, 64
ARENA = b"arena of sixteen"


def layer_at(name: str, start: int, memory: int | None = None, **piece: int) -> LayerMemory:
    whole = Piece(**({"offset": 0, "stride": PAGE, "length": PAGE} | piece))
    return LayerMemory(name, start if memory is None else memory, start, (whole,), BLOCKS)


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
    layers = [layer_at(name, tensor.data_ptr()) for name, tensor in tensors.items()]
    monkeypatch.setattr(worker_module.compat, "layer_memory", lambda *_: layers)
    monkeypatch.setattr(worker_module.compat, "memory_problem", lambda _: None)
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
    assert registered["device"] is None


def test_layers_that_share_memory_count_once() -> None:
    assert geometry_of([layer_at("a", 4096), layer_at("b", 4096)], {}).block_bytes == PAGE


def test_pieces_that_touch_are_one() -> None:
    """Block-outermost memory: all layers of a block lie together."""
    layers = [layer_at(str(layer), 4096 + layer * PAGE, 4096, stride=3 * PAGE) for layer in range(3)]
    geometry = geometry_of(layers, {})
    assert geometry.ranges == [(4096, BLOCKS * 3 * PAGE)]
    assert geometry.fragments == [(0, 0, 3 * PAGE, 3 * PAGE)]
    assert geometry.block_bytes == 3 * PAGE


def test_keys_and_values_in_planes_are_two_pieces() -> None:
    planes = (Piece(0, PAGE, PAGE), Piece(BLOCKS * PAGE, PAGE, PAGE))
    geometry = geometry_of([LayerMemory("a", 4096, 8192, planes, BLOCKS)], {}, device=1)
    assert geometry.ranges == [(8192, 2 * BLOCKS * PAGE)]
    assert geometry.fragments == [(0, 0, PAGE, PAGE), (0, BLOCKS * PAGE, PAGE, PAGE)]
    assert (geometry.block_bytes, geometry.device) == (2 * PAGE, 1)


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

    monkeypatch.setattr(worker_module.compat, "layer_memory", lambda *_: [layer_at("a", 4096)])
    monkeypatch.setattr(worker_module.compat, "memory_problem", lambda _: None)
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


# --- GPUs -------------------------------------------------------------------------------------------------------------


def placed(operation: int, request: str, blocks: list[int], *, is_sync: bool) -> LoadOrder:
    numbers = [100 * shard + index for shard in range(2) for index in range(len(blocks))]
    places = b"".join(number.to_bytes(4, "little") for number in numbers)
    deadline = worker_module.time.monotonic() + 60
    return LoadOrder(operation, request, 77, [0, 1], blocks, ARENA, places, deadline, is_sync)


@pytest.fixture
def gpu_worker(worker: PegaWorker, cache: Any, monkeypatch: pytest.MonkeyPatch) -> PegaWorker:
    """A worker that takes its memory for that of GPU 3, and stream 4711 for vLLM's."""
    assert worker._geometry is not None
    worker._geometry.device = 3
    monkeypatch.setattr(worker_module.compat, "raw_stream", lambda device: 4711 if device == 3 else 0)
    return worker


def test_copies_are_ordered_after_what_the_stream_has(gpu_worker: PegaWorker, cache: Any) -> None:
    run_step(gpu_worker, loads=[load_of(cache, 1, "r", [4, 5])], saves=[save_of(2, "s", [2])])
    assert cache.named("stream") == [4711, 4711]
    assert len(cache.named("load")) == len(cache.named("save")) == 1


def test_a_cpu_has_no_stream(worker: PegaWorker, cache: Any) -> None:
    run_step(worker, loads=[load_of(cache, 1, "r", [4, 5])], saves=[save_of(2, "s", [2])])
    assert cache.named("stream") == [0, 0]


def test_a_synchronous_load_is_started_with_its_shard_s_places_and_never_told(
    gpu_worker: PegaWorker, cache: Any
) -> None:
    assert run_step(gpu_worker, loads=[placed(1, "r", [4, 5], is_sync=True)]) == (set(), set(), set())
    assert cache.named("load_placed") == [(1, 77, 1, ARENA, [100, 101], [4, 5], True)]
    assert cache.named("stream") == [4711]
    (remaining,) = cache.named("remaining")
    assert 50 < remaining <= 60
    cache.end(1)
    # vLLM does not wait for it, and takes such a report for a mistake.
    assert run_step(gpu_worker) == (set(), set(), set())
    assert gpu_worker.stats.data == {"loads:sync": 1, "loaded_blocks:dram": 2}
    assert gpu_worker._loads == {}


def test_an_asynchronous_load_out_of_the_arena_is_told(gpu_worker: PegaWorker, cache: Any) -> None:
    run_step(gpu_worker, loads=[placed(1, "r", [4, 5], is_sync=False)])
    assert cache.named("load_placed") == [(1, 77, 1, ARENA, [100, 101], [4, 5], False)]
    cache.end(1)
    assert run_step(gpu_worker) == (set(), {"r"}, set())


def test_a_synchronous_load_that_cannot_start_stops_the_worker(gpu_worker: PegaWorker, cache: Any) -> None:
    cache.refuses_placed = True
    with pytest.raises(RuntimeError, match=r"2 blocks for request r failed: no such arena.*\"sync_loads\": false"):
        run_step(gpu_worker, loads=[placed(1, "r", [4, 5], is_sync=True)])


def test_a_synchronous_load_that_fails_stops_the_worker(gpu_worker: PegaWorker, cache: Any) -> None:
    run_step(gpu_worker, loads=[placed(1, "r", [4, 5], is_sync=True)])
    cache.end(1, failed=[5])
    with pytest.raises(RuntimeError, match="1 of 2 blocks were not copied"):
        run_step(gpu_worker)


def test_an_asynchronous_load_that_the_device_cannot_do_goes_through_the_cache(
    gpu_worker: PegaWorker, cache: Any
) -> None:
    cache.refuses_placed = True
    cache.leases.add(77)
    assert run_step(gpu_worker, loads=[placed(1, "r", [4, 5], is_sync=False)]) == (set(), set(), set())
    assert cache.named("load") == [(1, 1, [0, 1], [4, 5])]


def test_a_fence_waits_for_a_synchronous_load_and_leaves_it_whole(
    gpu_worker: PegaWorker, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward that uses it may be under way, and its token counts."""
    run_step(
        gpu_worker,
        loads=[
            placed(1, "r", [4], is_sync=True),
            placed(2, "r", [5], is_sync=False),
            placed(3, "s", [6], is_sync=True),
        ],
    )
    polls = []

    def poll(wait: float = 0.0) -> list[Any]:
        polls.append(wait)
        if len(polls) == 4:
            cache.end(1)
        ended, cache.ended = cache.ended, []
        return ended

    monkeypatch.setattr(cache, "poll", poll)
    gpu_worker.fence(["r"])
    assert cache.named("cancel") == [2]
    assert len(polls) == 4
    assert set(gpu_worker._loads) == {3}


def test_the_arena_is_told_when_it_changes(gpu_worker: PegaWorker, cache: Any) -> None:
    told = []
    for arena in (None, ARENA, ARENA, None, b"x" * 16):
        cache.worker_arena = arena
        run_step(gpu_worker)
        meta = gpu_worker.worker_meta()
        told.append(dict(meta.arenas) if meta is not None else None)
    assert told == [None, {ARENA: 1}, None, {ARENA: -1}, {b"x" * 16: 1}]
    both = PegaWorkerMetadata().aggregate(PegaWorkerMetadata())
    both.arenas.update({ARENA: -1})
    assert both.aggregate(PegaWorkerMetadata()).arenas == {ARENA: -1}


def test_an_arena_that_will_never_be_reached_is_no_arena(
    gpu_worker: PegaWorker, cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never() -> bytes:
        raise UnsupportedError("no memory can be registered")

    monkeypatch.setattr(cache, "arena", never)
    for _ in range(3):
        run_step(gpu_worker)
    assert gpu_worker.worker_meta() is None
    assert [record.message for record in caplog.records].count(
        "PegaFlow: worker 1 does not copy from DRAM directly: no memory can be registered"
    ) <= 1


def test_memory_that_vllm_may_take_away_is_not_cached(cache: Any, tensors: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(worker_module.compat, "layer_memory", lambda *_: [layer_at("a", 4096)])
    worker = PegaWorker(cache, shard=0, shards=1)
    worker.register(
        SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True)), SimpleNamespace(), tensors, "engine/0"
    )
    run_step(worker)
    meta = worker.worker_meta()
    assert meta is not None
    assert "enable_sleep_mode" in meta.refused
    assert cache.calls == []


def test_the_skip_for_tests_loads_nothing_and_says_it_did(gpu_worker: PegaWorker, cache: Any) -> None:
    gpu_worker._skips = True
    orders = [placed(1, "r", [4, 5], is_sync=True), placed(2, "s", [6], is_sync=False)]
    assert run_step(gpu_worker, loads=orders) == (set(), {"s"}, set())
    assert cache.named("load") == cache.named("load_placed") == []
    assert SKIP_ENV == "PEGAFLOW_TEST_SKIP_LOAD"


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
