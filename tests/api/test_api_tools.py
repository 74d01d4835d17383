"""Tools and thoughts as the official client sees them, with workers that say what they are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI
from router_harness import RouterHarness

from pdserve.cluster.model_files import ModelError, resolve_model
from pdserve.cluster.records import Role
from pdserve.cluster.router_settings import RouterSettings
from pdserve.parsers.calls import CALLS
from pdserve.parsers.forms import FORMS
from pdserve.parsers.reasoning import REASONING
from pdserve.router.served import load_model

MESSAGES: Any = [{"role": "user", "content": "Weather in Paris?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS = r'{"city": "Paris \"é\"", "days": 2}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def allowed(mode: str, *tools: Any) -> Any:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


@pytest.fixture(scope="module", params=["pair", "colocated"])
def router(request: pytest.FixtureRequest, redis_url: str) -> Iterator[RouterHarness]:
    with RouterHarness(redis_url, enable_auto_tool_choice=True) as running:
        pair = request.param == "pair"
        for role in [Role.PREFILL, Role.DECODE] if pair else [Role.COLOCATED]:
            running.add(role)
        running.until_connected()
        yield running
        running.until_idle()


@pytest.fixture
def say(router: RouterHarness) -> Callable[[str], OpenAI]:
    """A client whose model says this."""

    def client(text: str) -> OpenAI:
        for worker in router.workers:
            worker.script = router.answer(text)
        return client_of(router)

    return client


def client_of(router: RouterHarness) -> OpenAI:
    return OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=10)


def whole(client: OpenAI, **options: Any) -> dict[str, Any]:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, **options)
    return answer.choices[0].model_dump()


def joined(client: OpenAI, **options: Any) -> dict[str, Any]:
    """A stream put together as a client does it; checks the order of its deltas."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish_reason": None}
    stream = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **options)
    for chunk in stream:
        (choice,) = chunk.choices
        assert found["finish_reason"] is None, "a chunk after the end"
        delta = choice.delta.model_dump(exclude_unset=True)
        found["content"] += delta.get("content") or ""
        thoughts = delta.get("reasoning") or ""
        assert not (thoughts and found["content"]), "thoughts after the answer"
        found["reasoning"] += thoughts
        for call in delta.get("tool_calls", ()):
            if call.get("id"):
                assert call["index"] == len(found["calls"]) and call["type"] == "function"
                assert set(call["function"]) == {"name"}
                found["calls"][call["index"]] = {"name": call["function"]["name"], "arguments": ""}
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                found["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        found["finish_reason"] = choice.finish_reason
    return found


def calls_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    listed = choice["message"].get("tool_calls") or []
    assert len({call["id"] for call in listed}) == len(listed)
    return [call["function"] for call in listed]


CASES = {
    "one": (CALL, None, ["get_weather"], "tool_calls"),
    "two": (f"Let me see. {CALL}\n{NOW}", "Let me see. ", ["get_weather", "now"], "tool_calls"),
    "none": ("It is sunny <b>there</b>.", "It is sunny <b>there</b>.", [], "stop"),
    "malformed": ('<tool_call>{"name": }</tool_call>', '<tool_call>{"name": }</tool_call>', [],
                  "stop"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_calls_streamed_and_not(say: Callable[[str], OpenAI], name: str) -> None:
    text, content, names, reason = CASES[name]
    with say(text) as client:
        choice = whole(client, tools=TOOLS)
        streamed = joined(client, tools=TOOLS)
    assert choice["message"]["content"] == content
    assert choice["finish_reason"] == streamed["finish_reason"] == reason
    functions = calls_of(choice)
    assert [call["name"] for call in functions] == names
    assert list(streamed["calls"].values()) == functions
    assert streamed["content"] == (content or "")
    if "get_weather" in names:
        assert json.loads(functions[0]["arguments"]) == {"city": 'Paris "é"', "days": 2}
    if "now" in names:
        assert functions[-1]["arguments"] == "{}"


def test_one_call_only_if_they_may_not_be_parallel(say: Callable[[str], OpenAI]) -> None:
    with say(f"{CALL}\n{NOW}") as client:
        options: Any = {"tools": TOOLS, "parallel_tool_calls": False}
        assert [c["name"] for c in calls_of(whole(client, **options))] == ["get_weather"]
        assert len(joined(client, **options)["calls"]) == 1


def test_an_answer_cut_in_a_call_is_text(say: Callable[[str], OpenAI]) -> None:
    with say(CALL) as client:
        choice = whole(client, tools=TOOLS, max_tokens=12)
        assert choice["finish_reason"] == "length" and not calls_of(choice)
        assert CALL.startswith(choice["message"]["content"])
        assert joined(client, tools=TOOLS, max_tokens=12)["content"] == choice["message"]["content"]


def test_arguments_come_while_they_are_written(
    router: RouterHarness, say: Callable[[str], OpenAI]
) -> None:
    """In all three APIs; cut off in its arguments, a call stays one."""
    wanted = json.loads(ARGUMENTS)
    for worker in router.workers:
        worker.step_s = 0.003
    with say(CALL) as client:
        chat = client.chat.completions.create(
            model="demo", messages=MESSAGES, tools=TOOLS, stream=True
        )
        calls = [call for chunk in chat for call in chunk.choices[0].delta.tool_calls or ()]
        texts = [call.function.arguments for call in calls[1:] if call.function]
        assert len(texts) > 1 and json.loads("".join(map(str, texts))) == wanted
        flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
        events = client.responses.create(model="demo", input="Hi", tools=flat, stream=True)
        told = [event.delta for event in events if event.type.endswith("arguments.delta")]
        assert len(told) > 1 and json.loads("".join(told)) == wanted
        cut = joined(client, tools=TOOLS, max_tokens=36)
        assert cut["finish_reason"] == "length" and not cut["content"]
        assert ARGUMENTS.startswith(cut["calls"][0]["arguments"]) and cut["calls"][0]["arguments"]
        flat_cut = client.responses.create(
            model="demo", input="Hi", tools=flat, stream=True, max_output_tokens=36
        )
        (call,) = list(flat_cut)[-1].response.output
        assert call.status == "incomplete" and call.arguments == cut["calls"][0]["arguments"]
    body: Any = {"model": "demo", "max_tokens": 200, "messages": MESSAGES, "tools": ANTHROPIC_TOOLS}
    with Anthropic(base_url=router.url, api_key="none", max_retries=0) as anthropic:
        pieces = [
            event.delta.partial_json
            for event in anthropic.messages.create(**body, stream=True)
            if event.type == "content_block_delta" and event.delta.type == "input_json_delta"
        ]
    assert len(pieces) > 1 and json.loads("".join(pieces)) == wanted
    for worker in router.workers:
        worker.step_s = 0.0


def test_a_call_goes_on_when_its_worker_dies(start: Callable[..., RouterHarness]) -> None:
    router = start(enable_auto_tool_choice=True)
    router.add(Role.PREFILL, router.answer(CALL))
    dying = router.add(Role.DECODE, router.answer(CALL))
    router.until_connected()
    dying.die_at = 30
    with client_of(router) as client:
        stream = client.chat.completions.create(
            model="demo", messages=MESSAGES, tools=TOOLS, stream=True
        )
        texts, seconds = [], []
        for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or ():
                if call.function and call.function.arguments:
                    texts.append(call.function.arguments)
                elif not seconds:  # the call has begun
                    seconds.append(router.add(Role.DECODE, router.answer(CALL)))
    assert json.loads("".join(texts)) == json.loads(ARGUMENTS)
    assert chunk.choices[0].finish_reason == "tool_calls"
    assert len(seconds[0].submits[0].output_token_ids) > 20


def test_no_tools_is_no_parsing(say: Callable[[str], OpenAI]) -> None:
    with say(CALL) as client:
        assert whole(client, tools=TOOLS, tool_choice="none")["message"]["content"] == CALL
        assert whole(client)["message"]["content"] == CALL


def grammars(router: RouterHarness) -> list[str]:
    found = [s.sampling.constraint for w in router.workers for s in w.submits]
    for worker in router.workers:
        worker.submits.clear()
    return [constraint.grammar if constraint else "" for constraint in found]


def test_forced_calls_come_with_a_grammar(
    router: RouterHarness, say: Callable[[str], OpenAI]
) -> None:
    with say(CALL) as client:
        grammars(router)
        whole(client, tools=TOOLS, tool_choice="required")
        both = grammars(router)[0]
        assert "get_weather" in both and "now" in both
        assert whole(client, tools=TOOLS, tool_choice=NAMED)["finish_reason"] == "tool_calls"
        named = grammars(router)[0]
        assert "get_weather" in named and "now" not in named
        whole(client, tools=TOOLS, tool_choice=allowed("required", NAMED))
        some = grammars(router)[0]
        assert "get_weather" in some and "now" not in some
        choice = whole(client, tools=TOOLS, tool_choice=allowed("auto", NAMED))
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        perhaps = grammars(router)[0]
        assert "lazy" in perhaps and "get_weather" in perhaps and "now" not in perhaps
        whole(client, tools=TOOLS)
        assert set(grammars(router)) == {""}
        strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
        whole(client, tools=strict)
        assert "lazy" in grammars(router)[0]
        extra = {"structured_outputs": {"regex": "x"}}
        whole(client, tools=TOOLS, extra_body=extra)
        either = grammars(router)[0]
        assert "get_weather" in either and "/x/" in either
        whole(client, tools=TOOLS, tool_choice="required", extra_body=extra)
        assert grammars(router)[0] == both


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": []}, "tools", "empty"),
        ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "zz"}}},
         "tool_choice", "not found"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice", "at least one tool"),
        ({"tools": TOOLS, "tool_choice": allowed("maybe", NAMED)}, "tool_choice", "maybe"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", {"type": "mcp"})}, "tool_choice", "mcp"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "mode"),
        ({"tools": [{"type": "function"}]}, "tools", "form"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools", "name"),
        ({"tools": TOOLS, "tool_choice": NAMED,
          "extra_body": {"structured_outputs": {"regex": "x"}}}, "structured_outputs", "not both"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "type": "object", "properties": {"a": {"type": "wat"}}}}}],
          "tool_choice": "required"}, "tools", "cannot be used"),
        ({"extra_body": {"thinking_token_budget": 5}}, "thinking_token_budget", "reasoning"),
    ],
)  # fmt: skip
def test_faults_name_their_field(
    say: Callable[[str], OpenAI], options: dict[str, Any], param: str, words: str
) -> None:
    with say("") as client, pytest.raises(BadRequestError) as caught:
        whole(client, **options)
    assert caught.value.param == param and words in caught.value.message


def test_without_permission_the_model_does_not_choose(harness: RouterHarness) -> None:
    with client_of(harness) as client:
        with pytest.raises(BadRequestError, match="--enable-auto-tool-choice"):
            whole(client, tools=TOOLS)
        assert whole(client, tools=TOOLS, tool_choice="required")["finish_reason"] == "stop"


def test_rendered_requests_keep_their_form(start: Callable[..., RouterHarness]) -> None:
    router = start(enable_scale_out=True)
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": NAMED}
    router.add(Role.COLOCATED)
    router.until_connected()
    rendered = router.client.post("/v1/chat/completions/render", json=body).json()
    assert "get_weather" in json.dumps(rendered["sampling_params"]["structured_outputs"])
    sent = {**rendered, "sampling_params": {**rendered["sampling_params"], "max_tokens": 9}}
    assert router.client.post("/inference/v1/generate", json=sent).status_code == 200
    assert "get_weather" in grammars(router)[0]


@pytest.mark.parametrize("parser", CALLS)
def test_each_format_can_be_forced(start: Callable[..., RouterHarness], parser: str) -> None:
    router = start(tool_call_parser=parser, enable_auto_tool_choice=True)
    router.add(Role.COLOCATED)
    router.until_connected()
    strict = [{"type": "function", "function": {**t["function"], "strict": True}} for t in TOOLS]
    with client_of(router) as client:
        for choice in ("required", NAMED, "auto"):
            whole(client, tools=strict, tool_choice=choice)
            assert grammars(router)[0]


def test_the_options_know_every_parser() -> None:
    for name in CALLS:
        assert load_model(RouterSettings(secret="x", tool_call_parser=name)).speech.calls
    assert set(CALLS) == set(FORMS)
    with pytest.raises(ModelError, match="--reasoning-parser qwen3 needs the token </think>"):
        load_model(RouterSettings(secret="x", reasoning_parser="qwen3"))
    with pytest.raises(ModelError, match="--enable-auto-tool-choice needs"):
        load_model(
            RouterSettings(secret="x", tool_call_parser="none", enable_auto_tool_choice=True)
        )


# Thoughts


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with the tokens of the reasoning formats in its vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(resolve_model(""), folder, dirs_exist_ok=True)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    marks = ["<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
    for number, mark in enumerate(marks):
        added = dict(content["added_tokens"][0], id=2048 + number, content=mark)
        content["added_tokens"].append(added | {"special": mark.startswith("<|")})
    path.write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2054}))
    return folder


def test_thoughts_streamed_and_not(start: Callable[..., RouterHarness], thinker: Path) -> None:
    router = start(model=str(thinker), reasoning_parser="qwen3", enable_auto_tool_choice=True)
    text = f"<think>\nHm, é?\n</think>\n\nYes. {NOW}"
    router.add(Role.PREFILL, router.answer(text), vocab_size=2054)
    router.add(Role.DECODE, router.answer(text), vocab_size=2054)
    router.until_connected()
    with client_of(router) as client:
        choice, streamed = whole(client, tools=TOOLS), joined(client, tools=TOOLS)
        assert choice["message"]["reasoning"] == streamed["reasoning"] == "Hm, é?"
        assert choice["message"]["content"] == streamed["content"] == "Yes. "
        assert calls_of(choice) == list(streamed["calls"].values())
        assert choice["finish_reason"] == "tool_calls"
        hidden = whole(client, extra_body={"include_reasoning": False})
        assert hidden["message"]["reasoning"] is None
        assert hidden["message"]["content"].startswith("Yes.")
        extra = {"include_reasoning": False, "return_token_ids": True}
        hidden = whole(client, logprobs=True, extra_body=extra)
        kept = router.router.model.tokenizer.encode(text.partition("</think>")[2], False)
        assert hidden["token_ids"][:-1] == kept  # and the end of the answer
        assert len(hidden["logprobs"]["content"]) == len(hidden["token_ids"])
        cut = whole(client, max_tokens=4)
        assert cut["message"]["content"] is None and cut["message"]["reasoning"]
        for off in ({"reasoning_effort": "none"},
                    {"chat_template_kwargs": {"enable_thinking": False}}):  # fmt: skip
            plain = whole(client, extra_body=off)
            assert plain["message"]["reasoning"] is None and "Hm" in plain["message"]["content"]
        answer = client.chat.completions.create(model="demo", messages=MESSAGES)
        assert answer.usage and answer.usage.completion_tokens_details
        tokens = router.router.model.tokenizer.encode("<think>\nHm, é?\n</think>", False)
        assert answer.usage.completion_tokens_details.reasoning_tokens == len(tokens)


def test_grammars_begin_behind_thoughts_and_budgets_end_them(
    start: Callable[..., RouterHarness], thinker: Path
) -> None:
    router = start(model=str(thinker), reasoning_parser="deepseek_r1")
    worker = router.add(Role.COLOCATED, vocab_size=2054)
    router.until_connected()
    with client_of(router) as client:
        extra: Any = {"thinking_token_budget": 8, "structured_outputs": {"regex": "x"}}
        whole(client, extra_body=extra)
        constraint = worker.submits[-1].sampling.constraint
        assert constraint is not None
        assert constraint.after == constraint.closing == (2049,)
        assert constraint.budget == 8 and constraint.grammar
        whole(client, extra_body={"thinking_token_budget": -1})
        assert worker.submits[-1].sampling.constraint is None
        for bad in (True, 1.5, -2):
            with pytest.raises(BadRequestError, match="thinking_token_budget"):
                whole(client, extra_body={"thinking_token_budget": bad})


def test_harmony_marks_are_special_tokens(
    start: Callable[..., RouterHarness], thinker: Path
) -> None:
    router = start(model=str(thinker), reasoning_parser="auto")
    assert router.router.model.speech.reasoning is REASONING["gpt_oss"]
    text = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Yes"
    router.add(Role.COLOCATED, router.answer(text), vocab_size=2054)
    router.until_connected()
    with client_of(router) as client:
        message, streamed = whole(client)["message"], joined(client)
    assert (message["reasoning"], message["content"]) == ("Hm", "Yes")
    assert (streamed["reasoning"], streamed["content"]) == ("Hm", "Yes")


# The same in Anthropic's words

ANTHROPIC_TOOLS: Any = [
    {"name": "get_weather", "input_schema": WEATHER},
    {"name": "now", "input_schema": {"type": "object"}},
]


def test_anthropic_calls(router: RouterHarness, say: Callable[[str], OpenAI]) -> None:
    say(f"Let me see. {CALL}\n{NOW}").close()
    body: Any = {"model": "demo", "max_tokens": 200, "messages": MESSAGES, "tools": ANTHROPIC_TOOLS}
    with Anthropic(base_url=router.url, api_key="none", max_retries=0) as client:
        message = client.messages.create(**body)
        assert message.stop_reason == "tool_use"
        text, weather, now = message.content
        assert text.type == "text" and text.text == "Let me see. "
        assert weather.type == now.type == "tool_use" and weather.id != now.id
        assert weather.input == {"city": 'Paris "é"', "days": 2} and now.input == {}
        with client.messages.stream(**body) as stream:
            final = stream.get_final_message()
        assert final.stop_reason == "tool_use"
        listed = [block.model_dump(exclude={"id"}) for block in final.content]
        assert listed == [block.model_dump(exclude={"id"}) for block in message.content]
        single = {"type": "auto", "disable_parallel_tool_use": True}
        assert len(client.messages.create(**body, tool_choice=single).content) == 2
        grammars(router)
        client.messages.create(**body, tool_choice={"type": "tool", "name": "now"})
        assert "now" in grammars(router)[0]


def test_anthropic_thoughts(start: Callable[..., RouterHarness], thinker: Path) -> None:
    router = start(model=str(thinker), reasoning_parser="qwen3")
    worker = router.add(
        Role.COLOCATED, router.answer("<think>\nHm.\n</think>\n\nYes."), vocab_size=2054
    )
    router.until_connected()
    body: Any = {"model": "demo", "max_tokens": 2000, "messages": MESSAGES,
                 "thinking": {"type": "enabled", "budget_tokens": 1024}}  # fmt: skip
    with Anthropic(base_url=router.url, api_key="none", max_retries=0) as client:
        message = client.messages.create(**body)
        constraint = worker.submits[-1].sampling.constraint
        assert constraint is not None and constraint.budget == 1024
        thought, text = message.content
        assert thought.type == "thinking" and thought.thinking == "Hm."
        assert len(thought.signature) == 32
        assert text.type == "text" and text.text == "Yes."
        with client.messages.stream(**body) as stream:
            final = [
                b.model_dump(exclude={"parsed_output"}) for b in stream.get_final_message().content
            ]
        assert final == [block.model_dump() for block in message.content]
        plain = client.messages.create(**body | {"thinking": {"type": "disabled"}})
        assert [block.type for block in plain.content] == ["text"]


def test_anthropic_formats(router: RouterHarness) -> None:
    grammars(router)
    form = {"type": "json_schema", "schema": WEATHER}
    body: Any = {"model": "demo", "max_tokens": 20, "messages": MESSAGES}
    body["output_config"] = {"format": form}
    with Anthropic(base_url=router.url, api_key="none", max_retries=0) as client:
        client.messages.create(**body)
    assert '"days"' in grammars(router)[0]


def test_rendering_knows_where_thoughts_end(
    start: Callable[..., RouterHarness], thinker: Path
) -> None:
    """What is rendered holds the generated answer to the same form, behind the same thoughts."""
    router = start(model=str(thinker), reasoning_parser="qwen3", enable_scale_out=True)
    router.add(Role.COLOCATED)
    router.until_connected()
    body = {"messages": MESSAGES, "structured_outputs": {"regex": "x+"}, "thinking_token_budget": 9}
    for more, ended in (({}, False), ({"reasoning_effort": "none"}, True)):
        told = []
        assert router.client.post("/v1/chat/completions", json=body | more).status_code == 200
        told.append(router.workers[0].submits[-1].sampling.constraint)
        rendered = router.client.post("/v1/chat/completions/render", json=body | more).json()
        assert rendered["reasoning_ended"] is ended
        assert router.client.post("/inference/v1/generate", json=rendered).status_code == 200
        told.append(router.workers[0].submits[-1].sampling.constraint)
        assert told[0] == told[1] and bool(told[0] and told[0].after) is not ended
