"""Prompts: conversations, texts or token ids as tokens that a model reads, within its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from pdserve.router import chat
from pdserve.router.chat import ChatTemplate
from pdserve.router.conversation import check_messages, flat_text
from pdserve.router.errors import BadRequest
from pdserve.router.schemas import (
    MAX_PROMPTS,
    ChatCompletionRequest,
    ChatFields,
    CompletionRequest,
    SamplingFields,
)
from pdserve.router.served import ServedModel
from pdserve.router.tokenizer import INLINE_CHARS


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: list[int]
    text: str | None
    """As the client or the template wrote it; None if the client sent token ids."""
    echo: str | None = None
    """What is put before each answer to it, if anything is."""


class Prompts:
    """Makes them, for one model."""

    def __init__(
        self,
        model: ServedModel,
        *,
        trust_templates: bool,
        hide_unused_tools: bool,
        executor: Executor,
    ) -> None:
        """`trust_templates`: requests may bring their own. `hide_unused_tools`: with tool_choice
        none the chat template does not hear of tools. `executor` renders and tokenizes long
        prompts."""
        self.model = model
        self._trust_templates = trust_templates
        self._hide_unused_tools = hide_unused_tools
        self._executor = executor

    async def render(
        self, body: ChatFields, kwargs: dict[str, Any], truncation: Truncation | None = None
    ) -> Prompt:
        """A conversation as text and tokens. Raises BadRequest."""
        messages = check_messages(body.messages)
        generation_prompt = body.add_generation_prompt is not False
        if body.continue_final_message and generation_prompt:
            raise BadRequest(
                "continue_final_message needs add_generation_prompt to be false: the last message "
                "cannot be continued and followed by a new one.",
                param="continue_final_message",
            )
        template = self._template(body, kwargs)

        def write() -> str:
            return template.render(
                messages,
                {**self.model.tokenizer.special_tokens, **self.model.template_kwargs, **kwargs},
                tools=self._shown_tools(body),
                documents=body.documents,
                add_generation_prompt=generation_prompt,
                continue_final_message=bool(body.continue_final_message),
            )

        size = sum(len(text) for text in map(flat_text, (m.get("content") for m in messages)))
        if size > INLINE_CHARS or template is not self.model.template:
            loop = asyncio.get_running_loop()
            text = await loop.run_in_executor(self._executor, write)
        else:
            text = write()
        token_ids = await self.encode(text, bool(body.add_special_tokens), truncation)
        if not token_ids:
            raise BadRequest("The chat template wrote an empty prompt.", param="messages")
        return Prompt(token_ids=token_ids, text=text)

    def _shown_tools(self, body: ChatFields) -> list[Any] | None:
        """Tools that the template hears of."""
        unused = isinstance(body, ChatCompletionRequest) and body.tool_choice == "none"
        return None if unused and self._hide_unused_tools else body.tools

    def _template(self, body: ChatFields, kwargs: dict[str, Any]) -> ChatTemplate:
        name, own = "chat_template", body.chat_template
        if own is None:
            name, own = "chat_template_kwargs", kwargs.get("chat_template")
        if own is None:
            if self.model.template is None:
                raise BadRequest(
                    "The model has no chat template; start the router with --chat-template, or "
                    "use /v1/completions.",
                    param="messages",
                )
            return self.model.template
        if not self._trust_templates:
            raise BadRequest(
                f"A chat template in {name} is accepted only if the router was started with "
                "--trust-request-chat-template.",
                param=name,
            )
        if not isinstance(own, str):
            raise BadRequest(f"The chat template in {name} must be a string.", param=name)
        return chat.compiled(own, "auto")

    async def of_completion(self, body: CompletionRequest, asked: int) -> tuple[Prompt, ...]:
        prompts = _split_prompts(body.prompt)
        truncation = truncation_of(body, self.model.max_len, asked)
        special = body.add_special_tokens is not False
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = await self.encode(prompt, special, truncation)
            else:
                self.check_ids(prompt, "prompt")
                ids = truncation.cut(prompt) if truncation else list(prompt)
            if not ids:
                raise BadRequest("The decoder prompt cannot be empty.", param="prompt")
            self.check_length(ids)
            text = prompt if isinstance(prompt, str) and truncation is None else None
            found.append(Prompt(token_ids=ids, text=text))
        return tuple(found)

    async def encode(
        self, text: str, special: bool, truncation: Truncation | None = None
    ) -> list[int]:
        """Token ids of a text. Raises BadRequest if it is hopelessly long."""
        tokenizer, max_len = self.model.tokenizer, self.model.max_len
        if truncation is None and len(text) > max_len * tokenizer.longest_token:
            bound = max_len * tokenizer.longest_token
            raise BadRequest(
                f"This model's maximum context length is {max_len} tokens. However, your prompt "
                f"contains {len(text)} characters (more than {bound} characters, which is the "
                f"upper bound for {max_len} input tokens). Please reduce the length of the input "
                "prompt.",
                param="input_text",
            )
        ids = await tokenizer.encode_soon(text, special, self._executor)
        return truncation.cut(ids) if truncation else ids

    def check_ids(self, token_ids: Sequence[int], name: str) -> None:
        largest = max(token_ids, default=0)
        if largest >= self.model.vocab_size:
            raise BadRequest(f"Token id {largest} is out of vocabulary.", param=name)

    def room(self, token_ids: Sequence[int]) -> int:
        """Tokens of an answer whose client set no limit."""
        room, cap = self.model.max_len - len(token_ids), self.model.defaults.max_new_tokens
        return min(room, cap) if cap else room

    # limits

    def check_length(self, token_ids: Sequence[int]) -> None:
        max_len, length = self.model.max_len, len(token_ids)
        if length > max_len:
            raise BadRequest(
                f"This model's maximum context length is {max_len} tokens. However, your prompt "
                f"contains {length} input tokens, which exceeds this limit even without any "
                "output tokens. Please reduce the length of the input prompt.",
                param="input_tokens",
            )
        if length == max_len:
            raise BadRequest(
                "max_tokens must be at least 1, got 0: the prompt fills this model's maximum "
                f"context length of {max_len} tokens.",
                param="max_tokens",
            )

    def check_max_tokens(self, name: str, value: int, zero: bool) -> None:
        if value < (0 if zero else 1):
            raise BadRequest(
                f"{name} must be at least 1, got {value} (parameter={name}, value={value}).",
                param=name,
            )
        if value > self.model.max_len:
            raise BadRequest(
                f"{name}={value} cannot be greater than max_model_len={self.model.max_len}. "
                f"Please request fewer output tokens. (parameter={name}, value={value})",
                param=name,
            )


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep `count` tokens of a prompt."""

    count: int
    left: bool
    """Drop from the left: keep the last ones."""

    def cut(self, token_ids: Sequence[int]) -> list[int]:
        if len(token_ids) <= self.count:
            return list(token_ids)
        return list(token_ids[-self.count :] if self.left else token_ids[: self.count])


def truncation_of(body: SamplingFields, max_len: int, asked: int | None) -> Truncation | None:
    """-1 leaves room for what was asked for (at least one token)."""
    count = body.truncate_prompt_tokens
    if count is None:
        return None
    if count < -1 or count == 0:
        raise BadRequest(
            f"truncate_prompt_tokens must be -1 or at least 1, got {count}.",
            param="truncate_prompt_tokens",
        )
    largest = max_len - 1
    if count > largest:
        raise BadRequest(
            f"truncate_prompt_tokens must be at most {largest}, got {count}. Please request a "
            "smaller truncation size.",
            param="truncate_prompt_tokens",
        )
    if count == -1:
        count = max(1, max_len - min(asked or 1, largest))
    return Truncation(count, body.truncation_side != "right")


def _split_prompts(prompt: Any) -> list[str | list[int]]:
    """One entry per prompt."""
    if prompt is None or prompt == "":
        raise BadRequest(
            "Either prompt or prompt_embeds must be provided and non-empty.", param="prompt"
        )
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("You must pass at least one prompt.", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise BadRequest(
            f"prompt must be a list of at most {MAX_PROMPTS} prompts, got {len(prompt)}.",
            param="prompt",
        )
    return list(prompt)
