"""What every process that serves the HTTP APIs has, with workers or without: the model, and the way
from bodies to requests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.grammar_check import GrammarCheck
from pdserve.router.http import read_json
from pdserve.router.metrics import RouterMetrics
from pdserve.router.openai import Json
from pdserve.router.prompts import Prompts
from pdserve.router.requests import Habits, RequestParser
from pdserve.router.served import ServedModel

T = TypeVar("T")

INLINE_TOKENS = 1000
"""About a millisecond of detokenizing."""
TEXT_THREADS = 1
"""Threads that tokenize and render long prompts."""


class Front:
    """Owns the threads for long texts and the process that checks grammars."""

    def __init__(self, settings: RouterSettings, model: ServedModel) -> None:
        self.settings = settings
        self.model = model
        self.metrics = RouterMetrics(model.name, model.own_max_len)
        self._executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._grammars = GrammarCheck(model.folder / "tokenizer.json", model.vocab_size)
        self.parser = RequestParser(
            model,
            prompts=Prompts(
                model,
                trust_templates=settings.trust_request_chat_template,
                hide_unused_tools=settings.exclude_tools_when_tool_choice_none,
                executor=self._executor,
            ),
            habits=Habits(
                max_logprobs=settings.max_logprobs,
                role=settings.response_role,
                tokens_as_ids=settings.return_tokens_as_token_ids,
                force_usage=settings.enable_force_include_usage,
                metrics=settings.enable_per_request_metrics,
                stream_interval=settings.stream_interval,
                keep_alive_s=settings.sse_keep_alive_interval,
            ),
            rng=random.Random(settings.seed),
            grammars=self._grammars,
        )

    async def close(self) -> None:
        await asyncio.to_thread(self._grammars.close)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns: done at once if it is small, else in the thread for long texts, so
        that others are served meanwhile. `size`: in tokens."""
        if size <= INLINE_TOKENS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def read(self, request: Request) -> Any:
        """The decoded body. Raises ApiError."""
        return await read_json(request, self.settings.max_body)

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
