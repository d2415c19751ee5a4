"""Prompts computed by one vLLM and answered by another, on one host: prefill and decode apart.

usage: vllm_prefill_decode.py [--model MODEL] [--binaries FOLDER]      (runs on GPUs or on vLLM for CPUs)

    client -> pegaflow-router -> the vLLM that computes prompts ---saves---> pegaflow-server
                              -> the vLLM that answers <-----------loads---------'

Both engines have the same connector and no setting of their own; the router says to the second what the first has
computed. With several GPUs in CUDA_VISIBLE_DEVICES each engine gets one; otherwise they share what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

START_SECONDS = 300.0
ANSWER_SECONDS = 120.0
QUESTIONS = ("What does the log say?", "Who wrote it?", "Summarize it in one sentence.")
DOCUMENT = " ".join(f"Entry {day}: the tank was checked and held {day * 37 % 100} litres." for day in range(18))


def free_port() -> int:
    """A port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, body: dict[str, object] | None = None) -> str:
    """What a server answers to a GET, or to a POST of `body`."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        return str(response.read().decode())


class Service:
    """A process that answers on a port; it ends with `running`. What it says goes to a file in `logs`."""

    def __init__(self, running: ExitStack, name: str, command: list[str], url: str, logs: Path, **env: str) -> None:
        self._url, self._log = url, logs / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **env})
        running.callback(self._process.wait)
        running.callback(self._process.terminate)

    def wait_ready(self) -> None:
        """Returns when it answers; ends the program with the end of its log if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                get(self._url)
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
            else:
                return
        sys.exit(f"{self._url} is not ready; the end of its log:\n{self._log.read_text(errors='replace')[-3000:]}")


def counted(url: str, pattern: str) -> int:
    """A counter out of a page of Prometheus metrics; 0 if it has not counted yet."""
    found = re.search(rf"^{pattern} (\S+)$", get(url), re.MULTILINE)
    return int(float(found[1])) if found else 0


def engine_command(model: str, port: int, server_socket: Path) -> list[str]:
    """An OpenAI server of vLLM with the connector: the same for both engines."""
    connector = {
        "kv_connector": "PegaKVConnector",
        "kv_connector_module_path": "pegaflow",
        "kv_role": "kv_both",
        # "load_policy": "auto", the default, computes where that is faster: with a model this small.
        "kv_connector_extra_config": {"mode": "server", "socket": str(server_socket), "load_policy": "always"},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--block-size", "32", "--max-model-len", "2048", "--enforce-eager"]
    # Both on one GPU if need be: either starts only where this part of the memory is free.
    command += ["--gpu-memory-utilization", "0.4", "--kv-cache-memory-bytes", str(1 << 30)]
    command += ["--kv-transfer-config", json.dumps(connector)]
    return command


def binary(name: str, folder: Path | None) -> str:
    """Where a program of PegaFlow is."""
    found = shutil.which(name, path=str(folder) if folder else None)
    return found or sys.exit(f"{name} is not in {folder or 'PATH'}; build it with `make server`, and give --binaries")


def main() -> int:
    """Starts everything and asks three questions; exit code 0 if prompts were handed over and the answers are right."""
    parser = argparse.ArgumentParser(description="prefill and decode apart")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a name on Hugging Face or a folder")
    parser.add_argument("--binaries", type=Path, help="where pegaflow-server and pegaflow-router are; default: PATH")
    options = parser.parse_args()
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    programs = {name: binary(name, options.binaries) for name in ("pegaflow-server", "pegaflow-router")}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ports = {name: free_port() for name in ("server", "prefill", "decode", "router")}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}

    with ExitStack() as running:
        home = Path(
            running.enter_context(tempfile.TemporaryDirectory(prefix="pegaflow-"))
        )  # a short path: the socket's
        store = running.enter_context(tempfile.TemporaryDirectory(dir=".", prefix="pegaflow-example-"))

        command = [programs["pegaflow-server"], "--socket", str(home / "s"), "--http", f"127.0.0.1:{ports['server']}"]
        command += ["--path", f"{store}/store", "--capacity", "4GiB", "--dram", "1GiB"]
        Service(running, "server", command, f"{urls['server']}/ready", home).wait_ready()

        engines = []
        for number, name in enumerate(("prefill", "decode")):
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[number]} if len(gpus) > 1 else {}
            command = engine_command(model, ports[name], home / "s")
            engines.append(Service(running, name, command, f"{urls[name]}/health", home, **gpu))
        for engine in engines:
            engine.wait_ready()

        command = [programs["pegaflow-router"], "--listen", f"127.0.0.1:{ports['router']}", "--prefill-from", "256"]
        command += ["--prefill", urls["prefill"], "--decode", urls["decode"]]
        Service(running, "router", command, f"{urls['router']}/health", home).wait_ready()

        is_right = True
        for question in QUESTIONS:
            asked = {"model": model, "prompt": f"{DOCUMENT}\n\n{question}", "max_tokens": 24, "temperature": 0}
            by_both, by_one = (get(f"{urls[name]}/v1/completions", asked) for name in ("router", "prefill"))
            is_same = json.loads(by_both)["choices"][0]["text"] == json.loads(by_one)["choices"][0]["text"]
            is_right = is_right and is_same
            print(f"{question:<32}", "the answer of a single engine" if is_same else "ANOTHER ANSWER")
        handoffs = counted(f"{urls['router']}/metrics", r'pegaflow_router_handoffs_total\{result="done"\}')
        loaded = counted(f"{urls['decode']}/metrics", r'vllm:prompt_tokens_by_source_total\{.*"external_kv_.*\}')
        print(f"{handoffs} prompts computed by one engine; the other loaded {loaded} of their tokens, and answered")
        return 0 if is_right and handoffs and loaded else 1


if __name__ == "__main__":
    sys.exit(main())
