"""The routes before and behind inference: requests to token ids, and token ids to answers.

They need no workers. In a router they answer 403 unless it was started with --enable-scale-out.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.derender_requests import Derendering
from pdserve.router.errors import ApiError
from pdserve.router.front import Front
from pdserve.router.http import JsonResponse
from pdserve.router.messages import as_chat
from pdserve.router.openai import encode_json
from pdserve.router.openapi import json_post
from pdserve.router.render import rendered
from pdserve.router.responses import chat_of, in_own_words
from pdserve.router.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    MessagesRequest,
    ResponsesRequest,
    parse,
)
from pdserve.router.token_schemas import (
    DerenderChatRequest,
    DerenderCompletionRequest,
    DerenderResponsesRequest,
)

Body = TypeVar("Body", bound=BaseModel)


def check_scale_out(settings: RouterSettings) -> None:
    """Raises ApiError 403 unless these routes are switched on."""
    if not settings.enable_scale_out:
        raise ApiError(
            "Scale-out endpoints are disabled. Restart the router with --enable-scale-out to "
            "enable them.",
            status=403,
            kind="PermissionDeniedError",
        )


def add_render_routes(app: FastAPI, front: Front) -> None:
    _add_conversation_routes(app, front)
    _add_completion_route(app, front)
    _add_derender_routes(app, front)


def _add_conversation_routes(app: FastAPI, front: Front) -> None:
    check = partial(check_scale_out, front.settings)

    @json_post(
        app,
        "/v1/chat/completions/render",
        "A conversation as a request for /inference/v1/generate",
        ChatCompletionRequest,
    )
    async def render_chat(request: Request) -> Response:
        check()
        body = parse(ChatCompletionRequest, await front.read(request))
        return await render(request, body, body.return_token_offsets)

    @json_post(
        app,
        "/v1/messages/render",
        "A conversation (Anthropic) as a request for /inference/v1/generate",
        MessagesRequest,
    )
    async def render_messages(request: Request) -> Response:
        check()
        body = as_chat(parse(MessagesRequest, await front.read(request)), front.model.least_effort)
        return await render(request, body, None)

    @json_post(
        app,
        "/v1/responses/render",
        "A conversation (OpenAI's Responses) as a request for /inference/v1/generate",
        ResponsesRequest,
    )
    async def render_responses(request: Request) -> Response:
        check()
        body = parse(ResponsesRequest, await front.read(request))
        with in_own_words():
            return await render(request, chat_of(front.model.speech, body), None, body.request_id)

    async def render(
        request: Request,
        body: ChatCompletionRequest,
        offsets: object,
        response_id: str | None = None,
    ) -> Response:
        plain = without_offsets(body)
        parsed = await front.parser.chat(plain, request.scope["pdserve.request_id"])
        name = response_id or parsed.response_id
        content = rendered(front, parsed, 0, name, body, offsets, bool(body.add_special_tokens))
        return JsonResponse(encode_json(content))


def _add_completion_route(app: FastAPI, front: Front) -> None:
    @json_post(
        app,
        "/v1/completions/render",
        "Prompts as requests for /inference/v1/generate",
        CompletionRequest,
    )
    async def render_completions(request: Request) -> Response:
        check_scale_out(front.settings)
        body = parse(CompletionRequest, await front.read(request))
        plain, offsets = without_offsets(body), body.return_token_offsets
        parsed = await front.parser.completion(plain, request.scope["pdserve.request_id"])
        special = body.add_special_tokens is not False
        listed = [
            rendered(front, parsed, place, f"{parsed.response_id}-{place}", body, offsets, special)
            for place in range(len(parsed.prompts))
        ]
        return JsonResponse(encode_json(listed))


def without_offsets(body: Body) -> Body:
    """The request without `return_token_offsets`, which only rendering serves."""
    return body.model_copy(update={"return_token_offsets": None})


def _add_derender_routes(app: FastAPI, front: Front) -> None:
    check = partial(check_scale_out, front.settings)
    derendering = Derendering(front)

    @json_post(
        app,
        "/v1/chat/completions/derender",
        "What /inference/v1/generate said, as an answer of chat",
        DerenderChatRequest,
    )
    async def derender_chat(request: Request) -> Response:
        check()
        body = parse(DerenderChatRequest, await front.read(request))
        return JsonResponse(encode_json(await derendering.chat(body)))

    @json_post(
        app,
        "/v1/completions/derender",
        "What /inference/v1/generate said, as an answer of completions",
        DerenderCompletionRequest,
    )
    async def derender_completions(request: Request) -> Response:
        check()
        body = parse(DerenderCompletionRequest, await front.read(request))
        return JsonResponse(encode_json(await derendering.completion(body)))

    @json_post(
        app,
        "/v1/responses/derender",
        "What /inference/v1/generate said, as a response",
        DerenderResponsesRequest,
    )
    async def derender_responses(request: Request) -> Response:
        check()
        body = parse(DerenderResponsesRequest, await front.read(request))
        with in_own_words():
            return JsonResponse(encode_json(await derendering.response(body)))
