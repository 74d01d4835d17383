"""The routes of OpenAI's completions and chat, and SageMaker's way to both."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from pdserve.router.openapi import json_post
from pdserve.router.router import Router
from pdserve.router.schemas import BatchChatRequest, ChatCompletionRequest, CompletionRequest, parse

Answer = Callable[[Request, Any, float], Awaitable[Response]]
"""From a request, its decoded body, and when it came."""


def add_openai_routes(app: FastAPI, router: Router) -> None:
    async def chat(request: Request, content: Any, received: float) -> Response:
        body = parse(ChatCompletionRequest, content)
        parsed = await router.parser.chat(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    async def batch(request: Request, content: Any, received: float) -> Response:
        body = parse(BatchChatRequest, content)
        router.admit(len(body.messages))
        parsed = await router.parser.batch(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    async def completion(request: Request, content: Any, received: float) -> Response:
        body = parse(CompletionRequest, content)
        parsed = await router.parser.completion(body, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received)

    async def either(request: Request, content: Any, received: float) -> Response:
        if isinstance(content, dict):
            content = {name: value for name, value in content.items() if name != "model"}
            if "messages" in content:
                return await chat(request, content, received)
        return await completion(request, content, received)

    def add(path: str, summary: str, answer: Answer, *kinds: type[BaseModel]) -> None:
        @json_post(app, path, summary, *kinds)
        async def route(request: Request) -> Response:
            received = time.monotonic()
            router.admit(1)
            return await answer(request, await router.read(request), received)

    add("/v1/chat/completions", "Answer a conversation", chat, ChatCompletionRequest)
    add(
        "/v1/chat/completions/batch",
        "Answer several conversations at once",
        batch,
        BatchChatRequest,
    )
    add("/v1/completions", "Continue a text", completion, CompletionRequest)
    add(
        "/invocations",
        "Either of both, by what the body holds (SageMaker)",
        either,
        ChatCompletionRequest,
        CompletionRequest,
    )
