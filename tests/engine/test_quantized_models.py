"""Quantised checkpoints: the same tokens and log-probabilities as their twins, which hold the
dequantised matrices in float32; and the sentence for every format that is not supported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import rewrite_config
from quantised_checkpoints import EXCLUDED, FORMATS, quantise_checkpoint
from safetensors.torch import load_file, save_file
from stepping import Stepper

from pdserve import kernels
from pdserve.engine.build import Built
from pdserve.engine.config import ModelError, model_config, read_model_config
from pdserve.engine.models.checkpoint import weight_specs
from pdserve.engine.models.decoder import Linear

MakeModel = Callable[..., Path]
Build = Callable[..., Built]
NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 590, (n,), generator=generator).tolist() for n in (1, 16, 37, 75)]


@pytest.fixture(scope="session")
def made(
    make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """(architecture, format) → the quantised checkpoint and its twin."""
    known: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(arch: str, kind: str) -> tuple[Path, Path]:
        if (arch, kind) not in known:
            folder = make_model(arch, dtype="bfloat16")
            out = tmp_path_factory.mktemp("quantised")
            known[arch, kind] = quantise_checkpoint(folder, out, kind)
        return known[arch, kind]

    return make


def answers(built: Built) -> list[list[int]]:
    stepper = Stepper(built)
    return stepper.run([stepper.add(prompt) for prompt in prompts()], NEW_TOKENS, budget=13)


def log_probabilities(built: Built) -> torch.Tensor:
    stepper = Stepper(built)
    request = stepper.add(prompts()[-1], prompt_logprobs=0)
    stepper.run([request], 1, budget=25)
    chunks = [result.prompt_logprobs for result in stepper.results[request]]
    return torch.tensor([entry.logprob for chunk in chunks for entry in chunk])


def linears(built: Built) -> dict[str, Linear]:
    first, second = built.runner._decoder.layers[:2]
    return {"query": first.attention.query, "down": first.mlp.down, "last": second.mlp.down}


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        *[("llama", kind) for kind in FORMATS],
        ("qwen3", "awq"),
        ("qwen3", "fp8 blocks"),
        ("qwen2", "awq"),  # which has biases
        ("qwen2", "gptq"),
    ],
)
def test_the_same_tokens_as_the_dequantised_model(
    arch: str, kind: str, made: Callable[[str, str], tuple[Path, Path]], build: Build
) -> None:
    quantised, twin = made(arch, kind)
    mine, theirs = build(quantised), build(twin)
    assert answers(mine) == answers(theirs)
    expected = log_probabilities(theirs)
    torch.testing.assert_close(log_probabilities(mine), expected, rtol=1e-4, atol=1e-4)
    found = linears(mine)
    assert isinstance(found["query"].weight, kernels.QuantizedWeight)
    assert isinstance(found["down"].weight, kernels.QuantizedWeight)
    excluded = read_model_config(quantised).quantization
    assert excluded is not None
    assert isinstance(found["last"].weight, torch.Tensor) is (not excluded.covers(EXCLUDED))
    assert mine.runner._decoder.decode is None
    assert "differ in model" in str(mine.fingerprint.difference(theirs.fingerprint))


def test_biases_that_autogptq_adds_are_added(
    made: Callable[[str, str], tuple[Path, Path]], build: Build, tmp_path: Path
) -> None:
    quantised, _ = made("llama", "gptq")
    expected = log_probabilities(build(quantised))
    for value in (0.0, 0.5):
        folder = Path(shutil.copytree(quantised, tmp_path / str(value)))
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(".qweight")]:
            layer = name.removesuffix("qweight")
            tensors[layer + "bias"] = torch.full(tensors[name].shape[1:], value).half()
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(log_probabilities(build(folder)), expected) is (value == 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["awq", "gptq", "fp8 blocks", "int-quantized"])
def test_half_precision_stays_near_the_dequantised_model(
    kind: str, dtype: str, made: Callable[[str, str], tuple[Path, Path]], build: Build
) -> None:
    quantised, twin = made("llama", kind)
    expected = log_probabilities(build(twin))
    error = (log_probabilities(build(quantised, dtype=dtype)) - expected).abs().mean()
    assert error / expected.abs().mean() < (0.03 if dtype == "bfloat16" else 0.004)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounding_at_load_is_rounding_and_nothing_else(
    kind: Any, make_model: MakeModel, build: Build, tmp_path: Path
) -> None:
    folder = make_model("llama")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = kernels.dequantize(kernels.quantize(tensor, kind))
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    save_file(tensors, twin / "model.safetensors")
    plain, mine, theirs = build(folder), build(folder, quantization=kind), build(twin)
    assert answers(mine) == answers(theirs)
    rounded = log_probabilities(mine)
    torch.testing.assert_close(rounded, log_probabilities(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rounded, log_probabilities(plain), rtol=1e-4, atol=1e-4)
    assert "differ in model" in str(mine.fingerprint.difference(plain.fingerprint))
    dummy = build(folder, quantization=kind, load_format="dummy")
    assert isinstance(linears(dummy)["query"].weight, kernels.QuantizedWeight)


def test_a_quantised_model_with_the_same_bits_in_any_batch(
    made: Callable[[str, str], tuple[Path, Path]], build: Build
) -> None:
    built = build(made("llama", "awq")[0], batch_invariant=True)
    found = []
    for budget in (1, 7, 1000):
        stepper = Stepper(built)
        request = stepper.add(prompts()[-1], prompt_logprobs=0)
        others = [stepper.add(prompt) for prompt in prompts()[: 3 if budget == 7 else 0]]
        stepper.run([request, *others], 3, budget=budget)
        chunks = [result.prompt_logprobs for result in stepper.results[request]]
        found.append([entry.logprob for chunk in chunks for entry in chunk])
    assert found[0] == found[1] == found[2]


def test_what_the_options_exclude(
    make_model: MakeModel, made: Callable[[str, str], tuple[Path, Path]], build: Build
) -> None:
    quantised, _ = made("llama", "awq")
    with pytest.raises(ModelError, match=r"--quantization int8: .* quantised already \(awq\)"):
        build(quantised, quantization="int8")
    with pytest.raises(ModelError, match=r"--load-format dummy .* remove its quantization_config"):
        build(quantised, load_format="dummy")
    with pytest.raises(ModelError, match="must be none or one of int8, fp8, not 'int4'"):
        build(make_model("llama"), quantization="int4")
    with pytest.raises(ModelError, match="--quantization fp8: mixtures of experts are not supp"):
        build(make_model("mixtral"), quantization="fp8")


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("awq", {"g": None}, r"lacks the tensor model.layers.0.mlp.down_proj.qweight"),
        ("awq", {"qzeros": torch.zeros(9, 8)}, r"qzeros is float32, but .* it must be int32"),
        ("awq", {"scales": torch.zeros(3, 64)}, r"shape \[3, 64\], but .* must have \[9, 64\]"),
        ("gptq", {"g_idx": torch.zeros(144).int()}, "of model.layers.0.mlp.down_proj cannot be us"),
        ("fp8 tensor", {"weight_scale": torch.zeros(2)}, r"have \[64, 1\] or \[64\] or \[1\] or"),
        ("pack-quantized", {"weight_shape": torch.tensor([144, 64])}, r"weight_shape is \[144, 64"),
        ("int-quantized", {"input_scale": torch.ones(1)}, "input_scale, which this architecture"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(
    kind: str,
    change: dict[str, torch.Tensor | None],
    sentence: str,
    made: Callable[[str, str], tuple[Path, Path]],
    build: Build,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(made("llama", kind)[0], tmp_path / "spoiled"))
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj."
    for name, tensor in change.items():
        if tensor is None:
            del tensors[layer + "qweight"]
        else:
            tensors[layer + name] = tensor
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=sentence):
        build(folder)


def test_a_shape_that_four_bits_cannot_hold(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    rewrite_config(folder, quantization_config=FORMATS["awq"][0], intermediate_size=100)
    with pytest.raises(ModelError, match=r"mlp.gate_proj cannot .* a multiple of 8 outputs, not 1"):
        weight_specs(read_model_config(folder))


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def weights_of(kind: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a compressed-tensors format, its weights changed."""
    config = FORMATS[kind][0]
    (group,) = config["config_groups"].values()
    return {"config_groups": {"g": {**group, "weights": {**group["weights"], **changes}}}}


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("awq", {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; known: awq, g"),
        ("awq", {"bits": 8}, "bits 8 is not supported; known: 4"),
        ("awq", {"bits": True}, "bits True is not supported"),
        ("awq", {"version": "gemv"}, "version 'gemv' is not supported; known: gemm"),
        ("awq", {"zero_point": False}, "zero_point False is not supported"),
        ("awq", {"group_size": 48}, "group_size 48 is not supported; known: -1, 16, 32"),
        ("awq", {"modules_to_not_convert": "x"}, "must be a list of names, not 'x'"),
        ("gptq", {"bits": 3}, "bits 3 is not supported"),
        ("gptq", {"lm_head": True}, "lm_head True is not supported"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ("gptq", {"dynamic": {"-:x": {}}}, "dynamic .* is not supported; leave it out"),
        ("fp8 blocks", {"activation_scheme": "static"}, "activation_scheme 'static' is not supp"),
        ("fp8 blocks", {"weight_block_size": [128, 100]}, "weight_block_size .* is not supported"),
        ("fp8 blocks", {"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
        ("int-quantized", {"format": "marlin-24"}, "format 'marlin-24' is not supported"),
        ("int-quantized", {"format": "float-quantized"}, "type 'int' is not supported"),
        ("int-quantized", {"ignore": []}, "ignore must name lm_head"),
        ("int-quantized", {"ignore": ["re:("]}, r"ignore has the pattern 're:\('"),
        ("int-quantized", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .* not supported"),
        ("int-quantized", {"config_groups": {}}, "config_groups must have one group"),
        ("int-quantized", weights_of("int-quantized", num_bits=4), "num_bits 4 is not supported"),
        ("int-quantized", weights_of("int-quantized", symmetric=False), "symmetric False is not"),
        ("int-quantized", weights_of("int-quantized", strategy="group"), "strategy 'group' is not"),
        ("pack-quantized", weights_of("pack-quantized", num_bits=8), "num_bits 8 is not supported"),
        ("pack-quantized", weights_of("pack-quantized", group_size=None), "group_size None is not"),
    ],
    ids=str,
)
def test_a_format_that_is_not_supported_is_named(
    kind: str, changes: dict[str, Any], sentence: str
) -> None:
    config = {**FORMATS[kind][0], **changes}
    with pytest.raises(ModelError, match=f"config.json: quantization_config: .*{sentence}"):
        model_config({**LLAMA, "quantization_config": config})


def test_quantised_mixtures_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("mixtral"), tmp_path / "model"))
    rewrite_config(folder, quantization_config=FORMATS["awq"][0])
    with pytest.raises(ModelError, match="MixtralForCausalLM: mixtures of experts with quantised"):
        read_model_config(folder)
