"""Pictures of a comparison, as PNG."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdserve.bench.arrivals import BenchError
from pdserve.bench.figures import ATTAINED, Slo
from pdserve.bench.phases import PHASES, phases_of
from pdserve.bench.verdict import METRICS as ALL_METRICS
from pdserve.bench.verdict import Cell, at, mean_of, median, rates_of, topologies_of

SIZE = (7.0, 4.0)
DPI = 110
TIMELINE_ROWS = 24
METRICS = {metric.name: metric for metric in ALL_METRICS}


def pyplot() -> Any:
    """matplotlib's drawing module, without a screen. Raises BenchError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise BenchError("Plots need matplotlib: pip install 'pdserve[bench]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def png(plt: Any, figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, dpi=DPI, format="png")
    plt.close(figure)
    return buffer.getvalue()


def latency(cells: Sequence[Cell], slo: Slo) -> bytes:
    """TTFT and ITL, p50 and p90, against the rate."""
    plt = pyplot()
    figure, sides = plt.subplots(1, 2, figsize=(SIZE[0] * 1.4, SIZE[1]))
    for side, name, target in ((sides[0], "TTFT", slo.ttft_ms), (sides[1], "ITL", slo.itl_ms)):
        for number, topology in enumerate(topologies_of(cells)):
            for share, line in (("p50", "-"), ("p90", "--")):
                metric = METRICS[f"{name} {share}"]
                rates = rates_of(cells)
                values = [median(at(cells, topology, rate), metric) for rate in rates]
                label = f"{topology} {share}"
                side.plot(rates, values, line, marker="o", color=f"C{number}", label=label)
        side.axhline(target, color="grey", linewidth=0.8, linestyle=":")
        side.set(title=f"{name} (dotted: target)", xlabel="requests/s", ylabel="ms", yscale="log")
        side.yaxis.set_major_formatter("{x:g}")
        side.yaxis.set_minor_formatter("{x:g}")
        side.legend(fontsize="small")
    return png(plt, figure)


def attainment(cells: Sequence[Cell]) -> bytes:
    """Share of requests that met both targets, against the rate."""
    plt = pyplot()
    figure, side = plt.subplots(figsize=SIZE)
    metric = METRICS["attainment"]
    for topology in topologies_of(cells):
        rates = rates_of(cells)
        shares = [100 * median(at(cells, topology, rate), metric) for rate in rates]
        side.plot(rates, shares, marker="o", label=topology)
    side.axhline(100 * ATTAINED, color="grey", linewidth=0.8, linestyle=":")
    side.set(title="Requests that met both targets", xlabel="requests/s", ylabel="%", ylim=(0, 103))
    side.legend()
    return png(plt, figure)


def breakdown(cells: Sequence[Cell]) -> bytes:
    """Mean time per phase, one bar per topology and rate."""
    plt = pyplot()
    names, rates = topologies_of(cells), rates_of(cells)
    figure, side = plt.subplots(figsize=(SIZE[0], 1.2 + 0.4 * len(names) * len(rates)))
    labels = [f"{name} at {rate:g}/s" for rate in rates for name in names]
    rows = [
        mean_of([cell.phases for cell in at(cells, name, rate)]) for rate in rates for name in names
    ]
    left = [0.0] * len(rows)
    for phase in PHASES:
        widths = [1e3 * row.get(phase, 0.0) for row in rows]
        side.barh(labels, widths, left=left, label=phase)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    side.invert_yaxis()
    side.set(title="Where a mean request's time goes", xlabel="ms")
    side.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(plt, figure)


def timeline(files: Sequence[tuple[str, Path]]) -> bytes:
    """The same requests under each topology, phase by phase. files: title, result of one run."""
    plt = pyplot()
    size = (SIZE[0] * 0.8 * len(files), SIZE[1] * 1.3)
    figure, sides = plt.subplots(
        1, len(files), figsize=size, sharey=True, sharex=True, squeeze=False
    )
    for side, (title, path) in zip(sides[0], files, strict=True):
        records = json.loads(path.read_text())["records"][:TIMELINE_ROWS]
        for row, record in enumerate(records):
            if record["timings"] is None:
                continue
            begin = record["due"]
            for phase, spent in phases_of(record["timings"]).items():
                color = f"C{PHASES.index(phase)}"
                label = phase if row == 0 else None
                side.barh(row, spent, left=begin, color=color, height=0.8, label=label)
                begin += spent
        side.set(title=title, xlabel="s")
    sides[0][0].set_ylabel("request")
    sides[0][0].invert_yaxis()  # the others share it
    sides[0][-1].legend(fontsize="small", loc="lower right")
    return png(plt, figure)
