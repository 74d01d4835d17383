"""Requests to derender: which request an answer belongs to, and whether the parts fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pdserve.protocol.sampling import SamplingParams
from pdserve.router.answer import AnswerSpec
from pdserve.router.derender import Derender, body_of
from pdserve.router.derender_response import ResponseDerender
from pdserve.router.errors import BadRequest
from pdserve.router.fields import refuse
from pdserve.router.front import Front
from pdserve.router.prompts import Prompt
from pdserve.router.requests import GenerateRequest, TextOptions
from pdserve.router.responses import chat_of
from pdserve.router.schemas import CompletionRequest
from pdserve.router.token_schemas import (
    DerenderChatRequest,
    DerenderCompletionRequest,
    DerenderRequest,
    DerenderResponsesRequest,
    Generated,
    StreamState,
)
from pdserve.router.writer import Json

MAX_TOKENS = 2**17
"""Of all answers of a request, unless one answer may be longer."""


class Derendering:
    """Serves them, for one model."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._model = front.model

    async def chat(self, body: DerenderChatRequest) -> Json:
        """Raises ApiError."""
        self._model.check_name(body.model)
        refuse(body)
        parsed = await self._chat_request(body)
        if body.stream:
            return await self._chunk(parsed, body.generate_chunk, body.stream_state)
        return await self._bodies(
            parsed, [self._whole(body.generate_response)], [body.prompt_tokens]
        )

    async def _chat_request(self, body: DerenderChatRequest) -> GenerateRequest:
        """The chat request that is answered, with the prompt that was used."""
        speech, asked = self._model.speech, body.chat_request
        if asked is not None:
            parsed = await self._front.parser.chat(asked, "")
            return _read_in_pieces(_with_prompts(parsed, [_prompt_ids(body)]), bool(body.stream))
        if speech.calls is not None or speech.reasoning is not None:
            raise BadRequest(
                "chat_request is required when a tool or reasoning parser is configured: it says "
                "what to look for in the answer.",
                param="chat_request",
            )
        found = body.generate_chunk if body.stream else body.generate_response
        generated = [] if found is None else [found]
        prompts = [Prompt(token_ids=_prompt_ids(body) or [], text=None)]
        return self._bare(True, prompts, generated)

    async def response(self, body: DerenderResponsesRequest) -> Json:
        """Raises ApiError."""
        self._model.check_name(body.model)
        refuse(body)
        asked = body.responses_request
        parsed = await self._front.parser.chat(chat_of(self._front.model.speech, asked), "")
        parsed = _with_prompts(parsed, [_prompt_ids(body)])
        parsed = _read_in_pieces(parsed, bool(body.stream))
        derender = ResponseDerender(self._model, asked, parsed, body.prompt_tokens)
        if not body.stream:
            response = self._whole(body.generate_response)
            return await self._front.aside(_size(response), lambda: derender.whole(response))
        chunk, state = self._part(body.generate_chunk, body.stream_state), body.stream_state
        events, after = await self._front.aside(
            _length(state) + _size(chunk), lambda: derender.events(chunk, state)
        )
        return {"events": events, "stream_state": after and after.model_dump()}

    async def completion(self, body: DerenderCompletionRequest) -> Json:
        """Raises ApiError."""
        self._model.check_name(body.model)
        refuse(body)
        lengths, listed = _per_prompt(body)
        found = [body.generate_chunk] if body.stream else body.generate_responses
        generated = [one for one in found or () if one is not None]
        if not body.stream and len(generated) != len(lengths):
            raise BadRequest(
                f"generate_responses has {len(generated)} entries and prompt_tokens "
                f"{len(lengths)}; there must be one of each for every prompt.",
                param="generate_responses",
            )
        parsed = await self._completion_request(body.completion_request, generated, lengths, listed)
        if body.stream:
            return await self._chunk(parsed, body.generate_chunk, body.stream_state)
        return await self._bodies(parsed, [self._whole(one) for one in generated], lengths)

    async def _bodies(
        self, parsed: GenerateRequest, responses: Sequence[Generated], lengths: Sequence[int]
    ) -> Json:
        size, limit = sum(map(_size, responses)), max(MAX_TOKENS, self._model.max_len)
        if size > limit:
            raise BadRequest(
                f"The answers have {size} tokens; at most {limit} can be derendered at once.",
                param="token_ids",
            )
        derender = Derender(self._model, parsed)
        return await self._front.aside(size, lambda: body_of(derender.progress(responses), lengths))

    async def _completion_request(
        self,
        asked: CompletionRequest | None,
        generated: Sequence[Generated],
        lengths: Sequence[int],
        listed: Sequence[list[int] | None],
    ) -> GenerateRequest:
        if asked is None:
            prompts = [Prompt(token_ids=ids or [], text=None) for ids in listed]
            return self._bare(False, prompts, generated)
        parsed = await self._front.parser.completion(asked, "")
        if len(parsed.prompts) != len(lengths):
            raise BadRequest(
                f"completion_request has {len(parsed.prompts)} prompts and prompt_tokens "
                f"{len(lengths)} entries.",
                param="prompt_tokens",
            )
        return _with_prompts(parsed, listed)

    def _bare(
        self, chat: bool, prompts: Sequence[Prompt], generated: Sequence[Generated]
    ) -> GenerateRequest:
        """A request of which nothing is known but its answers."""
        n = max((len(one.choices) for one in generated), default=1)
        choices = [choice for one in generated for choice in one.choices]
        n = max([n, *(choice.index + 1 for choice in choices)])
        stops = {choice.stop_reason for choice in choices if isinstance(choice.stop_reason, str)}
        tops = [
            len(entry.top_logprobs)
            for choice in choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
        sampling = SamplingParams(
            seed=0,
            max_tokens=self._model.max_len,
            eos_token_ids=self._model.eos_token_ids,
            logprobs=min(tops, default=None),
        )
        specs = [
            AnswerSpec(prompt_token_ids=prompt.token_ids, sampling=sampling) for prompt in prompts
        ]
        return GenerateRequest(
            chat=chat,
            response_id="",
            prompts=tuple(prompts),
            n=n,
            answers=tuple(spec for spec in specs for _ in range(n)),
            texts=(TextOptions(stops=tuple(sorted(stops))),) * len(prompts),
            logprobs=sampling.logprobs,
            prompt_logprobs=None,
            tokens_as_ids=False,
            score_only=False,
            stream=False,
            include_usage=False,
            continuous_usage=False,
            stream_interval=1,
            return_token_ids=False,
            return_prompt_text=False,
        )

    def _whole(self, response: Generated | None) -> Generated:
        if response is None:
            raise BadRequest(
                "generate_response is missing: what /inference/v1/generate answered "
                "(output_mode tokens).",
                param="generate_response",
            )
        return self._checked(response)

    def _checked(self, generated: Generated) -> Generated:
        """Raises BadRequest."""
        for choice in generated.choices:
            self._front.parser.prompts.check_ids(choice.token_ids, "token_ids")
            if len(choice.token_ids) > self._model.max_len:
                raise BadRequest(
                    f"The choice {choice.index} has {len(choice.token_ids)} tokens; this model's "
                    f"maximum context length is {self._model.max_len} tokens.",
                    param="token_ids",
                )
        return generated

    async def _chunk(
        self, parsed: GenerateRequest, given: Generated | None, state: StreamState | None
    ) -> Json:
        chunk, derender = self._part(given, state), Derender(self._model, parsed)
        found, after = await self._front.aside(
            _length(state) + _size(chunk), lambda: derender.chunk(chunk, state)
        )
        return {"chunk": found, "stream_state": after and after.model_dump()}

    def _part(self, chunk: Generated | None, state: StreamState | None) -> Generated:
        """A chunk that can go on from the state, as far as their tokens tell. Raises BadRequest."""
        if chunk is None:
            raise BadRequest(
                "generate_chunk is missing: with stream true it holds a chunk of what "
                "/inference/v1/generate streamed.",
                param="generate_chunk",
            )
        if state is not None:
            self._front.parser.prompts.check_ids(state.output_token_ids, "stream_state")
            if len(state.output_token_ids) > self._model.max_len:
                raise BadRequest(
                    f"stream_state has {len(state.output_token_ids)} tokens; this model's maximum "
                    f"context length is {self._model.max_len} tokens.",
                    param="stream_state",
                )
        return self._checked(chunk)


def _length(state: StreamState | None) -> int:
    return len(state.output_token_ids) if state else 0


def _size(generated: Generated) -> int:
    return sum(len(choice.token_ids) for choice in generated.choices)


def _prompt_ids(body: DerenderRequest) -> list[int] | None:
    """Raises BadRequest."""
    _check_length(body.prompt_token_ids, body.prompt_tokens)
    return body.prompt_token_ids


def _check_length(token_ids: Sequence[int] | None, length: int) -> None:
    if token_ids is not None and len(token_ids) != length:
        raise BadRequest(
            f"prompt_tokens is {length}, but prompt_token_ids has {len(token_ids)} ids.",
            param="prompt_token_ids",
        )


def _per_prompt(body: DerenderCompletionRequest) -> tuple[list[int], list[list[int] | None]]:
    """Lengths of the prompts, and their tokens where they are known. Raises BadRequest."""
    given = body.prompt_tokens
    lengths = [given] if isinstance(given, int) else given
    ids: Any = body.prompt_token_ids
    if not lengths:
        raise BadRequest(
            "prompt_tokens must have one entry for each prompt.", param="prompt_tokens"
        )
    if ids is None:
        return lengths, [None] * len(lengths)
    listed: list[list[int] | None] = [ids] if ids and isinstance(ids[0], int) else list(ids)
    if len(listed) != len(lengths):
        raise BadRequest(
            f"prompt_token_ids has {len(listed)} entries and prompt_tokens {len(lengths)}; there "
            "must be one of each for every prompt.",
            param="prompt_token_ids",
        )
    for token_ids, length in zip(listed, lengths, strict=True):
        _check_length(token_ids, length)
    return lengths, listed


def _read_in_pieces(parsed: GenerateRequest, pieces: bool) -> GenerateRequest:
    """The request with its calls of tools read while they are written, or whole: the request that
    is answered may have been a stream when its derendering is none."""
    texts = [
        replace(text, reading=text.reading and replace(text.reading, pieces=pieces))
        for text in parsed.texts
    ]
    return replace(parsed, texts=tuple(texts))


def _with_prompts(parsed: GenerateRequest, listed: Sequence[list[int] | None]) -> GenerateRequest:
    """The request with the prompts that the answers belong to, where they are told."""
    prompts = [
        prompt if ids is None else replace(prompt, token_ids=ids)
        for prompt, ids in zip(parsed.prompts, listed, strict=True)
    ]
    answers = [
        replace(spec, prompt_token_ids=prompts[index // parsed.n].token_ids)
        for index, spec in enumerate(parsed.answers)
    ]
    return replace(parsed, prompts=tuple(prompts), answers=tuple(answers))
