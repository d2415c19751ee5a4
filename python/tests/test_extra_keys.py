"""What the bytes of a block depend on besides its tokens: the content of LoRA adapters and of multimodal items, salts.
Whatever has no stable identity is not cached.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from pegaflow.connector.compat import UncacheableError, extra_of_block
from pegaflow.connector.identity import LoraDigests

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4
IMAGE, OTHER_IMAGE = "a" * 64, "b" * 64


def adapter(folder: Path, weight: int, rank: int = 8) -> SimpleNamespace:
    """A request's LoRA adapter, with its files."""
    folder.mkdir(exist_ok=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes([weight]) * 16
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return SimpleNamespace(lora_name="poet", lora_path=str(folder), lora_int_id=1, adapter_id=1)


def image(identifier: str, offset: int = 2, length: int = 4) -> SimpleNamespace:
    position = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(identifier=identifier, mm_hash=identifier, mm_position=position, modality="image")


def extras(request: Any, lora_digest: str | None = None) -> list[bytes]:
    """Of every block of a request."""
    found, mm_index = [], 0
    for start in range(0, 12, BLOCK):
        extra, mm_index = extra_of_block(request, start, start + BLOCK, mm_index, lora_digest)
        found.append(extra)
    return found


def test_a_prompt_of_text_has_none(make_request: Any) -> None:
    assert extras(make_request("a", range(12))) == [b""] * 3


def test_an_adapter_counts_by_its_content_and_not_by_its_name(make_request: Any, tmp_path: Path) -> None:
    digests = {
        folder: LoraDigests().digest_of(adapter(tmp_path / folder, weight, rank))
        for folder, weight, rank in (("one", 1, 8), ("same", 1, 8), ("weights", 2, 8), ("config", 1, 16))
    }
    assert digests["one"] == digests["same"]
    assert len({digests["one"], digests["weights"], digests["config"]}) == 3
    request = make_request("a", range(12), lora_request=adapter(tmp_path / "one", 1))
    assert extras(request, digests["one"]) == extras(request, digests["same"])
    assert not set(extras(request, digests["one"])) & set(extras(request, digests["weights"]))
    assert not set(extras(request, digests["one"])) & set(extras(make_request("b", range(12))))


def test_an_adapter_whose_files_change_or_are_gone_is_not_cached(make_request: Any, tmp_path: Path) -> None:
    digests = LoraDigests()
    request = adapter(tmp_path / "one", 1)
    assert digests.digest_of(request) is not None
    adapter(tmp_path / "one", 222, rank=1024)
    assert digests.digest_of(request) is None
    assert digests.digest_of(SimpleNamespace(lora_name="x", lora_path=str(tmp_path / "no"), lora_int_id=2)) is None
    with pytest.raises(UncacheableError, match="LoRA"):
        extras(make_request("a", range(12), lora_request=request), None)


def test_an_image_counts_in_the_blocks_that_it_touches(make_request: Any) -> None:
    with_image = extras(make_request("a", range(12), mm_features=[image(IMAGE)]))
    with_other = extras(make_request("b", range(12), mm_features=[image(OTHER_IMAGE)]))
    assert with_image[0] != with_other[0]
    assert with_image[1] != with_other[1]
    assert with_image[2] == with_other[2] == b""
    moved = extras(make_request("c", range(12), mm_features=[image(IMAGE, offset=1)]))
    assert moved[0] != with_image[0]


def test_an_image_that_its_caller_has_named_is_not_cached(make_request: Any) -> None:
    with pytest.raises(UncacheableError, match="named by the caller"):
        extras(make_request("a", range(12), mm_features=[image("my-cat.jpg")]))


def test_a_salt_is_in_the_first_block_and_so_in_the_whole_chain(make_request: Any) -> None:
    one, two = (extras(make_request("a", range(12), cache_salt=salt)) for salt in ("one", "two"))
    assert one[0] != two[0]
    assert one[0] != b""
