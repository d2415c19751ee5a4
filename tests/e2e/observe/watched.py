"""A server under real traffic, for who watches it: filled, restarted so that its drive is measured, then kept busy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from processes import HttpProcess, StoryError, free_port, wait_until

_PROMPTS = 72
_FILL_SECONDS = 6


class WatchedServer:
    """A `pegaflow-server` with a store on this machine's drive, and what it takes to keep it busy."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries, self._folder = binaries, folder
        self.socket = folder / "pega.sock"
        self._traffic: subprocess.Popen[bytes] | None = None
        self.process = self._start("filling")
        self.traffic(_FILL_SECONDS, pace=200)
        self.wait_traffic()
        self._stop()
        self.process = self._start("watched")
        # Only an idle server measures its drive, which takes a third of a second.
        wait_until("the drive is measured", 90.0, lambda: "pegaflow_drive_read_bytes_per_second{" in self.metrics())

    def _start(self, name: str) -> HttpProcess:
        self.port = free_port()
        command: list[str | Path] = [self._binaries / "pegaflow-server", "--socket", self.socket]
        command += ["--http", f"127.0.0.1:{self.port}", "--path", self._folder / "store", "--capacity", "1GiB"]
        command += ["--dram", "256MiB", "--region", "16MiB", "--write-budget", "2TiB/day"]
        log = self._folder / f"server-{name}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PEGAFLOW_")}
        return HttpProcess(
            "pegaflow-server", command, log, environment, port=self.port, ready_path="/ready", start_seconds=60.0
        )

    def _stop(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.popen.wait(timeout=60.0)

    @property
    def url(self) -> str:
        """Where its HTTP is."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        """What it answers."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10.0) as answer:
            return str(answer.read().decode())

    def metrics(self) -> str:
        """Its Prometheus text."""
        return self.get("/metrics")

    def status(self) -> Any:  # noqa: ANN401 - JSON
        """What its page reads."""
        return json.loads(self.get("/status.json"))

    def traffic(self, seconds: float, pace: int = 12) -> None:
        """Starts traffic."""
        command: list[str | Path] = [self._binaries / "traffic", "--socket", self.socket, "--seconds", f"{seconds:.0f}"]
        command += ["--pace", str(pace), "--prompts", str(_PROMPTS), "--seed", "1"]
        log = (self._folder / "traffic.log").open("ab")
        self._traffic = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_traffic(self) -> None:
        """Waits until it has ended, and requires that every loaded byte was right."""
        if self._traffic is not None and self._traffic.wait(timeout=300.0) != 0:
            tail = (self._folder / "traffic.log").read_text()[-2000:]
            raise StoryError(f"the traffic ended badly:\n{tail}")
        self._traffic = None

    def end_traffic(self) -> None:
        """Cuts it short."""
        if self._traffic is not None:
            self._traffic.kill()
            self._traffic.wait()
            self._traffic = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_traffic()
        self.process.kill()
