"""What copies at full speed cost a decode batch: vLLM's own steps, in this process, with nothing beside them, with
loads and with saves, in turns. The copies are made by the native module, in the process of the worker as the
connector's are.

Prints JSON on the last line: the rise of the median and of the 99th percentile of the time per output token, the worse
of loads and saves, and both in detail. Needs a GPU.
"""

from __future__ import annotations

import os

# The steps and the copies are to be in one process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import argparse
import faulthandler
import json
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import hosts
import shapes
from child import prompt

if TYPE_CHECKING:
    from vllm import LLM

_WARM_UP_STEPS = 50
# Without an end of a part for so long, where every thread is goes to standard error.
_STUCK_SECONDS = 60.0
# Steps beside copies that take longer than so many times the ones alone mean that the copies starve the model.
_STARVED_FACTOR = 10.0


class Decoding:
    """A batch of requests that are all decoding."""

    def __init__(self, llm: LLM, vocabulary: int, requests: int, tokens: int, answer: int) -> None:
        from vllm import SamplingParams

        self._engine = llm.llm_engine
        self._left = answer
        sampling = SamplingParams(max_tokens=answer, temperature=0.0, detokenize=False, ignore_eos=True)
        for number in range(requests):
            request = {"prompt_token_ids": prompt(f"decode {number}", tokens, vocabulary)}
            self._engine.add_request(str(number), request, sampling)
        answered: set[str] = set()
        while len(answered) < requests:
            answered |= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        self.steps(_WARM_UP_STEPS)

    def steps(self, count: int) -> list[float]:
        """The times of so many steps, in ms; each gives every request a token."""
        self._left -= count
        if self._left < 0 or not self._engine.has_unfinished_requests():
            raise ValueError("the requests are over; give more tokens to answer")
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._engine.step()
            times.append((time.perf_counter() - start) * 1e3)
        return times


class _Watch:
    """Stops copies that are still on after so many seconds."""

    def __init__(self, loop: Any, seconds: float) -> None:
        self._loop = loop
        self._timer = threading.Timer(seconds, self._fire)
        self._timer.daemon = True
        self._timer.start()
        self.has_fired = False

    def _fire(self) -> None:
        self.has_fired = True
        self._loop.stop()

    def stop(self) -> float:
        """Stops the copies; GB/s, or 0 if they were stopped before."""
        self._timer.cancel()
        return float(self._loop.stop())


def _say(what: str) -> None:
    """Reports that it goes on."""
    print(f"interference: {what}", file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()
    faulthandler.dump_traceback_later(_STUCK_SECONDS, repeat=True)


def _percentile(times: list[float], percent: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * percent / 100))]


def measure(decoding: Decoding, loops: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Steps without and with each of the copies, in turns, so that neither drift nor growing contexts count."""
    times: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in loops}
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            half = steps // 2
            before = decoding.steps(half)
            times[name]["alone"] += before
            loop.start()
            # A step that waits for the copies would wait for ever: they only end when they are told to.
            patience = 1 + _STARVED_FACTOR * statistics.median(before) / 1e3 * (steps + 5)
            watch = _Watch(loop, patience)
            decoding.steps(5)
            times[name]["beside"] += decoding.steps(steps)
            rates[name].append(watch.stop())
            if watch.has_fired:
                message = f"{name}: {steps} steps took more than {patience:.1f} s: the copies starve the model"
                raise RuntimeError(message)
            decoding.steps(5)
            times[name]["alone"] += decoding.steps(steps - half)
            median = {kind: round(statistics.median(of_kind), 2) for kind, of_kind in times[name].items()}
            _say(f"{name}: {median['beside']} ms a step beside {rates[name][-1]:.1f} GB/s, {median['alone']} alone")
    details: dict[str, Any] = {}
    for name, both in times.items():
        alone, beside = both["alone"], both["beside"]
        details[name] = {
            "alone_median_ms": round(statistics.median(alone), 4),
            "beside_median_ms": round(statistics.median(beside), 4),
            "alone_p99_ms": round(_percentile(alone, 99), 4),
            "beside_p99_ms": round(_percentile(beside, 99), 4),
            "median_rise": round(statistics.median(beside) / statistics.median(alone) - 1, 4),
            "p99_rise": round(_percentile(beside, 99) / _percentile(alone, 99) - 1, 4),
            "gbps": round(statistics.median(rates[name]), 2),
            "steps": len(beside),
        }
    return details


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    hosts.add_arguments(parser)
    parser.add_argument("--requests", type=int, default=16, help="in the decode batch")
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300, help="of each kind in a round")
    parser.add_argument("--directions", default="load,save", help="a method may follow, as in load:staged")
    parser.add_argument("--block-bytes", type=int, default=2 << 20, help="of one block")
    parser.add_argument("--fragments", type=int, default=32, help="that a block has in the GPU's memory")
    parser.add_argument("--ordinal", type=int, default=0, help="the GPU")
    options = parser.parse_args()
    settings = hosts.settings_of(options)
    directions = options.directions.split(",")
    answer = len(directions) * options.rounds * (2 * options.steps + 10) + _WARM_UP_STEPS + 200

    from pegaflow import _native
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": str(shapes.write(settings.shape, settings.state / "models")),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": options.tokens + answer + 16,
        "gpu_memory_utilization": settings.gpu_memory,
        "enforce_eager": settings.eager,
        "enable_prefix_caching": False,
        "seed": 0,
        **settings.engine,
    }
    llm = LLM(**arguments)
    loops = {}
    for name in directions:
        direction, _, method = name.partition(":")
        loops[name] = _native.CopyLoop(
            options.ordinal, options.block_bytes, options.fragments, direction, method or None
        )
    vocabulary = shapes.SHAPES[settings.shape].vocabulary
    _say("vLLM is ready")
    decoding = Decoding(llm, vocabulary, options.requests, options.tokens, answer)
    _say(f"{options.requests} requests decode")
    details = measure(decoding, loops, options.rounds, options.steps)
    faulthandler.cancel_dump_traceback_later()
    result = {
        "tpot_median_rise": max(one["median_rise"] for one in details.values()),
        "tpot_p99_rise": max(one["p99_rise"] for one in details.values()),
        **details,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
