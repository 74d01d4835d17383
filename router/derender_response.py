"""Tokens back into responses, whole or event by event; as `derender.py` does for the other APIs."""

from __future__ import annotations

import time
from dataclasses import replace

from pdserve.protocol.messages import Output
from pdserve.router.derender import Derender, cached_of, counted, tampered
from pdserve.router.requests import GenerateRequest
from pdserve.router.responses_writer import Reply, ResponsesWriter
from pdserve.router.schemas import ResponsesRequest
from pdserve.router.served import ServedModel
from pdserve.router.token_schemas import Generated, ResponseState
from pdserve.router.writer import Json, Progress


class ResponseDerender:
    """Of one request: as it came, and as it was parsed. `prompt_tokens`: how long its prompt was;
    the caller knows it."""

    def __init__(
        self,
        model: ServedModel,
        body: ResponsesRequest,
        request: GenerateRequest,
        prompt_tokens: int,
    ) -> None:
        self._model = model
        self._body = body
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._derender = Derender(model, request)

    def whole(self, generated: Generated) -> Json:
        """Raises BadRequest."""
        progress = self._derender.progress([generated])
        found = self._writer(progress).body()
        self._count(found)
        return found

    def events(
        self, generated: Generated, state: ResponseState | None
    ) -> tuple[list[Json], ResponseState | None]:
        """The events that a chunk of a stream brings, and the state after it. Raises
        BadRequest."""
        if not generated.choices:
            return [], state  # the counts, which the last event has told
        choice, derender = self._derender.choice(generated), self._derender
        answer, scores = derender.answer(0), derender.scores(choice)
        created = state.created if state else generated.created or int(time.time())
        progress = Progress(
            request=replace(self._request, response_id=generated.request_id),
            model=self._model,
            answers=[answer],
            open=1,
            created=created,
            extras=dict,
            stored=lambda: counted(generated, "created_cache_tokens") or 0,
        )
        writer = self._writer(progress)
        found = writer.begin()
        if state is not None:
            found = []
            derender.replay(answer, state, writer.grow)
            try:
                writer.rename(state.names)
            except ValueError:
                raise tampered("names are not those of its items") from None
        answer.feed(Output(request_id="", cached_tokens=cached_of(generated)))
        derender.feed(answer, choice, scores)
        found += writer.grow()
        if answer.finished:
            found += writer.end()
            self._count(found[-1]["response"])
        known = state or ResponseState(
            output_token_ids=[], output_chunk_lens=[], role_sent=True, created=created, names=[]
        )
        scored = choice.logprobs.content if choice.logprobs and scores is not None else []
        after = ResponseState(
            output_token_ids=[*known.output_token_ids, *choice.token_ids],
            output_chunk_lens=[*known.output_chunk_lens, len(choice.token_ids)],
            role_sent=True,
            waiting=[*known.waiting, *scored],
            created=created,
            names=writer.names,
        )
        return found, after

    def _writer(self, progress: Progress) -> ResponsesWriter:
        request, name = progress.request, self._model.name
        return ResponsesWriter(progress, Reply.of(self._body, request, name, progress.created))

    def _count(self, response: Json) -> None:
        counted = response["usage"]
        total = self._prompt_tokens + counted["output_tokens"]
        counted |= {"input_tokens": self._prompt_tokens, "total_tokens": total}
