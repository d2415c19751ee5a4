"""The `pegaflow-server` of the story: its command line, its readiness, and what its metrics say of loads."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import HttpProcess, free_port

_START_SECONDS = 60.0
_LOADED_BLOCKS = re.compile(r'^pegaflow_loaded_blocks_total\{tier="(dram|nvme)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class ServerSettings:
    """Which binary, where its store and its socket lie. A socket's path can have 107 bytes at most."""

    binary: Path
    store: Path
    socket: Path
    logs: Path

    def connector(self) -> dict[str, Any]:
        """The JSON that points a vLLM at this server."""
        return {
            "kv_connector": "PegaKVConnector",
            "kv_connector_module_path": "pegaflow",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "mode": "server",
                "socket": str(self.socket),
                # A tiny model computes faster than any drive reads; the story is about loading.
                "load_policy": "always",
            },
        }


class StoreServer:
    """A running server; `__init__` returns when it says that it is ready."""

    def __init__(self, name: str, settings: ServerSettings) -> None:
        port = free_port()
        command: list[str | Path] = [settings.binary, "--socket", settings.socket, "--http", f"127.0.0.1:{port}"]
        command += ["--dram", "256MiB", "--path", settings.store, "--capacity", "1GiB"]
        log = settings.logs / f"server-{name.replace(' ', '-')}.log"
        self.process = HttpProcess(
            "pegaflow-server", command, log, os.environ, port=port, ready_path="/ready", start_seconds=_START_SECONDS
        )

    def loaded_blocks(self) -> dict[str, int]:
        """How many blocks were loaded since start, by the tier that held them."""
        return {tier: int(float(value)) for tier, value in _LOADED_BLOCKS.findall(self.process.metrics())}
