"""One vLLM in a process of its own, asked through pipes: the offline `LLM` class, its engine core a process again.

Lines of JSON come in on standard input and go out on the descriptor given; standard output is the log. It ends when its
input ends; the harness usually kills it before.

usage: offline.py SETTINGS_JSON OUTPUT_DESCRIPTOR
"""

from __future__ import annotations

import json
import os
import sys
import time

from vllm import LLM, SamplingParams


def tokens_by_source(llm: LLM) -> dict[str, int]:
    """vLLM's own count of prompt tokens since start: computed, found in its cache, got from a connector."""
    counts: dict[str, int] = {}
    for metric in llm.get_metrics():
        if metric.name.removesuffix("_total") == "vllm:prompt_tokens_by_source":
            source = metric.labels["source"]
            counts[source] = counts.get(source, 0) + int(metric.value)
    return counts


def main() -> None:
    """Loads the model, says so, and answers until the input ends."""
    settings = json.loads(sys.argv[1])
    with os.fdopen(int(sys.argv[2]), "w", buffering=1) as replies:
        started = time.monotonic()
        llm = LLM(**settings)
        print(json.dumps({"ready_seconds": time.monotonic() - started}), file=replies)
        for line in sys.stdin:
            requests = json.loads(line)
            prompts = [{"prompt_token_ids": request["tokens"]} for request in requests]
            sampling = [
                SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True)
                for request in requests
            ]
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            answers = [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "cached_tokens": output.num_cached_tokens or 0,
                    "ttft_ms": output.metrics.first_token_latency * 1e3 if output.metrics else None,
                }
                for output in outputs
            ]
            print(json.dumps({"answers": answers, "tokens_by_source": tokens_by_source(llm)}), file=replies)


if __name__ == "__main__":
    main()
