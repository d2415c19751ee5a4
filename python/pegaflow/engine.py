"""`PegaEngine`: named bytes in DRAM and on a drive, kept across restarts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Self

from pegaflow import _native
from pegaflow.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from types import TracebackType

_KEY_BYTES_MAX = 4096
_CLOSE_TIMEOUT_S = 60.0


class PegaEngine:
    """An open store of named bytes.

    `path` is a directory on ext4 or XFS, created if missing. `dram` is the memory for objects, taken at once: a number
    of bytes or a text such as `"4GiB"`; at least 16 MiB. `nvme` is the size on the drive, taken at once; with `None`
    nothing is written to a drive and `path` is not used. Engines of one process on the same path share one store.

    Every method may be called from any thread; none holds the GIL while it waits. Failures are `PegaError`.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        dram: str | int = "1GiB",
        nvme: str | int | None = "16GiB",
    ) -> None:
        self._engine = _native.Engine(path, dram, nvme)

    def put(self, key: str | bytes, data: Any) -> None:
        """Stores a copy of the bytes of `data`: anything with a C-contiguous buffer, or a torch CPU tensor.

        It can be read at once and is durable after a second, or when `flush` returns. What had the key is replaced.
        """
        self._engine.put(_name(key), _buffer(data))

    def get(self, key: str | bytes) -> memoryview | None:
        """The bytes, read-only, in the cache's own memory: no copy. They stay as they are as long as the view lives."""
        found = self._engine.get(_name(key))
        return None if found is None else memoryview(found)

    def remove(self, key: str | bytes) -> bool:
        """Removes an object; whether it was there."""
        return self._engine.remove(_name(key))

    def contains(self, key: str | bytes) -> bool:
        """Whether there is such an object."""
        return self._engine.contains(_name(key))

    def put_new(self, keys: Sequence[str | bytes], data: Sequence[Any]) -> list[bool | str]:
        """Stores many objects in one call, except those whose key is there: for each whether it was stored, or the kind
        of the error (`PegaError.kind`).
        """
        return self._engine.put_new([_name(key) for key in keys], [_buffer(one) for one in data])

    def get_into(self, keys: Sequence[str | bytes], into: Sequence[Any]) -> list[bool | str]:
        """Copies many objects into as many writable buffers, read side by side: for each whether it was there, or the
        kind of the error. `size`: the object is not as long as its buffer, which stays as it was.
        """
        return self._engine.get_into([_name(key) for key in keys], [_buffer(one) for one in into])

    def contains_each(self, keys: Sequence[str | bytes]) -> list[bool]:
        """For each of many keys whether there is such an object."""
        return self._engine.contains_each([_name(key) for key in keys])

    def __contains__(self, key: str | bytes) -> bool:
        return self.contains(key)

    def flush(self, timeout: float = 60.0) -> None:
        """Makes everything stored before durable: afterwards it survives a power loss. `timeout` is in seconds."""
        self._engine.flush(timeout)

    def stats(self) -> dict[str, int | str | bool]:
        """Counters since the start, and gauges. The units are in the names."""
        stats: dict[str, int | str | bool] = json.loads(self._engine.stats_json())
        return stats

    def close(self, timeout: float = _CLOSE_TIMEOUT_S) -> None:
        """Flushes and closes. Views that were handed out stay readable. A second close does nothing."""
        self._engine.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _name(key: str | bytes) -> bytes:
    name = key.encode() if isinstance(key, str) else bytes(key)
    if not 0 < len(name) <= _KEY_BYTES_MAX:
        raise InvalidInputError(f"a key of {len(name)} bytes; give 1 to {_KEY_BYTES_MAX}")
    return name


def _buffer(data: Any) -> Any:
    """Torch tensors have no buffer of their own; a view of their bytes as a numpy array has."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(data, torch.Tensor):
        return data
    if data.device.type != "cpu":
        raise InvalidInputError(f"a tensor on device '{data.device}'; bring it to the CPU first, with .cpu()")
    return data.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
