"""The load generator: what it sends when, what it reads, and what it says about itself."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.bench import mock_server, serve
from pdserve.bench.arrivals import Arrivals, BenchError, times
from pdserve.bench.client import Record, Run, Server, measure, read
from pdserve.bench.figures import Slo, bottleneck, figures, quantile, worst_gaps
from pdserve.bench.workloads import MAKERS, Job, Shape, make


@pytest.fixture
def mock() -> Iterator[Callable[[float, float], str]]:
    """Starts mock servers: (ttft_s, itl_s) → url."""
    with contextlib.ExitStack() as stack:
        yield lambda ttft_s, itl_s: stack.enter_context(mock_server.started(ttft_s, itl_s))


def chunk(*token_ids: int, **more: Any) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"token_ids": token_ids, **more}]}).encode() + b"\n\n"
    )


# arrivals


@pytest.mark.parametrize("kind", ["poisson", "gamma", "constant", "ramp"])
def test_arrivals_keep_their_rate_and_their_seed(kind: str) -> None:
    arrivals = Arrivals(kind=kind, rate=4.0, rate_to=12.0, burstiness=0.5)
    found = times(arrivals, 20_000, seed=7)
    assert found == times(arrivals, 20_000, seed=7)
    assert found == sorted(found)
    mean = 8.0 if kind == "ramp" else 4.0
    assert 20_000 / found[-1] == pytest.approx(mean, rel=0.05)
    if kind != "constant":
        assert found != times(arrivals, 20_000, seed=8)


def test_a_gamma_of_half_is_burstier_and_a_ramp_gets_faster() -> None:
    def spread(arrivals: Arrivals) -> float:
        found = times(arrivals, 20_000, seed=1)
        gaps = [b - a for a, b in itertools.pairwise(found)]
        mean = sum(gaps) / len(gaps)
        return sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / mean**2

    assert spread(Arrivals(kind="poisson")) == pytest.approx(1.0, rel=0.1)
    assert spread(Arrivals(kind="gamma", burstiness=0.5)) == pytest.approx(2.0, rel=0.1)
    ramp = times(Arrivals(kind="ramp", rate=2.0, rate_to=10.0), 12_000, seed=3)
    half = ramp[-1] / 2
    # Λ(T / 2) / Λ(T) = (2 + 6) / 2 / (2 + 10)
    assert sum(t < half for t in ramp) / len(ramp) == pytest.approx(1 / 3, rel=0.05)


# workloads


@pytest.mark.parametrize("kind", MAKERS)
def test_workloads_repeat(kind: str) -> None:
    shape = Shape(kind=kind, requests=40, length_scale=16)
    jobs = make(shape)
    assert jobs == make(shape) and len(jobs) == 40
    assert all(job.prompt and job.output_len > 0 for job in jobs)
    assert all(10 <= token < 1000 for job in jobs for token in job.prompt)


def test_equal_hashes_are_equal_tokens(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 500, "input_length": 1100, "output_length": 64, "hash_ids": [1, 2, 3]},
        {"timestamp": 1500, "input_length": 700, "output_length": 32, "hash_ids": [1, 9]},
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    shape = Shape(kind="mooncake-conversation", trace=trace, length_scale=64)
    first, second = make(shape)
    assert (len(first.prompt), len(second.prompt)) == (17, 11)
    assert first.prompt[:8] == second.prompt[:8] and first.prompt[8:11] != second.prompt[8:]
    assert (first.offset, second.offset, second.output_len) == (0.0, 1.0, 1)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("mooncake-conversation", '{"timestamp": 1}\n'),
        ("mooncake-conversation", "no json\n"),
        ("azure-conv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n"),
    ],
)
def test_a_broken_trace_is_named(tmp_path: Path, kind: str, content: str) -> None:
    trace = tmp_path / "trace"
    trace.write_text(content)
    with pytest.raises(BenchError, match="line .* is no row"):
        make(Shape(kind=kind, trace=trace))
    with pytest.raises(BenchError, match="cannot be read"):
        make(Shape(kind=kind, trace=tmp_path / "missing"))


# reading


def test_an_event_counts_when_it_is_complete() -> None:
    record = Record(job=0, due=1.0, status=200)
    whole = chunk(5)
    pieces = [
        (1.5, whole[:7]),
        (2.0, whole[7:] + chunk(6, 7)),
        (2.5, chunk(8) + b"data: [DONE]\n\n"),
    ]
    read(record, pieces, 4)
    assert record.error == ""
    assert record.token_times == [2.0, 2.0, 2.0, 2.5] and record.token_ids == [5, 6, 7, 8]
    assert (record.ttft, record.e2e, record.tpot) == (1.0, 1.5, pytest.approx(0.5 / 3))
    assert record.gaps == [0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("status", "content", "output_len", "expected"),
    [
        (429, b'{"error": "no room"}', 1, "HTTP 429"),
        (200, chunk(1), 2, "1 tokens came instead of 2"),
        (200, chunk(1, finish_reason="stop"), 2, ""),
        (200, b'data: {"error": {"message": "broken"}}\n\n', 1, "broken"),
        (200, b"data: {nonsense}\n\n", 1, "no JSON"),
    ],
)
def test_what_goes_wrong_is_kept(
    status: int, content: bytes, output_len: int, expected: str
) -> None:
    record = Record(job=0, due=0.0, status=status)
    read(record, [(1.0, content)], output_len)
    assert expected in record.error and bool(record.error) == bool(expected)
    assert record.rejected == (status == 429)


# figures


def answered(due: float, *token_times: float) -> Record:
    return Record(job=0, due=due, sent=due, status=200, prompt_len=10, token_times=[*token_times])


def run_of(*records: Record, lags: tuple[float, ...] = (0.0,), cpu: float = 0.1) -> Run:
    return Run(records=[*records], wall_s=10.0, client_cpu_s=cpu, loop_lags=[*lags])


def test_figures_count_what_was_refused_as_missed() -> None:
    refused = Record(job=1, due=4.0, sent=4.0, status=429, error="HTTP 429: full")
    broken = Record(job=2, due=5.0, sent=5.0, error="ConnectError")
    run = run_of(answered(0.0, 0.1, 0.2, 0.3), answered(1.0, 2.0, 2.1, 2.2), refused, broken)
    found = figures(run, Slo(ttft_ms=500, itl_ms=150))
    assert (found.requests, found.rejected, found.failed) == (4, 1, 1)
    assert (found.attainment, found.goodput) == (0.25, 0.1)
    assert found.output_tok_s == pytest.approx(0.6)
    assert found.latencies["ttft"]["p50"] == pytest.approx(550)
    assert found.latencies["itl"]["p99"] == pytest.approx(100)
    assert math.isnan(found.cached_share)


def test_quantiles_and_worst_gaps() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert math.isnan(quantile([], 0.5))
    stutter = answered(0.0, *(0.1 * n for n in range(20)), 5.0)
    assert worst_gaps(stutter) == pytest.approx((5.0 - 1.9 + 0.1) / 2)


def test_a_client_that_falls_behind_says_so() -> None:
    assert bottleneck(run_of(answered(0.0, 0.1))) == ""
    late = answered(0.0, 0.1)
    late.sent = 0.05
    assert "left 50.0 ms late" in bottleneck(run_of(late))
    assert "loop came 20.0 ms late" in bottleneck(run_of(answered(0.0, 0.1), lags=(0.02,)))
    assert "95% of a core" in bottleneck(run_of(answered(0.0, 0.1), cpu=9.5))


# whole runs


def test_conversations_grow_and_wait_for_their_answers(mock: Any) -> None:
    url = mock(0.0, 0.0)
    jobs = make(
        Shape(kind="conversation", requests=6, turns=3, input_len=5, output_len=4, think_s=0)
    )
    run = measure(Server(url=url, model="m"), jobs, Arrivals(kind="closed"), seed=0)
    assert [record.prompt_len for record in run.records] == [5, 14, 23] * 2
    assert all(record.ok and record.token_ids == [0, 1, 2, 3] for record in run.records)
    for before, after in ((0, 1), (1, 2), (2, 3)):
        assert run.records[before].ended <= run.records[after].sent


def test_an_overloaded_client_makes_the_server_look_worse(mock: Any) -> None:
    """Its loop is blocked while requests are due: they count from when they were due."""
    url, jobs = mock(0.0, 0.0), [Job(prompt=(1,), output_len=2)] * 20
    blocked = 0.3

    def progress(done: int, running: int) -> None:
        if done == 0 and running == 1:
            time.sleep(blocked)

    arrivals = Arrivals(kind="constant", rate=1000.0)
    run = measure(Server(url=url, model="m"), jobs, arrivals, seed=0, progress=progress)
    found = figures(run, Slo())
    assert "bottleneck" in bottleneck(run)
    assert found.latencies["ttft"]["p50"] > blocked * 900


def test_the_command_writes_everything_down(
    mock: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "run.json"
    options = [mock(0.002, 0.001), "--model", "m", "--requests", "5", "--output-len", "8"]
    options += ["--spread", "0", "--arrivals", "gamma", "--rate", "100", "--burstiness", "0.5"]
    options += ["--api-key", "very secret", "--slo-ttft-ms", "60000", "--out", str(out)]
    assert serve.main(options) in (0, serve.EXIT_CLIENT)
    assert "goodput" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert "very secret" not in out.read_text()
    assert content["format"] == serve.FORMAT and content["settings"]["burstiness"] == 0.5
    assert len(content["records"]) == 5
    assert all(len(record["token_times"]) == 8 for record in content["records"])
    assert content["figures"]["attainment"] == 1.0
    assert content["circumstances"]["cores"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["http://127.0.0.1:9"], "does not name a model"),
        (["no url", "--model", "m", "--rate", "0"], "--rate must be above 0"),
        (["u", "--model", "m", "--arrivals", "trace"], "needs a workload with times"),
        (["u", "--model", "m", "--spread", "1"], "--spread"),
        (["u", "--model", "m", "--vocab", "5:5"], "--vocab must be"),
    ],
)
def test_bad_options_are_sentences(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(options) == serve.EXIT_USAGE
    assert message in capsys.readouterr().err
