"""The routes for callers that keep text and tokens apart: tokens in and out, rendering, aborts.

They exist always, and answer 403 unless the router was started with --enable-scale-out.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from pdserve.router.errors import ApiError, BadRequest
from pdserve.router.http import JsonResponse
from pdserve.router.messages import as_chat
from pdserve.router.openai import encode_json
from pdserve.router.openapi import body_of
from pdserve.router.requests import GenerateRequest
from pdserve.router.schemas import (
    AbortRequests,
    ChatCompletionRequest,
    CompletionRequest,
    GenerateTokensRequest,
    MessagesRequest,
    SamplingFields,
    parse,
)
from pdserve.router.tokens_writer import TokensWriter
from pdserve.router.writer import Json

if TYPE_CHECKING:
    from pdserve.router.app import Router

Body = TypeVar("Body", bound=BaseModel)

OPEN = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "max_tokens", "min_tokens", "ignore_eos", "logprobs",
        "prompt_logprobs")  # fmt: skip
"""Parameters that are called the same on both sides."""


def add_scale_out_routes(app: FastAPI, router: Router) -> None:
    def check() -> None:
        if not router.settings.enable_scale_out:
            raise ApiError(
                "Scale-out endpoints are disabled. Restart the router with --enable-scale-out to "
                "enable them.",
                status=403,
                kind="PermissionDeniedError",
            )

    @app.post(
        "/inference/v1/generate",
        openapi_extra=body_of(GenerateTokensRequest),
        response_class=JsonResponse,
        summary="Continue token ids",
    )
    async def generate(request: Request) -> Response:
        received = time.monotonic()
        check()
        router.admit(1)
        body = parse(GenerateTokensRequest, await router.read(request))
        parsed = await router.parser.tokens(body, request.scope["pdserve.request_id"])
        text, ids = body.output_mode == "text", bool(body.return_token_ids)
        write = partial(TokensWriter, text=text, prompt_ids=ids)
        return router.respond(request, parsed, received, write)

    @app.post(
        "/inference/v1/abort_requests",
        openapi_extra=body_of(AbortRequests),
        summary="End requests of this router by the ids of their answers",
    )
    async def abort_requests(request: Request) -> Response:
        check()
        content = await router.read(request)
        if not isinstance(content, dict) or content.get("request_ids") is None:
            raise BadRequest("Missing 'request_ids' in request body", param="request_ids")
        router.abort(parse(AbortRequests, content).request_ids)
        return Response(status_code=200)

    @app.post(
        "/v1/chat/completions/render",
        openapi_extra=body_of(ChatCompletionRequest),
        response_class=JsonResponse,
        summary="A conversation as a request for /inference/v1/generate",
    )
    async def render_chat(request: Request) -> Response:
        check()
        body = parse(ChatCompletionRequest, await router.read(request))
        return await _render(request, body, body.return_token_offsets)

    @app.post(
        "/v1/messages/render",
        openapi_extra=body_of(MessagesRequest),
        response_class=JsonResponse,
        summary="A conversation (Anthropic) as a request for /inference/v1/generate",
    )
    async def render_messages(request: Request) -> Response:
        check()
        body = as_chat(parse(MessagesRequest, await router.read(request)))
        return await _render(request, body, None)

    async def _render(request: Request, body: ChatCompletionRequest, offsets: object) -> Response:
        plain = without_offsets(body)
        parsed = await router.parser.chat(plain, request.scope["pdserve.request_id"])
        special = bool(body.add_special_tokens)
        content = rendered(router, parsed, 0, parsed.response_id, body, offsets, special)
        return JsonResponse(encode_json(content))

    @app.post(
        "/v1/completions/render",
        openapi_extra=body_of(CompletionRequest),
        response_class=JsonResponse,
        summary="Prompts as requests for /inference/v1/generate",
    )
    async def render_completions(request: Request) -> Response:
        check()
        body = parse(CompletionRequest, await router.read(request))
        plain, offsets = without_offsets(body), body.return_token_offsets
        parsed = await router.parser.completion(plain, request.scope["pdserve.request_id"])
        special = body.add_special_tokens is not False
        listed = [
            rendered(router, parsed, place, f"{parsed.response_id}-{place}", body, offsets, special)
            for place in range(len(parsed.prompts))
        ]
        return JsonResponse(encode_json(listed))


def without_offsets(body: Body) -> Body:
    """The request without `return_token_offsets`, which only rendering serves."""
    return body.model_copy(update={"return_token_offsets": None})


def _form(router: Router, body: SamplingFields) -> Json:
    """What holds the answer to a form; calls of tools that are forced are a form, too."""
    if isinstance(body, ChatCompletionRequest):
        wish = router.parser.forms.tools(body).wish
        if wish is not None and wish.param == "tools":
            return {"structured_outputs": {wish.kind: wish.value}}
    return {
        "structured_outputs": body.structured_outputs,
        "response_format": body.response_format,
    }


def rendered(
    router: Router,
    parsed: GenerateRequest,
    place: int,
    request_id: str,
    body: SamplingFields,
    offsets: object,
    special: bool,
) -> Json:
    """One prompt of a parsed request as a body of /inference/v1/generate. `offsets`: where each
    token stands in the text is asked for; `special`: the text was tokenized with special tokens."""
    prompt, sampling = parsed.prompts[place], parsed.answers[place * parsed.n].sampling
    params = {name: getattr(sampling, name) for name in OPEN}
    params |= {
        "n": parsed.n,
        "seed": body.seed,
        "stop": list(parsed.text.stops),
        "stop_token_ids": list(sampling.stop_token_ids),
        "include_stop_str_in_output": parsed.text.include_stop,
        "skip_special_tokens": parsed.text.skip_special_tokens,
        **_form(router, body),
        "logit_bias": {str(key): value for key, value in sampling.logit_bias.items()} or None,
    }
    spans = None
    if offsets and prompt.text is not None:
        core = router.model.tokenizer.core
        spans = core.encode(prompt.text, add_special_tokens=special).offsets
    return {
        "request_id": request_id,
        "token_ids": prompt.token_ids,
        "token_offsets": spans if spans is None or len(spans) == len(prompt.token_ids) else None,
        "features": None,
        "content_parts": None,
        "sampling_params": {key: value for key, value in params.items() if value is not None},
        "model": body.model,
        "reasoning_ended": None,
        "reasoning_parser_kwargs": None,
        "return_token_ids": body.return_token_ids,
        "output_mode": "tokens",
        "stream": parsed.stream,
        "stream_options": body.stream_options and body.stream_options.model_dump(),
        "cache_salt": body.cache_salt,
        "priority": body.priority or 0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }
