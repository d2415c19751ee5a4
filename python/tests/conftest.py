"""Fixtures for the tests of the Python package."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def store_path() -> Iterator[Path]:
    """A directory for a store: beside the build output, because O_DIRECT wants a real file system."""
    base = Path(os.environ.get("CARGO_TARGET_DIR") or Path(__file__).parents[2] / "target") / "tmp"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix="python-") as folder:
        yield Path(folder) / "store"
