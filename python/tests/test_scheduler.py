"""The scheduler's side: what is promised, what is loaded, and above all what is saved, which must be final."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from pegaflow._native import KeyChain
from pegaflow.connector.config import ConnectorConfig, KillSwitch
from pegaflow.connector.metadata import PegaWorkerMetadata
from pegaflow.connector.scheduler import PegaScheduler

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4
BLOCK_BYTES = 1 << 20
ARENA = b"arena of sixteen"
PROMPT = list(range(100, 118))  # four full blocks and two tokens


def keys_of(tokens: list[int]) -> list[bytes]:
    keys = KeyChain().extend(tokens, BLOCK)
    return [keys[at : at + 32] for at in range(0, len(keys), 32)]


@pytest.fixture
def make(cache: Any) -> Callable[..., PegaScheduler]:
    def make(workers: int = 1, arena: bytes | None = None, **settings: Any) -> PegaScheduler:
        config = ConnectorConfig.from_extra(settings)
        clock = iter(range(10_000)).__next__
        scheduler = PegaScheduler(
            config, cache, "engine/0", BLOCK, BLOCK_BYTES, workers, KillSwitch(config), lambda: clock() / 100
        )
        if arena is not None:
            report(scheduler, arenas=Counter({arena: workers}))
        return scheduler

    return make


def report(scheduler: PegaScheduler, received: set[str] = frozenset(), **fields: Any) -> None:  # type: ignore[assignment]
    meta = PegaWorkerMetadata(**fields)
    scheduler.update(SimpleNamespace(finished_recving=received, kv_connector_worker_meta=meta))


def ended(scheduler: PegaScheduler, *operations: int, times: int = 1) -> None:
    report(scheduler, saves=Counter(dict.fromkeys(operations, times)))


# --- load or recompute ------------------------------------------------------------------------------------------------


def test_what_is_not_worth_loading_is_computed_and_not_saved_again(make, cache, make_request, step, blocks) -> None:
    cache.stored.update(keys_of(PROMPT)[:3])
    cache.recommends_computing = True
    scheduler, request = make(), make_request("r", PROMPT)
    assert scheduler.matched_tokens(request, 0) == (0, False)
    assert cache.questions[0][:3] == ("r", 0, BLOCK)
    scheduler.allocated(request, blocks([1, 2, 3, 4, 5]), 0)
    meta = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
    assert meta.loads == []
    assert [(save.depth, save.blocks) for save in meta.saves] == [(3, [4])]
    assert scheduler.stats.data["decisions:recompute"] == 1
    # All of it is in vLLM itself: there is nothing to ask.
    scheduler.matched_tokens(make_request("s", PROMPT), 16)
    assert cache.questions[-1][1] == 4


def test_the_askers_policy_goes_with_the_question(make, cache, make_request) -> None:
    for policy, told in (("auto", None), ("always", "always"), ("shadow", "shadow")):
        make(load_policy=policy).matched_tokens(make_request("r", PROMPT), 0)
        assert cache.questions[-1][4] == told


def test_what_a_prompt_took_is_told_with_the_next_question(make, cache, make_request, step) -> None:
    prompt = list(range(1000, 1202))
    cache.stored.update(keys_of(prompt)[:3])
    cache.recommends_computing = True
    scheduler, request = make(), make_request("r", prompt)
    scheduler.matched_tokens(request, 0)
    scheduler.build_meta(step(new={"r": ([*range(51)], 0, 128)}))
    report(scheduler)
    scheduler.build_meta(step(cached={"r": ([], 128, 74)}))
    scheduler.matched_tokens(make_request("early", PROMPT), 0)
    assert cache.questions[-1][5] == []
    request.all_token_ids.append(7)
    report(scheduler)
    scheduler.matched_tokens(make_request("next", PROMPT), 0)
    ((decision, first, end, load, took),) = cache.questions[-1][5]
    assert (decision, first, end, load) == (1, 0, 202, 0.0)
    assert took > 0
    assert 0 < cache.questions[-1][3] <= 1
    scheduler.matched_tokens(make_request("later", PROMPT), 0)
    assert cache.questions[-1][5] == []


# --- lookups and loads ------------------------------------------------------------------------------------------------


def test_what_is_found_is_promised_asynchronously_and_loaded(make, cache, make_request, step, blocks) -> None:
    cache.stored.update(keys_of(PROMPT)[:3])
    scheduler, request = make(), make_request("r", PROMPT)
    assert scheduler.matched_tokens(request, BLOCK) == (2 * BLOCK, True)
    scheduler.allocated(request, blocks([7, 8, 9, 10, 11]), 2 * BLOCK)
    (load,) = scheduler.build_meta(step()).loads
    assert (load.request_id, load.indices, load.blocks) == ("r", [1, 2], [8, 9])
    assert scheduler.build_meta(step()).loads == []
    assert cache.leases == {load.lease}


def test_asking_again_changes_nothing_and_leaks_no_lease(make, cache, make_request, blocks, step) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler, request = make(), make_request("r", PROMPT)
    for _ in range(300):
        assert scheduler.matched_tokens(request, 0) == (4 * BLOCK, True)
        assert len(cache.leases) == 1
    assert 1 < len(cache.named("lookup")) < 10
    assert len({tag for _, _, _, tag in cache.named("lookup")}) == 1
    assert scheduler.finished(request, []) is False
    assert cache.leases == set()


def test_one_token_is_left_to_compute(make, cache, make_request) -> None:
    prompt = PROMPT[:16]
    cache.stored.update(keys_of(prompt))
    assert make().matched_tokens(make_request("r", prompt), 0) == (4 * BLOCK - 1, True)


def test_a_prompt_that_is_found_whole_is_loaded_whole(make, cache, make_request, step, blocks) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler, request = make(), make_request("r", PROMPT[:16])
    tokens, waits = scheduler.matched_tokens(request, BLOCK)
    assert (tokens, waits) == (3 * BLOCK - 1, True)
    scheduler.allocated(request, blocks([7, 8, 9, 10]), tokens)
    assert sum(scheduler.hit_sources(request, tokens).values()) in (0, tokens)
    (order,) = scheduler.build_meta(step()).loads
    assert (order.indices, order.blocks) == ([1, 2, 3], [8, 9, 10])


def test_a_block_is_not_loaded_for_the_sake_of_the_last_token(make, cache, make_request) -> None:
    prompt = PROMPT[:16]
    cache.stored.update(keys_of(prompt))
    assert make().matched_tokens(make_request("r", prompt), 3 * BLOCK) == (0, False)


def test_a_lease_that_vllm_does_not_use_is_released(make, cache, make_request, blocks, step) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.allocated(request, blocks([1, 2, 3, 4, 5]), 0)
    assert scheduler.build_meta(step()).loads == []
    assert cache.leases == set()


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"load_policy": "never"}, {}),
        ({"min_blocks": 5}, {}),
        ({}, {"skip_reading_prefix_cache": True}),
        ({}, {"resumable": True}),
    ],
)
def test_nothing_is_promised(make, cache, make_request, settings, fields) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler, request = make(**settings), make_request("r", PROMPT, **fields)
    assert scheduler.matched_tokens(request, 0) == (0, False)
    scheduler.finished(request, [])
    assert cache.leases == set()


def test_without_a_server_everything_is_a_miss_and_later_not(make, cache, make_request) -> None:
    cache.stored.update(keys_of(PROMPT))
    cache.is_there = False
    scheduler = make()
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (0, False)
    cache.is_there = True
    assert scheduler.matched_tokens(make_request("s", PROMPT), 0) == (4 * BLOCK, True)
    assert scheduler.stats.data["lookups:error"] == 1
    assert scheduler.stats.data["lookups:hit"] == 1


def test_a_salt_separates(make, cache, make_request) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler = make()
    assert scheduler.matched_tokens(make_request("r", PROMPT, cache_salt="tenant"), 0) == (0, False)
    assert scheduler.matched_tokens(make_request("s", PROMPT), 0) == (4 * BLOCK, True)


def test_a_salt_is_a_tenant(make, cache, make_request, step) -> None:
    def ask_and_save(scheduler, name: str, salt: str | None) -> set[tuple[str, str | None]]:
        cache.tenants.clear()
        scheduler.matched_tokens(make_request(name, PROMPT, cache_salt=salt), 0)
        saves = scheduler.build_meta(step(new={name: ([1, 2, 3, 4, 5], 0, 18)})).saves
        return {*cache.tenants, *(("save", order.tenant) for order in saves)}

    names = set()
    for number, salt in enumerate(["tenant", "tenant", "other"]):
        asked = ask_and_save(make(), f"r{number}", salt)
        [name] = {tenant for _, tenant in asked}
        assert {kind for kind, _ in asked} == {"lookup", "save"}
        assert name is not None
        assert salt not in name, "a salt may be a secret"
        names.add(name)
    assert len(names) == 2
    assert ask_and_save(make(), "n", None) == {("lookup", None), ("save", None)}
    assert ask_and_save(make(tenants="off"), "o", "tenant") == {("lookup", None), ("save", None)}


def test_unknown_extra_keys_are_not_cached(make, cache, make_request, step, monkeypatch) -> None:
    from pegaflow.connector import compat

    unknown = lambda *_: ((("novelty", 1, 2),), 0)  # noqa: E731
    monkeypatch.setattr(compat.kv_cache_utils, "generate_block_hash_extra_keys", unknown)
    scheduler, request = make(), make_request("r", PROMPT, cache_salt="salt")
    assert scheduler.matched_tokens(request, 0) == (0, False)
    assert scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)})).saves == []
    assert scheduler.stats.data["uncacheable_requests"] == 1


def test_a_failed_load_is_not_tried_again(make, cache, make_request, step, blocks) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.allocated(request, blocks([1, 2, 3, 4, 5]), 4 * BLOCK)
    scheduler.build_meta(step())
    report(scheduler, received={"r"}, failed_loads={"r"})
    assert scheduler.matched_tokens(request, 0) == (0, False)
    # It is computed, and offered again from the first block on.
    (save,) = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)})).saves
    assert (save.depth, save.blocks) == (0, [1, 2, 3, 4])


def test_an_aborted_load_is_cancelled_and_its_blocks_are_not_asked_for(make, cache, make_request, step, blocks) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.allocated(request, blocks([1, 2, 3, 4, 5]), 4 * BLOCK)
    (load,) = scheduler.build_meta(step()).loads
    request.num_computed_tokens = 16
    # vLLM itself keeps the blocks of a request that it finds loading; both would free them twice.
    assert scheduler.finished(request, [1, 2, 3, 4]) is False
    meta = scheduler.build_meta(step())
    assert (meta.cancelled, meta.saves, meta.finished) == ([load.operation], [], [])


# --- loads out of the arena -------------------------------------------------------------------------------------------


@pytest.fixture
def in_dram(cache: Any) -> Any:
    """A cache that tells where the prompt's blocks lie."""
    cache.stored.update(keys_of(PROMPT))
    cache.dram_arena = ARENA
    return cache


def run(scheduler: PegaScheduler, request: Any, step: Any, blocks: Any, computed: int = 0) -> Any:
    """The request is scheduled with what was found; the orders of its step."""
    tokens, waits = scheduler.matched_tokens(request, computed)
    scheduler.allocated(request, blocks(range(10, 15)), tokens)
    if waits:
        return scheduler.build_meta(step())
    done = computed + tokens
    return scheduler.build_meta(step(new={request.request_id: (list(range(10, 15)), done, len(PROMPT) - done)}))


def test_an_idle_engine_loads_within_the_step(make, in_dram, make_request, step, blocks) -> None:
    in_dram.shards = 2
    scheduler, request = make(workers=2, arena=ARENA, sync_load_bytes=0), make_request("r", PROMPT)
    assert scheduler.matched_tokens(request, BLOCK) == (3 * BLOCK, False)
    meta = run(scheduler, request, step, blocks, BLOCK)
    (load,) = meta.loads
    assert (load.is_sync, load.arena, load.indices, load.blocks) == (True, ARENA, [1, 2, 3], [11, 12, 13])
    assert load.places_of(0) == b"".join(place.to_bytes(4, "little") for place in (1, 2, 3))
    assert load.places_of(1) == b"".join(place.to_bytes(4, "little") for place in (101, 102, 103))
    assert 59 < load.deadline < 61
    # What it brings is not saved, and nobody cancels it: later steps run after it anyway.
    assert meta.saves == []
    request.num_computed_tokens = len(PROMPT)
    assert scheduler.finished(request, [10, 11, 12, 13, 14]) is False
    assert scheduler.build_meta(step()).cancelled == []


def test_a_lease_on_places_lasts_a_minute_at_least(make, in_dram, make_request) -> None:
    make(arena=ARENA, lease_ms=5_000).matched_tokens(make_request("r", PROMPT), 0)
    make(lease_ms=5_000).matched_tokens(make_request("s", PROMPT), 0)
    assert [lease for _, _, lease, _ in in_dram.named("lookup")] == [60.0, 5.0]


@pytest.mark.parametrize(("budget", "waits"), [("4MiB", False), (4 << 20, False), ("3.9MiB", True), (0, True)])
def test_a_busy_engine_loads_within_the_step_up_to_a_limit(
    make, in_dram, make_request, step, blocks, budget, waits
) -> None:
    scheduler = make(arena=ARENA, sync_load_bytes=budget)
    scheduler.build_meta(step(new={"other": ([1], 0, 1)}))
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, waits)
    (load,) = run(scheduler, make_request("s", PROMPT), step, blocks).loads
    # Either way the workers copy themselves.
    assert (load.is_sync, load.arena) == (not waits, ARENA)


def test_an_engine_is_busy_until_its_requests_are_over(make, in_dram, make_request, step) -> None:
    scheduler, other = make(arena=ARENA, sync_load_bytes=0), make_request("other", range(3))
    scheduler.matched_tokens(other, 0)
    scheduler.build_meta(step(new={"other": ([1], 0, 3)}))
    scheduler.build_meta(step())
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, True)
    scheduler.finished(other, [1])
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, False)
    scheduler.build_meta(step(new={"silent": ([1], 0, 3)}))
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, True)
    scheduler.build_meta(step(finished={"silent"}))
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, False)
    scheduler.build_meta(step(new={"gone": ([1], 0, 3)}))
    scheduler.build_meta(step(preempted={"gone"}))
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, False)


def test_the_limit_holds_for_all_requests_of_a_step(make, in_dram, make_request, step, blocks) -> None:
    scheduler = make(arena=ARENA, sync_load_bytes="8MiB")
    answers = []
    for name in ("a", "b", "c"):
        request = make_request(name, PROMPT)
        tokens, waits = scheduler.matched_tokens(request, 0)
        scheduler.allocated(request, blocks(range(5)), tokens)
        answers.append(waits)
    assert answers == [False, False, True]
    scheduler.build_meta(step())
    assert scheduler.matched_tokens(make_request("d", PROMPT), 0) == (4 * BLOCK, False)


def test_a_promise_that_vllm_has_no_room_for_is_made_anew(make, in_dram, make_request, step, blocks) -> None:
    scheduler, request = make(arena=ARENA, sync_load_bytes=0), make_request("r", PROMPT)
    assert scheduler.matched_tokens(request, 0) == (4 * BLOCK, False)
    # No room: another request runs meanwhile, and vLLM asks again.
    assert scheduler.build_meta(step(new={"other": ([1], 0, 1)})).loads == []
    assert scheduler.matched_tokens(request, 0) == (4 * BLOCK, True)
    assert len(in_dram.leases) == 1
    scheduler.allocated(request, blocks(range(5)), 4 * BLOCK)
    (load,) = scheduler.build_meta(step()).loads
    assert not load.is_sync


def test_a_synchronous_load_that_no_worker_saw_gives_its_lease_back(make, in_dram, make_request, step, blocks) -> None:
    scheduler, request = make(arena=ARENA), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.allocated(request, blocks(range(5)), 4 * BLOCK)
    assert scheduler.finished(request, []) is False
    meta = scheduler.build_meta(step())
    assert (meta.loads, meta.cancelled) == ([], [])
    assert in_dram.leases == set()


@pytest.mark.parametrize("there", [None, b"another of 16 by"])
def test_places_that_a_worker_does_not_reach_are_not_used(make, in_dram, make_request, step, blocks, there) -> None:
    scheduler = make(workers=2, arena=None)
    if there is not None:
        report(scheduler, arenas=Counter({there: 2}))
    # One worker of two is not enough.
    report(scheduler, arenas=Counter({ARENA: 1}))
    (load,) = run(scheduler, make_request("r", PROMPT), step, blocks).loads
    assert (load.is_sync, load.arena, load.places, load.indices) == (False, b"", b"", [0, 1, 2, 3])


def test_workers_that_move_to_another_arena(make, in_dram, make_request, step, blocks) -> None:
    scheduler = make(arena=ARENA)
    report(scheduler, arenas=Counter({ARENA: -1}))
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, True)
    report(scheduler, arenas=Counter({ARENA: 1}))
    assert scheduler.matched_tokens(make_request("s", PROMPT), 0) == (4 * BLOCK, False)


def test_blocks_not_all_in_dram_are_loaded_through_the_cache(make, in_dram, make_request, step, blocks) -> None:
    in_dram.dram_arena = None
    (load,) = run(make(arena=ARENA), make_request("r", PROMPT), step, blocks).loads
    assert (load.is_sync, load.arena) == (False, b"")


def test_places_of_the_wrong_number_are_not_used(make, in_dram, make_request) -> None:
    in_dram.shards = 2  # the scheduler knows of one
    assert make(arena=ARENA).matched_tokens(make_request("r", PROMPT), 0) == (4 * BLOCK, True)


def test_synchronous_loads_can_be_switched_off(make, in_dram, make_request, step, blocks) -> None:
    (load,) = run(make(arena=ARENA, sync_loads=False), make_request("r", PROMPT), step, blocks).loads
    assert (load.is_sync, load.arena) == (False, ARENA)


# --- saves ------------------------------------------------------------------------------------------------------------


def test_full_blocks_of_a_prompt_are_saved_once(make, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    (first,) = scheduler.build_meta(step(new={"r": ([5, 6, 7], 0, 10)})).saves
    assert (first.depth, first.blocks, first.parent) == (0, [5, 6], bytes(32))
    (second,) = scheduler.build_meta(step(cached={"r": ([8, 9], 10, 8)})).saves
    keys = keys_of(PROMPT)
    assert (second.depth, second.blocks, second.parent) == (2, [7, 8], keys[1])
    assert second.keys == keys[2] + keys[3]
    assert scheduler.build_meta(step(cached={"r": ([], 18, 1)})).saves == []


def test_what_was_found_is_not_saved_again(make, cache, make_request, step) -> None:
    cache.stored.update(keys_of(PROMPT)[:3])
    scheduler, request = make(load_policy="never"), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    (save,) = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)})).saves
    assert (save.depth, save.blocks) == (3, [4])


def test_a_decode_block_is_saved_when_its_last_token_is_computed(make, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
    request.all_token_ids += [1]  # 19 known, the last one not computed yet
    assert scheduler.build_meta(step(cached={"r": ([], 18, 1)})).saves == []
    request.all_token_ids += [2]  # 20 known, and this step computes the 20th
    (save,) = scheduler.build_meta(step(cached={"r": ([6], 19, 1)})).saves
    assert (save.depth, save.blocks, save.keys) == (4, [5], keys_of([*PROMPT, 1, 2])[4])


def test_decode_blocks_are_left_out_if_so_configured(make, make_request, step) -> None:
    scheduler, request = make(save_decode=False), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    request.all_token_ids += [1, 2, 3]
    (save,) = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5, 6], 0, 21)})).saves
    assert save.blocks == [1, 2, 3, 4]


def test_placeholders_of_asynchronous_scheduling_are_not_saved(make, make_request, step) -> None:
    """The scheduler runs ahead: it counts tokens as computed whose value it does not know yet."""
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
    # Two steps ahead, 20 tokens would be computed, but only 18 are known.
    for computed in (18, 19, 20):
        assert scheduler.build_meta(step(cached={"r": ([], computed, 1)})).saves == []
    request.all_token_ids += [1, 2]
    (save,) = scheduler.build_meta(step(cached={"r": ([6], 21, 1)})).saves
    assert save.keys == keys_of([*PROMPT, 1, 2])[4]


def test_drafts_that_may_be_rejected_are_not_saved(make, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
    request.all_token_ids += [1]
    # One known token and five drafts: the block of tokens 16 to 19 is full but not final.
    assert scheduler.build_meta(step(cached={"r": ([6], 18, 6)})).saves == []
    # Two drafts were accepted, and one token sampled after them.
    request.all_token_ids += [2, 3, 4]
    (save,) = scheduler.build_meta(step(cached={"r": ([], 21, 6)})).saves
    assert (save.blocks, save.keys) == ([5], keys_of([*PROMPT, 1, 2, 3, 4])[4])


def test_a_finished_request_keeps_its_blocks_until_its_saves_have_ended(make, make_request, step) -> None:
    scheduler, request = make(workers=2), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    (save,) = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)})).saves
    ended(scheduler, save.operation)  # one of two workers
    request.num_computed_tokens = 18
    assert scheduler.finished(request, [1, 2, 3, 4, 5]) is True
    meta = scheduler.build_meta(step())
    assert (meta.finished, meta.saves) == (["r"], [])


def test_a_finished_request_without_saves_in_flight_frees_its_blocks(make, make_request, step) -> None:
    scheduler, request = make(workers=2), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    (save,) = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)})).saves
    ended(scheduler, save.operation, times=2)
    request.num_computed_tokens = 18
    assert scheduler.finished(request, [1, 2, 3, 4, 5]) is False
    assert scheduler.build_meta(step()).finished == []


def test_blocks_that_become_final_at_the_end_are_saved_after_it(make, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    (save,) = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)})).saves
    ended(scheduler, save.operation)
    request.all_token_ids += [1, 2, 3]  # known at once, as after accepted drafts
    request.num_computed_tokens = 20
    assert scheduler.finished(request, [1, 2, 3, 4, 5]) is True
    meta = scheduler.build_meta(step())
    (save,) = meta.saves
    assert (save.depth, save.blocks, meta.finished) == (4, [5], ["r"])


def test_the_last_sampled_token_is_not_computed(make, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
    request.all_token_ids += [1, 2]
    # Asynchronous scheduling counts a step in flight that would compute the last token.
    request.num_computed_tokens = 20
    scheduler.finished(request, [1, 2, 3, 4, 5])
    assert scheduler.build_meta(step()).saves == []


def test_a_preempted_request_is_fenced_and_starts_anew(make, cache, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
    request.num_preemptions, request.num_computed_tokens = 1, 0
    meta = scheduler.build_meta(step(preempted={"r"}))
    assert (meta.preempted, meta.saves) == (["r"], [])
    assert scheduler.build_meta(step()).preempted == []
    # It comes back in other blocks; nothing was found, so everything is offered again.
    assert scheduler.matched_tokens(request, 0) == (0, False)
    (save,) = scheduler.build_meta(step(cached={"r": ([11, 12, 13, 14, 15], 0, 18)}, resumed={"r"})).saves
    assert (save.depth, save.blocks) == (0, [11, 12, 13, 14])


def test_a_preemption_that_the_step_does_not_tell_of_is_seen(make, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
    request.num_preemptions = 1
    assert scheduler.build_meta(step()).preempted == ["r"]
    request.num_preemptions = 2
    assert scheduler.finished(request, []) is False
    assert scheduler.build_meta(step()).preempted == ["r"]


def test_after_a_dropped_save_nothing_more_of_the_chain_is_saved(make, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    (save,) = scheduler.build_meta(step(new={"r": ([1, 2], 0, 8)})).saves
    report(scheduler, saves=Counter([save.operation]), dropped={save.operation})
    assert scheduler.build_meta(step(cached={"r": ([3, 4, 5], 8, 10)})).saves == []


def test_long_prompts_are_saved_in_bounded_runs(make, make_request, step) -> None:
    scheduler = make()
    tokens = list(range(5000 * BLOCK))
    scheduler.matched_tokens(make_request("r", tokens), 0)
    saves = scheduler.build_meta(step(new={"r": (list(range(5000)), 0, len(tokens))})).saves
    assert [(save.depth, len(save.blocks)) for save in saves] == [(0, 4096), (4096, 904)]
    assert saves[1].parent == saves[0].keys[-32:]


# --- epochs and switches ----------------------------------------------------------------------------------------------


def test_a_reset_starts_an_epoch_in_which_nothing_is_known(make, cache, make_request, step) -> None:
    scheduler, request = make(), make_request("r", PROMPT)
    scheduler.matched_tokens(request, 0)
    before = scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 16)})).instance
    request.all_token_ids += [1, 2, 3]
    request.num_computed_tokens = 20
    assert scheduler.finished(request, [1, 2, 3, 4, 5]) is True
    scheduler.reset()
    meta = scheduler.build_meta(step())
    # What was computed with the old weights is not saved any more, but its request is still told of.
    assert (meta.saves, meta.finished) == ([], ["r"])
    assert before == "engine/0"
    assert meta.instance.startswith("engine/0#")
    scheduler.matched_tokens(make_request("s", PROMPT), 0)
    assert cache.named("lookup")[-1][0] == meta.instance
    scheduler.reset()
    assert scheduler.build_meta(step()).instance != meta.instance


def test_the_kill_switch_stops_lookups_and_saves(make, cache, make_request, step, tmp_path) -> None:
    cache.stored.update(keys_of(PROMPT))
    switch = tmp_path / "off"
    switch.touch()
    scheduler, request = make(kill_switch=str(switch)), make_request("r", PROMPT)
    assert scheduler.matched_tokens(request, 0) == (0, False)
    assert scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)})).saves == []
    assert cache.calls == []


def test_a_worker_that_refuses_stops_the_scheduler_too(make, cache, make_request) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler = make()
    report(scheduler, refused="no identity")
    assert scheduler.matched_tokens(make_request("r", PROMPT), 0) == (0, False)
    assert cache.calls == []


def test_a_worker_that_refuses_later_ends_what_was_ordered(make, cache, make_request, step, blocks) -> None:
    cache.stored.update(keys_of(PROMPT))
    scheduler = make()
    loading, waiting, saving = make_request("l", PROMPT), make_request("w", PROMPT), make_request("s", range(200, 218))
    tokens, _ = scheduler.matched_tokens(loading, 0)
    scheduler.allocated(loading, blocks(range(5)), tokens)
    (load,) = scheduler.build_meta(step()).loads
    cache.leases.remove(load.lease)
    assert scheduler.matched_tokens(waiting, 0) == (tokens, True)
    assert scheduler.matched_tokens(saving, 0) == (0, False)
    saving.num_computed_tokens = 18
    assert scheduler.finished(saving, [11, 12, 13, 14, 15])
    report(scheduler, refused="other weights")
    assert cache.leases == set()
    meta = scheduler.build_meta(step())
    assert (meta.loads, meta.saves, meta.cancelled, meta.finished) == ([], [], [load.operation], ["s"])
    assert scheduler.matched_tokens(waiting, 0) == (0, False)
