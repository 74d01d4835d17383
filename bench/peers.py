"""`pdserve bench peers`: pdserve and vLLM on this machine, the same load, in alternation.

vLLM runs as one process on all cores, and as one prefill and one decode worker (NIXL) on half of
them each, behind its own router; pdserve as one colocated worker and as 1P+1D. The same checkpoint,
dtype and cores; closed loop. Install vLLM first: bench/peers.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Server, measure
from pdserve.bench.figures import Slo, bottleneck, figures
from pdserve.bench.machine import circumstances
from pdserve.bench.peers_report import sentences, step_limit_ms, table
from pdserve.bench.serve import EXIT_USAGE, ProgressBar, finite
from pdserve.bench.topology import NAME, Topology, up
from pdserve.bench.workloads import Shape, make

READY_S = 300.0
STOP_S = 20.0
WORKLOADS = ("256/64x8x48", "1024/32x4x24", "32/128x16x32")


@dataclass(frozen=True, slots=True)
class Load:
    """Prompt and answer lengths in tokens, requests at a time, requests."""

    input_len: int
    output_len: int
    concurrency: int
    requests: int

    @classmethod
    def parse(cls, text: str) -> Load:
        """From "256/64x8x48". Raises BenchError."""
        try:
            lengths, at_once, count = text.split("x")
            first, second = lengths.split("/")
            found = cls(int(first), int(second), int(at_once), int(count))
        except ValueError:
            found = cls(0, 0, 0, 0)
        if min(found.input_len, found.output_len, found.concurrency, found.requests) < 1:
            raise BenchError(
                f"A workload is written IN/OUTxAT_ONCExREQUESTS, such as 256/64x8x48, not {text!r}."
            )
        return found

    def __str__(self) -> str:
        return f"{self.input_len}/{self.output_len} × {self.concurrency}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all sides have in common."""

    model: Path
    peers: Path
    dtype: str
    max_model_len: int
    logs: Path


Start = Callable[[Setting], AbstractContextManager[str]]
"""Starts a server, gives its URL, stops it."""


@contextlib.contextmanager
def _pdserve(topology: str, setting: Setting) -> Iterator[str]:
    options = [f"--model={setting.model}", f"--dtype={setting.dtype}"]
    options.append(f"--max-model-len={setting.max_model_len}")
    with up([*options, *Topology.parse(topology).options(2 << 30)]) as cluster:
        yield cluster.url


@contextlib.contextmanager
def _vllm(setting: Setting, *flags: str, **environment: str) -> Iterator[str]:
    port = _free_port()
    command = [str(setting.peers / "vllm/bin/vllm"), "serve", str(setting.model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", NAME]
    command += ["--dtype", setting.dtype, "--max-model-len", str(setting.max_model_len), *flags]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    path = f"{setting.peers / 'vllm/bin'}:{os.environ['PATH']}"
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": path, **quiet, **environment}
    with _process(command, more, setting.logs / f"vllm-{port}.log", port) as url:
        yield url


@contextlib.contextmanager
def _vllm_split(setting: Setting) -> Iterator[str]:
    """One core's worth each, as vLLM binds its threads, and vLLM's router in front."""
    transfer = json.dumps(
        {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    )
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    flags = ("--kv-transfer-config", transfer)
    with contextlib.ExitStack() as stack:
        urls = []
        for mine in (cores[:half], cores[half:]):
            bind = ",".join(map(str, mine))
            side = str(_free_port())
            one = _vllm(
                setting,
                *flags,
                VLLM_CPU_OMP_THREADS_BIND=bind,
                VLLM_NIXL_SIDE_CHANNEL_PORT=side,
            )
            urls.append(stack.enter_context(one))
        port = _free_port()
        command = [str(setting.peers / "routers/bin/vllm-router"), "--vllm-pd-disaggregation"]
        command += ["--prefill", urls[0], "--decode", urls[1], "--host", "127.0.0.1"]
        command += ["--port", str(port), "--policy", "round_robin", "--kv-connector", "nixl"]
        log = setting.logs / f"vllm-router-{port}.log"
        yield stack.enter_context(_process(command, {}, log, port))


@contextlib.contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], log: Path, port: int
) -> Iterator[str]:
    """A server in a process group of its own, once it answers /health."""
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            # Python looks for modules in the working directory: in a checkout it would find ours.
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        _wait_ready(process, url, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.5)
    raise BenchError(f"{process.args!r:.200} did not become ready; see {log}.")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _ours(topology: str) -> Start:
    return lambda setting: _pdserve(topology, setting)


SIDES: dict[str, Start] = {
    "pdserve 1P+1D": _ours("1P+1D"),
    "vLLM 1P1D": _vllm_split,
    "pdserve 1C": _ours("1C"),
    "vLLM": _vllm,
}
SPLIT = ("pdserve 1P+1D", "vLLM 1P1D")
"""Sides whose decode worker has half of the cores."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="pdserve bench peers", description=__doc__)
    found.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    home = Path(os.environ.get("PEERS", "~/.cache/pdserve-peers")).expanduser()
    found.add_argument("--peers", type=Path, default=home, help=f"default: {home.name}, or $PEERS")
    found.add_argument("--dtype", default="bfloat16", help="of all sides (default: bfloat16)")
    found.add_argument("--max-model-len", type=int, default=4096, help="tokens (default: 4096)")
    found.add_argument("--rounds", type=int, default=3, help="of every side (default: 3)")
    found.add_argument("--vocab", type=int, default=10000, help="prompt ids are below this")
    found.add_argument(
        "--workloads", nargs="+", default=WORKLOADS, help="IN/OUTxAT_ONCExREQUESTS (default: all)"
    )
    found.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    found.add_argument("--out", type=Path, default=Path("bench-peers"), help="folder")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        loads = [Load.parse(text) for text in args.workloads]
        wanted = any(side.startswith("vLLM") for side in args.sides)
        if wanted and not (args.peers / "vllm/bin/vllm").exists():
            raise BenchError(f"There is no vLLM under {args.peers}: run bench/peers.sh first.")
        args.out.mkdir(parents=True, exist_ok=True)
        rows = _measure_all(args, loads)
    except BenchError as error:
        print(f"pdserve bench peers: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    cores = len(os.sched_getaffinity(0))
    whole, half = (step_limit_ms(args.model, max(1, count)) for count in (cores, cores // 2))
    limits = {side: half if side in SPLIT else whole for side in args.sides}
    content = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "circumstances": circumstances(),
        "step_limit_ms": limits,
        "verdict": sentences(rows, limits),
        "rows": finite(rows),
    }
    (args.out / "peers.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n\n".join([*sentences(rows, limits), table(rows, limits)])
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    return 0


def _measure_all(args: argparse.Namespace, loads: Sequence[Load]) -> list[dict[str, Any]]:
    """One row per round, side and workload. Sides take turns; each round has other prompts."""
    setting = Setting(
        model=args.model.resolve(),
        peers=args.peers,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        logs=args.out.resolve(),
    )
    rows = []
    for number in range(args.rounds):
        sides = args.sides if number % 2 == 0 else args.sides[::-1]
        for side in sides:
            print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr, flush=True)
            with SIDES[side](setting) as url:
                server = Server(url=url, model=NAME)
                _run(server, Load(64, 8, 4, 8), args.vocab, seed=-1)
                for load in loads:
                    rows.append(
                        {
                            "round": number,
                            "side": side,
                            "workload": str(load),
                            **_run(server, load, args.vocab, number),
                        }
                    )
    return rows


def _run(server: Server, load: Load, vocab: int, seed: int) -> dict[str, Any]:
    shape = Shape(
        kind="fixed",
        requests=load.requests,
        input_len=load.input_len,
        output_len=load.output_len,
        vocab=(10, vocab),
        seed=seed,
    )
    bar = ProgressBar(load.requests)
    arrivals = Arrivals(kind="closed", concurrency=load.concurrency)
    run = measure(server, make(shape), arrivals, seed=seed, progress=bar.show)
    bar.end()
    for record in run.records:
        if record.error:
            raise BenchError(f"{server.url}: a request failed: {record.error}")
    found = figures(run, Slo())
    return {
        "output tok/s": found.output_tok_s,
        "TTFT p50": found.latencies["ttft"]["p50"],
        "TPOT p50": found.latencies["tpot"]["p50"],
        "limited": bottleneck(run),
    }


if __name__ == "__main__":
    sys.exit(main())
