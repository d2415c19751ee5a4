"""`PegaTier` keeps vLLM's contract of a secondary tier, with a store of its own and with a server: what was stored is
found and loaded unchanged, also after a restart; every job is reported once, and never while a copy may still run.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm.v1.kv_offload.tiering.factory", reason="no vLLM with tiering here", exc_type=ImportError)

import numpy as np
import tiering
from tiering import CHUNKS, Host, Server, StuckCache, chunk, context_of, key_of, server_binary, write_model
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from pegaflow.connector.compat import VERSION
from pegaflow.errors import InvalidInputError, LockedError, UnsupportedError
from pegaflow.vllm_tier import PegaTier
from pegaflow.vllm_tier import tier as tier_module
from pegaflow.vllm_tier.compat import storage_medium

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
# A call of vLLM's scheduler that waits for the cache takes much longer than this, even on a busy machine.
AT_ONCE_S = 0.2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture(params=["embedded", "server"])
def where(request: pytest.FixtureRequest, store_path: Path) -> Iterator[dict[str, Any]]:
    """Where the tier keeps its chunks; the same for all tiers of a test."""
    if request.param == "embedded":
        yield {"path": str(store_path), "dram": "32MiB", "nvme": "128MiB"}
        return
    if server_binary() is None:
        pytest.skip("pegaflow-server is not built; make wheel does it")
    with tempfile.TemporaryDirectory(prefix="pf-") as folder:
        server = Server(store_path, Path(folder) / "s")
        yield {"address": str(server.socket)}
        server.stop()


@pytest.fixture
def make(model: Path, where: dict[str, Any]) -> Iterator[Callable[..., Host]]:
    """Makes hosts over the same store; what is still open in the end is shut down."""
    hosts: list[Host] = []

    def made(**fields: Any) -> Host:
        host = Host(**({"model": model, "where": where} | fields))
        hosts.append(host)
        wait_reachable(host)
        return host

    yield made
    for host in hosts:
        host.tier.shutdown()


def wait_reachable(host: Host) -> None:
    """A server is connected to in the background."""
    cache: Any = host.tier._cache
    assert cache.wait_connected(10)


@pytest.fixture
def stuck(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Host, StuckCache]]:
    """A tier whose cache does not answer."""
    cache = StuckCache()
    monkeypatch.setattr(tier_module, "open_cache", lambda *_, **__: cache)
    options = {"queue_jobs": 4, "in_flight_jobs": 2, "shutdown_timeout_ms": 400, "lookup_timeout_ms": 100}
    host = Host(model, {"path": "/nowhere"}, options)
    yield host, cache
    cache.freed.set()
    host.tier.shutdown()


def tier_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "pegaflow-tier"]


# --- what is stored is found ------------------------------------------------------------------------------------------


def test_it_is_what_vllm_loads_by_its_module_path() -> None:
    entry = {"type": "PegaTier", "module_path": "pegaflow.vllm_tier"}
    assert SecondaryTierFactory.get_tier_class(entry) is PegaTier
    assert issubclass(PegaTier, SecondaryTierManager)
    assert VERSION < (0, 28) or PegaTier.cache_hit_source.name == "DISK"


def test_stored_chunks_are_found_and_loaded_unchanged_after_a_restart(make: Callable[..., Host]) -> None:
    first = make()
    result = first.store(range(8))
    assert result.success
    assert VERSION < (0, 28) or result.transfer_bytes == 8 * tiering.CHUNK_BYTES
    first.tier.shutdown()

    second = make()
    assert second.look_up(range(10)) == [HIT] * 8 + [MISS] * 2
    assert second.load(range(8), first=4).success
    assert [second.row(4 + number) for number in range(8)] == [chunk(number) for number in range(8)]
    assert second.row(3) == bytes(tiering.CHUNK_BYTES)


def test_a_chunk_is_looked_up_in_the_background(make: Callable[..., Host]) -> None:
    host = make()
    host.store([1])
    assert host.tier.lookup(key_of(1), context_of("a")) is RETRY
    assert host.tier.lookup(key_of(1), context_of("a")) is RETRY, "not asked before the step's end"
    assert host.look_up([1], "a") == [HIT]
    assert host.tier.lookup(key_of(1), context_of("b")) is HIT, "known for the sake of the other request"
    host.tier.on_request_finished(context_of("a"))
    assert host.tier.lookup(key_of(1), context_of("b")) is HIT
    host.tier.on_request_finished(context_of("b"))
    assert host.tier.lookup(key_of(1), context_of("c")) is RETRY, "forgotten with the last request that asked"
    for request in ("c", "storing"):
        host.tier.on_request_finished(context_of(request))
    assert len(host.tier._lookups) == len(host.tier._chains) == 0


def test_what_is_stored_while_a_request_runs_is_found_by_it(make: Callable[..., Host]) -> None:
    host = make()
    assert host.look_up([5], "a") == [MISS]
    host.store([5])
    assert host.tier.lookup(key_of(5), context_of("a")) is HIT


def test_a_load_of_what_is_not_there_fails_and_is_a_miss_from_then_on(make: Callable[..., Host]) -> None:
    host = make()
    host.store([0, 1])
    host.store([3], "another", first=9)
    host.look_up([0, 1, 2, 3], "a")
    keys = [key_of(number) for number in range(4)]
    host.tier._lookups.tell([keys[2]], are_there=True)  # as if it had been there then, and is gone since
    result = host.load(range(4), first=16)
    assert not result.success
    assert VERSION < (0, 28) or set(result.successful_keys) == {keys[0], keys[1], keys[3]}
    assert [host.row(16), host.row(17), host.row(19)] == [chunk(0), chunk(1), chunk(3)]
    assert host.tier.lookup(keys[2], context_of("a")) is MISS
    assert host.counts() == {"failed_loads:('cache',)": 1}


def test_chunks_of_other_groups_are_other_chunks(make: Callable[..., Host]) -> None:
    host = make(groups=2)
    assert host.store([0, 1], group=0).success
    host.store([2], "window", group=1)
    assert host.look_up([0, 1, 2], group=0) == [HIT, HIT, MISS]
    assert host.look_up([0, 1, 2], "other", group=1) == [MISS, MISS, HIT], "behind a gap, too: a sliding window"


def test_the_chain_of_a_request_goes_on_over_its_jobs(make: Callable[..., Host], monkeypatch: Any) -> None:
    host = make()
    keys = [key_of(number) for number in range(6)]
    context = context_of("long", keys)
    for first in (0, 2, 4):
        host.fill([first, first + 1], first)
        host.tier.submit_store(host.job(keys[first : first + 2], context, is_load=False, first=first))
    assert all(result.success for result in host.finished(3))
    # Without its ancestors in the store a chunk is not taken: had the chain been made of other keys, these were lost.
    assert host.look_up(range(6)) == [HIT] * 6


def test_touched_chunks_stay_what_they_are(make: Callable[..., Host]) -> None:
    host = make()
    host.store([0])
    host.tier.touch([key_of(0), key_of(1)], context_of("a"))
    host.tier.touch([], context_of("a"))
    assert host.look_up([0, 1]) == [HIT, MISS]


def test_every_job_is_reported_once(make: Callable[..., Host]) -> None:
    host = make()
    assert not host.tier.has_pending_work()
    keys = [key_of(number) for number in range(4)]
    for number, key in enumerate(keys):
        host.tier.submit_store(host.job([key], context_of(f"r{number}", [key]), is_load=False, first=number))
    assert host.tier.has_pending_work()
    assert sorted(result.job_id for result in host.finished(4)) == [1, 2, 3, 4]
    assert not host.tier.has_pending_work()
    assert list(host.tier.get_finished_jobs()) == []


def test_after_a_drain_everything_is_reported_and_nothing_runs(make: Callable[..., Host]) -> None:
    host = make()
    for job in range(20):
        keys = [key_of(100 * job + number) for number in range(CHUNKS)]
        host.tier.submit_store(host.job(keys, context_of(f"r{job}", keys), is_load=False))
    host.tier.drain_jobs()
    results = list(host.tier.get_finished_jobs())
    assert sorted(result.job_id for result in results) == list(range(1, 21))
    assert not host.tier.has_pending_work()
    assert host.store([7]).success, "it goes on afterwards"


def test_a_new_request_is_offloaded_chunk_by_chunk(make: Callable[..., Host]) -> None:
    host = make()
    assert host.tier.on_new_request(context_of("a")).policy.name in ("CHUNK_LEVEL", "BLOCK_LEVEL")
    host.tier.serve_external_requests(None)  # type: ignore[arg-type]


def test_events_tell_of_stored_chunks_where_they_are_wanted(make: Callable[..., Host]) -> None:
    host = make(events=True, options={"enable_kv_events": True, "locality": "LOCAL"})
    host.store([0, 1])
    (event,) = host.tier.take_events()
    assert event.keys == [key_of(0), key_of(1)]
    assert (event.removed, event.medium, event.locality.name) == (False, storage_medium(), "LOCAL")
    assert list(host.tier.take_events()) == []


def test_no_events_where_vllm_has_none(make: Callable[..., Host]) -> None:
    host = make(options={"enable_kv_events": True})
    host.store([0])
    assert list(host.tier.take_events()) == []


def test_the_kill_switch_leaves_everything_to_vllm(make: Callable[..., Host], tmp_path: Path) -> None:
    switch = tmp_path / "off"
    host = make(options={"kill_switch": str(switch)})
    host.store([0])
    switch.touch()
    host.tier._kill_switch._next_look = 0.0
    assert host.look_up([0]) == [MISS]
    assert not host.store([1], "later").success
    assert not host.load([0]).success


# --- whose chunks they are --------------------------------------------------------------------------------------------


def test_chunks_of_other_weights_are_never_found(make: Callable[..., Host], tmp_path: Path) -> None:
    host = make()
    host.store([0])
    host.tier.shutdown()
    for number, other in enumerate(({"weight": 2}, {"rope_theta": 7.0})):
        assert make(model=write_model(tmp_path / f"other{number}", **other)).look_up([0]) == [MISS]
    assert make(options={"namespace": "dummy weights"}).look_up([0]) == [MISS]
    assert make(model=write_model(tmp_path / "same")).look_up([0]) == [HIT], "wherever the same files lie"


def test_a_model_without_an_identity_is_refused(where: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in (empty, "no-such/model"):
        with pytest.raises(UnsupportedError, match="cannot tell the weights"):
            Host(name, where)  # type: ignore[arg-type]


def test_of_several_revisions_one_has_to_be_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pegaflow.connector.identity import UnknownIdentityError
    from pegaflow.vllm_tier import identity

    folder = model.parent / "snapshots"
    for revision in ("one", "two"):
        write_model(folder / revision)
    monkeypatch.setattr(identity, "directory_of", lambda _name, revision, _: folder / (revision or "two"))
    with pytest.raises(UnknownIdentityError, match='"revision"'):
        identity.model_directory("org/model", "")
    assert identity.model_directory("org/model", "one") == folder / "one"


# --- settings and starts ----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_the_settings_is_told_at_once(model: Path) -> None:
    wrong = {"path": "/a", "address": "/b", "queue_jobs": 0, "nvme": 1.5, "locality": "near", "pth": "/c"}
    with pytest.raises(InvalidInputError) as caught:
        Host(model, wrong)
    for part in ("'pth' is not a setting", "exclude each other", "1 to 65536", "nvme is 1.5", "LOCAL or REMOTE"):
        assert part in str(caught.value)
    with pytest.raises(InvalidInputError, match="Unix socket"):
        Host(model, {"address": "tcp://127.0.0.1:7480"})


def test_a_start_that_fails_leaves_nothing_behind(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of it fails: vLLM goes on to unmap its memory."""
    cache = StuckCache()
    cache.refuses = True
    monkeypatch.setattr(tier_module, "open_cache", lambda *_, **__: cache)
    host = Host.__new__(Host)
    with pytest.raises(ValueError, match="no"):
        host.__init__(model, {"path": "/nowhere"})  # type: ignore[misc]
    assert cache.is_closed
    assert tier_threads() == []
    host.view.release()  # raises BufferError if somebody still holds the memory
    host.rows.resize(0, refcheck=True)


def test_a_store_that_another_process_has_is_refused_and_free_afterwards(model: Path, store_path: Path) -> None:
    import subprocess
    import sys

    sizes = {"dram": "32MiB", "nvme": "128MiB"}
    script = (
        "import sys; from pegaflow import PegaEngine; engine = PegaEngine(sys.argv[1], '32MiB', '128MiB');"
        "print('open', flush=True); sys.stdin.read(); engine.close()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(store_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"open\n"
    with pytest.raises(LockedError):
        Host(model, {"path": str(store_path), **sizes})
    other.communicate(timeout=30)
    host = Host(model, {"path": str(store_path), **sizes})
    assert host.store([0]).success
    host.tier.shutdown()


def test_a_shut_down_tier_holds_nothing(make: Callable[..., Host]) -> None:
    host = make()
    host.store([0])
    host.tier.shutdown()
    host.tier.shutdown()
    assert tier_threads() == []
    assert host.tier.lookup(key_of(0), context_of("a")) is MISS
    host.end_step()
    host.tier.touch([key_of(0)], context_of("a"))
    host.tier.drain_jobs()
    assert list(host.tier.get_finished_jobs()) == []
    assert host.tier.get_stats() is None
    host.tier._primary_kv_view = memoryview(b"")
    host.view.release()
    host.rows.resize(0, refcheck=True)


# --- a cache that does not answer -------------------------------------------------------------------------------------


def test_no_call_of_the_scheduler_waits_for_the_cache(stuck: tuple[Host, StuckCache]) -> None:
    host, _ = stuck
    tier, keys = host.tier, [key_of(number) for number in range(64)]
    context = context_of("a", keys)
    slowest = 0.0

    def timed(call: Callable[[], Any]) -> Any:
        nonlocal slowest
        start = time.monotonic()
        result = call()
        slowest = max(slowest, time.monotonic() - start)
        return result

    for number, key in enumerate(keys):
        timed(lambda: tier.on_new_request(context))
        timed(lambda key=key: tier.lookup(key, context))
        timed(lambda key=key: tier.submit_store(host.job([key], context, is_load=False)))
        timed(lambda key=key, row=number % CHUNKS: tier.submit_load(host.job([key], context, is_load=True, first=row)))
        timed(lambda key=key: tier.touch([key], context))
        timed(host.end_step)
        timed(lambda: list(tier.get_finished_jobs()))
        timed(lambda: list(tier.take_events()))
        timed(tier.get_stats)
        timed(tier.has_pending_work)
    timed(lambda: tier.on_request_finished(context))
    assert slowest < AT_ONCE_S


def test_beyond_the_queue_stores_are_dropped_and_lookups_are_misses_and_both_are_counted(
    stuck: tuple[Host, StuckCache],
) -> None:
    host, cache = stuck
    keys = [key_of(number) for number in range(10)]
    context = context_of("a", keys)
    host.tier.lookup(keys[0], context)
    host.end_step()
    while host.tier._courier._questions:  # type: ignore[union-attr]
        time.sleep(0.001)  # the thread has taken it, and is stuck with it
    for key in keys:
        host.tier.submit_store(host.job([key], context, is_load=False))
    refused = list(host.tier.get_finished_jobs())
    assert [result.success for result in refused] == [False] * 6, "four fit into the queue"
    assert host.tier.lookup(keys[1], context) is RETRY
    host.end_step()
    assert host.tier.lookup(keys[1], context) is MISS
    assert host.counts() == {"dropped_stores:('queue',)": 6, "missed_lookups:('queue',)": 1}
    cache.freed.set()
    assert all(result.success for result in host.finished(4)), "what had room is stored"


def test_a_lookup_that_is_not_answered_in_time_is_a_miss(stuck: tuple[Host, StuckCache]) -> None:
    host, _ = stuck
    assert host.tier.lookup(key_of(0), context_of("a")) is RETRY
    host.end_step()
    time.sleep(0.15)
    assert host.tier.lookup(key_of(0), context_of("a")) is MISS
    assert host.counts() == {"missed_lookups:('timeout',)": 1}


def test_memory_that_copies_may_touch_is_not_given_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps its memory if a tier's shutdown raises; should it go on all the same, it cannot unmap it."""
    cache = StuckCache()
    monkeypatch.setattr(tier_module, "open_cache", lambda *_, **__: cache)
    host = Host(model, {"path": "/nowhere"}, {"shutdown_timeout_ms": 300})
    memory = host.tier._memory
    host.tier.submit_store(host.job([key_of(0)], context_of("a"), is_load=False))
    while not cache.saves:
        time.sleep(0.001)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="their memory is kept"):
        host.tier.shutdown()
    assert time.monotonic() - start < 2
    assert memory is not None
    assert memory._rows is not None
    cache.freed.set()


def test_a_drain_without_an_end_is_told(stuck: tuple[Host, StuckCache], monkeypatch: pytest.MonkeyPatch) -> None:
    host, cache = stuck
    monkeypatch.setattr(tier_module, "_DRAIN_LIMIT_S", 0.2)
    for number in range(4):
        host.tier.submit_store(host.job([key_of(number)], context_of("a"), is_load=False))
    while len(cache.saves) < 2:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="2 jobs have not ended"):
        host.tier.drain_jobs()
    assert [result.success for result in host.finished(2)] == [False, False], "those that had not begun"
    cache.freed.set()
    host.tier.drain_jobs()
    assert [result.success for result in host.tier.get_finished_jobs()] == [True, True]


# --- a server that goes and comes -------------------------------------------------------------------------------------


@pytest.mark.skipif(server_binary() is None, reason="pegaflow-server is not built; make wheel does it")
def test_without_its_server_the_tier_misses_and_goes_on_when_it_is_back(model: Path, store_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pf-") as folder:
        server = Server(store_path, Path(folder) / "s")
        host = Host(model, {"address": str(server.socket)})
        wait_reachable(host)
        assert host.store([0, 1]).success
        server.stop()
        assert host.look_up([0], "a") == [MISS]
        assert not host.store([2], "b", first=4).success
        assert not host.load([0], first=8).success
        assert {"missed_lookups:('error',)", "dropped_stores:('cache',)"} <= host.counts().keys()
        server.start()
        wait_reachable(host)
        assert host.look_up([0, 1, 2], "later") == [HIT, HIT, MISS]
        assert host.load([0, 1], first=16).success
        assert host.row(17) == chunk(1)
        host.tier.shutdown()
        server.stop()


@pytest.mark.skipif(server_binary() is None, reason="pegaflow-server is not built; make wheel does it")
def test_a_tier_starts_without_its_server(model: Path, store_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pf-") as folder:
        socket = Path(folder) / "s"
        host = Host(model, {"address": str(socket)})
        assert host.look_up([0], "a") == [MISS]
        server = Server(store_path, socket)
        wait_reachable(host)
        assert host.store([0]).success
        host.tier.shutdown()
        server.stop()


# --- inside vLLM's own manager ----------------------------------------------------------------------------------------


def region_of(spec: Any) -> Path:
    """The file of vLLM's tier in host memory."""
    return Path(f"/dev/shm/vllm_offload_{spec.config.engine_id}.mmap")


class Offloading:
    """vLLM's manager of tiers, made by its own factory from a configuration, and driven as its scheduler does."""

    def __init__(self, model: Path, entry: dict[str, Any], chunks: int = 8) -> None:
        tier = {"type": "PegaTier", "module_path": "pegaflow.vllm_tier", **entry}
        spec = tiering.spec_of(model, cpu_bytes_to_use=chunks * tiering.CHUNK_BYTES, secondary_tiers=[tier])
        self.region = region_of(spec)
        self.manager: Any = spec.get_manager()
        assert self.region.exists()
        self.rows = np.asarray(self.manager.primary_tier.get_kv_memoryview())
        (tier_made,) = self.manager.secondary_tiers
        assert isinstance(tier_made, PegaTier)
        assert tier_made._cache.wait_connected(10)  # type: ignore[union-attr]

    def compute(self, request: str, numbers: list[int]) -> None:
        """A request whose chunks are computed: they go to host memory, and from there to the tier."""
        keys = [key_of(number) for number in numbers]
        context = context_of(request, keys)
        self.manager.on_new_request(context)
        output = self.manager.prepare_store(keys, context)
        assert output is not None
        for row, key in zip(output.store_spec.block_ids, output.keys_to_store, strict=True):
            self.rows[int(row)] = np.frombuffer(chunk(int.from_bytes(key[:-4], "big")), np.int8)
        self.manager.complete_store(keys, context)
        self.manager.on_request_finished(context)
        self.settle()

    def read(self, request: str, numbers: list[int]) -> list[bytes | None]:
        """A request that asks for its chunks until vLLM knows, and reads those that it has got."""
        keys = [key_of(number) for number in numbers]
        context = context_of(request, keys)
        self.manager.on_new_request(context)
        deadline = time.monotonic() + tiering.WAIT_S
        while True:
            results = [self.manager.lookup(key, context) for key in keys]
            self.manager.on_schedule_end(tiering.ScheduleEndContext((request,), ()))
            if not {RETRY, LookupResult.HIT_PENDING} & set(results) or time.monotonic() > deadline:
                break
            time.sleep(0.001)
        found = [key for key, result in zip(keys, results, strict=True) if result is HIT]
        rows = dict(zip(found, self.manager.prepare_load(found, context).block_ids, strict=True)) if found else {}
        data = [self.rows[int(rows[key])].tobytes() if key in rows else None for key in keys]
        self.manager.complete_load(found, context)
        self.manager.on_request_finished(context)
        return data

    def settle(self) -> None:
        """Steps until nothing runs any more."""
        deadline = time.monotonic() + tiering.WAIT_S
        while self.manager.has_pending_work() and time.monotonic() < deadline:
            self.manager.on_schedule_end(tiering.ScheduleEndContext((), ()))
            time.sleep(0.001)
        assert not self.manager.has_pending_work()


def test_vllms_manager_finds_after_a_restart_what_it_had_offloaded(model: Path, where: dict[str, Any]) -> None:
    first = Offloading(model, where)
    for turn in range(4):
        first.compute(f"r{turn}", [8 * turn + place for place in range(8)])
    # Host memory holds the last eight only; the others come back from the tier.
    assert first.read("again", list(range(8))) == [chunk(number) for number in range(8)]
    first.manager.reset_cache()
    assert first.read("after a reset", [31]) == [chunk(31)]
    del first.rows
    first.manager.shutdown()

    second = Offloading(model, where)
    numbers = list(range(16, 24))
    assert second.read("restarted", [*numbers[:-1], 99]) == [*(chunk(number) for number in numbers[:-1]), None]
    if VERSION >= (0, 28):
        stats = second.manager.get_stats().reduce()
        assert stats["vllm:kv_offload_tiering_read_bytes:('1:PegaTier',)"] == 7 * tiering.CHUNK_BYTES, stats
    del second.rows
    second.manager.shutdown()
    assert not second.region.exists()


def test_a_tier_that_cannot_start_lets_vllm_clean_up(model: Path, store_path: Path) -> None:
    good = {"type": "PegaTier", "module_path": "pegaflow.vllm_tier", "path": str(store_path), "dram": "32MiB"}
    spec = tiering.spec_of(model, secondary_tiers=[{**good, "nvme": "128MiB"}, {**good, "nvme": "1KiB"}])
    with pytest.raises(ValueError, match="at least 64 MiB"):
        spec.get_manager()
    # vLLM 0.26 leaves behind what it had made, tiers and memory.
    assert VERSION < (0, 28) or (tier_threads() == [] and not region_of(spec).exists())


def test_its_metrics_are_declared_as_vllm_wants_them() -> None:
    definitions = PegaTier.build_metric_definitions({})
    assert all(name.startswith("vllm:kv_offload_pegaflow_") for name in definitions)
    assert all(definition.labelnames == ("reason",) for definition in definitions.values())
