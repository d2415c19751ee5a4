"""The background check of the weights: it stops a worker for other weights under the same sampled digest, and for
nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")
import torch

from pegaflow import _native
from pegaflow.connector import weights_check
from pegaflow.connector import worker as worker_module
from pegaflow.connector.compat import LayerMemory, Piece
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.metadata import LoadOrder, PegaMetadata, SaveOrder
from pegaflow.connector.weights_check import DigestStore, Signature, WeightsCheck, default_directory
from pegaflow.connector.worker import PegaWorker
from pegaflow.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS, PAGE = 8, 64


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read in full. Files count as settled at once."""
    names: list[str] = []
    full_digest = _native.full_digest

    def counted(files: list[Path]) -> str:
        names.extend(file.name for file in files)
        return full_digest(files)

    monkeypatch.setattr(weights_check._native, "full_digest", counted)
    monkeypatch.setattr(weights_check, "_SETTLED_S", float("-inf"))
    return names


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests"


def weights(folder: Path, byte: bytes, name: str = "model.safetensors", metadata: str = "") -> Path:
    """A file of weights; `byte` lies where nothing is sampled."""
    folder.mkdir(exist_ok=True)
    data = bytes(5000) + byte + bytes(200_000)
    header: dict[str, Any] = {"a": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    text = json.dumps(({"__metadata__": {"by": metadata}} if metadata else {}) | header).encode()
    file = folder / name
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def run(check: WeightsCheck) -> str:
    check.start()
    assert check._thread is not None
    assert check._thread.daemon
    check._thread.join(30)
    assert not check._thread.is_alive()
    return check.verdict()


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_the_first_is_recorded_and_the_same_is_good(tmp_path: Path, directory: Path, reads: list[str]) -> None:
    one, copy = weights(tmp_path / "one", b"\0"), weights(tmp_path / "copy", b"\0")
    assert run(WeightsCheck([[one]], directory)) == ""
    assert run(WeightsCheck([[copy]], directory)) == ""
    assert reads == [one.name] * 2
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not list(directory.glob("tmp-*"))


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, directory: Path, reads: list[str]) -> None:
    file = weights(tmp_path / "one", b"\0")
    for _ in range(3):
        assert run(WeightsCheck([[file]], directory)) == ""
    assert reads == [file.name]
    os.utime(file, ns=(1, 1))
    assert run(WeightsCheck([[file]], directory)) == ""
    assert reads == [file.name] * 2


def test_a_file_that_was_just_written_is_not_kept(
    tmp_path: Path, directory: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_check, "_SETTLED_S", float("inf"))
    file = weights(tmp_path / "one", b"\0")
    for _ in range(2):
        assert run(WeightsCheck([[file]], directory)) == ""
    assert reads == [file.name] * 2


def test_other_weights_under_the_same_sampled_digest_are_found(tmp_path: Path, directory: Path) -> None:
    one, two = weights(tmp_path / "one", b"\0"), weights(tmp_path / "two", b"\1")
    sampled = _native.digest_weights([one])
    assert sampled == _native.digest_weights([two])
    assert run(WeightsCheck([[one]], directory)) == ""
    for _ in range(2):
        verdict = run(WeightsCheck([[two]], directory))
        assert sampled in verdict
        assert str(two.parent) in verdict
        assert "model.safetensors" in verdict
        assert f"delete its store and {directory / f'weights-{sampled}.json'}" in verdict
    assert run(WeightsCheck([[one]], directory)) == ""
    DigestStore(directory).record_path(sampled).unlink()
    assert run(WeightsCheck([[two]], directory)) == ""


def test_a_drafter_is_checked_as_well(tmp_path: Path, directory: Path) -> None:
    model = weights(tmp_path / "model", b"\0", metadata="model")
    one, two = (
        weights(tmp_path / "one", b"\0", "draft.safetensors"),
        weights(tmp_path / "two", b"\1", "draft.safetensors"),
    )
    assert _native.digest_weights([one]) == _native.digest_weights([two])
    assert run(WeightsCheck([[model], [one]], directory)) == ""
    assert "draft.safetensors" in run(WeightsCheck([[model], [two]], directory))


@pytest.mark.parametrize("other", [{"name": "renamed.safetensors"}, {"metadata": "pt"}])
def test_the_same_tensors_in_other_files_are_not_refused(
    tmp_path: Path, directory: Path, other: dict[str, str]
) -> None:
    one, two = weights(tmp_path / "one", b"\0", metadata="np"), weights(tmp_path / "two", b"\0", **other)
    assert _native.digest_weights([one]) == _native.digest_weights([two])
    assert _native.full_digest([one]) != _native.full_digest([two])
    assert run(WeightsCheck([[one]], directory)) == ""
    assert run(WeightsCheck([[two]], directory)) == ""
    # Both are recorded.
    assert run(WeightsCheck([[weights(tmp_path / "three", b"\1", **other)]], directory)) != ""


def test_files_that_change_meanwhile_end_the_check(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(WeightsCheck([[weights(tmp_path / "one", b"\0")]], directory)) == ""
    two = weights(tmp_path / "two", b"\1")
    before = WeightsCheck([[two]], directory)
    os.utime(two, ns=(1, 1))
    assert run(before) == ""
    during = WeightsCheck([[two]], directory)

    def full_digest(files: list[Path]) -> str:
        os.utime(two, ns=(2, 2))
        return "other"

    monkeypatch.setattr(weights_check._native, "full_digest", full_digest)
    assert run(during) == ""
    assert [text.partition(": ")[2] for text in messages(caplog, logging.WARNING)] == [
        f"the full digest of the weights was not taken: {two} was changed after it was loaded"
    ] * 2
    assert DigestStore(directory).digest(two, Signature.of(two)) is None


def test_unreadable_files_end_the_check(
    tmp_path: Path, directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = weights(tmp_path / "one", b"\0")
    check = WeightsCheck([[file]], directory)
    file.unlink()
    assert run(check) == ""
    assert len(messages(caplog, logging.WARNING)) == 1

    def broken(files: list[Path]) -> str:
        raise ZeroDivisionError

    file = weights(tmp_path / "one", b"\0")
    monkeypatch.setattr(weights_check._native, "full_digest", broken)
    assert run(WeightsCheck([[file]], directory)) == ""
    assert len(messages(caplog, logging.WARNING)) == 2


def test_without_a_place_for_digests_nothing_is_read(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    check = WeightsCheck([[weights(tmp_path / "one", b"\0")]], tmp_path / "file" / "digests")
    assert run(check) == ""
    assert reads == []
    (text,) = messages(caplog, logging.INFO)
    assert "are not kept in" in text
    assert not messages(caplog, logging.WARNING)


def test_damaged_files_of_the_cache_count_as_absent(tmp_path: Path, directory: Path, reads: list[str]) -> None:
    file = weights(tmp_path / "one", b"\0")
    assert run(WeightsCheck([[file]], directory)) == ""
    for damage in ("", "[]", '{"digest": 7}', "\x00"):
        for kept in directory.glob("*.json"):
            kept.write_text(damage)
        assert run(WeightsCheck([[file]], directory)) == ""
    assert len(reads) == 5


def test_a_stopped_check_reads_no_further(tmp_path: Path, directory: Path, reads: list[str]) -> None:
    check = WeightsCheck([[weights(tmp_path / "one", b"\0")]], directory)
    check.stop()
    assert run(check) == ""
    assert reads == []


def test_a_check_that_waits_for_another_can_be_stopped(
    tmp_path: Path, directory: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_check, "_LOCK_RETRY_S", 0.01)
    check = WeightsCheck([[weights(tmp_path / "one", b"\0")]], directory)
    with DigestStore(directory).locked(check._stop):
        check.start()
        check.stop()
        assert run(check) == ""
    assert reads == []
    with weights_check._one_at_a_time:
        pass


def test_dummy_weights_need_no_check(tmp_path: Path) -> None:
    def config(load_format: str, path: Path) -> Any:
        return SimpleNamespace(
            load_config=SimpleNamespace(load_format=load_format, download_dir=None),
            model_config=SimpleNamespace(model=str(path), revision=None),
            speculative_config=None,
        )

    weights(tmp_path / "one", b"\0")
    assert WeightsCheck.of(config("dummy", tmp_path / "one")) is None
    assert WeightsCheck.of(config("auto", tmp_path)) is None
    assert WeightsCheck.of(SimpleNamespace()) is None  # type: ignore[arg-type]
    assert WeightsCheck.of(config("auto", tmp_path / "one")) is not None


def test_where_digests_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "pegaflow" / "digests"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_directory() == tmp_path / ".cache" / "pegaflow" / "digests"


def test_the_check_can_be_switched_off() -> None:
    assert ConnectorConfig().verify_weights
    assert not ConnectorConfig.from_extra({"verify_weights": False}).verify_weights
    with pytest.raises(InvalidInputError, match="verify_weights is 0; give true or false"):
        ConnectorConfig.from_extra({"verify_weights": 0})


# --- the worker -------------------------------------------------------------------------------------------------------


def worker_with(cache: Any, check: WeightsCheck, monkeypatch: pytest.MonkeyPatch) -> PegaWorker:
    tensors = {"a": torch.zeros(BLOCKS, PAGE, dtype=torch.uint8)}
    start = tensors["a"].data_ptr()
    layers = [LayerMemory("a", start, start, (Piece(0, PAGE, PAGE),), BLOCKS)]
    monkeypatch.setattr(worker_module.compat, "layer_memory", lambda *_: layers)
    monkeypatch.setattr(worker_module.compat, "memory_problem", lambda _: None)
    monkeypatch.setattr(worker_module, "namespace_of", lambda *_: {"weights": "digest"})
    monkeypatch.setattr(worker_module.WeightsCheck, "of", lambda _: check)
    worker = PegaWorker(cache, shard=0, shards=1, verify_weights=True)
    worker.register(SimpleNamespace(), SimpleNamespace(), tensors, "engine/0")
    return worker


def save_of(operation: int, request: str, block: int) -> SaveOrder:
    return SaveOrder(operation, request, bytes(32), 0, bytes([operation]) * 32, [block])


def load_of(cache: Any, operation: int, request: str, blocks: list[int]) -> LoadOrder:
    cache.leases.add(operation)
    return LoadOrder(operation, request, operation, list(range(len(blocks))), blocks)


def step_of(worker: PegaWorker, meta: PegaMetadata) -> tuple[set[str], set[str], set[str]]:
    worker.bind(meta)
    worker.start_loads(meta.loads)
    worker.start_saves()
    return worker.finished()


def test_a_worker_with_other_weights_loads_and_saves_nothing_more(
    tmp_path: Path, directory: Path, cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(WeightsCheck([[weights(tmp_path / "one", b"\0")]], directory)) == ""
    check = WeightsCheck([[weights(tmp_path / "two", b"\1")]], directory)
    with DigestStore(directory).locked(check._stop):  # Until here the check waits.
        worker = worker_with(cache, check, monkeypatch)
        before = PegaMetadata("engine/0", loads=[load_of(cache, 1, "r", [1, 2])], saves=[save_of(2, "s", 3)])
        assert step_of(worker, before) == (set(), set(), set())
        assert (len(cache.named("load")), len(cache.named("save"))) == (1, 1)
    assert run(check) != ""
    after = PegaMetadata(
        "engine/0", loads=[load_of(cache, 3, "t", [4, 5])], saves=[save_of(4, "u", 6)], finished=["s", "u"]
    )
    # What was running was cancelled; all is told as failed, and no request is left waiting.
    assert step_of(worker, after) == ({"s", "u"}, {"r", "t"}, {"r", "t"})
    assert worker.failed_blocks() == {1, 2, 4, 5}
    assert sorted(cache.named("cancel")) == [1, 2]
    assert (len(cache.named("load")), len(cache.named("save"))) == (1, 1)
    meta = worker.worker_meta()
    assert meta is not None
    assert meta.refused
    assert (meta.failed_loads, meta.saves) == ({"r", "t"}, {2: 1, 4: 1})
    # Neither does a new epoch start it again.
    again = PegaMetadata("engine/0#1", loads=[load_of(cache, 5, "v", [1])], saves=[save_of(6, "w", 2)])
    assert step_of(worker, again) == (set(), {"v"}, {"v"})
    assert len(cache.named("register")) == 1
    (error,) = messages(caplog, logging.ERROR)
    assert "worker 0 stops caching: the weights in" in error


def test_a_load_that_ends_together_with_the_verdict_counts_as_failed(
    tmp_path: Path, directory: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = WeightsCheck([[weights(tmp_path / "one", b"\0")]], directory)
    worker = worker_with(cache, check, monkeypatch)
    assert run(check) == ""
    step_of(worker, PegaMetadata("engine/0", loads=[load_of(cache, 1, "r", [1, 2])]))
    cache.end(1)
    check._verdict = "others"
    assert worker.finished() == (set(), {"r"}, {"r"})
    assert worker.failed_blocks() == {1, 2}


def test_a_worker_with_known_weights_goes_on(
    tmp_path: Path, directory: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = WeightsCheck([[weights(tmp_path / "one", b"\0")]], directory)
    worker = worker_with(cache, check, monkeypatch)
    assert run(check) == ""
    step_of(worker, PegaMetadata("engine/0", saves=[save_of(1, "r", 3)]))
    assert len(cache.named("save")) == 1
    assert worker.worker_meta() is None
    worker.close(1.0)
    assert check._stop.is_set()


def test_the_check_starts_when_the_worker_is_registered(
    tmp_path: Path, directory: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.is_there = False
    check = WeightsCheck([[weights(tmp_path / "one", b"\0")]], directory)
    worker = worker_with(cache, check, monkeypatch)
    assert check._thread is None
    cache.is_there = True
    worker._next_register = 0.0
    step_of(worker, PegaMetadata("engine/0"))
    assert check._thread is not None
    assert run(check) == ""
