"""Answers of completions and chat, from a generation's progress to OpenAI's shapes."""

from __future__ import annotations

from pdserve.router.errors import ApiError
from pdserve.router.openai import (
    ChunkForms,
    Json,
    LogprobWriter,
    chat_choice,
    completion_choice,
    completion_logprobs,
    pieces_of,
    usage,
)
from pdserve.router.output import Delta
from pdserve.router.writer import Progress

DONE = b"data: [DONE]\n\n"


class OpenAIWriter:
    """Both endpoints; `request.chat` says which."""

    keep_alive = b": keep-alive\n\n"

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._request = request = progress.request
        self.silence_s = request.keep_alive_s
        self._answers = progress.answers
        self._model = model = progress.model
        self._logprobs = LogprobWriter(model.tokenizer.tokens, request.tokens_as_ids)
        if request.stream:
            self._forms = ChunkForms(
                request, request.response_id, progress.created, model.name, self._logprobs
            )
        echoes = any(prompt.echo is not None for prompt in request.prompts)
        speaks_of_prompt = echoes or request.return_token_ids
        self._unopened = set(
            range(len(self._answers)) if speaks_of_prompt and not request.chat else ()
        )
        """Completions: answers whose first chunk, about their prompt, has not been sent."""

    # whole answers

    def body(self) -> Json:
        request, deltas = self._request, [answer.take() or Delta() for answer in self._answers]
        make = self._chat_choice if request.chat else self._completion_choice
        body: Json = {
            "id": request.response_id,
            "object": "chat.completion" if request.chat else "text_completion",
            "created": self._progress.created,
            "model": self._model.name,
            "choices": [make(index, delta) for index, delta in enumerate(deltas)],
            "service_tier": None,
            "system_fingerprint": self._model.fingerprint,
            "usage": self._usage(),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": self._progress.times(),
        }
        if request.chat and len(request.prompts) == 1:
            body |= self._about_prompt(0)
        return body | self._progress.extras()

    def _chat_choice(self, index: int, delta: Delta) -> Json:
        text = (self._echo(index) or "") + delta.text
        choice = chat_choice(index, text, delta, self._request, self._logprobs)
        return choice if len(self._request.prompts) == 1 else choice | self._about_prompt(index)

    def _completion_choice(self, index: int, delta: Delta) -> Json:
        answer, echo = self._answers[index], self._echo(index)
        delta = self._scored(delta)
        return completion_choice(index, delta, self._request, self._logprobs, answer, echo)

    def _scored(self, delta: Delta) -> Delta:
        """With max_tokens 0 the token that had to be drawn is not the client's."""
        return Delta(finish_reason="length") if self._request.score_only else delta

    def _echo(self, index: int) -> str | None:
        return self._request.prompts[index // self._request.n].echo

    def _about_prompt(self, index: int) -> Json:
        """Chat: what the client wants to know of the prompt of an answer."""
        request, found = self._request, self._answers[index].prompt_logprobs
        prompt = request.prompts[index // request.n]
        scored = None
        if request.prompt_logprobs is not None and found is not None:
            scored = self._logprobs.prompt(prompt.token_ids, found, request.prompt_logprobs)
        return {
            "prompt_logprobs": scored,
            "prompt_token_ids": prompt.token_ids if request.return_token_ids else None,
            "prompt_text": prompt.text if request.return_prompt_text else None,
        }

    def _usage(self) -> Json:
        return usage_of(self._progress)

    # streams

    def opening(self) -> list[bytes]:
        """Chat: the first chunks, one per answer; then the echoed text."""
        request, first, forms = self._request, self._request.prompts[0], self._forms
        if not request.chat:
            return []
        ids = first.token_ids if request.return_token_ids else None
        text = first.text if request.return_prompt_text else None
        frames = [forms.role(index, ids, text) for index in range(request.n)]
        if first.echo:
            frames += [forms.text(index, first.echo) for index in range(request.n)]
        return frames

    def _prompt_chunk(self, index: int) -> bytes:
        """Completions: a first chunk with what is said about the prompt."""
        request, answer, echo = self._request, self._answers[index], self._echo(index)
        logprobs = None
        if echo is not None and request.logprobs is not None:
            logprobs = completion_logprobs(Delta(), request, self._logprobs, answer, index, echo)
        choice: Json = {
            "index": index,
            "text": echo or "",
            "logprobs": logprobs,
            "finish_reason": None,
            "stop_reason": None,
        }
        if request.return_token_ids:
            choice["prompt_token_ids"] = request.prompts[index // request.n].token_ids
            choice["token_ids"] = []
        return self._forms.chunk([choice])

    def frames(self, index: int) -> list[bytes]:
        answer, request, forms = self._answers[index], self._request, self._forms
        frames = []
        if index in self._unopened:
            self._unopened.discard(index)
            frames.append(self._prompt_chunk(index))
        if answer.waits(request.stream_interval):
            return frames
        delta = answer.take()
        if delta is None or (request.score_only and delta.finish_reason is None):
            return frames
        if delta.finish_reason is None and forms.plain and not (delta.thoughts or delta.calls):
            return [*frames, forms.text(index, delta.text)]
        if request.score_only:
            delta = self._scored(delta)
        offset = len(self._echo(index) or "") if request.logprobs is not None else 0
        usage_now = self._usage() if request.continuous_usage else None
        members = None
        if delta.finish_reason is not None and not request.include_usage:
            members = {"system_fingerprint": self._model.fingerprint}
            if not self._progress.open:
                members |= self._progress.extras()
        *first, last = pieces_of(delta) if delta.calls else [delta]
        frames += [forms.delta(index, piece, offset, usage_now) for piece in first]
        return [*frames, forms.delta(index, last, offset, usage_now, members)]

    def closing(self) -> list[bytes]:
        """The usage chunk, if asked for, and the end."""
        if not self._request.include_usage:
            return [DONE]
        members = {"system_fingerprint": self._model.fingerprint, **self._progress.extras()}
        if self._request.metrics:
            members["metrics"] = self._progress.times()
        return [self._forms.chunk([], usage=self._usage(), **members), DONE]

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.json() + b"\n\n" + DONE


def usage_of(progress: Progress) -> Json:
    """Counts so far: each prompt once, the tokens of all answers."""
    request, answers = progress.request, progress.answers
    completion = 0 if request.score_only else sum(answer.count for answer in answers)
    prompts = sum(len(prompt.token_ids) for prompt in request.prompts)
    reads = request.chat and progress.model.speech.reasoning is not None
    thought = sum(answer.thought for answer in answers) if reads else None
    return usage(prompts, completion, cached_tokens(progress), progress.stored(), thought)


def cached_tokens(progress: Progress) -> int:
    """Prompt tokens that a worker had already computed."""
    first = progress.answers[:: progress.request.n or 1]  # n is 0 of what came without choices
    return sum(
        min(len(prompt.token_ids), answer.cached_tokens or 0)
        for prompt, answer in zip(progress.request.prompts, first, strict=False)
    )
