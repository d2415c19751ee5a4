"""SGLang's interface for storage backends, out of its wheel, without SGLang and all that it needs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_UNPACKED = Path(__file__).parents[2] / "target" / "sglang"
_INTERFACE = "sglang.srt.mem_cache.hicache_storage"


def load() -> tuple[Any, Any]:
    """`HiCacheStorageConfig` and `StorageBackendFactory`; skips the tests where nobody has fetched the wheel."""
    unpacked = Path(os.environ.get("PEGAFLOW_SGLANG") or _UNPACKED)
    if not unpacked.joinpath(*_INTERFACE.split(".")).with_suffix(".py").is_file():
        pytest.skip("no wheel of SGLang; make sglang fetches one", allow_module_level=True)
    # The packages themselves would import kernels and much else.
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache"):
        package = ModuleType(name)
        package.__path__ = [str(unpacked.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)
    factory = import_module("sglang.srt.mem_cache.storage.backend_factory")
    return import_module(_INTERFACE).HiCacheStorageConfig, factory.StorageBackendFactory
