"""The form of a request's answers: what workers may draw, and how their text is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from pdserve.protocol.grammar import Constraint
from pdserve.router.constraints import wish_of
from pdserve.router.errors import BadRequest
from pdserve.router.grammar_check import GrammarCheck, Wish
from pdserve.router.reading import Reading
from pdserve.router.schemas import ChatCompletionRequest, SamplingFields
from pdserve.router.served import ServedModel
from pdserve.router.tool_use import ToolUse, tool_use


@dataclass(frozen=True, slots=True)
class AnswerForm:
    constraint: Constraint | None = None
    """None: anything may be drawn."""
    reading: Reading | None = None
    """None: the text is passed on as it is."""


class AnswerForms:
    """Finds them, for one model."""

    def __init__(self, model: ServedModel, grammars: GrammarCheck) -> None:
        self._model = model
        self._grammars = grammars

    async def plain(self, fields: SamplingFields) -> AnswerForm:
        """Of answers that are not parsed. Raises BadRequest."""
        if fields.thinking_token_budget not in (None, -1):
            raise BadRequest(
                "thinking_token_budget is for chat: thoughts are told from answers only there "
                "(parameter=thinking_token_budget).",
                param="thinking_token_budget",
            )
        wish = wish_of(fields.response_format, fields.structured_outputs)
        return AnswerForm(await self._constraint(wish))

    async def tokens(self, fields: SamplingFields, reasoning_ended: bool | None) -> AnswerForm:
        """Of an answer to a prompt of token ids; `reasoning_ended`: what its client says about
        thoughts. Raises BadRequest."""
        if reasoning_ended is not False:
            return await self.plain(fields)
        if self._model.speech.reasoning is None:
            raise BadRequest(
                "reasoning_ended false needs a reasoning parser; start the router with "
                "--reasoning-parser (parameter=reasoning_ended).",
                param="reasoning_ended",
            )
        wish = wish_of(fields.response_format, fields.structured_outputs)
        constraint = await self._constraint(wish)
        return AnswerForm(self._behind_thoughts(constraint, fields.thinking_token_budget))

    def check(self, body: ChatCompletionRequest) -> ToolUse:
        """What can be said before the prompt is rendered. Raises BadRequest."""
        use = self.tools(body)
        if body.thinking_token_budget is not None and self._model.speech.reasoning is None:
            raise BadRequest(
                "thinking_token_budget needs a reasoning parser; start the router with "
                "--reasoning-parser (parameter=thinking_token_budget).",
                param="thinking_token_budget",
            )
        return use

    def tools(self, body: ChatCompletionRequest) -> ToolUse:
        """What a conversation's tools ask for. Raises BadRequest."""
        speech = self._model.speech
        return tool_use(body, speech.calls.name if speech.calls else None, speech.auto_calls)

    async def chat(
        self, body: ChatCompletionRequest, use: ToolUse, kwargs: Mapping[str, Any], prompt: str
    ) -> AnswerForm:
        """`use`: as checked; `kwargs`: the request's, for the template that wrote `prompt`. Raises
        BadRequest."""
        speech = self._model.speech
        thinks = self._thinks(body, kwargs, prompt)
        constraint = await self._constraint(use.wish)
        if thinks:
            constraint = self._behind_thoughts(constraint, body.thinking_token_budget)
        if not (use.parse or thinks):
            return AnswerForm(constraint)
        reading = Reading(
            calls=speech.calls if use.parse else None,
            schemas=use.schemas,
            one_call=body.parallel_tool_calls is False,
            pieces=bool(body.stream),
            reasoning=speech.reasoning if thinks else None,
            show_thoughts=body.include_reasoning is not False,
            kept=speech.kept,
        )
        return AnswerForm(constraint, reading)

    def _behind_thoughts(
        self, constraint: Constraint | None, budget: int | None
    ) -> Constraint | None:
        """The constraint for an answer that begins with thoughts, of at most `budget` tokens."""
        speech, budget = self._model.speech, None if budget == -1 else budget
        if constraint is None and budget is None:
            return None
        return msgspec.structs.replace(
            constraint or Constraint(), after=speech.after, budget=budget, closing=speech.closing
        )

    async def _constraint(self, wish: Wish | None) -> Constraint | None:
        return None if wish is None else Constraint(grammar=await self._grammars.grammar(wish))

    def _thinks(self, body: ChatCompletionRequest, kwargs: Mapping[str, Any], prompt: str) -> bool:
        """Whether the answer begins with thoughts, as far as anybody knows."""
        reasoning = self._model.speech.reasoning
        if reasoning is None or body.continue_final_message:
            return False
        if {**self._model.template_kwargs, **kwargs}.get("enable_thinking") is False:
            return False
        return not prompt.rstrip().endswith(reasoning.end)
