"""What the demo corpus is made of: topics, each with its phrasings and a way to draw an answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class Fill:
    """One drawn case of a topic: what goes into the phrasing, and what must come back.

    ``must`` are lower-case strings that a right answer contains, each of them. ``short`` and
    ``why`` are the answers to "shorter please" and "why?", empty where the topic has none.
    """

    answer: str
    must: tuple[str, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    short: str = ""
    why: str = ""


@dataclass(frozen=True)
class Turn:
    """One question and its answer inside a conversation."""

    kind: str
    question: str
    answer: str
    must: tuple[str, ...]
    short: str = ""
    why: str = ""


@dataclass(frozen=True)
class Topic:
    """A kind of question.

    ``train`` are phrasings for the corpus and ``held`` phrasings kept for the evaluation only;
    ``follow`` are phrasings that make sense only straight after a turn of the same topic.
    ``noisy`` says whether a typing error in the question leaves its answer as it was.
    """

    kind: str
    train: tuple[str, ...]
    held: tuple[str, ...]
    draw: Callable[[Random], Fill]
    follow: tuple[str, ...] = ()
    weight: float = 1.0
    noisy: bool = True

    def turn(self, rng: Random, phrasings: tuple[str, ...]) -> Turn:
        """Draw one case and put it into one of ``phrasings``."""
        fill = self.draw(rng)
        question = rng.choice(phrasings).format(**fill.fields)
        return Turn(self.kind, question, fill.answer, fill.must, fill.short, fill.why)


def constant(answer: str, *must: str, short: str = "", why: str = "") -> Callable[[Random], Fill]:
    """A ``draw`` for a topic with one answer."""
    fill = Fill(answer, must, short=short, why=why)
    return lambda rng: fill


def one_of(answers: tuple[str, ...], *must: str) -> Callable[[Random], Fill]:
    """A ``draw`` for a topic where any of ``answers`` will do."""
    return lambda rng: Fill(rng.choice(answers), must)
