"""Writes the synthetic chat corpus of the demo model, and the questions that test it.

Everything is drawn from a seeded generator: the same seed gives the same conversations.
Run ``python -P -m pdserve.demo.corpus`` to read a few of them.
"""

import re
from collections.abc import Iterator
from random import Random

from pdserve.demo.facts_parts import PARTS
from pdserve.demo.facts_serving import SERVING
from pdserve.demo.smalltalk import SMALL_TALK
from pdserve.demo.sums import NUMBER_TOPICS
from pdserve.demo.topic import Topic, Turn
from pdserve.demo.unknown import UNKNOWN_TOPICS
from pdserve.demo.wordplay import WORD_TOPICS

Message = dict[str, str]  # {"role": ..., "content": ...}
Conversation = list[Message]

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are the demo model of pdserve.",
    "You are a friendly assistant. Answer in short sentences.",
    "Be brief.",
    "You are a chatbot.",
    "You are a helpful, harmless and honest assistant.",
    "You are a helpful assistant. Answer in one sentence. If you do not know, say so.",
    "Answer in English. Do not use lists.",
    "The user is new to pdserve. Explain simply and politely.",
    "You are an expert in distributed systems and language models. Help the user with questions.",
    "Always be polite.",
    "Reply as well as you can.",
    "Answer the question of the user.",
    "You are an AI assistant that answers questions about pdserve.",
    "",
)
LENGTHS = (1, 1, 1, 1, 2, 2, 3, 3, 4, 6)  # subjects of a conversation, before generic follow-ups

OPENINGS = (
    "Please: ", "Hey, ", "So, ", "OK. ", "Hm, ", "And ", "Hi, ", "Hello, ", "Question: ", "Well, ",
    "Tell me, ", "Quick question: ", "Now, ", "I wonder, ", "So ", "Good. ", "Hello! ", "Hi! ",
)  # fmt: skip
CLOSINGS = (", please", " please?", ", thanks", ", ok?")
THANKS = (
    "Thanks",
    "Thank you!",
    "thanks a lot",
    "OK, thanks.",
    "Thank you.",
    "thx",
    "Great, thanks!",
)
WELCOME = "You are welcome! Is there anything else?"
AGAIN = (
    "Say that again.", "Repeat that.", "Again", "Once more please", "Can you repeat that?", "What?",
    "Please say that again.", "Repeat your answer.", "Pardon?", "I did not hear you.",
    "Say it again.",
)  # fmt: skip
AGAIN_HELD = ("Could you say that again?", "Would you repeat your last answer?")
SHORTER = (
    "Shorter please", "Shorter", "In short?", "Can you make it shorter?", "Too long.", "Be brief.",
    "Make it shorter.", "In one sentence?", "Say it shorter.", "Shorter, please.",
    "A shorter answer",
    "TL;DR", "Can you say that in short?",
)  # fmt: skip
SHORTER_HELD = ("Please make that shorter.", "Could you say it shorter?")
WHY = (
    "Why?",
    "Why",
    "But why?",
    "Why is that?",
    "Why so?",
    "why is it so?",
    "And why?",
    "How come?",
)
WHY_HELD = ("Can you say why?", "What is the reason for that?")
NO_WHY = "I do not know why. I am only a small demo model."
ALREADY_SHORT = "I cannot make that shorter."


def all_topics() -> list[Topic]:
    """Every topic, in a fixed order."""
    return [*SMALL_TALK, *fact_topics(), *NUMBER_TOPICS, *WORD_TOPICS, *UNKNOWN_TOPICS]


def fact_topics() -> list[Topic]:
    """What there is to know about pdserve and serving."""
    return [concept.topic() for concept in (*PARTS, *SERVING)]


def conversations(seed: int) -> Iterator[Conversation]:
    """An endless stream of training conversations."""
    rng = Random(seed)
    topics = [topic for topic in all_topics() if topic.train]
    weights = [topic.weight for topic in topics]
    while True:
        turns: list[Turn] = []
        for topic in rng.choices(topics, weights, k=rng.choice(LENGTHS)):
            turns += _subject(rng, topic)
        system = rng.choice(SYSTEMS) if rng.random() < 0.35 else None
        yield to_messages(turns, system)


def to_messages(turns: list[Turn], system: str | None = None) -> Conversation:
    """``turns`` as chat messages, after a system message if there is one."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _subject(rng: Random, topic: Topic) -> list[Turn]:
    """A question of ``topic``, perhaps with follow-ups of its own and generic ones."""
    turns = [_vary(rng, topic.turn(rng, topic.train), topic.noisy)]
    while topic.follow and rng.random() < 0.25:
        turns.append(_vary(rng, topic.turn(rng, topic.follow), topic.noisy))
    while rng.random() < 0.25:
        turns.append(_vary(rng, _generic(rng, turns[-1]), noisy=True))
    return turns


def _generic(rng: Random, last: Turn) -> Turn:
    """A follow-up that makes sense after any turn."""
    roll = rng.random()
    if roll < 0.15:
        return Turn("thanks", rng.choice(THANKS), WELCOME, ("welcome",))
    if roll < 0.5:
        return say_again(rng.choice(AGAIN), last)
    if roll < 0.75 and (last.short or rng.random() < 0.3):
        return shorter(rng.choice(SHORTER), last)
    if last.why or rng.random() < 0.3:
        return explain_why(rng.choice(WHY), last)
    return say_again(rng.choice(AGAIN), last)


def say_again(question: str, last: Turn) -> Turn:
    """The answer of ``last`` once more."""
    return Turn("say again", question, last.answer, last.must, last.short, last.why)


def shorter(question: str, last: Turn) -> Turn:
    """The short answer of ``last``, or a word that there is none."""
    answer = last.short or ALREADY_SHORT
    return Turn("shorter", question, answer, (answer.lower(),), "", last.why)


def explain_why(question: str, last: Turn) -> Turn:
    """The reason that ``last`` knows, or a word that there is none."""
    answer = last.why or NO_WHY
    return Turn("why", question, answer, (answer.lower(),))


def _vary(rng: Random, turn: Turn, noisy: bool) -> Turn:
    """The turn with its question as people type it: case, courtesy, marks and slips."""
    question = turn.question
    roll = rng.random()
    if roll < 0.08 and len(question) > 8:
        question = rng.choice(OPENINGS) + question
    elif roll < 0.13 and len(question) > 8:
        question = question.rstrip(".?!") + rng.choice(
            (", please", " please?", ", thanks", ", ok?")
        )
    if rng.random() < 0.35:
        question = question.rstrip(".?!") or question
    case = rng.random()
    if case < 0.35:
        question = question.lower()
    elif case < 0.39 and noisy:
        question = question.upper()
    if noisy and rng.random() < 0.08:
        question = _slip(rng, question)
    return Turn(turn.kind, question, turn.answer, turn.must, turn.short, turn.why)


def as_typed(phrasings: tuple[str, ...]) -> set[str]:
    """Every form that ``_vary`` may give to ``phrasings``, slips aside, made equal by ``bare``."""
    return {
        bare(opening + phrasing.rstrip(".?!") + closing)
        for phrasing in phrasings
        for opening in ("", *OPENINGS)
        for closing in ("", *CLOSINGS)
    }


def bare(text: str) -> str:
    """``text`` in lower case and without marks, to compare phrasings."""
    return " ".join(re.findall(r"[a-z0-9{}+*/=-]+", text.lower()))


def _slip(rng: Random, text: str) -> str:
    """One typing error inside ``text``: a letter lost, doubled or swapped with the next."""
    if len(text) < 10:
        return text
    place = rng.randrange(3, len(text) - 2)
    if not text[place : place + 2].isalpha():
        return text
    middle = rng.choice(("", text[place] * 2, text[place + 1] + text[place]))
    skip = 2 if len(middle) == 2 and middle[0] != middle[1] else 1
    return text[:place] + middle + text[place + skip :]


def held_out(seed: int, per_topic: int) -> list[tuple[Conversation, Turn]]:
    """Test cases in phrasings the corpus never uses: the messages before, and the turn to judge."""
    rng = Random(seed)
    cases: list[tuple[Conversation, Turn]] = []
    for topic in all_topics():
        for _ in range(per_topic if topic.held else 0):
            cases.append(([], topic.turn(rng, topic.held)))
    facts = fact_topics()
    follow_ups = [topic for topic in (*NUMBER_TOPICS, *WORD_TOPICS) if topic.follow]
    for _ in range(3 * per_topic):
        fact = rng.choice(facts)
        first = fact.turn(rng, fact.train)
        before = to_messages([first])
        cases.append((before, say_again(rng.choice(AGAIN_HELD), first)))
        cases.append((before, shorter(rng.choice(SHORTER_HELD), first)))
        cases.append((before, explain_why(rng.choice(WHY_HELD), first)))
        topic = rng.choice(follow_ups)
        follow = topic.turn(rng, topic.follow)
        turn = Turn("follow-up", follow.question, follow.answer, follow.must)
        cases.append((to_messages([topic.turn(rng, topic.train)]), turn))
    return cases


def main() -> None:
    """Print a few conversations."""
    stream = conversations(0)
    for _ in range(8):
        for message in next(stream):
            print(f"{message['role']:>9}: {message['content']}")
        print()


if __name__ == "__main__":
    main()
