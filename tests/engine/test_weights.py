"""Configuration and weights: what is read, and the sentence for everything that is not right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import rewrite_config
from safetensors.torch import load_file, save_file

from pdserve.engine.config import ModelError, model_config, read_model_config
from pdserve.engine.models.checkpoint import OUTPUT, weight_specs
from pdserve.engine.weights import dummy_weights, load_weights, weights_digest

MakeModel = Callable[..., Path]


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    config = read_model_config(folder)
    tied = frozenset({OUTPUT}) if config.tie_word_embeddings else frozenset()
    return load_weights(
        folder, weight_specs(config), dtype=dtype, device="cpu", optional=tied, **options
    )


@pytest.fixture
def copy(make_model: MakeModel, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(make_model("llama"), tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the single weight file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_many_files_are_as_good_as_one(make_model: MakeModel) -> None:
    single = make_model("qwen3", tied=False)
    many = make_model("qwen3", tied=False, max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert not (many / "model.safetensors").exists()
    one, other = load(single), load(many)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert weights_digest(single) != weights_digest(many)


def test_weights_are_the_mapped_file_and_not_a_copy(make_model: MakeModel) -> None:
    folder = make_model("llama", dtype="bfloat16")
    tensors = load(folder, torch.bfloat16)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    assert mapped
    for tensor in tensors.values():
        address = tensor.data_ptr()
        assert any(begin <= address < end for begin, end in mapped)
    assert (
        load(folder, torch.float32)[OUTPUT.replace("lm_head", "model.norm")].dtype == torch.float32
    )


def test_progress_grows_to_one(make_model: MakeModel) -> None:
    for folder in (make_model("llama"), make_model("llama", max_shard_size="100KB")):
        shares: list[float] = []
        load(folder, progress=shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert len(shares) > 10


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks the tensor model.layers.1.mlp.up_proj.weight\."):
        load(copy)
    edit(copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight and 1 more\."):
        load(copy)


def test_a_left_over_tensor_is_named(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"model.layers.2.extra": torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"holds the tensor model.layers.2.extra, which this arch"):
        load(copy)


def test_a_wrong_shape_is_named_with_both_shapes(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(ModelError, match=r"model.norm.weight has the shape \[63\].*\[64\]"):
        load(copy)


def test_a_wrong_dtype_is_named_with_both_dtypes(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64).char()}))
    with pytest.raises(ModelError, match="norm.weight is int8, but by config.json it must be flo"):
        load(copy)


def test_a_tensor_in_two_files_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama", max_shard_size="100KB"), tmp_path / "model")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    with pytest.raises(ModelError, match=f"holds the tensor {name}, as another file does"):
        load(folder)


def test_harmless_extras_are_ignored(copy: Path) -> None:
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        OUTPUT: torch.zeros(600, 64),
    }
    edit(copy, lambda tensors: tensors.update(extras))
    assert OUTPUT not in load(copy)
    rewrite_config(copy, tie_word_embeddings=False)
    assert load(copy)[OUTPUT].count_nonzero() == 0


def test_an_untied_model_needs_its_output_layer(copy: Path) -> None:
    rewrite_config(copy, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lacks the tensor lm_head.weight"):
        load(copy)


@pytest.mark.parametrize("kept", [0, 5, 100, 2000, -1])
def test_a_truncated_file_is_named(kept: int, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ModelError, match=r"model\.safetensors is damaged or not a safetensors file"
    ):
        load(copy)


def test_a_file_of_something_else_is_named(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(ModelError, match="is damaged or not a safetensors file"):
        load(copy)


def test_a_folder_without_weights_says_what_would_do(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model.safetensors nor .*--load-format dummy"):
        load(copy)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "cannot be read as a weight index"),
        ("{}", "cannot be read as a weight index"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "not a file of the model folder"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "which is not in the model folder"),
    ],
)
def test_a_bad_index_is_named(index: str, sentence: str, copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=sentence):
        load(copy)


def test_the_digest_changes_with_the_header_and_the_size(copy: Path) -> None:
    before = weights_digest(copy)
    assert weights_digest(copy) == before
    edit(copy, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert weights_digest(copy) != before


def test_the_digest_tells_trainings_of_one_shape_apart(make_model: MakeModel) -> None:
    one, other = make_model("llama", seed=1), make_model("llama", seed=2)
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    assert weights_digest(one) != weights_digest(other)


def test_the_digest_looks_into_every_tensor(copy: Path) -> None:
    edit(copy, lambda tensors: None)
    found = {weights_digest(copy)}
    for name in load_file(copy / "model.safetensors"):
        edit(copy, lambda tensors, name=name: tensors[name].mul_(2))  # type: ignore[misc]
        found.add(weights_digest(copy))
    assert len(found) == 1 + len(load_file(copy / "model.safetensors"))


def test_dummy_weights_depend_on_seed_and_name_only(make_model: MakeModel) -> None:
    shapes = weight_specs(read_model_config(make_model("qwen2")))
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    shares: list[float] = []
    one = dummy_weights(shapes, seed=1, progress=shares.append, **options)
    assert shares[-1] == 1.0
    backwards = dict(reversed(shapes.items()))
    again = dummy_weights(backwards, seed=1, **options)
    assert all(torch.equal(one[name], again[name]) for name in shapes)
    other = dummy_weights(shapes, seed=2, **options)
    matrices = [name for name, spec in shapes.items() if len(spec.shapes[0]) == 2]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    assert len({one[name].flatten()[0].item() for name in matrices}) == len(matrices)
    assert one["model.norm.weight"].unique().tolist() == [1.0]
    assert one["model.layers.0.self_attn.q_proj.bias"].unique().tolist() == [0.0]


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def test_what_a_config_leaves_unsaid_is_as_in_transformers() -> None:
    config = model_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (2, 4, "float32")
    assert (config.rms_norm_eps, config.rope.theta, config.rope.kind) == (1e-6, 10000.0, "default")
    assert not (config.tie_word_embeddings or config.qkv_bias or config.o_bias or config.mlp_bias)
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 1}
    assert model_config(mistral).windows == (4096, 4096)
    assert model_config({**mistral, "sliding_window": None}).windows == (None, None)
    qwen2 = {**mistral, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}
    assert model_config(qwen2).windows == (None, None)
    assert model_config(qwen2).qkv_bias
    assert not model_config(qwen2).o_bias
    assert model_config({**qwen2, "use_sliding_window": True}).windows == (None, None)  # from 28
    qwen3 = {**qwen2, "architectures": ["Qwen3ForCausalLM"]}
    assert model_config(qwen3).head_dim == 128
    assert model_config(qwen3).qk_norm


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel.* is not supported; known: Llama",
        ),
        ({"architectures": None}, "the architecture None is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quant_method None is not"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, not 'many'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"num_key_value_heads": 3}, r"\(2\) must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 5}, "head_dim must be even"),
        (
            {
                "architectures": ["MixtralForCausalLM"],
                "num_key_value_heads": 1,
                "num_local_experts": 2,
                "num_experts_per_tok": 3,
            },
            r"num_experts_per_tok \(3\) must not be above num_local_experts \(2\)",
        ),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; known: silu"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope' is not supp"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number from 1 up"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "does not know x"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "needs high_freq_factor and low_"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "does not know full_at",
        ),
        ({"rope_parameters": 3}, "must be an object, not 3"),
    ],
    ids=str,
)
def test_a_configuration_that_we_cannot_serve_is_refused(
    change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        model_config({**LLAMA, **change})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 0},
            "sliding_window must be a positive int",
        ),
        ({"layer_types": ["sliding_attention"] * 2}, "but use_sliding_window is false"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "each of the 2 layers"),
        ({"use_sliding_window": True, "layer_types": ["linear", "x"]}, "each of the 2 layers"),
    ],
    ids=str,
)
def test_windows_that_contradict_themselves_are_refused(
    change: dict[str, Any], sentence: str
) -> None:
    base = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 1}
    with pytest.raises(ModelError, match=sentence):
        model_config({**base, **change})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "has no config.json"), ("{", "cannot be read"), ("[]", "must hold a JSON object")],
)
def test_a_bad_config_file_is_named(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=sentence):
        read_model_config(tmp_path)
