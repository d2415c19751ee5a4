"""What the story saw, as rows, a table, a file and a verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The share of full blocks that a restarted engine must find again.
HIT_RATIO_MIN = 0.95


@dataclass(frozen=True)
class Row:
    """One prompt in one phase."""

    phase: str
    # Whether both vLLM and the server were killed and started anew since the prompt was last seen.
    is_restart_warm: bool
    prompt: str
    prompt_tokens: int
    could_hit_tokens: int
    # Those of them that no earlier request of this phase brought into vLLM's own cache.
    only_in_store_tokens: int
    cached_tokens: int
    # Where the cached tokens lay, by tier: gpu (vLLM's own), dram and nvme (PegaFlow's). Prompts that were sent at one
    # moment are counted together, in the first one's row; the others have none.
    tiers: dict[str, int] | None
    ttft_ms: float | None
    same_tokens: bool

    @property
    def is_hit(self) -> bool:
        """Whether tokens were cached; some of them by PegaFlow, if they could be nowhere else."""
        if self.cached_tokens == 0:
            return False
        if self.tiers is None or self.only_in_store_tokens == 0:
            return True
        return any(tokens for tier, tokens in self.tiers.items() if tier != "gpu")


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """The machine-readable outcome: whether every restart-warm prompt hit, whether all tokens are those of plain
    vLLM, and which share of the full blocks that could hit did."""
    warm = [row for row in rows if row.is_restart_warm]
    could = sum(row.could_hit_tokens for row in warm)
    hit = sum(min(row.cached_tokens, row.could_hit_tokens) for row in warm)
    missed = [f"{row.phase}: {row.prompt}" for row in warm if not row.is_hit]
    different = [f"{row.phase}: {row.prompt}" for row in rows if not row.same_tokens]
    tiers: dict[str, int] = {}
    for row in warm:
        for tier, tokens in (row.tiers or {}).items():
            tiers[tier] = tiers.get(tier, 0) + tokens
    return {
        "restart_warm": bool(warm) and not missed,
        "tokens_equal": bool(rows) and not different,
        "hit_ratio_after_restart": round(hit / could, 4) if could else 0.0,
        "prompts": len(rows),
        "restart_warm_prompts": len(warm),
        "restart_warm_tokens_by_tier": tiers,
        "missed": missed,
        "different": different,
    }


def passed(outcome: dict[str, Any]) -> bool:
    """Whether the story ended as it must."""
    return bool(
        outcome["restart_warm"] and outcome["tokens_equal"] and outcome["hit_ratio_after_restart"] >= HIT_RATIO_MIN
    )


def table(rows: Sequence[Row]) -> str:
    """The rows for people, one table for each phase."""
    lines: list[str] = []
    phase = None
    for row in rows:
        if row.phase != phase:
            phase = row.phase
            lines.append(f"\n{phase}")
            lines.append(
                f"  {'prompt':<34}{'tokens':>7}{'cached':>8}{'of':>6}  {'from':<28}{'TTFT ms':>9}  same tokens"
            )
        parts = [f"{tier} {tokens}" for tier, tokens in (row.tiers or {}).items() if tokens]
        tiers = " + ".join(parts) or ("-" if row.tiers is not None else "(with the one above)")
        ttft = f"{row.ttft_ms:.1f}" if row.ttft_ms is not None else "-"
        same = "yes" if row.same_tokens else "NO"
        lines.append(
            f"  {row.prompt:<34}{row.prompt_tokens:>7}{row.cached_tokens:>8}{row.could_hit_tokens:>6}"
            f"  {tiers:<28}{ttft:>9}  {same}"
        )
    return "\n".join(lines)


def write(path: Path, rows: Sequence[Row], outcome: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes everything to `path`, replacing what was there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    content = {**outcome, "about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
