"""Pictures of a search and of a run, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pdserve.bench.figures import ATTAINED, Slo
from pdserve.bench.plots import SIZE, png, pyplot
from pdserve.bench.simulation.cluster import Outcome
from pdserve.bench.simulation.search import Search, splits
from pdserve.bench.simulation.words import FACTORS, Duel
from pdserve.bench.topology import Topology

MOST_LINES = 8


def goodputs(duel: Duel, shown: dict[Topology, str]) -> bytes:
    """Goodput of every split, beside the colocated one's."""
    plt = pyplot()
    search = duel.search
    figure, side = plt.subplots(figsize=SIZE)
    ours = splits(search.rungs)
    labels = [shown[one] for one in ours]
    values = [search.goodput(one).rate for one in ours]
    colors = ["C0" if one == duel.split else "C7" for one in ours]
    side.bar(labels, values, color=colors)
    level = search.goodput(duel.colocated).rate
    side.axhline(level, color="C1", label=f"{shown[duel.colocated]}: {level:.3g}")
    side.set(title="Goodput of each split", ylabel="requests/s")
    side.tick_params(axis="x", labelrotation=60 if len(ours) > 4 else 0)
    side.legend()
    return png(plt, figure)


def attainment(search: Search, slo: Slo, shown: dict[Topology, str]) -> bytes:
    plt = pyplot()
    figure, side = plt.subplots(figsize=SIZE)
    order = sorted(search.rungs, key=lambda one: -search.goodput(one).rate)
    kept = order[:MOST_LINES] + [one for one in order[MOST_LINES:] if one.colocated]
    for topology in kept:
        rungs = search.rungs[topology]
        line = "--" if topology.colocated else "-"
        shares = [100 * rung.attainment(slo) for rung in rungs]
        side.plot([rung.rate for rung in rungs], shares, line, marker="o", label=shown[topology])
    side.axhline(100 * ATTAINED, color="grey", linewidth=0.8, linestyle=":")
    side.set(title="Requests that met both targets", xlabel="requests/s", ylabel="%", ylim=(0, 103))
    side.legend(fontsize="small")
    return png(plt, figure)


def map_of(duel: Duel, shown: dict[Topology, str]) -> bytes:
    """Who serves more, under which targets."""
    plt = pyplot()
    figure, side = plt.subplots(figsize=SIZE)
    cells = [[_clip(duel.at(duel.scaled(ttft, itl))) for itl in FACTORS] for ttft in FACTORS]
    image = side.imshow(cells, cmap="RdBu", vmin=-0.5, vmax=0.5, origin="lower", aspect="auto")
    side.set_xticks(range(len(FACTORS)), [f"{duel.slo.itl_ms * f:.0f}" for f in FACTORS])
    side.set_yticks(range(len(FACTORS)), [f"{duel.slo.ttft_ms * f:.0f}" for f in FACTORS])
    asked = FACTORS.index(1.0)
    side.plot(asked, asked, "k+", markersize=12)
    side.set(
        title=f"Blue: {shown[duel.split]} serves more; red: {shown[duel.colocated]}",
        xlabel="target between tokens, ms (+: asked for; empty: neither serves)",
        ylabel="target for the first token, ms",
    )
    bar = figure.colorbar(image, ax=side)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    return png(plt, figure)


def _clip(change: float) -> float:
    return change if math.isnan(change) else max(-0.5, min(0.5, change))


def hour(runs: Sequence[tuple[str, Outcome]]) -> bytes:
    """Requests under way over the time of a run."""
    plt = pyplot()
    figure, side = plt.subplots(figsize=SIZE)
    for number, (title, run) in enumerate(runs):
        minutes = [second / 60 for second, _, _ in run.logbook]
        color = f"C{number}"
        side.plot(minutes, [wait for _, wait, _ in run.logbook], color=color,
                  label=f"{title}: waiting for the first token")  # fmt: skip
        side.plot(minutes, [decode for _, _, decode in run.logbook], "--", color=color,
                  label=f"{title}: being answered")  # fmt: skip
    side.set(title="Requests under way", xlabel="minutes of the trace", ylim=(0, None))
    side.legend(fontsize="small")
    return png(plt, figure)
