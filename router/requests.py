"""Parse, don't validate: from a body to a `GenerateRequest`, which the rest of the router may
trust. After this border nobody asks again whether a field was given or within its limits.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import msgspec

from pdserve.protocol.sampling import SamplingParams
from pdserve.router import chat
from pdserve.router.answer import AnswerSpec
from pdserve.router.answer_form import AnswerForm, AnswerForms
from pdserve.router.chat import ChatTemplate
from pdserve.router.conversation import check_messages, flat_text
from pdserve.router.errors import BadRequest
from pdserve.router.fields import refuse
from pdserve.router.grammar_check import GrammarCheck
from pdserve.router.reading import Reading
from pdserve.router.sampling import (
    Vocabulary,
    answer_count,
    bad,
    derive_seed,
    logprob_count,
    sampling_params,
    stop_strings,
)
from pdserve.router.schemas import (
    MAX_PROMPTS,
    ChatCompletionRequest,
    ChatFields,
    CompletionRequest,
    EngineSampling,
    GenerateTokensRequest,
    SamplingFields,
    parse,
)
from pdserve.router.served import ServedModel
from pdserve.router.tokenizer import INLINE_CHARS

COMPLETION_TOKENS = 16
"""`max_tokens` of /v1/completions without one."""
CHAT, COMPLETION, TOKENS = "chatcmpl", "cmpl", "generate-tokens"
"""Prefixes of the ids of answers."""
MAX_SALT = 128
MAX_ID = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: list[int]
    text: str | None
    """As the client or the template wrote it; None if the client sent token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How tokens become the client's text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    reading: Reading | None = None
    """What to look for in the text; None: it is passed on as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A request that can be served. Answers are numbered prompt × n + k."""

    chat: bool
    response_id: str
    """`id` of the answer: what the client named it, behind the endpoint's prefix."""
    prompts: tuple[Prompt, ...]
    n: int
    answers: tuple[AnswerSpec, ...]
    text: TextOptions
    logprobs: int | None
    """Alternatives per generated token; None: no logprobs at all."""
    prompt_logprobs: int | None
    """Alternatives per prompt token for the `prompt_logprobs` member; None: no such member."""
    tokens_as_ids: bool
    """Token strings in logprobs are written as token_id:N."""
    echo: str | None
    """Chat: text put before the answer. Completions: not None puts the prompt before it."""
    score_only: bool
    """Completions: max_tokens 0, nothing is generated for the client."""
    stream: bool
    include_usage: bool
    continuous_usage: bool
    stream_interval: int
    return_token_ids: bool
    return_prompt_text: bool


class RequestParser:
    """Checks requests against one model."""

    def __init__(
        self,
        model: ServedModel,
        *,
        max_logprobs: int,
        trust_templates: bool,
        executor: Executor,
        rng: random.Random,
        grammars: GrammarCheck,
        hide_unused_tools: bool,
    ) -> None:
        """`executor` renders and tokenizes long prompts; `rng` draws seeds. `hide_unused_tools`:
        with tool_choice none the chat template does not hear of tools."""
        self._hide_unused_tools = hide_unused_tools
        self.forms = AnswerForms(model, grammars)
        self.model = model
        self._max_logprobs = max_logprobs
        self._trust_templates = trust_templates
        self._executor = executor
        self._rng = rng
        self._vocabulary = Vocabulary(size=model.vocab_size, eos_token_ids=model.eos_token_ids)

    # the two routes

    async def completion(self, body: CompletionRequest, header_id: str) -> GenerateRequest:
        """Raises ApiError."""
        self.model.check_name(body.model)
        refuse(body)
        echo = bool(body.echo)
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        score_only = asked == 0 and echo
        self._check_max_tokens("max_tokens", asked, score_only)
        logprobs = self._logprobs("logprobs", body.logprobs)
        prompts = await self._completion_prompts(body, asked)
        return self._assemble(
            body,
            header_id,
            prompts,
            max(asked, 1),
            logprobs,
            prefix=COMPLETION,
            form=await self.forms.plain(body),
            echo="" if echo else None,
            score_only=score_only,
        )

    async def chat(self, body: ChatCompletionRequest, header_id: str) -> GenerateRequest:
        """Raises ApiError."""
        self.model.check_name(body.model)
        refuse(body)
        use = self.forms.check(body)
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(body, name)
        if asked is not None:
            self._check_max_tokens(name, asked, False)
        logprobs = self._chat_logprobs(body)
        kwargs = _with_reasoning(body)
        prompt = await self.render(body, kwargs, _truncation(body, self.model.max_len, asked))
        self._check_length(prompt.token_ids)
        form = await self.forms.chat(body, use, kwargs, prompt.text or "")
        tokens = self._room(prompt.token_ids) if asked is None else asked
        last = body.messages[-1]
        role = last["role"] if body.continue_final_message else "assistant"
        echo = flat_text(last.get("content")) if body.echo and last["role"] == role else None
        return self._assemble(
            body,
            header_id,
            (prompt,),
            tokens,
            logprobs,
            prefix=CHAT,
            form=form,
            echo=echo or None,
            return_prompt_text=bool(body.return_prompt_text),
        )

    async def tokens(self, body: GenerateTokensRequest, header_id: str) -> GenerateRequest:
        """Raises ApiError."""
        self.model.check_name(body.model)
        refuse(body)
        outer = ("stream", "cache_salt", "request_id", "priority")
        asked_for = {**body.sampling_params, **{name: getattr(body, name) for name in outer}}
        asked_for["stream_options"] = body.stream_options if body.stream else None
        fields = parse(EngineSampling, asked_for)
        refuse(fields)
        if fields.detokenize is False and (body.output_mode == "text" or stop_strings(fields)):
            raise BadRequest(
                "detokenize must not be false with output_mode text or stop strings.",
                param="detokenize",
            )
        asked = fields.max_tokens
        if asked is not None:
            self._check_max_tokens("max_tokens", asked, False)
        self._check_ids(body.token_ids, "token_ids")
        truncation = _truncation(fields, self.model.max_len, asked)
        ids = truncation.cut(body.token_ids) if truncation else body.token_ids
        self._check_length(ids)
        return self._assemble(
            fields,
            header_id,
            (Prompt(token_ids=ids, text=None),),
            self._room(ids) if asked is None else asked,
            self._logprobs("logprobs", fields.logprobs),
            prefix=TOKENS,
            form=await self.forms.plain(fields),
        )

    def _room(self, token_ids: Sequence[int]) -> int:
        """Tokens of an answer whose client set no limit."""
        room, cap = self.model.max_len - len(token_ids), self.model.defaults.max_new_tokens
        return min(room, cap) if cap else room

    async def chat_prompt(self, body: ChatCompletionRequest) -> Prompt:
        """The prompt of a conversation that is not to be answered. Raises ApiError."""
        self.model.check_name(body.model)
        refuse(body)
        return await self.render(body, _with_reasoning(body))

    def _assemble(
        self,
        body: SamplingFields,
        header_id: str,
        prompts: tuple[Prompt, ...],
        asked: int,
        logprobs: int | None,
        *,
        prefix: str,
        form: AnswerForm,
        echo: str | None = None,
        score_only: bool = False,
        return_prompt_text: bool = False,
    ) -> GenerateRequest:
        n, chat = answer_count(body), prefix == CHAT
        prompt_logprobs = self._prompt_logprobs(body)
        wanted = prompt_logprobs
        if echo is not None and not chat and logprobs is not None:
            wanted = max(logprobs, prompt_logprobs or 0)
            if score_only and prompt_logprobs is None:
                prompt_logprobs = logprobs
        if wanted is not None:
            _bound_prompt_logprobs(wanted, prompts)
        seed = self._rng.getrandbits(64)
        params = [
            sampling_params(
                body,
                self.model.defaults,
                self._vocabulary,
                seed=seed,
                max_tokens=min(asked, self.model.max_len - len(prompt.token_ids)),
                asked_tokens=asked,
                logprobs=logprobs,
                prompt_logprobs=wanted,
                constraint=form.constraint,
            )
            for prompt in prompts
        ]
        include_usage, continuous = _stream_options(body)
        return GenerateRequest(
            chat=chat,
            response_id=f"{prefix}-{_request_id(header_id, body.request_id)}",
            prompts=prompts,
            n=n,
            answers=tuple(_specs(prompts, params, n, _salt(body.cache_salt), body.priority or 0)),
            text=TextOptions(
                stops=stop_strings(body),
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                reading=form.reading,
            ),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            echo=echo,
            score_only=score_only,
            stream=bool(body.stream),
            include_usage=include_usage,
            continuous_usage=continuous,
            stream_interval=_interval(body.stream_interval),
            return_token_ids=bool(body.return_token_ids),
            return_prompt_text=return_prompt_text,
        )

    # prompts

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

    async def _completion_prompts(self, body: CompletionRequest, asked: int) -> tuple[Prompt, ...]:
        prompts = _split_prompts(body.prompt)
        truncation = _truncation(body, self.model.max_len, asked)
        special = body.add_special_tokens is not False
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = await self.encode(prompt, special, truncation)
            else:
                self._check_ids(prompt, "prompt")
                ids = truncation.cut(prompt) if truncation else list(prompt)
            if not ids:
                raise BadRequest("The decoder prompt cannot be empty.", param="prompt")
            self._check_length(ids)
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

    def _check_ids(self, token_ids: Sequence[int], name: str) -> None:
        largest = max(token_ids, default=0)
        if largest >= self.model.vocab_size:
            raise BadRequest(f"Token id {largest} is out of vocabulary.", param=name)

    # limits

    def _check_length(self, token_ids: Sequence[int]) -> None:
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

    def _check_max_tokens(self, name: str, value: int, zero: bool) -> None:
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

    def _logprobs(self, name: str, value: int | None) -> int | None:
        if value is None:
            return None
        return logprob_count(name, value, self._max_logprobs, self.model.vocab_size)

    def _chat_logprobs(self, body: ChatCompletionRequest) -> int | None:
        if body.logprobs:
            return self._logprobs("top_logprobs", body.top_logprobs or 0)
        if body.top_logprobs:
            raise BadRequest(
                "top_logprobs needs logprobs to be true "
                f"(parameter=top_logprobs, value={body.top_logprobs}).",
                param="top_logprobs",
            )
        return None

    def _prompt_logprobs(self, body: SamplingFields) -> int | None:
        value = body.prompt_logprobs
        if value is not None and value != 0 and body.stream:
            raise BadRequest(
                "prompt_logprobs cannot be used with stream "
                f"(parameter=prompt_logprobs, value={value}).",
                param="prompt_logprobs",
            )
        return self._logprobs("prompt_logprobs", value)


MAX_PROMPT_LOGPROBS = 500_000
"""Most entries of one answer's prompt log-probabilities: some 10 MB on the way to the router."""


def _bound_prompt_logprobs(top: int, prompts: Sequence[Prompt]) -> None:
    entries = max(len(prompt.token_ids) for prompt in prompts) * (top + 1)
    if entries > MAX_PROMPT_LOGPROBS:
        raise BadRequest(
            f"prompt_logprobs asks for {entries} entries; prompt tokens × (prompt_logprobs + 1) "
            f"must be at most {MAX_PROMPT_LOGPROBS} (parameter=prompt_logprobs, value={top}).",
            param="prompt_logprobs",
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


def _truncation(body: SamplingFields, max_len: int, asked: int | None) -> Truncation | None:
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


def _specs(
    prompts: Sequence[Prompt], params: Sequence[SamplingParams], n: int, salt: str, priority: int
) -> list[AnswerSpec]:
    return [
        AnswerSpec(
            prompt_token_ids=prompt.token_ids,
            sampling=sampling
            if k == 0
            else msgspec.structs.replace(sampling, seed=derive_seed(sampling.seed, k)),
            cache_salt=salt,
            priority=priority,
        )
        for prompt, sampling in zip(prompts, params, strict=True)
        for k in range(n)
    ]


def _stream_options(body: SamplingFields) -> tuple[bool, bool]:
    options = body.stream_options
    if options is None:
        return False, False
    if not body.stream:
        raise BadRequest(
            "Stream options can only be defined when `stream=True`.", param="stream_options"
        )
    include = bool(options.include_usage)
    return include, include and bool(options.continuous_usage_stats)


def _interval(value: int | None) -> int:
    if value is not None and value < 1:
        raise bad("stream_interval", "must be at least 1", value)
    return value or 1


def _salt(value: str | None) -> str:
    if value is None:
        return ""
    if not value or len(value) > MAX_SALT or any(mark in value for mark in "@/\\\0"):
        raise BadRequest(
            f"cache_salt must have 1 to {MAX_SALT} characters, none of them @, /, \\ or NUL.",
            param="cache_salt",
        )
    return value


def _request_id(header_id: str, body_id: str | None) -> str:
    """The header's, the body's, or 16 random hex digits."""
    if header_id or not body_id:
        return header_id or secrets.token_hex(8)
    if len(body_id) > MAX_ID:
        raise BadRequest(
            f"request_id must have at most {MAX_ID} characters, got {len(body_id)}.",
            param="request_id",
        )
    return body_id


def _with_reasoning(body: ChatCompletionRequest) -> dict[str, Any]:
    """chat_template_kwargs, with what reasoning_effort implies unless the client said otherwise."""
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
        kwargs.setdefault("enable_thinking", body.reasoning_effort != "none")
    return kwargs
