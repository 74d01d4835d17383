"""Every Triton kernel becomes machine code for a Hopper GPU, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024
"""Bytes that one program may use on sm_90."""


def shared_memory(folder: Path, *arguments: str) -> list[int]:
    """Bytes of each kernel that compile_all.py compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), "90", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "shared memory" in line]
    return [int(line.split(": ")[1].split()[0]) for line in lines]


@pytest.mark.timeout(300)
def test_every_kernel_compiles_for_hopper_in_bfloat16(tmp_path: Path) -> None:
    taken = shared_memory(tmp_path)
    assert len(taken) >= 20
    assert max(taken) < SHARED_MEMORY


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_configuration_that_may_be_measured_fits_hopper(tmp_path: Path) -> None:
    taken = shared_memory(tmp_path, "table")
    assert len(taken) >= 30
    assert 100_000 < max(taken) < SHARED_MEMORY  # several tiles are on their way at once
