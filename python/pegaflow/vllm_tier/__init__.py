"""PegaFlow as a secondary tier of vLLM's own offloading (`TieringOffloadingSpec`), below its tier in host memory.

`{"type": "PegaTier", "module_path": "pegaflow.vllm_tier", "path": "/mnt/nvme/tier", "nvme": "512GiB"}` among the
`secondary_tiers`, or `"address"` of a server in place of `path`. `PegaKVConnector` needs none of this.
"""

from pegaflow.vllm_tier.tier import PegaTier

__all__ = ["PegaTier"]
