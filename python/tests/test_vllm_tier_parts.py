"""The parts of `PegaTier` by themselves: what is known of blocks, and which chunk follows which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm.v1.kv_offload.tiering.factory", reason="no vLLM with tiering here", exc_type=ImportError)

import numpy as np

from pegaflow.errors import UnsupportedError
from pegaflow.vllm_tier import compat
from pegaflow.vllm_tier.chains import ROOT, Chains, Run, block_key
from pegaflow.vllm_tier.lookups import Lookups
from pegaflow.vllm_tier.memory import PrimaryMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

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
