"""Deltas of an answer as items of a response."""

from __future__ import annotations

from typing import Any

from pdserve.router.output import Delta, ToolCall
from pdserve.router.response_output import Events, ResponseOutput

CALL = ToolCall(0, "call_1", "now", "{}")
DELTAS = [
    Delta(thoughts="Hm"),
    Delta(thoughts=", yes."),
    Delta(text="It"),
    Delta(text=" is", calls=[CALL]),
]
WHOLE = Delta(thoughts="Hm, yes.", text="It is", calls=[CALL])


def told(output: ResponseOutput, deltas: list[Delta]) -> Events:
    events: Events = []
    for delta in deltas:
        events += output.take(delta, [])
    return events + output.finish()


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def test_thoughts_then_text_then_calls() -> None:
    output = ResponseOutput(False)
    events = told(output, DELTAS)
    assert [name.removeprefix("response.") for name, _ in events] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
    ]  # fmt: skip
    assert [data["output_index"] for _, data in events] == [0] * 7 + [1] * 7 + [2] * 4
    added = events[0][1]["item"]
    assert added["content"] is None and added["summary"] == [] and added["id"][:3] == "rs_"
    assert all(
        data["item_id"] == output.items[data["output_index"]]["id"]
        for _, data in events
        if "item_id" in data
    )
    thoughts, message, call = output.items
    assert thoughts["content"] == [{"text": "Hm, yes.", "type": "reasoning_text"}]
    assert message["content"][0]["text"] == "It is" and call["name"] == "now"
    assert {item["status"] for item in output.items} == {"completed"}


def test_streamed_or_not_the_items_are_the_same() -> None:
    streamed, whole = ResponseOutput(False), ResponseOutput(False)
    told(streamed, DELTAS)
    told(whole, [WHOLE])
    assert without_ids(streamed.items) == without_ids(whole.items)


def test_nothing_is_an_empty_message_but_thoughts_are_something() -> None:
    empty, thoughtful = ResponseOutput(True), ResponseOutput(True)
    told(empty, [])
    part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
    assert empty.items[0]["content"] == [part]
    told(thoughtful, [Delta(thoughts="Hm")])
    assert [item["type"] for item in thoughtful.items] == ["reasoning"]


def test_log_probabilities_wait_for_their_text() -> None:
    output = ResponseOutput(True)
    one, two, three = {"token": "a"}, {"token": "b"}, {"token": "c"}
    output.take(Delta(text="a"), [one])
    (delta,) = output.take(Delta(text="c"), [two, three])
    assert delta[1]["logprobs"] == [two, three]
    output.take(Delta(), [one])
    events = output.finish()
    assert events[0][1]["logprobs"] == [one, two, three, one]
    assert output.items[0]["content"][0]["logprobs"] == [one, two, three, one]
