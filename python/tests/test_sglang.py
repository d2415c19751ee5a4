"""The storage backend keeps the contract of SGLang's HiCache, as SGLang's own module and factory have it.

SGLang itself is not installed here: of its wheel (`make sglang`) only the interface and the factory are loaded, under
packages that are empty otherwise, and its host memory is a stand-in with the same methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

import sglang_interface
import torch

from pegaflow.errors import InvalidInputError, PegaError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pegaflow.sglang import PegaHiCache

HiCacheStorageConfig, StorageBackendFactory = sglang_interface.load()

PAGE, LAYERS, HEADS, HEAD = 16, 2, 2, 8
PAGES = 12


class HostPool:
    """What the backend uses of SGLang's host memory, for keys and values by layout `page_first`."""

    def __init__(self, layout: str = "page_first", dtype: Any = torch.float16) -> None:
        self.page_size, self.layout, self.dtype = PAGE, layout, dtype
        self.kv_buffer = torch.zeros((2, PAGES * PAGE, LAYERS, HEADS, HEAD), dtype=dtype)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        if self.layout != "page_first":
            raise ValueError(f"Unsupported layout: {self.layout}")
        size = PAGE * LAYERS * HEADS * HEAD * self.dtype.itemsize
        starts = [int(index) for index in indices.tolist()[::PAGE]]
        places = [part.data_ptr() for start in starts for part in (self.kv_buffer[0, start], self.kv_buffer[1, start])]
        return places, [size] * len(places)

    def page(self, page: int) -> Any:
        """The bytes of a page."""
        return self.kv_buffer[:, page * PAGE : (page + 1) * PAGE]

    def indices(self, *pages: int) -> Any:
        return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])

    def fill(self, seed: int) -> None:
        self.kv_buffer.copy_(torch.randn(self.kv_buffer.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def make(store_path: Path) -> Iterator[Callable[..., PegaHiCache]]:
    """Makes backends over one path as SGLang's controller does; fields of its configuration by name."""
    made: list[PegaHiCache] = []

    def backend(pool: HostPool | None = None, extra: dict[str, Any] | None = None, **fields: Any) -> PegaHiCache:
        config = HiCacheStorageConfig(
            **{
                "tp_rank": 0,
                "tp_size": 1,
                "pp_rank": 0,
                "pp_size": 1,
                "attn_cp_rank": 0,
                "attn_cp_size": 1,
                "is_mla_model": False,
                "enable_storage_metrics": False,
                "is_page_first_layout": True,
                "model_name": "org/model",
                "extra_config": {
                    "backend_name": "pegaflow",
                    "module_path": "pegaflow.sglang",
                    "class_name": "PegaHiCache",
                    "interface_v1": 1,
                    "path": str(store_path),
                    "dram": "32MiB",
                    "nvme": "128MiB",
                    **(extra or {}),
                },
                **fields,
            }
        )
        pool = pool or HostPool()
        one = StorageBackendFactory.create_backend("dynamic", config, pool)
        made.append(one)
        one.register_mem_pool_host(pool)
        return one

    yield backend
    for one in made:
        one.close()


def test_pages_by_address_come_back_byte_for_byte_also_after_a_restart(make: Any) -> None:
    pool = HostPool()
    pool.fill(1)
    expected = [pool.page(page).clone() for page in range(4)]
    backend = make(pool)
    keys = ["a", "b", "c"]
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, pool.indices(0, 1, 2)) == [True] * 3
    assert backend.batch_exists([*keys, "d", "a"]) == 3
    assert backend.exists("b")
    backend.close()
    backend = make(pool)
    assert backend.batch_exists(keys) == 3
    pool.kv_buffer.zero_()
    assert backend.batch_get_v1(["c", "nobody", "a"], pool.indices(5, 6, 7)) == [True, False, True]
    assert torch.equal(pool.page(5), expected[2])
    assert torch.equal(pool.page(7), expected[0])
    assert not pool.page(6).any(), "nothing was written where nothing was found"
    assert not pool.page(4).any()
    assert not pool.page(8).any()


def test_what_is_there_is_left_as_it_is(make: Any) -> None:
    pool = HostPool()
    pool.fill(1)
    backend = make(pool)
    backend.batch_set_v1(["a"], pool.indices(0))
    expected = pool.page(0).clone()
    pool.fill(2)
    assert backend.batch_set_v1(["a"], pool.indices(0)) == [True]
    assert backend.batch_get_v1(["a"], pool.indices(3)) == [True]
    assert torch.equal(pool.page(3), expected)


def test_pages_as_tensors_come_back_in_their_own_type(make: Any) -> None:
    backend = make(HostPool("layer_first"), {"interface_v1": 0})
    pages = [torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16) for seed in range(3)]
    assert backend.batch_set(["a", "b"], pages[:2])
    assert backend.set("c", pages[2])
    targets = [torch.zeros(64, dtype=torch.bfloat16) for _ in range(4)]
    loaded = backend.batch_get(["c", "nobody", "a", "b"], targets)
    assert loaded[1] is None
    assert [torch.equal(found, pages[at]) for found, at in ((loaded[0], 2), (loaded[2], 0), (loaded[3], 1))] == [
        True
    ] * 3
    assert loaded[0] is targets[0]
    assert backend.get("a", torch.zeros(64, dtype=torch.bfloat16)) is not None
    assert backend.batch_exists(["a", "b", "c", "d"]) == 3


def test_a_page_of_another_size_is_a_miss_and_goes(make: Any) -> None:
    backend = make(extra={"interface_v1": 0})
    assert backend.set("a", torch.zeros(64))
    assert backend.get("a", torch.zeros(65)) is None
    assert not backend.exists("a")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model_name", "org/other"),
        ("namespace", "other"),
        ("dtype", torch.bfloat16),
        ("layout", "page_first_direct"),
        ("tp_size", 2),
    ],
)
def test_pages_of_another_identity_are_not_found(make: Any, name: str, other: Any) -> None:
    extra = {"interface_v1": 0}
    backend = make(HostPool(), extra)
    backend.set("a", torch.zeros(64))
    backend.close()
    pool = HostPool(**{name: other}) if name in ("dtype", "layout") else HostPool()
    named = {name: other} if name in ("model_name", "tp_size") else {}
    backend = make(pool, extra | ({name: other} if name == "namespace" else {}), **named)
    assert not backend.exists("a")


def test_ranks_have_stores_of_their_own(make: Any) -> None:
    pools = [HostPool(), HostPool()]
    backends = [make(pool, tp_rank=rank, tp_size=2) for rank, pool in enumerate(pools)]
    for seed, (pool, backend) in enumerate(zip(pools, backends, strict=True)):
        pool.fill(seed)
        assert backend.batch_set_v1(["a"], pool.indices(0)) == [True]
    for pool, backend in zip(pools, backends, strict=True):
        assert backend.batch_get_v1(["a"], pool.indices(1)) == [True]
        assert torch.equal(pool.page(0), pool.page(1))
    assert not torch.equal(pools[0].page(0), pools[1].page(0))


def test_a_clear_holds_after_a_restart(make: Any) -> None:
    pool = HostPool()
    backend = make(pool)
    backend.batch_set_v1(["a"], pool.indices(0))
    backend.clear()
    assert not backend.exists("a")
    assert backend.batch_set_v1(["b"], pool.indices(0)) == [True]
    backend.close()
    backend = make(pool)
    assert (backend.exists("a"), backend.exists("b")) == (False, True)


def test_half_a_page_is_none(make: Any) -> None:
    pool = HostPool()
    backend = make(pool)
    backend.batch_set_v1(["a"], pool.indices(0))
    backend._engine.remove(backend._names("a", 2)[1])
    assert not backend.exists("a")
    assert backend.batch_get_v1(["a"], pool.indices(1)) == [False]
    assert backend.batch_set_v1(["a"], pool.indices(0)) == [True]
    assert backend.exists("a")


def test_a_failure_is_a_miss_and_is_counted(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool()
    backend = make(pool)

    def fails(*_: Any) -> Any:
        raise PegaError("the drive is gone")

    for method in ("put", "get", "contains"):
        monkeypatch.setattr(backend._engine, method, fails)
    assert backend.batch_set_v1(["a"], pool.indices(0)) == [False]
    assert backend.batch_get_v1(["a"], pool.indices(0)) == [False]
    assert backend.batch_exists(["a"]) == 0
    assert sum(backend.status()["failed"].values()) == 3


def test_after_the_close_there_is_nothing(make: Any) -> None:
    pool = HostPool()
    backend = make(pool)
    backend.batch_set_v1(["a"], pool.indices(0))
    backend.close()
    backend.close()
    assert backend.batch_get_v1(["a"], pool.indices(0)) == [False]
    assert backend.batch_exists(["a"]) == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"is_mla_model": True, "tp_size": 2}, "MLA"),
        ({"is_mla_model": True, "tp_size": 2, "dcp_size": 2, "logical_page_size": 2}, "context parallelism"),
        ({"should_split_heads": True}, "tp_lcm_size"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_the_start(make: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        make(**fields)


def test_pools_beside_the_kv_cache_and_layouts_without_addresses_are_refused(make: Any) -> None:
    backend = make()
    backend.register_mem_host_pool_v2(HostPool(), "kv")
    with pytest.raises(UnsupportedError, match="mamba"):
        backend.register_mem_host_pool_v2(HostPool(), "mamba")
    backend.close()
    with pytest.raises(UnsupportedError, match="page_first"):
        make(HostPool("layer_first"))


def test_one_error_names_all_that_is_wrong_with_the_settings(make: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make(extra={"path": "", "threads": 0, "colour": "blue", "namespace": "a\0b"})
    assert all(word in str(caught.value) for word in ("path", "threads", "colour", "namespace"))


def test_lists_of_different_lengths_are_refused(make: Any) -> None:
    pool = HostPool()
    backend = make(pool)
    for call in (
        lambda: backend.batch_set(["a"], []),
        lambda: backend.batch_get(["a"], None),
        lambda: backend.batch_set_v1(["a", "b"], pool.indices(0)),
    ):
        with pytest.raises(InvalidInputError):
            call()
