"""A comparison as something that people read: Markdown, plots, and one HTML page with all of it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.bench import plots
from pdserve.bench.figures import Slo
from pdserve.bench.phases import PHASES
from pdserve.bench.verdict import (
    METRICS,
    Cell,
    at,
    goodput,
    mean_of,
    median,
    noise,
    rates_of,
    relative,
    topologies_of,
)

SHOWN = ("output", "attainment", "TTFT p50", "TTFT p90", "ITL p50", "ITL p90", "end to end p50",
         "worst gaps p90")  # fmt: skip
"""Metrics of the short table; the page has all of them."""
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:14px}td,th{border:1px solid #ccc;padding:.2em .6em;"
    "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)

Table = list[list[str]]


def write(
    folder: Path, cells: Sequence[Cell], slo: Slo, workload: str, content: Mapping[str, Any]
) -> str:
    """Write table.md, the plots and report.html into the folder; returns text for a terminal."""
    rate = rates_of(cells)[-1]
    runs = [
        (f"{name} at {rate:g}/s", folder / f"{name}-round1-rate{rate:g}.json")
        for name in topologies_of(cells)
    ]
    pictures = {
        "attainment": plots.attainment(cells),
        "latency": plots.latency(cells, slo),
        "phases": plots.breakdown(cells),
        "timeline": plots.timeline(runs),
    }
    tables = {
        "Goodput": _goodput(cells),
        "Figures": _figures(cells, SHOWN),
        "Phases": _phases(cells),
        "Processes": _processes(cells),
    }
    more = {"All figures": _figures(cells, [metric.name for metric in METRICS])}
    title = f"pdserve: {workload}"
    return write_page(
        folder, title, f"Which topology for {workload}?", content, pictures, tables, more
    )


def write_page(
    folder: Path,
    title: str,
    question: str,
    content: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    tables: Mapping[str, Table],
    more: Mapping[str, Table] | None = None,
) -> str:
    """Write the pictures, table.md and report.html (with `more` tables) into the folder; returns
    text for a terminal. content: verdict (the most important sentence first), command,
    circumstances."""
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    sections = [f"## {name}\n\n{_markdown(rows)}" for name, rows in tables.items()]
    markdown = "\n\n".join([*content["verdict"], *sections])
    (folder / "table.md").write_text(markdown + "\n")
    page = _page(title, question, content, pictures, {**tables, **(more or {})})
    (folder / "report.html").write_text(page, encoding="utf-8")
    return f"{markdown}\n\nreport: {folder / 'report.html'}"


def _goodput(cells: Sequence[Cell]) -> Table:
    rows = [["topology", "goodput", *(f"met at {rate:g}/s" for rate in rates_of(cells))]]
    attained = next(metric for metric in METRICS if metric.name == "attainment")
    names = topologies_of(cells)
    again = [(names[0], True)] if any(cell.twin for cell in cells) else []
    for name, twin in [*((name, False) for name in names), *again]:
        shares = [median(at(cells, name, rate, twin=twin), attained) for rate in rates_of(cells)]
        title = f"{name} again" if twin else name
        found = str(goodput(cells, name, twin=twin))
        rows.append([title, found, *(f"{share:.0%}" for share in shares)])
    return rows


def _figures(cells: Sequence[Cell], names: Sequence[str]) -> Table:
    """Medians over rounds; each difference to the first topology beside the noise."""
    base, *others = topologies_of(cells)
    heads = [head for name in others for head in (name, f"against {base}")]
    rows = [["figure", "requests/s", base, *heads, "noise"]]
    for metric in (metric for metric in METRICS if metric.name in names):
        band = noise(cells, metric)
        for rate in rates_of(cells):
            first = median(at(cells, base, rate), metric)
            row = [f"{metric.name} {metric.unit}".strip(), f"{rate:g}", f"{first:.2f}"]
            for name in others:
                value = median(at(cells, name, rate), metric)
                row += [f"{value:.2f}", f"{relative(value, first):+.0%}"]
            rows.append([*row, f"±{band:.0%}"])
    return rows


def _phases(cells: Sequence[Cell]) -> Table:
    rows = [["ms of a mean request", *PHASES]]
    for rate in rates_of(cells):
        for name in topologies_of(cells):
            spent = mean_of([cell.phases for cell in at(cells, name, rate)])
            values = [f"{spent[phase] * 1e3:.1f}" if spent else "-" for phase in PHASES]
            rows.append([f"{name} at {rate:g}/s", *values])
    return rows


def _processes(cells: Sequence[Cell]) -> Table:
    rows = [["process", "CPU s per run", "peak MiB", "KV MiB moved per run"]]
    for name in topologies_of(cells):
        mine = [cell for cell in cells if cell.topology == name]
        moved = sum(cell.moved_mib for cell in mine) / len(mine)
        for process in mine[0].cpu_s:
            seconds = sum(cell.cpu_s.get(process, 0.0) for cell in mine) / len(mine)
            peak = max(cell.memory_mib.get(process, 0.0) for cell in mine)
            rows.append([f"{name} {process}", f"{seconds:.2f}", f"{peak:.0f}", ""])
        rows.append([f"{name} in all", "", "", f"{moved:.1f}"])
    return rows


def _markdown(rows: Table) -> str:
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _page(
    title: str,
    question: str,
    content: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    tables: Mapping[str, Table],
) -> str:
    first, *more = map(html.escape, content["verdict"])
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    sections = "".join(
        f"<h2>{html.escape(title)}</h2>{_html(rows)}" for title, rows in tables.items()
    )
    about = {"command": " ".join(content["command"]), **content["circumstances"]}
    facts = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in about.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(question)}</h1>"
        f"<p><strong>{first}</strong></p>{''.join(f'<p>{text}</p>' for text in more)}"
        f"{images}{sections}<h2>How it was measured</h2><table>{facts}</table></html>\n"
    )


def _html(rows: Table) -> str:
    head, *body = rows
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in body
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"
