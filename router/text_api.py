"""The routes about text and tokens alone."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from pdserve.router.fields import refuse
from pdserve.router.front import Front
from pdserve.router.http import JsonResponse
from pdserve.router.openai import encode_json
from pdserve.router.openapi import json_post
from pdserve.router.schemas import parse
from pdserve.router.token_schemas import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)


def add_text_routes(app: FastAPI, front: Front) -> None:
    @json_post(
        app,
        "/tokenize",
        "Text or a conversation to token ids",
        TokenizeTextRequest,
        TokenizeChatRequest,
    )
    async def tokenize(request: Request) -> Response:
        content = await front.read(request)
        tokenizer = front.model.tokenizer
        body: TokenizeChatRequest | TokenizeTextRequest
        if isinstance(content, dict) and "messages" in content:
            body = chat = parse(TokenizeChatRequest, content)
            front.model.check_name(body.model)
            refuse(body)
            prompt = await front.parser.prompts.render(chat, dict(chat.chat_template_kwargs or {}))
            ids = prompt.token_ids
        else:
            body = parse(TokenizeTextRequest, content)
            front.model.check_name(body.model)
            ids = await front.parser.prompts.encode(
                body.prompt, body.add_special_tokens is not False
            )
        strings = tokenizer.token_strings(ids) if body.return_token_strs else None
        return JsonResponse(
            encode_json(
                {
                    "count": len(ids),
                    "max_model_len": front.model.max_len,
                    "tokens": ids,
                    "token_strs": strings,
                }
            )
        )

    @json_post(app, "/detokenize", "Token ids to text", DetokenizeRequest)
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeRequest, await front.read(request))
        front.model.check_name(body.model)
        text = front.model.tokenizer.tokens.text(body.tokens, False)
        return JsonResponse(encode_json({"prompt": text}))

    if front.settings.enable_tokenizer_info_endpoint:
        _add_tokenizer_info(app, front)


def _add_tokenizer_info(app: FastAPI, front: Front) -> None:
    @app.get(
        "/tokenizer_info", response_class=JsonResponse, summary="The tokenizer's configuration"
    )
    async def tokenizer_info() -> Response:
        return JsonResponse(encode_json(front.model.tokenizer_info()))
