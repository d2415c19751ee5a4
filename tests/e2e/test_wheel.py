"""The wheel alone, in an empty environment on a path without the source: its programs, its module and its tag."""

from __future__ import annotations

import json
import re
import subprocess
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from store_server import ServerSettings, StoreServer

WHEELS = sorted((Path(__file__).resolve().parents[2] / "target" / "wheels").glob("pegaflow-*.whl"))
PROGRAMS = ("pegaflow", "pegaflow-server", "pegaflow-router")
LIMIT_SECONDS = 120.0
# What the Python half does without vLLM: objects through the module. The connector runs out of the wheel in the story.
OBJECTS = """
import sys
from pegaflow import PegaEngine
with PegaEngine(sys.argv[1], dram="16MiB", nvme="64MiB") as engine:
    if engine.get("name") is None:
        engine.put("name", b"bytes" * 1000)
    print(bytes(engine.get("name")) == b"bytes" * 1000, engine.stats()["nvme_used_bytes"] >= 0)
import pegaflow
assert pegaflow.__file__.startswith(sys.prefix), pegaflow.__file__
"""

pytestmark = pytest.mark.skipif(len(WHEELS) != 1, reason="there is no wheel; make wheel does it")


def said(folder: Path, *command: str | Path) -> str:
    """What a program printed, run where nothing of ours lies; it has to have ended well."""
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty virtual environment with the wheel in it; no index is asked."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    said(folder, folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", WHEELS[0])
    yield folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_there(environment: Path, program: str) -> None:
    version = WHEELS[0].name.split("-")[1]
    assert said(environment, environment / "bin" / program, "--version").split()[-1].startswith(version)


def test_the_doctor_looks_at_the_machine(environment: Path) -> None:
    store = environment / "store"
    store.mkdir()
    command = (environment / "bin" / "pegaflow", "--json", "doctor", "--path", store, "--capacity", "1GiB")
    assert json.loads(said(environment, *command))


def test_the_server_answers_the_cli(environment: Path, tmp_path: Path) -> None:
    socket = environment / "s"
    server = StoreServer(
        "wheel", ServerSettings(environment / "bin" / "pegaflow-server", tmp_path / "store", socket, tmp_path)
    )
    try:
        said(environment, environment / "bin" / "pegaflow", "--socket", socket, "ping")
    finally:
        server.process.kill()


def test_objects_survive_the_process(environment: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert said(environment, environment / "bin" / "python", "-c", OBJECTS, tmp_path / "s").split() == ["True"] * 2


def needs(path: Path) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """The shared libraries that a file needs, and of their versioned symbols the newest, by name."""
    dynamic = said(path.parent, "readelf", "-d", path)
    libraries = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    versions = re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\b", said(path.parent, "readelf", "-V", path))
    newest: dict[str, tuple[int, ...]] = {}
    for name, text in versions:
        newest[name] = max(newest.get(name, ()), tuple(int(part) for part in text.split(".")))
    return libraries, newest


def newer(program: dict[str, tuple[int, ...]], module: dict[str, tuple[int, ...]]) -> Sequence[str]:
    """What a program needs that is newer than what the module needs."""
    return [f"{name} {version}" for name, version in program.items() if version > module.get(name, ())]


def test_programs_need_no_more_than_the_tag_says(environment: Path) -> None:
    """Maturin holds the module against the tag of the wheel; the programs may need no more than the module does."""
    assert re.search(r"-cp311-abi3-manylinux_2_\d+_x86_64\.whl$", WHEELS[0].name)
    module = next(environment.glob("lib/python3*/site-packages/pegaflow/_native*.so"))
    libraries, versions = needs(module)
    assert not [library for library in libraries if "cuda" in library or "python" in library]
    for program in PROGRAMS:
        also, newest = needs(environment / "bin" / program)
        assert also <= libraries
        assert not newer(newest, versions)


def test_programs_are_stripped_and_licences_are_there() -> None:
    with zipfile.ZipFile(WHEELS[0]) as wheel:
        names = wheel.namelist()
        scripts = [name for name in names if ".data/scripts/" in name]
        assert sorted(Path(name).name for name in scripts) == sorted(PROGRAMS)
        assert not [name for name in scripts if b".symtab" in wheel.read(name)]
        (licences,) = (name for name in names if name.endswith("THIRD-PARTY.txt"))
        text = wheel.read(licences).decode()
    for part in ("librocksdb-sys", "rocksdb/LICENSE.Apache", "zstd/LICENSE", "ring"):
        assert part in text
