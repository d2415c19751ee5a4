"""vLLM's tier in host memory, as the cache copies from and to it: one row for each chunk."""

from __future__ import annotations

from typing import Any

import numpy as np

from pegaflow.errors import UnsupportedError


class PrimaryMemory:
    """The memory behind `primary_kv_view`. As long as it is held vLLM cannot unmap it: copies may still write there."""

    def __init__(self, view: memoryview) -> None:
        rows = np.asarray(view)
        if rows.ndim != 2 or rows.itemsize != 1 or rows.strides[1] != 1 or not rows.flags.writeable:
            raise UnsupportedError(
                f"the primary tier's memory has shape {rows.shape} and strides {rows.strides}, of "
                f"{rows.itemsize} bytes each; rows of single, writable bytes are supported"
            )
        self._rows: np.ndarray[Any, Any] | None = rows
        self.address = int(rows.ctypes.data)
        self.chunks = int(rows.shape[0])
        self.chunk_bytes = int(rows.shape[1])
        self.stride_bytes = int(rows.strides[0])

    @property
    def bytes(self) -> int:
        """From the first chunk's first byte to the last one's last."""
        return (self.chunks - 1) * self.stride_bytes + self.chunk_bytes

    def release(self) -> None:
        """Lets go of the memory: no copy touches it any more."""
        self._rows = None
