"""Streams of /v1/responses."""

from __future__ import annotations

import json
from typing import Any


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, whose numbers have no gaps."""
    found = []
    for frame in text.strip("\n").split("\n\n"):
        name, data = frame.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        found.append((content.pop("type"), content))
    first = found[0][1]["sequence_number"]
    numbers = [data["sequence_number"] for _, data in found]
    assert numbers == list(range(first, first + len(found)))
    return found
