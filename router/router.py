"""One router: requests that have been read are admitted, sent to workers and answered."""

from __future__ import annotations

import functools
import os
import random
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdserve.cluster.journal import Journal
from pdserve.cluster.membership import Membership
from pdserve.cluster.placement import Placement
from pdserve.cluster.requests import RequestRecord, RequestRecords
from pdserve.cluster.router_settings import RouterSettings
from pdserve.protocol.errors import ErrorCode, PdserveError
from pdserve.router import load_report
from pdserve.router.admission import Admission, Demand
from pdserve.router.chooser import ANSWER_S, Chooser
from pdserve.router.demand import demand_of, limits_of
from pdserve.router.dispatch import Dispatcher
from pdserve.router.errors import BadRequest, from_code, from_exception
from pdserve.router.front import Front
from pdserve.router.generation import (
    EXPLAIN_HEADER,
    ClientGone,
    Generation,
    Inquiry,
    until_gone,
)
from pdserve.router.http import JsonResponse, error_response
from pdserve.router.ledger import InLine, Ledger
from pdserve.router.openai import encode_json
from pdserve.router.openai_writer import OpenAIWriter
from pdserve.router.placement import Disaggregate, Policy
from pdserve.router.recorder import Recorder
from pdserve.router.requests import GenerateRequest, RequestParser
from pdserve.router.responses_desk import ResponsesDesk
from pdserve.router.served import ServedModel
from pdserve.router.workers import WorkerPool
from pdserve.router.writer import WriterOf

TIMINGS_HEADER = "x-pdserve-timings"
SESSION_HEADER = "x-session-id"
NO_TURN = (
    "The request waited for its turn until its time (--request-timeout-s) ran out; the cluster is "
    "overloaded."
)


class GenerationResponse(Response):
    """Generates when it is sent: server-sent events or one JSON body."""

    background = None

    def __init__(
        self,
        wait: Callable[[Callable[[], Coroutine[Any, Any, None]]], Awaitable[bool]],
        launch: Callable[[], AbstractContextManager[Generation]],
        stream: bool,
        load: Callable[[], dict[str, str]],
    ) -> None:
        """`wait` for room (False: the client has left), then `launch` sends the request to workers;
        leaving its context ends what still runs. `load` makes headers of a whole body."""
        self._load = load
        self._wait = wait
        self._launch = launch
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not await self._wait(functools.partial(until_gone, receive)):
                return
            with self._launch() as generation:
                generation.watch(receive)
                if self._stream:
                    await generation.stream(send)
                    return
                body = encode_json(await generation.body())
                answer: Response = JsonResponse(
                    body, headers=generation.explain_headers() | self._load()
                )
        except ClientGone:
            return
        except TimeoutError:
            answer = error_response(from_code(ErrorCode.DEADLINE, NO_TURN), scope)
        except PdserveError as error:
            answer = error_response(from_exception(error), scope)
        await answer(scope, receive, send)


class Router:
    """What the routes of a router share: the front, and the workers behind it."""

    def __init__(self, settings: RouterSettings, model: ServedModel) -> None:
        self.settings = settings
        self._placement = Placement(settings.redis, settings.cluster, timeout_s=ANSWER_S)
        self.pool = WorkerPool(
            Membership(settings.redis, settings.cluster),
            secret=settings.secret,
            reports=self._placement.loads,
            name=f"router-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}",
        )
        self.front = Front(settings, replace(model, workers_max_len=self.pool.max_model_len))
        self.metrics = self.front.metrics
        self.recorder = Recorder(
            Journal(settings.redis, settings.cluster), self.metrics.story_dropped
        )
        self.ledger = Ledger(RequestRecords(settings.redis, settings.cluster), self.pool.name)
        self.responses = ResponsesDesk(settings)
        self._dispatcher: Dispatcher | None = None
        self._admission: Admission | None = None

    @property
    def model(self) -> ServedModel:
        return self.front.model

    @property
    def parser(self) -> RequestParser:
        return self.front.parser

    @property
    def dispatcher(self) -> Dispatcher:
        assert self._dispatcher is not None, "the router has not been started"
        return self._dispatcher

    @property
    def admission(self) -> Admission:
        assert self._admission is not None, "the router has not been started"
        return self._admission

    async def start(self) -> None:
        self._dispatcher = Dispatcher(
            self.pool,
            timeout_s=self.settings.request_timeout_s,
            chooser=Chooser(
                self._placement,
                Policy(self.settings.routing_policy),
                self.pool.load,
                random.Random(self.settings.seed),
            ),
            disaggregate=Disaggregate(self.settings.disaggregate),
            count_move=self.metrics.retried,
        )
        self._admission = Admission(
            self._dispatcher, limits_of(self.settings), self.metrics.rejected
        )
        self.metrics.follow(self.pool, self._dispatcher, self._admission)
        self.pool.start()
        self.recorder.start()
        self.ledger.start()

    async def close(self) -> None:
        await self.responses.close()
        await self.ledger.close()
        await self.recorder.close()
        self.admission.close()
        await self.pool.close()
        await self.dispatcher.chooser.close()
        await self.front.close()

    @property
    def ready(self) -> bool:
        return self._dispatcher is not None and self._dispatcher.ready

    def trouble(self) -> str:
        """Why no request can be served now, as a sentence; "" if they can."""
        return "" if self.ready else self.dispatcher.nobody()

    async def read(self, request: Request) -> Any:
        return await self.front.read(request)

    def admit(self, answers: int) -> None:
        """Raises Overloaded if that many more answers are too many now, BadRequest if ever."""
        limit = self.settings.max_queue
        if answers > limit:
            raise BadRequest(
                f"The request asks for {answers} answers (prompts × n); this router generates at "
                f"most {limit} at once (--max-queue).",
                param="n",
            )
        self.admission.check(Demand(answers=answers))

    def respond(
        self,
        request: Request,
        parsed: GenerateRequest,
        received: float,
        write: WriterOf = OpenAIWriter,
    ) -> Response:
        """The answer to a request. Raises ApiError if it cannot be taken on."""
        self.admit(len(parsed.answers))
        demand = demand_of(request, parsed, guarded=bool(self.settings.api_key))
        self.admission.check(demand)
        inquiry = Inquiry(
            request_id=request.scope["pdserve.shown_id"],
            timings=request.headers.get(TIMINGS_HEADER) == "1",
            explain=request.headers.get(EXPLAIN_HEADER) == "1",
        )
        session = request.headers.get(SESSION_HEADER, "")
        if session or demand.ttft_s or demand.itl_s:
            answers = tuple(
                replace(
                    spec, session=spec.session or session, ttft_s=demand.ttft_s, itl_s=demand.itl_s
                )
                for spec in parsed.answers
            )
            parsed = replace(parsed, answers=answers)

        in_line = self._in_line(parsed, inquiry, received)

        async def wait(gone: Callable[[], Coroutine[Any, Any, None]]) -> bool:
            until, timeout_s = (
                functools.partial(in_line.until, gone),
                self.settings.request_timeout_s,
            )
            with self.ledger.carrying(parsed.response_id, in_line):
                return await self.admission.wait(demand, timeout_s, until) or in_line.aborted

        @contextmanager
        def launch() -> Iterator[Generation]:
            with (
                Generation(
                    parsed, self.model, self.dispatcher, self.metrics, self.recorder, received,
                    inquiry, write,
                ) as generation,
                self.ledger.carrying(parsed.response_id, generation),
            ):  # fmt: skip
                if in_line.aborted:
                    generation.abort()
                yield generation

        wanted = request.headers.get(load_report.WANTED, "")
        load = functools.partial(load_report.load_headers, wanted, self.pool)
        return GenerationResponse(wait, launch, parsed.stream, load)

    def _in_line(self, parsed: GenerateRequest, inquiry: Inquiry, received: float) -> InLine:
        """The request while it waits for its turn."""
        came = time.time() - (time.monotonic() - received)
        return InLine(
            RequestRecord(
                id=parsed.response_id,
                request_id=inquiry.request_id,
                router=self.pool.name,
                received=came,
                deadline=came + self.settings.request_timeout_s,
                prompt_tokens=parsed.prompt_tokens,
                tokens=0,
                holders=[],
            )
        )
