"""The table that ends bench/gpu/check.sh, and the script where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

GPU = Path(__file__).resolve().parents[2] / "bench" / "gpu"


def row(name: str, **given: Any) -> dict[str, Any]:
    usual = {"microseconds": 50.0, "share": 0.9, "torch_ratio": 0.8, "error": 1e-3}
    return {"name": name, "tolerance": 1e-2, **usual, **given}


def table(folder: Path) -> tuple[int, dict[str, str]]:
    """Exit code, and the verdict of each line by its first words."""
    done = subprocess.run(
        [sys.executable, "-P", str(GPU / "table.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr
    lines = done.stdout.splitlines()[1:]
    return done.returncode, {line[:52].strip(): line.rsplit("  ", 1)[1] for line in lines}


def store(folder: Path, rows: list[dict[str, Any]], failures: list[dict[str, str]]) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        found = {"dtype": dtype, "results": rows, "failures": failures}
        (folder / f"kernels-{dtype}-all.json").write_text(json.dumps(found))


def test_nothing_measured_is_neither_reached_nor_missed(tmp_path: Path) -> None:
    code, verdicts = table(tmp_path)
    assert code == 0
    assert set(verdicts.values()) == {"not measured"}


def test_everything_reached(tmp_path: Path) -> None:
    names = ["attention_decode 64 x 4096", "attention_prefill 4096", "attention_prefill 16384"]
    names += [
        "sample 64 x 151936",
        "sample 64 x 151936 top-k 50, top-p 0.9",
        "rms_norm 16384 x 4096",
    ]
    store(tmp_path, [row(name) for name in names], [])
    step = {"name": "decode step qwen3-8b x 36 layers, batch 1", "ratio": 1.2, "milliseconds": 4.0}
    (tmp_path / "decode-dense.json").write_text(json.dumps([step]))
    (tmp_path / "notes").write_text("nccl\tyes\t9 GB/s\n")
    code, verdicts = table(tmp_path)
    assert code == 0
    assert set(verdicts.values()) == {"reached"}
    assert len(verdicts) == len(names) + 1 + 3 + 1


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("attention_decode 64 x 4096", {"share": 0.79}),
        ("attention_prefill 16384", {"torch_ratio": 0.74}),
        ("sample 64 x 151936", {"microseconds": 101.0}),
        ("gather_blocks 512", {"share": 0.84}),
        ("mixture 1 x 2048, 8 of 128 x 768", {"error": 0.02}),
        ("mixture 1 x 2048, 8 of 128 x 768", {"error": float("inf")}),
    ],
)
def test_what_is_missed_is_said_and_fails(tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    store(tmp_path, [row(name, **given)], [])
    code, verdicts = table(tmp_path)
    assert code == 1
    assert "MISSED" in verdicts.values()


def test_the_floor_of_all_times_is_told(tmp_path: Path) -> None:
    for name, launch in (("a", 4.0), ("b", 4.7), ("c", 9.0)):
        found = {"dtype": "bfloat16", "results": [], "failures": [], "launch_us": launch}
        (tmp_path / f"kernels-bfloat16-{name}.json").write_text(json.dumps(found))
    _, verdicts = table(tmp_path)
    assert verdicts["a launch that does nothing"] == "measured"


def test_what_broke_is_said_with_its_reason(tmp_path: Path) -> None:
    store(tmp_path, [], [{"name": "sampling", "reason": "RuntimeError: no"}])
    (tmp_path / "notes").write_text("nccl\tno\texit code 1\nclusters\t-\tleft out\n")
    code, verdicts = table(tmp_path)
    assert code == 1
    assert verdicts["sampling (kernels-bfloat16-all)"] == "MISSED"
    assert verdicts["nccl"] == "MISSED" and verdicts["clusters"] == "not measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(GPU / "check.sh"), str(tmp_path / "results")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "results").exists()
