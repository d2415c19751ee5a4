"""PegaFlow keeps the KV cache of LLM engines on DRAM and NVMe, across restarts.

`PegaEngine` stores named bytes. `PegaKVConnector` is what vLLM loads; vLLM is imported only when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegaflow._native import __version__
from pegaflow.engine import PegaEngine
from pegaflow.errors import PegaError

if TYPE_CHECKING:
    from pegaflow.connector import PegaKVConnector

__all__ = ["PegaEngine", "PegaError", "PegaKVConnector", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "PegaKVConnector":
        from pegaflow.connector import PegaKVConnector

        return PegaKVConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
