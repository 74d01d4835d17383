"""From what a client wrote to complete, valid sampling parameters.

Precedence: the request, the model's generation_config.json, neutral values. Every rule that is
broken is a BadRequest that names the field, the rule and the value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.protocol.grammar import Constraint
from pdserve.protocol.sampling import GREEDY_BELOW, SamplingParams
from pdserve.router.errors import BadRequest
from pdserve.router.schemas import SamplingFields

MAX_N = 16384
LEAST_TEMPERATURE = 0.01
"""Temperatures between 0 and this are raised to it: logits divided by less overflow."""
MAX_BIAS = 100.0
SEED_RANGE = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Sampling defaults of the model."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def from_generation_config(cls, content: Mapping[str, Any]) -> Defaults:
        """The keys of a generation_config.json that count; null ones do not."""
        names = cls.__dataclass_fields__
        return cls(**{name: content[name] for name in names if content.get(name) is not None})


def bad(name: str, rule: str, value: object) -> BadRequest:
    """`temperature must be in [0, 2], got 3.0.`"""
    return BadRequest(f"{name} {rule}, got {value!r:.100}.", param=name)


def derive_seed(seed: int, index: int) -> int:
    """The key of answer `index` of a request: its own for the first, unrelated for the others."""
    if index == 0:
        return seed % SEED_RANGE
    text = f"{seed % SEED_RANGE}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def answer_count(fields: SamplingFields) -> int:
    n = 1 if fields.n is None else fields.n
    if not 1 <= n <= MAX_N:
        raise bad("n", f"must be in [1, {MAX_N}]", n)
    return n


def stop_strings(fields: SamplingFields) -> tuple[str, ...]:
    stops = fields.stop
    listed = () if stops is None else (stops,) if isinstance(stops, str) else tuple(stops)
    if "" in listed:
        raise BadRequest("stop cannot contain an empty string.", param="stop")
    return listed


def logprob_count(name: str, value: int, limit: int, vocab_size: int) -> int:
    """A number of alternatives per token; -1 is the whole vocabulary."""
    if value < -1:
        raise bad(name, "must be -1 or at least 0", value)
    wanted = vocab_size if value == -1 else value
    if limit != -1 and wanted > limit:
        raise BadRequest(
            f"{name} must be at most {limit} (--max-logprobs), got {value} "
            f"(parameter={name}, value={value}).",
            param=name,
        )
    return min(wanted, vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What token ids are checked against."""

    size: int
    eos_token_ids: tuple[int, ...]

    def check(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.size:
                raise BadRequest(
                    f"{name}: token id {token_id} is out of vocabulary (size {self.size}).",
                    param=name,
                )


def sampling_params(
    fields: SamplingFields,
    defaults: Defaults,
    vocabulary: Vocabulary,
    *,
    seed: int,
    max_tokens: int,
    asked_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    logprob_token_ids: tuple[int, ...] = (),
    constraint: Constraint | None = None,
) -> SamplingParams:
    """The parameters of a request's first answer. `seed`: what to use if the client gave none;
    `max_tokens`: what there is room for, of the `asked_tokens`."""
    temperature = _temperature(fields, defaults)
    greedy = temperature < GREEDY_BELOW
    if greedy and answer_count(fields) > 1:
        raise BadRequest(f"n must be 1 when using greedy sampling, got {fields.n}.", param="n")
    stop_token_ids = tuple(fields.stop_token_ids or ())
    vocabulary.check("stop_token_ids", stop_token_ids)
    given = fields.seed
    return SamplingParams(
        seed=derive_seed(seed if given is None or given == -1 else given, 0),
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_p=1.0 if greedy else _top_p(fields, defaults),
        top_k=0 if greedy else _top_k(fields, defaults),
        min_p=0.0 if greedy else _min_p(fields, defaults),
        presence_penalty=_penalty("presence_penalty", fields.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", fields.frequency_penalty),
        repetition_penalty=_repetition_penalty(fields, defaults),
        logit_bias=_logit_bias(fields, vocabulary),
        eos_token_ids=vocabulary.eos_token_ids,
        stop_token_ids=stop_token_ids,
        min_tokens=min(_min_tokens(fields, asked_tokens), max_tokens),
        ignore_eos=bool(fields.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=logprob_token_ids,
        constraint=constraint,
    )


def check_defaults(defaults: Defaults) -> None:
    """Raises BadRequest for a default that breaks the rule for its field, TypeError or ValueError
    for one that is no number."""
    nothing = SamplingFields()
    for check in (_temperature, _top_p, _top_k, _min_p, _repetition_penalty):
        check(nothing, defaults)


def _pick(given: float | None, default: float) -> float:
    return default if given is None else given


def _temperature(fields: SamplingFields, defaults: Defaults) -> float:
    value = float(_pick(fields.temperature, defaults.temperature))
    if not 0.0 <= value <= 2.0:
        raise bad("temperature", "must be in [0, 2]", value)
    return value if value == 0.0 else max(value, LEAST_TEMPERATURE)


def _top_p(fields: SamplingFields, defaults: Defaults) -> float:
    value = float(_pick(fields.top_p, defaults.top_p))
    if not 0.0 < value <= 1.0:
        raise bad("top_p", "must be in (0, 1]", value)
    return value


def _top_k(fields: SamplingFields, defaults: Defaults) -> int:
    value = int(_pick(fields.top_k, defaults.top_k))
    if value < -1:
        raise bad("top_k", "must be 0 (disable), or at least 1", value)
    return max(value, 0)


def _min_p(fields: SamplingFields, defaults: Defaults) -> float:
    value = float(_pick(fields.min_p, defaults.min_p))
    if not 0.0 <= value <= 1.0:
        raise bad("min_p", "must be in [0, 1]", value)
    return value


def _penalty(name: str, given: float | None) -> float:
    value = float(_pick(given, 0.0))
    if not -2.0 <= value <= 2.0:
        raise bad(name, "must be in [-2, 2]", value)
    return value


def _repetition_penalty(fields: SamplingFields, defaults: Defaults) -> float:
    value = float(_pick(fields.repetition_penalty, defaults.repetition_penalty))
    if not value > 0.0:
        raise bad("repetition_penalty", "must be greater than 0", value)
    return value


def _min_tokens(fields: SamplingFields, asked_tokens: int) -> int:
    value = fields.min_tokens or 0
    if not 0 <= value <= asked_tokens:
        raise bad("min_tokens", f"must be in [0, max_tokens={asked_tokens}]", value)
    return value


def _logit_bias(fields: SamplingFields, vocabulary: Vocabulary) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in (fields.logit_bias or {}).items():
        try:
            token_id = int(key)
        except ValueError:
            raise bad("logit_bias", "must have token ids as keys", key) from None
        bias[token_id] = min(max(float(value), -MAX_BIAS), MAX_BIAS)
    vocabulary.check("logit_bias", bias)
    return bias
