"""The request bodies as clients write them. What they mean is decided in `requests.py`.

Every optional field may be null. Types are checked here, ranges and combinations there. Fields that
are refused are declared too (as Any), so that `fields.refuse` can name them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from pdserve.router.errors import SchemaError, schema_error

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

MAX_STOPS = 4
MAX_PROMPTS = 1024

MAX_TOKENS = 2**21
"""Of one list; far beyond any context."""

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which the first bad item is told, not each of a million."""
StopList = Annotated[list[str], Field(max_length=MAX_STOPS)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]
Object = dict[str, Any]
SessionId = Annotated[str, Field(min_length=1, max_length=256)]


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for the first value that is no finite number."""
    for name, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) < 1e300:
            raise ValueError(f"the value of {name[:40]!r} must be a finite number")
    return found


Numbers = Annotated[
    Object,
    AfterValidator(_numbers),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


def _labels(found: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for the first value that is no string."""
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"the value of {name[:40]!r} must be a string")
    return found


Labels = Annotated[
    Object,
    AfterValidator(_labels),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RepetitionDetection(RequestBody):
    max_pattern_size: Int64 | None = None
    min_pattern_size: Int64 | None = None
    min_count: Int64 | None = None


class SamplingFields(RequestBody):
    """What completions and chat have in common."""

    model: str | None = None
    n: Int64 | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: Int64 | None = None
    min_p: Finite | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    repetition_penalty: Finite | None = None
    logit_bias: Numbers | None = None
    seed: Int64 | None = None
    stop: str | StopList | None = None
    stop_token_ids: Many[Int64] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int64 | None = None
    max_tokens: Int64 | None = None
    prompt_logprobs: Int64 | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Int64 | None = None
    truncation_side: Literal["left", "right"] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Int64 | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Many[str] | None = None
    logprob_token_ids: TokenIds | None = None
    repetition_detection: RepetitionDetection | None = None
    response_format: Object | None = None
    structured_outputs: Object | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1, le=2**31, strict=True)] | None = None
    request_id: str | None = None
    session_id: SessionId | None = None
    cache_salt: str | None = None

    # advisory
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    priority: Int64 | None = None
    spaces_between_special_tokens: bool | None = None
    watermarking: bool | None = None
    length_penalty: Finite | None = None
    return_mm_kwargs: bool | None = None
    mm_payload: Any = None

    # refused
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None
    use_beam_search: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    vllm_xargs: Any = None
    return_token_offsets: Any = None
    routed_experts_prompt_start: Any = None


class CompletionRequest(SamplingFields):
    prompt: str | TokenIds | Many[str] | Many[TokenIds] | None = None
    logprobs: Int64 | None = None
    best_of: Int64 | None = None

    # refused
    suffix: Any = None
    prompt_embeds: Any = None


class ChatFields(RequestBody):
    """The conversation, for chat and for /tokenize."""

    model: str | None = None
    messages: Many[Object]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Object | None = None
    tools: Many[Object] | None = None
    documents: Many[Object] | None = None

    # refused
    media_io_kwargs: Any = None
    mm_processor_kwargs: Any = None


class ChatCompletionRequest(ChatFields, SamplingFields):
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    max_completion_tokens: Int64 | None = None
    tool_choice: str | Object | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    return_prompt_text: bool | None = None

    # advisory
    prediction: Any = None
    verbosity: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None

    # refused
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None


class BatchChatRequest(ChatCompletionRequest):
    """Several conversations, each answered as if it came alone."""

    messages: Annotated[  # type: ignore[assignment]
        list[Annotated[list[Object], Field(min_length=1, fail_fast=True)]],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
    ]


class MessagesFields(RequestBody):
    """A conversation as Anthropic's clients write it."""

    model: Annotated[str, Field(min_length=1)]
    messages: Many[Object]
    system: str | Many[Object] | None = None
    tools: Many[Object] | None = None
    tool_choice: Object | None = None
    thinking: Object | None = None
    output_config: Object | None = None
    chat_template_kwargs: Object | None = None

    # advisory
    cache_control: Any = None

    # refused
    mcp_servers: Any = None
    container: Any = None


class CountTokensRequest(MessagesFields):
    """Without anything about the answer."""


class MessagesRequest(MessagesFields):
    max_tokens: Annotated[Int64, Field(ge=1)]
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None
    ) = None
    stream: bool | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: Int64 | None = None
    cache_salt: str | None = None

    # advisory
    metadata: Any = None
    service_tier: Any = None
    watermarking: bool | None = None

    # refused
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    vllm_xargs: Any = None


INCLUDABLE = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.results",
    "web_search_call.action.sources",
]
"""Only the first is ever there to be included."""


class ResponsesFields(RequestBody):
    """A conversation as OpenAI's Responses API has it."""

    model: str | None = None
    input: str | Many[Object]
    instructions: str | None = None
    previous_response_id: str | None = None
    previous_input_messages: Many[Object] | None = None
    tools: Many[Object] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Object | None = None
    text: Object | None = None
    structured_outputs: Object | None = None
    truncation: Literal["disabled", "auto"] | None = None
    chat_template_kwargs: Object | None = None

    # refused
    prompt: Any = None
    conversation: Any = None
    context_management: Any = None
    media_io_kwargs: Any = None
    mm_processor_kwargs: Any = None


class InputTokensRequest(ResponsesFields):
    """Without anything about the answer."""


class ResponsesRequest(ResponsesFields):
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    include: Many[INCLUDABLE] | None = None
    top_logprobs: Int64 | None = None
    max_output_tokens: Annotated[Int64, Field(ge=1)] | None = None
    include_reasoning: bool | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: Int64 | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    repetition_penalty: Finite | None = None
    logit_bias: Numbers | None = None
    seed: Int64 | None = None
    stop: str | StopList | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    metadata: Labels | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    user: str | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")] | None = None
    session_id: SessionId | None = None
    cache_salt: str | None = None
    priority: Int64 | None = None
    enable_response_messages: bool | None = None

    # advisory
    max_tool_calls: Int64 | None = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    watermarking: bool | None = None

    # refused
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    vllm_xargs: Any = None


Body = TypeVar("Body", bound=RequestBody)

_JSON = msgspec.json.Decoder()


def decode(body: bytes) -> Any:
    """Strict JSON: no NaN, no lone surrogates, bounded nesting. Raises SchemaError."""
    try:
        return _JSON.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        place = str(error).rpartition("(byte ")[2].rstrip(")")
        offset = place if place.isdigit() else "0"
        raise SchemaError(
            "1 validation error:\n"
            f"  {{'type': 'json_invalid', 'loc': ('body', {offset}), "
            f"'msg': 'JSON decode error', 'ctx': {{'error': {str(error)!r:.300}}}}}",
            param=f"body.{offset}",
        ) from None


def parse(kind: type[Body], content: Any) -> Body:
    """Decoded JSON as a request. Raises SchemaError."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise schema_error(error.errors(include_url=False, include_context=False)) from None
