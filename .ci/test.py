"""Runs the tests in stages, all of them even when one fails, and ends with their sum.

usage: test.py --version VLLM_VERSION [--only rust|python|lmcache|story]...

The last line is `N passed, N failed`; the same is left in target/test-summary.txt. Exit code 0 only when nothing
failed. A stage that could not be run, or that ran no test, counts as one failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "target"


@dataclass(frozen=True)
class Count:
    """Tests that passed and failed."""

    passed: int = 0
    failed: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.passed + other.passed, self.failed + other.failed)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed"


def shown(command: Sequence[str], timeout_seconds: float, **environment: str) -> tuple[int, str]:
    """Runs a command, showing its output as it comes; returns the exit code and the output. A time-out is code 124."""
    print(f"$ {' '.join(command)}", flush=True)
    merged = {**os.environ, **environment}
    deadline = f"{timeout_seconds:.0f}"
    # `timeout` ends the whole process group, and the reading below ends with it.
    process = subprocess.Popen(
        ["timeout", "--kill-after=30", deadline, *command],
        cwd=ROOT,
        env=merged,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: list[str] = []
    if process.stdout is not None:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.wait(), "".join(lines)


def counted(code: int, count: Count) -> Count:
    """A stage's count; a stage that ended badly without a failed test, or that ran none, has failed as a whole."""
    if count.failed == 0 and (code != 0 or count.passed == 0):
        return count + Count(failed=1)
    return count


def sum_of(pattern: str, output: str) -> int:
    """The sum of all numbers that the pattern's group finds."""
    return sum(int(number) for number in re.findall(pattern, output, re.MULTILINE))


def cargo_tests(output: str) -> Count:
    """What `cargo test` says of its binaries."""
    return Count(
        sum_of(r"^test result: .*? (\d+) passed", output),
        sum_of(r"^test result: .*? (\d+) failed", output),
    )


def rust(_version: str) -> Count:
    """Unit, conformance and integration tests of all crates, and the examples in their documentation."""
    if not os.environ.get("PEGAFLOW_HAS_NEXTEST"):
        code, output = shown(["cargo", "test", "--workspace", "--no-fail-fast", "--locked"], 3600)
        return counted(code, cargo_tests(output))
    code, output = shown(
        [
            "cargo",
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--locked",
            "--show-progress=none",
        ],
        3600,
    )
    summary = re.search(r"^\s*Summary .*$", re.sub(r"\x1b\[[0-9;]*m", "", output), re.MULTILINE)
    line = summary[0] if summary else ""
    bad = sum(sum_of(rf"(\d+) {word}", line) for word in ("failed", "timed out", "exec failed"))
    tests = counted(code, Count(sum_of(r"(\d+) passed", line), bad))
    code, output = shown(
        [
            "cargo",
            "test",
            "--workspace",
            "--doc",
            "--no-fail-fast",
            "--locked",
            "--quiet",
        ],
        1800,
    )
    examples = cargo_tests(output)
    return tests + examples + Count(failed=int(code != 0 and examples.failed == 0))


def python(version: str) -> Count:
    """Tests of the Python package, with the wheel and the vLLM that the story uses."""
    code, _ = shown(["make", "installed", f"VERSION={version}"], 3600)
    if code != 0:
        return Count(failed=1)
    interpreter = str(TARGET / f"vllm-{version}" / "bin" / "python")
    total = Count()
    code, _ = shown(["make", "sglang"], 900)  # without it the tests of its backend would be skipped
    if code != 0:
        total += Count(failed=1)
    for folder in ("python", "tests/e2e"):
        tests = f"{folder}/tests" if folder == "python" else folder
        command = [interpreter, "-m", "pytest", "-q", "--color=no", "-c", f"{folder}/pyproject.toml", tests]
        code, output = shown(command, 900)
        line = output.rstrip().rpartition("\n")[2]
        bad = sum_of(r"(\d+) failed", line) + sum_of(r"(\d+) error", line)
        total += counted(code, Count(sum_of(r"(\d+) passed", line), bad))
    return total


def lmcache(version: str) -> Count:
    """The adapter for LMCache, with LMCache itself in an environment of its own."""
    environment = TARGET / "lmcache"
    code, _ = shown(["benches/lmcache/install.sh", str(environment), str(TARGET / f"vllm-{version}")], 900)
    if code != 0:
        return Count(failed=1)
    tests = ["-c", "python/pyproject.toml", "python/tests/test_lmcache_l2.py"]
    code, output = shown([str(environment / "bin" / "python"), "-m", "pytest", "-q", "--color=no", *tests], 600)
    line = output.rstrip().rpartition("\n")[2]
    bad = sum_of(r"(\d+) failed", line) + sum_of(r"(\d+) error", line)
    return counted(code, Count(sum_of(r"(\d+) passed", line), bad))


def story(version: str) -> Count:
    """The story with a real vLLM, and with loaded bytes flipped, which must be seen. Each claim is one test."""
    code, output = shown(["make", "run", f"VERSION={version}", "CHECK_FLIP=1"], 2400)
    try:
        # Make says something after it when the story failed.
        outcome = json.loads(re.findall(r"^\{.*\}$", output, re.MULTILINE)[-1])
        claims = [
            outcome["restart_warm"],
            outcome["tokens_equal"],
            outcome["hit_ratio_after_restart"] >= 0.95,
        ]
        claims.append(outcome["flip_noticed"])
    except (ValueError, LookupError, TypeError):
        return Count(failed=1)
    passed = sum(claim is True for claim in claims)
    return counted(code, Count(passed, len(claims) - passed))


def prewarm(version: str) -> Count:
    """Prompts computed offline by a real vLLM, killed and resumed, then served; packed and served elsewhere."""
    code, output = shown(["make", "check-prewarm", f"VERSION={version}", "PROMPTS=48"], 1800)
    try:
        outcome = json.loads(re.findall(r"^\{.*\}$", output, re.MULTILINE)[-1])
        claims = [
            outcome["resumed"] and outcome["repeated"] == 0 and outcome["failed"] == 0,
            outcome["hit_ratio"] >= 0.95 and outcome["tokens_equal"],
            outcome["pack_hit_ratio"] >= 0.95 and outcome["pack_tokens_equal"],
            outcome["refuses_changed_pack"],
        ]
    except (ValueError, LookupError, TypeError):
        return Count(failed=1)
    passed = sum(claim is True for claim in claims)
    return counted(code, Count(passed, len(claims) - passed))


STAGES: Mapping[str, Callable[[str], Count]] = {
    "rust": rust,
    "python": python,
    "lmcache": lmcache,
    "story": story,
    "prewarm": prewarm,
}


def main() -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", required=True, help="the vLLM to test with")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(STAGES),
        help="this stage only; may be repeated",
    )
    options = parser.parse_args()
    os.environ.setdefault("CARGO_TERM_COLOR", "never")
    total, lines = Count(), []
    for name in options.only or STAGES:
        started = time.monotonic()
        count = STAGES[name](options.version)
        lines.append(
            f"{name:<8} {count.passed:>5} passed {count.failed:>4} failed {time.monotonic() - started:>7.0f} s"
        )
        print(lines[-1], flush=True)
        total += count
    print("\n" + "\n".join(lines))
    TARGET.mkdir(exist_ok=True)
    (TARGET / "test-summary.txt").write_text(f"{total}\n")
    print(total, flush=True)
    return 0 if total.failed == 0 and total.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
