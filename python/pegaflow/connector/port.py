"""What the connector needs of the cache, and how it opens it. `_native.Cache` is one; tests have another."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Protocol

from pegaflow import _native
from pegaflow.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pegaflow.connector.config import ConnectorConfig

logger = logging.getLogger("vllm.pegaflow")

Computed = tuple[int, int, int, float, float]
"""Tokens that vLLM has computed of one request: the decision on it (0: none), the first, one after the last, the load
of the GPU as the question had it, seconds."""
Question = tuple[str, int, int, float, str | None, "Sequence[Computed]"]
"""Whether to load: the request, blocks that vLLM has itself, tokens of a block, the share of the GPU's time that other
requests want, the policy if it is not the cache's, what was computed since the last question."""

_RPC_TIMEOUT_S = 5.0
_PROBE_TIMEOUT_S = 1.0


class Ended(Protocol):
    """A load or a save that ended: none of its copies can read or write any more."""

    @property
    def operation(self) -> int:
        """Its number."""

    @property
    def is_load(self) -> bool:
        """Whether it was a load."""

    @property
    def loaded_dram(self) -> int:
        """Blocks loaded out of DRAM."""

    @property
    def loaded_nvme(self) -> int:
        """Blocks loaded from the drive."""

    @property
    def failed(self) -> list[int]:
        """Blocks of vLLM's memory that do not hold what was asked for."""

    @property
    def saved(self) -> int:
        """Blocks that are now visible."""

    @property
    def present(self) -> int:
        """Blocks that were there already."""

    @property
    def dropped(self) -> int:
        """Blocks that were dropped."""


class CachePort(Protocol):
    """A session with the cache. Every method may raise `PegaError`."""

    def is_connected(self) -> bool:
        """Whether the cache can be reached now."""

    def register_worker(
        self,
        *,
        instance: str,
        descriptor: Mapping[str, str],
        group: int,
        block_bytes: int,
        shards: int,
        shard: int,
        ranges: Sequence[tuple[int, int]],
        fragments: Sequence[tuple[int, int, int, int]],
        blocks: int,
        owner: object,
        device: int | None,
        keeps_all: bool = False,
    ) -> None:
        """Registers identity, geometry and memory of a worker: host memory, or that of the CUDA device `device`. With
        `keeps_all` all that the instance saves is written to the drive, whatever the policy and write budget say."""

    def arena(self) -> bytes | None:
        """The arena all of which the worker's device can reach by now, 16 bytes; none before, and without a server.

        Raises `PegaError` if it never will.
        """

    def lookup(
        self,
        instance: str,
        group: int,
        keys: bytes,
        lease: float,
        tag: int,
        *,
        places: bool = False,
        question: Question | None = None,
        prefetch: bool = False,
        tenant: str | None = None,
    ) -> tuple[int, int, int | None, bytes | None, bytes, int, float]:
        """Blocks found, blocks of those in DRAM, lease; if asked for and all are in DRAM their arena and their places
        in it, little-endian numbers of four bytes, shard after shard; the number of the decision, 0 without one. With
        `question` there is no lease if loading is not worth it. With `prefetch` what is leased and on the drive is
        brought to DRAM until the lease ends: the last value is how many seconds that is expected to take, 0 if nothing
        is fetched or that is not known. Only what was saved for the same `tenant` is found.
        """

    def locate(self, instance: str, group: int, keys: bytes, *, tenant: str | None = None) -> bytes:
        """Where each of some blocks is, in any order: a byte for each, 0 nowhere, 1 in DRAM, 2 on the drive. Takes no
        lease, and is no use of the blocks.
        """

    def release(self, lease: int) -> None:
        """Gives a lease back."""

    def load(
        self, operation: int, lease: int, shard: int, indices: Sequence[int], blocks: Sequence[int], stream: int = 0
    ) -> None:
        """Starts a load; it writes after what is queued on `stream` now, a `CUstream` as a number."""

    def load_placed(
        self,
        operation: int,
        lease: int,
        shard: int,
        arena: bytes,
        places: bytes,
        blocks: Sequence[int],
        *,
        remaining: float,
        stream: int,
        before: bool,
    ) -> None:
        """Starts a load that the worker's device does itself, out of the arena; `remaining` is what is left of the
        lease, in seconds. With `before` all that is queued on `stream` from now on runs after it.

        Raises `PegaError` if it cannot be started; nothing is copied then.
        """

    def save(
        self,
        operation: int,
        instance: str,
        group: int,
        shard: int,
        *,
        parent: bytes,
        depth: int,
        keys: bytes,
        blocks: Sequence[int],
        stream: int = 0,
        tenant: str | None = None,
    ) -> None:
        """Starts a save; it reads after what is queued on `stream` now. Only lookups for the same `tenant` find it."""

    def cancel(self, operation: int) -> None:
        """Asks for an operation to end early; its completion still comes."""

    def poll(self, wait: float = 0.0) -> Sequence[Ended]:
        """What has ended; waits up to `wait` seconds for something."""

    def close(self, timeout: float) -> None:
        """Ends the session once its copies have ended."""


def open_cache(config: ConnectorConfig, name: str, *, shares_process: bool) -> CachePort:
    """Opens what the mode says. `shares_process`: scheduler and worker are in one process, so that an engine inside it
    serves both.
    """
    mode = config.mode
    if mode == "auto":
        if is_listening(config.address):
            mode = "server"
        elif shares_process:
            mode = "embedded"
        else:
            raise ClosedError(
                f"no PegaFlow server at {config.address}, and this vLLM has workers in processes of their own, which "
                f"need one; start it with: pegaflow-server --socket {config.address} --path {config.store_path} "
                '(or set "mode": "server" to start without it)'
            )
    if mode == "embedded":
        if not shares_process:
            raise ClosedError(
                'mode is "embedded", but this vLLM has workers in processes of their own; start a server with: '
                f"pegaflow-server --socket {config.address} --path {config.store_path}, and set "
                '"mode": "server"'
            )
        logger.info("PegaFlow: %s uses the store at %s in this process", name, config.store_path)
        return _native.Cache.embedded(config.store_path, config.dram, config.nvme)
    logger.info("PegaFlow: %s uses the server at %s", name, config.address)
    return _native.Cache.remote(config.address, name, config.lookup_timeout_ms / 1000, _RPC_TIMEOUT_S)


def is_listening(address: str) -> bool:
    """Whether somebody accepts connections at the address."""
    try:
        if address.startswith("tcp://"):
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S).close()
        else:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_PROBE_TIMEOUT_S)
                probe.connect(address)
    except (OSError, ValueError):
        return False
    return True
