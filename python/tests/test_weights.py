"""The digest of weights: the same for the same content wherever it lies, another for any other content."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from pegaflow import PegaError
from pegaflow._native import digest_weights, full_digest

if TYPE_CHECKING:
    from pathlib import Path


def safetensors(path: Path, tensors: dict[str, bytes], metadata: dict[str, str] | None = None) -> Path:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    return path


TENSORS = {"a": bytes(range(256)) * 64, "b": b"\1" * 10, "empty": b""}


def test_how_the_tensors_are_spread_over_files_does_not_matter(tmp_path: Path) -> None:
    one = safetensors(tmp_path / "model.safetensors", TENSORS, {"format": "pt"})
    parts = [
        safetensors(tmp_path / "model-2.safetensors", {"a": TENSORS["a"]}),
        safetensors(tmp_path / "model-1.safetensors", {"b": TENSORS["b"], "empty": b""}),
    ]
    assert digest_weights([one]) == digest_weights(parts) == digest_weights(parts[::-1])
    assert full_digest([one]) != full_digest(parts)


@pytest.mark.parametrize(
    "other",
    [
        {"a": TENSORS["a"], "c": TENSORS["b"], "empty": b""},
        {"a": TENSORS["a"], "b": b"\1" * 9, "empty": b""},
        {"a": TENSORS["a"], "b": b"\1" * 9 + b"\2", "empty": b""},
        {"a": b"\1" + TENSORS["a"][1:], "b": TENSORS["b"], "empty": b""},
        {"a": TENSORS["a"][:-1] + b"\1", "b": TENSORS["b"], "empty": b""},
        {"a": TENSORS["a"][:8192] + b"\7" + TENSORS["a"][8193:], "b": TENSORS["b"], "empty": b""},
        {"a": TENSORS["a"], "b": TENSORS["b"]},
    ],
)
def test_other_names_sizes_and_bytes_give_another_digest(tmp_path: Path, other: dict[str, bytes]) -> None:
    one = safetensors(tmp_path / "one.safetensors", TENSORS)
    two = safetensors(tmp_path / "two.safetensors", other)
    assert digest_weights([one]) != digest_weights([two])


def test_unsampled_bytes_are_seen_by_the_full_digest(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    files = []
    for folder, byte in zip(folders, (b"\0", b"\1"), strict=True):
        folder.mkdir()
        data = bytes(5000) + byte + bytes(200_000)
        files.append(safetensors(folder / "model.safetensors", {"a": data}))
    assert digest_weights(files[:1]) == digest_weights(files[1:])
    assert full_digest(files[:1]) != full_digest(files[1:])


def test_other_formats_are_sampled(tmp_path: Path) -> None:
    one, two = tmp_path / "model.bin", tmp_path / "sub" / "model.bin"
    two.parent.mkdir()
    one.write_bytes(bytes(100_000))
    two.write_bytes(bytes(100_000))
    assert digest_weights([one]) == digest_weights([two])
    two.write_bytes(bytes(99_999) + b"\1")
    assert digest_weights([one]) != digest_weights([two])


def test_what_is_no_weight_file_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 100)
    with pytest.raises(PegaError, match=r"bad\.safetensors is no safetensors file"):
        digest_weights([bad])
    with pytest.raises(PegaError, match="no weight files"):
        digest_weights([])
    with pytest.raises(PegaError, match="cannot open"):
        digest_weights([tmp_path / "missing.bin"])


def test_dummy_weights_are_keyed_by_what_they_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    import torch

    from pegaflow.connector import identity

    def dummy(device: int | None, **model: object) -> str:
        config = SimpleNamespace(
            model_config=SimpleNamespace(**({"seed": 0, "quantization": None} | model)),
            load_config=SimpleNamespace(load_format="dummy"),
        )
        return identity._weights(config, device)

    gpu = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert dummy(None) == dummy(None) != dummy(None, seed=1)
    assert dummy(0) == dummy(1) != dummy(None)
    assert "NVIDIA H200" in dummy(0, quantization="fp8")
    with pytest.raises(identity.UnknownIdentityError, match="dummy weights with quantization 'gptq'"):
        dummy(0, quantization="gptq")


def test_what_the_store_is_told_about_the_numbers() -> None:
    identity = pytest.importorskip("pegaflow.connector.identity", exc_type=ImportError)
    told = {
        ("auto", "torch.bfloat16"): "bf16",
        ("auto", "torch.float16"): "f16",
        ("auto", "torch.float32"): "unknown",
        ("fp8", "torch.bfloat16"): "fp8",
        ("fp8_e5m2", "torch.bfloat16"): "unknown",
        ("bfloat16", "torch.float16"): "bf16",
    }
    assert {pair: identity.kv_dtype(*pair) for pair in told} == told
