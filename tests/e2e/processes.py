"""Processes of the story: each leads a session, logs to a file, is waited for within bounds and killed as a whole."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# How much of a log is shown when its process failed.
_TAIL_BYTES = 6_000
_POLL_SECONDS = 0.05


class StoryError(Exception):
    """The story cannot go on; the message says what failed and where to look."""


def wait_until(what: str, timeout_seconds: float, is_done: Callable[[], bool]) -> None:
    """Returns as soon as `is_done` says so.

    Raises:
        StoryError: it did not within `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    while not is_done():
        if time.monotonic() >= deadline:
            raise StoryError(f"{what}: not within {timeout_seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def members_of_session(session: int) -> list[int]:
    """The living processes of a session, zombies left out."""
    members = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # After the name, which may hold anything, in parentheses: state, parent, group, session.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            members.append(int(folder.name))
    return members


class Process:
    """A process that leads a session of its own; all that it starts belongs to it and ends with it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str],
        *,
        stdin: int | None = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [str(part) for part in command],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
                pass_fds=pass_fds,
            )

    @property
    def pid(self) -> int:
        """The process id, which is the session's too."""
        return self.popen.pid

    def is_running(self) -> bool:
        """Whether the leader has not ended yet."""
        return self.popen.poll() is None

    def failure(self, problem: str) -> StoryError:
        """An error that shows the end of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            tail = log.read().decode(errors="replace")
        return StoryError(f"{self.name}: {problem}\n--- end of {self.log}\n{tail}\n---")

    def check_running(self) -> None:
        """Raises:
        StoryError: the process has ended by itself.
        """
        if not self.is_running():
            raise self.failure(f"ended with exit code {self.popen.returncode}")

    def kill(self) -> None:
        """SIGKILL to every process of the session, and returns when all are gone. Harmless when repeated."""

        def all_gone() -> bool:
            alive = members_of_session(self.pid)
            for member in alive:
                try:
                    os.kill(member, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.popen.poll()
            return not alive

        wait_until(f"{self.name}: kill", 30, all_gone)
        self.popen.wait(timeout=10)


class PipedProcess(Process):
    """A process that is asked by lines of JSON on its standard input and answers on a descriptor of its own."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> None:
        """`command` is given one more argument: the number of the descriptor to answer on."""
        read_end, write_end = os.pipe()
        self._replies = os.fdopen(read_end, "rb", buffering=0)
        self._unread = b""
        super().__init__(
            name, [*command, str(write_end)], log, environment, stdin=subprocess.PIPE, pass_fds=[write_end]
        )
        os.close(write_end)

    def send(self, request: object) -> None:
        """Sends a request without waiting for the answer."""
        stdin = self.popen.stdin
        if stdin is None:
            raise StoryError("invariant: the child was started with a pipe as its input")
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()

    def receive(self, timeout_seconds: float) -> bytes:
        """The next answer: a line.

        Raises:
            StoryError: none within the bound, or the process ended.
        """
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self.failure(f"no answer within {timeout_seconds:.0f} s")
            if not select.select([self._replies], [], [], left)[0]:
                continue
            received = self._replies.read(1 << 20)
            if not received:
                self.popen.wait(timeout=30)
                raise self.failure(f"ended with exit code {self.popen.returncode}")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def end_input(self) -> None:
        """Nothing more will be asked."""
        if self.popen.stdin is not None:
            self.popen.stdin.close()

    def end_output(self) -> None:
        """No more answers are read."""
        self._replies.close()


class HttpProcess(Process):
    """A process with a port for its readiness and its metrics; `__init__` returns when it says that it is ready."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str],
        *,
        port: int,
        ready_path: str,
        start_seconds: float,
    ) -> None:
        super().__init__(name, command, log, environment)
        self._port, self._ready_path = port, ready_path
        try:
            wait_until(f"{name}: start", start_seconds, self._is_ready)
        except BaseException:
            self.kill()
            raise

    def _is_ready(self) -> bool:
        self.check_running()
        try:
            return http_get(self._port, self._ready_path)[0] == 200
        except OSError:
            return False

    def metrics(self) -> str:
        """What `/metrics` says.

        Raises:
            StoryError: it answered with an error.
        """
        status, text = http_get(self._port, "/metrics")
        if status != 200:
            raise self.failure(f"/metrics answered {status}")
        return text


def kill_at_once(processes: Sequence[Process]) -> None:
    """SIGKILL to all of them before any is waited for, as when the machine's plug is pulled."""
    for process in processes:
        for member in members_of_session(process.pid):
            try:
                os.kill(member, signal.SIGKILL)
            except ProcessLookupError:
                continue
    for process in processes:
        process.kill()


def http_get(port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET to a port of this host."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
