"""`PegaEngine`: bytes go in from anything with a buffer and come out unchanged, without a copy."""

from __future__ import annotations

import threading
from array import array
from typing import TYPE_CHECKING

import pytest

import pegaflow
from pegaflow import PegaEngine, PegaError, errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def engine(store_path: Path) -> Iterator[PegaEngine]:
    with PegaEngine(store_path, dram="32MiB", nvme=None) as engine:
        yield engine


def test_bytes_come_back_without_a_copy(engine: PegaEngine) -> None:
    engine.put("name", b"value")
    found = engine.get("name")
    assert found is not None
    assert found == b"value"
    assert found.readonly
    assert engine.get(b"name") == b"value"
    assert "name" in engine
    assert engine.get("other") is None
    assert "other" not in engine


def test_what_has_the_name_is_replaced(engine: PegaEngine) -> None:
    engine.put("name", b"old")
    old = engine.get("name")
    engine.put("name", b"newer")
    assert engine.get("name") == b"newer"
    assert old == b"old"


def test_removed_is_gone(engine: PegaEngine) -> None:
    engine.put("name", b"value")
    assert engine.remove("name")
    assert not engine.remove("name")
    assert engine.get("name") is None


def test_buffers_of_any_type_are_taken(engine: PegaEngine) -> None:
    engine.put("array", array("d", [1.5, 2.5]))
    assert engine.get("array") == array("d", [1.5, 2.5]).tobytes()
    engine.put("view", memoryview(b"0123456789")[2:5])
    assert engine.get("view") == b"234"
    with pytest.raises(BufferError, match="C-contiguous"):
        engine.put("strided", memoryview(b"0123456789")[::2])
    with pytest.raises(TypeError):
        engine.put("number", 5)


def test_numpy_arrays_go_in_and_out_without_a_copy(engine: PegaEngine) -> None:
    numpy = pytest.importorskip("numpy")
    data = numpy.arange(1000, dtype=numpy.float32).reshape(10, 100)
    engine.put("numpy", data)
    first, second = (numpy.frombuffer(engine.get("numpy"), numpy.float32) for _ in range(2))
    assert (first.reshape(10, 100) == data).all()
    assert first.ctypes.data == second.ctypes.data
    assert not first.flags.writeable


def test_torch_tensors_go_in_whatever_their_type(engine: PegaEngine) -> None:
    torch = pytest.importorskip("torch")
    data = torch.arange(64).to(torch.bfloat16).reshape(8, 8)
    for tensor in (data, data.t(), data[0, 0]):
        engine.put("torch", tensor)
        back = torch.frombuffer(bytearray(engine.get("torch")), dtype=torch.bfloat16)
        assert torch.equal(back, tensor.contiguous().reshape(-1))


def test_views_outlive_the_engine(store_path: Path) -> None:
    engine = PegaEngine(store_path, dram="32MiB", nvme=None)
    engine.put("name", b"x" * 100_000)
    view = engine.get("name")
    engine.close()
    del engine
    assert view == b"x" * 100_000


def test_a_closed_engine_says_so(store_path: Path) -> None:
    engine = PegaEngine(store_path, dram="32MiB", nvme=None)
    engine.close()
    engine.close()
    with pytest.raises(errors.ClosedError) as caught:
        engine.put("name", b"value")
    assert caught.value.kind == "closed"


def test_bad_sizes_are_refused_with_a_remedy(store_path: Path) -> None:
    with pytest.raises(ValueError, match="give at least 16 MiB") as caught:
        PegaEngine(store_path, dram="1MiB", nvme=None)
    assert isinstance(caught.value, PegaError)
    with pytest.raises(PegaError, match="'much' is not a size"):
        PegaEngine(store_path, dram="much", nvme=None)
    with pytest.raises(PegaError, match="'-1' is not a size"):
        PegaEngine(store_path, dram=-1, nvme=None)


def test_bad_keys_and_objects_are_refused(engine: PegaEngine) -> None:
    for key in ("", b"x" * 5000):
        with pytest.raises(errors.InvalidInputError, match="give 1 to 4096"):
            engine.put(key, b"value")
    with pytest.raises(errors.InvalidInputError):
        engine.put("empty", b"")
    with pytest.raises(ValueError, match="timeout of -1"):
        engine.flush(-1)


def test_statistics_have_numbers(engine: PegaEngine) -> None:
    engine.put("name", b"value")
    stats = engine.stats()
    assert stats["dram_capacity_bytes"] == 32 << 20
    assert stats["io_engine"] == "none"


def test_threads_do_not_disturb_each_other(engine: PegaEngine) -> None:
    wrong = []

    def hammer(thread: int) -> None:
        for round_ in range(50):
            value = bytes([thread, round_]) * 5000
            engine.put(f"{thread}", value)
            if engine.get(f"{thread}") != value:
                wrong.append((thread, round_))

    threads = [threading.Thread(target=hammer, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_every_kind_of_error_has_its_class() -> None:
    kinds = {cls.kind for cls in PegaError.__subclasses__()}
    assert {"invalid_input", "locked", "timeout", "poisoned", "newer_format"} <= kinds
    assert type(errors.of_kind("something_new", "text")) is pegaflow.PegaError
    assert errors.of_kind("something_new", "text").kind == "something_new"


def test_many_objects_at_once(engine: PegaEngine) -> None:
    assert engine.put_new(["a", "b"], [b"first", b"second"]) == [True, True]
    assert engine.put_new(["b", "c"], [b"other", b"third"]) == [False, True]
    into = [bytearray(5), bytearray(6), bytearray(3), bytearray(4)]
    assert engine.get_into(["a", "b", "d", "c"], into) == [True, True, False, "size"]
    assert into == [b"first", b"second", bytes(3), bytes(4)]
    assert engine.contains_each(["a", "d", "c"]) == [True, False, True]
    assert engine.get_into([], []) == []
    assert engine.put_new(["e"], [b""]) == ["invalid_input"]


def test_many_objects_need_memory_to_go_to(engine: PegaEngine) -> None:
    engine.put("a", b"value")
    with pytest.raises(BufferError, match="read-only"):
        engine.get_into(["a"], [bytes(5)])
    with pytest.raises(ValueError, match="2 names for 1 buffers"):
        engine.get_into(["a", "b"], [bytearray(5)])
    with pytest.raises(ValueError, match="1 names for 0 buffers"):
        engine.put_new(["a"], [])


def test_more_objects_than_dram_holds_come_from_the_drive(store_path: Path) -> None:
    size, count = 1 << 20, 48
    names = [f"{number}" for number in range(count)]
    with PegaEngine(store_path, dram="32MiB", nvme="128MiB") as engine:
        assert engine.put_new(names, [bytes([number]) * size for number in range(count)]) == [True] * count
    with PegaEngine(store_path, dram="16MiB", nvme="128MiB") as engine:
        into = [bytearray(size) for _ in range(2 * count)]
        # Each of them twice, side by side.
        assert engine.get_into(names + names, into) == [True] * (2 * count)
        assert all(into[place] == bytes([place % count]) * size for place in range(2 * count))
