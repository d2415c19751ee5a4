"""Whether `pegaflow prewarm` keeps what it says, with a real vLLM: what was prewarmed offline is found by serving.

1. Plain vLLM serves all prompts: the reference.
2. `pegaflow prewarm` computes them into an empty store. It gets SIGKILL when a part is done; the same command goes on
   and may not compute a finished prompt again.
3. A fresh server and a fresh vLLM serve the same prompts: they must hit, and every token must be the reference's.
4. The store is packed, and the pack imported into an empty store: the same as in 3, with that. A pack in which one byte
   was changed is refused.

Prompts are texts, token ids and chats, with shared prefixes and duplicates. Ends with one line of JSON. Exit code 0:
everything held; 1: something did not; 2: it could not be run to its end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import BLOCK_TOKENS, HttpEngine, VllmSettings
from processes import Process, StoryError, wait_until
from store_server import ServerSettings, StoreServer

_ANSWER_SECONDS = 120.0
_PREWARM_SECONDS = 900.0
_AT_ONCE = 8
_MAX_TOKENS = 8
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def say(text: str) -> None:
    """One line of progress, on standard error."""
    print(f"[prewarm {time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def prompts(count: int, seed: int = 7) -> list[dict[str, Any]]:
    """So many different prompts of 200 to 900 tokens: a third each of texts, tokens and chats, half with a prefix."""
    source = random.Random(seed)

    def text(length: int) -> str:
        return "".join(chr(source.randrange(33, 127)) for _ in range(length))

    shared = text(320)
    made: list[dict[str, Any]] = []
    for number in range(count):
        body = (shared if number % 2 else "") + text(source.randrange(200, 580))
        if number % 3 == 0:
            made.append({"prompt": body})
        elif number % 3 == 1:
            made.append({"prompt_token_ids": [3 + ord(letter) - 33 for letter in body]})
        else:
            made.append({"messages": [{"role": "system", "content": shared}, {"role": "user", "content": body}]})
    return made


@dataclass(frozen=True)
class Said:
    """vLLM's answer to one prompt."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int

    @property
    def could_hit_tokens(self) -> int:
        """Tokens of the prompt's full blocks; one token is always computed."""
        return (self.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def ask(port: int, model: str, prompt: dict[str, Any]) -> Said:
    """Sends one prompt to vLLM's OpenAI server."""
    is_chat = "messages" in prompt
    given = (
        {"messages": prompt["messages"]}
        if is_chat
        else {"prompt": prompt.get("prompt", prompt.get("prompt_token_ids"))}
    )
    body = {
        "model": model,
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **given,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    try:
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise StoryError(f"{path} answered {response.status}: {text[:2000]!r}")
        reply = json.loads(text)
    finally:
        connection.close()
    usage = reply["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Said(tuple(reply["choices"][0]["token_ids"]), usage["prompt_tokens"], cached)


def ask_all(engine: HttpEngine, model: Path, asked: list[dict[str, Any]]) -> list[Said]:
    """All prompts, some at a time, in their order."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as senders:
        return list(senders.map(lambda prompt: ask(engine.port, str(model), prompt), asked))


@dataclass(frozen=True)
class Prewarming:
    """The command and where its things lie."""

    command: list[str]
    journal: Path
    logs: Path
    environment: dict[str, str]

    def finished(self) -> int:
        """How many prompts the journal says are done."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return max(0, len(lines) - 1)

    def killed_after(self, done: int) -> int:
        """Starts it, kills it when at least so many prompts are done, and returns how many were."""
        process = Process("pegaflow prewarm", self.command, self.logs / "prewarm-killed.log", self.environment)
        try:

            def is_far_enough() -> bool:
                process.check_running()
                return self.finished() >= done

            wait_until("pegaflow prewarm: the first part", _PREWARM_SECONDS, is_far_enough)
        finally:
            process.popen.kill()
            process.popen.wait()
            # The vLLM that it has started leads a group of its own, and ends with it.
            wait_until("the end of its vLLM", 30, lambda: not self._others())
        return self.finished()

    def _others(self) -> list[str]:
        found = subprocess.run(["pgrep", "-f", "pegaflow.prewarm"], capture_output=True, text=True, check=False)
        return found.stdout.split()

    def to_end(self) -> dict[str, Any]:
        """Runs it to its end; returns what it reports."""
        with (self.logs / "prewarm.log").open("wb") as log:
            ended = subprocess.run(
                self.command,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                timeout=_PREWARM_SECONDS,
                check=False,
            )
        lines = ended.stdout.decode().strip().splitlines()
        if ended.returncode != 0 or len(lines) != 1:
            tail = (self.logs / "prewarm.log").read_text(errors="replace")[-6000:]
            raise StoryError(f"pegaflow prewarm: exit code {ended.returncode}, {lines}\n{tail}")
        report: dict[str, Any] = json.loads(lines[0])
        return report


def carried(binary: Path, folder: Path, store: Path, other: Path) -> bool:
    """Packs the store into an empty one; whether a changed pack was refused."""
    sizes = ["--capacity", "1GiB", "--dram", "256MiB"]

    def pack(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        command = [str(part) for part in (binary, "--json", "pack", *arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PREWARM_SECONDS, check=False)
        try:
            return ended.returncode, json.loads(ended.stdout)
        except ValueError:
            raise StoryError(
                f"pegaflow pack {arguments[0]}: {ended.returncode}, {ended.stdout}{ended.stderr}"
            ) from None

    def must(*arguments: str | Path) -> dict[str, Any]:
        code, said = pack(*arguments)
        if code != 0:
            raise StoryError(f"pegaflow pack {arguments[0]}: exit code {code}, {said}")
        return said

    key, file, changed = folder / "signer.key", folder / "kv.pack", folder / "changed.pack"
    public = must("key", key)["public"]
    say(f"packed: {json.dumps(must('export', file, '--key', key, '--path', store, *sizes))}")
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 3] ^= 1
    changed.write_bytes(whole)
    refused, said = pack("import", changed, "--trust", public, "--path", folder / "refused", *sizes)
    say(f"a changed pack: exit code {refused}, {said.get('error', {}).get('message')}")
    imported = must("import", file, "--trust", public, "--path", other, *sizes)
    say(f"imported: {json.dumps(imported)}")
    return refused != 0


def tell(options: argparse.Namespace, folder: Path, sockets: Path) -> dict[str, Any]:
    """The three parts; returns the outcome."""
    asked = prompts(options.prompts)
    template = folder / "template.jinja"
    template.write_text(_CHAT_TEMPLATE)
    serving = {"chat_template": str(template)}
    logs: Path = options.logs
    model: Path = options.model.resolve()

    def vllm(connector: dict[str, Any] | None) -> VllmSettings:
        return VllmSettings(Path(sys.executable), model, logs, connector, serve_arguments=serving)

    def answered(name: str, connector: dict[str, Any] | None) -> list[Said]:
        engine = HttpEngine(name, vllm(connector))
        try:
            return ask_all(engine, model, asked)
        finally:
            engine.process.kill()

    say("plain vLLM, the reference")
    reference = answered("prewarm reference", None)

    lines = folder / "prompts.jsonl"
    # Every tenth twice; equal prompts are computed once.
    lines.write_text("".join(json.dumps(prompt) + "\n" for prompt in [*asked, *asked[::10]]))
    server = ServerSettings(options.server.resolve(), folder / "store", sockets / "server.sock", logs)
    binary = options.server.resolve().with_name("pegaflow")
    command = [str(binary), "--json", "prewarm", str(lines), "--python", sys.executable]
    command += ["--path", str(server.store), "--capacity", "1GiB", "--dram", "256MiB", "--", str(model)]
    for name, value in vllm(None).engine_arguments().items():
        if name != "model":
            option = "--" + name.replace("_", "-")
            command += [option] if value is True else [option, str(value)]
    command += ["--chat-template", str(template)]
    runtime = {"XDG_RUNTIME_DIR": str(sockets)}
    prewarming = Prewarming(
        command, lines.with_name("prompts.jsonl.prewarmed"), logs, vllm(None).environment() | runtime
    )
    say("pegaflow prewarm, to be killed")
    killed_at = prewarming.killed_after(max(1, len(asked) // 4))
    say(f"killed with {killed_at} of {len(asked)} prompts done; once more")
    report = prewarming.to_end()
    say(f"prewarmed: {json.dumps(report)}")

    def served(name: str, server: ServerSettings) -> tuple[float, bool, dict[str, int]]:
        """Share of full blocks that hit, whether the tokens are the reference's, and what was loaded."""
        say(f"a fresh server and a fresh vLLM, {name}")
        store = StoreServer(name, server)
        try:
            answers = answered(name, server.connector())
            loaded = store.loaded_blocks()
        finally:
            store.process.kill()
        could = sum(said.could_hit_tokens for said in answers)
        hit = sum(min(said.cached_tokens, said.could_hit_tokens) for said in answers)
        is_equal = all(one.tokens == other.tokens for one, other in zip(answers, reference, strict=True))
        return round(hit / could, 4), is_equal, loaded

    hit_ratio, tokens_equal, loaded = served("prewarmed", server)
    other = ServerSettings(server.binary, folder / "other", sockets / "other.sock", logs)
    refuses_changed = carried(binary, folder, server.store, other.store)
    pack_hit_ratio, pack_tokens_equal, _ = served("imported", other)
    return {
        "prompts": len(asked),
        "killed_at": killed_at,
        "computed_after_kill": report["done"],
        "repeated": report["done"] + report["done_before"] - len(asked),
        "resumed": report["done_before"] >= killed_at > 0,
        "failed": report["failed"],
        "duplicates": report["duplicates"],
        "hit_ratio": hit_ratio,
        "loaded_blocks": loaded,
        "tokens_equal": tokens_equal,
        "pack_hit_ratio": pack_hit_ratio,
        "pack_tokens_equal": pack_tokens_equal,
        "refuses_changed_pack": refuses_changed,
        "tokens_per_s": report["tokens_per_s"],
    }


def main() -> int:
    """Runs it, reports, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Shows that prewarmed prompts are found by serving.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model that model.py makes")
    parser.add_argument(
        "--server", type=Path, required=True, help="the pegaflow-server binary; pegaflow lies beside it"
    )
    parser.add_argument("--logs", type=Path, required=True, help="folder for the logs of all processes")
    parser.add_argument("--prompts", type=int, default=200, help="how many prompts")
    options = parser.parse_args()
    # The store needs a real file system, and a socket a short path.
    options.logs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pegaflow-", dir=options.logs.resolve().parent))
    sockets = Path(tempfile.mkdtemp(prefix="pegaflow-"))
    started = time.monotonic()
    try:
        outcome = tell(options, folder, sockets)
    except (StoryError, OSError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        print(json.dumps({"problem": str(error).splitlines()[0]}), flush=True)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(sockets, ignore_errors=True)
    outcome["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(outcome), flush=True)
    held = outcome["tokens_equal"] and outcome["hit_ratio"] >= 0.95 and outcome["resumed"]
    held = held and outcome["pack_tokens_equal"] and outcome["pack_hit_ratio"] >= 0.95
    held = held and outcome["refuses_changed_pack"] and outcome["repeated"] == 0 and outcome["failed"] == 0
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
