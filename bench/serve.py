"""`pdserve bench serve URL`: load on any OpenAI-compatible server, and what came of it.

Open loop by default: requests arrive when the public would send them, whether or not the server
keeps up. Prompts are token ids on /v1/completions; answers are greedy and of fixed length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from pdserve.bench.arrivals import KINDS, Arrivals, BenchError
from pdserve.bench.client import Run, Server, measure
from pdserve.bench.figures import Figures, Slo, bottleneck, figures
from pdserve.bench.machine import circumstances
from pdserve.bench.workloads import MAKERS, Shape, make

FORMAT = "pdserve-bench/1"
BAR = 30
REDRAW_S = 0.1
EXIT_USAGE, EXIT_FAILED, EXIT_CLIENT = 2, 1, 3


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide a workload and its arrivals."""
    shape, arrivals = Shape(kind="random"), Arrivals(kind="poisson")

    def add(name: str, default: Any, help: str, **more: Any) -> None:
        shown = "" if default is None else f" (default: {default})"
        more.setdefault("type", type(default))
        parser.add_argument(name, default=default, help=help + shown, **more)

    add("--workload", "random", "what is asked", choices=MAKERS)
    add("--requests", shape.requests, "how many requests, at most")
    add("--input-len", shape.input_len, "prompt, in tokens; mean of random")
    add("--output-len", shape.output_len, "answer, in tokens; mean of random")
    add("--spread", shape.spread, "random: lengths are mean × (1 ± this)")
    add("--prefixes", shape.prefixes, "shared-prefix: how many")
    add("--prefix-len", shape.prefix_len, "shared-prefix: their length, in tokens")
    add("--turns", shape.turns, "conversation: requests of each")
    add("--think-s", shape.think_s, "conversation: seconds between answer and next turn")
    add("--trace", None, "whole trace for mooncake-conversation, azure-conv", type=Path)
    add("--length-scale", shape.length_scale, "traces: lengths are divided by this")
    add("--max-len", shape.max_len, "traces: leave out requests of more tokens (0: none)")
    add("--vocab", "10:1000", "FIRST:END of the token ids of prompts", type=_vocab)
    add("--arrivals", None, "how they arrive (default: trace for traces, else poisson)",
        choices=KINDS, type=str)  # fmt: skip
    add("--rate", arrivals.rate, "requests per second; of a ramp, at first")
    add("--rate-to", 10.0, "ramp: requests per second at last")
    add("--burstiness", arrivals.burstiness, "gamma: shape; below 1 is burstier than poisson")
    add("--time-scale", arrivals.time_scale, "trace: its times are multiplied by this")
    add("--concurrency", arrivals.concurrency, "closed: requests at a time")
    add("--seed", 0, "of prompts, lengths and arrivals")
    add("--slo-ttft-ms", math.inf, "target for the first token, in ms")
    add("--slo-itl-ms", math.inf, "target for the mean gap between tokens, in ms")


def load_of(args: argparse.Namespace) -> tuple[Shape, Arrivals, Slo]:
    """Raises BenchError for options that make no sense."""
    names = {field.name for field in dataclasses.fields(Shape)} - {"kind"}
    vocab = _vocab(args.vocab) if isinstance(args.vocab, str) else args.vocab
    given = {**{name: getattr(args, name) for name in names}, "vocab": vocab}
    shape = Shape(kind=args.workload, **given)
    shape.check()
    traced = args.workload in ("mooncake-conversation", "azure-conv")
    kind = args.arrivals or ("trace" if traced else "poisson")
    if kind == "trace" and not traced:
        raise BenchError(f"--arrivals trace needs a workload with times, not {args.workload}.")
    names = {field.name for field in dataclasses.fields(Arrivals)} - {"kind"}
    arrivals = Arrivals(kind=kind, **{name: getattr(args, name) for name in names})
    arrivals.check()
    return shape, arrivals, Slo(ttft_ms=args.slo_ttft_ms, itl_ms=args.slo_itl_ms)


def _vocab(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    return int(first), int(end)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="pdserve bench serve", description=__doc__)
    found.add_argument("url", help="the server, without /v1, such as http://127.0.0.1:8000")
    found.add_argument("--model", default="", help="name to ask for (default: the server's first)")
    found.add_argument("--api-key", default="", help="sent as a bearer token")
    found.add_argument(
        "--timeout", type=float, default=600.0, help="of one request, in s (default: 600)"
    )
    found.add_argument("--label", default="", help="a word for the result file")
    found.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    add_load_options(found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if requests failed; 2 for bad options; 3 if the client was the bottleneck."""
    args = parser().parse_args(argv)
    try:
        shape, arrivals, slo = load_of(args)
        jobs = make(shape)
        server = _server(args)
        bar = ProgressBar(len(jobs))
        run = measure(server, jobs, arrivals, seed=args.seed, progress=bar.show)
        bar.end()
    except BenchError as error:
        print(f"pdserve bench serve: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    found, limited = figures(run, slo), bottleneck(run)
    print(text(found, slo))
    for message in sorted({record.error for record in run.records if record.error})[:5]:
        print(f"failed: {message}", file=sys.stderr)
    if limited:
        print(limited, file=sys.stderr)
    if args.out:
        content = document(run, found, limited, settings_of(args), server.url)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content) + "\n")
        print(f"everything that was measured: {args.out}")
    return EXIT_CLIENT if limited else EXIT_FAILED if found.failed else 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they can be written down: keys stay secret."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("api_key", "out")
    }


def _server(args: argparse.Namespace) -> Server:
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    url = args.url.rstrip("/").removesuffix("/v1")
    model = args.model or served_model(url, headers)
    return Server(url=url, model=model, headers=headers, timeout_s=args.timeout)


def served_model(url: str, headers: Mapping[str, str]) -> str:
    """The first model of the server. Raises BenchError if it does not answer."""
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=10)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        raise BenchError(f"{url}/v1/models does not name a model: {error!r}") from None


def document(
    run: Run, found: Figures, limited: str, settings: Mapping[str, Any], url: str
) -> dict[str, Any]:
    """One run as JSON: the configuration, the machine, the figures and every token's time."""
    return {
        "format": FORMAT,
        "url": url,
        "settings": finite(dict(settings)),
        "circumstances": circumstances(),
        "client_limited": limited,
        "client_cpu_s": run.client_cpu_s,
        "wall_s": run.wall_s,
        "figures": finite(dataclasses.asdict(found)),
        "records": [finite(_rounded(dataclasses.asdict(record))) for record in run.records],
    }


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Microseconds are enough, and the ids of tokens say nothing about time."""
    del record["token_ids"]
    record["token_times"] = [round(moment, 6) for moment in record["token_times"]]
    return record


def finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it, and for what is unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def text(found: Figures, slo: Slo) -> str:
    """The figures for people."""
    lines = [
        f"{found.requests} requests ({found.request_rate:.2f} per second): "
        f"{found.requests - found.failed - found.rejected} answered, {found.rejected} refused for "
        f"want of room, {found.failed} failed",
        f"output {found.output_tok_s:.1f} tok/s, with prompts {found.total_tok_s:.1f} tok/s",
    ]
    if not math.isnan(found.cached_share):
        lines[-1] += f", {found.cached_share:.0%} of prompt tokens from the cache"
    if math.isfinite(min(slo.ttft_ms, slo.itl_ms)):
        lines.append(
            f"{found.attainment:.1%} met TTFT ≤ {slo.ttft_ms:g} ms and mean ITL ≤ {slo.itl_ms:g} "
            f"ms: goodput {found.goodput:.2f} requests/s"
        )
    names = list(next(iter(found.latencies.values())))
    lines.append(f"{'ms':12}" + "".join(f"{name:>10}" for name in names))
    for title, row in found.latencies.items():
        lines.append(f"{title:12}" + "".join(f"{row[name]:10.2f}" for name in names))
    return "\n".join(lines)


class ProgressBar:
    """One line on a terminal; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begun = time.monotonic()
        self._drawn = 0.0
        self._live = sys.stderr.isatty()

    def show(self, done: int, running: int) -> None:
        now = time.monotonic()
        if not self._live or (now - self._drawn < REDRAW_S and done < self._total):
            return
        self._drawn = now
        full = BAR * done // self._total
        sys.stderr.write(
            f"\r[{'=' * full}{' ' * (BAR - full)}] {done}/{self._total} done, {running} under way, "
            f"{now - self._begun:.0f} s \x1b[K"
        )
        sys.stderr.flush()

    def show_of(self, done: int, total: int) -> None:
        """The same, where the total grows."""
        self._total = total
        self.show(done, total - done)

    def end(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")


if __name__ == "__main__":
    sys.exit(main())
