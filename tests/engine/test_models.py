"""Every architecture, token for token as transformers' generate, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS, rewrite_config
from stepping import Stepper
from transformers import AutoConfig, AutoModelForCausalLM

from pdserve.engine.build import Built
from pdserve.engine.config import read_model_config

BLOCK = 16
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 37, 75]
NEW_TOKENS = 12

MakeModel = Callable[..., Path]
Build = Callable[..., Built]


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 590, (length,), generator=generator).tolist() for length in lengths]


def reference(folder: Path, inputs: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """What transformers generates, one prompt at a time, never stopping."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in inputs:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def check(
    folder: Path, build: Build, lengths: Sequence[int] = LENGTHS, tokens: int = NEW_TOKENS
) -> list[list[int]]:
    """Compare one ragged batch in small chunks with transformers; returns the answers."""
    inputs = prompts(lengths)
    expected = reference(folder, inputs, tokens)
    stepper = Stepper(build(folder, block_size=BLOCK))
    assert stepper.run([stepper.add(prompt) for prompt in inputs], tokens, budget=13) == expected
    return expected


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("budget", [1, 7, BLOCK, 1000])
def test_alone_and_together_as_transformers(
    arch: str, budget: int, make_model: MakeModel, build: Build
) -> None:
    folder = make_model(arch)
    expected = reference(folder, prompts(), NEW_TOKENS)
    assert len({token for answer in expected for token in answer}) > 20  # a model that says things
    built = build(folder, block_size=BLOCK)
    stepper = Stepper(built)
    together = [stepper.add(prompt) for prompt in prompts()]
    assert stepper.run(together, NEW_TOKENS, budget) == expected
    stepper = Stepper(built, seed=1)
    alone = [stepper.run([stepper.add(prompt)], NEW_TOKENS, budget)[0] for prompt in prompts()]
    assert alone == expected


def test_a_prefix_in_the_cache_is_read_and_not_computed_again(
    make_model: MakeModel, build: Build
) -> None:
    stepper = Stepper(build(make_model("qwen3"), block_size=BLOCK))
    (prompt,) = prompts([50])
    first = stepper.add(prompt)
    (expected,) = stepper.run([first], NEW_TOKENS)
    second = stepper.add(prompt)
    second.block_table[:2] = first.block_table[:2]
    second.num_computed = 2 * BLOCK
    assert stepper.run([second], NEW_TOKENS) == [expected]


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"head_dim": 24}),
        ("qwen3", {"num_key_value_heads": 1}),
        ("mistral", {"num_key_value_heads": 4}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1}),
        ("qwen2", {"tied": False}),
        ("qwen3moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
        ("qwen3moe", {"decoder_sparse_step": 2}),
        ("qwen3moe", {"mlp_only_layers": [0]}),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3, "hidden_act": "gelu"}),
    ],
    ids=str,
)
def test_variants_as_transformers(
    arch: str, config: dict[str, Any], make_model: MakeModel, build: Build
) -> None:
    check(make_model(arch, **config), build, [1, 20, 33])


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("mistral", {"sliding_window": 7}),
        ("mistral", {"sliding_window": BLOCK}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
    ],
    ids=str,
)
def test_sliding_windows_as_transformers(
    arch: str, config: dict[str, Any], make_model: MakeModel, build: Build
) -> None:
    folder = make_model(arch, **config)
    windows = read_model_config(folder).windows
    assert any(windows)
    narrow = check(folder, build, [1, 19, 60])
    assert narrow != reference(make_model(arch), prompts([1, 19, 60]), NEW_TOKENS)


ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.5,
        "mscale_all_dim": 0.7,
        "truncate": False,
        "rope_theta": 300.0,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.8,
        "rope_theta": 10000.0,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_rope_scalings_as_transformers(
    arch: str, rope: dict[str, Any], make_model: MakeModel, build: Build
) -> None:
    folder = make_model(arch, rope_parameters=rope, max_position_embeddings=256)
    answers = check(folder, build, [1, 30, 90], tokens=20)
    if rope["rope_type"] != "dynamic":  # which changes nothing within the trained length
        plain = make_model(arch, max_position_embeddings=256)
        assert answers != reference(plain, prompts([1, 30, 90]), 20)


def test_dynamic_scaling_beyond_the_trained_length_as_transformers(
    make_model: MakeModel, build: Build
) -> None:
    """The prompt is within it, the answer goes on past it."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = make_model("llama", rope_parameters=rope, max_position_embeddings=40)
    answers = check(folder, build, [1, 30, 39], tokens=60)
    plain = make_model("llama", max_position_embeddings=40)
    assert answers != reference(plain, prompts([1, 30, 39]), 60)


@pytest.mark.parametrize("rope", ROPES[:6], ids=lambda rope: rope["rope_type"])
def test_both_styles_of_rope_configuration_mean_the_same(
    rope: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    raw = make_model("llama", rope_parameters=rope, max_position_embeddings=256) / "config.json"
    (tmp_path / "config.json").write_text(raw.read_text())
    modern = read_model_config(tmp_path).rope
    old = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **old}
    rewrite_config(
        tmp_path, rope_parameters=None, rope_theta=rope["rope_theta"], rope_scaling=scaling
    )
    assert read_model_config(tmp_path).rope == modern
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == modern.kind
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    positions = torch.arange(256)
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), positions.unsqueeze(0))
    mine = modern.table(16, 256)
    torch.testing.assert_close(mine[0], cos[0, :, :8], rtol=0, atol=1e-5)
    torch.testing.assert_close(mine[1], sin[0, :, :8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype: str, make_model: MakeModel, build: Build) -> None:
    """Log-probabilities of a fixed text: half precision may not choose the same tokens."""
    folder = make_model("llama")
    (text,) = prompts([60])
    found = {}
    for name in ("float32", dtype):
        stepper = Stepper(build(folder, dtype=name))
        request = stepper.add(text, prompt_logprobs=0)
        stepper.run([request], 1, budget=25)
        chunks = [result.prompt_logprobs for result in stepper.results[request]]
        found[name] = torch.tensor([entry.logprob for chunk in chunks for entry in chunk])
    error = (found[dtype] - found["float32"]).abs().mean() / found["float32"].abs().mean()
    assert error < (0.03 if dtype == "bfloat16" else 0.004)
