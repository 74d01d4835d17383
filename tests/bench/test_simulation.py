"""The simulator: what it says of cases that can be counted out, and what it must never do."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pytest

from pdserve.bench import profile as profiling
from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Record, Run
from pdserve.bench.figures import Slo, figures
from pdserve.bench.fit import fit, least
from pdserve.bench.profile import lost_s, spread
from pdserve.bench.reference import CONTEXT, NOBODY, Pace
from pdserve.bench.simulation import __main__ as simulate
from pdserve.bench.simulation.against import paced, reference_pace
from pdserve.bench.simulation.cluster import Arrival, Outcome, Simulation
from pdserve.bench.simulation.load import Load
from pdserve.bench.simulation.profile import Profile, StepTimes, load, mean
from pdserve.bench.simulation.search import Search, attainment, capacity
from pdserve.bench.simulation.texts import Tokens, of_names, of_tokens
from pdserve.bench.simulation.words import Duel, opening, when
from pdserve.bench.simulation.worker import Worker
from pdserve.bench.step_times import Point, Sample
from pdserve.bench.topology import Topology
from pdserve.bench.verdict import Cell
from pdserve.bench.workloads import Shape

TIMES = StepTimes(
    decode=((1, 56e-4, 1e-7), (16, 146e-4, 1e-7)),
    prompt=(5e-3, 2e-4, 1e-8),
    share=0.7,
    loop=(1e-3, 1e-4),
)
PROFILE = Profile(
    model="paper", device="none", dtype="bfloat16", block_size=16, num_blocks=1000,
    max_num_batched_tokens=256, max_num_seqs=16, max_model_len=4096,
    workers=1, alone=TIMES, beside=TIMES,
    front_s=0.003, hand_over=(2e-3, 1e-5),
)  # fmt: skip


EMPTY = Run(records=[], wall_s=1.0, client_cpu_s=0.0, loop_lags=[])


def slower(times: StepTimes, factor: float) -> StepTimes:
    knots = tuple((n, 0.0, 0.0) for n, _, _ in times.decode)
    nothing = StepTimes(decode=knots, prompt=(0.0, 0.0, 0.0))
    return nothing.towards(times, factor)


def arrivals(
    lengths: Iterable[tuple[int, int]], gap: float = 1.0, block_size: int = 16
) -> list[Arrival]:
    return [
        Arrival(n, n * gap, of_tokens(range(5000 * n, 5000 * n + length), block_size), output)
        for n, (length, output) in enumerate(lengths)
    ]


def run(
    topology: str, coming: Sequence[Arrival], profile: Profile = PROFILE, **more: str
) -> Outcome:
    return Simulation(profile, Topology.parse(topology), **more).run(coming)


def test_a_request_alone_takes_what_can_be_counted_out() -> None:
    found = run("1C", arrivals([(100, 11)]))
    first = 0.005 + 100 * 2e-4 + 5000 * 1e-8 + 0.001 + 1e-4
    steps = sum(0.004 + 5e-4 + 1e-7 * context + 0.001 + 1e-4 for context in range(100, 110))
    assert found.ttft[0] == pytest.approx(first + 0.003)
    assert found.tpot[0] == pytest.approx(steps / 10)
    assert found.e2e[0] == pytest.approx(first + steps + 0.003)
    assert sum(found.phases.values()) == pytest.approx(first + steps)
    split = run("1P+1D", arrivals([(100, 11)]))
    assert split.ttft[0] == pytest.approx(first + 0.003)
    assert split.phases["transfer"] == pytest.approx(2e-3 + 112 * 1e-5)
    assert split.e2e[0] == pytest.approx(first + steps + 0.003 + split.phases["transfer"])


@pytest.mark.parametrize("topology", ["2C", "1P+1D", "2P+1D"])
@pytest.mark.parametrize("blocks", [1000, 60])
@pytest.mark.parametrize("sharing", [1, 2])
def test_rows_of_steps_are_the_steps(
    topology: str, blocks: int, sharing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are simulated in one event bring what they bring one by one: with room, and where
    blocks run out and requests are preempted, and where workers slow each other down."""
    profile = msgspec.structs.replace(
        PROFILE, num_blocks=blocks, workers=sharing, beside=slower(TIMES, 1.6)
    )
    coming = arrivals([(30 + 37 * n % 400, 1 + 23 * n % 90) for n in range(60)], gap=0.05)
    rows = run(topology, coming, profile)
    monkeypatch.setattr(Worker, "_steps", lambda self, plan: 1)
    single = run(topology, coming, profile)
    assert rows.preemptions == single.preemptions
    assert (rows.preemptions > 0) is (blocks == 60)
    for name in ("ttft", "tpot", "e2e"):
        assert list(getattr(rows, name)) == pytest.approx(list(getattr(single, name)))
    assert rows.phases == pytest.approx(single.phases)


def test_workers_of_a_machine_slow_each_other_down_while_both_compute() -> None:
    profile = msgspec.structs.replace(PROFILE, workers=2, beside=slower(TIMES, 2.0))
    alone = run("2C", arrivals([(100, 101)]), profile)
    both = run("2C", arrivals([(100, 101)] * 2, gap=0.0), profile)
    assert both.tpot[0] == both.tpot[1] == pytest.approx(2 * alone.tpot[0])
    # The second comes when the first has had 50 of its 100 steps, and then has 50 ahead alone.
    half = alone.ttft[0] + sum(TIMES.decode_s(1, 100 + n) for n in range(50)) - profile.front_s
    late = run("2C", arrivals([(100, 101)] * 2, gap=half), profile)
    prompt_s = profile.prompt_s(100, TIMES)
    assert late.e2e[1] == pytest.approx(late.e2e[0])
    assert late.tpot[0] == pytest.approx(alone.tpot[0] * 1.5, rel=0.02)
    assert late.ttft[1] == pytest.approx(profile.front_s + 2 * prompt_s)
    # Four workers on two machines do not.
    assert run("4C", arrivals([(100, 101)]), profile).tpot[0] == pytest.approx(alone.tpot[0])


def test_a_request_costs_those_beside_it() -> None:
    profile = msgspec.structs.replace(PROFILE, request_s=0.004)
    coming = arrivals([(16, 101), (16, 2), (16, 2), (16, 2)], gap=0.1)
    usual, later = run("1P+1D", coming), run("1P+1D", coming, profile)
    assert later.e2e[0] == pytest.approx(usual.e2e[0] + 3 * 0.004, abs=0.001)
    assert list(run("1P+1D", coming[:1], profile).e2e) == list(run("1P+1D", coming[:1]).e2e)


def test_what_a_request_costs_is_found() -> None:
    """Two answers of 101 tokens; the second comes 50 gaps later and costs the first 4 ms."""
    step = TIMES.decode_s(1, CONTEXT)
    both = TIMES.decode_s(2, 2 * CONTEXT)
    first = [n * step for n in range(51)]
    first += [first[-1] + 0.004 + n * both for n in range(1, 51)]
    second = [first[50] + 0.004 + n * both for n in range(51)]
    second += [second[-1] + n * step for n in range(1, 51)]
    times = [first, second]
    records = [Record(job=n, due=0.0, token_times=times[n]) for n in range(2)]
    run = Run(records=records, wall_s=1.0, client_cpu_s=0.0, loop_lags=[])
    # The gap in which it came is one of a step of both.
    assert lost_s([run, run], TIMES, TIMES, 0.02) == pytest.approx((0.004 + both - step) / 2)
    assert lost_s([run], TIMES, slower(TIMES, 2.0), 0.02) == 0.0  # its prompt explains more


def test_answers_that_came_at_once_say_nothing_of_the_jitter() -> None:
    assert spread([1.0, 0.0, math.e]) == pytest.approx(statistics.stdev([0.0, 1.0]))
    assert spread([0.0, 1.0]) == 0.0


def test_equal_requests_differ_by_the_jitter() -> None:
    profile = msgspec.structs.replace(PROFILE, jitter=0.2)
    found = run("1C", arrivals([(100, 11)] * 400), profile)
    logs = [math.log(tpot) for tpot in found.tpot]
    assert statistics.stdev(logs) == pytest.approx(0.2, rel=0.15)
    assert list(run("1C", arrivals([(100, 11)] * 400), profile).tpot) == list(found.tpot)


def test_the_mean_of_profiles_of_different_times() -> None:
    slow = msgspec.structs.replace(
        PROFILE, alone=slower(TIMES, 1.5), beside=slower(TIMES, 2.0), front_s=0.006, jitter=0.1
    )
    found = mean([PROFILE, slow, slow])
    assert found.alone.prompt == pytest.approx(slower(TIMES, 4 / 3).prompt)
    assert found.beside.decode_s(3, 300) == pytest.approx(TIMES.decode_s(3, 300) * 5 / 3)
    assert found.front_s == pytest.approx(0.005) and found.hand_over == PROFILE.hand_over
    # Their paces differ by a factor of 2, one third to two thirds.
    assert found.jitter == pytest.approx(
        math.sqrt(math.log(2) ** 2 * 2 / 9 + 0.01 * 2 / 3), rel=1e-6
    )
    assert mean([slow]) == slow
    with pytest.raises(BenchError, match="num_blocks is 1000 in the first and 9 in another"):
        mean([PROFILE, msgspec.structs.replace(PROFILE, num_blocks=9)])


def test_predictions_know_how_fast_the_machine_was() -> None:
    """By a load whose times the profile knows, too."""
    split = Topology.parse("1P+1D")
    profile = msgspec.structs.replace(PROFILE, workers=2, beside=slower(TIMES, 2.0))
    usual, both = reference_pace(profile, split), reference_pace(profile, Topology.parse("2C"))
    assert usual.gap_s == pytest.approx(TIMES.decode_s(4, 4 * CONTEXT))
    assert both.gap_s == pytest.approx(2 * usual.gap_s)
    cells = [
        Cell(
            topology="1P+1D", twin=twin, round=0, rate=rate, figures=figures(EMPTY, Slo()),
            pace=Pace(usual.gap_s * factor, usual.prompt_s * 1.1) if factor else NOBODY,
        )
        for rate, factor, twin in ((1.0, 1.2, False), (1.0, 9.0, True), (2.0, 0.0, False))
    ]  # fmt: skip
    found = paced(profile, cells)
    assert list(found) == [(split, 1.0)]
    slow = found[split, 1.0]
    assert reference_pace(slow, split).gap_s == pytest.approx(1.2 * usual.gap_s)
    assert reference_pace(slow, split).prompt_s == pytest.approx(1.1 * usual.prompt_s, rel=0.01)
    assert slow.front_s == pytest.approx(1.2 * profile.front_s)


def test_long_prompts_travel_while_they_are_computed() -> None:
    """Five steps of a prompt: what is left to fetch at the end is the last one's blocks."""
    found = run("1P+1D", arrivals([(1280, 4)]))
    assert found.phases["transfer"] == pytest.approx(2e-3 + 256 * 1e-5)


def test_a_decode_worker_without_room_for_an_early_prompt_fetches_it_at_the_end() -> None:
    small = msgspec.structs.replace(PROFILE, num_blocks=84)
    found = run("1P+1D", arrivals([(1280, 4)]), small)
    assert found.phases["transfer"] == pytest.approx(2e-3 + 1280 * 1e-5)


def test_what_fits_nowhere_is_refused_and_missed() -> None:
    found = run("1C", arrivals([(4000, 97), (100, 4)]))
    assert found.refused == 1 and math.isnan(found.ttft[0])
    assert attainment(found, Slo()) == 0.5


def test_equal_prompts_go_where_they_are_cached() -> None:
    prompt = of_tokens(range(1000), 16)
    coming = [Arrival(n, n * 2.0, prompt, 2) for n in range(6)]
    found = run("4C", coming)
    assert found.computed == 1000 + 5 * (1000 - 992)
    other = run("4C", coming, policy="least-load")
    assert other.computed > found.computed


def test_names_stand_for_tokens() -> None:
    one = of_names([0, 7, 8], 32, 90, 16, copy=0)
    other = of_names([0, 7, 9], 32, 90, 16, copy=0)
    copied = of_names([0, 7, 8], 32, 90, 16, copy=1)
    assert len(one.hashes) == 5 and one.hashes[:4] == other.hashes[:4]
    assert one.hashes[4] != other.hashes[4]
    assert one.hashes[:2] == copied.hashes[:2] and one.hashes[2] != copied.hashes[2]
    assert [end for end, _ in one.held] == [16, 32, 48, 64, 80]
    coarse = of_names([0, 7, 8], 32, 90, 64, copy=0)
    assert len(coarse.hashes) == 1 and [end for end, _ in coarse.held] == [64]


def test_tokens_of_an_answer_are_those_of_the_next_turn() -> None:
    shape = Shape(
        kind="conversation", requests=6, turns=3, input_len=40, output_len=24, think_s=2.0
    )
    load = Load(shape=shape, arrivals=Arrivals(kind="poisson"), seed=0, block_size=16)
    coming = list(load.at_rate(0.1))
    tokens = Tokens(coming[0].prompt, 0, 24)
    assert len(tokens) == 64 and tokens[40:] == tokens.answer(24) and len(tokens[30:50]) == 20
    assert list(tokens[32:40]) == list(coming[0].prompt.tail)
    assert [arrival.follows for arrival in coming] == [None, 0, 1, None, 3, 4]
    assert coming[2].prompt.length == 3 * 40 + 2 * 24
    found = run("2C", coming)
    # Of 64 tokens said before 63 have KV, of 128 127: three and seven blocks.
    assert found.prompt_tokens - found.computed == 2 * (48 + 112)
    assert not any(map(math.isnan, found.e2e))


def test_a_trace_many_times_over(tmp_path: Path) -> None:
    rows = [
        {
            "timestamp": 100 * n,
            "input_length": 1024,
            "output_length": 9,
            "hash_ids": [0, 10 + n // 4],
        }
        for n in range(400)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    shape = Shape(kind="mooncake-conversation", trace=trace, length_scale=16.0)
    load = Load(shape=shape, arrivals=Arrivals(kind="trace"), seed=0, block_size=32)
    coming = list(load.replay(2.5))
    assert [arrival.number for arrival in coming] == list(range(len(coming)))
    assert all(a.at <= b.at for a, b in itertools.pairwise(coming))
    assert len(coming) % 4 == 0 and 920 < len(coming) < 1080  # whole conversations
    assert len({arrival.prompt.hashes[-1] for arrival in coming}) <= 100 * 3
    assert [a.at for a in load.replay(1.0)] == pytest.approx([n / 10 for n in range(400)])
    with pytest.raises(BenchError, match="multiple or a part"):
        Load(shape=shape, arrivals=load.arrivals, seed=0, block_size=24).check()


def test_fits_find_the_laws_behind_the_samples() -> None:
    step = msgspec.structs.replace(TIMES, loop=(0.0, 0.0))
    samples = [
        Sample(Point(contexts=(c,) * n), step.decode_s(n, n * c))
        for n in (1, 4, 16)
        for c in (32, 256, 1024)
    ]
    for start, length, beside in (
        (0, 16, 0),
        (0, 256, 0),
        (512, 256, 0),
        (512, 256, 4),
        (64, 64, 16),
    ):
        point = Point(prompts=((start, length),), contexts=(100,) * beside)
        seconds = step.mixed_s(point.tokens, point.pairs, 1, beside, 100 * beside)
        samples.append(Sample(point, seconds))
    samples.append(Sample(Point(((0, 2048),)), step.mixed_s(2048, 2048**2 / 2)))
    samples.append(Sample(Point(((0, 64),), (1000,) * 4), step.mixed_s(64, 64**2 / 2, 1, 4, 4000)))
    found, errors = fit(samples)
    assert found.prompt == pytest.approx(step.prompt)
    for n in (1, 3, 4, 5, 16, 20):  # 5 ms, 0.6 ms per request, 0.1 us per token of context
        assert found.decode_s(n, n * 100) == pytest.approx(5e-3 + 6e-4 * n + 1e-7 * n * 100)
    assert max(errors.values()) < 1e-6
    weights, _ = least([(1.0, 1.0), (1.0, 2.0)], [2.0, 1.0])
    assert min(weights) >= 0


SHAPE = Shape(kind="fixed", requests=80, input_len=400, output_len=30)


def test_the_search_finds_the_better_one_and_says_so() -> None:
    load = Load(shape=SHAPE, arrivals=Arrivals(kind="poisson"), seed=0, block_size=16)
    top = capacity(PROFILE, load.lengths(), 4)
    rates = [top * n / 8 for n in range(1, 9)]
    colocated = Topology(colocated=4)

    def best(slo: Slo) -> Duel:
        with Search(PROFILE, load, slo, rates) as search:
            search.look_at([colocated])
            split = search.best_split(4)
            assert len(search.rungs) == 4
            return Duel(search, split, colocated, slo)

    # A step with a chunk takes 56 ms and more: only workers without prompts are quicker.
    tight = best(Slo(ttft_ms=2000, itl_ms=10))
    assert tight.winner == tight.split and tight.at(tight.slo) > 0.03
    assert f"Use {tight.split.plain}" in opening(tight, lambda one: one, "fixed")[0]
    assert any("the split serves more under" in text for text in when(tight))
    loose = best(Slo(ttft_ms=400, itl_ms=400))
    assert loose.winner == colocated
    assert "Use 4 workers that do both (4C)" in opening(loose, lambda one: one, "fixed")[0]


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.json"
    profile.write_bytes(msgspec.json.encode(PROFILE))
    assert load(profile) == PROFILE
    out = tmp_path / "out"
    options = ["--profile", str(profile), "--out", str(out), "--requests", "60"]
    code = simulate.main(
        ["--workers", "40", "--trace", "azure-conv", "--rates", "4 16", "--slo-ttft-ms", "5000",
         "--slo-itl-ms", "100", "--rate-scale", "3", *options]
    )  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    content = json.loads((out / "simulation.json").read_text())
    assert "azure-conv" in content["verdict"][1] and "40C" in content["goodput"]
    assert any("The whole trace" in sentence for sentence in content["verdict"])
    assert (out / "report.html").read_text().count("data:image/png;base64") == 4
    for wrong in (["--workers", "0"], ["--profile", "nowhere"], ["--topologies", "1X"],
                  ["--rates", "0"], ["--kv-tokens", "3"], ["--rate-scale", "-1"]):  # fmt: skip
        assert simulate.main([*options, *wrong]) == 2
        assert "error:" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_profile_of_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    options = ["--workers", "2", "--kv-total", "64", "--max-model-len", "1024", "--out", str(out)]
    assert profiling.main(options) == 0
    found = load(out)
    assert found.workers == 2 and found.front_s > 0 and found.jitter > 0
    for times in (found.alone, found.beside):
        assert times.prompt[1] > 0 and times.decode[0][1] > 0
    ttft, tpot = found.alone_s(256, 32)
    assert 0.001 < ttft < 5 and 0.0001 < tpot < 1
