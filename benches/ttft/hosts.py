"""The processes of the benches: vLLM children, and the cache servers of the systems that have one."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "e2e"))

import shapes  # noqa: E402
from processes import HttpProcess, PipedProcess, Process, StoryError, free_port, http_get  # noqa: E402

_START_SECONDS = 420.0
_ANSWER_SECONDS = 300.0
_SERVER_SECONDS = 120.0
_STOP_SECONDS = 120.0
WEIGHTS_SEED = 20_250


@dataclass(frozen=True)
class Settings:
    """What all systems have in common."""

    python: str
    state: Path
    shape: str = "llama-8b"
    eager: bool = False
    tensor_parallel: int = 1
    gpu_memory: float = 0.5
    dram: str = "40GiB"
    nvme: str = "36GiB"
    server: str = "pegaflow-server"
    server_arguments: tuple[str, ...] = ()
    upstream_site: str = ""
    kv_cache_dtype: str = "auto"
    load_policy: str = "always"
    max_model_len: int = 40_000
    engine: dict[str, Any] = field(default_factory=dict)
    """More arguments of vLLM's engine, or others."""

    @property
    def dram_bytes(self) -> int:
        """`dram` as a number."""
        number, unit = re.fullmatch(r"(\d+)([MG])iB", self.dram).groups()  # type: ignore[union-attr]
        return int(number) << {"M": 20, "G": 30}[unit]

    @property
    def kv_bytes_per_token(self) -> int:
        """What one GPU has to load for a token."""
        of_type = 1 if self.kv_cache_dtype.startswith("fp8") else 2
        whole = shapes.SHAPES[self.shape].kv_bytes_per_token * of_type // 2
        return whole if self.shape == "mla" else whole // self.tensor_parallel


class Engine:
    """A vLLM in a child process; `__init__` returns when it is loaded."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        connector: dict[str, Any] | None,
        environment: dict[str, str] | None = None,
        *,
        path: str | None = None,
    ) -> None:
        arguments: dict[str, Any] = {
            "model": str(shapes.write(settings.shape, settings.state / "models")),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": min(
                settings.max_model_len, shapes.SHAPES[settings.shape].config["max_position_embeddings"]
            ),
            "gpu_memory_utilization": settings.gpu_memory,
            "enforce_eager": settings.eager,
            "tensor_parallel_size": settings.tensor_parallel,
            "max_num_batched_tokens": 16384,
            "enable_prefix_caching": True,
            "kv_cache_dtype": settings.kv_cache_dtype,
            "seed": 0,
            **({"kv_transfer_config": connector} if connector else {}),
            **settings.engine,
        }
        child = {
            "arguments": arguments,
            "vocabulary": shapes.SHAPES[settings.shape].vocabulary,
        }
        paths = [str(HERE), path if path is not None else os.environ.get("PYTHONPATH", "")]
        inherited = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX")}
        self.process = PipedProcess(
            f"vLLM, {name}",
            [settings.python, HERE / "child.py", json.dumps(child)],
            settings.state / "logs" / f"{name.replace(' ', '-')}.log",
            {
                **inherited,
                "PYTHONPATH": ":".join(part for part in paths if part),
                "PYTHONUNBUFFERED": "1",
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_COLOR": "0",
                "VLLM_USE_FLASHINFER_SAMPLER": "0",
                # Of weights that say different things for different prompts; see `probe.py`.
                "PEGAFLOW_BENCH_WEIGHTS_SEED": str(WEIGHTS_SEED),
                **(environment or {}),
            },
        )
        try:
            self.start_s = float(json.loads(self.process.receive(_START_SECONDS))["start_s"])
        except BaseException:
            self.process.kill()
            raise

    def send(self, *request: Any) -> None:
        """Sends a request without waiting for the answer."""
        self.process.send(request)

    def _call(self, *request: Any) -> Any:
        self.send(*request)
        return json.loads(self.process.receive(_ANSWER_SECONDS))

    def ask(self, seed: str, tokens: int, answer: int = 1) -> dict[str, Any]:
        """One prompt: `ms`, `tokens`, `cached`."""
        reply: dict[str, Any] = self._call("ask", seed, tokens, answer)
        return reply

    def reset(self) -> None:
        """Empties vLLM's own prefix cache."""
        self._call("reset")

    def nudge(self) -> None:
        """One step with nothing to find or to keep."""
        self._call("nudge")

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of `probe.KvProbe` in every worker."""
        replies: list[Any] = self._call("rpc", method, *arguments)
        return replies

    def cpu_seconds(self) -> float:
        """The processor time of all its processes so far."""
        return sum(cpu_seconds(pid) for pid in descendants(self.process.popen.pid))

    def stop(self) -> None:
        """Ends it in order, or kills it."""
        self.process.end_input()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.popen.wait(timeout=_STOP_SECONDS)
        self.process.kill()
        self.process.end_output()


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(below for child in children for below in descendants(child))]


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has used; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    """A cache server; `__init__` returns when it serves."""

    def __init__(self, name: str, command: list[str], log: Path, http: int, environment: dict[str, str]) -> None:
        self._http = http
        self.process = HttpProcess(
            name, command, log, environment, port=http, ready_path="/ready", start_seconds=_SERVER_SECONDS
        )

    def metric(self, name: str) -> float | None:
        """The sum of a metric's series; none if there is no such."""
        status, text = http_get(self._http, "/metrics")
        values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE) if status == 200 else []
        return sum(float(value) for value in values) if values else None

    def stop(self) -> None:
        """Ends it in order: what it has in DRAM is written."""
        self.process.popen.send_signal(signal.SIGTERM)
        try:
            self.process.popen.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{self.process.name} did not stop within {_STOP_SECONDS:.0f} s", file=sys.stderr)
        self.process.kill()


class System:
    """A way to keep KV cache: what vLLM is told, and what has to run beside it."""

    name = ""
    loads = False
    """Whether what it finds comes over the link: then a hit cannot be faster than that."""
    survives_engine = False
    survives_server = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.state / "systems" / self.name

    def why_not(self) -> str:
        """Why it cannot be measured here; empty if it can."""
        return ""

    def start(self, *, empty: bool) -> None:
        """Starts what runs beside vLLM; with `empty` nothing is kept from before."""
        if empty:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Ends what runs beside vLLM, in order."""

    def settle(self) -> None:
        """Returns when what was asked is saved, as far as that can be known."""
        time.sleep(3)

    def cpu_seconds(self) -> float:
        """The processor time of what runs beside vLLM, so far."""
        return 0.0

    def engine(self, name: str) -> Engine:
        """A vLLM that uses it."""
        return Engine(f"{self.name} {name}", self.settings, self.connector(), self.environment(), path=self.path())

    def connector(self) -> dict[str, Any] | None:
        """`kv_transfer_config`."""
        return None

    def environment(self) -> dict[str, str]:
        """What vLLM's process has in its environment beside the usual."""
        return {}

    def path(self) -> str | None:
        """Another PYTHONPATH, for packages that may not be mixed."""
        return None

    def is_importable(self, module: str) -> bool:
        """Whether vLLM's interpreter finds a module."""
        path = self.path()
        environment = os.environ if path is None else {**os.environ, "PYTHONPATH": path}
        command = [self.settings.python, "-c", f"import importlib.util as u; assert u.find_spec({module!r})"]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


class Nothing(System):
    """No connector."""

    name = "none"


class GpuPrefix(System):
    """vLLM's own prefix cache: what no connector can beat."""

    name = "gpu_prefix"


class PegaFlow(System):
    """Ours: a server, and the connector."""

    name = "pegaflow"
    loads = survives_engine = survives_server = True

    def __init__(self, settings: Settings, **extra: Any) -> None:
        super().__init__(settings)
        self._extra = extra
        self._server: Server | None = None
        # A Unix socket's path has 107 bytes at most.
        self._socket = Path(f"/tmp/pegaflow-bench-{os.getpid()}") / "s"

    def why_not(self) -> str:
        """See `System`."""
        if not (Path(self.settings.server).is_file() or shutil.which(self.settings.server)):
            return f"there is no server binary at {self.settings.server}; give --server"
        return "" if self.is_importable("pegaflow") else "its package is not installed"

    def start(self, *, empty: bool) -> None:
        """See `System`."""
        super().start(empty=empty)
        self._socket.parent.mkdir(mode=0o700, exist_ok=True)
        http = free_port()
        command = [self.settings.server, "--socket", str(self._socket), "--http", f"127.0.0.1:{http}"]
        command += ["--dram", self.settings.dram, "--path", str(self.folder / "store")]
        command += ["--capacity", self.settings.nvme]
        command += self.settings.server_arguments
        log = self.settings.state / "logs" / "pegaflow-server.log"
        self._server = Server("pegaflow-server", command, log, http, dict(os.environ))

    def stop(self) -> None:
        """See `System`."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def cpu_seconds(self) -> float:
        """See `System`."""
        return cpu_seconds(self._server.process.popen.pid) if self._server is not None else 0.0

    def settle(self) -> None:
        """See `System`."""
        server = self._server
        if server is None:
            return
        deadline = time.monotonic() + 120
        quiet = 0
        while quiet < 3 and time.monotonic() < deadline:
            busy = (server.metric("pegaflow_operations") or 0) + (server.metric("pegaflow_dram_dirty_bytes") or 0)
            quiet = 0 if busy else quiet + 1
            time.sleep(0.3)
        if quiet < 3:
            print("pegaflow: the server still has something to write after 120 s", file=sys.stderr)

    def held(self, timeout_s: float) -> dict[str, float]:
        """What clients hold of the server, as soon as that is nothing, or after the time."""
        names = ("pegaflow_sessions", "pegaflow_operations", "pegaflow_leases")
        deadline = time.monotonic() + timeout_s
        while True:
            held = {name: self._server.metric(name) or 0.0 for name in names} if self._server is not None else {}
            if not any(held.values()) or time.monotonic() >= deadline:
                return held
            time.sleep(0.2)

    def connector(self) -> dict[str, Any] | None:
        """See `System`."""
        extra = {"mode": "server", "socket": str(self._socket), "load_policy": self.settings.load_policy, **self._extra}
        return {
            "kv_connector": "PegaKVConnector",
            "kv_connector_module_path": "pegaflow",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }


def _offloading(settings: Settings, **more: Any) -> dict[str, Any]:
    """`kv_transfer_config` of vLLM's OffloadingConnector."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": settings.dram_bytes, **more},
    }


class VllmOffload(System):
    """vLLM's OffloadingConnector, host memory only."""

    name = "vllm_offload"
    loads = True

    def connector(self) -> dict[str, Any] | None:
        """See `System`."""
        return _offloading(self.settings)


class VllmFiles(System):
    """vLLM's OffloadingConnector with files behind host memory."""

    name = "vllm_fs"
    loads = survives_engine = survives_server = True

    def connector(self) -> dict[str, Any] | None:
        """See `System`."""
        files = {"type": "fs", "root_dir": str(self.folder)}
        return _offloading(self.settings, spec_name="TieringOffloadingSpec", secondary_tiers=[files])

    def start(self, *, empty: bool) -> None:
        """See `System`. A restart of everything finds nothing in the page cache, if that may be emptied here."""
        super().start(empty=empty)
        if not empty:
            os.sync()
            try:
                Path("/proc/sys/vm/drop_caches").write_text("3")
            except OSError as error:
                print(f"vllm_fs reads from the page cache: it cannot be emptied ({error})", file=sys.stderr)

    def environment(self) -> dict[str, str]:
        """See `System`. Its files are named by vLLM's hashes, which are seeded anew in every process otherwise."""
        return {"PYTHONHASHSEED": "0"}


class VllmPegaFlow(PegaFlow):
    """vLLM's OffloadingConnector with our server behind host memory."""

    name = "vllm_pegaflow"

    def engine(self, name: str) -> Engine:
        """See `System`. The tier tells weights apart by their files, which random weights do not have."""
        model = shapes.write(self.settings.shape, self.settings.state / "models")
        header = json.dumps({"seed": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
        weights = len(header).to_bytes(8, "little") + header + WEIGHTS_SEED.to_bytes(8, "little")
        (model / "model.safetensors").write_bytes(weights)
        return super().engine(name)

    def connector(self) -> dict[str, Any] | None:
        """See `System`."""
        # Our specification is vLLM's own, which knows the tier by its name in 0.26 too.
        specification = {"spec_name": "PegaTieringSpec", "spec_module_path": "pegaflow.vllm_tier.spec"}
        tier = {"type": "PegaTier", "address": str(self._socket)}
        return _offloading(self.settings, **specification, secondary_tiers=[tier])

    def environment(self) -> dict[str, str]:
        """See `System` and `VllmFiles`."""
        return {"PYTHONHASHSEED": "0"}


class LmCache(System):
    """LMCache in vLLM's process, host memory only."""

    name = "lmcache"
    loads = True

    def why_not(self) -> str:
        """See `System`."""
        return "" if self.is_importable("lmcache") else "its package is not installed"

    def connector(self) -> dict[str, Any] | None:
        """See `System`."""
        return {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}

    def environment(self) -> dict[str, str]:
        """See `System`."""
        return {
            "LMCACHE_LOCAL_CPU": "True",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": str(self.settings.dram_bytes >> 30),
            "LMCACHE_CHUNK_SIZE": "256",
            "PYTHONHASHSEED": "0",
        }


class Upstream(System):
    """PegaFlow upstream. Its package has the name of ours, so it comes from a folder of its own."""

    name = "upstream"
    loads = survives_engine = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._port = free_port()
        self._process: Process | None = None

    def why_not(self) -> str:
        """See `System`."""
        if not self.settings.upstream_site:
            return "no --upstream-site was given"
        return "" if self.is_importable("pegaflow._server") else f"not installed in {self.settings.upstream_site}"

    def path(self) -> str | None:
        """See `System`."""
        return self.settings.upstream_site

    def start(self, *, empty: bool) -> None:
        """See `System`."""
        super().start(empty=empty)
        command = os.environ.get("UPSTREAM_SERVER") or (
            f"{shlex.quote(self.settings.python)} -c 'from pegaflow._server import main; main()' "
            f"--devices {','.join(map(str, range(self.settings.tensor_parallel)))} "
            f"--pool-size {self.settings.dram_bytes >> 30}gb"
        )
        libraries = subprocess.run(
            [self.settings.python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        inherited = os.environ.get("LD_LIBRARY_PATH", "")
        environment = {
            **os.environ,
            "PYTHONPATH": self.settings.upstream_site,
            "LD_LIBRARY_PATH": ":".join(part for part in (libraries, inherited) if part),
        }
        log = self.settings.state / "logs" / "upstream-server.log"
        self._process = Process(
            "upstream's server", [*shlex.split(command), "--addr", f"127.0.0.1:{self._port}"], log, environment
        )
        time.sleep(15)
        self._process.check_running()

    def stop(self) -> None:
        """See `System`."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def connector(self) -> dict[str, Any] | None:
        """See `System`."""
        return {
            "kv_connector": "PegaKVConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "pegaflow.connector",
        }

    def environment(self) -> dict[str, str]:
        """See `System`."""
        return {
            "PEGAFLOW_HOST": "http://127.0.0.1",
            "PEGAFLOW_PORT": str(self._port),
            "PYTHONHASHSEED": "0",
        }


SYSTEMS: dict[str, type[System]] = {
    system.name: system
    for system in (Nothing, GpuPrefix, PegaFlow, VllmOffload, VllmFiles, VllmPegaFlow, LmCache, Upstream)
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benches share."""
    parser.add_argument("--state", type=Path, default=REPOSITORY / "target" / "ttft", help="results, logs and stores")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has vLLM")
    parser.add_argument("--server", default=str(REPOSITORY / "target" / "release" / "pegaflow-server"))
    parser.add_argument("--server-argument", action="append", default=[], help="one more of the server's command line")
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="llama-8b")
    parser.add_argument("--eager", action="store_true", default=os.environ.get("EAGER") == "1", help="no CUDA graphs")
    parser.add_argument("--tp", type=int, default=int(os.environ.get("TP", "1")), help="tensor parallel size")
    parser.add_argument("--gpu-memory", type=float, default=0.5, help="gpu_memory_utilization of each vLLM")
    parser.add_argument("--dram", default="40GiB", help="of every system's cache, in MiB or GiB")
    parser.add_argument("--nvme", default="36GiB", help="the size of the store")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--load-policy", default="always", help="of PegaFlow: always, auto, never or shadow")
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="more of vLLM's, as JSON")
    parser.add_argument("--upstream-site", default=os.environ.get("UPSTREAM_SITE", ""))


def why_no_gpu() -> str:
    """Why nothing can be measured here; empty where the driver finds a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver: libcuda.so.1 is not on this host"
    count = ctypes.c_int()
    if code := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the CUDA driver reports error {code}"
    return "" if count.value else "the CUDA driver finds no GPU"


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings out of the options; where there is no GPU, ends the program with a reason and exit code 0. From now
    on SIGTERM ends what was started, too.
    """
    if reason := why_no_gpu():
        print(f"{Path(sys.argv[0]).stem}: skipped: {reason}", file=sys.stderr)
        print(json.dumps({"skipped": reason}))
        sys.exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.state.mkdir(parents=True, exist_ok=True)
    return Settings(
        python=options.python,
        state=options.state.resolve(),
        shape=options.shape,
        eager=options.eager,
        tensor_parallel=options.tp,
        gpu_memory=options.gpu_memory,
        dram=options.dram,
        nvme=options.nvme,
        server=options.server,
        server_arguments=tuple(options.server_argument),
        upstream_site=options.upstream_site,
        kv_cache_dtype=options.kv_cache_dtype,
        load_policy=options.load_policy,
        engine=options.engine_arguments,
    )


__all__ = [
    "HERE",
    "REPOSITORY",
    "SYSTEMS",
    "Engine",
    "PegaFlow",
    "Settings",
    "StoryError",
    "System",
    "add_arguments",
    "settings_of",
]
