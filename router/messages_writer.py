"""Answers in the shapes of Anthropic's Messages API."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from pdserve.router.errors import ApiError
from pdserve.router.openai import encode_json
from pdserve.router.openai_writer import cached_tokens
from pdserve.router.output import Delta, ToolCall
from pdserve.router.writer import Json, Progress

decode_json = msgspec.json.Decoder().decode

_TEXT_BEFORE = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":'
)
_TEXT_AFTER = b"}}\n\n"

STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _tool_use(call: ToolCall) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def frame(kind: str, **members: Any) -> bytes:
    """One server-sent event; the SDK drops those without the `event:` line."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind, **members}))


class MessagesWriter:
    """One answer: a message of blocks, one after the other: thinking, text, calls of tools."""

    keep_alive = frame("ping")
    silence_s = 15.0

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._request = progress.request
        (self._answer,) = progress.answers
        self._end = Delta()
        """The delta that ended the answer."""
        self._block = ""
        """Kind of the block that is open; none."""
        self._blocks = 0
        """Blocks so far."""
        self._signature = hashlib.blake2b(digest_size=16)

    def _message(self, content: list[Json], stop: Json, usage: Json) -> Json:
        return {
            "id": self._request.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._progress.model.name,
            "content": content,
            **stop,
            "usage": usage,
        }

    def _stop(self) -> Json:
        """Why it ended. A matched stop string is named; everything else in three words."""
        reason, match = self._end.finish_reason, self._end.stop_reason
        if isinstance(match, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": match}
        word = STOPS.get(reason or "")
        return {"stop_reason": word, "stop_sequence": None}

    def _usage(self) -> Json:
        """The three kinds of input tokens add up to the prompt."""
        cached, created = cached_tokens(self._progress), self._progress.stored()
        return {
            "input_tokens": self._prompt_tokens() - cached - created,
            "output_tokens": self._answer.count,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": created,
        }

    def _prompt_tokens(self) -> int:
        return len(self._request.prompts[0].token_ids)

    def body(self) -> Json:
        self._end = end = self._answer.take() or Delta()
        content: list[Json] = []
        if end.thoughts:
            self._signature.update(end.thoughts.encode())
            signature = self._signature.hexdigest()
            content.append({"type": "thinking", "thinking": end.thoughts, "signature": signature})
        if end.text or not (content or end.calls):
            content.append({"type": "text", "text": end.text})
        content += [{**_tool_use(call), "input": decode_json(call.arguments)} for call in end.calls]
        return self._message(content, self._stop(), self._usage()) | self._progress.extras()

    def opening(self) -> list[bytes]:
        usage = {"input_tokens": self._prompt_tokens(), "output_tokens": 0}
        start = frame("message_start", message=self._message([], self._stop(), usage))
        begin = [] if self._request.text(0).reading else self._open("text", {"text": ""})
        return [start, self.keep_alive, *begin]

    def frames(self, index: int) -> list[bytes]:
        delta = self._answer.take()
        if delta is None:
            return []
        if delta.finish_reason is not None:
            self._end = delta
        frames = [self._more(call) for call in delta.continued]
        if delta.thoughts:
            self._signature.update(delta.thoughts.encode())
            frames += self._open("thinking", {"thinking": ""})
            frames.append(self._delta("thinking_delta", thinking=delta.thoughts))
        if delta.text:
            frames += self._open("text", {"text": ""})
            frames.append(self._text(delta.text))
        for call in delta.begun:
            frames += self._close()
            frames += self._open("tool_use", {**_tool_use(call), "input": {}})
            if call.arguments:
                frames.append(self._more(call))
        return frames

    def _more(self, call: ToolCall) -> bytes:
        return self._delta("input_json_delta", partial_json=call.arguments)

    def _text(self, text: str) -> bytes:
        if self._blocks == 1:
            return _TEXT_BEFORE + encode_json(text) + _TEXT_AFTER
        return self._delta("text_delta", text=text)

    def _delta(self, kind: str, **members: str) -> bytes:
        delta = {"type": kind, **members}
        return frame("content_block_delta", index=self._blocks - 1, delta=delta)

    def _open(self, kind: str, members: Json) -> list[bytes]:
        """Begin a block, unless one of this kind is open."""
        if self._block == kind:
            return []
        frames = self._close()
        self._block = kind
        self._blocks += 1
        block = {"type": kind, **members}
        start = frame("content_block_start", index=self._blocks - 1, content_block=block)
        return [*frames, start]

    def _close(self) -> list[bytes]:
        """End the block that is open."""
        if not self._block:
            return []
        frames = []
        if self._block == "thinking":
            frames.append(self._delta("signature_delta", signature=self._signature.hexdigest()))
        self._block = ""
        return [*frames, frame("content_block_stop", index=self._blocks - 1)]

    def closing(self) -> list[bytes]:
        return [
            *self._close(),
            frame(
                "message_delta",
                delta=self._stop(),
                usage=self._usage(),
                **self._progress.extras(),
            ),
            frame("message_stop"),
        ]

    def error(self, error: ApiError) -> bytes:
        _, body = error.anthropic()
        return b"event: error\ndata: " + encode_json(body) + b"\n\n"
