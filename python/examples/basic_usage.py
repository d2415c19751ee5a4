"""Named bytes in DRAM and on a drive: save, look up, load; then the same after a restart.

usage: basic_usage.py [FOLDER]      (on ext4 or XFS; default: a temporary one in the current folder)
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from pegaflow import PegaEngine


def save(path: Path, blocks: dict[str, bytes]) -> None:
    """A first program stores blocks, and looks at what it has stored."""
    with PegaEngine(path, dram="64MiB", nvme="256MiB") as store:
        for name, data in blocks.items():
            store.put(name, data)  # readable at once: anything with a buffer, such as a numpy array or a CPU tensor
        print("look up:", {name: name in store for name in [*blocks, "something else"]})
        store.flush()  # from here on it survives a power loss; by itself that takes a second


def load(path: Path, blocks: dict[str, bytes]) -> None:
    """A later program opens the store again and finds them."""
    with PegaEngine(path, dram="64MiB", nvme="256MiB") as store:
        for name, data in blocks.items():
            found = store.get(name)  # a read-only view of the cache's own memory, checked against its checksum
            print(f"load {name}:", "the same bytes" if found == data else "MISSING OR WRONG")
            if found != data:
                sys.exit(1)
        store.remove("block 0")
        print("removed:", "block 0" not in store)
        print("on the drive:", store.stats()["io_engine"], "reads and writes it")


def main() -> None:
    """Saves in one engine and loads in another."""
    blocks = {f"block {number}": os.urandom(1 << 20) for number in range(4)}
    with tempfile.TemporaryDirectory(dir=".", prefix="pegaflow-example-") as temporary:
        path = Path(sys.argv[1] if len(sys.argv) > 1 else temporary) / "store"
        save(path, blocks)
        load(path, blocks)


if __name__ == "__main__":
    main()
