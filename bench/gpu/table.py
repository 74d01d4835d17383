"""The short table at the end of check.sh: what was to be reached, what was, and whether it is.

    python -P bench/gpu/table.py RESULTS

RESULTS holds what the steps left: kernels-DTYPE-GROUP.json, decode-*.json, and `notes`, a line
"step <tab> yes or no <tab> what it said" for each step. Exit code 1 if anything is missed, 0 if
all of it is reached; what was not measured is neither.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REACHED, MISSED, NOT_MEASURED = "reached", "MISSED", "not measured"
MEMORY_BOUND = (
    *("rms_norm", "fused_add_rms_norm", "silu_and_mul", "gelu_and_mul"),
    *("rope ", "rope_and_store_kv", "gather_blocks", "scatter_blocks"),
)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    what: str
    target: str
    reached: str
    verdict: str


def main() -> None:
    folder = Path(sys.argv[1])
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    kernels = {name: found for name, found in files.items() if name.startswith("kernels-")}
    rows = [row for found in kernels.values() for row in found["results"]]
    large = [
        row
        for name, found in kernels.items()
        if "-bfloat16-" in name and "-small-" not in name
        for row in found["results"]
    ]
    lines = [
        *launches(kernels),
        *speed(large),
        *graphs(files),
        *errors(kernels, rows),
        *notes(folder / "notes"),
    ]
    print(f"{'what':52} {'target':>18} {'reached':>24}  verdict")
    for line in lines:
        print(f"{line.what:52} {line.target:>18} {line.reached:>24}  {line.verdict}")
    sys.exit(any(line.verdict == MISSED for line in lines))


def launches(kernels: dict[str, Any]) -> Iterator[Line]:
    """The part of every other time that a launch takes which does nothing: the median process's."""
    found = sorted(group["launch_us"] for group in kernels.values() if "launch_us" in group)
    if found:
        yield Line(
            "a launch that does nothing", "-", f"{found[len(found) // 2]:.1f} us", "measured"
        )


def speed(rows: list[Row]) -> Iterator[Line]:
    """The targets of single operations, in bfloat16 at the large sizes."""

    def one(
        name: str, target: str, shown: Callable[[Row], str], good: Callable[[Row], bool]
    ) -> Line:
        found = [row for row in rows if row["name"] == name]
        if not found:
            return Line(name, target, "-", NOT_MEASURED)
        return Line(name, target, shown(found[0]), REACHED if good(found[0]) else MISSED)

    yield one(
        "attention_decode 64 x 4096",
        ">= 80 % of a copy",
        lambda row: f"{row['share']:.0%}",
        lambda row: row["share"] >= 0.80,
    )
    for prompt in (4096, 16384):
        yield one(
            f"attention_prefill {prompt}",
            ">= 0.75 x torch",
            lambda row: f"{row['torch_ratio']:.2f} x",
            lambda row: row["torch_ratio"] >= 0.75,
        )
    for filters in ("", " top-k 50, top-p 0.9"):
        yield one(
            f"sample 64 x 151936{filters}",
            "< 100 us",
            lambda row: f"{row['microseconds']:.0f} us",
            lambda row: row["microseconds"] < 100,
        )
    moving = [row for row in rows if row["name"].startswith(MEMORY_BOUND)]
    for row in moving:
        if " by " in row["name"]:  # one of two ways, of which the chosen one has a row of its own
            yield Line(row["name"], "-", f"{row['share']:.0%}", "measured")
            continue
        yield Line(
            row["name"],
            ">= 85 % of a copy",
            f"{row['share']:.0%}",
            REACHED if row["share"] >= 0.85 else MISSED,
        )
    if not moving:
        yield Line("operations bound by memory", ">= 85 % of a copy", "-", NOT_MEASURED)


def graphs(files: dict[str, Any]) -> Iterator[Line]:
    """Decode steps under CUDA graphs; the issue names a limit for the first one only."""
    found = [row for name, rows in files.items() if name.startswith("decode-") for row in rows]
    limited = "decode step qwen3-8b x 36 layers, batch 1"
    for row in found:
        shown = f"{row['ratio']:.2f} x ({row['milliseconds']:.2f} ms)"
        if row["name"] == limited:
            yield Line(
                limited, "<= 1.25 x weights", shown, REACHED if row["ratio"] <= 1.25 else MISSED
            )
        else:
            yield Line(row["name"], "-", shown, "measured")
    if not any(row["name"] == limited for row in found):
        yield Line(limited, "<= 1.25 x weights", "-", NOT_MEASURED)


def errors(kernels: dict[str, Any], rows: list[Row]) -> Iterator[Line]:
    """Everything against its reference, dtype by dtype, and what did not run at all."""
    for dtype in ("bfloat16", "float16", "float32"):
        mine = [
            row
            for name, found in kernels.items()
            if found["dtype"] == dtype
            for row in found["results"]
            if row["error"] is not None
        ]
        target = f"within {mine[0]['tolerance']:.0e}" if mine else "within tolerance"
        wrong = [row["name"] for row in mine if not row["error"] <= row["tolerance"]]
        shown = f"{len(mine) - len(wrong)} of {len(mine)}"
        verdict = NOT_MEASURED if not mine else MISSED if wrong else REACHED
        yield Line(f"results in {dtype} against the references", target, shown, verdict)
        for name in wrong:
            yield Line(f"  {name} ({dtype})", target, "", MISSED)
    for name, found in kernels.items():
        for failure in found["failures"]:
            yield Line(f"{failure['name']} ({name})", "runs", failure["reason"][:80], MISSED)


def notes(path: Path) -> Iterator[Line]:
    for text in path.read_text().splitlines() if path.exists() else ():
        step, done, said = text.split("\t", 2)
        verdict = {"yes": REACHED, "no": MISSED}.get(done, NOT_MEASURED)
        yield Line(step, "works", said[:120], verdict)


if __name__ == "__main__":
    main()
