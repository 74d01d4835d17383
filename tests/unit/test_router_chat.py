"""Chat templates: what they may do, what they write, and how content reaches them."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.cluster.model_files import DEMO_MODEL
from pdserve.router import chat
from pdserve.router.chat import ChatTemplate, TemplateError, find_template
from pdserve.router.conversation import check_messages
from pdserve.router.errors import BadRequest
from pdserve.router.tokenizer import TextTokenizer, load_tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    return load_tokenizer(DEMO_MODEL)


def render(source: str, messages: Any = USER, variables: Any = None, **options: Any) -> str:
    return ChatTemplate(source).render(check_messages(messages), variables or {}, **options)


@pytest.mark.parametrize(
    "messages",
    [
        USER,
        [{"role": "system", "content": "Be kind."}, *USER],
        [*USER, {"role": "assistant", "content": "Hello <b>&"}, {"role": "user", "content": "☃"}],
    ],
)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_the_same_text_as_transformers(
    demo: TextTokenizer, messages: Any, generation_prompt: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )
    own = demo.templates["default"]
    assert render(own, messages, add_generation_prompt=generation_prompt) == expected


def test_functions_of_transformers() -> None:
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    loop = "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop) == "012"
    assert render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}") == "2"


def test_raise_exception_is_a_400_with_its_text() -> None:
    with pytest.raises(BadRequest, match="no system please") as caught:
        render("{{ raise_exception('no system please') }}")
    assert caught.value.status == 400


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[9].x.y }}", "{{ none() }}"])
def test_whatever_a_template_raises_is_a_400(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_a_syntax_error_is_found_at_the_start() -> None:
    with pytest.raises(TemplateError, match="malformed"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ self._TemplateReference__context }}",
        "{{ strftime_now.__globals__ }}",
        "{% set ns = namespace(_x=1) %}{% set ns._x = 2 %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    try:
        text = render(source)
    except TemplateError:
        return
    assert "class" not in text and "globals" not in text and "module" not in text


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999999 }}",
        "{{ 9 ** 9999999 }}",
        "{{ '%99999999d' % 1 }}",
    ],
)
def test_bounds(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(chat, "MAX_CHARS", 10**6)
    with pytest.raises(TemplateError):
        render(source)


# content


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PLAIN, "string"),
        (
            "{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}"
            "{% endfor %}",
            "openai",
        ),
        ("{% for m in messages %}{% for c in m.content %}x{% endfor %}{% endfor %}", "openai"),
        (
            "{% for m in messages %}{% set content = m.content %}"
            "{% for c in content %}x{% endfor %}{% endfor %}",
            "openai",
        ),
        (
            "{% set loop_messages = messages[1:] %}"
            "{% for m in loop_messages | list %}{% for c in m.content %}x{% endfor %}{% endfor %}",
            "openai",
        ),
        ("{% for x in tools %}{% for c in x.content %}x{% endfor %}{% endfor %}", "string"),
    ],
)
def test_detection_of_the_content_format(source: str, expected: str) -> None:
    assert ChatTemplate(source).detected_format == expected


def test_parts_are_joined_for_string_templates() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(PLAIN, [{"role": "user", "content": parts}]) == "[user]a\nb"


def test_parts_are_kept_for_openai_templates() -> None:
    source = "{% for m in messages %}{% for c in m.content %}<{{ c.text }}>{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(source, [{"role": "user", "content": parts}]) == "<a><b>"
    assert render(source, USER) == "<Hi>"


def test_parts_and_roles_of_their_own_kind_reach_the_template() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.content %}"
        "{{ c.type }}={{ c.thinking or c.name or c.text }},{% endfor %}{% endfor %}"
    )
    parts = [
        {"type": "thinking", "thinking": "hm", "closed": True},
        {"type": "tool_reference", "name": "f"},
        {"type": "refusal", "refusal": "no"},
    ]
    messages = [{"role": "narrator", "content": parts}]
    assert render(source, messages) == "narrator:thinking=hm,tool_reference=f,text=no,"
    assert render(PLAIN, messages) == "[narrator]hm\nf\nno"


def test_developer_is_system_where_the_template_knows_no_better() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render(PLAIN, messages) == "[system]x"
    assert render(PLAIN + "{# developer #}", messages) == "[developer]x"


def test_kwargs_reach_the_template_but_cannot_replace_messages() -> None:
    variables = {"thinking": "on", "messages": [], "raise_exception": 1}
    assert render(PLAIN + "{{ thinking }}", variables=variables) == "[user]Hion"


# continue_final_message


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (PLAIN + "<end>", "Once upon", "[user]Hi[assistant]Once upon"),
        (PLAIN + "<end>", "Once ", "[user]Hi[assistant]Once "),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}<end>",
            "Once ",
            "[user]Hi[assistant]Once",
        ),
        (PLAIN + "<end>", [{"type": "text", "text": "Once"}], "[user]Hi[assistant]Once"),
    ],
)
def test_the_last_message_is_continued(source: str, content: Any, expected: str) -> None:
    messages = [*USER, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, messages, **options) == expected


def test_a_template_that_drops_the_last_message_cannot_continue_it() -> None:
    with pytest.raises(TemplateError, match="continue_final_message"):
        render("nothing", USER, continue_final_message=True)


# --chat-template


def test_where_the_template_comes_from(tmp_path: Any) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("from a file")
    own = {"default": "d", "tool_use": "t"}
    assert find_template("", own) == "d"
    assert find_template("", {}) is None
    assert find_template("tool_use", own) == "t"
    assert find_template(str(path), own) == "from a file"
    assert find_template("{{ messages }}", own) == "{{ messages }}"
    with pytest.raises(TemplateError, match="looks like a file path, but it failed to be opened"):
        find_template("/nope.jinja", own)


# messages


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "", "content": "x"}], "messages.0.role"),
        ([{"role": ["user"], "content": "x"}], "messages.0.role"),
        ([{"content": "x"}], "messages.0.role"),
        ([*USER, {"role": "user", "content": None}], "messages.1.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0"),
        ([{"role": "user", "content": ["text"]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "assistant", "tool_calls": [5]}], "messages.0.tool_calls"),
        ([{"role": "assistant", "tool_calls": {}}], "messages.0.tool_calls"),
    ],
)
def test_bad_messages_are_named(messages: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_messages(messages)
    assert caught.value.param == param


def test_good_messages() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    found = check_messages(
        [
            {"role": "user"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
        ]
    )
    assert found[0]["content"] == found[1]["content"] == ""
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
