"""The scheduler's side: which blocks are found, which are to be loaded and which are final and may be saved.

It sees requests through vLLM's hooks, computes their keys in Rust, looks them up, and puts orders for the workers into
each step's metadata. It never touches a block.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pegaflow import _native
from pegaflow.connector import compat
from pegaflow.connector.events import announced_blocks
from pegaflow.connector.identity import LoraDigests
from pegaflow.connector.metadata import PLACE_BYTES, LoadOrder, PegaMetadata, PegaWorkerMetadata, SaveOrder
from pegaflow.connector.metrics import PegaStats
from pegaflow.connector.prefill import PrefillTimes
from pegaflow.errors import PegaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from pegaflow.connector.config import ConnectorConfig, KillSwitch
    from pegaflow.connector.events import Announced, BlockEvents
    from pegaflow.connector.port import CachePort

logger = logging.getLogger("vllm.pegaflow")

_KEY = _native.KEY_BYTES
_ROOT = bytes(_KEY)
_GROUP = 0
_KEYS_PER_LOOKUP_MAX = 65_536
_BLOCKS_PER_SAVE_MAX = 4_096
# vLLM asks again every step while a request waits for room; the answer is kept this long.
_LOOKUP_REUSE_S = 1.0
# Requests in vLLM's queue for which the drive is read ahead, at a time; and lookups for that in one step.
_AHEAD_MAX = 8
_AHEAD_PER_STEP = 2
# A request is held back only if its blocks are expected in DRAM so soon: about a step, which a load out of DRAM saves.
_HOLD_BACK_S = 0.02
# What one engine has computed for another: asked for, and told, in a request's parameters for KV transfer.
_HANDOFF = "pegaflow_handoff"
_HANDOFF_TOKENS = "pegaflow_tokens"
# Who waits for such blocks looks again so often. Each look is one of vLLM's steps.
_HANDOFF_LOOK_S = 0.005
# Keys of a prompt's blocks, for a router that asks servers where they are: asked for, and told, in the same place.
_KEYS = "pegaflow_keys"
_KEYS_TOLD_MAX = 32
# Workers copy from the arena only while the lease holds, with a margin; this leaves room for the slowest step.
_PLACED_LEASE_S = 60.0


@dataclass
class Found:
    """The answer to one lookup."""

    asked: tuple[int, bool]
    """How many blocks were asked for, and whether a lease was."""
    hit_blocks: int
    dram_blocks: int
    lease: int | None
    deadline: float = 0.0
    """When the lease ends."""
    arena: bytes | None = None
    """The arena that has all blocks found, if every worker can copy out of it."""
    places: bytes = b""
    """Where they lie in it, shard after shard."""
    is_sync: bool = False
    """Whether vLLM was told that the request need not wait for its load."""
    local_blocks: int = 0
    """Blocks that vLLM has itself; the load starts after them."""
    ready_at: float | None = None
    """When what is being fetched from the drive is expected to be in DRAM."""
    reuse_until: float = 0.0
    is_error: bool = False
    """The cache could not be asked."""


@dataclass
class Tracked:
    """What is known of one live request."""

    request: Request
    tag: int
    tenant: str | None
    """On whose behalf it is computed."""
    chain: _native.KeyChain = field(default_factory=_native.KeyChain)
    keys: bytearray = field(default_factory=bytearray)
    mm_index: int = 0
    is_cacheable: bool = True
    block_ids: list[int] = field(default_factory=list)
    stored_blocks: int = 0
    """Blocks from the first on that are in the cache, or on their way."""
    found: Found | None = None
    loading: int | None = None
    """The load in flight."""
    loaded_from: tuple[int, int] = (0, 0)
    """Blocks of the last load, by tier: DRAM, NVMe."""
    has_failed_load: bool = False
    held_back_since: float | None = None
    """When vLLM was first told to ask again."""
    handoff_since: float | None = None
    """When it was first held back for blocks of another engine."""
    decision: int = 0
    """The last decision whether to load what was found."""
    load_share: float = 0.0
    """The load of the GPU when it was looked up last."""
    saving: set[int] = field(default_factory=set)
    """Saves in flight."""
    has_dropped_save: bool = False
    """A block of it was not taken: those after it would have no ancestor."""
    preemptions: int = 0

    @property
    def request_id(self) -> str:
        """vLLM's name for it."""
        return str(self.request.request_id)


class PegaScheduler:
    """The scheduler's side of the connector."""

    def __init__(
        self,
        config: ConnectorConfig,
        cache: CachePort,
        instance: str,
        block_size: int,
        block_bytes: int,
        workers: int,
        kill_switch: KillSwitch,
        clock: Callable[[], float] = time.monotonic,
        step_tokens_max: int = 8192,
        events: BlockEvents | None = None,
    ) -> None:
        self._config = config
        self._cache = cache
        self._base_instance = instance
        self._instance = instance
        self._block_size = block_size
        self._block_bytes = block_bytes
        """Of one block in one worker: what each loads, all at once."""
        self._workers = workers
        self._kill_switch = kill_switch
        self._clock = clock
        self._tracked: dict[str, Tracked] = {}
        self._tags = itertools.count(1)
        self._operations = itertools.count(1)
        self._loras = LoraDigests()
        self._meta = PegaMetadata(instance)
        # Saves in flight: the workers that have not reported yet, and the request.
        self._waiting_for: dict[int, int] = {}
        self._saver: dict[int, str] = {}
        self._arenas: Counter[bytes] = Counter()
        """How many workers can copy out of an arena themselves."""
        self._computing: set[str] = set()
        """Requests that were scheduled and are not over: steps do their work."""
        self._block_pool: Any = None
        """vLLM's own cache, if it is known."""
        self._sync_bytes = 0
        """Bytes that every worker loads synchronously in the step being planned."""
        self._refused = ""
        self._warned: set[str] = set()
        self._prefills = PrefillTimes(step_tokens_max)
        self._arrived: dict[str, Request] = {}
        """Requests in vLLM's queue that were not looked up yet, in order."""
        self._ahead: set[str] = set()
        """Those that were, and hold a lease that vLLM has not asked for yet."""
        self._unasked: set[str] = set()
        """All that have arrived and that vLLM has not asked for yet."""
        self.stats = PegaStats()
        self._events = events
        """Tells routers outside what is in the cache, if vLLM publishes KV events."""
        self._saving: dict[int, list[Announced]] = {}
        """What saves in flight are to make known."""
        if events is not None:
            events.start()

    def bind_block_pool(self, block_pool: Any) -> None:
        """Makes vLLM's own cache known."""
        self._block_pool = block_pool

    # --- a request arrives --------------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A request has arrived. If it has to wait, what of it is on the drive is fetched meanwhile.

        A request that finds nobody before it is scheduled, and looked up, at once: it is not looked up twice. The
        others are looked up here with the lease that they will ask for, so whoever is scheduled soon has its answer
        already.
        """
        if self._config.prefetch == "off":
            return
        has_to_wait = bool(self._computing or self._unasked)
        self._unasked.add(request.request_id)
        if has_to_wait:
            self._arrived[request.request_id] = request
            self._look_ahead()

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed_tokens` can be loaded, and whether the request has to wait for it in vLLM's
        queue; `None` if the answer will be better in a moment. May be asked any number of times; the last answer
        counts.
        """
        tracked = self._track(request)
        self._forget_arrival(request.request_id)
        blocks = self._blocks_to_find(tracked)
        if not blocks:
            self._forget_found(tracked)
            return 0, False
        local = computed_tokens // self._block_size
        may_load = computed_tokens % self._block_size == 0 and self._may_load(tracked, blocks, local)
        # Also where nothing may be loaded: what is there need not be saved again.
        found = self._look_up(tracked, blocks, local, with_lease=may_load)
        found.local_blocks = local
        if self._is_held_back(tracked, found) or (may_load and self._awaits_handoff(tracked, found, blocks)):
            return None, False
        # At least one token is left for the model to compute: it has to answer with the next one. A block that would
        # be loaded for that token's sake only is not worth a load, but after others it saves computing a block.
        needed = min(found.hit_blocks, (request.num_tokens - 1) // self._block_size)
        if not may_load or found.lease is None or needed - local < self._config.min_blocks:
            return 0, False
        found.is_sync = self._may_be_sync(found, found.hit_blocks - local)
        tokens = min(found.hit_blocks * self._block_size, request.num_tokens - 1)
        return tokens - computed_tokens, not found.is_sync

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """vLLM has blocks for the request and decided how much of what was found it takes."""
        tracked = self._track(request)
        found, tracked.found = tracked.found, None
        # The last block of a prompt that was found whole counts although its last token is computed.
        wanted = -(-external_tokens // self._block_size)
        if found is None:
            return
        if wanted == 0 or found.lease is None:
            self._release(found.lease)
            return
        first, last = found.local_blocks, found.local_blocks + wanted
        order = LoadOrder(
            operation=next(self._operations),
            request_id=request.request_id,
            lease=found.lease,
            indices=list(range(first, last)),
            blocks=blocks.get_block_ids()[_GROUP][first:last],
            deadline=found.deadline,
            is_sync=found.is_sync,
        )
        if found.arena is not None:
            order.arena = found.arena
            starts = [shard * found.hit_blocks + first for shard in range(self._workers)]
            order.places = b"".join(
                found.places[start * PLACE_BYTES : (start + wanted) * PLACE_BYTES] for start in starts
            )
        self._meta.loads.append(order)
        if order.is_sync:
            # It runs at once, and its load is never reported: the stream orders all that follows after it.
            self._sync_bytes += wanted * self._block_bytes
        else:
            tracked.loading = order.operation
        tracked.stored_blocks = max(tracked.stored_blocks, found.hit_blocks)
        if self._events is not None:
            # An earlier run may have saved them.
            keys = bytes(tracked.keys[: last * _KEY])
            self._events.announce(announced_blocks(request, keys, 0, self._block_size, tracked.tenant))
        # Which blocks are on the drive is not told: the later ones of a chain leave DRAM first.
        nvme = min(wanted, found.hit_blocks - found.dram_blocks)
        tracked.loaded_from = (wanted - nvme, nvme)

    def hit_sources(self, request: Request, external_tokens: int) -> dict[Any, int]:
        """From which tiers the tokens of the load just planned come."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or sum(tracked.loaded_from) != -(-external_tokens // self._block_size):
            return {}
        nvme = min(tracked.loaded_from[1] * self._block_size, external_tokens)
        return compat.hit_sources(external_tokens - nvme, nvme)

    def _blocks_to_find(self, tracked: Tracked) -> int:
        """How many blocks of a request may be looked up; their keys are known then."""
        blocks = min(int(tracked.request.num_tokens) // self._block_size, _KEYS_PER_LOOKUP_MAX)
        if not blocks or not tracked.is_cacheable or not self._is_on() or not self._extend_keys(tracked, blocks):
            return 0
        return blocks

    def _may_load(self, tracked: Tracked, blocks: int, local: int) -> bool:
        return (
            blocks > local
            and self._config.load_policy != "never"
            and not tracked.has_failed_load
            and compat.may_read_cache(tracked.request)
        )

    def _look_ahead(self) -> None:
        """Looks up requests that wait, as many as may be at a time."""
        for _ in range(_AHEAD_PER_STEP):
            if not self._arrived or len(self._ahead) >= _AHEAD_MAX:
                return
            request_id = next(iter(self._arrived))
            tracked = self._track(self._arrived.pop(request_id))
            blocks = self._blocks_to_find(tracked)
            local = compat.local_blocks(tracked.request, self._block_pool)
            if blocks and self._may_load(tracked, blocks, local):
                found = self._look_up(tracked, blocks, local, with_lease=True, is_ahead=True)
                self.stats.count("ahead_lookups")
                if found.lease is not None:
                    self._ahead.add(request_id)

    def _forget_arrival(self, request_id: str) -> None:
        """The request is not waiting to be looked at any more."""
        self._arrived.pop(request_id, None)
        self._ahead.discard(request_id)
        self._unasked.discard(request_id)

    def _is_held_back(self, tracked: Tracked, found: Found) -> bool:
        """Whether the request is to wait a moment longer, because its blocks are about to be in DRAM.

        From there they are loaded in the step itself, without a step or two in between. Only if every worker could do
        so, if that is expected within about a step, and for a bounded time in all. What takes longer is read by the
        load itself, which goes on while other requests are computed.
        """
        now = self._clock()
        if found.ready_at is None or found.lease is None or now >= found.ready_at:
            return False
        if not self._config.sync_loads or self._common_arena() is None or found.ready_at - now > _HOLD_BACK_S:
            return False
        if tracked.held_back_since is None:
            tracked.held_back_since = now
            self.stats.count("held_back_requests")
        return now - tracked.held_back_since < self._config.prefetch_wait_ms / 1000

    def _awaits_handoff(self, tracked: Tracked, found: Found, blocks: int) -> bool:
        """Whether another engine has computed blocks of the request that are not in the cache yet.

        Its answer comes before its last copies have ended. For a bounded time only.
        """
        tokens = _transfer_parameter(tracked.request, _HANDOFF_TOKENS)
        if not isinstance(tokens, int) or isinstance(tokens, bool) or found.is_error:
            return False
        if found.hit_blocks >= min(tokens // self._block_size, blocks):
            return False
        now = self._clock()
        if tracked.handoff_since is None:
            tracked.handoff_since = now
            self.stats.count("handoffs:waited")
        if now - tracked.handoff_since >= self._config.handoff_wait_ms / 1000:
            self.stats.count("handoffs:late")
            return False
        found.reuse_until = min(found.reuse_until, now + _HANDOFF_LOOK_S)
        return True

    # --- a step is planned --------------------------------------------------------------------------------------------

    def build_meta(self, output: SchedulerOutput) -> PegaMetadata:
        """This step's orders."""
        now = self._clock()
        self._note_preemptions(compat.preempted_requests(output))
        if not self._computing:
            self._prefills.idle()
        self._prefills.step_planned(output.total_num_scheduled_tokens, now)
        for new in output.scheduled_new_reqs:
            if tracked := self._tracked.get(new.req_id):
                tracked.block_ids = list(new.block_ids[_GROUP])
                prompt = tracked.request.num_prompt_tokens
                self._prefills.started(
                    new.req_id, new.num_computed_tokens, prompt, tracked.decision, tracked.load_share, now
                )
                self._save_final(tracked, new.num_computed_tokens + output.num_scheduled_tokens[new.req_id])
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            if tracked := self._tracked.get(request_id):
                if request_id in cached.resumed_req_ids:
                    tracked.block_ids = []
                if new_ids := cached.new_block_ids[index]:
                    tracked.block_ids += new_ids[_GROUP]
                self._save_final(tracked, cached.num_computed_tokens[index] + output.num_scheduled_tokens[request_id])
        self._look_ahead()
        self._computing |= output.num_scheduled_tokens.keys()
        self._computing -= output.finished_req_ids
        self._sync_bytes = 0
        meta, self._meta = self._meta, PegaMetadata(self._instance)
        return meta

    def ended(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request is over. Whether its blocks must be kept, and, where that was asked for, how many tokens of its
        prompt another engine finds in the cache, now or in a moment, and keys of their blocks.
        """
        tracked = self._tracked.get(request.request_id)
        keeps_blocks = self.finished(request, block_ids)
        if tracked is None or tracked.has_dropped_save or tracked.loading is not None or not tracked.is_cacheable:
            return keeps_blocks, None
        blocks = min(tracked.stored_blocks, int(request.num_prompt_tokens) // self._block_size)
        told: dict[str, Any] = {}
        if _transfer_parameter(request, _HANDOFF) is True:
            told[_HANDOFF_TOKENS] = blocks * self._block_size
        if blocks and _transfer_parameter(request, _KEYS) is True:
            told[_KEYS] = self._keys_of(tracked, blocks)
        return keeps_blocks, told or None

    def _keys_of(self, tracked: Tracked, blocks: int) -> dict[str, Any]:
        """Keys among the first `blocks` blocks: the last one, and others evenly before it; with where each ends."""
        count = min(blocks, _KEYS_TOLD_MAX)
        depths = [blocks * number // count for number in range(1, count + 1)]
        return {
            "instance": self._instance,
            "tenant": tracked.tenant,
            "prompt_tokens": int(tracked.request.num_prompt_tokens),
            "tokens": [depth * self._block_size for depth in depths],
            "keys": [bytes(tracked.keys[(depth - 1) * _KEY : depth * _KEY]).hex() for depth in depths],
        }

    def finished(self, request: Request, block_ids: list[int]) -> bool:
        """The request is over. Whether its blocks must be kept until the workers report that its saves have ended."""
        self._computing.discard(request.request_id)
        self._end_prefill(request)
        self._forget_arrival(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        self._forget_found(tracked)
        self._withdraw_sync_load(request.request_id)
        if tracked.preemptions != request.num_preemptions:
            # Preempted since the last step: its blocks are free already.
            self._meta.preempted.append(request.request_id)
            return False
        if tracked.loading is not None:
            # vLLM keeps the blocks of a request that it finds loading until the load is reported.
            self._meta.cancelled.append(tracked.loading)
            return False
        tracked.block_ids = list(block_ids)
        # The last token has been sampled but not computed; with asynchronous scheduling a step that computes it may
        # be in flight.
        self._save_final(tracked, min(request.num_computed_tokens, request.num_tokens - 1))
        if not tracked.saving:
            return False
        self._meta.finished.append(request.request_id)
        return True

    # --- the workers report -------------------------------------------------------------------------------------------

    def update(self, output: KVConnectorOutput) -> None:
        """Takes in what the workers report, after a step."""
        self._time_step()
        for request_id in output.finished_recving or ():
            if tracked := self._tracked.get(request_id):
                tracked.loading = None
        report = output.kv_connector_worker_meta
        if not isinstance(report, PegaWorkerMetadata):
            return
        if report.refused and not self._refused:
            self._refused = report.refused
            self._take_back()
            logger.warning("PegaFlow: nothing is cached: %s", report.refused)
        self._arenas.update(report.arenas)
        for request_id in report.failed_loads:
            if tracked := self._tracked.get(request_id):
                # It is computed now. Asking again could fail again, for ever.
                tracked.has_failed_load = True
                tracked.stored_blocks = 0
        for operation in report.dropped:
            if tracked := self._tracked.get(self._saver.get(operation, "")):
                tracked.has_dropped_save = True
        for operation, ended in report.saves.items():
            left = self._waiting_for.get(operation, 0) - ended
            if left > 0:
                self._waiting_for[operation] = left
                continue
            self._waiting_for.pop(operation, None)
            if self._events is not None:
                self._events.announce(self._saving.pop(operation, ()))
            if tracked := self._tracked.get(self._saver.pop(operation, "")):
                tracked.saving.discard(operation)

    def take_events(self) -> Iterable[Any]:
        """vLLM's KV events of what has changed."""
        return self._events.take() if self._events is not None else ()

    def reset(self) -> None:
        """Starts a new epoch: nothing that was saved before is found, because the weights may be others now.

        The name of the epoch is random: nobody knows the identity of weights that were changed in memory.
        """
        self._instance = f"{self._base_instance}#{uuid.uuid4().hex}"
        self._take_back()
        self._meta.instance = self._instance
        if self._events is not None:
            self._saving.clear()
            self._events.reset(self._instance)
        logger.info("PegaFlow: the cache was reset; a new epoch starts")

    def close(self, timeout: float) -> None:
        """Ends the session."""
        if self._events is not None:
            self._events.close(timeout)
        self._cache.close(timeout)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _time_step(self) -> None:
        """A step has ended: some requests have their first token."""
        for request_id in self._prefills.waiting():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                self._prefills.dropped(request_id)
            elif tracked.request.num_output_tokens:
                self._end_prefill(tracked.request)
        self._prefills.step_ended(self._clock())

    def _end_prefill(self, request: Request) -> None:
        """The request has its first token, or never will."""
        if request.num_output_tokens:
            self._prefills.first_token(request.request_id, self._clock())
        else:
            self._prefills.dropped(request.request_id)

    def _is_on(self) -> bool:
        return not self._refused and not self._kill_switch.is_off(self._clock())

    def _take_back(self) -> None:
        """Nothing that was found or is being loaded may be used, and nothing that is final now may be saved."""
        for tracked in self._tracked.values():
            self._forget_found(tracked)
            tracked.stored_blocks = 0
            if tracked.loading is not None:
                self._meta.cancelled.append(tracked.loading)
        for order in self._meta.saves:
            self._drop(order)
        self._meta.saves.clear()

    def _track(self, request: Request) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            has_tenant = request.cache_salt and self._config.tenants == "cache_salt"
            tenant = _native.tenant_of_cache_salt(request.cache_salt) if has_tenant else None
            tracked = Tracked(request, next(self._tags), tenant, preemptions=request.num_preemptions)
            if compat.is_resumable(request):
                self._do_not_cache(tracked, "a streaming session, whose tokens may change")
            self._tracked[request.request_id] = tracked
        return tracked

    def _do_not_cache(self, tracked: Tracked, why: str) -> None:
        tracked.is_cacheable = False
        self.stats.count("uncacheable_requests")
        if why not in self._warned:
            self._warned.add(why)
            logger.warning("PegaFlow: requests with %s are not cached", why)

    def _extend_keys(self, tracked: Tracked, blocks: int) -> bool:
        """Computes the keys of the first `blocks` blocks; whether the request can be cached."""
        known = len(tracked.keys) // _KEY
        if blocks <= known:
            return True
        request, size = tracked.request, self._block_size
        extras: list[bytes] = []
        if request.lora_request is not None or request.mm_features or request.cache_salt or _has_embeddings(request):
            lora = self._loras.digest_of(request.lora_request) if request.lora_request is not None else None
            try:
                for block in range(known, blocks):
                    extra, tracked.mm_index = compat.extra_of_block(
                        request, block * size, (block + 1) * size, tracked.mm_index, lora
                    )
                    extras.append(extra)
            except compat.UncacheableError as error:
                self._do_not_cache(tracked, str(error))
                return False
        tokens = request.all_token_ids[known * size : blocks * size]
        tracked.keys += tracked.chain.extend(list(tokens), size, extras or None)
        return True

    def _common_arena(self) -> bytes | None:
        """The arena that all workers can copy out of."""
        return next((arena for arena, workers in self._arenas.items() if workers >= self._workers), None)

    def _may_be_sync(self, found: Found, blocks: int) -> bool:
        """Whether `blocks` blocks of what was found may be loaded within the step that is planned.

        vLLM cannot take such a promise back, so only blocks that lie in DRAM, at places that the workers reach. The
        copy holds up every request of the step: any amount if there is no other, else as much as is allowed for a step.
        """
        if not self._config.sync_loads or found.arena is None:
            return False
        is_alone = not self._computing and not self._sync_bytes
        return is_alone or self._sync_bytes + blocks * self._block_bytes <= self._config.sync_load_bytes_max

    def _withdraw_sync_load(self, request_id: str) -> None:
        """Takes back a synchronous load that no worker has seen: its request is over."""
        for order in [order for order in self._meta.loads if order.is_sync and order.request_id == request_id]:
            self._meta.loads.remove(order)
            self._release(order.lease)

    def _look_up(self, tracked: Tracked, blocks: int, local: int, *, with_lease: bool, is_ahead: bool = False) -> Found:
        now = self._clock()
        asked = (blocks, with_lease)
        if tracked.found is not None and tracked.found.asked == asked and now < tracked.found.reuse_until:
            return tracked.found
        first_time, before = tracked.found is None, tracked.found
        # A lookup takes the place of the lease of the one before; giving that back would end what is fetched for it.
        if before is not None and not with_lease:
            self._release(before.lease)
        # Who is asked for once more waits in vLLM's queue. The first time it most likely does not.
        prefetch = with_lease and self._config.prefetch != "off" and (is_ahead or not first_time)
        arena = self._common_arena() if with_lease else None
        lease_s = self._config.lease_ms / 1000 if with_lease else 0.0
        if arena is not None:
            lease_s = max(lease_s, _PLACED_LEASE_S)
        found = Found(asked, 0, 0, None, deadline=now + lease_s)
        result, fetch_s = "error", 0.0
        policy = None if self._config.load_policy == "auto" else self._config.load_policy
        load = tracked.load_share = self._prefills.load_share(now)
        question = (tracked.request_id, local, self._block_size, load, policy, self._prefills.take())
        try:
            found.hit_blocks, found.dram_blocks, found.lease, there, places, tracked.decision, fetch_s = (
                self._cache.lookup(
                    self._instance,
                    _GROUP,
                    bytes(tracked.keys[: blocks * _KEY]),
                    lease_s,
                    tracked.tag,
                    places=arena is not None,
                    question=question,
                    prefetch=prefetch,
                    tenant=tracked.tenant,
                )
            )
            result = "hit" if found.hit_blocks else "miss"
            if there is not None and there == arena and len(places) == found.hit_blocks * self._workers * PLACE_BYTES:
                found.arena, found.places = there, places
        except PegaError as error:
            # A cache that cannot be asked is a miss; vLLM goes on without it.
            logger.debug("PegaFlow: lookup for %s: %s", tracked.request_id, error)
            found.is_error = True
        if before is not None and with_lease and found.lease is None:
            self._release(before.lease)
        found.reuse_until = now + min(_LOOKUP_REUSE_S, self._config.lease_ms / 2000)
        if fetch_s > 0.0:
            found.ready_at = now + fetch_s
            # When it has come the answer is another one.
            found.reuse_until = min(found.reuse_until, found.ready_at)
        tracked.found = found
        # After a failed load what is found is not what can be read: it is offered again, and what is sound is kept.
        # When prewarming, what was found may lie in DRAM only: the cache is told once more that it is to be kept.
        is_offered_again = tracked.has_failed_load or self._config.prewarm
        tracked.stored_blocks = 0 if is_offered_again else found.hit_blocks
        if first_time:
            self.stats.count(f"lookups:{result}")
            self.stats.count("lookup_blocks", blocks)
            self.stats.count("hit_blocks", found.hit_blocks)
            if tracked.decision:
                self.stats.count("decisions:load" if found.lease is not None else "decisions:recompute")
        return found

    def _forget_found(self, tracked: Tracked) -> None:
        if tracked.found is not None:
            self._release(tracked.found.lease)
            tracked.found = None

    def _release(self, lease: int | None) -> None:
        if lease is None:
            return
        try:
            self._cache.release(lease)
        except PegaError as error:
            logger.debug("PegaFlow: a lease was not released and runs out by itself: %s", error)

    def _save_final(self, tracked: Tracked, computed_tokens: int) -> None:
        """Orders the save of blocks that are full and final once `computed_tokens` tokens are computed.

        Only tokens that are known count: not the placeholders of asynchronous scheduling, whose value the scheduler
        does not have yet, and not drafts, which may be rejected and computed anew.
        """
        final_tokens = min(computed_tokens, tracked.request.num_tokens)
        if not self._config.save_decode:
            final_tokens = min(final_tokens, tracked.request.num_prompt_tokens)
        last = min(final_tokens // self._block_size, len(tracked.block_ids))
        first = tracked.stored_blocks
        if last <= first or not tracked.is_cacheable or tracked.has_dropped_save or not self._is_on():
            return
        if not self._extend_keys(tracked, last):
            return
        for start in range(first, last, _BLOCKS_PER_SAVE_MAX):
            end = min(last, start + _BLOCKS_PER_SAVE_MAX)
            order = SaveOrder(
                operation=next(self._operations),
                request_id=tracked.request_id,
                parent=bytes(tracked.keys[(start - 1) * _KEY : start * _KEY]) if start else _ROOT,
                depth=start,
                keys=bytes(tracked.keys[start * _KEY : end * _KEY]),
                blocks=tracked.block_ids[start:end],
                tenant=tracked.tenant,
            )
            self._meta.saves.append(order)
            if self._events is not None:
                self._saving[order.operation] = announced_blocks(
                    tracked.request, order.keys, start, self._block_size, tracked.tenant
                )
            self.stats.count("offered_blocks", (end - start) * self._workers)
            tracked.saving.add(order.operation)
            self._waiting_for[order.operation] = self._workers
            self._saver[order.operation] = tracked.request_id
        tracked.stored_blocks = last

    def _note_preemptions(self, preempted: Iterable[str]) -> None:
        """The blocks of a preempted request are free; what of it is still being copied must end before the step."""
        gone = set(preempted)
        # A reset of the prefix cache preempts between steps; not every version tells of it in the step's output.
        gone |= {
            id_ for id_, tracked in self._tracked.items() if tracked.request.num_preemptions != tracked.preemptions
        }
        self._computing -= gone
        for request_id in gone:
            self._prefills.dropped(request_id)
        for request_id in gone:
            self._meta.preempted.append(request_id)
            if tracked := self._tracked.get(request_id):
                tracked.preemptions = tracked.request.num_preemptions
                tracked.block_ids = []
                tracked.stored_blocks = 0
        kept = []
        for order in self._meta.saves:
            if order.request_id in gone:
                self._drop(order)
            else:
                kept.append(order)
        self._meta.saves = kept

    def _drop(self, order: SaveOrder) -> None:
        """Takes back a save that no worker has seen."""
        self.stats.count("saved_blocks:withdrawn", len(order.blocks) * self._workers)
        self._waiting_for.pop(order.operation, None)
        self._saving.pop(order.operation, None)
        self._saver.pop(order.operation, None)
        if tracked := self._tracked.get(order.request_id):
            tracked.saving.discard(order.operation)


def _transfer_parameter(request: Request, name: str) -> Any:
    parameters = request.kv_transfer_params
    return parameters.get(name) if isinstance(parameters, dict) else None


def _has_embeddings(request: Request) -> bool:
    return request.prompt_embeds is not None
