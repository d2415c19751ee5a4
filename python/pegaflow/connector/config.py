"""The connector's settings: what stands in `kv_connector_extra_config`, checked all at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pegaflow.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

KILL_SWITCH_ENV = "PEGAFLOW_DISABLE"

Mode = Literal["auto", "server", "embedded"]
LoadPolicy = Literal["auto", "always", "never", "shadow"]
Prefetch = Literal["auto", "off"]
Tenants = Literal["cache_salt", "off"]


def default_socket() -> Path:
    """Where a server of this user listens unless told otherwise: the server's own rule."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    directory = runtime / "pegaflow" if runtime.is_absolute() else Path(f"/tmp/pegaflow-{os.geteuid()}")
    return directory / "pegaflow.sock"


@dataclass(frozen=True)
class ConnectorConfig:
    """The settings. Every field may stand in `kv_connector_extra_config` under its name."""

    mode: Mode = "auto"
    """`server`: the server at `socket`, whenever it is there. `embedded`: an engine in vLLM's own process. `auto`: the
    server if it is there when vLLM starts, else embedded where scheduler and worker share a process, else an error."""
    socket: str = ""
    """The server's Unix socket, or `tcp://ADDRESS:PORT`. Default: `$XDG_RUNTIME_DIR/pegaflow/pegaflow.sock`, or
    `/tmp/pegaflow-UID/pegaflow.sock`."""
    path: str = "~/.cache/pegaflow/store"
    """The store's directory. Embedded only: a server has its own."""
    dram: str | int = "4GiB"
    """Memory for blocks. Embedded only. At least 16 MiB."""
    nvme: str | int | None = "16GiB"
    """Size of the store on the drive; `null` keeps blocks in memory only. Embedded only."""
    load_policy: LoadPolicy = "auto"
    """Whether to load what is found: `always`, `never` (blocks are still saved), `shadow` (always, but it is recorded
    what `auto` would do), or `auto`: as the server's policy says, which by default loads where that is expected to be
    faster than computing. The server's `never` outranks all."""
    prefetch: Prefetch = "auto"
    """`auto`: what is on the drive for requests that wait in vLLM's queue is brought to DRAM before they are scheduled,
    for 8 of them at a time; not where it would be computed. `off`: the drive is read when a request is scheduled."""
    prefetch_wait_ms: int = 50
    """How long in all a request may be held back in vLLM's queue for such a read that is about to end, in milliseconds.
    0: never. 0 to 1,000."""
    handoff_wait_ms: int = 2_000
    """How long a request may be held back in vLLM's queue until the blocks are in the cache that another engine has
    computed for it, in milliseconds; what is missing then is computed. `pegaflow-router` tells how many there are.
    0: never. 0 to 60,000."""
    tenants: Tenants = "cache_salt"
    """`cache_salt`: requests with one salt are one tenant, with a namespace, a share of memory and, in an encrypted
    store, a data key of their own. `off`: salts tell blocks apart, but all requests are one party."""
    save_decode: bool = True
    """Whether to save the blocks of generated tokens as well as those of prompts."""
    sync_loads: bool = True
    """Whether blocks that are all in DRAM may be loaded in the step that computes the rest of their request, instead of
    before it. That saves a step or two, but everything else in that step waits for the copy."""
    sync_load_bytes: str | int = "32MiB"
    """How much may be loaded so in one step while other requests run, per worker. 0: only when none does; then any
    amount may, because nobody waits for it. Default: 32 MiB, 0.6 ms of a PCIe 5 link. 0 to 64 GiB."""
    min_blocks: int = 1
    """Loads of fewer blocks are left to the model. 1 to 65,536."""
    prewarm: bool = False
    """Whether all that is saved is to be on the drive afterwards, whatever the policy and write budget say. For
    warming a cache in advance; `pegaflow prewarm` sets it."""
    lookup_timeout_ms: int = 50
    """How long the scheduler waits for a lookup, in milliseconds; a slower one is a miss. 1 to 10,000."""
    lease_ms: int = 60_000
    """How long found blocks are kept readable until their load starts, in milliseconds. 1,000 to 600,000. Blocks that a
    GPU worker copies itself are kept for at least 60,000."""
    verify_weights: bool = True
    """Whether all bytes of the weight files are digested once, in the background, and compared with what was recorded
    for weights with the same sampled digest."""
    kill_switch: str = ""
    """A file: while it exists nothing is looked up, loaded or saved. The environment variable `PEGAFLOW_DISABLE=1` does
    the same from the start."""

    @property
    def address(self) -> str:
        """The server's address."""
        return self.socket or str(default_socket())

    @property
    def sync_load_bytes_max(self) -> int:
        """`sync_load_bytes` as a number."""
        return _bytes_of(self.sync_load_bytes)

    @property
    def store_path(self) -> Path:
        """The store's directory, with `~` resolved."""
        return Path(self.path).expanduser()

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Reads and checks `kv_connector_extra_config`; one error names everything that is wrong with it."""
        known = {field.name: field for field in fields(cls)}
        problems = [
            f"'{name}' is not a setting of PegaFlow; remove it, or use one of {', '.join(known)}"
            for name in extra
            if name not in known
        ]
        values = {name: value for name, value in extra.items() if name in known}
        problems += [problem for name, value in values.items() if (problem := _problem(name, value))]
        if problems:
            raise InvalidInputError("kv_connector_extra_config: " + "; ".join(problems))
        return cls(**values)


_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("auto", "server", "embedded"),
    "load_policy": ("auto", "always", "never", "shadow"),
    "prefetch": ("auto", "off"),
    "tenants": ("cache_salt", "off"),
}
_RANGES: dict[str, tuple[int, int]] = {
    "min_blocks": (1, 65_536),
    "prefetch_wait_ms": (0, 1_000),
    "handoff_wait_ms": (0, 60_000),
    "lookup_timeout_ms": (1, 10_000),
    "lease_ms": (1_000, 600_000),
}
_SIZES = ("dram", "nvme")
_SWITCHES = ("save_decode", "sync_loads", "prewarm", "verify_weights")
_SYNC_LOAD_BYTES_MAX = 64 << 30
_UNITS = {"": 1, "B": 1} | {
    name: base**power
    for base, suffix in ((1000, "B"), (1024, "iB"))
    for power, prefix in enumerate("KMGT", start=1)
    for name in (f"{prefix}{suffix}".upper(),)
}


def _bytes_of(size: str | int) -> int:
    """A size such as `32MiB` in bytes, written as the server's sizes are. Raises `ValueError`."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(size)
    return round(float(match[1]) * int(_UNITS[match[2].upper()]))


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with one setting, with the value and the remedy."""
    if name in _CHOICES:
        allowed = _CHOICES[name]
        return None if value in allowed else f"{name} is {value!r}; give one of {', '.join(allowed)}"
    if name in _RANGES:
        low, high = _RANGES[name]
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if good else f"{name} is {value!r}; give a whole number from {low} to {high}"
    if name in _SWITCHES:
        return None if isinstance(value, bool) else f"{name} is {value!r}; give true or false"
    if name == "sync_load_bytes":
        try:
            good = not isinstance(value, bool) and 0 <= _bytes_of(value) <= _SYNC_LOAD_BYTES_MAX
        except (TypeError, AttributeError, ValueError):
            good = False
        return (
            None if good else f'{name} is {value!r}; give a size from 0 to 64GiB, such as "32MiB", or a number of bytes'
        )
    if name in _SIZES:
        good = (isinstance(value, str | int) and not isinstance(value, bool)) or (name == "nvme" and value is None)
        return None if good else f'{name} is {value!r}; give a size such as "64GiB" or a number of bytes'
    return None if isinstance(value, str) else f"{name} is {value!r}; give a text"


class KillSwitch:
    """Whether the cache is switched off, looked up at most once a second."""

    _INTERVAL_S = 1.0

    def __init__(self, config: ConnectorConfig) -> None:
        self._always = os.environ.get(KILL_SWITCH_ENV, "") not in ("", "0")
        self._file = Path(config.kill_switch).expanduser() if config.kill_switch else None
        self._next_look = 0.0
        self._is_off = self._always

    def is_off(self, now: float) -> bool:
        """Whether nothing may be looked up, loaded or saved at `now` (seconds of a monotonic clock)."""
        if self._file is not None and not self._always and now >= self._next_look:
            self._next_look = now + self._INTERVAL_S
            self._is_off = self._file.exists()
        return self._is_off
