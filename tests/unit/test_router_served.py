"""The model as it is served: where sampling defaults come from."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.cluster.model_files import ModelError
from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.sampling import Defaults
from pdserve.router.served import load_model


def defaults(**settings: Any) -> Defaults:
    return load_model(RouterSettings(secret="x", **settings)).defaults


def test_the_file_then_what_overrides_it() -> None:
    own = defaults()
    assert own.temperature == 0.1  # of the demo model
    assert defaults(generation_config="vllm") == defaults(generation_config="neutral") == Defaults()
    found = defaults(override_generation_config='{"top_p": 0.5, "max_new_tokens": 7}')
    assert found.temperature == own.temperature
    assert found.top_p == 0.5 and found.max_new_tokens == 7
    found = defaults(generation_config="vllm", override_generation_config='{"temperature": 0}')
    assert found == Defaults(temperature=0)


def test_an_end_of_sequence_token_can_be_given() -> None:
    settings = RouterSettings(secret="x", override_generation_config='{"eos_token_id": [7, 9]}')
    assert load_model(settings).eos_token_ids[:2] == (7, 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"temprature": 1}', "unknown key 'temprature'"),
        ('{"temperature": 3}', "temperature must be in"),
        ('{"top_p": "x"}', "cannot be used"),
        ('{"max_new_tokens": 0}', "max_new_tokens must be"),
    ],
)
def test_overrides_that_make_no_sense(text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        defaults(override_generation_config=text)


def test_the_log_says_how_the_template_takes_content(caplog: pytest.LogCaptureFixture) -> None:
    def said(**settings: Any) -> list[tuple[str, str]]:
        caplog.clear()
        with caplog.at_level("INFO", logger="pdserve.router.served"):
            load_model(RouterSettings(secret="x", **settings))
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    each = "{%% for m in messages %%}%s{%% endfor %%}"
    parts = each % "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    ((level, text),) = said(chat_template=each % "{{ m['content'] }}")
    assert level == "INFO" and "detected to be 'string'" in text
    ((level, text),) = said(chat_template=parts)
    assert level == "INFO" and "detected to be 'openai'" in text
    ((level, text),) = said(chat_template=parts, chat_template_content_format="string")
    assert level == "WARNING" and text.endswith("--chat-template-content-format string is used.")
    assert said(chat_template=parts, chat_template_content_format="openai") == []
