"""What `pdserve bench peers` says: ours against theirs, and how far steps are from the limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""One side, workload and round: these three and the COLUMNS."""
COLUMNS = ("output tok/s", "TTFT p50", "TPOT p50")
BLOCK_BYTES = 256 << 20
"""Beyond every cache."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sides on equal cores."""

    ours: str
    theirs: str
    goal: float
    """Ours is to put out so many times what theirs does, its first token no later."""


PAIRS = (Pair("pdserve 1P+1D", "vLLM 1P1D", 2.0), Pair("pdserve 1C", "vLLM", 1.2))


def table(rows: Sequence[Row], limits_ms: Mapping[str, float]) -> str:
    """Medians of rounds, the ratio of ours to theirs in the same round (median, least to most), and
    how many times as long as the limit a token takes. limits_ms: side → least time of a step."""
    head = ["workload", "side", "output tok/s", "TTFT p50 ms", "TPOT p50 ms", "TPOT / limit"]
    lines = [head, ["---", "---", *["---:"] * 4]]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        here = [row for row in rows if row["workload"] == workload]
        for side in dict.fromkeys(row["side"] for row in here):
            values = [median(here, side, name) for name in COLUMNS]
            times = values[-1] / limits_ms[side] if side in limits_ms else 0.0
            lines.append([workload, side, *(f"{value:.1f}" for value in values),
                          f"{times:.1f}" if times else ""])  # fmt: skip
        for pair in PAIRS:
            found = [ratio(here, pair, name) for name in COLUMNS]
            if all(found):
                texts = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in found]
                lines.append([workload, f"{pair.ours} / {pair.theirs}", *texts, ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentences(rows: Sequence[Row], limits_ms: Mapping[str, float]) -> list[str]:
    """Which goals are reached, the most important first."""
    found = []
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    for pair in PAIRS:
        parts, reached = [], True
        for workload in workloads:
            here = [row for row in rows if row["workload"] == workload]
            output, ttft = (ratio(here, pair, name) for name in COLUMNS[:2])
            if output:
                more, later = statistics.median(output), statistics.median(ttft)
                reached = reached and more >= pair.goal and later <= 1.0
                parts.append(f"{more:.2f} times at {workload} (first token {later:.2f})")
        if parts:
            goal = f"the goal, {pair.goal:g} times and no later first token, is "
            found.append(
                f"{pair.ours} puts out, against {pair.theirs} on the same cores: "
                f"{', '.join(parts)}; {goal}{'reached' if reached else 'missed'}."
            )
    if limits_ms:
        each = ", ".join(f"{side} {limit:.2f} ms" for side, limit in limits_ms.items())
        found.append(
            "The limit of a decode step is the time to read all weights once at the bandwidth of "
            f"the cores that decode, measured now: {each}. TPOT over that is what remains; it "
            "holds prompts computed meanwhile, too."
        )
    return found


def median(rows: Sequence[Row], side: str, name: str) -> float:
    return float(statistics.median(row[name] for row in rows if row["side"] == side))


def ratio(rows: Sequence[Row], pair: Pair, name: str) -> list[float]:
    """Ours over theirs, per round in which both ran."""
    mine = {row["round"]: row[name] for row in rows if row["side"] == pair.ours}
    other = {row["round"]: row[name] for row in rows if row["side"] == pair.theirs}
    return [mine[number] / other[number] for number in sorted({*mine} & {*other})]


def step_limit_ms(model: Path, cores: int) -> float:
    """Bytes of the weights over the bandwidth at which so many cores read memory, in ms."""
    import torch  # heavy, and needed for nothing else here

    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    block = torch.ones(BLOCK_BYTES // 4, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        best = min(_timed(block.sum) for _ in range(10))
    finally:
        torch.set_num_threads(before)
    return weights / (BLOCK_BYTES / best) * 1e3


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
