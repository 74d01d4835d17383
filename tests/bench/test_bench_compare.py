"""Comparisons: topologies, phases, noise, verdicts; and one whole run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pdserve.bench import compare, diff
from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Record, Run
from pdserve.bench.figures import Slo, figures
from pdserve.bench.phases import PHASES, phases_of
from pdserve.bench.reference import NOBODY, Pace, shapes
from pdserve.bench.simulation import __main__ as simulate
from pdserve.bench.topology import Topology
from pdserve.bench.verdict import METRICS, Cell, further, goodput, noise, sentences, unsteady
from pdserve.bench.workloads import Job, make

SLO = Slo(ttft_ms=100, itl_ms=10)
BASE = figures(
    Run(
        records=[
            Record(job=0, due=0.0, status=200, prompt_len=9, token_times=[0.05, 0.055, 0.06]),
            Record(job=1, due=1.0, status=200, prompt_len=9, token_times=[1.05, 1.055, 1.06]),
        ],
        wall_s=2.0,
        client_cpu_s=0.0,
        loop_lags=[],
    ),
    SLO,
)
SPENT = dict.fromkeys(PHASES, 0.01)


def cell(
    topology: str, rate: float, *, twin: bool = False, number: int = 0, **changed: Any
) -> Cell:
    ttft, attainment = changed.get("ttft", 50.0), changed.get("attainment", 1.0)
    changes = {"ttft": ttft, "e2e": changed.get("e2e", 60.0)}
    latencies = {
        **BASE.latencies,
        **{name: dict.fromkeys(BASE.latencies[name], ms) for name, ms in changes.items()},
    }
    found = dataclasses.replace(BASE, latencies=latencies, attainment=attainment)
    phases = {**SPENT, "decode": changed.get("decode", 0.01)}
    return Cell(topology=topology, twin=twin, round=number, rate=rate, figures=found,
                phases=phases, pace=changed.get("pace", NOBODY))  # fmt: skip


@pytest.mark.parametrize("text", ["1P+1D", "2C", "2P+3D+1C"])
def test_topologies_are_written_as_they_are_read(text: str) -> None:
    assert str(Topology.parse(text.lower())) == text


def test_memory_is_shared_out_equally() -> None:
    four = Topology.parse("2P+2D").options(2**30)
    assert "--kv-cache-memory=268435456" in four and "--colocated=0" in four


@pytest.mark.parametrize("text", ["", "1P", "2D", "1P+1P", "0C", "1X", "P+D"])
def test_what_is_no_topology(text: str) -> None:
    with pytest.raises(BenchError):
        Topology.parse(text)


def timings(*legs: dict[str, Any]) -> dict[str, Any]:
    return {"router": {"submitted": 0.002}, "choices": [{"legs": list(legs)}]}


def test_phases_add_up_to_the_time_of_the_request() -> None:
    prefill = {
        "kind": "prefill",
        "submitted": 0.002,
        "events": [["queued", 0.0], ["scheduled", 0.01], ["first_token", 0.05], ["held", 0.051]],
    }
    decode = {
        "kind": "decode",
        "submitted": 0.055,
        "events": [["queued", 0.0], ["scheduled", 0.004], ["fetch_started", 0.005],
                   ["fetched", 0.008], ["first_token", 0.01], ["finished", 0.1]],
    }  # fmt: skip
    spent = phases_of(timings(prefill, decode))
    assert sum(spent.values()) == pytest.approx(0.155)
    expected = {"router": 0.002, "prefill": 0.04, "transfer": 0.003, "wait": 0.002, "decode": 0.09}
    for phase, seconds in expected.items():
        assert spent[phase] == pytest.approx(seconds), phase
    assert spent["queue"] == pytest.approx(0.01 + 0.008)


def test_a_transfer_during_the_prefill_costs_what_is_left_of_it() -> None:
    prefill = {
        "kind": "prefill",
        "submitted": 0.002,
        "events": [["scheduled", 0.01], ["first_token", 0.1]],
    }
    decode = {
        "kind": "decode",
        "submitted": 0.05,
        "events": [["fetch_started", 0.001], ["fetched", 0.06], ["first_token", 0.07],
                   ["finished", 0.2]],
    }  # fmt: skip
    spent = phases_of(timings(prefill, decode))
    assert spent["transfer"] == pytest.approx(0.11 - 0.102)
    assert sum(spent.values()) == pytest.approx(0.25)


def test_noise_is_what_a_topology_differs_from_itself() -> None:
    ttft = next(metric for metric in METRICS if metric.name == "TTFT p50")
    cells = [
        cell("1P+1D", 1.0),
        cell("1P+1D", 1.0, twin=True, ttft=60.0),
        cell("1P+1D", 2.0),
        cell("1P+1D", 2.0, twin=True, ttft=45.0),
        cell("2C", 1.0, ttft=500.0),
    ]
    assert noise(cells, ttft) == pytest.approx(0.2)
    assert math.isnan(noise([cell("2C", 1.0)], ttft))


def test_goodput_lies_where_attainment_crosses_nine_tenths() -> None:
    cells = [cell("2C", rate, attainment=share) for rate, share in ((1, 1.0), (2, 0.95), (4, 0.85))]
    found = goodput(cells, "2C")
    assert (found.rate, found.at_least) == (pytest.approx(3.0), False)
    assert str(goodput(cells[:2], "2C")) == "at least 2.00 requests/s"
    assert goodput(cells[2:], "2C").rate == 0.0


def test_a_difference_below_the_noise_is_none() -> None:
    shares = {("1P+1D", False): 0.8, ("1P+1D", True): 0.85, ("2C", False): 0.83}
    cells = [
        cell(name, rate, twin=twin, attainment=1.0 if rate == 2.0 else share)
        for (name, twin), share in shares.items()
        for rate in (2.0, 4.0)
    ]
    found = sentences(cells, SLO, "fixed")
    assert "as far as can be told here: 2C 3.18 requests/s, 1P+1D 3.00 requests/s" in found[0]
    assert "Noise: 1P+1D measured a second time served 3.33 requests/s (11% off)." in found
    clear = [c if c.topology == "1P+1D" else cell("2C", c.rate, attainment=0.99) for c in cells]
    assert sentences(clear, SLO, "fixed")[0].startswith("Use 2 workers that do both (2C)")


def test_no_prompt_of_the_reference_load_begins_like_another() -> None:
    """Else the prefix cache makes them shorter."""
    both = [shape for seed in (0, 1) for shape in shapes(Topology.parse("2C"), (10, 10000), seed)]
    begins = [job.prompt[:16] for shape in both for job in make(shape)]
    assert len(set(begins)) == len(begins)


def test_a_machine_whose_speed_changes_is_said_to() -> None:
    cells = [cell("1P+1D", rate, pace=Pace(gap_s, 0.06)) for rate, gap_s in ((1, 3e-3), (2, 4e-3))]
    assert unsteady(cells) == [
        "The machine's own speed changed meanwhile: the same small load on 1P+1D took from 3.00 to "
        "4.00 ms per token, at one run and at another."
    ]
    assert unsteady(cells)[0] in sentences(cells, SLO, "fixed")
    other = [cell("2C", 1, pace=Pace(9e-3, 0.06)), cell("1P+1D", 3)]
    assert not unsteady([*cells[:1], *other])


def test_the_ladder_goes_on_where_it_did_not_tell_enough() -> None:
    def cells(*shares: tuple[float, float], e2e: float = 20.0) -> list[Cell]:
        return [
            cell(topology, rate, attainment=share[index], e2e=e2e if rate == 2.0 else 20.0)
            for rate, share in zip((2.0, 4.0), shares, strict=True)
            for index, topology in enumerate(("1P+1D", "2C"))
        ]

    assert further(cells((1.0, 1.0), (0.5, 0.2))) == 0.0
    assert further(cells((1.0, 0.8), (0.5, 0.2))) == 1.0  # nobody knows what 2C serves
    assert further(cells((1.0, 1.0), (0.5, 0.95))) == 6.0
    assert further(cells((0.8, 1.0), (0.5, 0.95))) == 1.0  # the lower ones first
    # Not lower where that brings nothing.
    assert further(cells((0.5, 1.0), (0.5, 0.95))) == 6.0
    assert further(cells((0.0, 1.0), (0.0, 0.2))) == 0.0
    assert further(cells((0.0, 1.0), (0.0, 0.2), e2e=15.0)) == 1.0


def test_the_verdict_names_the_winner_and_the_phase() -> None:
    cells = []
    for rate, share in ((1.0, 1.0), (2.0, 0.5)):
        cells += [cell("1P+1D", rate), cell("1P+1D", rate, twin=True, ttft=51.0)]
        cells.append(cell("2C", rate, attainment=share, ttft=100.0, decode=0.3))
    first, *more = sentences(cells, SLO, "random")
    assert first.startswith("Use 1 worker for prompts and 1 for answers (1P+1D): at least 2.00")
    assert "67% more than 2 workers that do both (2C)" in first
    assert any(
        "1P+1D is better than 2C" in text and "TTFT p50 at 1/s (+100%)" in text for text in more
    )
    assert any("300 ms with 2C" in text and "decode" in text for text in more)
    same = [cell("1P+1D", 1.0), cell("1P+1D", 1.0, twin=True), cell("2C", 1.0, ttft=51.0)]
    assert "serve the same rate" in sentences(same, SLO, "random")[0]
    assert any("do not differ by more than noise" in text for text in sentences(same, SLO, "x"))


def test_rates_that_nobody_gave_rise_to_what_the_cluster_can_do() -> None:
    assert compare.ladder(0.0, 8.0, 4) == (2.0, 4.0, 6.0, 8.0)
    assert compare.ladder(4.0, 8.0, 3) == (4.0, 6.0, 8.0)
    assert compare.ladder(0.1, 1 / 3, 1) == (0.333,)


def test_a_trace_is_stretched_to_the_rate() -> None:
    jobs = tuple(Job(prompt=(1,), output_len=1, offset=float(n)) for n in range(11))
    plan = compare.Plan(
        jobs=jobs,
        arrivals=Arrivals(kind="trace"),
        rates=(),
        slo=SLO,
        seed=0,
        options=(),
        kv_total=1,
    )
    assert compare.at_rate(plan, 2.2).time_scale == pytest.approx(0.5)
    other = dataclasses.replace(plan, arrivals=Arrivals(kind="gamma", burstiness=0.3))
    assert compare.at_rate(other, 7.0) == Arrivals(kind="gamma", rate=7.0, burstiness=0.3)


@pytest.mark.parametrize(
    "options",
    [
        ["--topologies", "1P"],
        ["--topologies", "2C,2C"],
        ["--lowest", "1", "--highest", "0.5"],
        ["--rates", "fast"],
        ["--rates", "0"],
        ["--rounds", "0"],
        ["--more-rungs", "-1"],
        ["--arrivals", "closed"],
    ],
)
def test_bad_options_end_before_anything_is_started(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*options, "--out", str(tmp_path / "x")]) == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = compare.main(
        ["--topologies", "1P+1D,2C", "--rounds", "1", "--requests", "4", "--input-len", "40",
         "--output-len", "4", "--rates", "20", "--slo-ttft-ms", "60000", "--slo-itl-ms", "60000",
         "--kv-total", "64", "--disaggregate", "always", "--out", str(out)]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    content = json.loads((out / "comparison.json").read_text())
    assert "serve the same rate" in content["verdict"][0]
    assert [(c["topology"], c["twin"]) for c in content["cells"]] == [
        ("1P+1D", False), ("2C", False), ("1P+1D", True)
    ]  # fmt: skip
    split = content["cells"][0]
    assert split["moved_mib"] > 0 and split["phases"]["transfer"] > 0
    assert set(split["cpu_s"]) >= {"prefill-0", "decode-0", "router"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4 and "1P+1D" in page
    one, other = (out / f"{name}-round1-rate20.json" for name in ("1P+1D", "2C"))
    assert diff.main([str(one), str(other)]) == 0
    assert simulate.main(["--against", str(out), "--out", str(tmp_path / "predicted")]) == 0
    assert all(0 < c["pace"]["gap_s"] < c["pace"]["prompt_s"] for c in content["cells"])
    predicted = json.loads((tmp_path / "predicted" / "simulation.json").read_text())
    assert "times as long as in the profile" in predicted["verdict"][0]
    assert predicted["verdict"][0].startswith("Predicted and measured goodput are within 15%")
    assert "measured" in (tmp_path / "predicted" / "table.md").read_text()
    changed = json.loads(other.read_text())
    changed["settings"]["requests"] = 5
    other.write_text(json.dumps(changed))
    assert diff.main([str(one), str(other)]) == 2
    assert "differ in requests: 4 and 5" in capsys.readouterr().err


def test_targets_that_were_not_given_are_not_below_what_anybody_notices() -> None:
    assert compare.targets(Slo(), 200.0, 10.0) == Slo(ttft_ms=1000.0, itl_ms=20.0)
    assert compare.targets(Slo(), 3.0, 0.5) == Slo(ttft_ms=100.0, itl_ms=5.0)
    assert compare.targets(Slo(ttft_ms=7.0, itl_ms=1.0), 3.0, 0.5) == Slo(ttft_ms=7.0, itl_ms=1.0)
