"""Prompts computed by one engine for another: what is told, who waits for it, and that the wait ends."""

from __future__ import annotations

import itertools
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


def end(scheduler: PegaScheduler, request: Any, step: Any, blocks: int) -> dict[str, Any] | None:
    """Computes and ends a request; what it is told."""
    ids = list(range(1, blocks + 2))
    scheduler.matched_tokens(request, 0)
    tokens = request.num_prompt_tokens
    scheduler.build_meta(step(new={request.request_id: (ids, 0, tokens)}))
    request.num_computed_tokens = tokens
    return scheduler.ended(request, ids)[1]


def test_who_asks_is_told_keys_of_the_prompts_blocks(make, make_request, step) -> None:
    asked = {"pegaflow_keys": True}
    told = end(make(), make_request("r", PROMPT, kv_transfer_params=asked), step, 4)
    assert told == {
        "pegaflow_keys": {
            "instance": "engine/0",
            "tenant": None,
            "prompt_tokens": 18,
            "tokens": [4, 8, 12, 16],
            "keys": [key.hex() for key in keys()],
        }
    }
    both = end(make(), make_request("r", PROMPT, kv_transfer_params=asked | ASKED), step, 4)
    assert both is not None
    assert both["pegaflow_tokens"] == 16
    assert "pegaflow_keys" in both
    assert end(make(), make_request("r", PROMPT[:3], kv_transfer_params=asked), step, 0) is None, "no whole block"
    for other in ({"pegaflow_keys": 1}, {"pegaflow_keys": "true"}, None):
        assert end(make(), make_request("r", PROMPT, kv_transfer_params=other), step, 4) is None


def test_of_a_long_prompt_a_few_keys_are_told_down_to_its_last_block(make, make_request, step) -> None:
    prompt = list(range(4 * 1001 + 1))
    told = end(make(), make_request("r", prompt, kv_transfer_params={"pegaflow_keys": True}), step, 1001)
    assert told is not None
    told = told["pegaflow_keys"]
    packed = KeyChain().extend(prompt, BLOCK)
    assert len(told["keys"]) == len(told["tokens"]) == 32
    assert told["tokens"][-1] == 4004
    assert told["tokens"] == sorted(set(told["tokens"]))
    for tokens, key in zip(told["tokens"], told["keys"], strict=True):
        assert key == packed[(tokens // BLOCK - 1) * 32 : tokens // BLOCK * 32].hex()
    assert max(after - before for before, after in itertools.pairwise([0, *told["tokens"]])) <= 32 * BLOCK


def test_keys_of_a_tenant_are_told_with_its_name_and_after_a_reset_with_another_instance(
    make, make_request, step
) -> None:
    asked = {"pegaflow_keys": True}
    scheduler = make()
    told = end(scheduler, make_request("r", PROMPT, kv_transfer_params=asked, cache_salt="secret"), step, 4)
    assert told is not None
    assert told["pegaflow_keys"]["tenant"].startswith("salt-")
    assert not set(told["pegaflow_keys"]["keys"]) & {key.hex() for key in keys()}
    scheduler.reset()
    told = end(scheduler, make_request("s", PROMPT, kv_transfer_params=asked), step, 4)
    assert told is not None
    assert told["pegaflow_keys"]["instance"].startswith("engine/0#")


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
