"""What becomes of every request field: the one table behind "nothing accepted is ignored".

- HONOURED: does what its name says.
- REFUSED: not served (yet); any value but the harmless ones listed is a 400 naming the field.
- ADVISORY: accepted and without effect here, because it cannot change an answer.

A field that no request model declares is ignored, as in vLLM. A test walks the models and fails for
a field that is in none of the groups, or in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pdserve.router.errors import BadRequest

HONOURED = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "tokens",
        "echo",
        "n",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "stream",
        "stream_options",
        "include_usage",
        "continuous_usage_stats",
        "stream_interval",
        "allowed_token_ids",
        "bad_words",
        "logprob_token_ids",
        "repetition_detection",
        "max_pattern_size",
        "min_pattern_size",
        "min_count",
        "response_format",
        "structured_outputs",
        "skip_special_tokens",
        "truncate_prompt_tokens",
        "truncation_side",
        "add_special_tokens",
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "chat_template",
        "chat_template_kwargs",
        "reasoning_effort",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "include_reasoning",
        "thinking_token_budget",
        "token_ids",
        "reasoning_ended",
        "sampling_params",
        "output_mode",
        "detokenize",
        "request_ids",
        "generate_response",
        "generate_responses",
        "generate_chunk",
        "stream_state",
        "prompt_tokens",
        "prompt_token_ids",
        "chat_request",
        "completion_request",
        "responses_request",
        # within these
        "choices",
        "content",
        "created",
        "finish_reason",
        "index",
        "logprob",
        "names",
        "output_chunk_lens",
        "output_token_ids",
        "rank",
        "role_sent",
        "stop_reason",
        "token_id",
        "usage",
        "waiting",
        "system",
        "stop_sequences",
        "thinking",
        "output_config",
        "input",
        "instructions",
        "previous_response_id",
        "previous_input_messages",
        "background",
        "include",
        "max_output_tokens",
        "reasoning",
        "text",
        "truncation",
        "enable_response_messages",
        "cache_salt",
        "request_id",
        "session_id",
        "priority",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "return_prompt_text",
        "return_token_strs",
    }
)

ADVISORY: dict[str, str] = {
    "best_of": "removed from the API; old clients still send it",
    "user": "names the client's user; nothing depends on it",
    "store": "honoured by /v1/responses; other answers are not stored",
    "metadata": "repeated by /v1/responses; otherwise kept by nobody",
    "service_tier": "there is one tier; /v1/responses repeats it",
    "max_tool_calls": "limits tools that the server itself executes, of which there are none",
    "cache_control": "every prefix is a candidate for the cache",
    "prediction": "a hint to draft with; the answer does not depend on it",
    "verbosity": "a hint to the model family that knows it",
    "prompt_cache_key": "prefixes are shared by content",
    "safety_identifier": "names the client's user; nothing depends on it",
    "spaces_between_special_tokens": "fast tokenizers write no such spaces",
    "output_kind": "follows from stream",
    "skip_clone": "an optimization of another server",
    "skip_reading_prefix_cache": "cached blocks hold what would be computed again",
    "token_offsets": "where the tokens came from",
    "reasoning_parser_kwargs": "tokens are not parsed",
    "watermarking": "no watermark is configured",
    "return_mm_kwargs": "meaningful only for /render",
    "mm_payload": "meaningful only for /render of other media than text",
    "length_penalty": "meaningful only for beam search",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused, and the values that ask for nothing and pass."""

    reason: str
    harmless: tuple[Any, ...] = (None,)


_GUIDED = "the guided_ fields were replaced by structured_outputs"

REFUSED: dict[str, Refusal] = {
    "suffix": Refusal("suffix is only supported for models with FIM completion rendering"),
    "prompt_embeds": Refusal("prompt embeddings are not accepted; send text or token ids"),
    "guided_json": Refusal(_GUIDED),
    "guided_regex": Refusal(_GUIDED),
    "guided_choice": Refusal(_GUIDED),
    "guided_grammar": Refusal(_GUIDED),
    "guided_decoding_backend": Refusal(_GUIDED),
    "guided_whitespace_pattern": Refusal(_GUIDED),
    "use_beam_search": Refusal("beam search is not served", (None, False)),
    "kv_transfer_params": Refusal("the router itself moves KV blocks between workers"),
    "ec_transfer_params": Refusal("there are no encoders to transfer from"),
    "vllm_xargs": Refusal("there are no plug-ins that could read it", (None, {})),
    "media_io_kwargs": Refusal("the model reads text only", (None, {})),
    "mm_processor_kwargs": Refusal("the model reads text only", (None, {})),
    "extra_args": Refusal("there are no plug-ins that could read it", (None, {})),
    "features": Refusal("the model reads text only"),
    "content_parts": Refusal("the model reads text only", (None, [])),
    "mcp_servers": Refusal("the server itself calls no tools", (None, [])),
    "container": Refusal("the server itself runs no code"),
    "conversation": Refusal("conversations are not stored; use previous_response_id"),
    "context_management": Refusal("there is no compaction", (None, [])),
    "modalities": Refusal("answers are text only", (None, [], ["text"])),
    "audio": Refusal("answers are text only"),
    "web_search_options": Refusal("there is no web search"),
    "functions": Refusal("functions were replaced by tools"),
    "function_call": Refusal("function_call was replaced by tool_choice", (None, "none")),
    "return_token_offsets": Refusal("token offsets are meaningful only for /render", (None, False)),
    "routed_experts_prompt_start": Refusal("routed experts are not captured"),
}


def refuse(request: BaseModel) -> None:
    """Raise BadRequest for the first field that asks for what is not served."""
    for name in sorted(request.model_fields_set):
        refusal = REFUSED.get(name)
        if refusal is None:
            continue
        value = getattr(request, name)
        if not any(_same(value, harmless) for harmless in refusal.harmless):
            raise BadRequest(
                f"{name} cannot be used: {refusal.reason} (parameter={name}).", param=name
            )


def _same(value: Any, harmless: Any) -> bool:
    return type(value) is type(harmless) and value == harmless
