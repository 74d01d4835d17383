"""A thing to know, and the phrasings in which people ask about any thing."""

from dataclasses import dataclass
from random import Random

from pdserve.demo.topic import Fill, Topic

# Phrasings shared by every concept, and by the unknown things of pdserve.demo.unknown: what
# decides between an answer and "I do not know" is the name alone.
ASK = (
    "What is {x}?",
    "What is {x}?",
    "What's {x}?",
    "Explain {x}.",
    "Explain {x} to me.",
    "Tell me about {x}.",
    "Define {x}.",
    "What does {x} mean?",
    "Can you explain {x}?",
    "Can you explain what {x} is?",
    "Describe {x}.",
    "{x}?",
    "{x}",
    "What is meant by {x}?",
    "I want to know about {x}.",
    "Could you tell me what {x} is?",
    "Do you know what {x} is?",
    "Do you know {x}?",
    "Give me a definition of {x}.",
    "I do not understand {x}.",
    "Help me understand {x}.",
    "What exactly is {x}?",
    "What do you know about {x}?",
    "Please tell me more about {x}.",
    "I have a question about {x}.",
    "Say something about {x}.",
    "Teach me about {x}.",
    "What about {x}?",
    "Hi, what is {x}?",
    "How would you explain {x}?",
)
ASK_HELD = (
    "Could you describe {x} for me?",
    "I would like to learn about {x}.",
    "So what is {x} exactly?",
    "What do people mean by {x}?",
    "Can you tell me about {x}?",
)
ASK_IN_DOMAIN = (
    "What is {x} in pdserve?",
    "What is {x} for?",
    "What is {x} good for?",
    "How does {x} work?",
    "What does {x} do?",
    "Why do we need {x}?",
)
ASK_FOLLOW = ("And {x}?", "And what is {x}?", "What about {x}?", "OK, and {x}?", "Now explain {x}.")


@dataclass(frozen=True)
class Concept:
    """One thing to know: its names, its answer, what an answer must say, more ways to ask."""

    kind: str
    names: tuple[str, ...]
    answer: str
    must: tuple[str, ...]
    short: str
    why: str
    train: tuple[str, ...] = ()
    held: tuple[str, ...] = ()

    def draw(self, rng: Random) -> Fill:
        """Any of the names, always the same answer."""
        name = rng.choice(self.names)
        return Fill(self.answer, self.must, {"x": name}, self.short, self.why)

    def topic(self) -> Topic:
        """The topic: shared phrasings if the thing has a name, and its own ones."""
        own = self.train * (3 if self.names else 1)
        shared = ASK + ASK_IN_DOMAIN if self.names else ()
        held = (ASK_HELD if self.names else ()) + self.held * 2
        follow = ASK_FOLLOW if self.names else ()
        draw = self.draw if self.names else self._draw_nameless
        return Topic(self.kind, shared + own, held, draw, follow)

    def _draw_nameless(self, rng: Random) -> Fill:
        return Fill(self.answer, self.must, {}, self.short, self.why)
