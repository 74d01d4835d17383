"""Parse, don't validate: from a body to a `GenerateRequest`, which the rest of the router may
trust. After this border nobody asks again whether a field was given or within its limits.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from pdserve.protocol.sampling import SamplingParams
from pdserve.router.answer import AnswerSpec
from pdserve.router.answer_form import AnswerForm, AnswerForms
from pdserve.router.conversation import flat_text
from pdserve.router.errors import ApiError, BadRequest
from pdserve.router.fields import refuse
from pdserve.router.grammar_check import GrammarCheck
from pdserve.router.prompts import Prompt, Prompts, truncation_of
from pdserve.router.reading import Reading
from pdserve.router.repetition import Repetition, repetition_of
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
    BatchChatRequest,
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
    parse,
)
from pdserve.router.served import ServedModel
from pdserve.router.token_rules import chosen_tokens, with_token_rules
from pdserve.router.token_schemas import EngineSampling, GenerateTokensRequest

COMPLETION_TOKENS = 16
"""`max_tokens` of /v1/completions without one."""
CHAT, COMPLETION, TOKENS = "chatcmpl", "cmpl", "generate-tokens"
"""Prefixes of the ids of answers."""
MAX_SALT = 128
MAX_ID = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How tokens become the client's text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    repetition: Repetition | None = None
    """What ends an answer that runs in circles."""
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
    texts: tuple[TextOptions, ...]
    """One per prompt."""
    logprobs: int | None
    """Alternatives per generated token; None: no logprobs at all."""
    prompt_logprobs: int | None
    """Alternatives per prompt token for the `prompt_logprobs` member; None: no such member."""
    tokens_as_ids: bool
    """Token strings in logprobs are written as token_id:N."""
    score_only: bool
    """Completions: max_tokens 0, nothing is generated for the client."""
    stream: bool
    include_usage: bool
    continuous_usage: bool
    stream_interval: int
    return_token_ids: bool
    return_prompt_text: bool
    role: str = "assistant"
    """Chat: that of the answers."""
    metrics: bool = False
    """The answer has a member `metrics`."""
    keep_alive_s: float = 0.0
    """See Habits."""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def text(self, index: int) -> TextOptions:
        """Those of an answer."""
        return self.texts[index // self.n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a router does unless a request says otherwise."""

    max_logprobs: int
    """Most alternatives per token that a request may ask for; -1: the whole vocabulary."""
    role: str = "assistant"
    """Of answers of chat."""
    tokens_as_ids: bool = False
    """Token strings in logprobs are written as token_id:N."""
    force_usage: bool = False
    """Every chunk of every stream has its usage."""
    metrics: bool = False
    """Answers have a member `metrics`."""
    stream_interval: int = 1
    """Tokens of a chunk."""
    keep_alive_s: float = 0.0
    """Silence of a stream that is broken by a comment; 0: none is."""


class RequestParser:
    """Checks requests against one model."""

    def __init__(
        self,
        model: ServedModel,
        *,
        prompts: Prompts,
        habits: Habits,
        rng: random.Random,
        grammars: GrammarCheck,
    ) -> None:
        """`rng` draws seeds."""
        self.prompts = prompts
        self.forms = AnswerForms(model, grammars)
        self.model = model
        self._habits = habits
        self._rng = rng
        self._vocabulary = Vocabulary(size=model.vocab_size, eos_token_ids=model.eos_token_ids)

    async def completion(self, body: CompletionRequest, header_id: str) -> GenerateRequest:
        """Raises ApiError."""
        self.model.check_name(body.model)
        refuse(body)
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        score_only = asked == 0 and bool(body.echo)
        self.prompts.check_max_tokens("max_tokens", asked, score_only)
        logprobs = self._logprobs("logprobs", body.logprobs)
        prompts = await self.prompts.of_completion(body, asked)
        if body.echo:
            prompts = tuple(replace(prompt, echo=self._text_of(prompt)) for prompt in prompts)
        return self._assemble(
            body,
            header_id,
            prompts,
            max(asked, 1),
            logprobs,
            prefix=COMPLETION,
            form=await self.forms.plain(body),
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
            self.prompts.check_max_tokens(name, asked, False)
        logprobs = self._chat_logprobs(body)
        kwargs = _with_reasoning(body)
        truncation = truncation_of(body, self.model.max_len, asked)
        prompt = await self.prompts.render(body, kwargs, truncation)
        self.prompts.check_length(prompt.token_ids)
        form = await self.forms.chat(body, use, kwargs, prompt.text or "")
        tokens = self.prompts.room(prompt.token_ids) if asked is None else asked
        last = body.messages[-1]
        answers_anew = body.add_generation_prompt is not False
        role = self._habits.role if answers_anew else str(last["role"])
        if body.echo and last["role"] == role:
            prompt = replace(prompt, echo=flat_text(last.get("content")) or None)
        return self._assemble(
            body,
            header_id,
            (prompt,),
            tokens,
            logprobs,
            prefix=CHAT,
            form=form,
            role=role,
            return_prompt_text=bool(body.return_prompt_text),
        )

    async def batch(self, body: BatchChatRequest, header_id: str) -> GenerateRequest:
        """Conversations as one request whose answers are theirs, in order. Raises ApiError."""
        for name in ("stream", "stream_options", "tools", "tool_choice"):
            if getattr(body, name) not in (None, False, "none"):
                raise BadRequest(
                    f"{name} cannot be used for a batch of conversations; ask for each of them at "
                    f"/v1/chat/completions (parameter={name}).",
                    param=name,
                )
        if body.n not in (None, 1):
            raise bad("n", "must be 1 for a batch of conversations", body.n)
        common = body.model_dump(exclude_unset=True)
        parsed = []
        for place, messages in enumerate(body.messages):
            chat = parse(ChatCompletionRequest, {**common, "messages": messages})
            try:
                parsed.append(await self.chat(chat, header_id))
            except ApiError as error:
                error.message = f"Conversation {place}: {error.message}"
                raise
        return replace(
            parsed[0],
            prompts=tuple(prompt for one in parsed for prompt in one.prompts),
            answers=tuple(spec for one in parsed for spec in one.answers),
            texts=tuple(text for one in parsed for text in one.texts),
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
            self.prompts.check_max_tokens("max_tokens", asked, False)
        self.prompts.check_ids(body.token_ids, "token_ids")
        truncation = truncation_of(fields, self.model.max_len, asked)
        ids = truncation.cut(body.token_ids) if truncation else body.token_ids
        self.prompts.check_length(ids)
        return self._assemble(
            fields,
            header_id,
            (Prompt(token_ids=ids, text=None),),
            self.prompts.room(ids) if asked is None else asked,
            self._logprobs("logprobs", fields.logprobs),
            prefix=TOKENS,
            form=await self.forms.tokens(fields, body.reasoning_ended),
        )

    def _text_of(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self.model.tokenizer.tokens.text(prompt.token_ids, False)

    async def chat_prompt(self, body: ChatCompletionRequest) -> Prompt:
        """The prompt of a conversation that is not to be answered. Raises ApiError."""
        self.model.check_name(body.model)
        refuse(body)
        return await self.prompts.render(body, _with_reasoning(body))

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
        score_only: bool = False,
        return_prompt_text: bool = False,
        role: str = "assistant",
    ) -> GenerateRequest:
        n, chat = answer_count(body), prefix == CHAT
        prompt_logprobs = self._prompt_logprobs(body)
        wanted = prompt_logprobs
        echoes = any(prompt.echo is not None for prompt in prompts)
        if echoes and not chat and logprobs is not None:
            wanted = max(logprobs, prompt_logprobs or 0)
            if score_only and prompt_logprobs is None:
                prompt_logprobs = logprobs
        if wanted is not None:
            _bound_prompt_logprobs(wanted, prompts)
        chosen = chosen_tokens(body, logprobs, self._vocabulary)
        if chosen:
            logprobs = len(chosen)
        tokenizer = self.model.tokenizer
        constraint = with_token_rules(form.constraint, body, self._vocabulary, tokenizer)
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
                logprob_token_ids=chosen,
                constraint=constraint,
            )
            for prompt in prompts
        ]
        include_usage, continuous = _stream_options(body)
        if self._habits.force_usage:
            include_usage = continuous = True
        as_ids = body.return_tokens_as_token_ids
        text = TextOptions(
            stops=stop_strings(body),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            repetition=repetition_of(body.repetition_detection),
            reading=form.reading,
        )
        return GenerateRequest(
            chat=chat,
            response_id=f"{prefix}-{_request_id(header_id, body.request_id)}",
            prompts=prompts,
            n=n,
            answers=tuple(_specs(prompts, params, n, body)),
            texts=(text,) * len(prompts),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            tokens_as_ids=self._habits.tokens_as_ids if as_ids is None else as_ids,
            score_only=score_only,
            stream=bool(body.stream),
            include_usage=include_usage,
            continuous_usage=continuous,
            stream_interval=_interval(body.stream_interval) or self._habits.stream_interval,
            return_token_ids=bool(body.return_token_ids),
            return_prompt_text=return_prompt_text,
            role=role,
            metrics=self._habits.metrics and n == 1 and len(prompts) == 1,
            keep_alive_s=self._habits.keep_alive_s,
        )

    def _logprobs(self, name: str, value: int | None) -> int | None:
        if value is None:
            return None
        return logprob_count(name, value, self._habits.max_logprobs, self.model.vocab_size)

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


def _specs(
    prompts: Sequence[Prompt], params: Sequence[SamplingParams], n: int, body: SamplingFields
) -> list[AnswerSpec]:
    salt = _salt(body.cache_salt)
    return [
        AnswerSpec(
            prompt_token_ids=prompt.token_ids,
            sampling=sampling
            if k == 0
            else msgspec.structs.replace(sampling, seed=derive_seed(sampling.seed, k)),
            cache_salt=salt,
            session=body.session_id or "",
            priority=body.priority or 0,
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


def _interval(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise bad("stream_interval", "must be at least 1", value)
    return value


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
