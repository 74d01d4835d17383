"""The routes. Each one reads, asks the right module, and answers; nothing is decided here."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from pdserve.cluster.journal import Journal
from pdserve.cluster.membership import Membership
from pdserve.cluster.placement import Placement
from pdserve.cluster.records import ROUTER_HEADER
from pdserve.cluster.settings import RouterSettings
from pdserve.protocol.errors import ErrorCode, PdserveError
from pdserve.router import load_report, openapi
from pdserve.router import metrics as router_metrics
from pdserve.router.admission import Admission, Demand
from pdserve.router.chooser import ANSWER_S, Chooser
from pdserve.router.demand import demand_of, limits_of
from pdserve.router.dispatch import Dispatcher
from pdserve.router.docs import add_offline_docs
from pdserve.router.errors import (
    ApiError,
    BadRequest,
    NotFound,
    Unavailable,
    from_code,
    from_exception,
    schema_error,
)
from pdserve.router.fields import refuse
from pdserve.router.generation import (
    EXPLAIN_HEADER,
    ClientGone,
    Generation,
    Inquiry,
    until_gone,
)
from pdserve.router.grammar_check import GrammarCheck
from pdserve.router.http import Gate, JsonResponse, error_response, http_error, read_json
from pdserve.router.messages_api import add_messages_routes
from pdserve.router.metrics import RouterMetrics
from pdserve.router.openai import Json, encode_json
from pdserve.router.openai_writer import OpenAIWriter
from pdserve.router.openapi import body_of
from pdserve.router.placement import Disaggregate, Policy
from pdserve.router.recorder import Recorder
from pdserve.router.requests import GenerateRequest, RequestParser
from pdserve.router.responses_api import add_responses_routes
from pdserve.router.responses_desk import ResponsesDesk
from pdserve.router.scale_out import add_scale_out_routes
from pdserve.router.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    parse,
)
from pdserve.router.served import ServedModel, load_model, version
from pdserve.router.workers import WorkerPool
from pdserve.router.writer import WriterOf

TEXT_THREADS = 1
"""Threads that tokenize and render long prompts."""
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
        """`wait` for room (see Admission.wait), then `launch` sends the request to workers; leaving
        its context ends what still runs. `load` makes headers of a whole body."""
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
    """What the routes share: the model, the workers, the parser."""

    def __init__(self, settings: RouterSettings, model: ServedModel) -> None:
        self.settings = settings
        self.metrics = RouterMetrics(model.name, model.own_max_len)
        rng = random.Random(settings.seed)
        self._executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._grammars = GrammarCheck(model.folder / "tokenizer.json", model.vocab_size)
        self.pool = WorkerPool(
            Membership(settings.redis, settings.cluster),
            secret=settings.secret,
            name=f"router-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}",
        )
        self.model = replace(model, workers_max_len=self.pool.max_model_len)
        self.parser = RequestParser(
            self.model,
            max_logprobs=settings.max_logprobs,
            trust_templates=settings.trust_request_chat_template,
            executor=self._executor,
            rng=rng,
            grammars=self._grammars,
            hide_unused_tools=settings.exclude_tools_when_tool_choice_none,
        )
        self._placement = Placement(settings.redis, settings.cluster, timeout_s=ANSWER_S)
        self.recorder = Recorder(
            Journal(settings.redis, settings.cluster), self.metrics.story_dropped
        )
        self.responses = ResponsesDesk(settings)
        self._dispatcher: Dispatcher | None = None
        self._admission: Admission | None = None
        self._running: dict[str, list[Generation]] = {}
        """Requests in flight by the ids of their answers, which clients may choose alike."""

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

    async def close(self) -> None:
        await self.responses.close()
        await self.recorder.close()
        self.admission.close()
        await self.pool.close()
        await self.dispatcher.chooser.close()
        await asyncio.to_thread(self._grammars.close)
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        return self._dispatcher is not None and self._dispatcher.ready

    async def read(self, request: Request) -> Any:
        return await read_json(request, self.settings.max_body)

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
                replace(spec, session=session, ttft_s=demand.ttft_s, itl_s=demand.itl_s)
                for spec in parsed.answers
            )
            parsed = replace(parsed, answers=answers)

        @contextmanager
        def launch() -> Iterator[Generation]:
            with Generation(
                parsed, self.model, self.dispatcher, self.metrics, self.recorder, received,
                inquiry, write,
            ) as generation:  # fmt: skip
                same_id = self._running.setdefault(parsed.response_id, [])
                same_id.append(generation)
                try:
                    yield generation
                finally:
                    same_id.remove(generation)
                    if not same_id:
                        del self._running[parsed.response_id]

        wait = functools.partial(self.admission.wait, demand, self.settings.request_timeout_s)
        wanted = request.headers.get(load_report.WANTED, "")
        load = functools.partial(load_report.load_headers, wanted, self.pool)
        return GenerationResponse(wait, launch, parsed.stream, load)

    def abort(self, response_ids: Iterable[str]) -> None:
        """End requests as they are; ids that are not in flight here are ignored."""
        for response_id in response_ids:
            for generation in self._running.get(response_id, ()):
                generation.abort()

    def model_card(self, name: str) -> Json:
        """One entry of /v1/models."""
        created = self.model.created
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "pdserve",
            "root": self.settings.model or self.model.name,
            "parent": None,
            "max_model_len": self.model.max_len,
            "permission": [
                {
                    "id": f"modelperm-{name}",
                    "object": "model_permission",
                    "created": created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }


def create_app(settings: RouterSettings) -> FastAPI:
    """The router as an ASGI application. Reads the model's files at once: raises ModelError, or
    TemplateError for a bad --chat-template, RedisUnavailable for an unusable Redis URL."""
    router = Router(settings, load_model(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await router.start()
        try:
            yield
        finally:
            await router.close()

    offline = settings.enable_offline_docs
    app = FastAPI(
        title="pdserve",
        version=version(),
        root_path=settings.root_path,
        lifespan=lifespan,
        docs_url=None if offline else "/docs",
        redoc_url=None if offline else "/redoc",
    )
    if offline:
        add_offline_docs(app)
    app.state.router = router
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
    )
    app.add_middleware(Gate, keys=settings.api_key, count=router.metrics.http)
    _add_error_handlers(app)
    _add_generation_routes(app, router)
    add_messages_routes(app, router)
    add_responses_routes(app, router)
    add_scale_out_routes(app, router)
    _add_model_routes(app, router)
    _add_text_routes(app, router)
    if settings.enable_tokenizer_info_endpoint:
        _add_tokenizer_info(app, router)
    _add_status_routes(app, router)
    app.openapi = lambda: openapi.document(app, router.model.name)  # type: ignore[method-assign]
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error_response(error, request.scope)

    @app.exception_handler(RequestValidationError)
    async def _bad_query(request: Request, error: RequestValidationError) -> Response:
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        return error_response(schema_error(problems, "query"), request.scope)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        known = http_error(error.status_code)
        if error.status_code == 404:
            known.message = f"There is no {request.method} {request.url.path:.200} here."
        elif error.status_code == 405:
            known.message = f"{request.url.path:.200} does not answer to {request.method}."
        known.headers.update(error.headers or {})
        return error_response(known, request.scope)


def _add_generation_routes(app: FastAPI, router: Router) -> None:
    @app.post(
        "/v1/chat/completions",
        openapi_extra=body_of(ChatCompletionRequest),
        response_class=JsonResponse,
        summary="Answer a conversation",
    )
    async def chat_completions(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        return await _chat(request, await router.read(request), received)

    async def _chat(request: Request, content: Any, received: float) -> Response:
        body = parse(ChatCompletionRequest, content)
        parsed = await router.parser.chat(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    @app.post(
        "/v1/completions",
        openapi_extra=body_of(CompletionRequest),
        response_class=JsonResponse,
        summary="Continue a text",
    )
    async def completions(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        return await _completion(request, await router.read(request), received)

    async def _completion(request: Request, content: Any, received: float) -> Response:
        body = parse(CompletionRequest, content)
        parsed = await router.parser.completion(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    @app.post(
        "/invocations",
        openapi_extra=body_of(ChatCompletionRequest, CompletionRequest),
        response_class=JsonResponse,
        summary="Either of both, by what the body holds (SageMaker)",
    )
    async def invocations(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        content = await router.read(request)
        if isinstance(content, dict):
            content = {name: value for name, value in content.items() if name != "model"}
            if "messages" in content:
                return await _chat(request, content, received)
        return await _completion(request, content, received)


def _add_model_routes(app: FastAPI, router: Router) -> None:
    @app.get("/v1/models", response_class=JsonResponse, summary="The models that can be asked for")
    async def models() -> Response:
        names = router.model.names if router.ready else ()
        return JsonResponse(
            encode_json({"object": "list", "data": [router.model_card(name) for name in names]})
        )

    @app.get("/v1/models/{name:path}", response_class=JsonResponse, summary="One model")
    async def model(request: Request, name: str) -> Response:
        if not name:
            return RedirectResponse(request.url_for("models"), status_code=307)
        if name not in router.model.names:
            raise NotFound(f"The model `{name:.200}` does not exist.", param="model")
        if not router.ready:
            raise Unavailable(router.dispatcher.nobody())
        return JsonResponse(encode_json(router.model_card(name)))


def _add_text_routes(app: FastAPI, router: Router) -> None:
    @app.post(
        "/tokenize",
        openapi_extra=body_of(TokenizeTextRequest, TokenizeChatRequest),
        response_class=JsonResponse,
        summary="Text or a conversation to token ids",
    )
    async def tokenize(request: Request) -> Response:
        content = await router.read(request)
        tokenizer = router.model.tokenizer
        body: TokenizeChatRequest | TokenizeTextRequest
        if isinstance(content, dict) and "messages" in content:
            body = chat = parse(TokenizeChatRequest, content)
            router.model.check_name(body.model)
            refuse(body)
            prompt = await router.parser.render(chat, dict(chat.chat_template_kwargs or {}))
            ids = prompt.token_ids
        else:
            body = parse(TokenizeTextRequest, content)
            router.model.check_name(body.model)
            ids = await router.parser.encode(body.prompt, body.add_special_tokens is not False)
        strings = tokenizer.token_strings(ids) if body.return_token_strs else None
        return JsonResponse(
            encode_json(
                {
                    "count": len(ids),
                    "max_model_len": router.model.max_len,
                    "tokens": ids,
                    "token_strs": strings,
                }
            )
        )

    @app.post(
        "/detokenize",
        openapi_extra=body_of(DetokenizeRequest),
        response_class=JsonResponse,
        summary="Token ids to text",
    )
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeRequest, await router.read(request))
        router.model.check_name(body.model)
        text = router.model.tokenizer.tokens.text(body.tokens, False)
        return JsonResponse(encode_json({"prompt": text}))


def _add_tokenizer_info(app: FastAPI, router: Router) -> None:
    @app.get(
        "/tokenizer_info", response_class=JsonResponse, summary="The tokenizer's configuration"
    )
    async def tokenizer_info() -> Response:
        return JsonResponse(encode_json(router.model.tokenizer_info()))


def _add_status_routes(app: FastAPI, router: Router) -> None:
    async def health() -> Response:
        if router.ready:
            return Response(status_code=200, headers={ROUTER_HEADER: str(os.getpid())})
        raise Unavailable(router.dispatcher.nobody())

    app.add_api_route(
        "/health", health, methods=["GET"], summary="200 while requests can be served, else 503"
    )
    app.add_api_route(
        "/ping", health, methods=["GET"], summary="The same as /health", operation_id="ping_get"
    )
    app.add_api_route(
        "/ping", health, methods=["POST"], summary="The same as /health", operation_id="ping_post"
    )

    @app.get("/version", summary="The release")
    async def show_version() -> Response:
        return JsonResponse(encode_json({"version": version()}))

    @app.get("/load", summary="Answers in flight at this router")
    async def load() -> Response:
        return JsonResponse(encode_json({"server_load": router.dispatcher.in_flight}))

    @app.get("/metrics", summary="Counters and histograms in Prometheus' text format")
    async def metrics() -> Response:
        return Response(
            router.metrics.text(), headers={"content-type": router_metrics.CONTENT_TYPE}
        )
