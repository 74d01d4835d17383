"""The simulator: what it says of cases that can be counted out, and what it must never do."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pytest

from pdserve.bench import profile as profiling
from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.figures import Slo
from pdserve.bench.simulation import __main__ as simulate
from pdserve.bench.simulation.cluster import Arrival, Outcome, Simulation
from pdserve.bench.simulation.load import Load
from pdserve.bench.simulation.profile import Profile, StepTimes, load
from pdserve.bench.simulation.search import Search, attainment, capacity
from pdserve.bench.simulation.texts import Tokens, of_names, of_tokens
from pdserve.bench.simulation.words import Duel, opening, when
from pdserve.bench.simulation.worker import Worker
from pdserve.bench.step_times import Point, Sample
from pdserve.bench.topology import Topology
from pdserve.bench.workloads import Shape

PROFILE = Profile(
    model="paper", device="none", dtype="bfloat16", block_size=16, num_blocks=1000,
    max_num_batched_tokens=256, max_num_seqs=16, max_model_len=4096,
    step=StepTimes(
        decode=((1, 45e-4, 1e-7), (16, 12e-3, 1e-7)),
        mixed=(5e-3, 2e-4, 1e-8, 5e-4, 1e-7),
        loop=(1e-3, 1e-4),
    ),
    front_s=0.003, hand_over=(2e-3, 1e-5),
)  # fmt: skip


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
def test_rows_of_steps_are_the_steps(
    topology: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are simulated in one event bring what they bring one by one: with room, and where
    blocks run out and requests are preempted."""
    profile = msgspec.structs.replace(PROFILE, num_blocks=blocks)
    coming = arrivals([(30 + 37 * n % 400, 1 + 23 * n % 90) for n in range(60)], gap=0.05)
    rows = run(topology, coming, profile)
    monkeypatch.setattr(Worker, "_row", lambda self, plan: 1)
    single = run(topology, coming, profile)
    assert rows.preemptions == single.preemptions
    assert (rows.preemptions > 0) is (blocks == 60)
    for name in ("ttft", "tpot", "e2e"):
        assert list(getattr(rows, name)) == pytest.approx(list(getattr(single, name)))
    assert rows.phases == pytest.approx(single.phases)


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
    step = msgspec.structs.replace(PROFILE.step, loop=(0.0, 0.0))
    samples = [
        Sample(Point(contexts=(c,) * n), step.decode_s(n, n * c))
        for n in (1, 4, 16)
        for c in (32, 256, 1024)
    ]
    for start, length, beside in ((0, 16, 0), (0, 256, 0), (512, 256, 4), (64, 64, 16)):
        point = Point(prompts=((start, length),), contexts=(100,) * beside)
        seconds = step.mixed_s(point.tokens, point.pairs, 1, beside, 100 * beside)
        samples.append(Sample(point, seconds))
    samples.append(Sample(Point(((0, 2048),)), step.mixed_s(2048, 2048**2 / 2)))
    samples.append(Sample(Point(((0, 64),), (1000,) * 4), step.mixed_s(64, 64**2 / 2, 1, 4, 4000)))
    found, errors = profiling.fit(samples)
    assert found.mixed == pytest.approx(step.mixed)
    for n in (1, 3, 4, 5, 16, 20):  # 4 ms, 0.5 ms per request, 0.1 us per token of context
        assert found.decode_s(n, n * 100) == pytest.approx(4e-3 + 5e-4 * n + 1e-7 * n * 100)
    assert max(errors.values()) < 1e-6
    weights, _ = profiling.least([(1.0, 1.0), (1.0, 2.0)], [2.0, 1.0])
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
def test_a_profile_of_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    options = ["--workers", "2", "--kv-total", "64", "--max-model-len", "1024", "--out", str(out)]
    assert profiling.main(options) == 0
    found = load(out)
    assert found.step.mixed[1] > 0 and found.step.decode[0] > 0 and found.front_s > 0
    ttft, tpot = found.alone_s(256, 32)
    assert 0.001 < ttft < 5 and 0.0001 < tpot < 1
