"""vLLM's chunks as the store's blocks: their keys, and which of them follows which.

The store gives up descendants before ancestors and drops a block whose ancestor is gone. vLLM tells a tier no
ancestors, but the place of each chunk in its request: chunks at neighbouring places of one request are one chain.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = bytes(32)
_GROUP_BYTES = 4


def group_of(key: bytes) -> int:
    """The KV cache group that a key of vLLM's offloading ends with."""
    return int.from_bytes(key[-_GROUP_BYTES:], "big")


def hash_bytes_of(key: bytes) -> int:
    """How many bytes of a key are vLLM's hash of the block."""
    return len(key) - _GROUP_BYTES


def block_key(key: bytes) -> bytes:
    """The store's key, 32 bytes, for a key of vLLM's offloading: its hash of the block and its group."""
    return hashlib.blake2b(key, digest_size=32, person=b"pegaflow-tier").digest()


@dataclass
class Run:
    """Chunks that follow one another, ancestors first."""

    parent: bytes
    """The store's key of the block before the first; `ROOT` where none is known."""
    depth: int
    keys: list[bytes] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    """Their places in vLLM's tier in host memory."""


class Chains:
    """How far the chain of each running request is known to be in the store. vLLM's scheduler owns it.

    Models with several groups have chains within a job only: of a sliding window's group later chunks are worth keeping
    without earlier ones.
    """

    def __init__(self, chunk_tokens: Mapping[int, int]) -> None:
        """`chunk_tokens`: the tokens of a chunk, by group."""
        self._chunk_tokens = dict(chunk_tokens)
        self._ends: dict[str, tuple[int, bytes]] = {}
        """The place and the key of the last chunk that each request has found or stored."""

    def __len__(self) -> int:
        return len(self._ends)

    def place_of(self, key: bytes, end_token: int | None) -> int | None:
        """Which chunk of its request it is, from the token after its last one; `None` where that cannot be said."""
        tokens = self._chunk_tokens.get(group_of(key))
        if not tokens or not end_token or end_token % tokens:
            return None
        return end_token // tokens - 1

    def found(self, request: str, key: bytes, end_token: int | None) -> None:
        """A request has found a chunk in the store."""
        place = self.place_of(key, end_token)
        if len(self._chunk_tokens) == 1 and place is not None and place > self._ends.get(request, (-1, b""))[0]:
            self._ends[request] = (place, key)

    def runs(
        self, request: str, keys: Sequence[bytes], chunks: Sequence[int], end_tokens: Sequence[int | None]
    ) -> list[Run]:
        """The chunks of a job that stores, as runs. From now on they count as stored."""
        runs: list[Run] = []
        before: tuple[int, int | None] | None = None
        for key, chunk, end_token in zip(keys, chunks, end_tokens, strict=True):
            group, place = group_of(key), self.place_of(key, end_token)
            follows = None if place is None else place - 1
            if before is None or before != (group, follows):
                parent, parent_key = self._ends.get(request, (None, b""))
                is_known = place is not None and parent is not None and parent == follows
                runs.append(Run(block_key(parent_key) if is_known else ROOT, place or 0))
            runs[-1].keys.append(key)
            runs[-1].chunks.append(chunk)
            before = (group, place)
            if len(self._chunk_tokens) == 1 and place is not None:
                self._ends[request] = (place, key)
        return runs

    def forget(self, request: str) -> None:
        """A request has ended."""
        self._ends.pop(request, None)
