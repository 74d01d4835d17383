"""The routes of Anthropic's Messages API."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from starlette.responses import Response

from pdserve.router.front import Front
from pdserve.router.http import JsonResponse
from pdserve.router.messages import as_chat
from pdserve.router.messages_writer import MessagesWriter
from pdserve.router.openai import encode_json
from pdserve.router.openapi import json_post
from pdserve.router.router import Router
from pdserve.router.schemas import CountTokensRequest, MessagesRequest, parse


def add_messages_routes(app: FastAPI, router: Router) -> None:
    @json_post(app, "/v1/messages", "Answer a conversation (Anthropic)", MessagesRequest)
    async def messages(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        body = parse(MessagesRequest, await router.read(request))
        chat = as_chat(body, router.model.least_effort)
        parsed = await router.parser.chat(chat, request.scope["pdserve.request_id"])
        return router.respond(request, parsed, received, MessagesWriter)


def add_message_counting(app: FastAPI, front: Front) -> None:
    @json_post(
        app,
        "/v1/messages/count_tokens",
        "Length of a conversation in tokens (Anthropic)",
        CountTokensRequest,
    )
    async def count_tokens(request: Request) -> Response:
        body = parse(CountTokensRequest, await front.read(request))
        chat = as_chat(body, front.model.least_effort)
        count = len((await front.parser.chat_prompt(chat)).token_ids)
        members = {"context_management": {"original_input_tokens": count}}
        return JsonResponse(encode_json({"input_tokens": count, **members}))
