"""`pdserve bench diff A.json B.json`: two stored runs side by side.

Refused if their settings or machines differ in anything but the topology, the server's address and
what was said with --ignore: such a difference says nothing about topologies.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.bench.arrivals import BenchError
from pdserve.bench.serve import EXIT_USAGE, FORMAT

FREE = frozenset({"topology", "url", "label"})
SAME = ("commit", "python", "versions", "cpu", "cores", "memory_gib", "gpu")
"""Of the circumstances, what must be equal."""


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], ignored: frozenset[str] = frozenset()
) -> dict[str, tuple[Any, Any]]:
    """What two results were measured with, where it differs: name → both values."""
    both = [
        {**run["settings"], **{n: run["circumstances"][n] for n in SAME}} for run in (one, other)
    ]
    names = sorted({*both[0], *both[1]} - FREE - ignored)
    pairs = {name: (both[0].get(name), both[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def load(path: Path) -> dict[str, Any]:
    """Raises BenchError."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BenchError(f"{path} is no result of `pdserve bench` ({FORMAT}).")
    return content


def rows_of(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figure → value, latencies as "ttft p50"; unknown ones as NaN."""
    flat = {name: value for name, value in figures.items() if name != "latencies"}
    for title, row in figures["latencies"].items():
        flat |= {f"{title} {share}": value for share, value in row.items()}
    return {name: math.nan if value is None else float(value) for name, value in flat.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdserve bench diff", description=__doc__)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--ignore", nargs="*", default=[], help="settings that may differ")
    args = parser.parse_args(argv)
    try:
        one, other = load(args.one), load(args.other)
        found = differences(one, other, frozenset(args.ignore))
        if found:
            listed = "; ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in found.items())
            raise BenchError(f"These runs cannot be compared, they differ in {listed}.")
    except BenchError as error:
        print(f"pdserve bench diff: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    mine, theirs = rows_of(one["figures"]), rows_of(other["figures"])
    print(f"{'':20}{args.one.stem[:18]:>20}{args.other.stem[:18]:>20}{'ratio':>8}")
    for name, value in mine.items():
        ratio = theirs[name] / value if value else math.nan
        print(f"{name:20}{value:20.2f}{theirs[name]:20.2f}{ratio:8.2f}")
    for run, path in ((one, args.one), (other, args.other)):
        if run["client_limited"]:
            print(f"{path.stem}: {run['client_limited']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
