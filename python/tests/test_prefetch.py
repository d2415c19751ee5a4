"""Reading the drive ahead for requests that wait: who is looked up, how often, who is held back, and that it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from collections import Counter

from pegaflow._native import KeyChain
from pegaflow.connector import compat
from pegaflow.connector.config import ConnectorConfig, KillSwitch
from pegaflow.connector.metadata import PegaWorkerMetadata
from pegaflow.connector.scheduler import PegaScheduler
from pegaflow.errors import PegaError

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4
ARENA = b"arena of sixteen"


def prompt(number: int) -> list[int]:
    return list(range(number * 1000, number * 1000 + 18))


def keys_of(tokens: list[int]) -> list[bytes]:
    keys = KeyChain().extend(tokens, BLOCK)
    return [keys[at : at + 32] for at in range(0, len(keys), 32)]


@pytest.fixture
def make(cache: Any, clock: Any) -> Callable[..., PegaScheduler]:
    """A scheduler whose workers reach the arena, with everything on the drive."""

    def make(**settings: Any) -> PegaScheduler:
        for number in range(40):
            cache.stored.update(keys_of(prompt(number)))
        cache.fetch_s = 0.5
        config = ConnectorConfig.from_extra(settings)
        scheduler = PegaScheduler(config, cache, "engine/0", BLOCK, 1 << 20, 1, KillSwitch(config), clock)
        worker = PegaWorkerMetadata(arenas=Counter({ARENA: 1}))
        scheduler.update(SimpleNamespace(finished_recving=set(), kv_connector_worker_meta=worker))
        return scheduler

    return make


def busy(scheduler: PegaScheduler, step: Any) -> None:
    """Another request is being computed."""
    scheduler.build_meta(step(new={"other": ([1], 0, 4)}))


def test_who_waits_is_looked_up_once_ahead_with_a_fetch(make, cache, clock, make_request, step) -> None:
    scheduler, request = make(), make_request("r", prompt(1))
    busy(scheduler, step)
    scheduler.arrived(request)
    assert [prefetch for _, prefetch in cache.prefetches] == [True]
    # Scheduled soon after it has its answer already.
    clock.now += 0.1
    assert scheduler.matched_tokens(request, 0) == (16, True)
    assert len(cache.named("lookup")) == 1
    # When the blocks are expected in DRAM the answer is another one.
    clock.now += 0.41
    cache.fetch_s, cache.dram_arena = None, ARENA
    assert scheduler.matched_tokens(request, 0) == (16, False)
    assert len(cache.named("lookup")) == 2
    assert len(cache.leases) == 1


def test_who_finds_nobody_before_it_is_not_looked_up_ahead(make, cache, make_request) -> None:
    scheduler, first, second = make(), make_request("a", prompt(1)), make_request("b", prompt(2))
    scheduler.arrived(first)
    assert cache.named("lookup") == []
    assert scheduler.matched_tokens(first, 0) == (16, True)
    assert cache.prefetches[-1][1] is False, "it is loaded at once"
    scheduler.arrived(second)
    assert len(cache.named("lookup")) == 1, "the first was asked for, and nothing runs"
    third = make_request("c", prompt(3))
    scheduler.arrived(third)
    assert cache.prefetches[-1][1] is True, "the second still waits"


def test_a_request_that_is_asked_for_again_waits_too(make, cache, clock, make_request) -> None:
    cache_of_drive, request = make(), make_request("r", prompt(1))
    cache_of_drive.matched_tokens(request, 0)
    clock.now += 2
    cache_of_drive.matched_tokens(request, 0)
    assert [prefetch for _, prefetch in cache.prefetches] == [False, True]
    assert len(cache.leases) == 1


def test_few_requests_are_looked_up_ahead_and_few_in_one_step(make, cache, clock, make_request, step) -> None:
    scheduler = make()
    busy(scheduler, step)
    requests = [make_request(f"r{number}", prompt(number)) for number in range(1, 31)]
    for request in requests:
        scheduler.arrived(request)
    assert len(cache.named("lookup")) == len(cache.leases) == 8
    busy(scheduler, step)
    assert len(cache.named("lookup")) == 8
    # Those that are scheduled or over make room for the next, two in a step.
    for request in requests[:3]:
        scheduler.matched_tokens(request, 0)
    scheduler.finished(requests[3], [])
    scheduler.finished(requests[20], [])
    assert len(cache.named("lookup")) == 8
    busy(scheduler, step)
    assert len(cache.named("lookup")) == 10
    busy(scheduler, step)
    busy(scheduler, step)
    assert len(cache.named("lookup")) == 12


def test_a_request_that_is_over_gives_its_lease_back(make, cache, make_request, step) -> None:
    scheduler, request = make(), make_request("r", prompt(1))
    busy(scheduler, step)
    scheduler.arrived(request)
    assert len(cache.leases) == 1
    assert scheduler.finished(request, []) is False
    assert cache.leases == set(), "the fetch ends with it"


def test_what_is_computed_is_not_waited_for(make, cache, make_request, step) -> None:
    scheduler, request = make(), make_request("r", prompt(1))
    cache.recommends_computing = True
    busy(scheduler, step)
    scheduler.arrived(request)
    assert scheduler.matched_tokens(request, 0) == (0, False)
    assert len(cache.named("lookup")) == 1


def test_off_and_never_and_the_kill_switch_look_nothing_up_ahead(make, cache, make_request, step, tmp_path) -> None:
    switch = tmp_path / "off"
    switch.touch()
    for settings in ({"prefetch": "off"}, {"load_policy": "never"}, {"kill_switch": str(switch)}):
        scheduler = make(**settings)
        busy(scheduler, step)
        scheduler.arrived(make_request("r", prompt(1)))
        assert cache.named("lookup") == []


def test_who_is_almost_there_is_held_back_and_then_loaded_within_the_step(
    make, cache, clock, make_request, step
) -> None:
    scheduler, request = make(), make_request("r", prompt(1))
    busy(scheduler, step)
    cache.fetch_s = 0.03
    scheduler.arrived(request)
    assert scheduler.matched_tokens(request, 0) == (16, True), "30 ms are more than a step"
    scheduler.finished(request, [])
    scheduler.arrived(request)
    clock.now += 0.015
    for _ in range(10):
        assert scheduler.matched_tokens(request, 0) == (None, False)
    assert len(cache.named("lookup")) == 2, "asking again asks nobody"
    clock.now += 0.016
    cache.fetch_s, cache.dram_arena = None, ARENA
    assert scheduler.matched_tokens(request, 0) == (16, False)
    assert scheduler.stats.data["held_back_requests"] == 1


def test_nobody_is_held_back_past_the_deadline(make, cache, clock, make_request, step) -> None:
    scheduler, request = make(prefetch_wait_ms=50), make_request("r", prompt(1))
    busy(scheduler, step)
    # It is always about to be there.
    cache.fetch_s = 0.01
    scheduler.arrived(request)
    begin, asked = clock.now, 0
    while scheduler.matched_tokens(request, 0) == (None, False):
        clock.now += 0.004
        asked += 1
        assert asked < 100
    assert 0.05 <= clock.now - begin < 0.06
    assert scheduler.matched_tokens(request, 0) == (16, True)


def test_nobody_is_held_back_for_nothing(make, cache, clock, make_request, step) -> None:
    for settings in ({"sync_loads": False}, {"prefetch_wait_ms": 0}):
        scheduler, request = make(**settings), make_request("r", prompt(1))
        cache.fetch_s = 0.01
        busy(scheduler, step)
        scheduler.arrived(request)
        assert scheduler.matched_tokens(request, 0) == (16, True)
    # Not all workers reach the arena.
    config = ConnectorConfig()
    scheduler = PegaScheduler(config, cache, "engine/0", BLOCK, 1 << 20, 1, KillSwitch(config), clock)
    busy(scheduler, step)
    scheduler.arrived(make_request("s", prompt(2)))
    assert scheduler.matched_tokens(make_request("s", prompt(2)), 0) == (16, True)


def test_a_cache_that_is_away_holds_nobody_up(make, cache, make_request, step) -> None:
    scheduler, request = make(), make_request("r", prompt(1))
    busy(scheduler, step)
    cache.is_there = False
    scheduler.arrived(request)
    assert scheduler.matched_tokens(request, 0) == (0, False)


def test_what_vllm_has_itself_is_not_fetched(make, cache, make_request, step) -> None:
    scheduler = make()
    hashes = [b"0", b"1", b"2", b"3"]
    asked: list[bytes] = []

    def get_cached_block(block_hash: bytes, groups: list[int]) -> list[object] | None:
        assert groups == [0]
        asked.append(block_hash)
        return [object()] if block_hash < b"3" else None

    pool = SimpleNamespace(get_cached_block=get_cached_block)
    for known in range(5):
        few = SimpleNamespace(
            get_cached_block=lambda block_hash, _, known=known: [1] if int(block_hash) < known else None
        )
        assert compat.local_blocks(make_request("r", prompt(1), block_hashes=hashes), few) == known
    assert compat.local_blocks(make_request("r", prompt(1)), pool) == 0
    scheduler.bind_block_pool(pool)
    busy(scheduler, step)
    scheduler.arrived(make_request("r", prompt(1), block_hashes=hashes))
    assert cache.questions[-1][1] == 3
    assert len(asked) <= 3
    hashes.append(b"4")


def test_settings_are_checked() -> None:
    assert ConnectorConfig.from_extra({"prefetch": "off"}).prefetch == "off"
    for settings in ({"prefetch": "on"}, {"prefetch": True}, {"prefetch_wait_ms": 1001}, {"prefetch_wait_ms": -1}):
        with pytest.raises(PegaError, match="prefetch"):
            ConnectorConfig.from_extra(settings)
