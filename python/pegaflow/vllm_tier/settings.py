"""The tier's settings: what stands beside `type` and `module_path` in its entry of `secondary_tiers`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pegaflow.connector.config import ConnectorConfig
from pegaflow.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_RANGES: dict[str, tuple[int, int]] = {
    "queue_jobs": (1, 65_536),
    "in_flight_jobs": (1, 1_024),
    "lookup_timeout_ms": (1, 60_000),
    "shutdown_timeout_ms": (100, 600_000),
}
_TEXT_MAX = 4_096


@dataclass(frozen=True)
class TierSettings:
    """The settings. Every field may stand in the tier's entry under its name."""

    path: str = ""
    """The store's directory: the engine runs in vLLM's scheduler process. One engine to a store; see `address`."""
    address: str = ""
    """The Unix socket of a `pegaflow-server`, for several engines on one host. Default, without `path`: the server's
    default socket."""
    dram: str | int = "4GiB"
    """Memory for blocks, beside vLLM's own tier in host memory. With `path` only. At least 16 MiB."""
    nvme: str | int | None = "16GiB"
    """Size of the store on the drive; `null` keeps blocks in memory only. With `path` only."""
    revision: str = ""
    """The revision of the model that vLLM was started with, if it was given one: needed where Hugging Face's cache has
    several of it. The tier is not told."""
    namespace: str = ""
    """Keeps what it names apart from all else: for what changes the KV cache and the tier is not told (dummy weights,
    overrides of the model's configuration). At most 4,096 characters."""
    queue_jobs: int = 256
    """Pieces of work that may wait for the tier's thread; what comes beyond is a miss, or is not stored, and is
    counted. 1 to 65,536."""
    in_flight_jobs: int = 64
    """Loads and stores that are copied at a time. 1 to 1,024."""
    lookup_timeout_ms: int = 1_000
    """How long a request waits to be told whether a block is there; then it is a miss. 1 to 60,000."""
    shutdown_timeout_ms: int = 20_000
    """How long a stop may take. 100 to 600,000."""
    enable_kv_events: bool = False
    """Whether stored blocks are told as KV events, where vLLM's events are on."""
    locality: str | None = None
    """`LOCAL` or `REMOTE`, as vLLM's filter of tiers and its events have it; unset: unknown."""
    kill_switch: str = ""
    """A file: while it exists nothing is found or stored. The environment variable `PEGAFLOW_DISABLE=1` does the same
    from the start."""

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> TierSettings:
        """Reads and checks an entry of `secondary_tiers`; one error names everything that is wrong with it."""
        known = [field.name for field in fields(cls)]
        problems = [
            f"'{name}' is not a setting of PegaTier; remove it, or use one of {', '.join(known)}"
            for name in entry
            if name not in known
        ]
        values = {name: value for name, value in entry.items() if name in known}
        problems += [problem for name, value in values.items() if (problem := _problem(name, value))]
        if values.get("path") and values.get("address"):
            problems.append(
                "path and address exclude each other; give path for a store of this vLLM's own, else address"
            )
        if str(values.get("address", "")).startswith("tcp://"):
            problems.append(
                f"address is {values['address']!r}; blocks go through the Unix socket of a server on this host"
            )
        if problems:
            raise InvalidInputError("PegaTier: " + "; ".join(problems))
        return cls(**values)

    def as_connector(self) -> ConnectorConfig:
        """The same as the connector has it, which opens caches."""
        return ConnectorConfig(
            mode="embedded" if self.path else "server",
            socket=self.address,
            path=self.path or ConnectorConfig.path,
            dram=self.dram,
            nvme=self.nvme,
            lookup_timeout_ms=min(self.lookup_timeout_ms, 10_000),
            kill_switch=self.kill_switch,
        )


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with one setting, with the value and the remedy."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if name in _RANGES:
        low, high = _RANGES[name]
        good, wanted = is_number and low <= value <= high, f"a whole number from {low} to {high}"
    elif name in ("dram", "nvme"):
        good = isinstance(value, str) or is_number or (name == "nvme" and value is None)
        wanted = 'a size such as "64GiB" or a number of bytes'
    elif name == "enable_kv_events":
        good, wanted = isinstance(value, bool), "true or false"
    elif name == "locality":
        good, wanted = value in (None, "LOCAL", "REMOTE"), "LOCAL or REMOTE"
    else:
        good, wanted = isinstance(value, str) and len(value) <= _TEXT_MAX, f"a text of at most {_TEXT_MAX} characters"
    return None if good else f"{name} is {value!r}; give {wanted}"
