"""The routes for callers that keep text and tokens apart: tokens in and out, and aborts.

They exist always, and answer 403 unless the router was started with --enable-scale-out.
"""

from __future__ import annotations

import time
from functools import partial

from fastapi import FastAPI, Request
from starlette.responses import Response

from pdserve.cluster.membership import RedisUnavailable
from pdserve.router.errors import BadRequest, Unavailable
from pdserve.router.openapi import body_of, json_post
from pdserve.router.render_api import check_scale_out
from pdserve.router.router import Router
from pdserve.router.schemas import parse
from pdserve.router.token_schemas import AbortRequests, GenerateTokensRequest
from pdserve.router.tokens_writer import TokensWriter


def add_scale_out_routes(app: FastAPI, router: Router) -> None:
    check = partial(check_scale_out, router.settings)

    @json_post(app, "/inference/v1/generate", "Continue token ids", GenerateTokensRequest)
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
        summary="End requests, whichever router carries them, by the ids of their answers",
    )
    async def abort_requests(request: Request) -> Response:
        check()
        content = await router.read(request)
        if not isinstance(content, dict) or content.get("request_ids") is None:
            raise BadRequest("Missing 'request_ids' in request body", param="request_ids")
        try:
            await router.ledger.abort(parse(AbortRequests, content).request_ids)
        except RedisUnavailable as error:
            raise Unavailable(
                f"Requests that this router carries were ended; others could not be told: {error}"
            ) from None
        return Response(status_code=200)
