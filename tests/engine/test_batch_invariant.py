"""--batch-invariant: a token's KV and logits have the same bits in whatever batch and chunk."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import Stepper

from pdserve import kernels
from pdserve.engine.build import Built
from pdserve.engine.request import Request

MakeModel = Callable[..., Path]
Build = Callable[..., Built]
TOKENS = 45
"""Of the sequence that is looked at; 6 of them count as its answer."""


def text(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 590), k=length)


class Watched:
    """The bits that one request left: its KV, and the logits of every row of its that were made."""

    def __init__(self, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built = built
        self.rows: list[torch.Tensor] = []
        original = built.runner._decoder.logits

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            made = original(hidden)
            self.rows += [row.clone() for row in made]
            return made

        monkeypatch.setattr(built.runner._decoder, "logits", logits)

    def kv(self, request: Request) -> torch.Tensor:
        """[L, 2, TOKENS, H, D]."""
        blocks = self.built.pool.tensor[request.block_table]
        return blocks.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)[:, :, :TOKENS].clone()

    def has(self, row: torch.Tensor) -> bool:
        return any(torch.equal(row, other) for other in self.rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("qwen3", {"hidden_act": "gelu", "intermediate_size": 100}),
        ("mistral", {"sliding_window": 20}),
        ("qwen3moe", {}),
    ],
    ids=["qwen3", "mistral", "qwen3moe"],
)
def test_bits_do_not_depend_on_batch_and_chunks(
    arch: str,
    config: dict[str, Any],
    dtype: str,
    make_model: MakeModel,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_model(arch, **config)
    built = build(folder, dtype=dtype, batch_invariant=True, num_blocks=400)
    assert built.config.batch_invariant and built.fingerprint.batch_invariant
    watched = Watched(built, monkeypatch)
    sequence = text(TOKENS, 1)
    stepper = Stepper(built)
    # Every token by itself, as if all were decoded: also the logits of every position.
    single = stepper.add(sequence, prompt_logprobs=1)
    (answer,) = stepper.run([single], 3, budget=1)
    expected, logits = watched.kv(single), watched.rows
    assert len(logits) == TOKENS - 1 + 3
    for budget in (7, 16, 1000):
        watched.rows = []
        alone = stepper.add(sequence, prompt_logprobs=1)
        assert stepper.run([alone], 3, budget) == [answer]
        assert torch.equal(watched.kv(alone), expected)
        assert all(watched.has(row) for row in logits)
    # As after the death of a worker: the answer so far is prefilled with the prompt.
    recovered = stepper.add([*sequence, *answer[:2]])
    assert stepper.run([recovered], 1, budget=11)[0] == answer[2:]
    assert torch.equal(watched.kv(recovered), expected)
    for budget in (13, 1000):
        watched.rows = []
        others = [stepper.add(text(3 + 5 * seed, seed), room=10) for seed in range(2, 18)]
        requests = [*others[:9], stepper.add(sequence, prompt_logprobs=1), *others[9:]]
        answers = stepper.run(requests, 3, budget)
        assert answers[9] == answer
        assert torch.equal(watched.kv(requests[9]), expected)
        assert all(watched.has(row) for row in logits)
        stepper = Stepper(built, seed=budget)


@pytest.mark.parametrize("options", [{"kv_cache_dtype": "fp8"}, {"quantization": "int8"}], ids=str)
def test_it_holds_over_a_cache_of_float8_and_with_quantised_weights(
    options: dict[str, Any], make_model: MakeModel, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(make_model("qwen3"), dtype="bfloat16", batch_invariant=True, **options)
    watched = Watched(built, monkeypatch)
    stepper = Stepper(built)
    one, other = (stepper.add(text(TOKENS, 1), prompt_logprobs=1) for _ in range(2))
    stepper.run([one], 2, budget=1)
    logits, watched.rows = watched.rows, []
    stepper.run([other, *(stepper.add(text(20, seed)) for seed in range(5))], 2, budget=17)
    bits = [watched.kv(request).view(torch.uint8) for request in (one, other)]
    assert torch.equal(*bits)
    assert all(watched.has(row) for row in logits)


def test_single_tokens_and_chunks_take_one_kernel(
    make_model: MakeModel, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, attention_decode splits its sums in another way."""

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("attention_decode was called")

    monkeypatch.setattr(kernels, "attention_decode", refuse)
    stepper = Stepper(build(make_model("llama"), batch_invariant=True))
    stepper.run([stepper.add(text(20, 1)), stepper.add(text(3, 2))], 3)


def test_it_holds_without_the_c_kernels(
    make_model: MakeModel, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.native, "library", lambda: None)
    built = build(make_model("llama"), dtype="float16", batch_invariant=True)
    watched = Watched(built, monkeypatch)
    stepper = Stepper(built)
    one, other = (stepper.add(text(TOKENS, 1)) for _ in range(2))
    stepper.run([one], 2, budget=1)
    stepper.run([other, *(stepper.add(text(20, seed)) for seed in range(5))], 2, budget=17)
    assert torch.equal(watched.kv(one), watched.kv(other))


def test_blocks_with_and_without_the_promise_do_not_mix(
    make_model: MakeModel, build: Build
) -> None:
    folder = make_model("llama")
    plain = build(folder).fingerprint
    promised = build(folder, batch_invariant=True).fingerprint
    assert "differ in batch_invariant" in str(plain.difference(promised))
