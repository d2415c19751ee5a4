"""One vLLM in a process of its own, asked through pipes. Lines of JSON come in on standard input and go out on the
descriptor given; standard output is the log. It ends when its input ends.

usage: child.py SETTINGS_JSON OUTPUT_DESCRIPTOR
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

# A request whose saves run keeps its blocks; a step frees them when they have ended.
_RESET_TRIES = 100
_RESET_PAUSE_S = 0.1


def prompt(seed: str, length: int, vocabulary: int) -> list[int]:
    """Random tokens: the same for the same seed, in every process."""
    source = random.Random(seed)
    return [source.randrange(vocabulary // 100, vocabulary * 9 // 10) for _ in range(length)]


class Asked:
    """A running vLLM."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self._vocabulary: int = settings["vocabulary"]
        arguments = settings["arguments"]
        if transfer := arguments.get("kv_transfer_config"):
            from vllm.config import KVTransferConfig

            arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
        self._llm = LLM(worker_extension_cls="probe.KvProbe", **arguments)

    def ask(self, seed: str, tokens: int, answer: int = 1) -> dict[str, Any]:
        """Sends one prompt; the time until the whole answer, which is the first token unless told otherwise."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=answer, temperature=0.0, detokenize=False, ignore_eos=True)
        request = {"prompt_token_ids": prompt(seed, tokens, self._vocabulary)}
        start = time.perf_counter()
        (output,) = self._llm.generate([request], sampling, use_tqdm=False)
        took_ms = (time.perf_counter() - start) * 1e3
        return {"ms": took_ms, "tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens or 0}

    def reset(self) -> dict[str, Any]:
        """Empties vLLM's own prefix cache. As long as saves hold blocks it cannot, and is asked again."""
        for tries in range(_RESET_TRIES):
            if self._llm.reset_prefix_cache():
                return {"tries": tries + 1}
            time.sleep(_RESET_PAUSE_S)
            self.nudge()
        raise RuntimeError(f"vLLM's prefix cache could not be reset in {_RESET_TRIES} tries")

    def nudge(self) -> dict[str, Any]:
        """A step with nothing to find or to keep: connectors report what has ended in steps only."""
        return self.ask("nudge", 4)

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of `probe.KvProbe` in every worker."""
        result: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return result


def main() -> None:
    """Starts, says so, and answers until the input ends."""
    settings = json.loads(sys.argv[1])
    with os.fdopen(int(sys.argv[2]), "w", buffering=1) as replies:
        started = time.perf_counter()
        asked = Asked(settings)
        print(json.dumps({"start_s": time.perf_counter() - started}), file=replies)
        for line in sys.stdin:
            verb, *arguments = json.loads(line)
            if verb not in ("ask", "reset", "nudge", "rpc"):
                raise ValueError(verb)
            print(json.dumps(getattr(asked, verb)(*arguments)), file=replies)


if __name__ == "__main__":
    main()
