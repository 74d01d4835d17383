"""Making the C library: once, by whoever comes first; and doing without it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pdserve import kernels
from pdserve.kernels import native
from pdserve.kernels.checks import KernelError

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or the C kernels are switched off"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_workers_that_start_together_make_one_library(tmp_path: Path) -> None:
    code = "from pdserve.kernels import native; assert native.library(); print(native.compiled())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=100)[0].strip() for process in started}
    assert len(paths) == 1 and Path(paths.pop()).parent == tmp_path / "pdserve"
    assert len(list((tmp_path / "pdserve").iterdir())) == 2  # the library and its lock


@pytest.mark.parametrize("variable", ["CC", "XDG_CACHE_HOME"])
def test_without_a_compiler_or_a_cache_torch_computes(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        x, weight = torch.randn(2, 8), torch.randn(3, 8)
        assert torch.equal(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert "run through torch" in caplog.text
    with pytest.raises(KernelError, match="switched off"):
        native.linear(x, weight, None)


def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_KERNELS", "reference")
    assert native.library() is None
    assert not native.serves(torch.zeros(1))
    assert torch.equal(kernels.linear(torch.ones(1, 2), torch.ones(3, 2)), torch.full((1, 3), 2.0))
