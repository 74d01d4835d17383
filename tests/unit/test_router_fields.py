"""Nothing that is accepted is ignored: every field is honoured, refused or advisory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pdserve.router import fields
from pdserve.router.bodies import BODIES
from pdserve.router.errors import BadRequest
from pdserve.router.schemas import ChatCompletionRequest, parse


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model in a type, those in its own fields too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_in(field.annotation)
    for argument in get_args(annotation):
        yield from models_in(argument)


DECLARED = {name for body in BODIES for model in models_in(body) for name in model.model_fields}
GROUPS = (fields.HONOURED, frozenset(fields.ADVISORY), frozenset(fields.REFUSED))

SOMETHING: dict[str, Any] = {
    "modalities": ["audio"],
    "response_format": {"type": "json_object"},
    "function_call": "auto",
}
"""Values that ask for something, where `{"x": 1}` would not do."""

REQUIRED: dict[str, Any] = {
    "messages": [],
    "prompt": "x",
    "input": "x",
    "model": "demo",
    "max_tokens": 9,
    "token_ids": [1],
    "sampling_params": {},
}
"""Enough for every body."""


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_every_field_is_in_exactly_one_group(name: str) -> None:
    assert sum(name in group for group in GROUPS) == 1


def test_the_groups_name_only_fields_that_exist() -> None:
    assert set().union(*GROUPS) == DECLARED


@pytest.mark.parametrize("name", sorted(fields.REFUSED))
def test_a_refused_field_is_named(name: str) -> None:
    body = next(body for body in BODIES if name in body.model_fields)
    content = {**REQUIRED, name: SOMETHING.get(name, {"x": 1})}
    with pytest.raises(BadRequest) as caught:
        fields.refuse(parse(body, content))
    assert caught.value.param == name and name in caught.value.message


@pytest.mark.parametrize("name", sorted(fields.REFUSED))
def test_harmless_values_pass(name: str) -> None:
    body = next(body for body in BODIES if name in body.model_fields)
    for value in fields.REFUSED[name].harmless:
        fields.refuse(parse(body, {**REQUIRED, name: value}))


def test_text_is_a_format() -> None:
    fields.refuse(
        parse(ChatCompletionRequest, {"messages": [], "response_format": {"type": "text"}})
    )


def test_an_empty_suffix_is_refused_too() -> None:
    body = next(body for body in BODIES if "suffix" in body.model_fields)
    with pytest.raises(BadRequest, match="suffix"):
        fields.refuse(parse(body, {"prompt": "x", "suffix": ""}))
