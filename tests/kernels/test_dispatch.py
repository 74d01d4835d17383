"""Which implementation runs, and what an override may say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from pdserve.kernels import KernelError, dispatch


@pytest.fixture(autouse=True)
def decided_again() -> Iterator[None]:
    dispatch.forget()
    yield
    dispatch.forget()


def test_the_cpu_runs_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    assert set(dispatch.choices("cpu").values()) == {"reference"}
    assert all(dispatch.implementation(name, torch.zeros(1)) is None for name in dispatch.MODULES)


def test_an_override_names_everything_or_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton, rope=reference")
    chosen = dispatch.choices("cpu")
    assert chosen["rope"] == "reference"
    assert chosen["rms_norm"] == "triton"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fast", "asks for 'fast'; known implementations: reference, triton"),
        ("sort=triton", "names the operation 'sort'; known: rms_norm"),
        ("rope=", "asks for ''"),
    ],
)
def test_an_override_that_means_nothing_is_refused(
    text: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, text)
    with pytest.raises(KernelError, match=sentence):
        dispatch.choices("cpu")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "rope=triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(KernelError, match="rope=triton, but the tensors are on the CPU"):
        dispatch.choices("cpu")


def test_a_cpu_process_never_imports_triton() -> None:
    program = (
        "import sys, torch; from pdserve import kernels; "
        "kernels.rms_norm(torch.zeros(1, 8), torch.zeros(8), 1e-6); "
        "import pdserve.engine.build; sys.exit('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], timeout=60, check=False)
    assert done.returncode == 0
