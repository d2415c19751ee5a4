"""What watches a server, against a server under real traffic: its status page in Chromium, its metrics in Prometheus.

usage: observe.py --binaries FOLDER [--only browser|prometheus|top] [--pictures docs]

A check whose tool is missing is skipped with the reason. The last line is `N passed, N failed, N skipped`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from browser import check_browser
from processes import StoryError
from prometheus import check_prometheus, prometheus_missing
from top import check_top
from watched import WatchedServer
from webdriver import browser_missing

Check = Callable[[WatchedServer, Path], list[str]]


def main() -> int:
    """Runs the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binaries", required=True, type=Path, help="where pegaflow-server, pegaflow and traffic are")
    parser.add_argument("--only", help="these checks, separated by commas")
    parser.add_argument("--pictures", type=Path, help="where the pictures of the page are kept")
    options = parser.parse_args()
    checks: dict[str, tuple[str | None, Check]] = {
        "browser": (browser_missing(), lambda server, folder: check_browser(server, folder, options.pictures)),
        "prometheus": (prometheus_missing(), check_prometheus),
        "top": (None, lambda server, folder: check_top(server, folder, options.binaries)),
    }
    passed = failed = skipped = 0
    for name in options.only.split(",") if options.only else checks:
        missing, check = checks[name]
        if missing is not None:
            print(f"{name}: skipped, {missing}", flush=True)
            skipped += 1
            continue
        # A socket's path may have 103 bytes.
        with tempfile.TemporaryDirectory(prefix=f"pegaflow-{name}-") as folder:
            try:
                with WatchedServer(options.binaries, Path(folder)) as server:
                    for proved in check(server, Path(folder)):
                        print(f"{name}: {proved}", flush=True)
                        passed += 1
            except StoryError as error:
                print(f"{name}: FAILED: {error}", flush=True)
                failed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
