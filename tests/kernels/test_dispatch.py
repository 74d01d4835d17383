"""Which implementation runs, and what an override may say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pdserve.bench.kernels import overridden
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
        ("fast", "asks for 'fast'; known implementations: reference, triton, cuda"),
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


def test_cuda_cpp_needs_cupy_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MODULES, "rope", {"triton": "triton_cache", "cuda": "cuda_rope"})
    monkeypatch.setenv(dispatch.ENVIRONMENT, "rope=cuda")
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: word == "triton")
    with pytest.raises(KernelError, match="rope=cuda, but CuPy is not installed"):
        dispatch.choices("cpu")
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: True)
    with pytest.raises(KernelError, match="rope=cuda, but the tensors are on the CPU"):
        dispatch.choices("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """A GPU that only has a name and a capability, which a test may change."""
    has = {"capability": (9, 0)}
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: has["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return has


class _OnCuda:
    """What `implementation` looks at."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def on_cuda(*dtypes: torch.dtype) -> Any:
    return [_OnCuda(dtype) for dtype in dtypes]


def test_a_gpu_runs_triton_unless_it_is_too_old(
    gpu: dict[str, tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert dispatch.choices("cuda")["rope"] == "triton"
    assert dispatch.choices("cuda")["rope"] == "triton"
    assert [record.message for record in caplog.records if "sm_90" in record.message][1:] == []
    gpu["capability"] = (7, 5)
    dispatch.forget()
    assert set(dispatch.choices("cuda").values()) == {"reference"}


def test_eight_bit_floats_need_a_newer_gpu(
    gpu: dict[str, tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    gpu["capability"] = (8, 0)
    both = on_cuda(torch.bfloat16, torch.float8_e4m3fn)
    assert dispatch.implementation("attention_decode", *both) is None
    assert "attention_decode of float8_e4m3fn runs as its reference" in caplog.text
    assert dispatch.implementation("attention_decode", both[0]) is not None
    assert dispatch.records("cuda", torch.bfloat16)
    assert not dispatch.records("cuda", torch.float8_e4m3fn)
    gpu["capability"] = (8, 9)
    dispatch.forget()
    assert dispatch.implementation("attention_decode", *both) is not None
    assert dispatch.records("cuda", torch.float8_e4m3fn)
    assert not dispatch.records("cpu", torch.bfloat16)


def test_what_a_measurement_settles_yields_to_the_override(
    gpu: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"triton": "triton_cache", "cuda": "triton_norm"}
    monkeypatch.setitem(dispatch.MODULES, "rms_norm", words)
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: word == "triton")
    assert not dispatch.settle("rms_norm", "cuda")
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: True)
    assert dispatch.settle("rms_norm", "cuda")
    assert dispatch.choices("cuda")["rms_norm"] == "cuda"
    assert dispatch.implementation("rms_norm", *on_cuda(torch.float16)) is not None
    monkeypatch.setenv(dispatch.ENVIRONMENT, "rms_norm=reference")
    dispatch.forget()
    assert not dispatch.settle("rms_norm", "cuda")
    assert dispatch.choices("cuda")["rms_norm"] == "reference"


def test_a_cpu_process_never_imports_triton() -> None:
    program = (
        "import sys, torch; from pdserve import kernels; "
        "kernels.rms_norm(torch.zeros(1, 8), torch.zeros(8), 1e-6); "
        "import pdserve.engine.build; sys.exit('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], timeout=60, check=False)
    assert done.returncode == 0


def test_a_benchmark_gives_back_what_was_settled(
    gpu: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_is_installed", lambda word: True)
    assert dispatch.settle("gather_blocks", "cuda")
    before = dict(dispatch.choices("cuda"))
    with overridden("reference"):
        assert set(dispatch.choices("cuda").values()) == {"reference"}
    assert dispatch.choices("cuda") == before
    assert before["gather_blocks"] == "cuda"
