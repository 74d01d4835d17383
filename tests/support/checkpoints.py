"""Random-weight checkpoints in Hugging Face's layout, with a real tokenizer and chat template.

    python tests/support/checkpoints.py OUT --arch qwen3 --shape tiny

The weights say nothing, but everything else is as in a real model folder: config.json,
generation_config.json, one or many safetensors files, a byte-level BPE tokenizer trained on the
standard library, and a ChatML template. The same arguments make the same files.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = SPECIAL.index("<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mixtral": MixtralConfig,
    "qwen3moe": Qwen3MoeConfig,
}
SHAPES: dict[str, dict[str, int]] = {
    "nano": {"hidden": 64, "inner": 144, "layers": 2, "heads": 4, "kv": 2, "dim": 16, "vocab": 600},
    "tiny": {
        "hidden": 128, "inner": 352, "layers": 4, "heads": 4, "kv": 2, "dim": 32, "vocab": 4096,
    },
    "mid": {
        "hidden": 512, "inner": 1408, "layers": 8, "heads": 8, "kv": 4, "dim": 64, "vocab": 16384,
    },
    "qwen06b": {
        "hidden": 1024, "inner": 3072, "layers": 28, "heads": 16, "kv": 8, "dim": 128,
        "vocab": 151936,
    },
}  # fmt: skip
"""nano: 0.1 M parameters, tiny: 1.8 M, mid: 32 M, qwen06b: 596 M (tied, but for tiny)."""
_MAX_MERGED = 16000
"""Largest tokenizer vocabulary: the rest of a larger model vocabulary has no text."""


def make_checkpoint(
    out: Path | str,
    arch: str = "llama",
    shape: str = "nano",
    *,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool | None = None,
    max_shard_size: str = "5GB",
    spread: float = 0.2,
    **config: Any,
) -> Path:
    """Write a checkpoint into the folder `out` and return it.

    arch: a key of CONFIGS; shape: a key of SHAPES; tied: share embedding and output matrix (None:
    all shapes but tiny); max_shard_size: as for `save_pretrained`, small for many files; spread:
    deviation of the weights (large enough for greedy answers that do not repeat one token);
    config: further fields of config.json, such as rope_parameters, sliding_window or
    max_position_embeddings.
    """
    size = SHAPES[shape]
    fields: dict[str, Any] = {
        "hidden_size": size["hidden"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "vocab_size": size["vocab"],
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": EOS,
        "initializer_range": spread,
        "tie_word_embeddings": shape != "tiny" if tied is None else tied,
    }
    if arch != "qwen2":  # its head size is hidden_size / num_attention_heads
        fields["head_dim"] = size["dim"]
    if arch == "mixtral":
        fields |= {"num_local_experts": 6, "num_experts_per_tok": 2}
    if arch == "qwen3moe":
        fields |= {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}
        fields["moe_intermediate_size"] = size["inner"] // 2
    if arch in ("mistral", "mixtral"):
        fields["sliding_window"] = None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[arch](**{**fields, **config}))
    _spread_vectors(model, spread)
    model = model.to(getattr(torch, dtype))
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(out, max_shard_size=max_shard_size)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(min(size["vocab"] - 8, _MAX_MERGED))),
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[0],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(out)
    return Path(out)


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change fields of a checkpoint's config.json (None: remove the field)."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        raw.pop(key, None)
        if value is not None:
            raw[key] = value
    path.write_text(json.dumps(raw, indent=2))


def _spread_vectors(model: torch.nn.Module, spread: float) -> None:
    """Norms and biases start as ones and zeros, which would hide that one of them is not used."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * spread)


@functools.cache
def _bpe(vocab_size: int) -> str:
    """A byte-level BPE tokenizer trained on the standard library, as JSON."""
    sources = sorted(Path(functools.__file__).parent.glob("*.py"))
    few = sources[: 8 if vocab_size < 1000 else 150]
    texts = [path.read_text(errors="replace") for path in few]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a random-weight checkpoint.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--arch", choices=CONFIGS, default="llama")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--max-shard-size", default="5GB", help="largest file (default 5GB)")
    parser.add_argument("--rope-parameters", type=json.loads, help="JSON, as in config.json")
    parser.add_argument("--sliding-window", type=int, help="in tokens (mistral, qwen2, qwen3)")
    parser.add_argument("--max-position-embeddings", type=int, default=8192)
    args = parser.parse_args()
    config: dict[str, Any] = {"max_position_embeddings": args.max_position_embeddings}
    if args.rope_parameters is not None:
        config["rope_parameters"] = args.rope_parameters
    if args.sliding_window is not None:
        if args.arch == "llama":
            parser.error("--sliding-window: llama has none; use mistral, qwen2 or qwen3.")
        config["sliding_window"] = args.sliding_window
        if args.arch != "mistral":
            config |= {"use_sliding_window": True, "max_window_layers": 1}
    make_checkpoint(
        args.out,
        args.arch,
        args.shape,
        seed=args.seed,
        dtype=args.dtype,
        tied=args.tied,
        max_shard_size=args.max_shard_size,
        **config,
    )
    print(args.out)


if __name__ == "__main__":
    main()
