"""LMCache's own bench of L2 adapters, over ours and those that can be installed here, with verification.

usage: bench_l2.py --dir FOLDER [--lmcache COMMAND] [--only pegaflow,fs] [--keys 32] [--kib 1024] [--rounds 5]
                   [--turns 1]

Each adapter is run twice over the same objects. First `lmcache bench l2` stores, looks up (half of the keys are there)
and loads them, and compares every byte of the last round. Then a new process loads them all again, after what was
written is out of the page cache: that is the load rate, with direct I/O or without. All adapters have their turn
`--turns` times, one after the other, so that other work on the machine meets each of them; rates are medians. Prints a
table and ends with one line of JSON; exit code 1 if bytes differed or objects were missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

_RUN_SECONDS = 900.0
_ALIGN = 4096
_FAULTS = ("verify_errors", "missing_objects")


@dataclass(frozen=True)
class Load:
    """What is asked of every adapter."""

    keys: int
    in_flight: int
    kib: int
    rounds: int
    warmup: int = 1

    @property
    def bytes(self) -> int:
        """All that is stored."""
        return (self.rounds + self.warmup) * self.keys * self.in_flight * self.kib * 1024

    def arguments(self) -> list[str]:
        """The same for LMCache's command line."""
        return [
            *("--num-keys", str(self.keys), "--in-flight", str(self.in_flight), "--data-size-kb", str(self.kib)),
            *("--rounds", str(self.rounds), "--warmup-rounds", str(self.warmup), "--l1-align-bytes", str(_ALIGN)),
        ]


def adapters(folder: Path, load: Load) -> dict[str, dict[str, Any]]:
    """The configurations, by name; the store of each lies in a folder of its own."""
    nvme = max(256 << 20, load.bytes * 3 // 2)
    return {
        "pegaflow": {
            "type": "plugin",
            "module_path": "pegaflow.lmcache_l2",
            "class_name": "PegaL2Adapter",
            "adapter_params": {"path": str(folder / "pegaflow"), "nvme": nvme, "dram": max(256 << 20, load.bytes // 4)},
        },
        "fs": {"type": "fs", "base_path": str(folder / "fs"), "use_odirect": True},
        "fs_native": {"type": "fs_native", "base_path": str(folder / "fs_native"), "use_odirect": True},
        "raw_block": {
            "type": "raw_block",
            "device_path": str(folder / "raw_block" / "file"),
            "slot_bytes": load.kib * 1024 + _ALIGN,
        },
    }


class AdapterError(Exception):
    """An adapter cannot be run here; the text says why."""


def bench(command: str, adapter: dict[str, Any], load: Load, output: Path, *more: str) -> tuple[dict[str, Any], str]:
    """One run of LMCache's bench: its metrics by operation, and what it said.

    Raises:
        AdapterError: it did not run to its end.
    """
    output.unlink(missing_ok=True)
    line = [command, "bench", "l2", "--l2-adapter", json.dumps(adapter), *load.arguments(), *more]
    ended = subprocess.run(
        [*line, "--format", "json", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=_RUN_SECONDS,
        check=False,
        env={**os.environ, "LMCACHE_DISABLE_BANNER": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    said = ended.stdout + ended.stderr
    if not output.exists():
        problem = re.findall(r"(?:Error|Failed|error)[^\n]*", said)
        raise AdapterError(problem[0] if problem else f"exit code {ended.returncode}: {said[-300:]}")
    metrics = json.loads(output.read_text())["metrics"]
    return {section["operation"]: section for section in metrics.values() if "operation" in section}, said


def forget(folder: Path) -> None:
    """Puts what was written out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def row(name: str, command: str, adapter: dict[str, Any], load: Load, folder: Path) -> dict[str, Any]:
    """Both runs of one adapter."""
    (folder / name).mkdir(parents=True)
    if device := adapter.get("device_path"):
        with Path(device).open("wb") as file:
            file.truncate(load.bytes * 3 // 2 + (512 << 20))
    output = folder / f"{name}.json"
    warm, said = bench(command, adapter, load, output, "--no-skip-verify", "--lookup-max-hit-rate", "0.5")
    forget(folder / name)
    cold, _ = bench(command, adapter, load, output, "--only", "load")
    mismatches = [int(count) for count in re.findall(r"\[Verify\] (\d+)/\d+ keys have data mismatches", said)]
    missing = [operation["total_keys"] - operation["total_success"] for operation in (warm["Load"], cold["Load"])]
    return {
        "adapter": name,
        "store_mbps": warm["Store"]["throughput_avg_mbps"],
        "load_mbps": cold["Load"]["throughput_avg_mbps"],
        "load_same_process_mbps": warm["Load"]["throughput_avg_mbps"],
        "lookup_keys_per_s": warm["Lookup"]["ops_per_sec_avg"],
        "verify_errors": sum(mismatches),
        "missing_objects": sum(missing),
    }


def median_row(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One adapter's turns in one row: medians of rates, sums of what went wrong."""
    return {
        name: value
        if isinstance(value, str)
        else sum(turn[name] for turn in turns)
        if name in _FAULTS
        else median(turn[name] for turn in turns)
        for name, value in turns[0].items()
    }


def main() -> int:
    """Runs all adapters that were asked for, and returns the exit code."""
    parser = argparse.ArgumentParser(description="LMCache's bench of L2 adapters")
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the drive to measure; ext4 or XFS")
    parser.add_argument("--lmcache", default="lmcache", help="LMCache's command")
    parser.add_argument("--only", default="pegaflow,fs,fs_native,raw_block")
    parser.add_argument("--keys", type=int, default=32, help="objects of a batch")
    parser.add_argument("--in-flight", type=int, default=2, help="batches at a time")
    parser.add_argument("--kib", type=int, default=1024, help="size of an object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=1, help="how often each adapter is measured")
    options = parser.parse_args()
    load = Load(options.keys, options.in_flight, options.kib, options.rounds)
    folder: Path = options.dir / "l2-bench"
    turns: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        known = adapters(folder, load)
        for turn in range(max(1, options.turns)):
            for name in options.only.split(","):
                if name in skipped:
                    continue
                print(f"[bench-l2] {name}, turn {turn + 1}", file=sys.stderr, flush=True)
                try:
                    measured = row(name, options.lmcache, known[name], load, folder)
                    print(f"[bench-l2] {json.dumps(measured)}", file=sys.stderr, flush=True)
                    turns.setdefault(name, []).append(measured)
                except (AdapterError, subprocess.TimeoutExpired, KeyError) as error:
                    skipped[name] = f"{type(error).__name__}: {error}"[:400]
                shutil.rmtree(folder / name, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [median_row(of_one) for name, of_one in turns.items() if name not in skipped]
    print(f"{'adapter':<12}{'store MB/s':>12}{'load MB/s, cold':>17}{'same process':>14}{'lookups/s':>12}{'errors':>8}")
    for one in rows:
        print(
            f"{one['adapter']:<12}{one['store_mbps']:>12.0f}{one['load_mbps']:>17.0f}"
            f"{one['load_same_process_mbps']:>14.0f}{one['lookup_keys_per_s']:>12.0f}{one['verify_errors']:>8}"
        )
    for name, why in skipped.items():
        print(f"{name:<12}not run: {why}")
    print(
        json.dumps(
            {"rows": rows, "skipped": skipped, "object_kib": load.kib, "bytes": load.bytes, "turns": options.turns}
        )
    )
    ours = next((one for one in rows if one["adapter"] == "pegaflow"), None)
    return 0 if ours is not None and not ours["verify_errors"] and not ours["missing_objects"] else 1


if __name__ == "__main__":
    sys.exit(main())
