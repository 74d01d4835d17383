"""The routes before and behind inference: requests to token ids, and token ids to answers.

They need no workers. In a router they answer 403 unless it was started with --enable-scale-out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Request
from starlette.responses import Response

from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.derender_requests import Derendering
from pdserve.router.errors import ApiError
from pdserve.router.front import Front
from pdserve.router.http import JsonResponse
from pdserve.router.messages import as_chat
from pdserve.router.openai import Json, encode_json
from pdserve.router.openapi import json_post
from pdserve.router.render import rendered
from pdserve.router.responses import chat_of, in_own_words
from pdserve.router.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    MessagesRequest,
    RequestBody,
    ResponsesRequest,
    parse,
)
from pdserve.router.token_schemas import (
    DerenderChatRequest,
    DerenderCompletionRequest,
    DerenderResponsesRequest,
)

Body = TypeVar("Body", bound=RequestBody)
Answer = Awaitable[Json | list[Json]]


def check_scale_out(settings: RouterSettings) -> None:
    """Raises ApiError 403 unless these routes are switched on."""
    if not settings.enable_scale_out:
        raise ApiError(
            "Scale-out endpoints are disabled. Restart the router with --enable-scale-out to "
            "enable them.",
            status=403,
            kind="PermissionDeniedError",
        )


class Routes:
    """Routes that answer bodies with JSON, by themselves."""

    def __init__(self, app: FastAPI, front: Front) -> None:
        self._app = app
        self._front = front

    def add(
        self, path: str, summary: str, kind: type[Body], answer: Callable[[Body, str], Answer]
    ) -> None:
        """`answer(body, id from the header)`."""

        @json_post(self._app, path, summary, kind)
        async def route(request: Request) -> Response:
            check_scale_out(self._front.settings)
            body = parse(kind, await self._front.read(request))
            content = await answer(body, request.scope["pdserve.request_id"])
            return JsonResponse(encode_json(content))


def add_render_routes(app: FastAPI, front: Front) -> None:
    routes = Routes(app, front)
    _add_conversation_routes(routes, front)
    _add_completion_route(routes, front)
    _add_derender_routes(routes, Derendering(front))


def _add_conversation_routes(routes: Routes, front: Front) -> None:
    async def chat(body: ChatCompletionRequest, header_id: str, name: str | None = None) -> Json:
        parsed = await front.parser.chat(without_offsets(body), header_id)
        named, special = name or parsed.response_id, bool(body.add_special_tokens)
        return rendered(front, parsed, 0, named, body, body.return_token_offsets, special)

    async def messages(body: MessagesRequest, header_id: str) -> Json:
        return await chat(as_chat(body, front.model.least_effort), header_id)

    async def response(body: ResponsesRequest, header_id: str) -> Json:
        with in_own_words():
            return await chat(chat_of(front.model.speech, body), header_id, body.request_id)

    routes.add(
        "/v1/chat/completions/render",
        "A conversation as a request for /inference/v1/generate",
        ChatCompletionRequest,
        chat,
    )
    routes.add(
        "/v1/messages/render",
        "A conversation (Anthropic) as a request for /inference/v1/generate",
        MessagesRequest,
        messages,
    )
    routes.add(
        "/v1/responses/render",
        "A conversation (OpenAI's Responses) as a request for /inference/v1/generate",
        ResponsesRequest,
        response,
    )


def _add_completion_route(routes: Routes, front: Front) -> None:
    async def completions(body: CompletionRequest, header_id: str) -> list[Json]:
        parsed = await front.parser.completion(without_offsets(body), header_id)
        offsets, special = body.return_token_offsets, body.add_special_tokens is not False
        return [
            rendered(front, parsed, place, f"{parsed.response_id}-{place}", body, offsets, special)
            for place in range(len(parsed.prompts))
        ]

    routes.add(
        "/v1/completions/render",
        "Prompts as requests for /inference/v1/generate",
        CompletionRequest,
        completions,
    )


def without_offsets(body: Body) -> Body:
    """The request without `return_token_offsets`, which only rendering serves."""
    return body.model_copy(update={"return_token_offsets": None})


def _add_derender_routes(routes: Routes, derendering: Derendering) -> None:
    async def response(body: DerenderResponsesRequest, _: str) -> Json:
        with in_own_words():
            return await derendering.response(body)

    routes.add(
        "/v1/chat/completions/derender",
        "What /inference/v1/generate said, as an answer of chat",
        DerenderChatRequest,
        lambda body, _: derendering.chat(body),
    )
    routes.add(
        "/v1/completions/derender",
        "What /inference/v1/generate said, as an answer of completions",
        DerenderCompletionRequest,
        lambda body, _: derendering.completion(body),
    )
    routes.add(
        "/v1/responses/derender",
        "What /inference/v1/generate said, as a response",
        DerenderResponsesRequest,
        response,
    )
