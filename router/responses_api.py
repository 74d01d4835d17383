"""The routes of OpenAI's Responses API."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from pdserve.cluster.responses import StoredResponse
from pdserve.router.errors import BadRequest
from pdserve.router.front import Front
from pdserve.router.http import JsonResponse
from pdserve.router.openai import encode_json
from pdserve.router.openapi import json_post
from pdserve.router.response_items import complete, items_of
from pdserve.router.responses import as_chat, in_own_words
from pdserve.router.responses_desk import ResponsesDesk
from pdserve.router.responses_writer import Reply, ResponsesWriter
from pdserve.router.router import Router
from pdserve.router.schemas import (
    InputTokensRequest,
    ResponsesFields,
    ResponsesRequest,
    parse,
)
from pdserve.router.writer import Json

PATH = "/v1/responses"


async def _history(desk: ResponsesDesk, body: ResponsesFields) -> list[Json]:
    """Items of the conversation before this request. Raises ApiError."""
    if body.previous_response_id is None:
        return body.previous_input_messages or []
    if body.previous_input_messages is not None:
        raise BadRequest(
            "previous_response_id and previous_input_messages cannot be used together.",
            param="previous_input_messages",
        )
    found = await desk.find(body.previous_response_id, "previous_response_id")
    if found.open:
        raise BadRequest(
            f"The response {body.previous_response_id!r} is still {found.body['status']}; wait for "
            "its end.",
            param="previous_response_id",
        )
    return [*found.history, *found.input, *found.body["output"]]


async def _check_store(desk: ResponsesDesk, body: ResponsesRequest) -> None:
    """What the request asks of the store can be had. Raises ApiError."""
    if body.background and body.store is False:
        raise BadRequest(
            "background can only be used when `store` is true (parameter=background).",
            param="background",
        )
    if body.background and not desk.stores:
        raise BadRequest(
            "background needs stored responses, and this router stores none; start it with "
            "--responses-ttl (for vLLM: VLLM_ENABLE_RESPONSES_API_STORE=1).",
            param="background",
        )
    if body.store and not body.background:
        await desk.check()
    if body.request_id and body.store is not False:
        await desk.free(body.request_id)


def add_responses_routes(app: FastAPI, router: Router) -> None:
    _add_create_route(app, router, router.responses)
    _add_stored_routes(app, router.responses)


def _add_create_route(app: FastAPI, router: Router, desk: ResponsesDesk) -> None:
    @json_post(app, PATH, "Answer a conversation (OpenAI's Responses)", ResponsesRequest)
    async def create(request: Request) -> Response:
        received = time.monotonic()
        router.admit(1)
        body = parse(ResponsesRequest, await router.read(request))
        router.model.check_name(body.model)
        await _check_store(desk, body)
        history, given = await _history(desk, body), items_of(body.input)
        with in_own_words():
            chat = as_chat(body, [*history, *given], len(history), router.model.speech.may_call)
            parsed = await router.parser.chat(chat, "")
        parsed = replace(parsed, response_id=body.request_id or f"resp_{secrets.token_hex(16)}")
        reply = Reply.of(body, parsed, router.model.name, int(time.time()))
        answer = router.respond(request, parsed, received, partial(ResponsesWriter, reply=reply))
        if body.background:
            queued = StoredResponse(
                body=reply.response("queued"),
                history=complete(history),
                input=complete(given),
                background=True,
                stream=parsed.stream,
            )
            await desk.begin(reply, queued, answer, request.scope)
            if parsed.stream:
                return desk.follow(reply.id, -1)
            return JsonResponse(encode_json(queued.body))
        if body.store is False or not desk.stores:
            return answer
        return desk.kept(answer, reply, complete(history), complete(given))


def add_item_counting(app: FastAPI, front: Front, desk: ResponsesDesk) -> None:
    @json_post(
        app,
        f"{PATH}/input_tokens",
        "Length of a conversation in tokens (OpenAI's Responses)",
        InputTokensRequest,
    )
    async def input_tokens(request: Request) -> Response:
        body = parse(InputTokensRequest, await front.read(request))
        front.model.check_name(body.model)
        history, given = await _history(desk, body), items_of(body.input)
        with in_own_words():
            chat = as_chat(body, [*history, *given], len(history), front.model.speech.may_call)
            count = len((await front.parser.chat_prompt(chat)).token_ids)
        found = {"object": "response.input_tokens", "input_tokens": count}
        return JsonResponse(encode_json(found))


def _add_stored_routes(app: FastAPI, desk: ResponsesDesk) -> None:
    one = PATH + "/{response_id}"

    @app.get(one, response_class=JsonResponse, summary="A stored response, or its events")
    async def retrieve(
        response_id: str,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=-1, le=2**31)] = -1,
    ) -> Response:
        found = await desk.find(response_id)
        if not stream:
            return JsonResponse(encode_json(found.body))
        if not found.stream:
            raise BadRequest(
                "Only responses that were created with background and stream can be streamed "
                "(parameter=stream).",
                param="stream",
            )
        return desk.follow(response_id, starting_after)

    @app.delete(one, response_class=JsonResponse, summary="Forget a response")
    async def delete(response_id: str) -> Response:
        await desk.delete(response_id)
        gone = {"id": response_id, "object": "response", "deleted": True}
        return JsonResponse(encode_json(gone))

    @app.post(f"{one}/cancel", response_class=JsonResponse, summary="End a background response")
    async def cancel(response_id: str) -> Response:
        return JsonResponse(encode_json((await desk.cancel(response_id)).body))

    @app.get(f"{one}/input_items", response_class=JsonResponse, summary="Input of a response")
    async def input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        items = (await desk.find(response_id)).input
        if order == "desc":
            items = items[::-1]
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise BadRequest(f"after={after!r:.100} is no item of the response.", param="after")
            items = items[places[0] + 1 :]
        page = items[:limit]
        return JsonResponse(
            encode_json(
                {
                    "object": "list",
                    "data": page,
                    "first_id": page[0]["id"] if page else None,
                    "last_id": page[-1]["id"] if page else None,
                    "has_more": len(items) > limit,
                }
            )
        )
