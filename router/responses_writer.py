"""Answers in the shapes of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.router.errors import ApiError
from pdserve.router.openai import LogprobWriter, encode_json
from pdserve.router.openai_writer import cached_tokens
from pdserve.router.output import Delta
from pdserve.router.requests import GenerateRequest
from pdserve.router.response_output import Events, ResponseOutput
from pdserve.router.responses import tool_choice_of
from pdserve.router.schemas import ResponsesRequest
from pdserve.router.writer import Json, Progress

TOOL: Json = dict.fromkeys(
    ("allowed_callers", "async", "defer_loading", "description", "output_schema", "parameters",
     "strict")
)  # fmt: skip
"""Members of a tool that the client need not give."""
ENDS = {"length": "incomplete", "abort": "cancelled"}
"""Status of a response by the reason why its answer ended; otherwise it is completed."""


def frame(kind: str, number: int, **members: Any) -> bytes:
    """One server-sent event."""
    return framed({**members, "sequence_number": number, "type": kind})


def framed(event: Json) -> bytes:
    """The same, of an event with all its members."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode_json(event))


def failure(error: ApiError) -> Json:
    """The `error` member of a response that failed."""
    code = {429: "rate_limit_exceeded"}.get(
        error.status, "server_error" if error.status >= 500 else "invalid_prompt"
    )
    return {"code": code, "message": error.message}


@dataclass(slots=True, kw_only=True)
class Reply:
    """The response object of one request, while it comes into being."""

    id: str
    created_at: int
    model: str
    echo: Json
    """Members that repeat the request."""
    with_messages: bool
    """With the tokens of prompt and answer."""
    final: Json | None = None
    """As it was when its answer had ended."""
    error: ApiError | None = None
    """Why its stream failed."""

    @classmethod
    def of(
        cls, body: ResponsesRequest, parsed: GenerateRequest, model: str, created_at: int
    ) -> Reply:
        sampling = parsed.answers[0].sampling
        echo = {
            "instructions": body.instructions,
            "metadata": body.metadata,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": sampling.temperature,
            "tool_choice": tool_choice_of(body),
            "tools": [{**TOOL, **tool} for tool in body.tools or ()],
            "top_p": sampling.top_p,
            "background": bool(body.background),
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "previous_response_id": body.previous_response_id,
            "prompt": None,
            "reasoning": body.reasoning,
            "service_tier": body.service_tier or "auto",
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "top_logprobs": body.top_logprobs or 0,
            "truncation": body.truncation or "disabled",
            "user": body.user,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
        }
        return cls(
            id=parsed.response_id,
            created_at=created_at,
            model=model,
            echo=echo,
            with_messages=bool(body.enable_response_messages),
        )

    def response(
        self,
        status: str,
        output: Sequence[Json] = (),
        usage: Json | None = None,
        error: Json | None = None,
        messages: Json | None = None,
    ) -> Json:
        """`messages`: members that only some clients ask for."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "created_at": self.created_at,
            "error": error,
            "incomplete_details": reason,
            "model": self.model,
            "object": "response",
            "output": list(output),
            "status": status,
            "usage": usage,
            **self.echo,
            "input_messages": None,
            "output_messages": None,
            **(messages or {}),
        }


class ResponsesWriter:
    """One answer: a response of items."""

    keep_alive, silence_s = b"", 0.0

    def __init__(self, progress: Progress, reply: Reply) -> None:
        self._progress = progress
        self._request = request = progress.request
        self._reply = reply
        (self._answer,) = progress.answers
        self._tokens = tokens = progress.model.tokenizer.tokens
        self._logprobs = LogprobWriter(tokens, request.tokens_as_ids)
        self._output = ResponseOutput(request.logprobs is not None)
        self._number = 0
        """Of the next event."""
        self._seen = 0
        """Tokens that have been taken."""
        self._ids: list[int] = []
        """Those of them that are kept for `output_messages`."""
        self._reason = ""

    def _take(self) -> Events:
        """What has grown since the last time."""
        delta = self._answer.take()
        if delta is None:
            return []
        self._reason = delta.finish_reason or ""
        if self._reply.with_messages:
            self._ids += delta.token_ids
        return self._output.take(delta, self._entries(delta))

    def _entries(self, delta: Delta) -> list[Json]:
        """Log-probabilities of the tokens behind the thoughts, with which every answer begins, and
        before the first call; those behind it belong to no message."""
        answer, reading = self._answer, self._request.text(0).reading
        hidden = reading is not None and not reading.show_thoughts
        first = 0 if hidden else max(0, answer.thought - self._seen)
        last = len(delta.token_ids)
        if answer.before_calls is not None:
            last = max(0, answer.before_calls - (answer.thought if hidden else 0) - self._seen)
        self._seen += len(delta.token_ids)
        count = self._request.logprobs
        if count is None or not delta.logprobs:
            return []
        ids, logprobs = delta.token_ids[first:last], delta.logprobs[first:last]
        entries: list[Json] = self._logprobs.chat(ids, logprobs, count)["content"]
        return entries

    def _usage(self) -> Json:
        given, count = len(self._request.prompts[0].token_ids), self._answer.count
        return {
            "input_tokens": given,
            "input_tokens_details": {
                "cached_tokens": cached_tokens(self._progress),
                "cache_write_tokens": self._progress.stored(),
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": count,
            "output_tokens_details": {
                "reasoning_tokens": self._answer.thought,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": given + count,
        }

    def _final(self) -> Json:
        status = ENDS.get(self._reason, "completed")
        messages = None
        if self._reply.with_messages:
            prompt = self._request.prompts[0]
            text = self._tokens.text(self._ids, False)
            messages = {
                "input_messages": [_raw(prompt.text or "", prompt.token_ids)],
                "output_messages": [_raw(text, self._ids)],
            }
        self._reply.final = self._reply.response(
            status, self._output.items, self._usage(), messages=messages
        )
        return self._reply.final

    def _finish(self) -> Events:
        return self._output.finish(ENDS.get(self._reason) == "incomplete")

    def body(self) -> Json:
        self._take()
        self._finish()
        return self._final() | self._progress.extras()

    def _numbered(self, events: Events) -> list[Json]:
        first, self._number = self._number, self._number + len(events)
        return [
            {**members, "sequence_number": number, "type": kind}
            for number, (kind, members) in enumerate(events, first)
        ]

    def begin(self) -> list[Json]:
        """The events before everything else."""
        begun = {"response": self._reply.response("in_progress")}
        return self._numbered([("response.created", begun), ("response.in_progress", begun)])

    def grow(self) -> list[Json]:
        """Those of what is new in the answer."""
        return self._numbered(self._take())

    def end(self) -> list[Json]:
        """Those behind everything else."""
        events = self._finish()
        final = {"response": self._final(), **self._progress.extras()}
        return self._numbered([*events, ("response.completed", final)])

    def opening(self) -> list[bytes]:
        return [framed(event) for event in self.begin()]

    def frames(self, index: int) -> list[bytes]:
        return [framed(event) for event in self.grow()]

    def closing(self) -> list[bytes]:
        return [framed(event) for event in self.end()]

    def error(self, error: ApiError) -> bytes:
        self._reply.error = error
        members = {**failure(error), "param": error.param}
        return frame("error", self._number, **members)

    # when a stream is made anew from its tokens

    @property
    def names(self) -> list[list[str]]:
        """What the items so far are called: id and, of calls, call_id."""
        return [[item["id"], item.get("call_id", "")] for item in self._output.items]

    def rename(self, names: Sequence[Sequence[str]]) -> None:
        """Call the items so far what they were called before. Raises ValueError."""
        for item, (own, call) in zip(self._output.items, names, strict=True):
            item |= {"id": own, **({"call_id": call} if "call_id" in item else {})}


def _raw(text: str, token_ids: Sequence[int]) -> Json:
    return {"type": "raw_message_tokens", "message": text, "tokens": list(token_ids)}
