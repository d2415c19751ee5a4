"""The examples in python/examples run as they stand, on vLLM for CPUs, and say what they are there to show."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines import VllmSettings
from processes import Process

pytest.importorskip("vllm")

import model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "python" / "examples"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
# The programs that the wheel has brought.
BINARIES = Path(sys.executable).parent
# All together take about two minutes on two cores.
LIMIT_SECONDS = 600.0
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "basic_usage.py": (),
    "basic_vllm.py": ("--model", "MODEL"),
    "vllm_prefill_decode.py": ("--model", "MODEL", "--binaries", str(BINARIES)),
    "bench_kv_cache.py": (
        *("--model", "MODEL", "--prompts", "2", "--prompt-tokens", "256", "--systems", "SYSTEMS"),
        *("--binaries", str(BINARIES)),
    ),
}


@dataclass(frozen=True)
class Ended:
    """What became of an example: its exit code (`None`: it did not end in time), and all that it said."""

    code: int | None
    said: str


Examples = Mapping[str, Future[Ended]]


@pytest.fixture(scope="module")
def examples() -> Iterator[Examples]:
    """All examples, two at a time."""
    folder = TARGET / "tmp" / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = (TARGET / "run" / "model").resolve()
    model.make(made)
    environment = VllmSettings(Path(sys.executable), made, folder).environment()
    values = {"MODEL": str(made), "SYSTEMS": "pegaflow,pegaflow-embedded,native,native-pegaflow,lmcache,upstream"}

    def run(name: str) -> Ended:
        command: list[str | Path] = [
            sys.executable,
            EXAMPLES / name,
            *(values.get(argument, argument) for argument in COMMANDS[name]),
        ]
        log = folder / f"{name}.log"
        example = Process(name, command, log, environment)
        try:
            code = example.popen.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            example.kill()  # and what it has started
        return Ended(code, log.read_text(errors="replace"))

    with chdir(folder), ThreadPoolExecutor(2) as runners:
        yield {name: runners.submit(run, name) for name in COMMANDS}


def output_of(examples: Examples, name: str) -> str:
    """What an example printed; it has to have ended well."""
    ended = examples[name].result()
    assert ended.code == 0, ended.said[-8000:]
    return ended.said


def test_objects_survive_the_engine(examples: Examples) -> None:
    assert output_of(examples, "basic_usage.py").count("the same bytes") == 4


def test_vllm_is_warm_after_a_restart(examples: Examples) -> None:
    assert "the restarted vLLM found what was computed before" in output_of(examples, "basic_vllm.py")


@pytest.mark.skipif(
    not (BINARIES / "pegaflow-router").is_file(), reason="the wheel is not installed; make installed does it"
)
def test_one_vllm_computes_prompts_and_the_other_answers(
    examples: Examples,
) -> None:
    assert output_of(examples, "vllm_prefill_decode.py").count("the answer of a single engine") == 3


def test_the_bench_measures_what_runs_here_and_says_why_the_rest_does_not(
    examples: Examples,
) -> None:
    last = [line for line in output_of(examples, "bench_kv_cache.py").splitlines() if line.startswith("{")][-1]
    rows = {row["system"]: row for row in json.loads(last)["rows"]}
    for system in ("pegaflow", "pegaflow-embedded"):
        if (BINARIES / "pegaflow-server").is_file() or system == "pegaflow-embedded":
            row = rows[system]
            assert row["tokens_equal"]
            times = ("cold", "warm", "restarted", "all_restarted", "warm_cpu")
            assert all(row[f"{name}_ms"] > 0 for name in times)
    assert "GPUs only" in rows["native"]["skipped"]
    assert "GPUs only" in rows["native-pegaflow"]["skipped"]
    assert "skipped" in rows["upstream"]
