"""Parsed requests as bodies of /inference/v1/generate: everything before inference is done."""

from __future__ import annotations

from pdserve.router.front import Front
from pdserve.router.requests import GenerateRequest
from pdserve.router.schemas import ChatCompletionRequest, SamplingFields
from pdserve.router.writer import Json

OPEN = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "max_tokens", "min_tokens", "ignore_eos", "logprobs",
        "prompt_logprobs")  # fmt: skip
"""Parameters that are called the same on both sides."""


def rendered(
    front: Front,
    parsed: GenerateRequest,
    place: int,
    request_id: str,
    body: SamplingFields,
    offsets: object,
    special: bool,
) -> Json:
    """One prompt of a request as a body of /inference/v1/generate. `offsets`: where each token
    stands in the text is asked for; `special`: the text was tokenized with special tokens."""
    prompt, ended = parsed.prompts[place], _reasoning_ended(front, parsed, place)
    params = _params(front, parsed, place, body)
    if ended is not False:
        params.pop("thinking_token_budget", None)  # for thoughts that will not come
    return {
        "request_id": request_id,
        "token_ids": prompt.token_ids,
        "token_offsets": _spans(front, prompt.text, prompt.token_ids, special) if offsets else None,
        "features": None,
        "content_parts": None,
        "sampling_params": params,
        "model": body.model,
        "reasoning_ended": ended,
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


def _params(front: Front, parsed: GenerateRequest, place: int, body: SamplingFields) -> Json:
    sampling, text = parsed.answers[place * parsed.n].sampling, parsed.texts[place]
    params = {name: getattr(sampling, name) for name in OPEN}
    params |= {
        "n": parsed.n,
        "seed": body.seed,
        "stop": list(text.stops),
        "stop_token_ids": list(sampling.stop_token_ids),
        "include_stop_str_in_output": text.include_stop,
        "skip_special_tokens": text.skip_special_tokens,
        **_form(front, body),
        "logit_bias": {str(key): value for key, value in sampling.logit_bias.items()} or None,
        "allowed_token_ids": body.allowed_token_ids,
        "bad_words": body.bad_words,
        "logprob_token_ids": body.logprob_token_ids,
        "repetition_detection": body.repetition_detection
        and body.repetition_detection.model_dump(exclude_none=True),
        "thinking_token_budget": body.thinking_token_budget,
    }
    return {key: value for key, value in params.items() if value is not None}


def _form(front: Front, body: SamplingFields) -> Json:
    """What holds the answer to a form; calls of tools are part of it."""
    if isinstance(body, ChatCompletionRequest):
        wish = front.parser.forms.tools(body).wish
        return {"structured_outputs": wish and {wish.kind: wish.value, **wish.options}}
    return {
        "structured_outputs": body.structured_outputs,
        "response_format": body.response_format,
    }


def _reasoning_ended(front: Front, parsed: GenerateRequest, place: int) -> bool | None:
    """Whether the answer begins behind its thoughts; None: there are none ever."""
    if front.model.speech.reasoning is None or not parsed.chat:
        return None
    reading = parsed.texts[place].reading
    return reading is None or reading.reasoning is None


def _spans(
    front: Front, text: str | None, token_ids: list[int], special: bool
) -> list[tuple[int, int]] | None:
    """Where each token stands in the text, if that can be said."""
    if text is None:
        return None
    spans = front.model.tokenizer.core.encode(text, add_special_tokens=special).offsets
    return spans if len(spans) == len(token_ids) else None
