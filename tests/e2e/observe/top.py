"""`pegaflow top` in a pseudo-terminal and without one, against a server under real traffic."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Self

from processes import StoryError
from watched import WatchedServer

_ENTER, _LEAVE = "\x1b[?1049h", "\x1b[?1049l"
_COLOR = re.compile(r"\x1b\[\d+m")
_ESCAPE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


class Screen:
    """A program in a pseudo-terminal."""

    def __init__(self, command: list[str], columns: int, **environment: str) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ.update({"TERM": "xterm-256color", "LANG": "C.UTF-8", **environment})
            os.environ.pop("LC_ALL", None)
            os.execv(command[0], command)
        self.resize(columns)
        self.before = termios.tcgetattr(self._terminal)
        self.seen = ""

    def resize(self, columns: int) -> None:
        """Gives it another width."""
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def read(self, seconds: float, until: str = "\0") -> str:
        """What it writes in that time, or until it has written that."""
        new, deadline = "", time.monotonic() + seconds
        while time.monotonic() < deadline and until not in new:
            if not select.select([self._terminal], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self._terminal, 65536)
            except OSError:
                break
            new += data.decode(errors="replace")
        self.seen += new
        return new

    def mode(self) -> int:
        """Whether keys are echoed and so on."""
        return int(termios.tcgetattr(self._terminal)[3])

    def press(self, keys: bytes) -> None:
        """Types."""
        os.write(self._terminal, keys)

    def send(self, number: int) -> None:
        """A signal."""
        os.kill(self._pid, number)

    def end(self) -> int:
        """Its exit code, once it has ended."""
        self.read(1.0)
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                return os.waitstatus_to_exitcode(status)
            self.read(0.1)
        raise StoryError("top does not end")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._terminal)


def _require(what: str, is_so: bool) -> None:
    if not is_so:
        raise StoryError(what)


def _in_a_terminal(command: list[str]) -> None:
    with Screen(command, 100) as screen:
        first = screen.read(20.0, "q: quit")
        _require(f"a screen of its own: {first[:300]!r}", _ENTER in first and "PegaFlow" in first)
        raw = screen.mode()
        _require("keys are not echoed", not raw & termios.ECHO and not raw & termios.ICANON)
        screen.read(4.0)
        text = _ESCAPE.sub("", screen.seen)
        for part in ("hits", "DRAM", "drive", "loaded", "load from drive", "visible until durable", "█"):
            _require(f"'{part}' is on the screen: {text[-1500:]}", part in text)
        _require("it has colours", _COLOR.search(screen.seen) is not None)
        rates = set(re.findall(r"loaded ([\d.]+ \w+)/s from DRAM", text))
        _require(f"numbers change: {rates}", len(rates) > 1)
        screen.resize(50)
        screen.read(0.3)
        # The terminal adds a carriage return of its own.
        narrow = _ESCAPE.sub("", screen.read(3.0).replace("\x1b[H", "\n")).replace("\r", "").split("\n")
        _require(f"lines fit 50 columns: {narrow}", all(len(line) <= 50 for line in narrow))
        screen.press(b"q")
        _require("q ends it with 0", screen.end() == 0)
        _require("the screen is given back", _LEAVE in screen.seen)
        _require("so are the keys", screen.mode() == screen.before[3])
    with Screen(command, 100, NO_COLOR="1", LANG="C") as screen:
        screen.read(20.0, "q: quit")
        screen.read(1.5)
        _require("NO_COLOR has no colours", _COLOR.search(screen.seen) is None)
        _require("ASCII where nothing else is understood", screen.seen.isascii() and "####" in screen.seen)
        screen.press(b"\x03")
        _require("Ctrl-C ends it with 0", screen.end() == 0)
    with Screen(command, 100) as screen:
        screen.read(20.0, "q: quit")
        screen.send(signal.SIGTERM)
        _require("SIGTERM ends it with 0", screen.end() == 0)
        _require("and gives the screen back", _LEAVE in screen.seen and screen.mode() == screen.before[3])


def _without_one(command: list[str], binary: str, folder: Path) -> None:
    def run(*arguments: str, seconds: float = 20.0) -> tuple[int, str]:
        done = subprocess.run([*arguments], capture_output=True, text=True, timeout=seconds, check=False)
        return done.returncode, done.stdout

    code, text = run(*command, "--once")
    _require(f"one plain line: {code} {text!r}", code == 0 and text.count("\n") == 1 and "\x1b" not in text)
    _require(f"it tells what happens: {text}", text.startswith("ready  hits") and "load p99" in text)
    code, text = run(binary, "--json", *command[1:], "--once")
    told = json.loads(text)
    _require(f"JSON has the numbers: {text[:500]}", code == 0 and told["loaded_dram_bytes_per_second"] >= 0)
    _require("and the times", {"lookup", "drive_read"} <= {one["name"] for one in told["latencies"]})
    piped = subprocess.Popen([binary, "--json", *command[1:]], stdout=subprocess.PIPE, text=True)
    if piped.stdout is not None:
        frames = [json.loads(piped.stdout.readline()) for _ in range(3)]
        piped.stdout.close()
        _require("an object for each moment", all(frame["seconds"] > 0 for frame in frames))
    _require("a closed pipe ends it with 0", piped.wait(timeout=20.0) == 0)
    code, _ = run(binary, "--socket", str(folder / "nobody.sock"), "top", "--once")
    _require(f"no server: exit code {code}", code == 5)
    code, _ = run(*command, "--interval", "0")
    _require(f"a bad interval: exit code {code}", code == 2)


def check_top(server: WatchedServer, folder: Path, binaries: Path) -> list[str]:
    """Runs all checks; returns what was proved.

    Raises:
        StoryError: the first that failed.
    """
    binary = str(binaries / "pegaflow")
    command = [binary, "--socket", str(server.socket), "top", "--interval", "0.5"]
    server.traffic(120)
    _in_a_terminal(command)
    _without_one(command, binary, folder)
    with Screen(command, 100) as screen:
        screen.read(20.0, "q: quit")
        server.end_traffic()
        server.process.kill()
        _require("a server that is gone is noticed", "no answer" in screen.read(20.0, "no answer"))
        screen.press(b"q")
        _require("and q still ends it", screen.end() == 0)
    return [
        "a live screen in a terminal, given back after q, Ctrl-C and SIGTERM",
        "NO_COLOR, narrow and ASCII terminals",
        "plain lines, JSON and --once without a terminal",
        "a server that is gone is noticed",
    ]
