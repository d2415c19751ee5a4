"""Where blocks lie: every layout that vLLM has, none of which may be taken for another; and an identity without numbers
of blocks, so that engines with more memory find the same blocks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch

from pegaflow.connector import compat
from pegaflow.connector.compat import Piece, layer_memory, pieces_of
from pegaflow.errors import UnsupportedError

N, HEADS, TOKENS, SIZE = 20, 8, 16, 128
PAGE = HEADS * TOKENS * 2 * SIZE * 2  # bytes of a block in bfloat16


def laid_out(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a logical shape that lies in memory in another order of its dimensions, as vLLM makes them."""
    memory = torch.empty([shape[dimension] for dimension in order], dtype=torch.bfloat16, device="meta")
    return memory.permute(*(order.index(dimension) for dimension in range(len(order))))


def pieces(tensor: torch.Tensor, blocks: int = N, page: int = PAGE) -> tuple[Piece, ...]:
    return pieces_of(tensor.shape, tensor.stride(), 2, blocks, page)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 2, 3)])
def test_keys_and_values_joined(order: tuple[int, ...]) -> None:
    """FLASH_ATTN, FLASHINFER, TRITON_ATTN, CPU_ATTN; NHD and HND."""
    assert pieces(laid_out((N, HEADS, TOKENS, 2 * SIZE), order)) == (Piece(0, PAGE, PAGE),)


def test_keys_and_values_in_a_dimension_of_their_own() -> None:
    assert pieces(laid_out((N, 2, TOKENS, HEADS, SIZE), (0, 1, 2, 3, 4))) == (Piece(0, PAGE, PAGE),)


def test_keys_and_values_in_planes() -> None:
    half = PAGE // 2
    assert pieces(laid_out((2, N, TOKENS, HEADS, SIZE), (0, 1, 2, 3, 4))) == (
        Piece(0, half, half),
        Piece(N * half, half, half),
    )


def test_two_planes_of_which_the_blocks_lie_outside() -> None:
    """A view with K and V first over memory with blocks first, as vLLM makes for mixed backends."""
    assert pieces(laid_out((2, N, TOKENS, HEADS, SIZE), (1, 0, 2, 3, 4))) == (Piece(0, PAGE, PAGE),)


def test_latent_attention() -> None:
    page = 64 * 576 * 2
    assert pieces(torch.empty(N, 64, 576, device="meta"), page=page) == (Piece(0, page, page),)


def test_quantized_blocks_are_bytes() -> None:
    tensor = torch.empty(N, 64, 656, dtype=torch.uint8, device="meta")
    assert pieces_of(tensor.shape, tensor.stride(), 1, N, 64 * 656) == (Piece(0, 64 * 656, 64 * 656),)


def test_a_kernel_with_smaller_blocks() -> None:
    assert pieces(laid_out((4 * N, HEADS, TOKENS, 2 * SIZE), (0, 2, 1, 3)), page=4 * PAGE) == (
        Piece(0, 4 * PAGE, 4 * PAGE),
    )
    half = PAGE // 2
    assert pieces(laid_out((2, 4 * N, TOKENS, HEADS, SIZE), (0, 1, 2, 3, 4)), page=4 * PAGE) == (
        Piece(0, 4 * half, 4 * half),
        Piece(4 * N * half, 4 * half, 4 * half),
    )


def test_one_layer_of_memory_with_blocks_outermost() -> None:
    layers = laid_out((4, N, HEADS, TOKENS, 2 * SIZE), (1, 0, 3, 2, 4))
    assert pieces(layers[1]) == (Piece(0, 4 * PAGE, PAGE),)


def test_heads_outside_of_layers_or_of_blocks() -> None:
    piece = TOKENS * 2 * SIZE * 2
    layers = laid_out((4, N, HEADS, TOKENS, 2 * SIZE), (1, 2, 0, 3, 4))
    assert pieces(layers[1]) == tuple(Piece(head * 4 * piece, 4 * PAGE, piece) for head in range(HEADS))
    heads = laid_out((N, HEADS, TOKENS, 2 * SIZE), (1, 0, 2, 3))
    assert pieces(heads) == tuple(Piece(head * N * piece, piece, piece) for head in range(HEADS))


@pytest.mark.parametrize(
    ("shape", "page"),
    [
        ((N, HEADS, TOKENS, 2 * SIZE), PAGE - 16),
        ((N, HEADS, TOKENS, 2 * SIZE), 2 * PAGE),
        ((N - 1, HEADS, TOKENS, 2 * SIZE), PAGE),
        ((3, N, TOKENS, HEADS, SIZE), PAGE * 3 // 2),
    ],
)
def test_what_does_not_add_up_is_refused_with_the_numbers(shape: tuple[int, ...], page: int) -> None:
    tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with pytest.raises(UnsupportedError, match=f"does not fit: {N} blocks of {page} bytes were expected"):
        pieces(tensor, page=page)


def test_blocks_that_overlap_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not fit"):
        pieces_of((N, TOKENS), (0, 1), 2, N, TOKENS * 2)
    with pytest.raises(UnsupportedError, match="does not fit"):
        pieces_of((N, TOKENS), (8, 1), 2, N, TOKENS * 2)


# --- with vLLM's configuration ----------------------------------------------------------------------------------------


def config_of(page: int, names: list[str], block_stride: int = 0) -> Any:
    spec = SimpleNamespace(page_size_bytes=page)
    return SimpleNamespace(
        num_blocks=N,
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=names)],
        kv_cache_tensors=[SimpleNamespace(shared_by=names, layers=names, block_stride=block_stride)],
    )


def test_layers_know_their_allocation_and_their_end() -> None:
    backing = torch.empty(N, 3, 64, dtype=torch.uint8)
    layers = {name: backing[:, index] for index, name in enumerate("abc")}
    memory = layer_memory(config_of(64, ["a", "b", "c"], 192), layers)
    assert [layer.memory for layer in memory] == [backing.data_ptr()] * 3
    assert [layer.start - backing.data_ptr() for layer in memory] == [0, 64, 128]
    assert [layer.end - backing.data_ptr() for layer in memory] == [N * 192 - 128, N * 192 - 64, N * 192]


def test_a_configuration_that_contradicts_the_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layer a: its blocks are 64 bytes apart, but vLLM's .* says 128"):
        layer_memory(config_of(64, ["a"], 128), {"a": torch.empty(N, 64, dtype=torch.uint8)})
    with pytest.raises(UnsupportedError, match="layer b has no KV cache of its own"):
        layer_memory(config_of(64, ["b"]), {"a": torch.empty(N, 64, dtype=torch.uint8)})


def test_pieces_on_a_gpu_have_whole_units() -> None:
    layer = compat.LayerMemory("a", 4096, 4096, (Piece(0, 72, 72),), N)
    with pytest.raises(UnsupportedError, match="a piece of 72 bytes at 0x1000, 72 bytes from block to block"):
        compat._check_alignment(layer)
    compat._check_alignment(compat.LayerMemory("a", 4096, 4096, (Piece(16, 64, 48),), N))


def test_devices() -> None:
    def on(*names: str) -> Any:
        return {name: SimpleNamespace(device=torch.device(name)) for name in names}

    assert compat.device_of(on("cpu")) is None
    assert compat.device_of(on("cuda:3")) == 3
    for wrong in (["meta"], ["cuda:0", "cuda:1"], ["cpu", "cuda:0"], []):
        with pytest.raises(UnsupportedError, match="one CUDA device or host memory"):
            compat.device_of(on(*wrong))
    assert compat.raw_stream(None) == 0


def test_views_of_a_memory_that_all_layers_share() -> None:
    """0.26 to 0.28, NHD: (blocks, layers, tokens, heads, content)."""
    backend = SimpleNamespace(get_kv_cache_stride_order=lambda include_num_layers_dimension: (1, 0, 3, 2, 4))
    memory = torch.arange(N * 3 * 4 * 2 * 8, dtype=torch.float32).view(N, 3, 4, 2, 8)
    names = [SimpleNamespace(shared_by=[name]) for name in "abc"]
    views = compat.cross_layer_views(SimpleNamespace(kv_cache_tensors=names), memory, backend)
    assert list(views) == ["a", "b", "c"]
    assert views["b"].shape == (N, 2, 4, 8)
    assert torch.equal(views["b"][5], memory[5, 1].transpose(0, 1))
    page = 4 * 2 * 8 * 4
    view = views["b"]
    assert pieces_of(view.shape, view.stride(), 4, N, page) == (Piece(0, 3 * page, page),)


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "order", "dimension"),
    [
        ((N, HEADS, TOKENS, 2 * SIZE), (0, 2, 1, 3), 0),
        ((2, N, TOKENS, HEADS, SIZE), (0, 1, 2, 3, 4), 1),
        ((N, HEADS, TOKENS, 2 * SIZE), (1, 0, 2, 3), 0),
        ((N, 64, 576), (0, 1, 2), 0),
    ],
)
def test_the_layout_s_identity_does_not_depend_on_the_number_of_blocks(
    shape: tuple[int, ...], order: tuple[int, ...], dimension: int
) -> None:
    def identity(blocks: int, kernel: int = 1) -> list[str]:
        sizes = (*shape[:dimension], blocks * kernel, *shape[dimension + 1 :])
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
        return compat.layout_of_layers(config, {"a": laid_out(sizes, order)}, ["a"], blocks)

    assert identity(N) == identity(7 * N) == identity(N + 3) == identity(N, kernel=4)


def test_the_layout_s_identity_tells_orders_apart() -> None:
    def identity(shape: tuple[int, ...], order: tuple[int, ...]) -> str:
        tensor = laid_out(shape, order)
        return compat._block_layout(tensor.shape, tensor.stride(), N)

    assert identity((N, 8, 16, 256), (0, 1, 2, 3)) != identity((N, 8, 16, 256), (0, 2, 1, 3))
    assert identity((N, 8, 16, 256), (0, 1, 2, 3)) != identity((N, 8, 16, 256), (1, 0, 2, 3))
    assert identity((N, 2, 16, 8, 128), (0, 1, 2, 3, 4)) != identity((2, N, 16, 8, 128), (0, 1, 2, 3, 4))
    assert identity((N, 8, 16, 256), (0, 1, 2, 3)) == "[8, 16, 256]:[4096, 256, 1]"
