"""The parts of `PegaTier` by themselves: what is known of blocks, and which chunk follows which."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm.v1.kv_offload.tiering.factory", reason="no vLLM with tiering here", exc_type=ImportError)

import numpy as np
from conftest import Done

from pegaflow.errors import UnsupportedError
from pegaflow.vllm_tier import compat
from pegaflow.vllm_tier.chains import ROOT, Chains, Run, block_key
from pegaflow.vllm_tier.courier import Courier, Lookup, Transfer
from pegaflow.vllm_tier.lookups import Lookups
from pegaflow.vllm_tier.memory import PrimaryMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOKENS = 16


def key_of(number: int, group: int = 0) -> bytes:
    return number.to_bytes(32, "big") + group.to_bytes(4, "big")


def ends(*places: int | None) -> list[int | None]:
    return [None if place is None else (place + 1) * TOKENS for place in places]


def runs_of(chains: Chains, numbers: Sequence[int], places: Sequence[int | None], request: str = "a") -> list[Run]:
    return chains.runs(request, [key_of(number) for number in numbers], list(numbers), ends(*places))


@pytest.fixture
def lookups(clock: Any) -> Lookups:
    return Lookups(1.0, clock)


def test_a_block_is_asked_for_once_for_all_requests(lookups: Lookups) -> None:
    assert lookups.ask(b"k", "a") is None
    assert lookups.ask(b"k", "b") is None
    assert lookups.take_batch() == [b"k"]
    assert lookups.take_batch() == []
    lookups.tell([b"k", b"nobody's"], are_there=True)
    assert lookups.ask(b"k", "b") is True
    assert len(lookups) == 1


def test_a_block_whose_request_has_ended_is_not_asked_for(lookups: Lookups) -> None:
    lookups.ask(b"k", "a")
    lookups.forget("a")
    assert lookups.take_batch() == []
    lookups.forget("a")


def test_no_request_waits_for_ever_and_the_next_asks_anew(lookups: Lookups, clock: Any) -> None:
    lookups.ask(b"k", "a")
    clock.now += 0.9
    assert lookups.ask(b"k", "a") is None
    clock.now += 0.2
    assert lookups.ask(b"k", "a") is False
    assert lookups.timeouts == 1
    lookups.take_batch()
    assert lookups.ask(b"k", "a") is False
    assert lookups.ask(b"k", "b") is None
    assert lookups.take_batch() == [b"k"]


def test_chunks_at_neighbouring_places_are_one_run() -> None:
    chains = Chains({0: TOKENS})
    (run,) = runs_of(chains, [1, 2, 3], [4, 5, 6])
    assert (run.parent, run.depth, run.chunks) == (ROOT, 4, [1, 2, 3])


def test_a_gap_begins_another_run() -> None:
    chains = Chains({0: TOKENS})
    first, second = runs_of(chains, [1, 2, 3], [0, 1, 3])
    assert (first.keys, second.keys) == ([key_of(1), key_of(2)], [key_of(3)])
    assert (second.parent, second.depth) == (ROOT, 3)


def test_a_run_hangs_on_what_its_request_has_stored_or_found_before() -> None:
    chains = Chains({0: TOKENS})
    runs_of(chains, [1, 2], [0, 1])
    assert runs_of(chains, [3], [2])[0].parent == block_key(key_of(2))
    assert runs_of(chains, [3], [2], "another")[0].parent == ROOT
    chains.found("third", key_of(8), 8 * TOKENS)
    chains.found("third", key_of(7), 7 * TOKENS)
    assert runs_of(chains, [9], [8], "third")[0].parent == block_key(key_of(8))
    chains.forget("third")
    assert runs_of(chains, [9], [8], "third")[0].parent == ROOT


def test_groups_have_no_chains_over_jobs() -> None:
    chains = Chains({0: TOKENS, 1: TOKENS})
    runs_of(chains, [1], [0])
    assert runs_of(chains, [2], [1])[0].parent == ROOT
    keys = [key_of(1), key_of(2, 1)]
    assert [run.depth for run in chains.runs("a", keys, [0, 1], ends(0, 1))] == [0, 1]


def test_chunks_without_a_place_are_a_run_in_their_order() -> None:
    chains = Chains({0: TOKENS})
    (run,) = runs_of(chains, [1, 2], [None, None])
    assert (run.parent, run.depth) == (ROOT, 0)
    (_, tail) = chains.runs("a", [key_of(1), key_of(2)], [0, 1], [TOKENS, TOKENS + 5])
    assert (tail.parent, tail.depth) == (ROOT, 0), "a partial chunk at the end has no place"


def test_other_hashes_and_groups_are_other_blocks() -> None:
    assert len({block_key(key) for key in (key_of(1), key_of(2), key_of(1, 1), key_of(1)[16:])}) == 4
    assert all(len(block_key(key)) == 32 for key in (key_of(1), b"short"))


def test_hashes_that_every_process_seeds_anew_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert compat.has_lasting_hashes(key_of(1)) == (compat.VERSION >= (0, 29))
    assert not compat.has_lasting_hashes(key_of(1)[16:])
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert compat.has_lasting_hashes(key_of(1)[16:])


def test_memory_that_is_no_rows_of_bytes_is_refused() -> None:
    rows = np.zeros((4, 64), np.int8)
    memory = PrimaryMemory(memoryview(rows))
    assert (memory.chunks, memory.chunk_bytes, memory.stride_bytes, memory.bytes) == (4, 64, 64, 256)
    readonly = np.zeros((4, 64), np.int8)
    readonly.flags.writeable = False
    for wrong in (np.zeros(64, np.int8), np.zeros((4, 64), np.int16), rows[:, ::2], readonly):
        with pytest.raises(UnsupportedError, match="rows of single, writable bytes"):
            PrimaryMemory(memoryview(wrong))


# --- the thread -------------------------------------------------------------------------------------------------------


@pytest.fixture
def courier(cache: Any) -> Iterator[Courier]:
    courier = Courier(cache, "tier", has_one_group=True, queue_jobs=8, in_flight_jobs=1)
    courier.start()
    yield courier
    assert courier.stop(10.0)


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10.0
    while not (result := what()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return result


def load_of(cache: Any, count: int, job: int = 1) -> Transfer:
    keys = [key_of(number) for number in range(count)]
    cache.stored |= {block_key(key) for key in keys}
    return Transfer(job, is_load=True, runs=[Run(ROOT, 0, keys, [10 + number for number in range(count)])])


def test_chunks_that_did_not_arrive_are_named(courier: Courier, cache: Any) -> None:
    courier.transfer(load_of(cache, 3))
    (operation,) = wait_for(lambda: list(cache.loads))
    assert courier.take_finished() == []
    cache.end(operation, failed=[11])
    (finished,) = wait_for(courier.take_finished)
    assert finished.failed == {key_of(1)}
    assert courier.take_counts() == {("load", "cache"): 1}


def test_of_a_run_that_was_dropped_in_part_nothing_counts_as_stored(courier: Courier, cache: Any) -> None:
    run = Run(ROOT, 0, [key_of(1), key_of(2)], [0, 1])
    courier.transfer(Transfer(1, is_load=False, runs=[run]))
    (operation,) = wait_for(lambda: list(cache.saves))
    cache.saves.clear()
    cache.ended.append(Done(operation, saved=1, dropped=1))
    (finished,) = wait_for(courier.take_finished)
    assert finished.failed == set(run.keys)
    assert courier.take_counts() == {("store", "cache"): 1}


def test_only_so_many_jobs_are_copied_at_a_time(courier: Courier, cache: Any) -> None:
    for job in (1, 2):
        courier.transfer(load_of(cache, 2, job))
    (operation,) = wait_for(lambda: list(cache.loads))
    time.sleep(0.05)
    assert list(cache.loads) == [operation], "the second waits for the first"
    cache.end(operation)
    wait_for(courier.take_finished)
    (operation,) = wait_for(lambda: list(cache.loads))
    cache.end(operation)


def test_a_stop_cancels_what_runs(courier: Courier, cache: Any) -> None:
    courier.transfer(load_of(cache, 2))
    wait_for(lambda: list(cache.loads))
    assert courier.stop(10.0)
    assert len(cache.named("cancel")) == 1
    (finished,) = courier.take_finished()
    assert len(finished.failed) == 2
    assert not courier.transfer(load_of(cache, 1, 2))
    assert not courier.ask(Lookup([key_of(1)]))


def test_a_drain_answers_what_nobody_will_look_up(courier: Courier, cache: Any, monkeypatch: Any) -> None:
    begun, free = threading.Event(), threading.Event()
    asked = cache.lookup

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        free.wait(10.0)
        return asked(*arguments, **options)

    monkeypatch.setattr(cache, "lookup", slow)
    courier.ask(Lookup([key_of(1)]))
    assert begun.wait(10.0)
    courier.ask(Lookup([key_of(2)]))
    with pytest.raises(RuntimeError, match="not ended"):
        courier.drain(0.05)
    (answer,) = courier.take_answers()
    assert (list(answer.unknown), courier.take_counts()) == ([key_of(2)], {("lookup", "stopped"): 1})
    free.set()


def test_a_thread_that_died_has_not_ended_its_copies(courier: Courier, cache: Any, monkeypatch: Any) -> None:
    """Whatever ended it: vLLM may not unmap the memory."""
    courier.transfer(load_of(cache, 2))
    (operation,) = wait_for(lambda: list(cache.loads))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(courier, "_poll", lambda _: sys.exit(1))
    assert wait_for(lambda: not courier._thread.is_alive())
    assert not courier.stop(1.0)
    monkeypatch.undo()
    cache.end(operation)
    courier._poll(0.0)


def test_a_lookup_goes_before_copies_that_wait(courier: Courier, cache: Any) -> None:
    for job in (1, 2):
        courier.transfer(load_of(cache, 1, job))
    (operation,) = wait_for(lambda: list(cache.loads))
    courier.ask(Lookup([key_of(0), key_of(5)]))
    (answer,) = wait_for(courier.take_answers)
    assert (list(answer.present), list(answer.absent)) == ([key_of(0)], [key_of(5)])
    cache.end(operation)
    (operation,) = wait_for(lambda: [number for number in cache.loads if number != operation])
    cache.end(operation)
