"""A real browser over the WebDriver protocol: HTTP to chromedriver, with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from processes import StoryError, free_port, wait_until

_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]


def browser_missing() -> str | None:
    """What has to be installed for these tests; `None` if nothing."""
    names = ["chromium", "chromedriver"]
    missing = [name for name in names if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found" if missing else None


class Browser:
    """A headless Chromium with a profile of its own."""

    def __init__(self, logs: Path) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="pegaflow-chromium-")
        self._port = free_port()
        with (logs / "chromedriver.log").open("wb") as log:
            command = ["chromedriver", f"--port={self._port}"]
            self._driver = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._session = ""
        try:
            wait_until("chromedriver listens", 30.0, self._is_listening)
            options = {
                "args": [*_ARGUMENTS, f"--user-data-dir={self._profile.name}"],
                "binary": shutil.which("chromium"),
            }
            capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
            self._session = str(answer["sessionId"])
        except BaseException:
            self.close()
            raise

    def _is_listening(self) -> bool:
        try:
            return bool(self._ask("GET", "/status")["ready"])
        except OSError:
            return False

    def _ask(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 - the protocol's own answers
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self._port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60.0) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise StoryError(f"chromedriver refuses {path}: {error.read().decode(errors='replace')[:500]}") from error

    def _of_session(self, path: str, body: object) -> Any:  # noqa: ANN401
        return self._ask("POST", f"/session/{self._session}{path}", body)

    def devtools(self, command: str, **parameters: object) -> None:
        """A command of the DevTools protocol."""
        self._of_session("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def set_screen(self, width: int, height: int, *, is_dark: bool = False, scale: float = 1.0) -> None:
        """A screen of that size in CSS pixels, and what its owner prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Goes to a page and waits until it is loaded."""
        self._of_session("/url", {"url": url})

    def run(self, script: str) -> Any:  # noqa: ANN401
        """What a script returns."""
        return self._of_session("/execute/sync", {"script": script, "args": []})

    def text(self, element: str) -> str:
        """What an element says."""
        return str(self.run(f"return document.getElementById({element!r}).textContent"))

    def console(self) -> list[str]:
        """What was written to the console since this was asked last: errors and refused resources too."""
        entries = self._of_session("/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def screenshot(self, path: Path) -> int:
        """Keeps what is on the screen; returns its bytes."""
        picture = base64.b64decode(self._ask("GET", f"/session/{self._session}/screenshot"))
        path.write_bytes(picture)
        return len(picture)

    def close(self) -> None:
        """Ends the browser."""
        if self._session:
            try:
                self._ask("DELETE", f"/session/{self._session}")
            except (OSError, StoryError):
                time.sleep(0.1)
        self._driver.terminate()
        self._driver.wait(timeout=30.0)
        self._profile.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
