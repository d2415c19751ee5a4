"""The connector's settings: everything wrong is said at once, and with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from pegaflow.connector.config import KILL_SWITCH_ENV, ConnectorConfig, KillSwitch, default_socket
from pegaflow.connector.port import is_listening, open_cache
from pegaflow.errors import ClosedError, InvalidInputError


def test_nothing_given_means_the_defaults() -> None:
    config = ConnectorConfig.from_extra({})
    assert config.mode == "auto"
    assert config.save_decode
    assert config.address == str(default_socket())


def test_all_problems_are_named_at_once() -> None:
    extra = {
        "mod": "server",
        "mode": "remote",
        "min_blocks": 0,
        "lookup_timeout_ms": True,
        "save_decode": "yes",
        "dram": 1.5,
        "socket": 7,
    }
    with pytest.raises(InvalidInputError) as caught:
        ConnectorConfig.from_extra(extra)
    for part in (
        "'mod' is not a setting",
        "use one of mode, socket",
        "mode is 'remote'; give one of auto, server, embedded",
        "min_blocks is 0; give a whole number from 1 to 65536",
        "lookup_timeout_ms is True",
        "save_decode is 'yes'; give true or false",
        "dram is 1.5; give a size",
        "socket is 7; give a text",
    ):
        assert part in str(caught.value)


def test_the_default_socket_is_the_server_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_socket() == Path("/run/user/7/pegaflow/pegaflow.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert default_socket().match("/tmp/pegaflow-*/pegaflow.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_socket().match("/tmp/pegaflow-*/pegaflow.sock")


def test_auto_without_a_server_and_with_workers_elsewhere_names_the_command(tmp_path: Path) -> None:
    config = ConnectorConfig.from_extra({"socket": str(tmp_path / "no.sock")})
    with pytest.raises(ClosedError, match=r"start it with: pegaflow-server --socket .*no\.sock"):
        open_cache(config, "test", shares_process=False)
    embedded = ConnectorConfig.from_extra({"mode": "embedded"})
    with pytest.raises(ClosedError, match="start a server with: pegaflow-server"):
        open_cache(embedded, "test", shares_process=False)


@pytest.mark.parametrize("address", ["/nowhere/at.sock", "tcp://127.0.0.1:1", "tcp://nonsense", "x" * 500])
def test_nobody_listens(address: str) -> None:
    assert not is_listening(address)


def test_the_kill_switch_follows_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KILL_SWITCH_ENV, raising=False)
    file = tmp_path / "off"
    switch = KillSwitch(ConnectorConfig.from_extra({"kill_switch": str(file)}))
    assert not switch.is_off(0.0)
    file.touch()
    assert not switch.is_off(0.5)
    assert switch.is_off(1.0)
    file.unlink()
    assert not switch.is_off(2.5)
    monkeypatch.setenv(KILL_SWITCH_ENV, "1")
    assert KillSwitch(ConnectorConfig()).is_off(0.0)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("64", 64),
        ("32MiB", 32 << 20),
        ("1.5 gib", 3 << 29),
        ("2MB", 2_000_000),
        ("64GiB", 64 << 30),
    ],
)
def test_the_limit_of_synchronous_loads(given: int | str, size: int) -> None:
    assert ConnectorConfig.from_extra({"sync_load_bytes": given}).sync_load_bytes_max == size


@pytest.mark.parametrize("given", [-1, True, None, "", "MiB", "1 furlong", "65GiB", 1.5])
def test_a_limit_of_synchronous_loads_that_is_none(given: object) -> None:
    with pytest.raises(InvalidInputError, match=r"sync_load_bytes is .*; give a size from 0 to 64GiB"):
        ConnectorConfig.from_extra({"sync_load_bytes": given})
