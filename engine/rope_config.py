"""Rotary embeddings as config.json describes them, in the old style (rope_theta, rope_scaling) and
in that of transformers 5 (rope_parameters)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pdserve.kernels.rope import (
    default_frequencies,
    dynamic_frequencies,
    linear_frequencies,
    llama3_frequencies,
    rope_table,
    yarn_attention_scale,
    yarn_frequencies,
)

DEFAULT_THETA = 10000.0

_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor"}),
}
"""The known kinds of scaling, and the keys that each needs."""

_OPTIONAL = {
    "llama3": frozenset({"original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """The parameters of one model's rotary embeddings; those that a kind does not use are None."""

    kind: str
    """"default", "linear", "dynamic", "llama3" or "yarn"."""
    theta: float
    max_positions: int
    """The length from which "dynamic" scaling begins."""
    original_positions: int
    """The length of pre-training, for "llama3" and "yarn"."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_scale: float = 1.0
    """Factor on cos and sin ("yarn")."""

    def table(self, head_dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [length, head_dim / 2] float32, for positions 0 .. length - 1.

        With "dynamic" scaling the token at position p is turned as in a sequence of p + 1 tokens,
        whatever comes after it, so that its KV never changes. transformers' generate does the same
        for prompts of up to max_position_embeddings tokens; a longer prompt it turns as a whole by
        its own length, which no cache shared among requests could hold.
        """
        positions = torch.arange(length)
        return rope_table(self._frequencies(head_dim, positions), positions, self.attention_scale)

    def _frequencies(self, dim: int, positions: torch.Tensor) -> torch.Tensor:
        if self.kind == "linear":
            return linear_frequencies(dim, self.theta, self.factor)
        if self.kind == "dynamic":
            return dynamic_frequencies(
                dim, self.theta, self.factor, self.max_positions, positions + 1
            )
        if self.kind == "llama3":
            return llama3_frequencies(
                dim,
                self.theta,
                self.factor,
                self.low_freq_factor,
                self.high_freq_factor,
                self.original_positions,
            )
        if self.kind == "yarn":
            return yarn_frequencies(
                dim,
                self.theta,
                self.factor,
                self.original_positions,
                self.beta_fast,
                self.beta_slow,
                self.truncate,
            )
        return default_frequencies(dim, self.theta)


def read_rope(raw: dict[str, Any], max_positions: int) -> RopeConfig:
    """The rotary embeddings of the parsed config.json `raw`.

    Raises ValueError, a sentence, for an unknown kind or parameter and for a missing one.
    """
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"The rope parameters must be an object, not {given!r}.")
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind not in _KEYS:
        raise ValueError(f"The rope type {kind!r} is not supported; known: {', '.join(_KEYS)}.")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("The rope parameter partial_rotary_factor must be 1.")
    theta = float(given.pop("rope_theta", None) or raw.get("rope_theta") or DEFAULT_THETA)
    missing = sorted(_KEYS[kind] - set(given))
    if missing:
        raise ValueError(f"The rope type {kind!r} needs {' and '.join(missing)}.")
    unknown = sorted(set(given) - _KEYS[kind] - _OPTIONAL.get(kind, frozenset()))
    # Old configs of every kind may carry the length of pre-training; only two kinds use it.
    unknown = [key for key in unknown if key != "original_max_position_embeddings"]
    if unknown:
        raise ValueError(f"The rope type {kind!r} does not know {', '.join(unknown)}.")
    original = raw.get("original_max_position_embeddings") or given.get(
        "original_max_position_embeddings", max_positions
    )
    return RopeConfig(
        kind=kind,
        theta=theta,
        max_positions=max_positions,
        original_positions=int(original),
        factor=_factor(given),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        beta_fast=float(given.get("beta_fast", 32)),
        beta_slow=float(given.get("beta_slow", 1)),
        truncate=bool(given.get("truncate", True)),
        attention_scale=_attention_scale(kind, given),
    )


def _factor(given: dict[str, Any]) -> float:
    factor = given.get("factor", 1.0)
    if not isinstance(factor, int | float) or factor < 1:
        raise ValueError(f"The rope parameter factor must be a number from 1 up, not {factor!r}.")
    return float(factor)


def _attention_scale(kind: str, given: dict[str, Any]) -> float:
    if kind != "yarn":
        return 1.0
    if "attention_factor" in given:
        return float(given["attention_factor"])
    return yarn_attention_scale(_factor(given), given.get("mscale"), given.get("mscale_all_dim"))
