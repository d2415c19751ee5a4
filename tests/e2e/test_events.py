"""A router's view of a real vLLM: it subscribes to the KV events, and what they say of PegaFlow's tiers holds.

The events of saved blocks carry the hashes that vLLM's own events of the same blocks carry; what a small DRAM cannot
keep is published as removed, or as moved to the drive if there is one.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import model
import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored, KVEventBatch

from engines import BLOCK_TOKENS, OfflineEngine, VllmSettings
from processes import free_port
from prompts import Prompt

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
PROMPT_BLOCKS = 60
# DRAM of the least size has room for about 320 of the blocks.
PROMPTS = 10
SEEN_SECONDS = 60.0


@dataclass
class Router:
    """A subscriber: what it believes of each block, and how it got there."""

    socket: Any
    media: dict[Any, set[str]] = field(default_factory=dict)
    described: dict[tuple[Any, str], tuple[Any, tuple[int, ...]]] = field(default_factory=dict)
    """Of each block that was stored in a medium: its parent and its tokens."""

    def listen(self) -> None:
        """Takes in what has come."""
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        while self.socket.poll(0):
            _, _, payload = self.socket.recv_multipart()
            for event in decoder.decode(payload).events:
                assert not isinstance(event, AllBlocksCleared)
                for place, block in enumerate(event.block_hashes):
                    media = self.media.setdefault(block, set())
                    if isinstance(event, BlockStored):
                        media.add(event.medium or "")
                        parent = event.block_hashes[place - 1] if place else event.parent_block_hash
                        tokens = event.token_ids[place * event.block_size : (place + 1) * event.block_size]
                        self.described[block, event.medium or ""] = (parent, tuple(tokens))
                    else:
                        media.discard(event.medium or "")

    def of_prompt(self, prompt: Prompt, medium: str) -> set[Any]:
        """The hashes of a prompt's blocks by the events of a medium, whatever came later."""
        runs = {prompt.tokens[at : at + BLOCK_TOKENS] for at in range(0, len(prompt.tokens), BLOCK_TOKENS)}
        return {block for (block, where), (_, tokens) in self.described.items() if where == medium and tokens in runs}


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    made = TARGET / "tmp" / f"events-{request.node.callspec.id}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    yield made
    shutil.rmtree(made / "store", ignore_errors=True)


def prompt(number: int, blocks: int = PROMPT_BLOCKS) -> Prompt:
    drawn = random.Random(number)
    return Prompt(f"prompt {number}", tuple(drawn.randrange(100, 500) for _ in range(blocks * BLOCK_TOKENS)), 2)


@pytest.mark.parametrize("has_drive", [False, True], ids=["dram", "drive"])
def test_a_router_sees_what_is_saved_and_what_is_evicted(folder: Path, *, has_drive: bool) -> None:
    made = (TARGET / "run" / "model").resolve()
    model.make(made)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    router = Router(socket)
    connector = {
        "kv_connector": "PegaKVConnector",
        "kv_connector_module_path": "pegaflow",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "mode": "embedded",
            "path": str(folder / "store"),
            "dram": "16MiB",
            "nvme": "256MiB" if has_drive else None,
            "load_policy": "always",
        },
    }
    bound = endpoint.replace("127.0.0.1", "*")
    settings = VllmSettings(Path(sys.executable), made, folder, connector, events_endpoint=bound, is_one_process=True)
    try:
        engine = OfflineEngine("events", settings)
        try:
            tell(router, engine, has_drive=has_drive)
        finally:
            engine.process.kill()
    finally:
        socket.close(0)
        context.term()


def tell(router: Router, engine: OfflineEngine, *, has_drive: bool) -> None:
    """Saves more than DRAM holds, and looks at what the router sees."""
    steps = iter(range(1000, 2000))

    def step_until(is_seen: Callable[[], bool]) -> bool:
        """Events go out with steps: makes vLLM do some until the router has seen something."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not is_seen() and time.monotonic() < deadline:
            engine.ask([prompt(next(steps), 1)])
            time.sleep(0.1)
            router.listen()
        return is_seen()

    first = prompt(1)
    engine.ask([first])
    assert step_until(lambda: len(router.of_prompt(first, "CPU")) == PROMPT_BLOCKS)
    saved = router.of_prompt(first, "CPU")
    assert saved == router.of_prompt(first, "GPU"), "the hashes are vLLM's own"
    for block in saved:
        assert router.described[block, "CPU"] == router.described[block, "GPU"], "so are parents and tokens"
        assert "CPU" in router.media[block]
    engine.ask([prompt(number) for number in range(2, PROMPTS + 1)])
    assert step_until(lambda: not any("CPU" in router.media[block] for block in saved))
    kept = {block for block in saved if "STORAGE" in router.media[block]}
    assert kept == (saved if has_drive else set())
