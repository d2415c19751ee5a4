"""A way to name the tier in vLLM 0.26 and 0.27, whose factory of tiers takes no `module_path`."""

from __future__ import annotations

from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class PegaTieringSpec(TieringOffloadingSpec):
    """vLLM's own `TieringOffloadingSpec`, which knows the type `PegaTier`."""


if "PegaTier" not in SecondaryTierFactory._registry:
    SecondaryTierFactory.register_tier("PegaTier", "pegaflow.vllm_tier", "PegaTier")
