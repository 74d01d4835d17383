"""The model as the router serves it: its names, tokenizer, template, defaults and limits."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdserve.cluster.model_files import ModelError, read_json, resolve_model
from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.chat import ChatTemplate, find_template
from pdserve.router.errors import BadRequest, NotFound
from pdserve.router.sampling import Defaults, check_defaults
from pdserve.router.speech import Speech, find_speech
from pdserve.router.tokenizer import TextTokenizer, load_tokenizer

log = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 2048
"""For a config.json that says nothing."""


@functools.cache
def version() -> str:
    """The release of this installation."""
    try:
        return importlib.metadata.version("pdserve")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Everything about the model that a request is checked against."""

    names: tuple[str, ...]
    """The first one is put into answers."""
    folder: Path
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    """None: the model has no chat template, and chat requests are refused."""
    template_kwargs: dict[str, Any]
    defaults: Defaults
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    own_max_len: int
    fingerprint: str | None
    """`system_fingerprint` of answers."""
    disabled_effort: str = "auto"
    """--anthropic-disabled-thinking-effort."""
    speech: Speech = field(default_factory=Speech)
    """How it writes calls of tools and thoughts."""
    workers_max_len: Callable[[], int | None] = lambda: None
    """What all connected workers accept, in tokens."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def max_len(self) -> int:
        """Longest prompt and answer together, in tokens, here and on every worker."""
        workers = self.workers_max_len()
        return self.own_max_len if workers is None else min(self.own_max_len, workers)

    @property
    def least_effort(self) -> str:
        """`reasoning_effort` for clients of the Messages API who want no thinking."""
        if self.disabled_effort != "auto":
            return self.disabled_effort
        source = self.template.source if self.template else ""
        return "low" if "reasoning_effort" in source and "enable_thinking" not in source else "none"

    def tokenizer_info(self) -> dict[str, Any]:
        """tokenizer_config.json, with the class of the tokenizer and the template in use."""
        path = self.folder / "tokenizer_config.json"
        content = read_json(path) if path.is_file() else {}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **(content if isinstance(content, dict) else {}),
            "chat_template": self.template.source if self.template else None,
        }

    def check_name(self, name: str | None) -> None:
        """Raises NotFound for a model that is not served. None and "" mean the default one."""
        if name and name not in self.names:
            raise NotFound(
                f"The model `{name:.200}` does not exist. Valid aliases: {', '.join(self.names)}.",
                param="model",
            )


def _template(source: str | None, wanted: str) -> ChatTemplate | None:
    """The chat template, and a line in the log that says how it takes a message's content: as one
    text, or as the list of its parts."""
    if not source:
        return None
    template = ChatTemplate(source, wanted)
    found, used = template.detected_format, template.content_format
    text = f"The chat template's content format was detected to be {found!r}"
    if wanted == "auto":
        log.info("%s; --chat-template-content-format sets another.", text)
    elif used != found:
        log.warning("%s; --chat-template-content-format %s is used.", text, used)
    return template


def load_model(settings: RouterSettings) -> ServedModel:
    """Read everything that the router needs of the model's folder. Raises ModelError, and
    TemplateError for a bad --chat-template."""
    folder = resolve_model(settings.model)
    config = read_json(folder / "config.json")
    text_config = config.get("text_config") or config
    tokenizer = load_tokenizer(folder)
    generation = _generation_config(settings.generation_config, folder) | _overrides(
        settings.override_generation_config
    )
    source = find_template(settings.chat_template, tokenizer.templates)
    default_name = settings.model or "demo"
    model_len = int(text_config.get("max_position_embeddings") or DEFAULT_MODEL_LEN)
    names = settings.served_model_name or (default_name,)
    own_max_len = min(settings.max_model_len or model_len, model_len)
    vocab_size = int(text_config.get("vocab_size") or tokenizer.size)
    return ServedModel(
        names=names,
        folder=folder,
        tokenizer=tokenizer,
        template=_template(source, settings.chat_template_content_format),
        template_kwargs=_template_kwargs(settings.default_chat_template_kwargs),
        defaults=_defaults(generation),
        eos_token_ids=_eos_ids(generation, config, text_config, tokenizer),
        vocab_size=vocab_size,
        fingerprint=_fingerprint(settings, repr((names, vocab_size, own_max_len))),
        disabled_effort=settings.anthropic_disabled_thinking_effort,
        speech=find_speech(
            tokenizer,
            source or "",
            calls=settings.tool_call_parser,
            auto_calls=settings.enable_auto_tool_choice,
            reasoning=settings.reasoning_parser,
        ),
        own_max_len=own_max_len,
    )


def _fingerprint(settings: RouterSettings, model: str) -> str | None:
    """--fingerprint-mode; in full it changes with the release and the model."""
    mode, value = settings.fingerprint_mode, settings.fingerprint_value
    if bool(value) != (mode == "custom"):
        raise ModelError("--fingerprint-value and --fingerprint-mode custom need each other.")
    short = hashlib.sha256(model.encode()).hexdigest()[:8]
    known = {"full": f"pdserve-{version()}-{short}", "hash": short, "custom": value}
    return known.get(mode)


def _generation_config(option: str, folder: Path) -> dict[str, Any]:
    """What `--generation-config` stands for."""
    if option in ("neutral", "vllm"):
        return {}
    path = folder if option == "auto" else Path(option).expanduser()
    if path.is_dir():
        path = path / "generation_config.json"
    if option == "auto" and not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return content


def _template_kwargs(text: str) -> dict[str, Any]:
    return _json_object("--default-chat-template-kwargs", text)


def _json_object(flag: str, text: str) -> dict[str, Any]:
    """The value of an option that holds JSON. Raises ModelError."""
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise ModelError(f"{flag} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{flag} must be a JSON object.")
    return found


def _overrides(text: str) -> dict[str, Any]:
    flag = "--override-generation-config"
    found = _json_object(flag, text)
    unknown = found.keys() - Defaults.__dataclass_fields__.keys() - {"eos_token_id"}
    if unknown:
        known = ", ".join([*Defaults.__dataclass_fields__, "eos_token_id"])
        raise ModelError(f"{flag} has the unknown key {min(unknown)!r}; it may have {known}.")
    return found


def _defaults(generation: Mapping[str, Any]) -> Defaults:
    """Raises ModelError for values that no request may have."""
    defaults = Defaults.from_generation_config(generation)
    limit = defaults.max_new_tokens
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ModelError(f"max_new_tokens must be a whole number of at least 1, got {limit!r}.")
    try:
        check_defaults(defaults)
    except (BadRequest, TypeError, ValueError) as error:
        raise ModelError(f"The model's sampling defaults cannot be used: {error}") from None
    return defaults


def _eos_ids(
    generation: dict[str, Any],
    config: dict[str, Any],
    text_config: dict[str, Any],
    tokenizer: TextTokenizer,
) -> tuple[int, ...]:
    """generation_config's, else config's; and always the tokenizer's."""
    found: list[int] = []
    for source in (generation, config, text_config):
        value = source.get("eos_token_id")
        if value is not None:
            found = [value] if isinstance(value, int) else list(value)
            break
    if tokenizer.eos_id is not None:
        found.append(tokenizer.eos_id)
    return tuple(dict.fromkeys(found))
