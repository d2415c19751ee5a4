"""A prompt that vLLM has computed once is not computed again, also after vLLM was restarted.

usage: basic_vllm.py [--model MODEL] [--store FOLDER]       (FOLDER on ext4 or XFS; runs on a GPU or on vLLM for CPUs)

It starts vLLM three times, each in a process of its own: without the cache, with it while it is empty, and with it
after a restart. The last one finds the prompt's blocks, and says the very same tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
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


def ask(model: str, store: str | None) -> list[Answer]:
    """Starts vLLM and asks it all questions about the document, one after the other."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    connector = None
    if store is not None:
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
    # Blocks of 32 tokens: vLLM for CPUs takes multiples of 32 only.
    llm = LLM(model=model, block_size=32, max_model_len=2048, enforce_eager=True, kv_transfer_config=connector)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    answers = []
    for question in QUESTIONS:
        (output,) = llm.generate(f"{DOCUMENT}\n\n{question}", sampling, use_tqdm=False)
        cached = output.num_cached_tokens or 0
        answers.append(Answer(tuple(output.outputs[0].token_ids), len(output.prompt_token_ids or ()), cached))
    return answers


def in_new_process(model: str, store: str | None) -> list[Answer]:
    """The same in a process that ends afterwards: nothing is left of that vLLM."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(ask, model, store).result()


def main() -> int:
    """Asks plain vLLM, a cold cache and a warm one; exit code 0 if the warm one hit and all said the same."""
    parser = argparse.ArgumentParser(description="vLLM with a prefix cache that survives its restart")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a name on Hugging Face or a folder")
    parser.add_argument("--store", type=Path, help="keep the cache in this folder; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix="pegaflow-example-") as temporary:
        store = str((options.store or Path(temporary) / "store").resolve())
        said = {
            "plain": in_new_process(options.model, None),
            "cold": in_new_process(options.model, store),
            "restarted": in_new_process(options.model, store),
        }
    print(f"{'vLLM':<12}{'prompt':>8}{'cached':>8}   answer")
    for name, answers in said.items():
        for answer, plain in zip(answers, said["plain"], strict=True):
            verdict = "the same tokens" if answer.tokens == plain.tokens else "OTHER TOKENS"
            print(f"{name:<12}{answer.prompt_tokens:>8}{answer.cached_tokens:>8}   {verdict}")
    tokens = [[answer.tokens for answer in answers] for answers in said.values()]
    is_same = all(one == tokens[0] for one in tokens)
    is_warm = said["restarted"][0].cached_tokens > said["cold"][0].cached_tokens
    print("the restarted vLLM", "found" if is_warm else "DID NOT FIND", "what was computed before")
    return 0 if is_same and is_warm else 1


if __name__ == "__main__":
    sys.exit(main())
