"""The vLLM of `pegaflow prewarm`: computes prompts offline, with PegaFlow's connector, and says when their blocks are
saved.

`pegaflow prewarm` starts it, reads the prompts, keeps the record of what is done and shows progress; here is only what
needs Python. Lines of JSON come in on standard input and go out on standard output; all else that is printed goes
to standard error. It ends when its input ends, or when its parent does.

In:  `{"run": [{"id": 1, "prompt": "..."}, {"id": 2, "prompt_token_ids": [...]}, {"id": 3, "messages": [...]}]}`, each
     with `cache_salt`, or with `tools`, `chat_template_kwargs`, `add_generation_prompt`, as vLLM takes them
Out: `{"ready": {"model": "...", "vllm": "...", "block_size": 16}}` once, then for each line
     `{"done": [{"id": 1, "tokens": 512, "cached": 128}, {"id": 2, "error": "..."}], "saved": 24, "present": 8,
     "dropped": 0}`: the saves of these prompts have ended; the last three count blocks in all workers

usage: python -m pegaflow.prewarm CONNECTOR_JSON [MODEL] [options of `vllm serve`]
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from pegaflow.errors import InvalidInputError, PegaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm import LLM

logger = logging.getLogger("vllm.pegaflow")

# How long the saves of a batch may take after its last prompt was computed.
_SYNC_S = 600.0
_TICK_S = 0.01
_CHAT_OPTIONS = ("tools", "chat_template_kwargs", "add_generation_prompt")


def connector_config(given: dict[str, Any] | None, extra: dict[str, Any]) -> dict[str, Any]:
    """The `kv_transfer_config` of this run: what the serving command line says, with `extra` over its own settings.

    Raises `InvalidInputError` if it names another connector.
    """
    config = dict(given or {})
    name = config.setdefault("kv_connector", "PegaKVConnector")
    if name != "PegaKVConnector":
        raise InvalidInputError(f"--kv-transfer-config names {name}; only PegaKVConnector warms this cache")
    config.setdefault("kv_connector_module_path", "pegaflow")
    config["kv_role"] = "kv_both"
    config["kv_connector_extra_config"] = {**(config.get("kv_connector_extra_config") or {}), **extra}
    return config


class Counts:
    """vLLM's counters of the connector, since the last look."""

    NAMES = ("saved", "present", "dropped")

    def __init__(self, read: Callable[[], dict[str, int]]) -> None:
        self._read = read
        self._before = dict.fromkeys(self.NAMES, 0)

    def has_all_ended(self) -> bool:
        """Whether every block that was offered to the cache was taken or not."""
        now = self._read()
        return now.get("offered", 0) == sum(now.get(name, 0) for name in (*self.NAMES, "withdrawn"))

    def since(self) -> dict[str, int]:
        """What was counted since the last call."""
        now = {name: self._read().get(name, 0) for name in self.NAMES}
        counts = {name: now[name] - self._before[name] for name in self.NAMES}
        self._before = now
        return counts


def read_counts(llm: LLM) -> dict[str, int]:
    """The connector's counters of blocks: `offered`, and by what became of them."""
    counts: dict[str, int] = {}
    for metric in llm.get_metrics():
        name = metric.name.removesuffix("_total")
        if name == "vllm:pegaflow_offered_blocks":
            counts["offered"] = counts.get("offered", 0) + int(metric.value)
        elif name == "vllm:pegaflow_saved_blocks":
            result = metric.labels["result"]
            counts[result] = counts.get(result, 0) + int(metric.value)
    return counts


def in_groups(prompts: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any] | None, list[dict[str, Any]]]]:
    """The prompts that vLLM takes in one call: texts and tokens together (`None`), chats by their options."""
    groups: dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]] = {}
    for prompt in prompts:
        options = None
        if "messages" in prompt:
            options = {name: prompt[name] for name in _CHAT_OPTIONS if prompt.get(name) is not None}
        groups.setdefault(json.dumps(options, sort_keys=True), (options, []))[1].append(prompt)
    yield from groups.values()


class Runner:
    """A loaded vLLM."""

    def __init__(self, llm: LLM, chat_template: str | None) -> None:
        from vllm import SamplingParams

        self._llm = llm
        self._chat_template = chat_template
        self._sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        self._counts = Counts(lambda: read_counts(llm))

    def run(self, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Computes the prompts; returns when their saves have ended.

        Raises `PegaError` if they do not end.
        """
        done: list[dict[str, Any]] = []
        for options, group in in_groups(prompts):
            done += self._computed(options, group)
        self._sync()
        return {"done": done, **self._counts.since()}

    def _computed(self, options: dict[str, Any] | None, group: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            outputs = self._ask(options, group)
        except (ValueError, TypeError, KeyError) as error:
            # One that vLLM refuses: too long, or no chat. It names none of them, so each is asked alone.
            if len(group) > 1:
                return [answer for prompt in group for answer in self._computed(options, [prompt])]
            return [{"id": group[0]["id"], "error": str(error) or type(error).__name__}]
        return [
            {
                "id": prompt["id"],
                "tokens": len(output.prompt_token_ids or ()),
                "cached": output.num_cached_tokens or 0,
            }
            for prompt, output in zip(group, outputs, strict=True)
        ]

    def _ask(self, options: dict[str, Any] | None, group: list[dict[str, Any]]) -> Sequence[Any]:
        if options is not None:
            chats = [prompt["messages"] for prompt in group]
            return list(
                self._llm.chat(chats, self._sampling, use_tqdm=False, chat_template=self._chat_template, **options)
            )
        wanted = ("prompt", "prompt_token_ids", "cache_salt")
        inputs = [{name: prompt[name] for name in wanted if name in prompt} for prompt in group]
        return list(self._llm.generate(inputs, self._sampling, use_tqdm=False))

    def _sync(self) -> None:
        """Waits until what was offered to the cache has ended. Workers report with the steps of the engine, so it gets
        some: for a prompt of one token, which fills no block.
        """
        deadline = time.monotonic() + _SYNC_S
        while not self._counts.has_all_ended():
            if time.monotonic() > deadline:
                raise PegaError(f"saves have not ended {_SYNC_S:.0f} s after the last prompt; see the server's log")
            self._llm.generate([{"prompt_token_ids": [0]}], self._sampling, use_tqdm=False)
            time.sleep(_TICK_S)


def start(extra: dict[str, Any], arguments: Sequence[str]) -> tuple[LLM, str | None]:
    """Loads the model as `vllm serve` with these arguments would, and the chat template that they name."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # before 0.11
        from vllm.utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="pegaflow prewarm ... --", add_help=False)
    EngineArgs.add_cli_args(parser)
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--chat-template", default=None)
    parsed, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        logger.warning("PegaFlow: not used for prewarming: %s", " ".join(unknown))
    if parsed.model_tag is not None:
        parsed.model = parsed.model_tag
    engine = EngineArgs.from_cli_args(parsed)
    given = engine.kv_transfer_config
    config = connector_config(_as_dict(given) if given is not None else None, extra)
    options = vars(engine) | {"kv_transfer_config": config, "disable_log_stats": False, "enable_prefix_caching": True}
    template = parsed.chat_template
    if template is not None and os.path.exists(template):  # noqa: PTH110 - a template may also be given as text
        with open(template, encoding="utf-8") as file:  # noqa: PTH123
            template = file.read()
    return LLM(**options), template


def _as_dict(given: Any) -> dict[str, Any]:
    """vLLM's object for `--kv-transfer-config`, as it was written."""
    names = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
    return dict(given) if isinstance(given, dict) else {name: getattr(given, name) for name in names}


def end_with_parent() -> None:
    """Ends this process and those that it has started when the one that started it ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    # Only as the leader of a group of its own: it must not take others with it.
    if os.getpgrp() == os.getpid():
        threading.Thread(target=watch, name="pegaflow-parent", daemon=True).start()


def serve(runner: Runner, requests: TextIO, replies: TextIO) -> None:
    """Answers line by line until the input ends."""
    for line in requests:
        print(json.dumps(runner.run(json.loads(line)["run"])), file=replies, flush=True)


def main() -> int:
    """See the module; returns the exit code."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    # What vLLM and its children print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    end_with_parent()
    import vllm

    try:
        llm, template = start(json.loads(sys.argv[1]), sys.argv[2:])
    except (PegaError, ValueError) as error:
        print(json.dumps({"failed": str(error)}), file=replies, flush=True)
        return 2
    cache = llm.llm_engine.vllm_config.cache_config
    about = {"model": llm.llm_engine.vllm_config.model_config.model, "vllm": vllm.__version__}
    print(json.dumps({"ready": {**about, "block_size": cache.block_size}}), file=replies, flush=True)
    try:
        serve(Runner(llm, template), sys.stdin, replies)
    except PegaError as error:
        print(json.dumps({"failed": str(error)}), file=replies, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
