"""Answers in the shapes of OpenAI's API, as plain values ready for JSON.

The hot path, a chunk that holds nothing but text, is put together from bytes made once per answer
(`ChunkForms.text`); everything rarer goes through dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from pdserve.protocol.messages import PositionLogprobs
from pdserve.router.detokenize import TokenText
from pdserve.router.output import AnswerText, Delta, ToolCall
from pdserve.router.requests import GenerateRequest

Json = dict[str, Any]

encode_json = msgspec.json.Encoder().encode

LEAST_LOGPROB = -9999.0
"""Written for -inf, which JSON does not have."""


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
    created_tokens: int,
    thought_tokens: int | None = None,
) -> Json:
    """`thought_tokens`: None where thoughts are not told from answers."""
    details = None if thought_tokens is None else {"reasoning_tokens": thought_tokens}
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached_tokens,
            "created_cache_tokens": created_tokens,
        },
        "completion_tokens_details": details,
    }


class LogprobWriter:
    """Log-probabilities in both of OpenAI's shapes."""

    def __init__(self, tokens: TokenText, as_ids: bool) -> None:
        self._tokens = tokens
        self._as_ids = as_ids

    def token(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokens.token_bytes(token_id).decode("utf-8", errors="replace")

    def _entry(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self.token(token_id),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(self._tokens.token_bytes(token_id)),
        }

    def chat(self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs], k: int) -> Json:
        """`choices[].logprobs` of chat: k alternatives, and the token itself if not among them."""
        return {
            "content": [
                {
                    **self._entry(token_id, position.logprob),
                    "top_logprobs": [
                        self._entry(other, value)
                        for other, value in with_own(token_id, position, k)
                    ]
                    if k
                    else [],
                }
                for token_id, position in zip(token_ids, logprobs, strict=True)
            ]
        }

    def completion(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[PositionLogprobs | None],
        offsets: Sequence[int],
        k: int,
    ) -> Json:
        """`choices[].logprobs` of completions: parallel lists; a None position (the first of an
        echoed prompt) stays null."""
        return {
            "text_offset": list(offsets),
            "token_logprobs": [
                None if position is None else max(position.logprob, LEAST_LOGPROB)
                for position in logprobs
            ],
            "tokens": [self.token(token_id) for token_id in token_ids],
            "top_logprobs": [
                None
                if position is None
                else {
                    self.token(other): max(value, LEAST_LOGPROB)
                    for other, value in with_own(token_id, position, k)
                }
                for token_id, position in zip(token_ids, logprobs, strict=True)
            ],
        }

    def prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs | None], k: int
    ) -> list[Json | None]:
        """The `prompt_logprobs` member: token id → logprob, rank, text."""
        return [
            None
            if position is None
            else {
                str(other): {
                    "logprob": max(value, LEAST_LOGPROB),
                    "rank": position.rank if other == token_id else place,
                    "decoded_token": self.token(other),
                }
                for place, (other, value) in enumerate(with_own(token_id, position, k), start=1)
            }
            for token_id, position in zip(token_ids, logprobs, strict=True)
        ]


def with_own(token_id: int, position: PositionLogprobs, k: int) -> list[tuple[int, float]]:
    """The k most likely tokens, and the position's own token if it is not among them."""
    top = list(position.top[:k])
    if all(other != token_id for other, _ in top):
        top.append((token_id, position.logprob))
    return top


class ChunkForms:
    """Chunks of one stream: what stays the same in all of them is encoded once."""

    def __init__(
        self,
        request: GenerateRequest,
        response_id: str,
        created: int,
        model: str,
        writer: LogprobWriter,
    ) -> None:
        self._request = request
        self._writer = writer
        self._head: Json = {
            "id": response_id,
            "object": "chat.completion.chunk" if request.chat else "text_completion",
            "created": created,
            "model": model,
        }
        head = encode_json(self._head)[:-1]
        key = b'"delta":{"content":' if request.chat else b'"text":'
        close = b"}" if request.chat else b""
        self._before = [
            b'data: %b,"choices":[{"index":%d,%b' % (head, index, key)
            for index in range(len(request.answers))
        ]
        self._after = close + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self.plain = not (request.return_token_ids or request.continuous_usage) and (
            request.logprobs is None
        )
        """Chunks need nothing but text (until the last one of an answer)."""

    def text(self, index: int, text: str) -> bytes:
        """A chunk with only text."""
        return self._before[index] + encode_json(text) + self._after

    def content(self, choices: list[Json], **members: Any) -> Json:
        """A chunk from its choices and further top-level members."""
        return {**self._head, "choices": choices, **members}

    def chunk(self, choices: list[Json], **members: Any) -> bytes:
        """`content` as a frame."""
        return b"data: " + encode_json(self.content(choices, **members)) + b"\n\n"

    def role(self, index: int, prompt_ids: list[int] | None, prompt_text: str | None) -> bytes:
        """Chat: the first chunk of an answer."""
        choice = {
            "index": index,
            "delta": {"role": self._request.role, "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self.chunk([choice], prompt_token_ids=prompt_ids, prompt_text=prompt_text)

    def delta(
        self,
        index: int,
        delta: Delta,
        offset: int,
        usage_now: Json | None,
        members: Json | None = None,
    ) -> bytes:
        """A chunk with whatever the delta and the request call for. `offset`: characters before
        the answer (an echoed prompt)."""
        more = dict(members or {})
        if usage_now is not None:
            more["usage"] = usage_now
        return self.chunk([self.choice(index, delta, offset)], **more)

    def choice(self, index: int, delta: Delta, offset: int) -> Json:
        """A choice with whatever the delta and the request call for."""
        request = self._request
        choice: Json = {"index": index}
        if request.chat:
            choice["delta"] = chat_delta(delta)
        else:
            choice["text"] = delta.text
        choice["logprobs"] = self._logprobs(delta, offset)
        choice["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None or not request.chat:
            choice["stop_reason"] = delta.stop_reason
        if request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, delta: Delta, offset: int) -> Json | None:
        count = self._request.logprobs
        if count is None or not delta.logprobs:
            return None
        if self._request.chat:
            return self._writer.chat(delta.token_ids, delta.logprobs, count)
        offsets = [offset + place for place in delta.offsets]
        return self._writer.completion(delta.token_ids, delta.logprobs, offsets, count)


def pieces_of(delta: Delta) -> list[Delta]:
    """A delta with calls of tools as one per chunk: what belongs to a call that had begun, thoughts
    and text, then each call's name, its arguments, and the end. Tokens go with the first."""
    if not delta.calls:
        return [delta]
    pieces = [Delta(calls=[call]) for call in delta.continued]
    if delta.text or delta.thoughts:
        pieces.append(Delta(delta.text, delta.thoughts))
    for call in delta.begun:
        pieces.append(Delta(calls=[replace(call, arguments="")]))
        if call.arguments:
            pieces.append(Delta(calls=[replace(call, id="")]))
    first = pieces[0]
    first.token_ids, first.logprobs, first.offsets = delta.token_ids, delta.logprobs, delta.offsets
    if delta.finish_reason is not None:
        end = Delta(finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
        pieces.append(end)
    return pieces


def chat_delta(delta: Delta) -> Json:
    """`choices[].delta` of chat."""
    found: Json = {}
    if delta.thoughts:
        found["reasoning"] = delta.thoughts
    if delta.text:
        found["content"] = delta.text
    for call in delta.calls:
        if call.id:
            head = {"id": call.id, "type": "function", "index": call.index}
            found |= {"content": None, "tool_calls": [{**head, "function": {"name": call.name}}]}
        else:
            found["tool_calls"] = [call_delta(call)]
    return found


def call_delta(call: ToolCall) -> Json:
    """One of `delta.tool_calls` with all that is known of it."""
    if call.id:
        return {"index": call.index, **whole_call(call)}
    return {"index": call.index, "function": {"arguments": call.arguments}}


def whole_call(call: ToolCall) -> Json:
    """One of `tool_calls`."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def chat_choice(
    index: int, text: str, delta: Delta, request: GenerateRequest, writer: LogprobWriter
) -> Json:
    """A finished answer of chat; `delta` is all of it, `text` with the echoed message."""
    logprobs = None
    if request.logprobs is not None:
        logprobs = writer.chat(delta.token_ids, delta.logprobs, request.logprobs)
    parsed = request.text(index).reading is not None
    message: Json = {
        "role": request.role,
        "content": None if parsed and not text else text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": delta.thoughts or None,
    }
    if delta.calls:
        message["tool_calls"] = [whole_call(call) for call in delta.calls]
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
        "token_ids": delta.token_ids if request.return_token_ids else None,
        "routed_experts": None,
    }


def completion_choice(
    index: int,
    delta: Delta,
    request: GenerateRequest,
    writer: LogprobWriter,
    answer: AnswerText,
    echo: str | None,
) -> Json:
    """A finished answer of completions, after the echoed prompt if there is one."""
    prompt = request.prompts[index // request.n]
    logprobs = None
    if request.logprobs is not None:
        logprobs = completion_logprobs(delta, request, writer, answer, index, echo)
    prompt_logprobs = None
    if request.prompt_logprobs is not None and answer.prompt_logprobs is not None:
        prompt_logprobs = writer.prompt(
            prompt.token_ids, answer.prompt_logprobs, request.prompt_logprobs
        )
    return {
        "index": index,
        "text": (echo or "") + delta.text,
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
        "token_ids": delta.token_ids if request.return_token_ids else None,
        "prompt_logprobs": prompt_logprobs,
        "prompt_token_ids": prompt.token_ids if request.return_token_ids else None,
        "routed_experts": None,
    }


def completion_logprobs(
    delta: Delta,
    request: GenerateRequest,
    writer: LogprobWriter,
    answer: AnswerText,
    index: int,
    echo: str | None,
) -> Json:
    """The logprobs of an answer, those of an echoed prompt first."""
    assert request.logprobs is not None
    token_ids, offsets = list(delta.token_ids), list(delta.offsets)
    positions: list[PositionLogprobs | None] = list(delta.logprobs)
    if echo is not None and answer.prompt_logprobs is not None:
        prompt_ids = request.prompts[index // request.n].token_ids
        starts, place = [], 0
        for token_id in prompt_ids:
            starts.append(min(place, len(echo)))
            place += len(writer.token(token_id))
        token_ids = prompt_ids + token_ids
        positions = list(answer.prompt_logprobs) + positions
        offsets = starts + [len(echo) + offset for offset in offsets]
    elif echo:
        offsets = [len(echo) + offset for offset in offsets]
    return writer.completion(token_ids, positions, offsets, request.logprobs)
