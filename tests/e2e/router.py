"""Prompts computed by one real vLLM, answered by two others, one address in front: `pegaflow-router`.

1. Plain vLLM answers chats: the reference.
2. The same chats through the router, several at a time: one engine computes the prompts, two answer; the router learns
   keys of the prompts and asks the server what it holds of them. In the middle one of those that answer gets SIGKILL,
   later the one that computes prompts. Every answer must be the reference's.
3. A client goes in the middle of a long answer: engine, router and server have nothing left of it.

Ends with one line of JSON. Exit code 0: everything held; 1: something did not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines import HttpEngine, VllmSettings
from processes import HttpProcess, StoryError, free_port, kill_at_once, wait_until
from store_server import ServerSettings, StoreServer

AT_ONCE = 6
FAMILIES = 5
ANSWER_SECONDS = 120.0
ANSWER_TOKENS = 40
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@dataclass(frozen=True)
class Chat:
    """One request: its messages and how long the answer is."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int = ANSWER_TOKENS


def chats(seed: int, count: int) -> list[Chat]:
    """Chats of a few families with a long instruction in common, each with a question of its own."""
    source = random.Random(seed)

    def text(length: int) -> str:
        return "".join(chr(source.randrange(33, 127)) for _ in range(length))

    systems = [text(700) for _ in range(FAMILIES)]
    return [
        Chat(({"role": "system", "content": systems[number % FAMILIES]}, {"role": "user", "content": text(300)}))
        for number in range(count)
    ]


@contextmanager
def streaming(port: int, model: str, chat: Chat) -> Iterator[http.client.HTTPResponse]:
    """A streamed chat, bounded in time."""
    body = {
        "model": model,
        "messages": chat.messages,
        "max_tokens": chat.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    overdue = threading.Timer(ANSWER_SECONDS, connection.close)
    overdue.start()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise StoryError(f"a chat answered {response.status}: {response.read(2000)!r}")
        yield response
    finally:
        overdue.cancel()
        connection.close()


def ask(port: int, model: str, chat: Chat) -> str:
    """The whole text of an answer.

    Raises:
        StoryError: it broke off, or said that something is wrong.
    """
    text, is_done = "", False
    with streaming(port, model, chat) as response:
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                is_done = True
            elif data:
                event = json.loads(data)
                if "error" in event:
                    raise StoryError(f"an answer broke off: {event['error']}")
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if not is_done:
        raise StoryError("an answer ended without its last event")
    return text


class Router:
    """A running `pegaflow-router`; `__init__` returns when an engine that answers is up."""

    def __init__(
        self, binary: Path, server: ServerSettings, prefill: Sequence[HttpEngine], decode: Sequence[HttpEngine]
    ) -> None:
        self.port = free_port()
        command: list[str | Path] = [binary, "--listen", f"127.0.0.1:{self.port}", "--prefill-from", "256"]
        for role, engines in (("--prefill", prefill), ("--decode", decode)):
            for engine in engines:
                command += [role, f"http://127.0.0.1:{engine.port}={server.socket.absolute()}"]
        self.process = HttpProcess(
            "pegaflow-router",
            command,
            server.logs / "router.log",
            {},
            port=self.port,
            ready_path="/health",
            start_seconds=30,
        )

    def metric(self, name: str) -> float:
        """The sum of a metric over what its name begins with."""
        found = re.findall(rf"^{re.escape(name)}\S* (\S+)$", self.process.metrics(), re.MULTILINE)
        return sum(float(value) for value in found)

    def questions(self, result: str) -> float:
        """How many questions to the server have ended so."""
        line = rf'^pegaflow_router_questions_total\{{[^}}]*result="{result}"[^}}]*\}} (\S+)$'
        found = re.findall(line, self.process.metrics(), re.MULTILINE)
        return sum(float(value) for value in found)


def answers(settings: VllmSettings, asked: Sequence[Chat]) -> list[str]:
    """What plain vLLM says."""
    engine = HttpEngine("plain", settings)
    try:
        with ThreadPoolExecutor(AT_ONCE) as senders:
            return list(senders.map(lambda chat: ask(engine.port, str(settings.model), chat), asked))
    finally:
        engine.process.kill()


@dataclass
class Stage:
    """Everything that runs."""

    server: StoreServer
    prefill: HttpEngine
    decode: list[HttpEngine]
    router: Router
    model: str


def with_kills(stage: Stage, asked: Sequence[Chat]) -> tuple[list[str], dict[str, Any]]:
    """All chats through the router; an engine is killed after each third of them has begun. Answers, and figures."""
    begun, lock = [0], threading.Lock()
    kills = {len(asked) // 3: stage.decode[0], 2 * len(asked) // 3: stage.prefill}
    first_third: Counter[str] = Counter()

    def one(chat: Chat) -> str:
        with lock:
            begun[0] += 1
            victim = kills.pop(begun[0], None)
            if victim is stage.decode[0]:
                for engine in stage.decode:
                    first_third.update(engine.tokens_by_source())
        if victim is None:
            return ask(stage.router.port, stage.model, chat)
        # In the middle of others' answers, and of its own.
        killer = threading.Timer(0.2, kill_at_once, [[victim.process]])
        killer.start()
        try:
            return ask(stage.router.port, stage.model, chat)
        finally:
            killer.join()

    with ThreadPoolExecutor(AT_ONCE) as senders:
        said = list(senders.map(one, asked))
    figures = {
        "handoffs": int(stage.router.metric('pegaflow_router_handoffs_total{result="done"}')),
        "handoffs_failed": int(stage.router.metric('pegaflow_router_handoffs_total{result="failed"}')),
        "tries_failed": int(stage.router.metric("pegaflow_router_failures_total")),
        "resumed": int(stage.router.metric("pegaflow_router_resumed_total")),
        "decode_prompt_tokens_before_kills": first_third,
        "learned": int(stage.router.metric("pegaflow_router_learned_total")),
        "asked": int(stage.router.metric("pegaflow_router_questions_total")),
        "not_answered": int(stage.router.questions("failed") + stage.router.questions("skipped")),
    }
    return said, figures


def client_that_goes(stage: Stage) -> None:
    """A client leaves in the middle of a long answer.

    Raises:
        StoryError: something of its request is left.
    """
    (chat,) = chats(99, 1)
    with streaming(stage.router.port, stage.model, replace(chat, max_tokens=900)) as response:
        response.readline()
        time.sleep(0.3)
        if not stage.router.metric("pegaflow_router_engine_requests"):
            raise StoryError("the answer was over before its client went")

    def nothing_runs() -> bool:
        text = stage.decode[1].process.metrics()
        running = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.MULTILINE)
        return bool(running) and not any(float(value) for value in running)

    def nothing_is_held() -> bool:
        text = stage.server.process.metrics()
        held = re.findall(r"^pegaflow_(?:leases|operations)\S* (\S+)$", text, re.MULTILINE)
        return bool(held) and not any(float(value) for value in held)

    wait_until("the engine frees the request of a client that went", 30, nothing_runs)
    wait_until("the server holds nothing of it", 90, nothing_is_held)
    if stage.router.metric("pegaflow_router_engine_requests"):
        raise StoryError("the router still counts the request of a client that went")


def tell(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole; what came of it."""
    logs = folder / "logs"
    logs.mkdir()
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    server = ServerSettings(options.server, folder / "store", folder / "s", logs)
    asked = chats(options.seed, options.chats)
    # The virtual environment's own name of the interpreter: behind the link there are no packages.
    plain = VllmSettings(Path(sys.executable), options.model, logs, serve_arguments={"chat_template": template})
    expected = answers(plain, asked)
    print(f"reference: {len(set(expected))} different answers of {len(expected)}", flush=True)
    cached = replace(plain, connector=server.connector())
    with ExitStack() as running:
        store = StoreServer("router", server)
        running.callback(store.process.kill)
        with ThreadPoolExecutor(3) as starters:
            started = [starters.submit(HttpEngine, name, cached) for name in ("prefill", "decode 1", "decode 2")]
        for start in started:
            if not start.exception():
                running.callback(start.result().process.kill)
        prefill, *decode = [start.result() for start in started]
        router = Router(options.server.with_name("pegaflow-router"), server, [prefill], decode)
        running.callback(router.process.kill)
        stage = Stage(store, prefill, decode, router, str(options.model))
        said, figures = with_kills(stage, asked)
        client_that_goes(stage)
    equal = sum(one == other for one, other in zip(said, expected, strict=True))
    problems = [f"{len(asked) - equal} of {len(asked)} answers differ"] if equal != len(asked) else []
    if not figures["handoffs"] or not figures["decode_prompt_tokens_before_kills"].get("external_kv_transfer"):
        problems.append("nothing was handed from one engine to another")
    if not figures["learned"] or figures["asked"] <= figures["learned"]:
        problems.append("the router has not asked the server what it holds")
    if not figures["tries_failed"]:
        problems.append("no engine was missed")
    return {"chats": len(asked), "equal": equal, **figures, "problems": problems}


def main() -> int:
    """Runs it in a folder of its own."""
    parser = argparse.ArgumentParser(description="Prefill and decode apart, with real vLLMs.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model that model.py makes")
    parser.add_argument("--server", type=Path, required=True, help="pegaflow-server; pegaflow-router lies beside it")
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder on ext4 or XFS, with a short path")
    parser.add_argument("--chats", type=int, default=100, help="at least 30: some must be answered before a kill")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="rt-") as folder:
        outcome = tell(options, Path(folder))
    print(json.dumps(outcome))
    return 1 if outcome["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
