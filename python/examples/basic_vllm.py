"""A prompt that vLLM has computed once is not computed again, also after vLLM was restarted.

usage: basic_vllm.py [--model MODEL] [--store FOLDER]       (FOLDER on ext4 or XFS; runs on a GPU or on vLLM for CPUs)

It starts vLLM twice, each time in a process of its own: with an empty cache, and after a restart. The second one finds
the blocks of the prompts instead of computing them, and says the very same tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = ("What does the log say?", "Who wrote it?", "Summarize it in one sentence.")
DOCUMENT = " ".join(f"Entry {day}: the tank was checked and held {day * 37 % 100} litres." for day in range(18))


@dataclass(frozen=True)
class Answer:
    """What vLLM said to one prompt."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int


def ask(model: str, store: str) -> list[Answer]:
    """Starts vLLM and asks it all questions about the document, one after the other."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all of vLLM in this process, as "embedded" needs it on CPUs
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(
        kv_connector="PegaKVConnector",
        kv_connector_module_path="pegaflow",
        kv_role="kv_both",
        kv_connector_extra_config={
            "mode": "embedded",  # the engine inside this process; "auto" takes a pegaflow-server if there is one
            "path": store,
            "dram": "1GiB",
            "nvme": "4GiB",
            "load_policy": "always",  # "auto", the default, computes where that is faster: with a model this small
        },
    )
    llm = LLM(
        model=model,
        block_size=32,  # vLLM for CPUs takes multiples of 32 only
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        distributed_executor_backend="uni",
        kv_transfer_config=connector,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    answers = []
    for question in QUESTIONS:
        (output,) = llm.generate(f"{DOCUMENT}\n\n{question}", sampling, use_tqdm=False)
        cached = output.num_cached_tokens or 0
        answers.append(Answer(tuple(output.outputs[0].token_ids), len(output.prompt_token_ids or ()), cached))
    return answers


def in_new_process(model: str, store: str) -> list[Answer]:
    """The same in a process that ends afterwards: nothing is left of that vLLM."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(ask, model, store).result()


def main() -> int:
    """Asks a cold and a warm vLLM; exit code 0 if the warm one found the first prompt and both said the same."""
    parser = argparse.ArgumentParser(description="vLLM with a prefix cache that survives its restart")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a name on Hugging Face or a folder")
    parser.add_argument("--store", type=Path, help="keep the cache in this folder; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix="pegaflow-example-") as temporary:
        store = str((options.store or Path(temporary) / "store").resolve())
        cold, warm = (in_new_process(options.model, store) for _ in range(2))
    print(f"{'prompt tokens':>14}{'cached, cold':>14}{'after restart':>15}   answer")
    is_same = True
    for before, after in zip(cold, warm, strict=True):
        is_same = is_same and before.tokens == after.tokens
        verdict = "the same tokens" if before.tokens == after.tokens else "OTHER TOKENS"
        print(f"{before.prompt_tokens:>14}{before.cached_tokens:>14}{after.cached_tokens:>15}   {verdict}")
    is_warm = warm[0].cached_tokens > cold[0].cached_tokens
    print("the restarted vLLM", "found" if is_warm else "DID NOT FIND", "what was computed before")
    return 0 if is_same and is_warm else 1


if __name__ == "__main__":
    sys.exit(main())
