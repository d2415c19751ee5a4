"""The prompts of the story: what people send again and again, made of a fixed seed.

Prompts are token ids of the tiny model's tokenizer (one byte, one token), so that a follow-up can hold the very
tokens that the model answered. Families share prefixes as real traffic does: one system prompt with many questions,
one document with several, a conversation that grows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

# Ids below this are special; the rest of the vocabulary that bytes use follows.
_FIRST_BYTE_TOKEN = 3
_PRINTABLE = 94


@dataclass(frozen=True)
class Prompt:
    """One request: `name` is its row in the report, `tokens` what is sent, `max_tokens` how much is to be answered."""

    name: str
    tokens: tuple[int, ...]
    max_tokens: int = 16
    # How many leading tokens an earlier request left in the cache; `None`: all, for a prompt that was asked before.
    known_tokens: int | None = None

    def could_hit_tokens(self, block_tokens: int) -> int:
        """Tokens of the full blocks that a warm cache can serve; one token of a prompt is always computed."""
        reach = len(self.tokens) - 1
        if self.known_tokens is not None:
            reach = min(reach, self.known_tokens)
        return reach // block_tokens * block_tokens

    def shared_tokens(self, asked: Iterable[Prompt], block_tokens: int) -> int:
        """Tokens of the full blocks that this prompt has in common with the most similar one asked before."""

        def common(other: Prompt) -> int:
            pairs = zip(self.tokens, other.tokens, strict=False)
            return next(
                (place for place, (one, two) in enumerate(pairs) if one != two),
                min(len(self.tokens), len(other.tokens)),
            )

        return max((common(other) for other in asked), default=0) // block_tokens * block_tokens


def _text(source: random.Random, length: int) -> tuple[int, ...]:
    return tuple(_FIRST_BYTE_TOKEN + source.randrange(_PRINTABLE) for _ in range(length))


def story(seed: int) -> list[Prompt]:
    """The requests of one story, to be asked in this order. Lengths go from 100 to 1,500 tokens."""
    source = random.Random(seed)
    system, document = _text(source, 640), _text(source, 1_400)
    first_turn = _text(source, 230)
    second_turn = first_turn + _text(source, 260)
    return [
        Prompt("short", _text(source, 100)),
        Prompt("whole blocks", _text(source, 256)),
        Prompt("system + question 1", system + _text(source, 75)),
        Prompt("system + question 2", system + _text(source, 131)),
        Prompt("document + question 1", document + _text(source, 60)),
        Prompt("document + question 2", document + _text(source, 100)),
        # Long enough an answer that blocks fill up while it is decoded.
        Prompt("conversation, turn 1", first_turn, max_tokens=80),
        Prompt("conversation, turn 2", second_turn, max_tokens=80),
    ]


def together(seed: int) -> list[Prompt]:
    """Requests that are sent at one moment, sharing a prefix."""
    source = random.Random(seed + 1)
    shared = _text(source, 416)
    return [Prompt(f"at once {number}", shared + _text(source, 40 + 90 * number)) for number in range(1, 4)]


def follow_up(asked: Prompt, answer: tuple[int, ...], seed: int) -> Prompt:
    """The next turn of a conversation: what was asked, what was answered, and a new question.

    It was never asked before, so blocks past the prompt can only be found if those filled while decoding were kept
    too. The answer's last token was never fed to the model: its block is not there unless it was full without it.
    """
    source = random.Random(seed + 2)
    known = asked.tokens + answer
    return replace(
        asked,
        name=f"{asked.name}, follow-up",
        tokens=known + _text(source, 90),
        max_tokens=16,
        known_tokens=len(known) - 1,
    )
