"""Time to first token of the ways to keep vLLM's KV cache, side by side.

usage: bench_kv_cache.py [--model MODEL] [--systems none,pegaflow,...] [--prompt-tokens 1024] [--prompts 4]

Each system gets the same prompts three times: cold, warm (the same vLLM, its own prefix cache emptied), and restarted
(a new vLLM; what runs beside it stays). Prints a table and ends with one line of JSON. A system that cannot run on this
machine is left out, with the reason. Meant for an idle machine; a CPU shows that it works, a GPU what it is worth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
GIB = 1 << 30
Answer = tuple[float, list[int]]
"""Milliseconds, and the token."""


@dataclass
class System:
    """A way to keep the KV cache: what vLLM is told, and what has to run beside it."""

    connector: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    beside: list[str] | None = None
    """The command of a server beside vLLM, and the port at which it is reached when it is up."""
    port: int = 0
    site: str = ""
    """A folder with packages that come before all others."""
    why_not: str = ""


def connector(name: str, module: str | None = None, **extra: Any) -> dict[str, Any]:
    """The arguments of a `KVTransferConfig`."""
    where = {"kv_connector_module_path": module} if module else {}
    return {"kv_connector": name, **where, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def free_port() -> int:
    """A port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def systems(folder: Path, dram_bytes: int, upstream: str) -> dict[str, System]:
    """All systems, with a reason for those that cannot run here."""
    on_gpus = "" if HAS_GPU else "it starts on GPUs only, and this machine has none"
    has_lmcache = importlib.util.find_spec("lmcache") is not None
    lmcache_port, upstream_port = free_port(), free_port()
    stable_hashes = {"PYTHONHASHSEED": "0"}  # vLLM before 0.29 names blocks by a seed of the process otherwise
    offloading = {"cpu_bytes_to_use": dram_bytes}
    tiers = {**offloading, "spec_name": "TieringOffloadingSpec"}
    files = {"type": "fs", "root_dir": str(folder / "files")}
    tier = {"type": "PegaTier", "module_path": "pegaflow.vllm_tier", "path": str(folder / "tier")}
    return {
        "none": System(),
        "pegaflow": System(
            connector(
                "PegaKVConnector",
                "pegaflow",
                mode="embedded",
                path=str(folder / "store"),
                dram=dram_bytes,
                nvme=4 * dram_bytes,
                load_policy="always",
            )
        ),
        "native": System(connector("OffloadingConnector", **offloading), why_not=on_gpus),
        "native-fs": System(
            connector("OffloadingConnector", **tiers, secondary_tiers=[files]), stable_hashes, why_not=on_gpus
        ),
        "native-pegaflow": System(
            connector(
                "OffloadingConnector",
                **{**tiers, "spec_name": "PegaTieringSpec", "spec_module_path": "pegaflow.vllm_tier.spec"},
                secondary_tiers=[{**tier, "dram": dram_bytes, "nvme": 4 * dram_bytes}],
            ),
            stable_hashes,
            why_not=on_gpus,
        ),
        "lmcache": System(
            connector("LMCacheMPConnector", **{"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": lmcache_port}),
            beside=["lmcache", "server", "--port", str(lmcache_port), "--l1-size-gb", str(dram_bytes / GIB)],
            port=lmcache_port,
            why_not="" if has_lmcache else "the package lmcache is not installed",
        ),
        # Its package has our name, so it lies in a folder of its own.
        "upstream": System(
            connector("PegaKVConnector", "pegaflow.connector"),
            {
                "PEGAFLOW_HOST": "http://127.0.0.1",
                "PEGAFLOW_PORT": str(upstream_port),
                "PYTHONPATH": upstream,
                **stable_hashes,
            },
            beside=[
                *(sys.executable, "-c", "from pegaflow._server import main; main()", "--devices", "0"),
                *("--pool-size", f"{dram_bytes // GIB}gb", "--addr", f"127.0.0.1:{upstream_port}"),
            ],
            port=upstream_port,
            site=upstream,
            why_not=on_gpus or ("" if upstream else "name the folder that its package is installed in with --upstream"),
        ),
    }


def vllm_round(model: str, system: System, prompts: list[list[int]], passes: int) -> list[list[Answer]]:
    """Starts vLLM and asks all prompts `passes` times."""
    # All of vLLM in this process, as "embedded" needs it on CPUs.
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **system.environment})
    if system.site:
        sys.path.insert(0, system.site)
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        block_size=32,  # vLLM for CPUs takes multiples of 32 only
        max_model_len=max(map(len, prompts)) + 64,
        kv_cache_memory_bytes=GIB,
        distributed_executor_backend="uni",
        enforce_eager=not HAS_GPU,
        kv_transfer_config=KVTransferConfig(**system.connector) if system.connector else None,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    ask(llm, [7] * 64, sampling)  # what only the first request has to do
    rounds = []
    for _ in range(passes):
        rounds.append([ask(llm, prompt, sampling) for prompt in prompts])
        time.sleep(2)  # saves end behind the answers
        for _ in range(50):
            if llm.reset_prefix_cache():
                break
            ask(llm, [7] * 4, sampling)  # a step: in it vLLM is told that saves have ended, and frees their blocks
        else:
            raise RuntimeError("vLLM's own prefix cache cannot be emptied")
    return rounds


def ask(llm: Any, prompt: list[int], sampling: Any) -> Answer:
    """One prompt for one token."""
    before = time.perf_counter()
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    return (time.perf_counter() - before) * 1e3, list(output.outputs[0].token_ids)


def in_new_process(*arguments: Any) -> list[list[Answer]]:
    """`vllm_round` in a process that ends afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(vllm_round, *arguments).result()


def measure(model: str, system: System, prompts: list[list[int]], log: Path) -> dict[str, Any]:
    """The row of one system."""
    beside = None
    if system.beside:
        with log.open("wb") as output:
            environment = {**os.environ, **system.environment}
            beside = subprocess.Popen(system.beside, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        if beside is not None:
            wait_listening(beside, system.port, log)
        cold, warm = in_new_process(model, system, prompts, 2)
        (restarted,) = in_new_process(model, system, prompts, 1)
    finally:
        if beside is not None:
            beside.terminate()
            beside.wait(timeout=60)
    passes = {"cold": cold, "warm": warm, "restarted": restarted}
    return {
        **{f"{name}_ms": round(statistics.median(ms for ms, _ in answers), 2) for name, answers in passes.items()},
        "tokens_equal": all([said for _, said in answers] == [said for _, said in cold] for answers in passes.values()),
    }


def wait_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Returns when somebody listens on the port.

    Raises:
        RuntimeError: nobody does within two minutes.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"its server did not start: {log.read_text(errors='replace')[-400:]}")


def main() -> int:
    """Measures what was asked for; exit code 1 if a system failed or said other tokens warm than cold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a name on Hugging Face or a folder")
    parser.add_argument("--systems", default="none,pegaflow,native,native-fs,native-pegaflow,lmcache,upstream")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--dram-gib", type=int, default=1, help="host memory of each; four times that on the drive")
    parser.add_argument("--upstream", default="", help="the folder that upstream's package is installed in")
    options = parser.parse_args()
    source = random.Random(1)
    prompts = [[source.randrange(10, 90) for _ in range(options.prompt_tokens)] for _ in range(options.prompts)]

    rows = []
    with tempfile.TemporaryDirectory(dir=".", prefix="pegaflow-bench-") as temporary:
        folder = Path(temporary).resolve()
        known = systems(folder, options.dram_gib * GIB, options.upstream)
        for name in options.systems.split(","):
            if name not in known:
                sys.exit(f"'{name}' is not a system; give some of {', '.join(known)}")
            row: dict[str, Any] = {"system": name}
            if known[name].why_not:
                row["skipped"] = known[name].why_not
            else:
                try:
                    row |= measure(options.model, known[name], prompts, folder / f"{name}.log")
                except Exception as error:  # one system that fails does not end the others
                    row["failed"] = f"{type(error).__name__}: {error}"[:400]
            rows.append(row)
    print(f"{'system':<18}{'cold':>10}{'warm':>10}{'restarted':>11}   ms to the first token, median")
    for row in rows:
        times = "".join(f"{row[f'{name}_ms']:>10.1f}" for name in ("cold", "warm", "restarted") if f"{name}_ms" in row)
        print(f"{row['system']:<18}{times or '  ' + (row.get('skipped') or row.get('failed') or '')}")
    device = torch.cuda.get_device_name() if HAS_GPU else "cpu"
    print(json.dumps({"device": device, "model": options.model, "prompt_tokens": options.prompt_tokens, "rows": rows}))
    return 1 if any("failed" in row or row.get("tokens_equal") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
