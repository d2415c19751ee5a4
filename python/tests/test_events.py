"""KV events: what is published is what the cache has, whatever was missed; bounded, and nobody waits."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from pegaflow.connector import events
from pegaflow.connector.compat import MEDIUM_NVME
from pegaflow.connector.events import Announced, BlockEvents, announced_blocks
from pegaflow.errors import BusyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from conftest import Clock, FakeCache

BLOCK = 4
ROUNDS_MAX = 32


def block_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def chain(count: int, name: str = "a", tenant: str | None = None) -> list[Announced]:
    """Blocks of one chain; of a name and tenant always the same."""
    return [
        Announced(
            block_hash=block_hash(f"{name}{place}"),
            parent_hash=block_hash(f"{name}{place - 1}") if place else None,
            key=block_hash(f"key {name}{place}"),
            tenant=tenant,
            tokens=bytes([place, 0, 0, 0] * BLOCK),
            lora=None,
            extra=None,
        )
        for place in range(count)
    ]


def hashes_of(blocks: Iterable[Announced]) -> list[Any]:
    return [maybe_convert_block_hash(block.block_hash) for block in blocks]


def told(taken: Iterable[Any]) -> list[tuple[str, str, list[Any]]]:
    """Events in short: kind, medium, hashes."""
    return [(type(event).__name__, event.medium, event.block_hashes) for event in taken]


def believed(taken: Iterable[Any], router: dict[Any, set[str]] | None = None) -> dict[Any, set[str]]:
    """What a router believes after some events: the media of each hash."""
    router = {} if router is None else router
    for kind, medium, hashes in told(taken):
        for one in hashes:
            media = router.setdefault(one, set())
            if kind == "BlockStored":
                media.add(medium)
            else:
                assert medium in media, "removed what was not there"
                media.remove(medium)
    return {one: media for one, media in router.items() if media}


@pytest.fixture
def block_events(cache: FakeCache, clock: Clock) -> BlockEvents:
    return BlockEvents(cache, "engine", BLOCK, blocks_max=8, clock=clock)


def test_what_is_saved_is_published_once_with_all_that_a_router_needs(
    block_events: BlockEvents, cache: FakeCache
) -> None:
    blocks = chain(3)
    cache.stored |= {block.key for block in blocks}
    block_events.announce(blocks)
    assert block_events.take() == [], "the cache has not confirmed it"
    block_events.ask()
    (event,) = block_events.take()
    assert told([event]) == [("BlockStored", "CPU", hashes_of(blocks))]
    assert (event.parent_block_hash, event.block_size, event.lora_id) == (None, BLOCK, None)
    assert event.token_ids == [0] * BLOCK + [1] * BLOCK + [2] * BLOCK
    block_events.announce(chain(3))
    block_events.ask()
    assert block_events.take() == []


def test_a_block_that_moves_is_stored_before_it_is_removed(block_events: BlockEvents, cache: FakeCache) -> None:
    blocks = chain(2)
    cache.stored |= {block.key for block in blocks}
    block_events.announce(blocks)
    block_events.ask()
    block_events.take()
    cache.on_drive.add(blocks[1].key)
    block_events.ask()
    (stored, removed) = taken = block_events.take()
    assert told(taken) == [
        ("BlockStored", MEDIUM_NVME, hashes_of(blocks[1:])),
        ("BlockRemoved", "CPU", hashes_of(blocks[1:])),
    ]
    assert stored.parent_block_hash == hashes_of(blocks)[0]
    assert stored.group_idx == removed.group_idx == 0
    cache.stored.clear()
    block_events.ask()
    assert sorted(told(block_events.take())) == [
        ("BlockRemoved", "CPU", hashes_of(blocks[:1])),
        ("BlockRemoved", MEDIUM_NVME, hashes_of(blocks[1:])),
    ]
    cache.calls.clear()
    block_events.ask()
    assert cache.named("locate") == [], "what has gone is asked about no more"


def test_what_the_cache_did_not_keep_is_never_published(block_events: BlockEvents) -> None:
    block_events.announce(chain(2))
    block_events.ask()
    assert block_events.take() == []


def test_a_change_that_is_undone_before_a_step_is_not_published(block_events: BlockEvents, cache: FakeCache) -> None:
    (block,) = blocks = chain(1)
    cache.stored.add(block.key)
    block_events.announce(blocks)
    block_events.ask()
    block_events.take()
    cache.on_drive.add(block.key)
    block_events.ask()
    cache.on_drive.clear()
    block_events.ask()
    assert block_events.take() == []


def test_a_full_table_forgets_the_oldest_and_says_so(block_events: BlockEvents, cache: FakeCache) -> None:
    router: dict[Any, set[str]] = {}
    for number in range(5):
        blocks = chain(4, name=f"chain {number}")
        cache.stored |= {block.key for block in blocks}
        block_events.announce(blocks)
        block_events.ask()
        router = believed(block_events.take(), router)
    newest = [*chain(4, name="chain 3"), *chain(4, name="chain 4")]
    assert router == {one: {"CPU"} for one in hashes_of(newest)}


def test_what_nobody_takes_is_bounded(block_events: BlockEvents, cache: FakeCache) -> None:
    router: dict[Any, set[str]] = {}
    for number in range(16):
        blocks = chain(8, name=f"chain {number}")
        cache.stored |= {block.key for block in blocks}
        block_events.announce(blocks)
        block_events.ask()
        if number == 0:
            router = believed(block_events.take(), router)
        assert len(block_events._table) <= 8
        assert len(block_events._forgotten) <= 8
    router = believed(block_events.take(), router)
    assert len(router) <= 8
    assert hashes_of(chain(1, name="chain 0"))[0] not in router


def test_who_comes_back_before_his_removal_was_taken_is_not_removed(
    block_events: BlockEvents, cache: FakeCache
) -> None:
    first, others = chain(1, name="first"), chain(8, name="others")
    cache.stored |= {block.key for block in [*first, *others]}
    router: dict[Any, set[str]] = {}
    for blocks in (first, others):
        block_events.announce(blocks)
        block_events.ask()
        router = believed(block_events.take()) if blocks is first else router
    block_events.announce(chain(1, name="first"))
    block_events.ask()
    router = believed(block_events.take(), router)
    assert router[hashes_of(first)[0]] == {"CPU"}
    assert len(router) == 8


def test_one_step_gives_out_a_bounded_number_and_the_next_ones_the_rest(
    cache: FakeCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_TAKEN_MAX", 3)
    block_events = BlockEvents(cache, "engine", BLOCK, clock=clock)
    blocks = chain(8)
    cache.stored |= {block.key for block in blocks}
    block_events.announce(blocks)
    block_events.ask()
    runs = [told(block_events.take()) for _ in range(4)]
    assert [[len(hashes) for _, _, hashes in run] for run in runs] == [[3], [3], [2], []]


def test_a_large_table_is_asked_about_in_turns(cache: FakeCache, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_ASKED_MAX", 3)
    block_events = BlockEvents(cache, "engine", BLOCK, clock=clock)
    blocks = chain(8)
    cache.stored |= {block.key for block in blocks}
    block_events.announce(blocks)
    router: dict[Any, set[str]] = {}
    for _ in range(ROUNDS_MAX):
        block_events.ask()
        router = believed(block_events.take(), router)
    assert len(router) == 8
    assert max(count for _, count, _ in cache.named("locate")) == 3
    cache.stored.clear()
    for _ in range(ROUNDS_MAX):
        block_events.ask()
        router = believed(block_events.take(), router)
    assert router == {}


def test_tenants_are_asked_about_apart(block_events: BlockEvents, cache: FakeCache) -> None:
    block_events.announce([*chain(1), *chain(2, name="b", tenant="somebody")])
    block_events.ask()
    assert sorted(cache.named("locate"), key=str) == [("engine", 1, None), ("engine", 2, "somebody")]


def test_a_cache_that_is_away_for_long_has_nothing_and_a_busy_one_keeps_all(
    block_events: BlockEvents, cache: FakeCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = chain(2)
    cache.stored |= {block.key for block in blocks}
    block_events.announce(blocks)
    block_events.ask()
    router = believed(block_events.take())

    def busy(*_: Any, **__: Any) -> bytes:
        raise BusyError("the index is still being read")

    with monkeypatch.context() as patched:
        patched.setattr(cache, "locate", busy)
        clock.now += 60
        block_events.ask()
        assert block_events.take() == []
    cache.is_there = False
    clock.now += 9.9
    block_events.ask()
    assert block_events.take() == []
    clock.now += 0.2
    block_events.ask()
    assert believed(block_events.take(), router) == {}
    # Nobody has lost the blocks: who finds them again makes them known again.
    cache.is_there = True
    block_events.announce(chain(2))
    block_events.ask()
    assert len(believed(block_events.take())) == 2


def test_a_reset_removes_all_and_answers_about_the_time_before_do_not_count(
    block_events: BlockEvents, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = chain(2)
    cache.stored |= {block.key for block in blocks}
    block_events.announce(blocks)
    block_events.ask()
    router = believed(block_events.take())
    locate = cache.locate

    def reset_meanwhile(*arguments: Any, **named: Any) -> bytes:
        answer = locate(*arguments, **named)
        block_events.reset("engine#2")
        block_events.announce(chain(2))
        return answer

    monkeypatch.setattr(cache, "locate", reset_meanwhile)
    cache.on_drive |= {block.key for block in blocks}
    block_events.ask()
    assert believed(block_events.take(), router) == router, "announced again, and not asked about yet"
    monkeypatch.setattr(cache, "locate", locate)
    cache.stored.clear()
    block_events.ask()
    assert believed(block_events.take(), router) == {}
    assert cache.named("locate")[-1][0] == "engine#2"


def test_the_thread_asks_by_itself_and_ends_and_repeats_itself_seldom(
    cache: FakeCache, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "_INTERVAL_S", 0.001)
    block_events = BlockEvents(cache, "engine", BLOCK, clock=clock)
    asked = []

    def locate(*_: Any, **__: Any) -> bytes:
        asked.append(1)
        if len(asked) == 5:
            clock.now += 60.0
        if len(asked) == 6:
            block_events._stop.set()
        raise ValueError("a mistake in the answer must not end the thread")

    monkeypatch.setattr(cache, "locate", locate)
    block_events.announce(chain(1))
    block_events.start()
    block_events._thread.join(30)
    block_events.close(1)
    assert len(asked) == 6
    assert [record.args for record in caplog.records] == [(1,), (5,)], "at once, and again after a minute"


def test_blocks_are_described_by_vllms_hashes(make_request: Any) -> None:
    prompt = list(range(100, 111))
    hashes = [block_hash("0"), block_hash("1")]
    request = make_request("r", prompt, block_hashes=hashes, lora_request=None)
    first, second = announced_blocks(request, bytes(64), 0, BLOCK, "somebody")
    assert (first.block_hash, first.parent_hash, first.token_ids()) == (hashes[0], None, prompt[:4])
    assert (second.block_hash, second.parent_hash, second.token_ids()) == (hashes[1], hashes[0], prompt[4:8])
    assert (second.tenant, second.extra) == ("somebody", None)
    assert len(announced_blocks(request, bytes(64), 1, BLOCK, None)) == 1, "as many as there are hashes"
    request.block_hashes = hashes * 2
    assert announced_blocks(request, bytes(64), 0, BLOCK, None) == [], "hashes of smaller blocks"


def test_an_adapter_stands_in_the_event(block_events: BlockEvents, cache: FakeCache) -> None:
    (block,) = chain(1)
    block.lora, block.extra = (3, "adapter"), ("adapter",)
    cache.stored.add(block.key)
    block_events.announce([block])
    block_events.ask()
    (event,) = block_events.take()
    assert (event.lora_id, event.lora_name, event.extra_keys) == (3, "adapter", [("adapter",)])


def test_the_scheduler_announces_what_all_workers_have_saved(
    cache: FakeCache, clock: Clock, make_request: Any, step: Any
) -> None:
    from collections import Counter

    from pegaflow.connector.config import ConnectorConfig, KillSwitch
    from pegaflow.connector.metadata import PegaWorkerMetadata
    from pegaflow.connector.scheduler import PegaScheduler

    config = ConnectorConfig.from_extra({})
    block_events = BlockEvents(cache, "engine", BLOCK, clock=clock)
    block_events.start = lambda: None  # type: ignore[method-assign]
    scheduler = PegaScheduler(
        config, cache, "engine", BLOCK, 64, 2, KillSwitch(config), clock=clock, events=block_events
    )
    request = make_request("r", list(range(8)), block_hashes=[block_hash("0"), block_hash("1")])
    scheduler.matched_tokens(request, 0)
    (order,) = scheduler.build_meta(step(new={"r": ([1, 2], 0, 8)})).saves
    cache.stored |= {order.keys[:32], order.keys[32:]}
    for workers, announced in ((1, 0), (2, 2)):
        report = PegaWorkerMetadata(saves=Counter({order.operation: 1}))
        scheduler.update(SimpleNamespace(finished_recving=None, kv_connector_worker_meta=report))
        block_events.ask()
        assert sum(len(event.block_hashes) for event in scheduler.take_events()) == announced, workers
    scheduler.reset()
    (removed,) = scheduler.take_events()
    assert told([removed]) == [("BlockRemoved", "CPU", [maybe_convert_block_hash(h) for h in request.block_hashes])]
