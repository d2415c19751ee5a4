"""What is known of the blocks that running requests ask for. vLLM's scheduler owns it; no other thread touches it.

vLLM asks for one block at a time, again in each step until it is told. The first time the block goes into the step's
batch for the tier's thread; what that finds out holds until the last request that asked has ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(slots=True)
class Verdict:
    """Whether a block is there: `None` as long as that is not known."""

    deadline: float
    is_there: bool | None = None
    is_guess: bool = False
    """A miss because nobody could find out: the next request asks anew."""
    requests: set[str] = field(default_factory=set)


class Lookups:
    """Verdicts on blocks, by key."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._verdicts: dict[bytes, Verdict] = {}
        self._asked: dict[str, set[bytes]] = {}
        """The keys that each request has asked for."""
        self._batch: list[bytes] = []
        self.timeouts = 0
        """Blocks that were not answered in time, since this was last set."""

    def __len__(self) -> int:
        return len(self._verdicts)

    def ask(self, key: bytes, request: str) -> bool | None:
        """Whether the block is there; `None`: ask again in a later step."""
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = Verdict(self._clock() + self._timeout_s)
            self._batch.append(key)
        elif verdict.is_guess and request not in verdict.requests:
            verdict.is_there, verdict.is_guess, verdict.deadline = None, False, self._clock() + self._timeout_s
            self._batch.append(key)
        elif verdict.is_there is None and self._clock() >= verdict.deadline:
            verdict.is_there, verdict.is_guess = False, True
            self.timeouts += 1
        verdict.requests.add(request)
        self._asked.setdefault(request, set()).add(key)
        return verdict.is_there

    def take_batch(self) -> list[bytes]:
        """The blocks that were asked for since the last call, in the order in which they were."""
        batch, self._batch = self._batch, []
        return [key for key in batch if key in self._verdicts]

    def tell(self, keys: Iterable[bytes], *, are_there: bool, is_guess: bool = False) -> None:
        """What was found out about blocks. Those that nobody asks for any more are forgotten already."""
        for key in keys:
            if verdict := self._verdicts.get(key):
                verdict.is_there, verdict.is_guess = are_there, is_guess

    def forget(self, request: str) -> None:
        """A request has ended."""
        for key in self._asked.pop(request, ()):
            verdict = self._verdicts[key]
            verdict.requests.discard(request)
            if not verdict.requests:
                del self._verdicts[key]
