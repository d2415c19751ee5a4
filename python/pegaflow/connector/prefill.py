"""How long vLLM takes to compute the tokens of a request, and how much others want the GPU: what the cache has to know
to decide whether a prefix is worth loading. Seen from the scheduler's side, by its own clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pegaflow.connector.port import Computed

# Fewer tokens say nothing of the speed: a forward reads all weights in any case.
_TOKENS_MIN = 64
# What was computed and not told yet; the oldest goes first.
_COMPUTED_MAX = 64
# Requests that are being computed at a time; more are not timed.
_RUNNING_MAX = 1_024
# The load of the GPU is an average over about this long.
_LOAD_S = 1.0
# With asynchronous scheduling a step is planned while another runs.
_STEPS_IN_FLIGHT_MAX = 2


@dataclass
class _Running:
    first_token: int
    end_token: int
    """One after the prompt's last token."""
    decision: int
    load_share: float
    started: float | None
    """When the step began that computes the first of them; none while an earlier one runs."""


class PrefillTimes:
    """Times the prefill of each request from the start of its first step to its first token."""

    def __init__(self, step_tokens_max: int) -> None:
        self._step_tokens_max = max(step_tokens_max, 1)
        self._running: dict[str, _Running] = {}
        self._computed: deque[Computed] = deque(maxlen=_COMPUTED_MAX)
        self._in_flight = 0
        self._load = 0.0
        self._load_at = 0.0

    def load_share(self, now: float) -> float:
        """The share of the tokens that a step can have which steps had lately, 0 to 1."""
        return self._load * math.exp(-max(now - self._load_at, 0.0) / _LOAD_S)

    def step_planned(self, tokens: int, now: float) -> None:
        """A step with so many tokens is handed to the workers."""
        if not tokens:
            return
        self._in_flight = min(self._in_flight + 1, _STEPS_IN_FLIGHT_MAX)
        kept = math.exp(-max(now - self._load_at, 0.0) / _LOAD_S)
        share = min(tokens / self._step_tokens_max, 1.0)
        # An idle time counts as a step without tokens.
        self._load = kept * self._load + (1.0 - kept) * share if self._load_at else share
        self._load_at = now

    def started(
        self, request_id: str, first_token: int, end_token: int, decision: int, load_share: float, now: float
    ) -> None:
        """The step just planned is the first that computes tokens of the request."""
        if end_token - first_token >= _TOKENS_MIN and len(self._running) < _RUNNING_MAX:
            begins_now = self._in_flight <= 1
            started = now if begins_now else None
            self._running[request_id] = _Running(first_token, end_token, decision, load_share, started)

    def step_ended(self, now: float) -> None:
        """A step's output has come: whatever waited behind it begins."""
        self._in_flight = max(self._in_flight - 1, 0)
        for running in self._running.values():
            if running.started is None:
                running.started = now

    def waiting(self) -> list[str]:
        """The requests whose prefill is being timed."""
        return list(self._running)

    def first_token(self, request_id: str, now: float) -> None:
        """The request has its first token: its prompt is computed."""
        running = self._running.pop(request_id, None)
        if running is not None and running.started is not None and now > running.started:
            took = now - running.started
            self._computed.append((running.decision, running.first_token, running.end_token, running.load_share, took))

    def dropped(self, request_id: str) -> None:
        """The request was preempted, or is over without a token."""
        self._running.pop(request_id, None)

    def idle(self) -> None:
        """Nothing is being computed."""
        self._in_flight = 0

    def take(self) -> list[Computed]:
        """What was computed since the last call."""
        computed = list(self._computed)
        self._computed.clear()
        return computed
