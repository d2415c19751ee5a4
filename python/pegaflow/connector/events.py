"""KV events: tells vLLM's event stream which blocks are in PegaFlow, and in which tier, for routers outside.

The cache is not asked to remember who wants to know what: a thread asks it where the announced blocks are, new ones at
once and the others in turn, and what it says is compared with what was published. So eviction, reclaim, purge and a
restart of the server all show in the same way, nothing that was missed can be lost, and vLLM's scheduler never waits.
Bounded: as many blocks as the table holds; when it is full the oldest is forgotten, and published as removed.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from array import array
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pegaflow import _native
from pegaflow.connector import compat
from pegaflow.errors import BusyError, PegaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vllm.v1.request import Request

    from pegaflow.connector.port import CachePort

logger = logging.getLogger("vllm.pegaflow")

_KEY = _native.KEY_BYTES
_GROUP = 0
BLOCKS_MAX: Final = 65_536
"""Blocks that are announced at a time."""
_ASKED_MAX = 8_192
"""Blocks that the cache is asked about at once: of a full table each is asked about every eight intervals."""
_INTERVAL_S = 0.5
_TAKEN_MAX = 4_096
"""Blocks whose events are given out in one of vLLM's steps."""
_UNREACHABLE_S = 10.0
"""A cache that could not be asked for so long serves nothing: its blocks are published as removed."""
_FAILURES_TOLD_S = 60.0
"""Unexpected failures are logged so often at most."""

NOWHERE, DRAM, NVME = 0, 1, 2
_MEDIUM: Final = {DRAM: compat.MEDIUM_DRAM, NVME: compat.MEDIUM_NVME}


@dataclass
class Announced:
    """A block that vLLM has saved or loaded, as its events describe it."""

    block_hash: bytes
    """vLLM's own hash, the one that its events of GPU blocks have."""
    parent_hash: bytes | None
    key: bytes
    tenant: str | None
    tokens: bytes
    """Its token ids, packed."""
    lora: tuple[int, str] | None
    """The adapter's number and name."""
    extra: tuple[Any, ...] | None
    tier: int = NOWHERE
    """Where the cache said that it is."""
    published: int = NOWHERE
    """Where the published events say that it is."""

    def token_ids(self) -> list[int]:
        """Its token ids."""
        return array("I", self.tokens).tolist()


def announced_blocks(request: Request, keys: bytes, first: int, block_size: int, tenant: str | None) -> list[Announced]:
    """The blocks of a request from `first` on that have the given keys. Empty if vLLM has no hash for such blocks."""
    hashes = compat.block_hashes(request, block_size)
    count = min(len(keys) // _KEY, max(0, len(hashes) - first))
    tokens = request.all_token_ids
    lora = request.lora_request
    blocks = []
    for place in range(first, first + count):
        start, at = place * block_size, (place - first) * _KEY
        blocks.append(
            Announced(
                block_hash=bytes(hashes[place]),
                parent_hash=bytes(hashes[place - 1]) if place else None,
                key=keys[at : at + _KEY],
                tenant=tenant,
                tokens=array("I", tokens[start : start + block_size]).tobytes(),
                lora=(lora.adapter_id, lora.name) if lora is not None else None,
                extra=compat.event_extra_keys(request, start, start + block_size),
            )
        )
    return blocks


class BlockEvents:
    """What is announced and published. All methods but `ask` and `close` return at once."""

    def __init__(
        self,
        cache: CachePort,
        instance: str,
        block_size: int,
        blocks_max: int = BLOCKS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._instance = instance
        self._block_size = block_size
        self._blocks_max = blocks_max
        self._clock = clock
        self._lock = threading.Lock()
        """Guards all that follows; never held while the cache is asked."""
        self._table: dict[bytes, Announced] = {}
        """By vLLM's hash, oldest first."""
        self._new: dict[bytes, None] = {}
        """Those that the cache has not told of yet."""
        self._turn: deque[bytes] = deque()
        """Those that are still to be asked about in this round."""
        self._changed: dict[bytes, None] = {}
        """Those of which the published events are not right any more."""
        self._forgotten: dict[bytes, int] = {}
        """Published blocks that are not in the table any more, with their tier. Bounded, because a step takes as many
        from here as it publishes."""
        self._last_answer = clock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts asking the cache."""
        self._thread = threading.Thread(target=self._run, name="pega-events", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Stops asking; waits for a question that is on its way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def announce(self, blocks: Iterable[Announced]) -> None:
        """Blocks were saved or found; they are published once the cache says that it has them."""
        with self._lock:
            for block in blocks:
                if block.block_hash in self._table:
                    continue
                if len(self._table) >= self._blocks_max:
                    self._forget(next(iter(self._table)))
                block.published = self._forgotten.pop(block.block_hash, NOWHERE)
                self._table[block.block_hash] = block
                self._new[block.block_hash] = None

    def reset(self, instance: str) -> None:
        """A new epoch: nothing that was saved before is found."""
        with self._lock:
            self._instance = instance
            for block_hash in list(self._table):
                self._forget(block_hash)

    def take(self) -> list[Any]:
        """vLLM's events for what has changed since the last call, of a bounded number of blocks. A block that moves is
        stored in its new tier before it is removed from the old one.
        """
        stored: list[Announced] = []
        removed: dict[int, list[bytes]] = defaultdict(list)
        with self._lock:
            for block_hash in list(self._forgotten)[:_TAKEN_MAX]:
                removed[self._forgotten.pop(block_hash)].append(block_hash)
            for block_hash in list(self._changed)[:_TAKEN_MAX]:
                del self._changed[block_hash]
                block = self._table[block_hash]
                if block.published != NOWHERE:
                    removed[block.published].append(block_hash)
                block.published = block.tier
                if block.tier != NOWHERE:
                    stored.append(block)
                else:
                    del self._table[block_hash]
        events = [self._stored(run) for run in _runs(stored)]
        return events + [compat.block_removed(hashes, _MEDIUM[tier]) for tier, hashes in removed.items()]

    def ask(self) -> None:
        """Asks the cache where some of the blocks are, and notes what it says."""
        with self._lock:
            instance = self._instance
            asked = self._next()
        by_tenant: dict[str | None, list[Announced]] = defaultdict(list)
        for block in asked:
            by_tenant[block.tenant].append(block)
        for tenant, blocks in by_tenant.items():
            try:
                keys = b"".join(block.key for block in blocks)
                tiers = self._cache.locate(instance, _GROUP, keys, tenant=tenant)
            except PegaError as error:
                logger.debug("PegaFlow: asking where blocks are: %s", error)
                self._unanswered(blocks, is_busy=isinstance(error, BusyError))
            else:
                self._note(blocks, tiers)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures, told = 0, float("-inf")
        while not self._stop.wait(_INTERVAL_S):
            try:
                self.ask()
            except Exception:
                # Routers then know less than there is; vLLM goes on.
                failures += 1
                if self._clock() - told >= _FAILURES_TOLD_S:
                    logger.exception("PegaFlow: asking where blocks are failed, for the %d. time", failures)
                    told = self._clock()

    def _next(self) -> list[Announced]:
        """Whom to ask about: new ones first."""
        hashes = dict.fromkeys(itertools.islice(self._new, _ASKED_MAX))
        if not self._turn:
            self._turn.extend(self._table)
        while self._turn and len(hashes) < _ASKED_MAX:
            hashes[self._turn.popleft()] = None
        # What was forgotten meanwhile is asked about no more.
        return [block for block_hash in hashes if (block := self._table.get(block_hash))]

    def _note(self, blocks: Sequence[Announced], tiers: bytes) -> None:
        with self._lock:
            self._last_answer = self._clock()
            for block, tier in zip(blocks, tiers, strict=True):
                self._set_tier(block, tier)

    def _unanswered(self, blocks: Sequence[Announced], *, is_busy: bool) -> None:
        """The cache did not say. Nothing is known then, for a while."""
        with self._lock:
            if is_busy:
                self._last_answer = self._clock()
            if self._clock() - self._last_answer >= _UNREACHABLE_S:
                for block in blocks:
                    self._set_tier(block, NOWHERE)

    def _set_tier(self, block: Announced, tier: int) -> None:
        if self._table.get(block.block_hash) is not block:
            return  # forgotten while the cache was asked; what has its hash now is of a later epoch
        block.tier = tier
        self._new.pop(block.block_hash, None)
        if block.tier != block.published:
            self._changed[block.block_hash] = None
        else:
            self._changed.pop(block.block_hash, None)
            if tier == NOWHERE:
                del self._table[block.block_hash]

    def _forget(self, block_hash: bytes) -> None:
        block = self._table.pop(block_hash)
        self._new.pop(block_hash, None)
        self._changed.pop(block_hash, None)
        if block.published != NOWHERE:
            self._forgotten[block_hash] = block.published

    def _stored(self, run: Sequence[Announced]) -> Any:
        first = run[0]
        return compat.block_stored(
            hashes=[block.block_hash for block in run],
            parent=first.parent_hash,
            token_ids=[token for block in run for token in block.token_ids()],
            block_size=self._block_size,
            lora=first.lora,
            medium=_MEDIUM[first.tier],
            extra_keys=[block.extra for block in run],
        )


def _runs(blocks: Iterable[Announced]) -> list[list[Announced]]:
    """Blocks that follow each other in a chain and are of one tier, together."""
    runs: list[list[Announced]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        if last is not None and (last.block_hash, last.tier, last.lora) == (block.parent_hash, block.tier, block.lora):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
