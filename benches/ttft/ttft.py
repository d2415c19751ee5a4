"""`make bench-ttft`: the time to the first token through a real vLLM, one request at a time, for ours and its peers.

Each system is asked for the same prompts: cold; again (vLLM's own prefix cache); again after that was emptied (a hit);
in a new vLLM with the same server (engine restart); and after the server was restarted as well (all restart: from the
drive). A phase that is done stays in the state folder; a run that is out of time ends with exit code 75 and is repeated
to go on. Every run repeats its reference first: no connector, and the raw link.

Medians, without the first of each. The last line on standard output is JSON; the table goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hosts
from hosts import SYSTEMS, Engine, Settings, StoryError, System

_PHASES = ("bench", "engine_restart", "all_restart")
_OUT_OF_TIME = 75
_CHECKED_TOKENS = 8
# What a phase may still need when it is begun: the start of a vLLM and its prompts.
_PHASE_SECONDS = 170.0
_SETTLE_SECONDS = 4.0


class Bench:
    """One run: phases that are not done yet, as far as the time goes."""

    def __init__(self, settings: Settings, lengths: list[int], prompts: int, deadline: float) -> None:
        self._settings = settings
        self._lengths = lengths
        self._prompts = prompts
        self._deadline = deadline
        self._results = settings.state / "results" / ("eager" if settings.eager else "graphs")
        self._results.mkdir(parents=True, exist_ok=True)
        self._reference: dict[str, Any] | None = None

    def _file(self, system: str, phase: str) -> Path:
        return self._results / f"{system}.{phase}.json"

    def result(self, system: str, phase: str) -> dict[str, Any] | None:
        """What a phase gave; none if it is not done."""
        file = self._file(system, phase)
        return json.loads(file.read_text()) if file.exists() else None

    def _save(self, system: str, phase: str, result: dict[str, Any]) -> None:
        temporary = self._file(system, phase).with_suffix(".new")
        temporary.write_text(json.dumps(result | {"reference": self._reference}, indent=1))
        temporary.rename(self._file(system, phase))

    def _has_time(self) -> bool:
        return time.monotonic() + _PHASE_SECONDS < self._deadline

    # --- phases -------------------------------------------------------------------------------------------------------

    def measure(self, name: str) -> bool:
        """Measures what is missing of a system; whether it got to the end."""
        system = SYSTEMS[name](self._settings)
        wanted = [phase for phase in self._phases_of(system) if not self._file(name, phase).exists()]
        if not wanted:
            return True
        if not self._has_time():
            return False
        self._refer()
        if not self._has_time():
            return False
        if name in ("none", "gpu_prefix"):
            return True
        is_filled = False
        try:
            for phase in wanted:
                if not self._has_time():
                    return False
                _say(f"{name}: {phase}")
                if phase == "bench":
                    self._save(name, phase, self._bench(system))
                    is_filled = True
                    continue
                if not is_filled:
                    self._fill(system)
                    is_filled = True
                if phase == "all_restart":
                    system.settle()
                    system.stop()
                    system.start(empty=False)
                self._save(name, phase, self._restart(system, phase))
        finally:
            system.stop()
        return True

    @staticmethod
    def _phases_of(system: System) -> list[str]:
        survives = {"engine_restart": system.survives_engine, "all_restart": system.survives_server}
        return [phase for phase in _PHASES if survives.get(phase, True)]

    def _refer(self) -> None:
        """The reference of this run; the newest is what stands in the table for `none` and `gpu_prefix`."""
        if self._reference is not None:
            return
        _say("reference: the raw link, and no connector")
        link = subprocess.run(
            [self._settings.python, hosts.HERE / "link.py"], capture_output=True, text=True, check=False
        )
        rates = json.loads(link.stdout.splitlines()[-1]) if link.returncode == 0 else {}
        none = self._bench(SYSTEMS["none"](self._settings))
        summary = {
            str(tokens): {"cold_ms": _median(row["cold"]), "gpu_prefix_ms": _median(row["gpu"])}
            for tokens, row in none["lengths"].items()
        }
        self._reference = {**rates, "none": summary}
        for name in ("none", "gpu_prefix"):
            self._save(name, "bench", none)

    def _bench(self, system: System) -> dict[str, Any]:
        """Cold, and hits."""
        system.start(empty=True)
        engine = system.engine("bench")
        keeps = system.name != "none"
        try:
            self._warm_up(engine, "bench", [4096, max(self._lengths)])
            lengths: dict[int, Any] = {}
            for tokens in self._lengths:
                row = lengths[tokens] = {
                    "cold": self._ask_all(engine, tokens),
                    "gpu": self._ask_all(engine, tokens),
                    "gpu_long": engine.ask(_seed(tokens, 0), tokens + 1, _CHECKED_TOKENS),
                }
                if not keeps:
                    continue
                system.settle()
                engine.reset()
                row["hit"], row["hit_cpu_s"] = self._ask_all_and_count(system, engine, tokens)
                engine.reset()
                row["hit_long"] = engine.ask(_seed(tokens, 0), tokens + 1, _CHECKED_TOKENS)
            return {"start_s": engine.start_s, "lengths": lengths}
        finally:
            engine.stop()

    def _fill(self, system: System) -> None:
        """Has a vLLM compute all prompts anew: the server of the run before is gone."""
        _say(f"{system.name}: filling the cache again")
        system.start(empty=True)
        engine = system.engine("fill")
        try:
            for tokens in self._lengths:
                self._ask_all(engine, tokens)
            system.settle()
            engine.reset()
        finally:
            engine.stop()

    def _restart(self, system: System, phase: str) -> dict[str, Any]:
        """The same prompts in a new vLLM."""
        engine = system.engine(phase)
        try:
            self._warm_up(engine, phase, [4096, 8192])
            lengths = {}
            for tokens in self._lengths:
                hits, cpu_s = self._ask_all_and_count(system, engine, tokens)
                lengths[tokens] = {"hit": hits, "hit_cpu_s": cpu_s}
            return {"start_s": engine.start_s, "lengths": lengths}
        finally:
            engine.stop()

    def _warm_up(self, engine: Engine, phase: str, lengths: list[int]) -> None:
        for tokens in lengths:
            engine.ask(f"warm-up {phase}", min(tokens, max(self._lengths)))
        # Whatever is still prepared in the background; connectors report it in a step.
        time.sleep(_SETTLE_SECONDS)
        engine.nudge()
        engine.nudge()

    def _ask_all(self, engine: Engine, tokens: int) -> list[dict[str, Any]]:
        # One token more than can be found: then every system computes just that one, and tokens may be compared.
        return [engine.ask(_seed(tokens, index), tokens + 1) for index in range(self._prompts)]

    def _ask_all_and_count(self, system: System, engine: Engine, tokens: int) -> tuple[list[dict[str, Any]], float]:
        """The answers, and the seconds of processor time that each took, in vLLM and beside it."""
        before = engine.cpu_seconds() + system.cpu_seconds()
        answers = self._ask_all(engine, tokens)
        return answers, round((engine.cpu_seconds() + system.cpu_seconds() - before) / len(answers), 3)

    # --- the table ----------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """All that is known by now."""
        rows = []
        for name, system in SYSTEMS.items():
            bench = self.result(name, "bench")
            if bench is None:
                continue
            restarts = {phase: self.result(name, phase) for phase in _PHASES[1:]}
            for tokens in self._lengths:
                if row := bench["lengths"].get(str(tokens)):
                    later = {
                        phase: found["lengths"].get(str(tokens))
                        for phase, found in restarts.items()
                        if found is not None
                    }
                    rows.append(self._row(name, tokens, row, later, loads=system.loads))
        return rows

    def _row(
        self, name: str, tokens: int, bench: dict[str, Any], later: dict[str, Any], *, loads: bool
    ) -> dict[str, Any]:
        hits = bench["gpu"] if name == "gpu_prefix" else bench.get("hit")
        asked = {"hit": hits, **{phase: row["hit"] for phase, row in later.items() if row}}
        reference = [answer["tokens"] for answer in bench["gpu"]]
        equal: bool | None = None
        if hits:
            equal = all([answer["tokens"] for answer in answers] == reference for answers in asked.values() if answers)
            if "hit_long" in bench:
                equal = equal and bench["hit_long"]["tokens"] == bench["gpu_long"]["tokens"]
            if len({tuple(answer) for answer in reference}) < min(2, len(reference)):
                equal = None  # every prompt has the same answer: equal tokens say nothing
        row = {
            "system": name,
            "tokens": tokens,
            "cold_ms": _median(bench["cold"]),
            "hit_ms": _median(hits),
            "engine_restart_ms": _median(asked.get("engine_restart")),
            "all_restart_ms": _median(asked.get("all_restart")),
            "cached_tokens": min((answer["cached"] for answer in hits), default=0) if hits else 0,
            "tokens_equal": equal,
            "gpu_prefix_ms": _median(bench["gpu"]),
            "hit_cpu_s": bench.get("hit_cpu_s"),
            **{f"{phase}_cpu_s": row.get("hit_cpu_s") for phase, row in later.items() if row},
        }
        for phase, answers in asked.items():
            if phase != "hit" and answers:
                row[f"{phase}_cached_tokens"] = min(answer["cached"] for answer in answers)
        if loads and hits:
            floors = [self._floor_ms(answer["cached"]) for answer in hits]
            row["link_ms"] = round(max(floors), 2)
            row["not_loaded"] = any(answer["ms"] < floor for answer, floor in zip(hits, floors, strict=True))
        return row

    def _floor_ms(self, tokens: int) -> float:
        """How long the link needs at least for the blocks of so many tokens."""
        none = self.result("none", "bench")
        rate = ((none or {}).get("reference") or {}).get("link_h2d_gbps")
        return tokens * self._settings.kv_bytes_per_token / rate / 1e6 if rate else 0.0


def _seed(tokens: int, index: int) -> str:
    return f"{tokens} {index}"


def _median(answers: list[dict[str, Any]] | None) -> float | None:
    """Of the times without the first."""
    if not answers:
        return None
    times = [answer["ms"] for answer in answers]
    return round(float(statistics.median(times[1:] or times)), 2)


def _say(text: str) -> None:
    print(f"bench-ttft: {text}", file=sys.stderr, flush=True)


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = ["system", "tokens", "cold_ms", "hit_ms", "engine_restart_ms", "all_restart_ms", "cached_tokens"]
    columns += ["tokens_equal", "link_ms", "not_loaded", "hit_cpu_s", "engine_restart_cpu_s"]
    table = [
        tuple(columns),
        *(tuple("" if row.get(name) is None else str(row[name]) for name in columns) for row in rows),
    ]
    widths = [max(len(line[at]) for line in table) for at in range(len(columns))]
    for line in table:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)), file=sys.stderr)


def main() -> int:
    """Measures what is missing, and prints all that is known."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    hosts.add_arguments(parser)
    parser.add_argument("--only", default="", help=f"of {','.join(SYSTEMS)}; default: all that are installed")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--prompts", type=int, default=4, help="of each length, 3 to 8; the first is left out")
    parser.add_argument("--step-seconds", type=float, default=540.0, help="the time that this run may take")
    parser.add_argument("--again", action="store_true", help="forget the results of the systems named")
    options = parser.parse_args()
    settings = hosts.settings_of(options)
    names = options.only.split(",") if options.only else list(SYSTEMS)
    if unknown := sorted(set(names) - set(SYSTEMS)):
        parser.error(f"--only has {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    bench = Bench(
        settings, [int(n) for n in options.lengths.split(",")], options.prompts, started + options.step_seconds
    )
    failed, is_done = {}, True
    for name in names:
        if problem := SYSTEMS[name](settings).why_not():
            _say(f"{name} is left out: {problem}")
            continue
        if options.again:
            for phase in _PHASES:
                bench._file(name, phase).unlink(missing_ok=True)
        try:
            is_done = bench.measure(name) and is_done
        except (StoryError, OSError, ValueError) as error:
            failed[name] = str(error)
            _say(f"{name} failed: {error}")
    rows = bench.rows()
    _print_table(rows)
    if not is_done:
        _say("out of time; run it again to go on")
    print(json.dumps({"rows": rows, "failed": {name: text.splitlines()[0] for name, text in failed.items()}}))
    if failed:
        return 1
    return 0 if is_done else _OUT_OF_TIME


if __name__ == "__main__":
    sys.exit(main())
