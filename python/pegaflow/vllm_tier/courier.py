"""The tier's own thread, the only one that waits for the cache. vLLM's scheduler hands it work and takes results.

What waits is bounded: work that finds the queue full is refused at once. Lookups go before copies. A copy is reported
only when the cache has said that it has ended, so that vLLM never reuses memory that may still be read or written.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from pegaflow.errors import PegaError
from pegaflow.vllm_tier.chains import block_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pegaflow.connector.port import CachePort, Ended
    from pegaflow.vllm_tier.chains import Run

logger = logging.getLogger("vllm.pegaflow")

_T = TypeVar("_T")

GROUP = SHARD = 0
_LEASE_S = 60.0
_IDLE_WAIT_S = 0.5
_BUSY_WAIT_S = 0.001
# Of chunks that are not there each costs a question of its own; what comes after so many counts as a miss.
_GAPS_MAX = 64
_WARNING_INTERVAL_S = 60.0


@dataclass(frozen=True)
class Lookup:
    """Which of these chunks are there?"""

    keys: Sequence[bytes]


@dataclass(frozen=True)
class Touch:
    """These chunks were used."""

    keys: Sequence[bytes]


@dataclass
class Transfer:
    """A job of vLLM: chunks to store, in runs, or to load."""

    job: int
    is_load: bool
    runs: Sequence[Run]
    started: float = 0.0
    pending: int = 0
    """Operations in flight, and one for the job itself as long as it is being started."""
    begun: set[bytes] = field(default_factory=set)
    """Chunks of which an operation was started."""
    failed: set[bytes] = field(default_factory=set)
    lost: int = 0
    """How many chunks were not copied."""

    @property
    def keys(self) -> list[bytes]:
        """All its chunks."""
        return [key for run in self.runs for key in run.keys]


@dataclass(frozen=True)
class Finished:
    """A job that ended: none of its copies can read or write any more."""

    job: int
    is_load: bool
    keys: Sequence[bytes]
    failed: frozenset[bytes]
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What a lookup has found out."""

    present: Sequence[bytes] = ()
    absent: Sequence[bytes] = ()
    unknown: Sequence[bytes] = ()
    """The cache could not be asked about these."""


class Courier:
    """A queue, the thread that works it off, and what came of it."""

    def __init__(
        self, cache: CachePort, instance: str, *, has_one_group: bool, queue_jobs: int, in_flight_jobs: int
    ) -> None:
        self._cache = cache
        self._instance = instance
        self._has_one_group = has_one_group
        self._queue_jobs = queue_jobs
        self._in_flight_jobs = in_flight_jobs
        self._changed = threading.Condition()
        """Guards all that follows up to the thread. Nobody waits for the cache while holding it."""
        self._questions: deque[Lookup | Touch] = deque()
        self._transfers: deque[Transfer] = deque()
        self._is_stopping = False
        self._is_working = False
        self._answers: deque[Answer] = deque()
        self._finished: deque[Finished] = deque()
        self._counts: Counter[tuple[str, str]] = Counter()
        # The thread's own.
        self._operations: dict[int, tuple[Transfer, dict[int, bytes]]] = {}
        """By number: the job, and the key of each chunk."""
        self._active: set[int] = set()
        """Jobs of which something is in flight."""
        self._cancelled: set[int] = set()
        self._numbers = itertools.count(1)
        self._next_warning: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="pegaflow-tier", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    # --- the scheduler's side: never waits, but in `drain` and `stop` -------------------------------------------------

    def ask(self, question: Lookup | Touch) -> bool:
        """Queues a question; whether there was room. A touch takes the queue's first half only."""
        with self._changed:
            waiting = len(self._questions) + len(self._transfers)
            room = self._queue_jobs if isinstance(question, Lookup) else self._queue_jobs // 2
            if self._is_stopping or waiting >= room:
                return False
            self._questions.append(question)
            self._changed.notify_all()
            return True

    def transfer(self, transfer: Transfer, *, is_off: bool = False) -> bool:
        """Queues a job; whether there was room. One that was refused has failed, and is reported as all others are.
        With `is_off` it is refused in any case.
        """
        with self._changed:
            waiting = len(self._questions) + len(self._transfers)
            if not self._is_stopping and not is_off and waiting < self._queue_jobs:
                self._transfers.append(transfer)
                self._changed.notify_all()
                return True
            self._refuse(transfer, "off" if is_off else "queue")
            return False

    def take_answers(self) -> list[Answer]:
        """What lookups have found out since the last call."""
        return _taken(self._answers)

    def take_finished(self) -> list[Finished]:
        """The jobs that ended since the last call."""
        return _taken(self._finished)

    def take_counts(self) -> Counter[tuple[str, str]]:
        """What went wrong since the last call: blocks, by what was not done and why."""
        with self._changed:
            counts, self._counts = self._counts, Counter()
        return counts

    def count(self, what: str, why: str, blocks: int) -> None:
        """Counts blocks of which something was not done."""
        with self._changed:
            self._counts[what, why] += blocks

    def drain(self, limit_s: float) -> None:
        """Returns when no copy runs: those that have not begun fail, those that run are waited for.

        Raises `RuntimeError` if they have not ended after `limit_s`.
        """
        start = time.monotonic()
        next_warning = start + 5.0
        with self._changed:
            self._refuse_waiting()
            while self._is_working or self._active:
                left = start + limit_s - time.monotonic()
                if left <= 0:
                    raise RuntimeError(
                        f"PegaFlow: {len(self._active)} jobs have not ended in {limit_s:.0f} s; their memory may not "
                        "be used before"
                    )
                if time.monotonic() >= next_warning:
                    next_warning = time.monotonic() + 10.0
                    logger.warning("PegaFlow: waiting for %d jobs of the tier to end", len(self._active))
                self._changed.wait(min(left, 1.0))

    def stop(self, limit_s: float) -> bool:
        """Ends the thread: what has not begun fails, what runs is cut short. Whether no copy runs any more."""
        with self._changed:
            self._is_stopping = True
            self._refuse_waiting()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(limit_s)
        return not self._thread.is_alive() and not self._operations

    def _refuse_waiting(self) -> None:
        """Everything that has not begun fails. Called with the lock."""
        while self._transfers:
            self._refuse(self._transfers.popleft(), "stopped")
        while self._questions:
            if isinstance(question := self._questions.popleft(), Lookup):
                self._counts["lookup", "stopped"] += len(question.keys)
                self._answers.append(Answer(unknown=question.keys))

    def _refuse(self, transfer: Transfer, why: str) -> None:
        """A job ends before it began. Called with the lock."""
        keys = transfer.keys
        self._counts["load" if transfer.is_load else "store", why] += len(keys)
        self._finished.append(Finished(transfer.job, transfer.is_load, keys, frozenset(keys), 0.0))

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            work = self._next()
            if work is not None:
                self._guarded(work)
            if self._operations:
                self._poll(0.0 if work is not None else _BUSY_WAIT_S)
            with self._changed:
                self._is_working = False
                self._changed.notify_all()
                if self._is_stopping and not self._operations:
                    return

    def _next(self) -> Lookup | Touch | Transfer | None:
        """The next piece of work; waits for one as long as nothing is in flight."""
        with self._changed:
            if not (self._questions or self._transfers or self._operations or self._is_stopping):
                self._changed.wait(_IDLE_WAIT_S)
            is_stopping = self._is_stopping
            work: Lookup | Touch | Transfer | None = None
            if self._questions:
                work = self._questions.popleft()
            elif self._transfers and len(self._active) < self._in_flight_jobs:
                work = self._transfers.popleft()
            self._is_working = work is not None
        if is_stopping:
            for operation in self._operations.keys() - self._cancelled:
                self._cancelled.add(operation)
                self._cancel(operation)
        return work

    def _guarded(self, work: Lookup | Touch | Transfer) -> None:
        """Does one piece of work. Whatever goes wrong with it, the thread goes on."""
        try:
            match work:
                case Lookup(keys):
                    self._look_up(keys)
                case Touch(keys):
                    self._lookup([block_key(key) for key in keys], lease=0.0)
                case Transfer():
                    self._start(work)
        except PegaError as error:
            self._warn("touch", error)
        except Exception:
            logger.exception("PegaFlow: the tier's thread has failed at a piece of work")
            if isinstance(work, Lookup):
                self._answer(Answer(unknown=work.keys))

    def _lookup(self, keys: list[bytes], lease: float) -> tuple[int, int | None]:
        """How many of the store's keys are there from the first on, and the lease on them."""
        found, _, lease_id, *_ = self._cache.lookup(
            self._instance, GROUP, b"".join(keys), lease, next(self._numbers), places=False
        )
        return found, lease_id

    def _look_up(self, keys: Sequence[bytes]) -> None:
        """Finds out which chunks are there. A question is answered up to the first gap, behind which it is put anew:
        of one group that is not worth it, because vLLM stops there.
        """
        blocks = [block_key(key) for key in keys]
        present: list[bytes] = []
        absent: list[bytes] = []
        place = gaps = 0
        try:
            while place < len(keys) and gaps < (1 if self._has_one_group else _GAPS_MAX):
                found, _ = self._lookup(blocks[place:], lease=0.0)
                present += keys[place : place + found]
                absent += keys[place + found : place + found + 1]
                place += found + 1
                gaps += 1
        except PegaError as error:
            self._warn("lookup", error)
            self._answer(Answer(present, absent, keys[place:]))
            return
        self._answer(Answer(present, [*absent, *keys[place:]]))

    def _answer(self, answer: Answer) -> None:
        with self._changed:
            if answer.unknown:
                self._counts["lookup", "error"] += len(answer.unknown)
            self._answers.append(answer)

    def _start(self, transfer: Transfer) -> None:
        """Starts the operations of a job. It has ended when they have."""
        transfer.started = time.monotonic()
        transfer.pending = 1
        with self._changed:
            self._active.add(transfer.job)
        try:
            for run in transfer.runs:
                (self._load if transfer.is_load else self._store)(transfer, run)
        except PegaError as error:
            self._warn("load" if transfer.is_load else "store", error)
        finally:
            never = set(transfer.keys) - transfer.begun
            transfer.failed |= never
            transfer.lost += len(never)
            self._ended_one(transfer)

    def _store(self, transfer: Transfer, run: Run) -> None:
        operation = next(self._numbers)
        self._cache.save(
            operation,
            self._instance,
            GROUP,
            SHARD,
            parent=run.parent,
            depth=run.depth,
            keys=b"".join(block_key(key) for key in run.keys),
            blocks=run.chunks,
        )
        self._begun(operation, transfer, run.keys, run.chunks)

    def _load(self, transfer: Transfer, run: Run) -> None:
        """Loads what is there of a run; the rest fails."""
        blocks = [block_key(key) for key in run.keys]
        place = gaps = 0
        while place < len(blocks) and gaps < _GAPS_MAX:
            found, lease = self._lookup(blocks[place:], _LEASE_S)
            if found and lease is not None:
                operation, chunks = next(self._numbers), run.chunks[place : place + found]
                try:
                    self._cache.load(operation, lease, SHARD, list(range(found)), chunks)
                except PegaError:
                    self._cache.release(lease)
                    raise
                self._begun(operation, transfer, run.keys[place : place + found], chunks)
            place += found + 1
            gaps += 1

    def _begun(self, operation: int, transfer: Transfer, keys: Sequence[bytes], chunks: Sequence[int]) -> None:
        transfer.pending += 1
        transfer.begun.update(keys)
        self._operations[operation] = (transfer, dict(zip(chunks, keys, strict=True)))

    def _cancel(self, operation: int) -> None:
        try:
            self._cache.cancel(operation)
        except PegaError as error:
            logger.debug("PegaFlow: operation %d was not cancelled: %s", operation, error)

    def _poll(self, wait_s: float) -> None:
        try:
            ended = self._cache.poll(wait_s)
        except PegaError as error:
            self._warn("poll", error)
            time.sleep(_BUSY_WAIT_S)
            return
        for completion in ended:
            self._take(completion)

    def _take(self, ended: Ended) -> None:
        transfer, chunks = self._operations.pop(ended.operation, (None, {}))
        if transfer is None:
            return
        failed = {chunks[chunk] for chunk in ended.failed if chunk in chunks}
        if ended.dropped:
            # It is not told which: the run as a whole counts as not stored.
            failed = set(chunks.values())
        transfer.failed |= failed
        transfer.lost += len(failed) if ended.is_load else ended.dropped
        self._ended_one(transfer)

    def _ended_one(self, transfer: Transfer) -> None:
        transfer.pending -= 1
        if transfer.pending:
            return
        seconds = time.monotonic() - transfer.started
        keys, failed = transfer.keys, frozenset(transfer.failed)
        with self._changed:
            self._active.discard(transfer.job)
            if transfer.lost:
                self._counts["load" if transfer.is_load else "store", "cache"] += transfer.lost
            self._finished.append(Finished(transfer.job, transfer.is_load, keys, failed, seconds))
            self._changed.notify_all()

    def _warn(self, what: str, error: PegaError) -> None:
        """Says what went wrong, once in a while for each kind."""
        now = time.monotonic()
        level = logging.DEBUG
        if now >= self._next_warning.get(what, 0.0):
            self._next_warning[what] = now + _WARNING_INTERVAL_S
            level = logging.WARNING
        logger.log(level, "PegaFlow: the tier's cache (%s): %s", what, error)


def _taken(queue: deque[_T]) -> list[_T]:
    """Takes all that is in a queue to which another thread appends."""
    taken = []
    while True:
        try:
            taken.append(queue.popleft())
        except IndexError:
            return taken
