"""The verdict must be able to fail: each test spoils one thing in a story that ended well."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from prompts import Prompt, follow_up, story, together
from report import Row, passed, table, verdict

GOOD = [
    Row("restarted", True, "a", 330, 320, 160, 320, {"gpu": 0, "nvme": 320}, 9.0, True),
    Row("restarted", True, "b", 330, 320, 160, 320, {"gpu": 160, "dram": 160}, None, True),
    Row("restarted", True, "c", 330, 320, 160, 320, None, 9.0, True),
    Row("cold", False, "a", 330, 0, 0, 0, {"gpu": 0}, 9.0, True),
]


def spoiled(place: int, **changes: Any) -> list[Row]:
    return [dataclasses.replace(row, **changes) if number == place else row for number, row in enumerate(GOOD)]


def test_a_good_story_passes() -> None:
    outcome = verdict(GOOD)
    assert passed(outcome)
    assert outcome["hit_ratio_after_restart"] == 1.0
    assert outcome["restart_warm_tokens_by_tier"] == {"gpu": 160, "nvme": 320, "dram": 160}
    assert "nvme 320" in table(GOOD)


@pytest.mark.parametrize(
    ("rows", "broken"),
    [
        ([], "restart_warm"),
        (spoiled(0, same_tokens=False), "tokens_equal"),
        (spoiled(3, same_tokens=False), "tokens_equal"),
        (spoiled(2, cached_tokens=0), "restart_warm"),
        (spoiled(0, tiers={"gpu": 320}), "restart_warm"),
    ],
)
def test_one_bad_row_fails_it(rows: list[Row], broken: str) -> None:
    outcome = verdict(rows)
    assert outcome[broken] is False
    assert not passed(outcome)


def test_what_an_earlier_prompt_brought_may_come_from_vllm() -> None:
    assert passed(verdict(spoiled(0, tiers={"gpu": 320}, only_in_store_tokens=0)))


def test_too_few_hits_fail_it() -> None:
    outcome = verdict(spoiled(0, cached_tokens=256))
    assert outcome["restart_warm"] is True
    assert outcome["hit_ratio_after_restart"] < 0.95
    assert not passed(outcome)


def test_hits_beyond_what_could_hit_do_not_make_up_for_misses() -> None:
    assert verdict([*spoiled(0, cached_tokens=32), GOOD[1], GOOD[1]])["hit_ratio_after_restart"] < 0.95


def test_what_could_hit_is_whole_blocks_with_one_token_left_to_compute() -> None:
    assert Prompt("x", tuple(range(33))).could_hit_tokens(32) == 32
    assert Prompt("x", tuple(range(32))).could_hit_tokens(32) == 0
    assert Prompt("x", tuple(range(200)), known_tokens=100).could_hit_tokens(32) == 96


def test_shared_tokens_are_those_of_the_longest_common_prefix() -> None:
    asked = [Prompt("x", tuple(range(40))), Prompt("y", (*range(70), 0, 0)), Prompt("z", (9,))]
    assert Prompt("w", tuple(range(300))).shared_tokens(asked, 32) == 64
    assert Prompt("w", tuple(range(35))).shared_tokens(asked, 32) == 32
    assert Prompt("w", tuple(range(300))).shared_tokens([], 32) == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_the_story_has_what_it_says(seed: int) -> None:
    prompts = [*story(seed), *together(seed)]
    assert prompts == [*story(seed), *together(seed)]
    lengths = [len(prompt.tokens) for prompt in prompts]
    assert min(lengths) == 100
    assert max(lengths) == 1500
    assert all(token < 512 for prompt in prompts for token in prompt.tokens)
    assert len({prompt.tokens for prompt in prompts}) == len(prompts)
    turn = next(prompt for prompt in prompts if prompt.name == "conversation, turn 1")
    answer = tuple(random.Random(seed).randrange(512) for _ in range(turn.max_tokens))
    after = follow_up(turn, answer, seed)
    # Blocks that filled while decoding are among those that it could hit.
    assert after.could_hit_tokens(32) > len(turn.tokens)
