"""The routes of OpenAI's completions and chat, and SageMaker's way to both."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from pdserve.router.openapi import json_post
from pdserve.router.router import Router
from pdserve.router.schemas import BatchChatRequest, ChatCompletionRequest, CompletionRequest, parse


def add_openai_routes(app: FastAPI, router: Router) -> None:
    @json_post(app, "/v1/chat/completions", "Answer a conversation", ChatCompletionRequest)
    async def chat_completions(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        return await _chat(request, await router.read(request), received)

    async def _chat(request: Request, content: Any, received: float) -> Response:
        body = parse(ChatCompletionRequest, content)
        parsed = await router.parser.chat(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    @json_post(
        app, "/v1/chat/completions/batch", "Answer several conversations at once", BatchChatRequest
    )
    async def batch(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        body = parse(BatchChatRequest, await router.read(request))
        router.admit(len(body.messages))
        parsed = await router.parser.batch(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    @json_post(app, "/v1/completions", "Continue a text", CompletionRequest)
    async def completions(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        return await _completion(request, await router.read(request), received)

    async def _completion(request: Request, content: Any, received: float) -> Response:
        body = parse(CompletionRequest, content)
        parsed = await router.parser.completion(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    @json_post(
        app,
        "/invocations",
        "Either of both, by what the body holds (SageMaker)",
        ChatCompletionRequest,
        CompletionRequest,
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
