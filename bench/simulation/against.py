"""Predictions beside what `bench compare` has measured: the same load, topologies and targets."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.bench.arrivals import BenchError
from pdserve.bench.figures import Figures
from pdserve.bench.reference import ANSWERS, CONTEXT, PROMPT, Pace, mean
from pdserve.bench.report import Table
from pdserve.bench.simulation.profile import TYPICAL, Profile
from pdserve.bench.simulation.search import Search, latencies
from pdserve.bench.topology import Topology
from pdserve.bench.verdict import METRICS, Cell, at, goodput, goodput_noise, median, topologies_of

CLOSE = 0.15
"""A prediction of goodput that is no further off is called good."""
_TARGETS = {"slo_ttft_ms": "ttft_ms", "slo_itl_ms": "itl_ms"}
_COMPARED = {"TTFT p50": ("ttft", "p50"), "TTFT p90": ("ttft", "p90"),
             "TPOT p50": ("tpot", "p50"), "TPOT p90": ("tpot", "p90")}  # fmt: skip


def take_over(args: argparse.Namespace, folder: Path, workers: int) -> list[Cell]:
    """Set the options as those of the comparison in `folder`, whose machine had so many workers;
    returns its cells. Raises BenchError."""
    try:
        content = json.loads((folder / "comparison.json").read_text())
        cells = [_cell(row) for row in content["cells"]]
        name = f"{cells[0].topology}-round1-rate{cells[0].rate:g}.json"
        settings: dict[str, Any] = json.loads((folder / name).read_text())["settings"]
        for option, name in _TARGETS.items():
            settings[option] = content["slo"][name] or math.inf
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"--against: {folder} is no folder of `bench compare`: {error}.") from None
    for name in topologies_of(cells):
        if Topology.parse(name).workers != workers:
            raise BenchError(
                f"--against: the workers of {name} shared one machine, as the {workers} of the "
                f"profile do; make one with `pdserve bench profile --workers "
                f"{Topology.parse(name).workers}`."
            )
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
    pace = {name: math.nan if value is None else value for name, value in row["pace"].items()}
    return Cell(**{**row, "figures": Figures(**figures), "pace": Pace(**pace)})


def paced(profile: Profile, cells: Sequence[Cell]) -> dict[tuple[Topology, float], Profile]:
    """The profile as it would have been at each topology and rate, by what the reference load took
    there: the machine is not always equally fast. Empty if nobody knows."""
    found = {}
    for name, rate in {(cell.topology, cell.rate): None for cell in cells}:
        topology = Topology.parse(name)
        there = mean(cell.pace for cell in at(cells, name, rate))
        ours = reference_pace(profile, topology)
        if not math.isnan(there.gap_s):
            steps, prompts = there.gap_s / ours.gap_s, there.prompt_s / ours.prompt_s
            found[topology, rate] = profile.at_pace(steps, prompts)
    return found


def reference_pace(profile: Profile, topology: Topology) -> Pace:
    """What the reference load takes by the profile."""
    answering = topology.decode + topology.colocated
    times = profile.paces()[min(answering, profile.workers) - 1]
    return Pace(times.decode_s(ANSWERS, ANSWERS * CONTEXT), profile.prompt_s(PROMPT, profile.alone))


def verdict(
    search: Search, cells: Sequence[Cell], profile: Profile,
    paced: Mapping[tuple[Topology, float], Profile],
) -> str:  # fmt: skip
    """How far the predicted goodputs are from the measured ones. `paced`: what the search has used
    instead of `profile`."""
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
    band = goodput_noise(cells)
    noise = "" if math.isnan(band) else f" What was measured twice differs by {band:.0%}."
    factors = [
        one.beside.decode_s(*TYPICAL) / profile.beside.decode_s(*TYPICAL) for one in paced.values()
    ]
    if factors:
        noise += (
            f" The machine's steps took {min(factors):.2f} to {max(factors):.2f} times as long as "
            "in the profile, by a small load beside each run; the predictions know that."
        )
    return f"Predicted and measured goodput are {judged}: {'; '.join(parts)}.{noise}"


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
