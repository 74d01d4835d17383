"""Tokens back into answers: what /inference/v1/generate said, in the shapes of the other APIs.

An answer is made anew from its tokens by what makes it in a router: `AnswerText` and the writers.
So is each chunk of a stream: the caller's state holds the tokens so far, which are read again, and
nothing is kept here between two calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pdserve.protocol.messages import FinishReason, Output, PositionLogprobs
from pdserve.router.errors import BadRequest
from pdserve.router.openai import ChunkForms, LogprobWriter, call_delta
from pdserve.router.openai_writer import OpenAIWriter
from pdserve.router.output import AnswerText, Delta
from pdserve.router.repetition import REASON
from pdserve.router.requests import GenerateRequest
from pdserve.router.served import ServedModel
from pdserve.router.token_schemas import Generated, GeneratedChoice, ScoredToken, StreamState
from pdserve.router.writer import Json, Progress

UNSCORED = PositionLogprobs(0.0, 1)
"""For tokens whose scores were sent before."""


def position_of(scored: ScoredToken) -> PositionLogprobs:
    """The token itself stands in the gap that the others' places leave, or behind them."""
    others = [entry for entry in scored.top_logprobs if entry.token_id != scored.token_id]
    others.sort(key=lambda entry: entry.rank or 2**31)
    places = [entry.rank for entry in others]
    gap = next((place for place, rank in enumerate(places) if rank != place + 1), len(others))
    top = [(entry.token_id, entry.logprob) for entry in (*others[:gap], scored, *others[gap:])]
    return PositionLogprobs(scored.logprob, scored.rank or len(top), tuple(top))


def prompt_positions(
    generated: Generated, token_ids: Sequence[int]
) -> list[PositionLogprobs | None] | None:
    """Scores of a prompt's tokens, from the `prompt_logprobs` of an answer. Raises BadRequest."""
    listed = generated.prompt_logprobs
    if listed is None:
        return None
    if len(listed) != len(token_ids):
        raise BadRequest(
            f"prompt_logprobs has {len(listed)} entries for a prompt of {len(token_ids)} tokens.",
            param="prompt_logprobs",
        )
    try:
        return [_prompt_position(entry, own) for entry, own in zip(listed, token_ids, strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadRequest(
            "prompt_logprobs must hold, for each token but the first, an object of token ids with "
            "logprob and rank, the prompt's own token among them.",
            param="prompt_logprobs",
        ) from None


def _prompt_position(entry: Json | None, own: int) -> PositionLogprobs | None:
    if entry is None:
        return None
    top = tuple((int(key), float(found["logprob"])) for key, found in entry.items())
    return PositionLogprobs(float(entry[str(own)]["logprob"]), int(entry[str(own)]["rank"]), top)


class Derender:
    """Answers of one request. `request`: as it was parsed (`answers` are prompt × n + k)."""

    def __init__(self, model: ServedModel, request: GenerateRequest) -> None:
        self._model = model
        self._request = request

    def progress(self, responses: Sequence[Generated]) -> Progress:
        """The request as a generation leaves it, one response per prompt. Raises BadRequest."""
        request, answers = self._request, []
        for place, response in enumerate(responses):
            choices = sorted(response.choices, key=lambda choice: choice.index)
            if [choice.index for choice in choices] != list(range(request.n)):
                raise BadRequest(
                    f"The response must have the choices 0 to {request.n - 1} (n={request.n}), got "
                    f"{[choice.index for choice in choices][:20]}.",
                    param="choices",
                )
            answers += [
                self._whole(place * request.n + choice.index, choice, response)
                for choice in choices
            ]
        return Progress(
            request=replace(request, response_id=responses[0].request_id),
            model=self._model,
            answers=answers,
            open=0,
            created=responses[0].created or int(time.time()),
            extras=dict,
            stored=lambda: sum(counted(one, "created_cache_tokens") or 0 for one in responses),
        )

    def _whole(self, index: int, choice: GeneratedChoice, response: Generated) -> AnswerText:
        if choice.finish_reason is None:
            raise BadRequest(
                "The choice has no finish_reason: it is no whole answer; use stream and "
                "generate_chunk for parts of one.",
                param="finish_reason",
            )
        answer = self.answer(index)
        prompt_ids = self._request.prompts[index // self._request.n].token_ids
        opening = Output(
            request_id="",
            cached_tokens=cached_of(response),
            prompt_logprobs=prompt_positions(response, prompt_ids),
        )
        answer.feed(opening)
        self.feed(answer, choice, self.scores(choice))
        return answer

    def answer(self, index: int) -> AnswerText:
        """A fresh one."""
        spec = self._request.answers[index]
        tokens, text = self._model.tokenizer.tokens, self._request.text(index)
        return AnswerText(tokens, spec.prompt_token_ids, spec.sampling, text)

    def scores(self, choice: GeneratedChoice) -> list[PositionLogprobs] | None:
        """Of its tokens, if they were asked for. Raises BadRequest."""
        if self._request.logprobs is None:
            return None
        scored = choice.logprobs.content if choice.logprobs else []
        if [entry.token_id for entry in scored] != choice.token_ids:
            raise BadRequest(
                "logprobs.content must have the choice's token_ids, one entry each.",
                param="logprobs",
            )
        return [position_of(entry) for entry in scored]

    def feed(
        self, answer: AnswerText, choice: GeneratedChoice, scores: list[PositionLogprobs] | None
    ) -> None:
        """Let an answer grow by a choice's tokens."""
        reason, stop = choice.finish_reason, choice.stop_reason
        repeats = reason == REASON
        output = Output(
            request_id="",
            token_ids=choice.token_ids,
            logprobs=scores,
            finish_reason=None if reason is None or repeats else FinishReason(reason),
            stop_token_id=stop if isinstance(stop, int) else None,
        )
        answer.feed(output)
        if repeats and not answer.finished:
            answer.finish(REASON, stop)

    # streams

    def chunk(
        self, generated: Generated, state: StreamState | None
    ) -> tuple[Json | None, StreamState | None]:
        """A chunk of the other API, if there is something to say, and the state after it. Raises
        BadRequest."""
        forms = self._forms(generated)
        if not generated.choices:
            return generated.usage and forms.content([], usage=generated.usage), state
        choice = self.choice(generated)
        answer = self.answer(choice.index)
        state = state or StreamState(output_token_ids=[], output_chunk_lens=[], role_sent=False)
        self.replay(answer, state, answer.take)
        self.feed(answer, choice, self.scores(choice))
        delta = answer.take()
        lens = [*state.output_chunk_lens, len(choice.token_ids)]
        scored = [*state.waiting, *(choice.logprobs.content if choice.logprobs else [])]
        after = StreamState(
            output_token_ids=[*state.output_token_ids, *choice.token_ids],
            output_chunk_lens=lens,
            role_sent=state.role_sent or delta is not None,
            waiting=scored if delta is None and self._request.logprobs is not None else [],
        )
        if delta is None:
            return None, after
        return self._chunk(forms, choice.index, delta, not state.role_sent), after

    def choice(self, generated: Generated) -> GeneratedChoice:
        """The one of a chunk that has any. Raises BadRequest."""
        if len(generated.choices) > 1:
            raise BadRequest(
                f"generate_chunk must have at most one choice, got {len(generated.choices)}; keep "
                "one stream_state for each choice.",
                param="generate_chunk",
            )
        (choice,) = generated.choices
        if choice.index >= len(self._request.answers):
            raise BadRequest(
                f"The choice {choice.index} is not among the request's "
                f"{len(self._request.answers)} answers.",
                param="generate_chunk",
            )
        return choice

    def replay(self, answer: AnswerText, state: StreamState, said: Callable[[], object]) -> None:
        """Bring a fresh answer to where the stream stands; `said()` after each chunk. Raises
        BadRequest."""
        ids = state.output_token_ids
        if sum(state.output_chunk_lens) != len(ids) or len(state.waiting) > len(ids):
            raise tampered("output_chunk_lens do not add up to output_token_ids")
        known = dict(enumerate(map(position_of, state.waiting), len(ids) - len(state.waiting)))
        place = 0
        for length in state.output_chunk_lens:
            span = range(place, place + length)
            scores = [known.get(index, UNSCORED) for index in span]
            answer.feed(
                Output(request_id="", token_ids=ids[place : place + length], logprobs=scores)
            )
            said()
            place += length
        if answer.finished:
            raise tampered("its tokens have ended the answer already")

    def _forms(self, generated: Generated) -> ChunkForms:
        writer = LogprobWriter(self._model.tokenizer.tokens, self._request.tokens_as_ids)
        created = generated.created or int(time.time())
        return ChunkForms(self._request, generated.request_id, created, self._model.name, writer)

    def _chunk(self, forms: ChunkForms, index: int, delta: Delta, first: bool) -> Json:
        echo = self._request.prompts[index // self._request.n].echo if first else None
        choice = forms.choice(index, replace(delta, calls=[]), len(echo or ""))
        if self._request.chat:
            role = {"role": self._request.role} if first else {}
            choice["delta"] = role | choice["delta"]
            if delta.calls:
                choice["delta"]["tool_calls"] = [call_delta(call) for call in delta.calls]
            if echo:
                choice["delta"]["content"] = echo + delta.text
        elif echo:
            choice["text"] = echo + delta.text
        return forms.content([choice])


def cached_of(generated: Generated) -> int | None:
    """Prompt tokens that were cached, if it says so."""
    return counted(generated, "cached_tokens")


def counted(generated: Generated, name: str) -> int | None:
    """A detail of how many prompt tokens there were."""
    details = (generated.usage or {}).get("prompt_tokens_details")
    value = details.get(name) if isinstance(details, dict) else None
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


def tampered(why: str) -> BadRequest:
    return BadRequest(f"stream_state is not what it was: {why}.", param="stream_state")


def body_of(progress: Progress, prompt_tokens: Iterable[int]) -> Json:
    """OpenAI's body of a whole answer; the caller knows how long the prompts were."""
    body = OpenAIWriter(progress).body()
    counted = body["usage"]
    prompts = sum(prompt_tokens)
    total = prompts + counted["completion_tokens"]
    return body | {"usage": counted | {"prompt_tokens": prompts, "total_tokens": total}}
