"""The raw link: how fast pinned memory goes to the GPU and back. Prints JSON; numbers are GB/s, null without a GPU."""

from __future__ import annotations

import json

import torch

_BYTES = 1 << 30
_REPEATS = 8


def main() -> None:
    """Measures and prints."""
    if not torch.cuda.is_available():
        print(json.dumps({"link_h2d_gbps": None, "link_d2h_gbps": None}))
        return
    host = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_BYTES, dtype=torch.uint8, device="cuda")
    rates = {}
    for name, target, source in (("link_h2d_gbps", device, host), ("link_d2h_gbps", host, device)):
        times = []
        for _ in range(_REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        rates[name] = round(_BYTES / sorted(times)[_REPEATS // 2] / 1e6, 2)
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
