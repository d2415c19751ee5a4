"""Time to first token, processor time and throughput of the ways to keep vLLM's KV cache, side by side.

usage: bench_kv_cache.py [--model MODEL] [--systems none,pegaflow,...] [--prompt-tokens 1024] [--requests 200]

Each system gets the same prompts cold, warm (the same vLLM, its own prefix cache emptied), restarted (a new vLLM; what
runs beside it stays), and after all was restarted. With `--requests`, vLLM's own bench (`vllm bench serve
--dataset-name prefix_repetition`) then asks its OpenAI server for as many prompts, of which five begin alike each.
Prints a table and ends with one line of JSON. A system that cannot run on this machine is left out, with the reason.
Meant for an idle machine; a CPU shows that it works, a GPU what it is worth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HAS_GPU = torch.cuda.is_available()
GIB = 1 << 30
Answer = tuple[float, float, list[int]]
"""Milliseconds, those of vLLM's processor time, and the token."""
SAME_BEGINNING = 5
"""Requests of the throughput's workload that begin alike."""
ALL = ("none", "pegaflow", "pegaflow-embedded", "native", "native-fs", "native-pegaflow")
ALL += ("lmcache", "lmcache-embedded", "upstream")
CONCURRENCY = 8
"""Requests that run at the same time, at most."""
# `vllm bench serve` as vLLM's command line starts it; the command itself does not know packages of another name.
BENCH_SERVE = """
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""


@dataclass
class System:
    """A way to keep the KV cache: what vLLM is told, and what has to run beside it."""

    connector: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    beside: list[str] | None = None
    """The command of a server beside vLLM, and the port at which it is reached when it is up."""
    port: int = 0
    ready: str = ""
    """A path on that port that answers 200 when the server is ready; without it the port alone counts."""
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


def systems(folder: Path, options: argparse.Namespace) -> dict[str, System]:
    """All systems, with a reason for those that cannot run here."""
    dram_bytes, drive_bytes = options.dram_gib * GIB, (options.drive_gib or 4 * options.dram_gib) * GIB
    on_gpus = "" if HAS_GPU else "it starts on GPUs only, and this machine has none"
    has_lmcache = importlib.util.find_spec("lmcache") is not None
    lmcache = "" if has_lmcache else "the package lmcache is not installed"
    server = shutil.which("pegaflow-server", path=str(options.binaries) if options.binaries else None)
    # A short path: a socket's has 107 bytes at most.
    server_socket = Path(tempfile.gettempdir()) / f"pegaflow-bench-{os.getpid()}"
    server_port, lmcache_port, upstream_port = free_port(), free_port(), free_port()
    stable_hashes = {"PYTHONHASHSEED": "0"}  # vLLM before 0.29 names blocks by a seed of the process otherwise
    offloading = {"cpu_bytes_to_use": dram_bytes}
    tiers = {**offloading, "spec_name": "TieringOffloadingSpec"}
    files = {"type": "fs", "root_dir": str(folder / "files")}
    tier = {"type": "PegaTier", "module_path": "pegaflow.vllm_tier", "path": str(folder / "tier")}
    return {
        "none": System(),
        "pegaflow": System(
            connector("PegaKVConnector", "pegaflow", mode="server", socket=str(server_socket), load_policy="always"),
            beside=[
                *(server or "", "--socket", str(server_socket), "--http", f"127.0.0.1:{server_port}"),
                *("--path", str(folder / "store"), "--dram", str(dram_bytes), "--capacity", str(drive_bytes)),
            ],
            port=server_port,
            ready="/ready",
            why_not="" if server else "pegaflow-server is not in PATH; name its folder with --binaries",
        ),
        "pegaflow-embedded": System(
            connector(
                "PegaKVConnector",
                "pegaflow",
                mode="embedded",
                path=str(folder / "store"),
                dram=dram_bytes,
                nvme=drive_bytes,
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
                secondary_tiers=[{**tier, "dram": dram_bytes, "nvme": drive_bytes}],
            ),
            stable_hashes,
            why_not=on_gpus,
        ),
        "lmcache": System(
            connector("LMCacheMPConnector", **{"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": lmcache_port}),
            beside=["lmcache", "server", "--port", str(lmcache_port), "--l1-size-gb", str(dram_bytes / GIB)],
            port=lmcache_port,
            why_not=lmcache,
        ),
        "lmcache-embedded": System(
            connector("LMCacheConnectorV1"),
            {
                "LMCACHE_LOCAL_CPU": "True",
                "LMCACHE_MAX_LOCAL_CPU_SIZE": str(dram_bytes // GIB),
                "LMCACHE_CHUNK_SIZE": "256",
                **stable_hashes,
            },
            why_not=on_gpus or lmcache,
        ),
        # Its package has our name, so it lies in a folder of its own.
        "upstream": System(
            connector("PegaKVConnector", "pegaflow.connector"),
            {
                "PEGAFLOW_HOST": "http://127.0.0.1",
                "PEGAFLOW_PORT": str(upstream_port),
                "PYTHONPATH": os.pathsep.join(filter(None, (options.upstream, os.environ.get("PYTHONPATH")))),
                **stable_hashes,
            },
            beside=[
                *(sys.executable, "-c", "from pegaflow._server import main; main()", "--devices", "0"),
                *("--pool-size", f"{dram_bytes // GIB}gb", "--addr", f"127.0.0.1:{upstream_port}"),
            ],
            port=upstream_port,
            site=options.upstream,
            why_not=on_gpus
            or ("" if options.upstream else "name the folder that its package is installed in with --upstream"),
        ),
    }


def vllm_round(model: str, system: System, prompts: list[list[int]], gpu_bytes: int, passes: int) -> list[list[Answer]]:
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
        max_num_seqs=CONCURRENCY,
        kv_cache_memory_bytes=gpu_bytes,
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
    before, cpu_before = time.perf_counter(), time.process_time()
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    took, cpu = time.perf_counter() - before, time.process_time() - cpu_before
    return took * 1e3, cpu * 1e3, list(output.outputs[0].token_ids)


def in_new_process(*arguments: Any) -> list[list[Answer]]:
    """`vllm_round` in a process that ends afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(vllm_round, *arguments).result()


@contextmanager
def beside(system: System, log: Path) -> Iterator[None]:
    """What has to run beside vLLM, if anything."""
    if not system.beside:
        yield
        return
    if listens(system.port):
        raise RuntimeError(f"somebody listens at port {system.port} already")
    with log.open("ab") as output:
        environment = {**os.environ, **system.environment}
        process = subprocess.Popen(
            system.beside, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_listening(process, system.port, log, system.ready)
        yield
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started, as upstream starts its server: in order if they end in time."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 60
        with suppress(ProcessLookupError):  # the last of them has ended
            os.killpg(process.pid, how)
            while time.monotonic() < deadline:
                process.poll()  # a child that has ended counts until it is asked for
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()


def measure(model: str, system: System, prompts: list[list[int]], gpu_bytes: int, log: Path) -> dict[str, Any]:
    """The times of one system."""
    with beside(system, log):
        cold, warm = in_new_process(model, system, prompts, gpu_bytes, 2)
        (restarted,) = in_new_process(model, system, prompts, gpu_bytes, 1)
    all_restarted = restarted  # nothing else ran
    if system.beside:
        with beside(system, log):
            (all_restarted,) = in_new_process(model, system, prompts, gpu_bytes, 1)
    passes = {"cold": cold, "warm": warm, "restarted": restarted, "all_restarted": all_restarted}
    tokens = [said for _, _, said in cold]
    return {
        **{f"{name}_ms": median(ms for ms, _, _ in answers) for name, answers in passes.items()},
        "warm_cpu_ms": median(cpu for _, cpu, _ in warm),
        "tokens_equal": all([said for _, _, said in answers] == tokens for answers in passes.values()),
    }


def median(values: Iterable[float]) -> float:
    """To hundredths."""
    return round(statistics.median(values), 2)


def throughput(options: argparse.Namespace, system: System, log: Path) -> dict[str, Any]:
    """Requests a second of vLLM's OpenAI server over this system, for prompts that begin alike."""
    model, prompt_tokens, requests = options.model, options.prompt_tokens, options.requests
    port, result = free_port(), log.with_suffix(".bench.json")
    more = ["--kv-transfer-config", json.dumps({"engine_id": "bench", **system.connector})] if system.connector else []
    serve = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)),
        *(
            "--block-size",
            "32",
            "--max-model-len",
            str(prompt_tokens + 256),
            "--kv-cache-memory-bytes",
            str(options.gpu_gib * GIB),
        ),
        *("--max-num-seqs", str(CONCURRENCY)),
        *("--distributed-executor-backend", "uni", *([] if HAS_GPU else ["--enforce-eager"]), *more),
    ]
    bench = [
        *(sys.executable, "-c", BENCH_SERVE, "--model", model, "--port", str(port), "--seed", "1", "--disable-tqdm"),
        *("--dataset-name", "prefix_repetition", "--num-prompts", str(requests), "--max-concurrency", str(CONCURRENCY)),
        *("--prefix-repetition-prefix-len", str(prompt_tokens), "--prefix-repetition-suffix-len", "64"),
        *("--prefix-repetition-num-prefixes", str(max(1, requests // SAME_BEGINNING))),
        *("--prefix-repetition-output-len", "16", "--ignore-eos", "--save-result", "--result-filename", str(result)),
    ]
    environment = {**os.environ, **system.environment}
    with beside(system, log), log.open("ab") as output:
        server = subprocess.Popen(
            serve, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            wait_listening(server, port, log)
            subprocess.run(bench, stdout=output, stderr=subprocess.STDOUT, check=True, timeout=600)
        finally:
            end(server)
    found = json.loads(result.read_text())
    return {
        "requests_per_s": round(found["request_throughput"], 2),
        "mean_ttft_ms": round(found["mean_ttft_ms"], 2),
        "failed_requests": requests - found["completed"],
    }


def listens(port: int) -> bool:
    """Whether somebody takes connections at a port of this machine."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_listening(process: subprocess.Popen[bytes], port: int, log: Path, ready: str = "") -> None:
    """Returns when somebody listens on the port, and answers 200 at the path `ready` if one is given.

    Raises:
        RuntimeError: nobody does within four minutes.
    """
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if ready:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).close()
            else:
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
    parser.add_argument("--systems", default=",".join(ALL))
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--gpu-gib", type=int, default=1, help="vLLM's own KV cache")
    parser.add_argument("--dram-gib", type=int, default=1, help="host memory of each")
    parser.add_argument(
        "--drive-gib", type=int, default=0, help="on the drive, where that can be said; 0: four --dram-gib"
    )
    parser.add_argument("--binaries", type=Path, help="the folder with pegaflow-server, if it is not in PATH")
    parser.add_argument("--upstream", default="", help="the folder that upstream's package is installed in")
    parser.add_argument("--requests", type=int, default=0, help="of the throughput's workload; 0: it is left out")
    options = parser.parse_args()
    source = random.Random(1)
    prompts = [[source.randrange(10, 90) for _ in range(options.prompt_tokens)] for _ in range(options.prompts)]

    rows = []
    with tempfile.TemporaryDirectory(dir=".", prefix="pegaflow-bench-") as temporary:
        folder = Path(temporary).resolve()
        known = systems(folder, options)
        for name in options.systems.split(","):
            if name not in known:
                sys.exit(f"'{name}' is not a system; give some of {', '.join(known)}")
            row: dict[str, Any] = {"system": name}
            if known[name].why_not:
                row["skipped"] = known[name].why_not
            else:
                try:
                    log = folder / f"{name}.log"
                    row |= measure(options.model, known[name], prompts, options.gpu_gib * GIB, log)
                    # On CPUs vLLM's OpenAI server has its worker in a process of its own, where "embedded" is refused.
                    if options.requests and (HAS_GPU or not name.endswith("-embedded")):
                        row |= throughput(options, known[name], log)
                except Exception as error:  # one system that fails does not end the others
                    row["failed"] = f"{type(error).__name__}: {error}"[:400]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            for kept in folder.iterdir():  # room on the drive for the next one
                if kept.is_dir():
                    shutil.rmtree(kept)
    columns = {"cold_ms": "cold", "warm_ms": "warm", "restarted_ms": "restarted", "all_restarted_ms": "all anew"}
    columns |= {"warm_cpu_ms": "warm CPU", "requests_per_s": "requests/s", "mean_ttft_ms": "mean TTFT"}
    print(
        f"{'system':<19}"
        + "".join(f"{title:>12}" for title in columns.values())
        + "   ms, medians; mean TTFT under load"
    )
    for row in rows:
        cells = "".join(f"{row[name]:>12.1f}" for name in columns if name in row)
        print(f"{row['system']:<19}{cells}  {row.get('skipped') or row.get('failed') or ''}".rstrip())
    device = torch.cuda.get_device_name() if HAS_GPU else "cpu"
    print(json.dumps({"device": device, "model": options.model, "prompt_tokens": options.prompt_tokens, "rows": rows}))
    is_bad = any("failed" in row or row.get("tokens_equal") is False or row.get("failed_requests") for row in rows)
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
