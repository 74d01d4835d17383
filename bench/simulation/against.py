"""Predictions beside what `bench compare` has measured: the same load, topologies and targets."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdserve.bench.arrivals import BenchError
from pdserve.bench.figures import Figures
from pdserve.bench.report import Table
from pdserve.bench.simulation.search import Search, latencies
from pdserve.bench.topology import Topology
from pdserve.bench.verdict import METRICS, Cell, at, goodput, median, topologies_of

CLOSE = 0.15
"""A prediction of goodput that is no further off is called good."""
_TARGETS = {"slo_ttft_ms": "ttft_ms", "slo_itl_ms": "itl_ms"}
_COMPARED = {"TTFT p50": ("ttft", "p50"), "TTFT p90": ("ttft", "p90"),
             "TPOT p50": ("tpot", "p50"), "TPOT p90": ("tpot", "p90")}  # fmt: skip


def take_over(args: argparse.Namespace, folder: Path) -> list[Cell]:
    """Set the options as those of the comparison in `folder`; returns its cells. Raises
    BenchError."""
    try:
        content = json.loads((folder / "comparison.json").read_text())
        cells = [_cell(row) for row in content["cells"]]
        name = f"{cells[0].topology}-round1-rate{cells[0].rate:g}.json"
        settings: dict[str, Any] = json.loads((folder / name).read_text())["settings"]
        for option, name in _TARGETS.items():
            settings[option] = content["slo"][name] or math.inf
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"--against: {folder} is no folder of `bench compare`: {error}.") from None
    settings["vocab"] = tuple(settings["vocab"])
    settings["rates"] = " ".join(f"{rate:g}" for rate in content["rates"])
    for option in vars(args).keys() & settings.keys() - {"out", "model"}:
        setattr(args, option, settings[option])
    args.trace = args.trace if args.trace not in (None, "None") else None
    return cells


def _cell(row: dict[str, Any]) -> Cell:
    figures: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in row["figures"].items()
    }
    return Cell(**{**row, "figures": Figures(**figures)})


def verdict(search: Search, cells: Sequence[Cell]) -> str:
    """How far the predicted goodputs are from the measured ones, in a sentence."""
    parts, worst = [], 0.0
    for name in topologies_of(cells):
        ours, theirs = search.goodput(Topology.parse(name)), goodput(cells, name)
        part = f"{name} {ours}, measured {theirs}"
        if ours.rate and theirs.rate and not (ours.at_least or theirs.at_least):
            off = ours.rate / theirs.rate - 1
            worst = max(worst, abs(off))
            part += f" ({off:+.0%})"
        elif (ours.rate, ours.at_least) != (theirs.rate, theirs.at_least):
            worst = math.inf
        parts.append(part)
    judged = (
        f"within {CLOSE:.0%}" if worst <= CLOSE
        else f"not within {CLOSE:.0%}" if math.isfinite(worst)
        else "not comparable: one of them lies outside of the rates"
    )  # fmt: skip
    return f"Predicted and measured goodput are {judged}: {'; '.join(parts)}."


def table(search: Search, cells: Sequence[Cell]) -> Table:
    """Each figure, predicted and measured."""
    rows = [["figure", "topology", "requests/s", "predicted", "measured", "off"]]
    metrics = {metric.name: metric for metric in METRICS}
    for name in topologies_of(cells):
        for rung in search.rungs[Topology.parse(name)]:
            found = latencies(rung.outcome)
            for title, (column, share) in _COMPARED.items():
                ours = found[column][share]
                theirs = median(at(cells, name, rung.rate), metrics[title])
                off = f"{ours / theirs - 1:+.0%}" if theirs else ""
                rows.append([f"{title} ms", name, f"{rung.rate:g}", f"{ours:.1f}",
                             f"{theirs:.1f}", off])  # fmt: skip
    return rows
