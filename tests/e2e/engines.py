"""The two ways in which the story talks to vLLM: its offline class in a child process, its OpenAI server."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from processes import HttpProcess, PipedProcess, Process, free_port
from prompts import Prompt

BLOCK_TOKENS = 32
_START_SECONDS = 300.0
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """What vLLM said to one prompt, and what it took from a cache."""

    tokens: tuple[int, ...]
    cached_tokens: int
    ttft_ms: float | None


@dataclass(frozen=True)
class Reply:
    """The answers to prompts sent at one moment, and vLLM's count of tokens: computed, from its cache, from outside."""

    answers: tuple[Answer, ...]
    computed_tokens: int
    gpu_tokens: int
    store_tokens: int


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM is started: the interpreter of its environment, the model, and the connector if there is one."""

    python: Path
    model: Path
    logs: Path
    connector: dict[str, Any] | None = None
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    # Where KV events are published, if they are.
    events_endpoint: str | None = None
    # All of vLLM in one process, as an engine inside it needs it.
    is_one_process: bool = False
    # Of the OpenAI server only, named as in Python.
    serve_arguments: Mapping[str, Any] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The process environment: nothing is fetched or reported, and threads fit a small machine."""
        # The compilers are ours (perhaps behind a compiler cache); torch takes CXX for the name of one program.
        inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
        return {
            **inherited,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_COLOR": "0",
            "VLLM_CACHE_ROOT": str(self.model.parent / "vllm-cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if self.is_one_process else {}),
            **self.extra_environment,
        }

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's engine, named as its `LLM` class names them."""
        arguments: dict[str, Any] = {
            "model": str(self.model),
            "dtype": "float32",
            "block_size": BLOCK_TOKENS,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 2048,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "seed": 0,
        }
        if self.connector is not None:
            arguments["kv_transfer_config"] = self.connector
        if self.is_one_process:
            arguments["distributed_executor_backend"] = "uni"
        if self.events_endpoint is not None:
            arguments["kv_events_config"] = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": self.events_endpoint,
            }
        return arguments


class Engine(Protocol):
    """A running vLLM."""

    @property
    def process(self) -> Process:
        """Its process."""
        ...

    def ask(self, prompts: Sequence[Prompt]) -> Reply:
        """Sends the prompts at one moment and returns when all are answered.

        Raises:
            StoryError: no answer within the bound, or the engine ended.
        """
        ...


class _Counted:
    """Turns vLLM's counters since start into those of one request."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def reply(self, answers: Sequence[Answer], counts: dict[str, int]) -> Reply:
        def since(source: str) -> int:
            return counts.get(source, 0) - self._before.get(source, 0)

        reply = Reply(
            answers=tuple(answers),
            computed_tokens=since("local_compute"),
            gpu_tokens=since("local_cache_hit"),
            store_tokens=since("external_kv_transfer"),
        )
        self._before = counts
        return reply


class OfflineEngine:
    """vLLM's offline class in a child process; `__init__` returns when the model is loaded."""

    def __init__(self, name: str, settings: VllmSettings) -> None:
        self._counted = _Counted()
        script = Path(__file__).with_name("offline.py")
        arguments = settings.engine_arguments() | {"disable_log_stats": False}
        self.process = PipedProcess(
            f"vLLM, {name}",
            [settings.python, script, json.dumps(arguments)],
            settings.logs / f"{name.replace(' ', '-')}.log",
            settings.environment(),
        )
        try:
            self.process.receive(_START_SECONDS)
        except BaseException:
            self.process.kill()
            raise

    def ask(self, prompts: Sequence[Prompt]) -> Reply:
        """See `Engine`."""
        requests = [{"tokens": prompt.tokens, "max_tokens": prompt.max_tokens} for prompt in prompts]
        self.process.send(requests)
        line = json.loads(self.process.receive(_ANSWER_SECONDS))
        answers = [
            Answer(tuple(answer["tokens"]), answer["cached_tokens"], answer["ttft_ms"]) for answer in line["answers"]
        ]
        return self._counted.reply(answers, line["tokens_by_source"])


class HttpEngine:
    """vLLM's OpenAI server; `__init__` returns when it says that it is healthy."""

    def __init__(self, name: str, settings: VllmSettings) -> None:
        self.port = free_port()
        self._model = str(settings.model)
        self._counted = _Counted()
        # Not `vllm serve`: that command asks for the metadata of a package `vllm`, and the CPU build is called
        # `vllm-cpu`.
        command: list[str | Path] = [
            settings.python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            self._model,
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enable-prompt-tokens-details"]
        for argument, value in {**settings.engine_arguments(), **settings.serve_arguments}.items():
            option = "--" + argument.replace("_", "-")
            if argument == "model":
                continue
            if value is True:
                command.append(option)
            else:
                command += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
        log = settings.logs / f"{name.replace(' ', '-')}.log"
        self.process = HttpProcess(
            f"vLLM server, {name}",
            command,
            log,
            settings.environment(),
            port=self.port,
            ready_path="/health",
            start_seconds=_START_SECONDS,
        )

    def tokens_by_source(self) -> dict[str, int]:
        """Tokens of prompts since start, by where they came from."""
        text = self.process.metrics()
        counts: dict[str, int] = {}
        for source, value in re.findall(
            r'^vllm:prompt_tokens_by_source_total\{[^}]*source="(\w+)"[^}]*\} (\S+)$', text, re.MULTILINE
        ):
            counts[source] = counts.get(source, 0) + int(float(value))
        return counts

    def _stream(self, prompt: Prompt) -> Answer:
        body = {
            "model": self._model,
            "prompt": prompt.tokens,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        # A socket's own limit is for each read; this one is for the whole answer.
        overdue = threading.Timer(_ANSWER_SECONDS, connection.close)
        overdue.start()
        try:
            sent = time.monotonic()
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise self.process.failure(f"a completion answered {response.status}: {response.read(2000)!r}")
            tokens: list[int] = []
            cached_tokens, ttft_ms = 0, None
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if not data or data == b"[DONE]":
                    continue
                event = json.loads(data)
                for choice in event.get("choices", []):
                    tokens += choice.get("token_ids") or []
                    if tokens and ttft_ms is None:
                        ttft_ms = (time.monotonic() - sent) * 1e3
                if usage := event.get("usage"):
                    cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            return Answer(tuple(tokens), cached_tokens, ttft_ms)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.process.failure(f"a completion broke off: {error!r}") from error
        finally:
            overdue.cancel()
            connection.close()

    def ask(self, prompts: Sequence[Prompt]) -> Reply:
        """See `Engine`."""
        with ThreadPoolExecutor(max_workers=len(prompts)) as senders:
            answers = list(senders.map(self._stream, prompts))
        return self._counted.reply(answers, self.tokens_by_source())
