"""What the benches do inside of vLLM's workers: `worker_extension_cls` mixes this class into them."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("vllm.pegaflow.bench")

# Finite in every number format, and nothing that attention computes.
_POISON = 0xA5
_CHUNK_BLOCKS = 64
SEED_ENV = "PEGAFLOW_BENCH_WEIGHTS_SEED"
# How much larger a layer's output is than its input. Queries find few keys rather than the mean of all, and what they
# find outweighs the token itself.
_GAINS = {"embed": 0.5, "qkv": 2.0, "q_proj": 2.0, "q_a_proj": 2.0, "kv_a_proj": 2.0, "o_proj": 2.0, "down_proj": 0.5}


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draws all weights with a spread at which attention decides: with vLLM's own dummy weights every prompt is
    answered with the same token, whatever the KV cache holds. The same in every process.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                continue
            if parameter.dim() < 2:
                # Norms; biases, where there are any, do no harm as ones.
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(seed + zlib.crc32(f"{name}/{rank}".encode()))
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
            parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5, generator=generator)


def _replace_dummy_weights(seed: int) -> None:
    """This module is imported before the model is loaded; what a kernel makes of its weights then is made of ours."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    inner = DummyModelLoader.load_weights

    def load_weights(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        inner(self, model, *args, **kwargs)
        draw_weights(model, seed)

    DummyModelLoader.load_weights = load_weights


if SEED_ENV in os.environ:
    _replace_dummy_weights(int(os.environ[SEED_ENV]))


class KvProbe:
    """Methods that `collective_rpc` calls by name; `self` is the worker."""

    model_runner: Any
    rank: int

    def probe_watch(self) -> bool:
        """From now on notes which blocks each request is given."""
        self._probe_blocks: dict[str, list[int]] = {}
        inner = self.execute_model  # type: ignore[has-type]

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            for new in scheduler_output.scheduled_new_reqs:
                self._probe_blocks = {new.req_id: list(new.block_ids[0])}
            cached = scheduler_output.scheduled_cached_reqs
            for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
                if request_id in self._probe_blocks and blocks:
                    self._probe_blocks[request_id] += blocks[0]
            return inner(scheduler_output, *args, **kwargs)

        self.execute_model = execute_model
        return True

    def probe_blocks(self) -> list[int]:
        """The blocks of the request that came last, in the order of its tokens."""
        (blocks,) = self._probe_blocks.values()
        return blocks

    def probe_kv_bytes_per_block(self) -> int:
        """The bytes of one block in this worker."""
        return sum(rows.shape[1] for rows in self._probe_rows([0]))

    def probe_keep(self, folder: str, blocks: list[int]) -> int:
        """Writes the bytes of blocks to a file; returns how many."""
        written = 0
        with self._probe_file(folder).open("wb") as file:
            for start in range(0, len(blocks), _CHUNK_BLOCKS):
                for rows in self._probe_rows(blocks[start : start + _CHUNK_BLOCKS]):
                    written += file.write(rows.cpu().numpy().tobytes())
        return written

    def probe_compare(self, folder: str, blocks: list[int]) -> dict[str, int]:
        """Compares the bytes of as many blocks as were kept: how many blocks and bytes there are, and how many
        differ."""
        wrong_bytes, compared, wrong_blocks = 0, 0, set()
        with self._probe_file(folder).open("rb") as file:
            for start in range(0, len(blocks), _CHUNK_BLOCKS):
                chunk = blocks[start : start + _CHUNK_BLOCKS]
                for rows in self._probe_rows(chunk):
                    there = rows.cpu()
                    data = file.read(there.numel())
                    if len(data) != there.numel():
                        raise ValueError(f"only {len(data)} bytes were kept where {there.numel()} are compared")
                    differs = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(there.shape) != there
                    wrong_bytes += int(differs.sum())
                    compared += there.numel()
                    wrong_blocks |= {start + int(row) for row in differs.any(dim=1).nonzero().flatten()}
        return {
            "blocks": len(blocks),
            "bytes": compared,
            "wrong_blocks": len(wrong_blocks),
            "wrong_bytes": wrong_bytes,
        }

    def probe_poison(self) -> int:
        """Overwrites all of the KV cache; returns how many bytes."""
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._probe_tensors()}
        total = 0
        for tensor in storages.values():
            storage = tensor.untyped_storage()
            view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            view.set_(storage, 0, (storage.nbytes(),), (1,))
            view.fill_(_POISON)
            total += storage.nbytes()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        logger.warning("the whole KV cache was overwritten on purpose")
        return total

    def probe_device_memory(self) -> dict[str, int]:
        """The device's memory: free and all, in bytes."""
        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {"free_bytes": free, "total_bytes": total}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _probe_file(self, folder: str) -> Path:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        return path / f"rank-{self.rank}.kv"

    def _probe_tensors(self) -> list[torch.Tensor]:
        distinct = {tensor.data_ptr(): tensor for tensor in self.model_runner.kv_caches}
        return list(distinct.values())

    def _probe_rows(self, blocks: list[int]) -> list[torch.Tensor]:
        """For each layer a matrix of bytes, one row for each block. Found without the connector's help: it is
        checked."""
        count = self.model_runner.kv_cache_config.num_blocks
        rows = []
        for tensor in self._probe_tensors():
            has_planes = tensor.shape[0] == 2 and tensor.shape[1] % count == 0
            by_block = tensor.movedim(1, 0) if has_planes else tensor
            if by_block.shape[0] % count:
                raise ValueError(f"a KV cache of shape {list(tensor.shape)} does not hold {count} blocks")
            kernel = by_block.shape[0] // count
            numbers = [block * kernel + at for block in blocks for at in range(kernel)]
            index = torch.tensor(numbers, device=tensor.device)
            chosen = by_block.index_select(0, index).contiguous()
            rows.append(chosen.view(torch.uint8).reshape(len(blocks), -1))
        return rows
