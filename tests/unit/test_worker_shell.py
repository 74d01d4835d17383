"""What a worker process says when it cannot work with what it was given."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["prefill_worker", "decode_worker"])
def test_cores_that_are_not_there(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"pdserve.{module}", "--cpus", "4001", "--worker-id", "w7"],
        env={**os.environ, "PDSERVE_SECRET": "s"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "w7: error: --cpus 4001" in done.stderr
    assert "Traceback" not in done.stderr
