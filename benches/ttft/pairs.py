"""Cold requests with the connector on: two vLLMs share a GPU, one with it and one without, and are asked for the same
new prompts in turns. Prints the median of the ratios and its 95 % confidence interval (bootstrap), as JSON on the last
line.

usage: pairs.py [--pairs 40] [--lengths 2048,8192] [options of bench-ttft]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time

import hosts
from hosts import SYSTEMS, Engine, PegaFlow

_RESAMPLES = 10_000
# The saves of a prompt of 32,768 tokens end in 0.1 s; they would slow down the other vLLM, not the one that saves.
_PAUSE_SECONDS = 0.4
_WARM_UPS = 3


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % confidence interval of the median."""
    source = random.Random(seed)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[round(_RESAMPLES * 0.025)], medians[round(_RESAMPLES * 0.975)]


def measure(engines: dict[str, Engine], tokens: int, pairs: int, run: str) -> dict[str, float | int]:
    """Asks both for `pairs` new prompts, the one or the other first in turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for pair in range(-_WARM_UPS, pairs):
        order = list(engines) if pair % 2 else list(reversed(engines))
        for name in order:
            answer = engines[name].ask(f"pair {run} {tokens} {pair}", tokens)
            if answer["cached"]:
                raise ValueError(f"{name} had {answer['cached']} tokens of a new prompt")
            if pair >= 0:
                times[name].append(answer["ms"])
            time.sleep(_PAUSE_SECONDS)
    ratios = [with_it / without for with_it, without in zip(times["pegaflow"], times["none"], strict=True)]
    low, high = interval(ratios)
    return {
        "tokens": tokens,
        "pairs": pairs,
        "none_ms": round(statistics.median(times["none"]), 2),
        "pegaflow_ms": round(statistics.median(times["pegaflow"]), 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
    }


def main() -> int:
    """Starts both, measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    hosts.add_arguments(parser)
    parser.set_defaults(gpu_memory=0.4)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--lengths", default="2048,8192")
    options = parser.parse_args()
    settings = hosts.settings_of(options)
    system = PegaFlow(settings)
    engines: dict[str, Engine] = {}
    try:
        system.start(empty=True)
        # One after the other: each takes its share of the memory that is free when it starts.
        engines["none"] = SYSTEMS["none"](settings).engine("pairs")
        engines["pegaflow"] = system.engine("pairs")
        rows = []
        for tokens in (int(n) for n in options.lengths.split(",")):
            rows.append(measure(engines, tokens, options.pairs, str(time.time_ns())))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        for engine in engines.values():
            engine.stop()
        system.stop()
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
