"""A real Prometheus scrapes a busy server: every query of the dashboard has data, every alert rule can be evaluated."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from processes import HttpProcess, StoryError, free_port
from watched import WatchedServer

_DEPLOY = Path(__file__).resolve().parents[3] / "docs" / "deploy"
_TRAFFIC_SECONDS = 40
# What only an NVMe drive tells that may be asked for its health.
_HARDWARE = re.compile(r"pegaflow_drive_(used_percent|spare_percent|critical_warning|written_bytes|media_errors)$")
_NAME = re.compile(r"\b(?:pegaflow|process)_[a-z_]+\b")


def prometheus_missing() -> str | None:
    """What has to be installed for these tests; `None` if nothing."""
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def _promtool(*arguments: str | Path) -> None:
    command = ["promtool", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120.0, check=False)
    if done.returncode != 0:
        raise StoryError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")


def _names(metrics: str) -> set[str]:
    """Names of all series."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", metrics, re.MULTILINE):
        found |= {f"{name}{end}" for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    return found


def _unknown(expression: str, names: set[str]) -> set[str]:
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    return {name for name in _NAME.findall(without_strings) if name not in names and not _HARDWARE.match(name)}


def _panels() -> list[tuple[str, str]]:
    """Title and query, as Grafana would send it."""
    dashboard = json.loads((_DEPLOY / "grafana" / "pegaflow.json").read_text())
    queries = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "20s")
            queries.append((panel["title"], query))
    return queries


class Prometheus:
    """A Prometheus of its own, with our rules."""

    def __init__(self, server: WatchedServer, folder: Path) -> None:
        self._port = free_port()
        rules = (_DEPLOY / "prometheus" / "alerts.yml").resolve()
        settings = folder / "prometheus.yml"
        settings.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(rules)],
                    "scrape_configs": [
                        {"job_name": "pegaflow", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}
                    ],
                }
            )
        )
        command: list[str | Path] = [
            "prometheus",
            f"--config.file={settings}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
        ]
        command += [f"--web.listen-address=127.0.0.1:{self._port}"]
        self.process = HttpProcess(
            "prometheus",
            command,
            folder / "prometheus.log",
            os.environ,
            port=self._port,
            ready_path="/-/ready",
            start_seconds=60.0,
        )

    def ask(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
        """The `data` of an answer."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30.0) as answer:
            return json.load(answer)["data"]


def check_prometheus(server: WatchedServer, folder: Path) -> list[str]:
    """Runs all checks; returns what was proved.

    Raises:
        StoryError: what failed, all of it.
    """
    rules = _DEPLOY / "prometheus"
    _promtool("check", "rules", rules / "alerts.yml")
    _promtool("check", "config", rules / "prometheus.yml")
    _promtool("test", "rules", rules / "alerts_test.yml")
    prometheus = Prometheus(server, folder)
    try:
        server.traffic(_TRAFFIC_SECONDS, pace=12)
        server.wait_traffic()
        time.sleep(2.0)
        problems = []
        names = _names(server.metrics())
        panels = _panels()
        for title, query in panels:
            if unknown := _unknown(query, names):
                problems.append(f"panel '{title}' asks for {sorted(unknown)}, which the server does not tell")
                continue
            is_hardware = any(_HARDWARE.match(name) for name in _NAME.findall(query))
            result = prometheus.ask("query", query=query)["result"]
            if not is_hardware and not any(series["value"][1] != "NaN" for series in result):
                problems.append(f"panel '{title}' has no data: {query} -> {result}")
        alerts = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        for rule in alerts:
            if unknown := _unknown(rule["query"], names):
                problems.append(f"alert {rule['name']} asks for {sorted(unknown)}, which the server does not tell")
            if rule["health"] != "ok":
                problems.append(f"alert {rule['name']}: {rule['health']}, {rule.get('lastError')}")
            if rule["state"] == "firing":
                problems.append(f"alert {rule['name']} fires on a healthy server")
        if not alerts or not panels:
            problems.append(f"{len(panels)} queries and {len(alerts)} rules: something is not read")
        series = prometheus.ask("query", query='count({job="pegaflow"})')["result"][0]["value"][1]
        if problems:
            raise StoryError("\n".join(problems))
    finally:
        prometheus.process.kill()
    return [
        "rules and configuration are valid; the rules' own tests pass",
        f"{len(panels)} queries of the dashboard return data ({series} series in all)",
        f"{len(alerts)} rules are evaluated, on metrics that the server tells, and none fires",
    ]
