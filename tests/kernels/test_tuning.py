"""Which configuration is taken, what is kept on disk, and that nothing of it changes a bit."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.kernels import KernelError, configs, dispatch, trials, tuning
from pdserve.kernels.tuning import Trial, tune


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    configs.forget()
    dispatch.forget()


@pytest.fixture
def thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation with four configurations."""
    entries = tuple({"WIDTH": width} for width in (1, 2, 3, 4))
    monkeypatch.setitem(configs.TABLE, "thing", entries)


class Bench:
    """A trial whose time is looked up instead of measured."""

    def __init__(self, seconds: dict[int, float], odd: int = 0, broken: int = 0) -> None:
        self.seconds, self.odd, self.broken = seconds, odd, broken
        self.timed: list[int] = []

    def width(self) -> int:
        return configs.chosen("thing", "a", 7)["WIDTH"]

    def run(self) -> torch.Tensor:
        if self.width() == self.broken:
            raise RuntimeError("out of resource: shared memory")
        return torch.tensor([self.width() == self.odd])

    def timer(self, run: Callable[[], torch.Tensor]) -> float:
        self.timed.append(self.width())
        return self.seconds[self.width()]

    def tune(self, folder: Path, key: str = "a GPU") -> int:
        """The width that is used afterwards."""
        configs.forget()
        tune([Trial("thing", ("a", 7), self.run)], key=key, timer=self.timer, folder=folder)
        return self.width()


TIMES = {1: 4.0, 2: 3.0, 3: 1.0, 4: 2.0}


def test_the_fastest_is_used_for_its_class_of_shapes(thing: None, tmp_path: Path) -> None:
    bench = Bench(TIMES)
    assert bench.tune(tmp_path) == 3
    assert bench.timed == [1, 2, 3, 4]
    assert configs.chosen("thing", "another") == {"WIDTH": 1}


def test_a_little_faster_is_not_enough(thing: None, tmp_path: Path) -> None:
    assert Bench({1: 1.0, 2: 0.99, 3: 2.0, 4: 0.985}).tune(tmp_path) == 1


def test_what_gives_other_bits_or_does_not_run_is_left_out(
    thing: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert Bench(TIMES, odd=3, broken=4).tune(tmp_path) == 2
    assert "thing a 7: WIDTH 3 gives other bits and is left out" in caplog.text
    assert "thing a 7: WIDTH 4 does not run here: out of resource: shared memory" in caplog.text


def test_a_later_start_measures_nothing(thing: None, tmp_path: Path) -> None:
    assert Bench(TIMES).tune(tmp_path) == 3
    bench = Bench({**TIMES, 3: 9.0})
    assert bench.tune(tmp_path) == 3
    assert bench.timed == []
    assert bench.tune(tmp_path, "another GPU") == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_start_that_is_cut_short_keeps_what_it_measured(thing: None, tmp_path: Path) -> None:
    bench = Bench(TIMES)

    def trials() -> Iterator[Trial]:
        yield Trial("thing", ("a", 7), bench.run)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(trials(), key="a GPU", timer=bench.timer, folder=tmp_path)
    bench.timed.clear()
    assert bench.tune(tmp_path) == 3
    assert bench.timed == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is damaged: measuring again"),
        ("[1]", "is damaged: measuring again"),
        ('{"thing a 7": {"WIDTH": 99}}', ""),
        ('{"thing a 7": null}', ""),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_file_that_says_nothing_is_measured_again(
    thing: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | bytes,
    sentence: str,
) -> None:
    Bench(TIMES).tune(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    bench = Bench(TIMES)
    assert bench.tune(tmp_path) == 3
    assert bench.timed == [1, 2, 3, 4]
    assert sentence in caplog.text
    assert json.loads(file.read_text()) == {"thing a 7": {"WIDTH": 3}}


def test_a_folder_that_cannot_be_written_costs_a_sentence(
    thing: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert Bench(TIMES).tune(blocked) == 3
    assert "cannot be kept" in caplog.text


def test_starting_together_leaves_a_whole_file(thing: None, tmp_path: Path) -> None:
    path = tmp_path / "tuning-x.json"
    entries = {f"thing {number}": {"WIDTH": 1} for number in range(300)}
    threads = [
        threading.Thread(target=lambda: [tuning._write(path, entries) for _ in range(5)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert tuning._read(path) in ({}, entries)
    for thread in threads:
        thread.join()
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_cuda_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: True)

    def word() -> str:
        return dispatch.choices("cuda")["gather_blocks"]

    def timer(run: Any) -> float:
        return 1.0 if word() == "cuda" else 2.0

    trial = Trial("gather_blocks", (), lambda: torch.zeros(1))
    tune([trial], key="k", timer=timer, folder=tmp_path)
    assert word() == "cuda"
    dispatch.forget()
    tune([trial], key="k", timer=lambda run: pytest.fail("measured again"), folder=tmp_path)
    assert word() == "cuda"
    # Gone, or overridden: the file's choice does not count.
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: word == "triton")
    dispatch.forget()
    tune([trial], key="k", timer=timer, folder=tmp_path)
    assert word() == "triton"


def test_an_override_leaves_the_configurations_to_be_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: True)
    without = dispatch.candidates()
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    assert dispatch.candidates() != without  # a file of its own
    dispatch.forget()
    timed: list[int] = []

    def timer(run: Any) -> float:
        timed.append(configs.chosen("gather_blocks")["TILE"])
        return 1.0 if timed[-1] == 1024 else 2.0

    trial = Trial("gather_blocks", (), lambda: torch.zeros(1))
    tune([trial], key="k", timer=timer, folder=tmp_path)
    assert timed == [entry["TILE"] for entry in configs.TABLE["gather_blocks"][:-1]]
    assert configs.chosen("gather_blocks")["TILE"] == 1024
    assert dispatch.choices("cuda")["gather_blocks"] == "triton"


def test_no_entry_changes_the_order_of_a_sum() -> None:
    for operation, entries in configs.TABLE.items():
        for name in configs.ORDER:
            values = {entry.get(name) for entry in entries if entry != configs.CUDA}
            assert len(values) == 1, (operation, name)


def test_the_switch_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.ENVIRONMENT, raising=False)
    assert tuning.wanted()
    monkeypatch.setenv(tuning.ENVIRONMENT, "off")
    assert not tuning.wanted()
    monkeypatch.setenv(tuning.ENVIRONMENT, "perhaps")
    with pytest.raises(KernelError, match="must be on or off, not 'perhaps'"):
        tuning.wanted()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_every_trial_runs_and_leaves_the_pool_empty(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the interpreter, two entries of each."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1.")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    dispatch.forget()
    for name, entries in configs.TABLE.items():
        monkeypatch.setitem(configs.TABLE, name, entries[:2])
    pool = torch.zeros(9, 2, 2, 4, 2, 16, dtype=dtype)
    model = trials.Model(
        dtype=torch.float16,
        heads=4,
        hidden_size=24,
        vocab_size=50,
        invariant=True,
        experts=3,
        active=2,
        inner_size=8,
    )
    sizes = trials.Sizes(prompt=6, sequences=3, context=10, blocks=4, rows=2, pool=8)
    calls: list[str] = []
    asked: set[tuple[str, tuple[object, ...]]] = set()
    original = configs.chosen

    def chosen(operation: str, *shape: object) -> configs.Config:
        asked.add((operation, shape))
        return original(operation, *shape)

    for module in ("prefill", "decode", "blocks", "wire", "sampling", "matmul"):
        monkeypatch.setattr(f"pdserve.kernels.triton_{module}.chosen", chosen)

    def timer(run: Any) -> float:
        calls.append("timed")
        run()
        return float(len(calls))

    given: list[Trial] = []

    def remembered() -> Iterator[Trial]:
        for trial in trials.trials(pool, model, sizes):
            given.append(trial)
            yield trial

    found = tune(remembered(), key="k", timer=timer, folder=tmp_path)
    assert {(trial.operation, trial.shape) for trial in given} == asked
    assert len(found) == len(given) == (7 if dtype == torch.float8_e4m3fn else 9)
    assert pool.view(torch.uint8).count_nonzero() == 0


def test_where_the_first_entry_does_not_run_another_one_is_taken(
    thing: None, tmp_path: Path
) -> None:
    assert Bench({**TIMES, 2: 1.5}, broken=1).tune(tmp_path) == 3


def test_a_trial_of_which_nothing_runs_leaves_the_first_entry(
    thing: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("out of resource")

    bench = Bench(TIMES)
    tune([Trial("thing", ("a", 7), fail)], key="a GPU", timer=bench.timer, folder=tmp_path)
    assert bench.width() == 1
    assert "None of the configurations of thing a 7 runs on this GPU." in caplog.text
    assert list(tmp_path.iterdir()) == []
