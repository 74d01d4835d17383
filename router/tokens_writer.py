"""Answers of /inference/v1/generate: token ids, with text if asked for."""

from __future__ import annotations

from typing import Any

from pdserve.protocol.messages import PositionLogprobs
from pdserve.router.errors import ApiError
from pdserve.router.openai import LEAST_LOGPROB, LogprobWriter, encode_json
from pdserve.router.openai_writer import DONE, usage_of
from pdserve.router.output import Delta
from pdserve.router.writer import Json, Progress

WEIGHTS = "default"
"""Label of the weights: they are never updated while a worker runs."""


class TokensWriter:
    """`text`: output_mode text. `prompt_ids`: the prompt's token ids are said again."""

    keep_alive, silence_s = b"", 0.0

    def __init__(self, progress: Progress, *, text: bool, prompt_ids: bool) -> None:
        self._progress = progress
        self._request = request = progress.request
        self._text = text
        self._prompt_ids = prompt_ids
        self._logprobs = LogprobWriter(progress.model.tokenizer.tokens, request.tokens_as_ids)
        self._head = {
            "request_id": request.response_id,
            "output_mode": "text" if text else "tokens",
        }

    def body(self) -> Json:
        progress, request = self._progress, self._request
        prompt, scored = request.prompts[0], progress.answers[0].prompt_logprobs
        prompt_logprobs = None
        if request.prompt_logprobs is not None and scored is not None:
            prompt_logprobs = self._logprobs.prompt(
                prompt.token_ids, scored, request.prompt_logprobs
            )
        choices = []
        for index, answer in enumerate(progress.answers):
            choice = self._choice(index, answer.take() or Delta())
            choices.append({**choice, "routed_experts": None, "sampling_mask": None})
        return {
            **self._head,
            "model": progress.model.name,
            "created": progress.created,
            "usage": usage_of(progress),
            "prompt_logprobs": prompt_logprobs,
            "prompt_token_id_logprobs": None,
            "prompt_token_ids": prompt.token_ids if self._prompt_ids else None,
            "mm_placeholders": None,
            "metrics": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "choices": choices,
        } | progress.extras()

    def _choice(self, index: int, delta: Delta) -> Json:
        choice: Json = {
            "index": index,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids,
            "weight_versions": None,
            "logprobs": self._scores(delta),
        }
        if delta.finish_reason is not None:
            end = self._progress.answers[index].count
            span = {"version": WEIGHTS, "start": 0, "end": end}
            choice["weight_versions"] = [span] if end else []
        if self._text:
            choice["text"] = delta.text
        return choice

    def _scores(self, delta: Delta) -> Json | None:
        count = self._request.logprobs
        if count is None:
            return None
        if self._text:
            return self._logprobs.chat(delta.token_ids, delta.logprobs, count)
        pairs = zip(delta.token_ids, delta.logprobs, strict=True)
        return {"content": [_scored(token_id, position, count) for token_id, position in pairs]}

    def opening(self) -> list[bytes]:
        return []

    def frames(self, index: int) -> list[bytes]:
        request, answer = self._request, self._progress.answers[index]
        if answer.waits(request.stream_interval):
            return []
        delta = answer.take()
        if delta is None:
            return []
        usage = usage_of(self._progress) if request.continuous_usage else None
        return [self._chunk([self._choice(index, delta)], usage)]

    def _chunk(self, choices: list[Json], usage: Json | None, **members: Any) -> bytes:
        content = {**self._head, "choices": choices, "usage": usage, **members}
        return b"data: " + encode_json(content) + b"\n\n"

    def closing(self) -> list[bytes]:
        if not self._request.include_usage:
            return [DONE]
        usage = usage_of(self._progress)
        return [self._chunk([], usage, **self._progress.extras()), DONE]

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.json() + b"\n\n" + DONE


def _scored(token_id: int, position: PositionLogprobs, count: int) -> Json:
    """A token by its id; among the alternatives it comes first."""
    own = _entry(token_id, position.logprob, position.rank)
    others = [
        _entry(other, value, place)
        for place, (other, value) in enumerate(position.top[:count], start=1)
        if other != token_id
    ]
    return {**own, "top_logprobs": [own, *others]}


def _entry(token_id: int, logprob: float, rank: int) -> Json:
    if logprob == float("-inf"):
        return {"token_id": token_id, "logprob": LEAST_LOGPROB, "rank": None}
    return {"token_id": token_id, "logprob": logprob, "rank": rank}
