"""Prompts computed by one engine for another: what is told, who waits for it, and that the wait ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from pegaflow._native import KeyChain
from pegaflow.connector.config import ConnectorConfig, KillSwitch
from pegaflow.connector.scheduler import PegaScheduler
from pegaflow.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4
PROMPT = list(range(1000, 1018))
ASKED = {"pegaflow_handoff": True}


@pytest.fixture
def make(cache: Any, clock: Any) -> Callable[..., PegaScheduler]:
    def make(**settings: Any) -> PegaScheduler:
        config = ConnectorConfig.from_extra(settings)
        return PegaScheduler(config, cache, "engine/0", BLOCK, 1 << 20, 1, KillSwitch(config), clock)

    return make


def keys() -> list[bytes]:
    packed = KeyChain().extend(PROMPT, BLOCK)
    return [packed[at : at + 32] for at in range(0, len(packed), 32)]


def test_who_asks_is_told_what_is_in_the_cache_or_about_to_be(make, make_request, step) -> None:
    for parameters, told in (
        (ASKED, {"pegaflow_tokens": 16}),
        (None, None),
        ({"pegaflow_handoff": 1}, None),
        ({"other": True}, None),
    ):
        scheduler, request = make(), make_request("r", PROMPT, kv_transfer_params=parameters)
        scheduler.matched_tokens(request, 0)
        scheduler.build_meta(step(new={"r": ([1, 2, 3, 4, 5], 0, 18)}))
        request.num_computed_tokens = 18
        assert scheduler.ended(request, [1, 2, 3, 4, 5]) == (True, told)


def test_a_request_that_was_never_seen_is_told_nothing(make, make_request) -> None:
    assert make().ended(make_request("r", PROMPT, kv_transfer_params=ASKED), []) == (False, None)


def test_blocks_of_another_engine_are_waited_for_and_no_longer_than_allowed(make, cache, clock, make_request) -> None:
    scheduler = make(handoff_wait_ms=500)
    request = make_request("r", PROMPT, kv_transfer_params={"pegaflow_tokens": 16})
    cache.stored.update(keys()[:2])
    assert scheduler.matched_tokens(request, 0) == (None, False)
    assert scheduler.matched_tokens(request, 0) == (None, False)
    assert len(cache.named("lookup")) == 1, "asked again only after a while"
    clock.now += 0.006
    assert scheduler.matched_tokens(request, 0) == (None, False)
    assert len(cache.named("lookup")) == 2
    cache.stored.update(keys())
    clock.now += 0.006
    assert scheduler.matched_tokens(request, 0)[0] == 16
    # What never comes is computed.
    late = make_request("late", list(range(18)), kv_transfer_params={"pegaflow_tokens": 16})
    assert scheduler.matched_tokens(late, 0) == (None, False)
    clock.now += 0.51
    assert scheduler.matched_tokens(late, 0) == (0, False)
    assert {name: count for name, count in scheduler.stats.reduce().items() if name.startswith("handoffs")} == {
        "handoffs:late": 1,
        "handoffs:waited": 2,
    }


@pytest.mark.parametrize("tokens", [None, True, "16", -1, 0, 3, 1e9, [16]])
def test_what_makes_no_sense_is_not_waited_for(make, make_request, tokens: Any) -> None:
    request = make_request("r", PROMPT, kv_transfer_params={"pegaflow_tokens": tokens})
    assert make().matched_tokens(request, 0) == (0, False)


def test_more_than_the_prompt_has_is_not_waited_for(make, cache, make_request) -> None:
    cache.stored.update(keys())
    request = make_request("r", PROMPT, kv_transfer_params={"pegaflow_tokens": 1 << 40})
    assert make().matched_tokens(request, 0)[0] == 16


def test_nobody_waits_for_a_cache_that_is_gone_or_must_not_be_used(make, cache, make_request, clock) -> None:
    request = make_request("r", PROMPT, kv_transfer_params={"pegaflow_tokens": 16})
    assert make(load_policy="never").matched_tokens(request, 0) == (0, False)
    assert make(handoff_wait_ms=0).matched_tokens(request, 0) == (0, False)
    cache.is_there = False
    assert make().matched_tokens(request, 0) == (0, False)


def test_the_bound_is_checked() -> None:
    with pytest.raises(InvalidInputError, match="handoff_wait_ms is 60001"):
        ConnectorConfig.from_extra({"handoff_wait_ms": 60_001})
