"""The L2 adapter keeps LMCache's contract: batches end once, with what became of each object, and nothing waits."""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("lmcache.v1.distributed.l2_adapters.base", reason="no LMCache here", exc_type=ImportError)

import torch
from lmcache.cli.commands.bench.l2_adapter_bench.data import make_memory_objects, make_object_keys
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import get_type_name_for_config
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig

from pegaflow.errors import InvalidInputError
from pegaflow.lmcache_l2 import PegaL2Adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE, COUNT = 64 << 10, 16
WAIT_S = 20.0


@pytest.fixture
def make(store_path: Path) -> Iterator[Callable[..., PegaL2Adapter]]:
    """Makes adapters over one store, as LMCache does from its configuration."""
    made: list[PegaL2Adapter] = []

    def adapter(**params: Any) -> PegaL2Adapter:
        entry = {
            "module_path": "pegaflow.lmcache_l2",
            "class_name": "PegaL2Adapter",
            "adapter_params": {"path": str(store_path), "dram": "32MiB", "nvme": "128MiB", **params},
        }
        config = PluginL2AdapterConfig.from_dict(entry)
        assert get_type_name_for_config(config) == "plugin"
        one = create_l2_adapter(config)
        assert isinstance(one, PegaL2Adapter)
        made.append(one)
        return one

    yield adapter
    for one in made:
        one.close()


def objects(count: int = COUNT, fill: int = 0) -> list[Any]:
    """Memory of LMCache's, each object filled with a number of its own."""
    return make_memory_objects(torch.empty(count * SIZE, dtype=torch.uint8), count, SIZE, 0, fill_offset=fill)


def wait(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(WAIT_S * 1e3), "no event"


def ended(query: Callable[[int], Any], task: int) -> Any:
    """The result of a task, as soon as there is one; afterwards there is none."""
    deadline = time.monotonic() + WAIT_S
    while (result := query(task)) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert query(task) is None
    return result


def store(adapter: PegaL2Adapter, keys: list[ObjectKey], what: list[Any]) -> Any:
    task = adapter.submit_store_task(keys, what)
    wait(adapter.get_store_event_fd())
    deadline = time.monotonic() + WAIT_S
    results: dict[int, Any] = {}
    while task not in results and time.monotonic() < deadline:
        results |= adapter.pop_completed_store_tasks()
    assert adapter.pop_completed_store_tasks() == {}
    return results[task]


def found(adapter: PegaL2Adapter, keys: list[ObjectKey]) -> list[bool]:
    bits = ended(adapter.query_lookup_and_lock_result, adapter.submit_lookup_and_lock_task(keys, {}))
    return [bits.test(place) for place in range(len(keys))]


def load(adapter: PegaL2Adapter, keys: list[ObjectKey], into: list[Any]) -> list[bool]:
    bits = ended(adapter.query_load_result, adapter.submit_load_task(keys, into))
    return [bits.test(place) for place in range(len(keys))]


def test_objects_come_back_after_a_restart(make: Callable[..., PegaL2Adapter]) -> None:
    first, keys, what = make(), make_object_keys(COUNT), objects()
    result = store(first, keys, what)
    assert result.is_successful()
    assert result.bytes_transferred() == COUNT * SIZE
    assert found(first, keys) == [True] * COUNT
    first.close()

    second, into = make(), objects(fill=100)
    others = make_object_keys(2, key_offset=1000)
    assert found(second, [others[0], *keys, others[1]]) == [False, *[True] * COUNT, False]
    assert load(second, [*keys[:-1], others[0]], into) == [*[True] * (COUNT - 1), False]
    assert all(torch.equal(one.raw_data, other.raw_data) for one, other in zip(what[:-1], into[:-1], strict=True))
    second.submit_unlock(keys)


def test_the_three_events_are_different_ones(make: Callable[..., PegaL2Adapter]) -> None:
    adapter = make()
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3


def test_what_is_there_is_not_written_again(make: Callable[..., PegaL2Adapter]) -> None:
    adapter, keys = make(), make_object_keys(COUNT)
    store(adapter, keys, objects())
    assert store(adapter, keys, objects()).bytes_transferred() == 0


def test_every_part_of_a_key_counts(make: Callable[..., PegaL2Adapter]) -> None:
    adapter = make()
    parts: list[dict[str, Any]] = [
        {"chunk_hash": b"\1", "model_name": "m", "kv_rank": 1},
        {"chunk_hash": b"\2", "model_name": "m", "kv_rank": 1},
        {"chunk_hash": b"\1", "model_name": "n", "kv_rank": 1},
        {"chunk_hash": b"\1", "model_name": "m", "kv_rank": 11},
        {"chunk_hash": b"\1", "model_name": "m", "kv_rank": 1, "object_group_id": 1},
        {"chunk_hash": b"\1", "model_name": "m", "kv_rank": 1, "cache_salt": "s"},
    ]
    keys = [ObjectKey(**part) for part in parts]
    store(adapter, keys[:1], objects(1))
    assert found(adapter, keys) == [True] + [False] * 5
    adapter.close()
    assert found(make(namespace="other weights"), keys[:1]) == [False]


def test_an_object_of_another_size_is_a_miss_and_is_gone(make: Callable[..., PegaL2Adapter]) -> None:
    adapter, keys = make(), make_object_keys(1)
    store(adapter, keys, objects(1))
    small = make_memory_objects(torch.empty(SIZE, dtype=torch.uint8), 1, SIZE // 2, 0)
    assert load(adapter, keys, small) == [False]
    assert small[0].raw_data.eq(0).all(), "nothing was written"
    assert found(adapter, keys) == [False]


def test_batches_of_many_pieces_keep_their_places(make: Callable[..., PegaL2Adapter]) -> None:
    """More than DRAM has room for, in many pieces; every other object is there."""
    adapter, count = make(), 40 * COUNT
    keys, what = make_object_keys(count), objects(count)
    assert store(adapter, keys[::2], what[::2]).is_successful()
    there = [place % 2 == 0 for place in range(count)]
    assert found(adapter, keys) == there
    into = objects(count, fill=100)
    assert load(adapter, keys, into) == there
    untouched = objects(count, fill=100)
    for place, is_there in enumerate(there):
        assert torch.equal(into[place].raw_data, (what if is_there else untouched)[place].raw_data), place


def test_a_lookup_of_very_many_keys_goes_to_a_thread(
    make: Callable[..., PegaL2Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, seen = make(), set()
    call = adapter._call

    def noted(*piece: Any) -> Any:
        seen.add(threading.current_thread())
        return call(*piece)

    monkeypatch.setattr(adapter, "_call", noted)
    assert found(adapter, make_object_keys(4_096)) == [False] * 4_096
    assert seen == {threading.current_thread()}
    assert found(adapter, make_object_keys(4_097)) == [False] * 4_097
    assert len(seen) > 1


def test_what_fails_is_counted_by_its_kind(make: Callable[..., PegaL2Adapter]) -> None:
    adapter, keys = make(dram="16MiB"), make_object_keys(2)
    large = make_memory_objects(torch.empty(16 << 20, dtype=torch.uint8), 2, 8 << 20, 0)
    assert not store(adapter, keys, large).is_successful()
    assert adapter.report_status()["failed"] == {"store:invalid_input": 2}
    assert found(adapter, keys) == [False] * 2


def test_deleted_objects_are_gone_and_told(make: Callable[..., PegaL2Adapter]) -> None:
    adapter, keys = make(), make_object_keys(3)
    store(adapter, keys, objects(3))
    told: list[Any] = []
    adapter.register_listener(type("Told", (), {"on_l2_keys_deleted": lambda _, gone: told.extend(gone)})())  # type: ignore[arg-type]
    adapter.delete(make_object_keys(2, key_offset=1) + make_object_keys(1, key_offset=50))
    assert found(adapter, keys) == [True, False, False]
    assert told == keys[1:]


def test_beyond_the_queue_work_fails_at_once_and_is_counted(
    make: Callable[..., PegaL2Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three pieces a batch; one is being worked on, one waits.
    adapter, keys = make(threads=1, queue_pieces=1), make_object_keys(3 * COUNT)
    free = threading.Event()
    monkeypatch.setattr(adapter, "_call", lambda _task, piece, _names: [free.wait(WAIT_S)] * len(piece))
    start = time.monotonic()
    tasks = [adapter.submit_store_task(keys, objects(3 * COUNT)) for _ in range(3)]
    assert time.monotonic() - start < 1.0
    assert adapter.report_status()["failed"]["store:queue"] >= COUNT
    free.set()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + WAIT_S
    while len(results) < 3 and time.monotonic() < deadline:
        results |= adapter.pop_completed_store_tasks()
    assert [results[task].is_successful() for task in tasks] == [False] * 3


def test_an_empty_batch_ends_too(make: Callable[..., PegaL2Adapter]) -> None:
    adapter = make()
    assert found(adapter, []) == []
    assert store(adapter, [], []).is_successful()


def test_its_state_can_be_asked(make: Callable[..., PegaL2Adapter]) -> None:
    adapter = make()
    store(adapter, make_object_keys(COUNT), objects())
    usage = adapter.get_usage()
    assert usage.total_bytes_used >= COUNT * SIZE
    assert usage.usage_fraction == -1.0, "LMCache is not to evict: the store bounds itself"
    assert not adapter.supports_global_eviction
    assert adapter.report_status()["is_healthy"]


def test_a_closed_adapter_takes_nothing_and_closes_again(make: Callable[..., PegaL2Adapter]) -> None:
    adapter = make()
    adapter.close()
    adapter.close()
    assert not adapter.report_status()["is_healthy"]


def test_all_that_is_wrong_with_the_settings_is_told_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        PegaL2Adapter({"threads": 0, "pth": "/x", "namespace": 5})
    for part in ("threads is 0", "'pth' is not a setting", "path is missing", "namespace is 5"):
        assert part in str(caught.value)


def test_what_nobody_expected_fails_its_objects_only(
    make: Callable[..., PegaL2Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, keys = make(threads=1), make_object_keys(COUNT)
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "_name", lambda _: 1 / 0)
        assert not store(adapter, keys, objects()).is_successful()
    assert adapter.report_status()["failed"] == {"store:unexpected": COUNT}
    assert store(adapter, keys, objects()).is_successful()
