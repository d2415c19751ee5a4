"""Whether the bytes that arrive in vLLM's memory are those that were saved, bit by bit, and the tokens those of a hit
in vLLM's own prefix cache. vLLM's whole KV cache is overwritten before each hit. With PEGAFLOW_TEST_SKIP_LOAD=1 in the
environment nothing is loaded and the check has to fail.

Hits are checked in the same vLLM (`dram`), in a new one with the same server (`engine`), and after a restart of both
(`all`, from the drive). With --kills vLLMs are killed with -9 in the middle of loads and saves before that, and what
each held must come back. JSON on the last line; exit code 1 if anything differs, was not found or was not given back.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

import hosts
from hosts import Engine, PegaFlow

_ANSWER_TOKENS = 8
_PHASES = ("dram", "engine", "all")


class Check:
    """One run of the check."""

    def __init__(self, system: PegaFlow, lengths: list[int], block_tokens: int) -> None:
        self._system = system
        self._lengths = lengths
        self._block_tokens = block_tokens
        self._kept = system.settings.state / "kept"
        self._tokens: dict[int, list[int]] = {}
        self.rows: list[dict[str, Any]] = []
        self.kills: list[dict[str, Any]] = []

    def _blocks(self, tokens: int) -> int:
        """How many blocks can be loaded. Prompts have a token more: one is computed, in every way of asking."""
        return tokens // self._block_tokens

    def engine(self, name: str) -> Engine:
        """A vLLM whose blocks are watched."""
        engine = self._system.engine(name)
        engine.rpc("probe_watch")
        return engine

    def save(self, engine: Engine) -> None:
        """Asks for all prompts, and keeps the bytes of their blocks and the tokens of a hit in vLLM's own cache."""
        for tokens in self._lengths:
            engine.ask(f"bytes {tokens}", tokens + 1)
            for blocks in engine.rpc("probe_blocks"):
                if len(blocks) < self._blocks(tokens):
                    raise ValueError(f"a prompt of {tokens} tokens has {len(blocks)} blocks")
            blocks = engine.rpc("probe_blocks")[0][: self._blocks(tokens)]
            engine.rpc("probe_keep", str(self._kept / str(tokens)), blocks)
            self._tokens[tokens] = engine.ask(f"bytes {tokens}", tokens + 1, _ANSWER_TOKENS)["tokens"]
        self._system.settle()

    def kill(self, number: int) -> None:
        """Kills a vLLM that loads and saves; the server must have everything back that it held."""
        engine = self._system.engine(f"bytes victim {number}")
        engine.ask("warm-up", 64)
        for round_ in range(8):
            for tokens in self._lengths:
                engine.send("ask", f"bytes {tokens}", tokens + 1, 1)
                engine.send("ask", f"victim {number} {round_} {tokens}", tokens, 1)
                engine.send("reset")
        time.sleep(random.Random(number).uniform(0.3, 1.5))
        engine.process.kill()
        held = self._system.held(75.0)
        self.kills.append({"kill": number, "held": held})
        print(json.dumps(self.kills[-1]), file=sys.stderr, flush=True)

    def compare(self, engine: Engine, phase: str) -> None:
        """Asks again, with nothing left in vLLM's own memory."""
        for tokens in self._lengths:
            engine.reset()
            engine.rpc("probe_poison")
            answer = engine.ask(f"bytes {tokens}", tokens + 1, _ANSWER_TOKENS)
            expected = self._blocks(tokens)
            row: dict[str, Any] = {
                "phase": phase,
                "tokens": tokens,
                "cached_tokens": answer["cached"],
                "ms": round(answer["ms"], 1),
                "hit": answer["cached"] == expected * self._block_tokens,
                "tokens_equal": answer["tokens"] == self._tokens[tokens],
            }
            blocks = engine.rpc("probe_blocks")[0][:expected]
            found = engine.rpc("probe_compare", str(self._kept / str(tokens)), blocks)
            for name in ("bytes", "wrong_blocks", "wrong_bytes"):
                row[name] = sum(one[name] for one in found)
            row["bytes_equal"] = row["wrong_bytes"] == 0
            self.rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)

    def run(self, phases: list[str], kills: int) -> None:
        """All phases, in order."""
        engine: Engine | None = None
        try:
            self._system.start(empty=True)
            engine = self.engine("bytes save")
            self.save(engine)
            if "dram" in phases:
                self.compare(engine, "dram")
            engine.stop()
            for number in range(kills):
                self.kill(number)
            for phase in [phase for phase in phases if phase != "dram"]:
                if phase == "all":
                    self._system.settle()
                    self._system.stop()
                    self._system.start(empty=False)
                engine = self.engine(f"bytes {phase}")
                # What the worker prepares in the background is told in steps.
                engine.ask("warm-up", 64)
                self.compare(engine, phase)
                engine.stop()
        finally:
            if engine is not None:
                engine.stop()
            self._system.stop()


def main() -> int:
    """Checks and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    hosts.add_arguments(parser)
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--phases", default="dram,engine,all")
    parser.add_argument("--kills", type=int, default=0, help="how many vLLMs are killed")
    parser.add_argument("--block-tokens", type=int, default=16, help="vLLM's block size")
    parser.add_argument("--connector", type=json.loads, default={}, help="more of kv_connector_extra_config, as JSON")
    options = parser.parse_args()
    phases = options.phases.split(",")
    if unknown := sorted(set(phases) - set(_PHASES)):
        parser.error(f"--phases has {', '.join(unknown)}; there are {', '.join(_PHASES)}")
    system = PegaFlow(hosts.settings_of(options), **options.connector)
    system.settings.engine.setdefault("block_size", options.block_tokens)
    if problem := system.why_not():
        print(problem, file=sys.stderr)
        return 2
    check = Check(system, [int(n) for n in options.lengths.split(",")], options.block_tokens)
    check.run(phases, options.kills)
    is_right = all(row["hit"] and row["bytes_equal"] and row["tokens_equal"] for row in check.rows)
    is_right = is_right and all(not any(one["held"].values()) for one in check.kills)
    print(json.dumps({"is_right": is_right, "rows": check.rows, "kills": check.kills}))
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
