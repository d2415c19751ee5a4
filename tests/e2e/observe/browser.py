"""The status page in a real browser: it fills, its numbers change with real traffic, and it is quiet about itself."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from processes import StoryError, wait_until
from watched import WatchedServer
from webdriver import Browser

# What stands where nothing is known.
_NOTHING = "\u2013"
_PICTURE_BYTES_MAX = 150_000
_WIDE, _PHONE = (1180, 1390), (390, 1560)


def _require(what: str, is_so: bool) -> None:
    if not is_so:
        raise StoryError(what)


def _quiet(browser: Browser, when: str) -> None:
    said = browser.console()
    _require(f"the console is not empty ({when}): {said}", not said)


def _shrink(picture: Path) -> int:
    """Fewer colours, where pngquant is there to choose them; returns the bytes."""
    if shutil.which("pngquant") is not None:
        command: list[str | Path] = ["pngquant", "--force", "--output", picture, "64", picture]
        subprocess.run(command, check=True, timeout=60.0)
    return picture.stat().st_size


def check_browser(server: WatchedServer, folder: Path, pictures: Path | None) -> list[str]:
    """Runs all checks of the page; returns what was proved.

    Raises:
        StoryError: the first that failed.
    """
    keep = pictures or folder
    with Browser(folder) as browser:
        browser.set_screen(*_WIDE)
        browser.open(server.url)
        wait_until("the page is connected", 20.0, lambda: browser.text("state-text") == "ready")
        before = {name: browser.text(name) for name in ("loaded", "hit", "dram-blocks", "lookups")}
        server.traffic(75, pace=12)
        wait_until("loads are shown", 30.0, lambda: browser.text("loaded") not in (_NOTHING, "0 B/s"))
        wait_until(
            "decisions are shown",
            30.0,
            lambda: browser.run("return document.querySelectorAll('#requests tr').length") > 3,
        )
        # The charts show something after a while.
        time.sleep(40.0)
        after = {name: browser.text(name) for name in before}
        changed = [name for name in before if before[name] != after[name]]
        _require(f"numbers change with traffic: {before} -> {after}", len(changed) == len(before))
        latencies = browser.text("latencies")
        _require(f"times of lookups, loads and drives are shown: {latencies}", latencies.count(_NOTHING) <= 6)
        _require(
            "the hit ratio's chart has an area",
            "L" in str(browser.run("return document.querySelector('#hit-chart .fill-dram').getAttribute('d')")),
        )
        bars = browser.run(
            "return [...document.querySelectorAll('.bar span')].filter(bar => parseFloat(bar.style.width) > 0).length"
        )
        _require(f"{bars} bars are filled", bars >= 10)
        _quiet(browser, "on a wide screen")
        sizes = {}
        for name, screen, is_dark, scale in (
            ("light", _WIDE, False, 1.0),
            ("dark", _WIDE, True, 1.0),
            ("phone", _PHONE, False, 1.5),
        ):
            browser.set_screen(*screen, is_dark=is_dark, scale=scale)
            time.sleep(1.5)
            height = int(browser.run("return document.documentElement.scrollHeight"))
            browser.set_screen(screen[0], height, is_dark=is_dark, scale=scale)
            time.sleep(0.5)
            width = browser.run("return document.documentElement.scrollWidth")
            _require(f"{name}: {width} px wide on a screen of {screen[0]}", width <= screen[0])
            picture = keep / f"status-{name}.png"
            browser.screenshot(picture)
            if pictures is not None:
                sizes[name] = _shrink(picture)
        background = "return getComputedStyle(document.body).backgroundColor"
        browser.set_screen(*_WIDE, is_dark=True)
        dark = browser.run(background)
        browser.set_screen(*_WIDE)
        _require("light and dark differ", dark != browser.run(background))
        _require(f"pictures are small: {sizes}", all(size < _PICTURE_BYTES_MAX for size in sizes.values()))
        refused = browser.run(
            "const script = document.createElement('script'); script.textContent = 'window.wasRun = true';"
            " document.body.append(script); return window.wasRun === true"
        )
        _require("a script without the nonce does not run", not refused)
        browser.console()
        server.wait_traffic()
        server.process.kill()
        wait_until("a server that is gone is noticed", 20.0, lambda: browser.text("state-text") == "no answer")
    return [
        "numbers change with traffic",
        "times, bars and charts are filled",
        "nothing in the console",
        "no horizontal scroll at 390 px",
        "light and dark differ",
        "no foreign script runs",
        "a server that is gone is noticed",
    ]
