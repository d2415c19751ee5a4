"""How prefills are timed: by the steps that computed them, whether one step is planned at a time or two."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from pegaflow.connector.prefill import PrefillTimes


def start(times: PrefillTimes, name: str, now: float, tokens: int = 1000) -> None:
    times.step_planned(tokens, now)
    times.started(name, 0, tokens, 5, 0.25, now)


def test_one_step_at_a_time() -> None:
    times = PrefillTimes(8192)
    start(times, "r", 10.0)
    times.first_token("r", 10.5)
    times.step_ended(10.5)
    assert times.take() == [(5, 0, 1000, 0.25, 0.5)]
    assert times.take() == []


def test_a_step_planned_while_another_runs_begins_at_its_end() -> None:
    times = PrefillTimes(8192)
    start(times, "first", 10.0)
    start(times, "second", 10.25)
    times.first_token("first", 11.0)
    times.step_ended(11.0)
    start(times, "third", 11.25)
    times.first_token("second", 11.5)
    times.step_ended(11.5)
    times.first_token("third", 12.5)
    times.step_ended(12.5)
    assert [computed[4] for computed in times.take()] == [1.0, 0.5, 1.0]


def test_what_says_nothing_is_not_told() -> None:
    times = PrefillTimes(8192)
    start(times, "short", 1.0, tokens=63)
    start(times, "preempted", 2.0)
    times.dropped("preempted")
    for name in ("short", "preempted", "unknown"):
        times.first_token(name, 3.0)
    # It never began, as far as anybody knows.
    start(times, "stuck", 4.0)
    times.first_token("stuck", 5.0)
    assert times.take() == []


def test_reports_are_lost_rather_than_kept_for_ever() -> None:
    times = PrefillTimes(8192)
    for number in range(3000):
        start(times, f"r{number}", float(number))
        times.first_token(f"r{number}", number + 0.5)
        times.step_ended(number + 0.5)
    assert len(times.take()) == 64
    for number in range(3000):
        start(times, f"r{number}", 5000.0)
    assert len(times.waiting()) == 1024


def test_the_load_follows_the_steps_and_fades() -> None:
    times = PrefillTimes(1000)
    assert times.load_share(0.0) == 0.0
    for step in range(100):
        times.step_planned(500, 1.0 + step / 10)
        times.step_ended(1.0 + step / 10)
    assert times.load_share(10.9) == pytest.approx(0.5, abs=0.01)
    assert times.load_share(12.9) < 0.1
    times.step_planned(10**9, 13.0)
    assert times.load_share(13.0) <= 1.0
