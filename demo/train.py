"""Trains the demo model from nothing: ``python -P -m pdserve.demo.train --out demo/model``.

The corpus is written on the fly (pdserve.demo.corpus), so that no conversation is seen twice.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pdserve.demo import model_path
from pdserve.demo.corpus import conversations
from pdserve.demo.tokenizer import END, END_OF_TEXT, encode, train_tokenizer

VOCABULARY = 2048
LONGEST = 4096  # tokens, prompt and answer together
ROPE_THETA = 10_000.0
STEP_TOKENS = 2048  # tokens in one training step
ROW = 256  # tokens in a row of an ordinary step
LONG_ROW = 2048  # tokens in a row of a long step
LONG_EVERY = 12  # each so many steps one is long
ELSEWHERE = 0.1  # weight of tokens that the assistant does not write

Batch = tuple[Tensor, Tensor, Tensor]  # ids, weights, positions; each (rows, tokens)


def config() -> Qwen3Config:
    """The shape of the model: Qwen3, about 3.1 million parameters."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        dtype="float32",
    )


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on twenty thousand conversations."""
    sample = itertools.islice(conversations(seed), 20_000)
    texts = (message["content"] for conversation in sample for message in conversation)
    roles = ["system\n", "user\n", "assistant\n", "tool\n"] * 1000
    return train_tokenizer(itertools.chain(texts, roles), VOCABULARY, LONGEST)


def rows(tokenizer: PreTrainedTokenizerFast, seed: int, length: int) -> Iterator[Batch]:
    """An endless stream of single rows of whole conversations, the last one cut at ``length``."""
    rng = Random(seed)
    stream = conversations(seed)
    while True:
        ids: list[int] = []
        answered: list[bool] = []
        while len(ids) < length:
            more_ids, more_answered = encode(tokenizer, next(stream))
            ids += more_ids
            answered += more_answered
        weights = torch.where(torch.tensor(answered[:length]), 1.0, ELSEWHERE)
        yield torch.tensor(ids[:length]), weights, positions(rng, length)


def positions(rng: Random, length: int) -> Tensor:
    """Positions of a row, (length,): in half of the rows with jumps, up to ``LONGEST``.

    The jumps show the model distances that short rows do not have, so that a long conversation
    does not turn to noise.
    """
    result = torch.arange(length)
    if rng.random() < 0.5:
        return result
    room = LONGEST - length
    for place in sorted(rng.sample(range(1, length), 3)):
        jump = rng.randint(0, room)
        result[place:] += jump
        room -= jump
    return result


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """An endless stream of batches of ``STEP_TOKENS`` tokens."""
    short = rows(tokenizer, seed, ROW)
    long = rows(tokenizer, seed + 1, LONG_ROW)
    for step in itertools.count():
        source, length = (long, LONG_ROW) if step % LONG_EVERY == 5 else (short, ROW)
        parts = [next(source) for _ in range(STEP_TOKENS // length)]
        ids, weights, places = (torch.stack(part) for part in zip(*parts, strict=True))
        yield ids, weights, places


def loss_of(model: Qwen3ForCausalLM, batch: Batch, bfloat16: bool) -> Tensor:
    """The weighted mean cross-entropy of the next token, a scalar.

    The mask of ones says that a jump of positions does not begin a new sequence.
    """
    ids, weights, places = batch
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=places,
            use_cache=False,
        )
    losses = functional.cross_entropy(
        output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short linear rise to ``peak``, then half a cosine down to 2 % of it."""
    rise = min(100, steps // 10)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_of(model: Qwen3ForCausalLM) -> torch.optim.AdamW:
    """AdamW that lets the matrices decay and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(
    tokenizer: PreTrainedTokenizerFast, steps: int, peak: float, seed: int, bfloat16: bool
) -> Qwen3ForCausalLM:
    """Train a fresh model for ``steps`` steps, with a line of progress now and then."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config())
    optimizer = optimizer_of(model)
    began, cpu_began, mean = time.monotonic(), time.process_time(), 0.0
    for step, batch in zip(range(steps), batches(tokenizer, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(model, batch, bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 19 or step + 1 == steps:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {mean:.3f}  {left / 60:.1f} min left", flush=True)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu_began
    print(f"trained {steps} steps in {wall:.0f} s ({cpu:.0f} CPU seconds)")
    return model


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder in Hugging Face layout: tensors in bfloat16, to be computed in float32."""
    end, end_of_text = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    model.config.eos_token_id = end
    model.config.pad_token_id = end_of_text
    # Servers take their default temperature from here; a warm one makes a small model babble.
    model.generation_config = GenerationConfig(
        eos_token_id=[end, end_of_text], pad_token_id=end_of_text, do_sample=True, temperature=0.1
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "config.json"
    settings = json.loads(path.read_text()) | {"dtype": "float32", "rope_theta": ROPE_THETA}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Train the demo model of pdserve.")
    parser.add_argument("--out", type=Path, default=model_path(), help="folder to write")
    parser.add_argument("--steps", type=int, default=4000, help=f"steps of {STEP_TOKENS} tokens")
    parser.add_argument("--peak", type=float, default=2.5e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and fast_bfloat16())
    print(f"training with {args.threads} threads, bfloat16 {'on' if bfloat16 else 'off'}")
    tokenizer = build_tokenizer(args.seed)
    model = train(tokenizer, args.steps, args.peak, args.seed, bfloat16)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
