"""Answers in the shapes of Anthropic's Messages API."""

from __future__ import annotations

from typing import Any

from pdserve.router.errors import ApiError
from pdserve.router.openai import encode_json
from pdserve.router.openai_writer import cached_tokens
from pdserve.router.output import Delta
from pdserve.router.writer import Json, Progress

_TEXT_BEFORE = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":'
)
_TEXT_AFTER = b"}}\n\n"


def frame(kind: str, **members: Any) -> bytes:
    """One server-sent event; the SDK drops those without the `event:` line."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind, **members}))


class MessagesWriter:
    """One answer: a message with one block of text."""

    keep_alive = frame("ping")

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._request = progress.request
        (self._answer,) = progress.answers
        self._end = Delta()
        """The delta that ended the answer."""

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
        word = {"stop": "end_turn", "length": "max_tokens"}.get(reason or "")
        return {"stop_reason": word, "stop_sequence": None}

    def _usage(self) -> Json:
        """The three kinds of input tokens add up to the prompt."""
        cached = cached_tokens(self._progress)
        return {
            "input_tokens": self._prompt_tokens() - cached,
            "output_tokens": self._answer.count,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }

    def _prompt_tokens(self) -> int:
        return len(self._request.prompts[0].token_ids)

    def body(self) -> Json:
        self._end = self._answer.take() or Delta()
        content = [{"type": "text", "text": self._end.text}]
        return self._message(content, self._stop(), self._usage()) | self._progress.extras()

    def opening(self) -> list[bytes]:
        usage = {"input_tokens": self._prompt_tokens(), "output_tokens": 0}
        return [
            frame("message_start", message=self._message([], self._stop(), usage)),
            self.keep_alive,
            frame("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ]

    def frames(self, index: int) -> list[bytes]:
        delta = self._answer.take()
        if delta is None:
            return []
        if delta.finish_reason is not None:
            self._end = delta
        return [_TEXT_BEFORE + encode_json(delta.text) + _TEXT_AFTER] if delta.text else []

    def closing(self) -> list[bytes]:
        return [
            frame("content_block_stop", index=0),
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
