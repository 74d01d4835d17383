"""The items of one answer, one after the other, and the events that tell of their growth."""

from __future__ import annotations

from typing import Any

from pdserve.router.output import Delta, ToolCall
from pdserve.router.response_items import new_id

Json = dict[str, Any]
Events = list[tuple[str, Json]]
"""Names of events and their members."""


class ResponseOutput:
    """Takes deltas. What is said goes into the item that is open; another kind of speech closes
    it and opens the next."""

    def __init__(self, with_logprobs: bool) -> None:
        self.items: list[Json] = []
        """Those that are closed are complete."""
        self._with_logprobs = with_logprobs
        self._open = ""
        """Type of the item that is open; none."""
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        """Of the tokens in the open message."""
        self._waiting: list[Json] = []
        """Of tokens whose text has not come yet."""

    def take(self, delta: Delta, logprobs: list[Json]) -> Events:
        """`logprobs`: of the delta's tokens that are no thoughts."""
        self._waiting += logprobs
        events: Events = []
        for call in delta.continued:
            events += self._arguments(call.arguments)
        if delta.thoughts:
            events += self._begin("reasoning")
            self._texts.append(delta.thoughts)
            events.append(("response.reasoning_text.delta", self._at(delta=delta.thoughts)))
        if delta.text:
            events += self._speak(delta.text)
        for call in delta.begun:
            events += [*self._begin_call(call), *self._arguments(call.arguments)]
        return events

    def finish(self, cut: bool = False) -> Events:
        """Close what is open; an answer without anything is an empty message. `cut`: there was no
        room for the rest of the answer."""
        begun = [] if self.items else self._begin("message")
        unfinished = cut and self._open == "function_call"
        return [*begun, *self.close("incomplete" if unfinished else "completed")]

    def _at(self, **members: Any) -> Json:
        """Members of an event about the content of the last item."""
        return {**self._place(), "content_index": 0, **members}

    def _place(self) -> Json:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _add(self, item: Json) -> tuple[str, Json]:
        self.items.append(item)
        members = {"item": dict(item), "output_index": len(self.items) - 1}
        return "response.output_item.added", members

    def _done(self) -> tuple[str, Json]:
        members = {"item": self.items[-1], "output_index": len(self.items) - 1}
        return "response.output_item.done", members

    def _begin(self, kind: str) -> Events:
        """Open an item, unless one of this kind is open."""
        if self._open == kind:
            return []
        events = self.close()
        self._open = kind
        item: Json = {"id": new_id(kind), "type": kind, "status": "in_progress"}
        if kind == "reasoning":
            item |= {"summary": [], "content": None, "encrypted_content": None}
            part: Json = {"text": "", "type": "reasoning_text"}
        else:
            item |= {"content": [], "role": "assistant", "phase": None}
            part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        events.append(self._add(item))
        events.append(("response.content_part.added", self._at(part=part)))
        return events

    def _speak(self, text: str) -> Events:
        events = self._begin("message")
        logprobs, self._waiting = self._waiting, []
        self._texts.append(text)
        self._logprobs += logprobs
        members = self._at(delta=text, logprobs=logprobs)
        return [*events, ("response.output_text.delta", members)]

    def close(self, status: str = "completed") -> Events:
        """End the item that is open."""
        kind, text = self._open, "".join(self._texts)
        if not kind:
            return []
        self._open, self._texts = "", []
        if kind == "function_call":
            self.items[-1] |= {"arguments": text, "status": status}
            said = {**self._place(), "arguments": text, "name": self.items[-1]["name"]}
            return [("response.function_call_arguments.done", said), self._done()]
        if kind == "reasoning":
            part: Json = {"text": text, "type": "reasoning_text"}
            done = ("response.reasoning_text.done", self._at(text=text))
        else:
            logprobs = self._logprobs + self._waiting
            self._logprobs, self._waiting = [], []
            shown = logprobs if self._with_logprobs else None
            part = {"annotations": [], "text": text, "type": "output_text", "logprobs": shown}
            done = ("response.output_text.done", self._at(text=text, logprobs=logprobs))
        self.items[-1] |= {"content": [part], "status": status}
        return [done, ("response.content_part.done", self._at(part=part)), self._done()]

    def _arguments(self, text: str) -> Events:
        """More of the call that is open."""
        if not text:
            return []
        self._texts.append(text)
        return [("response.function_call_arguments.delta", {**self._place(), "delta": text})]

    def _begin_call(self, call: ToolCall) -> Events:
        events = self.close()
        self._open = "function_call"
        item: Json = {
            "arguments": "",
            "call_id": call.id,
            "name": call.name,
            "type": "function_call",
            "id": new_id("function_call"),
            "async": None,
            "caller": None,
            "namespace": None,
            "status": "in_progress",
        }
        return [*events, self._add(item)]
