"""Load or compute with a real vLLM: decisions are made, obeyed, explained and switched at run time, tokens stay the
same, and what the connector costs a request for which nothing is found.

1. vLLM with PegaFlow and plain vLLM answer prompts that nobody has seen, in turn: medians of the time to first token.
2. vLLM and the server get SIGKILL and are started anew, so that everything is on the drive. The same prompts under
   `auto`, `never`, `shadow` and `always`: each prompt's decision is asked for with `pegaflow explain`.

Ends with one line of JSON. Exit code 0: everything held; 1: something did not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import BLOCK_TOKENS, OfflineEngine, VllmSettings
from processes import StoryError, kill_at_once
from prompts import Prompt
from store_server import ServerSettings, StoreServer

DURABLE_SECONDS = 2.0
PROMPT_TOKENS = 1_000
POLICIES = ("auto", "never", "shadow", "always")
PROMPTS_PER_POLICY = 4


def fresh(source: random.Random, number: int) -> Prompt:
    """A prompt that nobody has asked."""
    return Prompt(f"prompt {number}", tuple(source.randrange(3, 97) for _ in range(PROMPT_TOKENS)), max_tokens=4)


def asked(options: argparse.Namespace, socket: Path, *command: str) -> str:
    """What the command line of operators prints."""
    program = options.server.with_name("pegaflow")
    done = subprocess.run(
        [program, "--socket", socket, *command], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise StoryError(f"pegaflow {' '.join(command)} failed: {done.stderr}")
    return done.stdout


def compare(plain: OfflineEngine, cached: OfflineEngine, prompts: list[Prompt]) -> tuple[list[tuple[int, ...]], float]:
    """Both answer everything, one after the other. The answers, and how much slower the first tokens come."""
    times: dict[int, list[float]] = {0: [], 1: []}
    answers = []
    for number, prompt in enumerate(prompts):
        order = (plain, cached) if number % 2 == 0 else (cached, plain)
        for engine in order:
            (answer,) = engine.ask([prompt]).answers
            times[int(engine is cached)].append(answer.ttft_ms or 0.0)
            if engine is plain:
                answers.append(answer.tokens)
    return answers, statistics.median(times[1]) / statistics.median(times[0]) - 1.0


@dataclass(frozen=True)
class Stage:
    """The settings of both parts."""

    options: argparse.Namespace
    server: ServerSettings
    plain: VllmSettings
    cached: VllmSettings

    @classmethod
    def of(cls, options: argparse.Namespace, folder: Path) -> Stage:
        """Everything lies in `folder`."""
        logs = folder / "logs"
        logs.mkdir()
        server = ServerSettings(options.server, folder / "store", folder / "s", logs)
        connector = server.connector()
        connector["kv_connector_extra_config"]["load_policy"] = "auto"
        # The virtual environment's own name of the interpreter: behind the link there are no packages.
        python = Path(sys.executable)
        plain = VllmSettings(python, options.model, logs)
        return cls(options, server, plain, VllmSettings(python, options.model, logs, connector))

    def cold(self, source: random.Random, prompts: list[Prompt]) -> tuple[list[tuple[int, ...]], float]:
        """The first part: the answers, and how much slower the first tokens come with the connector."""
        plain = OfflineEngine("plain", self.plain)
        try:
            server = StoreServer("cold", self.server)
            try:
                cached = OfflineEngine("cold", self.cached)
                try:
                    # Both warm up.
                    compare(plain, cached, [fresh(source, number) for number in range(-4, 0)])
                    outcome = compare(plain, cached, prompts)
                    time.sleep(DURABLE_SECONDS)
                finally:
                    kill_at_once([cached.process, server.process])
            finally:
                server.process.kill()
        finally:
            plain.process.kill()
        return outcome

    def warm(self, source: random.Random, known: list[tuple[Prompt, tuple[int, ...]]]) -> dict[str, list[str]]:
        """The second part: the decisions, and what was wrong with them."""
        outcome: dict[str, list[str]] = {"decisions": [], "problems": []}
        server = StoreServer("warm", self.server)
        try:
            cached = OfflineEngine("warm", self.cached)
            try:
                # What computing takes is learned from a prompt that is not found.
                cached.ask([fresh(source, -1)])
                for number, (prompt, expected) in enumerate(known):
                    policy = POLICIES[number // PROMPTS_PER_POLICY]
                    asked(self.options, self.server.socket, "load-policy", policy)
                    before = sum(server.loaded_blocks().values())
                    (answer,) = cached.ask([prompt]).answers
                    loaded = sum(server.loaded_blocks().values()) - before
                    explained = asked(self.options, self.server.socket, "explain", "--json", "--last", "1")
                    (record,) = json.loads(explained)["decisions"]
                    line = f"{policy}: {record['text']}; {loaded} blocks loaded"
                    print(line, flush=True)
                    outcome["decisions"].append(line)
                    if answer.tokens != expected:
                        outcome["problems"].append(f"other tokens than plain vLLM's: {line}")
                    if not is_obeyed(policy, record["decision"], loaded):
                        outcome["problems"].append(f"not as it should be: {line}")
            finally:
                cached.process.kill()
        finally:
            server.process.kill()
        return outcome


def is_obeyed(policy: str, decision: dict[str, Any], loaded: int) -> bool:
    """Whether the decision is the policy's, and what was loaded is the decision's: all or nothing."""
    is_load = decision["choice"] == "load"
    expected = decision["preferred"] == "load" if policy == "auto" else policy != "never"
    return is_load == expected and loaded == ((PROMPT_TOKENS - 1) // BLOCK_TOKENS if is_load else 0)


def tell(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both parts; what came of them."""
    source = random.Random(options.seed)
    stage = Stage.of(options, folder)
    prompts = [fresh(source, number) for number in range(options.requests)]
    reference, overhead = stage.cold(source, prompts)
    known = list(zip(prompts, reference, strict=True))[: len(POLICIES) * PROMPTS_PER_POLICY]
    return {"zero_hit_overhead": round(overhead, 4), "requests": len(prompts), **stage.warm(source, known)}


def main() -> int:
    """Runs it in a folder of its own."""
    parser = argparse.ArgumentParser(description="Load or compute, with a real vLLM.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model that model.py makes")
    parser.add_argument(
        "--server", type=Path, required=True, help="the pegaflow-server binary; pegaflow lies beside it"
    )
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder on ext4 or XFS, with a short path")
    parser.add_argument("--requests", type=int, default=30, help="of each kind; at least 16")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="loc-") as folder:
        outcome = tell(options, Path(folder))
    print(json.dumps(outcome))
    return 1 if outcome["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
