"""Block keys: the same for the same tokens whatever way they come in, and different for anything else."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pegaflow._native import KEY_BYTES, KeyChain, content_digest

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=64)


def test_the_chain_is_frozen() -> None:
    """The same value stands in the Rust tests: keys are part of the format on disk."""
    key = KeyChain().extend([1, 2, 3, 4], 4, [b"salt"])
    assert key.hex() == "b46f3b47ad0847e5dfe59d1375fbfc9102fd85f3628be3c7075b3714880a4840"


@given(tokens, st.integers(1, 9), st.integers(0, 64))
def test_extending_in_pieces_gives_the_same_keys(ids: list[int], block: int, cut: int) -> None:
    whole = KeyChain().extend(ids, block)
    assert len(whole) == len(ids) // block * KEY_BYTES
    cut = min(cut, len(ids)) // block * block
    pieces = KeyChain()
    assert pieces.extend(ids[:cut], block) + pieces.extend(ids[cut:], block) == whole
    assert pieces.parent == (whole[-KEY_BYTES:] or bytes(KEY_BYTES))


@given(tokens.filter(bool))
def test_a_key_depends_on_every_token_before_it(ids: list[int]) -> None:
    other = [ids[0] ^ 1, *ids[1:]]
    ours, theirs = KeyChain().extend(ids, 1), KeyChain().extend(other, 1)
    split = [keys[at : at + KEY_BYTES] for keys in (ours, theirs) for at in range(0, len(keys), KEY_BYTES)]
    assert len(set(split)) == 2 * len(ids)


def test_lists_and_buffers_are_the_same() -> None:
    ids = [7, 0, 2**31 - 1, 5]
    expected = KeyChain().extend(ids, 2)
    for kind in "Iiq":
        assert KeyChain().extend(array(kind, ids), 2) == expected


def test_a_chain_resumes_after_a_known_key() -> None:
    first = KeyChain().extend([1, 2], 2)
    assert KeyChain(first).extend([3, 4], 2) == KeyChain().extend([1, 2, 3, 4], 2)[KEY_BYTES:]


def test_extras_are_part_of_the_key() -> None:
    keys = {KeyChain().extend([1, 2], 2, extras) for extras in (None, [b"a"], [b"b"])}
    assert len(keys) == 3


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        KeyChain().extend([1], 0)
    with pytest.raises(ValueError, match="1 extras for 2 complete blocks"):
        KeyChain().extend([1, 2], 1, [b""])
    with pytest.raises(ValueError, match="32 bytes"):
        KeyChain(b"short")
    with pytest.raises(OverflowError):
        KeyChain().extend([-1], 1)
    with pytest.raises(ValueError, match="token -1"):
        KeyChain().extend(array("q", [-1]), 1)


def test_content_digests_differ() -> None:
    assert len({content_digest(b""), content_digest(b"a"), content_digest(b"b")}) == 3
