"""Skills with words: spelling, lists, colours, capitals, opposites, days and months."""

from collections.abc import Sequence
from random import Random

from pdserve.demo.topic import Fill, Topic
from pdserve.demo.unknown import made_up
from pdserve.demo.words import (
    CAPITALS,
    COLOURS,
    DAYS,
    LISTS,
    MONTHS,
    OPPOSITES,
    SOUNDS,
    SPELLING,
    UNKNOWN_COUNTRIES,
)

NO_CAPITAL = "I do not know the capital of {x}. I only know some countries."
NO_COLOUR = "I do not know the colour of {x}."


def listing(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return ", ".join(items[:-1]) + " and " + items[-1]


def _spell(rng: Random) -> Fill:
    word = made_up(rng)[:8] if rng.random() < 0.1 else rng.choice(SPELLING)
    answer = "-".join(word)
    return Fill(f"{word} is spelled {answer}.", (f" {answer}.",), {"w": word})


def _first_letter(rng: Random) -> Fill:
    word = rng.choice(SPELLING)
    return Fill(
        f"The first letter of {word} is {word[0]}.", (f"{word} is {word[0]}.",), {"w": word}
    )


def _last_letter(rng: Random) -> Fill:
    word = rng.choice(SPELLING)
    return Fill(
        f"The last letter of {word} is {word[-1]}.", (f"{word} is {word[-1]}.",), {"w": word}
    )


def _letters(rng: Random) -> Fill:
    word = rng.choice(SPELLING)
    answer = f"{word} has {len(word)} letters: {'-'.join(word)}."
    return Fill(answer, (f"has {len(word)} letters",), {"w": word})


def _list(rng: Random) -> Fill:
    name = rng.choice(tuple(LISTS))
    intro, items = LISTS[name]
    return Fill(f"{intro} {listing(items)}.", tuple(i.lower() for i in items), {"x": name})


def _how_many(rng: Random) -> Fill:
    name = rng.choice(("days of the week", "months of the year", "seasons", "planets", "vowels"))
    count = len(LISTS[name][1])
    return Fill(f"There are {count} {name}.", (f"are {count} ",), {"x": name})


def _units(rng: Random) -> Fill:
    part, whole, count = rng.choice((
        ("days", "a week", 7), ("months", "a year", 12), ("hours", "a day", 24),
        ("minutes", "an hour", 60), ("seconds", "a minute", 60), ("days", "a year", 365),
        ("seasons", "a year", 4), ("letters", "the alphabet", 26), ("weeks", "a year", 52),
    ))  # fmt: skip
    answer = f"There are {count} {part} in {whole}."
    return Fill(answer, (answer.lower(),), {"x": part, "y": whole})


def _capital(rng: Random) -> Fill:
    country = rng.choice(tuple(CAPITALS))
    capital = CAPITALS[country]
    return Fill(f"The capital of {country} is {capital}.", (capital.lower(),), {"x": country})


def _no_capital(rng: Random) -> Fill:
    country = rng.choice(UNKNOWN_COUNTRIES)
    if rng.random() < 0.5:
        country = made_up(rng).capitalize()
    return Fill(NO_CAPITAL.format(x=country), ("do not know",), {"x": country})


def _country(rng: Random) -> Fill:
    country, capital = rng.choice(tuple(CAPITALS.items()))
    return Fill(f"{capital} is the capital of {country}.", (country.lower(),), {"x": capital})


def _colour(rng: Random) -> Fill:
    thing = rng.choice(tuple(COLOURS))
    colour = COLOURS[thing]
    verb = "is usually" if thing.startswith(("a ", "an ")) else "is"
    answer = f"{thing[0].upper()}{thing[1:]} {verb} {colour}."
    return Fill(answer, (colour,), {"x": thing})


def _no_colour(rng: Random) -> Fill:
    thing = rng.choice(("a ", "the ", "")) + made_up(rng)
    return Fill(NO_COLOUR.format(x=thing), ("do not know",), {"x": thing})


def _things_of_colour(rng: Random) -> Fill:
    colour = rng.choice(("red", "green", "blue", "yellow", "white", "black", "brown", "orange"))
    things = [thing for thing, its in COLOURS.items() if its == colour][:2]
    first, *rest = things
    answer = f"{first[0].upper()}{first[1:]} is {colour}, and {rest[0]} too."
    return Fill(answer, (first.lower(),), {"x": colour})


def _opposite(rng: Random) -> Fill:
    one, other = rng.choice(tuple(OPPOSITES.items()))
    if rng.random() < 0.5:
        one, other = other, one
    return Fill(f"The opposite of {one} is {other}.", (f"is {other}.",), {"x": one})


def _sound(rng: Random) -> Fill:
    animal = rng.choice(tuple(SOUNDS))
    answer = f"{animal[0].upper()}{animal[1:]} says {SOUNDS[animal]}."
    return Fill(answer, (SOUNDS[animal],), {"x": animal})


def _next_day(rng: Random) -> Fill:
    place = rng.randrange(7)
    day, after = DAYS[place], DAYS[(place + 1) % 7]
    return Fill(f"After {day} comes {after}.", (after.lower(),), {"x": day})


def _day_before(rng: Random) -> Fill:
    place = rng.randrange(7)
    day, before = DAYS[place], DAYS[place - 1]
    return Fill(f"Before {day} comes {before}.", (f"comes {before.lower()}",), {"x": day})


def _next_month(rng: Random) -> Fill:
    place = rng.randrange(12)
    month, after = MONTHS[place], MONTHS[(place + 1) % 12]
    return Fill(f"After {month} comes {after}.", (after.lower(),), {"x": month})


def _month_before(rng: Random) -> Fill:
    place = rng.randrange(12)
    month, before = MONTHS[place], MONTHS[place - 1]
    return Fill(f"Before {month} comes {before}.", (f"comes {before.lower()}",), {"x": month})


def _repeat(rng: Random) -> Fill:
    words = rng.sample(SPELLING, rng.randint(1, 3))
    text = " ".join(words)
    return Fill(f"{text[0].upper()}{text[1:]}.", (text,), {"x": text})


WORD_TOPICS = (
    Topic(
        "spelling",
        (
            "Spell {w}.", "How do you spell {w}?", "How is {w} spelled?", "Spell the word {w}.",
            "Can you spell {w}?", "Spelling of {w}", "Please spell {w}.", "How do I spell {w}?",
            "Spell \"{w}\".", "What is the spelling of {w}?", "Spell out {w}.",
            "How is {w} written?",
        ),
        ("Could you spell {w} for me?", "Tell me how to spell {w}.", "How would you spell {w}?"),
        _spell,
        follow=("And {w}?", "Now spell {w}.", "And how do you spell {w}?"),
        weight=6.0,
        noisy=False,
    ),
    Topic(
        "first letter",
        (
            "What is the first letter of {w}?", "Which letter does {w} begin with?",
            "First letter of {w}", "What letter does {w} start with?", "How does {w} begin?",
            "Which is the first letter of {w}?", "{w} starts with which letter?",
        ),
        ("Tell me the first letter of {w}.", "With which letter does {w} begin?"),
        _first_letter,
        follow=("And of {w}?",),
        weight=2.0,
        noisy=False,
    ),
    Topic(
        "last letter",
        (
            "What is the last letter of {w}?", "Which letter does {w} end with?",
            "Last letter of {w}", "What letter does {w} end with?", "How does {w} end?",
            "Which is the last letter of {w}?", "{w} ends with which letter?",
        ),
        ("Tell me the last letter of {w}.", "With which letter does {w} end?"),
        _last_letter,
        follow=("And of {w}?",),
        weight=2.0,
        noisy=False,
    ),
    Topic(
        "number of letters",
        (
            "How many letters does {w} have?", "How many letters are in {w}?",
            "How long is the word {w}?",
            "How many letters has {w}?", "Count the letters of {w}.", "Number of letters in {w}?",
            "How many letters are there in {w}?", "Count the letters in {w}.",
        ),
        ("How many letters does the word {w} have?", "Tell me how many letters {w} has."),
        _letters,
        follow=("And {w}?",),
        weight=3.0,
        noisy=False,
    ),
    Topic(
        "repeat after me",
        (
            "Say {x}.", "Repeat after me: {x}", "Please say {x}.", "Repeat: {x}", "Echo {x}",
            "Say the words {x}.", "Say \"{x}\".", "Write {x}.",
        ),
        ("Can you say {x}?",),
        _repeat,
        weight=2.0,
        noisy=False,
    ),
    Topic(
        "lists",
        (
            "List the {x}.", "Name the {x}.", "What are the {x}?", "Tell me the {x}.",
            "Give me the {x}.",
            "Can you list the {x}?", "Can you name some {x}?", "Name some {x}.", "List some {x}.",
            "Give me a list of {x}.", "Which {x} are there?", "Which {x} do you know?", "{x}",
            "Give me some {x}.", "Tell me some {x}.", "What {x} are there?", "Write a list of {x}.",
            "Name a few {x}.", "Give me five {x}.", "Name five {x}.", "What are some {x}?",
        ),
        (
            "Could you list the {x}?", "Which {x} can you name?", "Make a list of {x}.",
        ),
        _list,
        follow=("And the {x}?", "And {x}?", "Now the {x}.", "And which {x} are there?"),
        weight=6.0,
    ),
    Topic(
        "how many",
        (
            "How many {x} are there?", "What is the number of {x}?", "How many {x} do you know?",
            "How many {x} exist?", "Count the {x}.",
        ),
        ("Tell me how many {x} there are.", "How many {x} are there in all?"),
        _how_many,
        weight=1.5,
    ),
    Topic(
        "units",
        (
            "How many {x} are in {y}?", "How many {x} does {y} have?", "How many {x} has {y}?",
            "How many {x} are there in {y}?", "{y} has how many {x}?",
            "What is the number of {x} in {y}?",
        ),
        ("Do you know how many {x} {y} has?",),
        _units,
        follow=("And how many {x} in {y}?", "And {x} in {y}?"),
        weight=2.0,
    ),
    Topic(
        "capital",
        (
            "What is the capital of {x}?", "What's the capital of {x}?", "Capital of {x}?",
            "Tell me the capital of {x}.", "Which city is the capital of {x}?", "capital of {x}",
            "Name the capital of {x}.", "Do you know the capital of {x}?", "What is {x}'s capital?",
            "Can you tell me the capital of {x}?", "What is the capital city of {x}?",
            "The capital of {x} is", "Which is the capital of {x}?", "{x} capital",
        ),
        (
            "Which city is {x}'s capital?",
            "What city is the capital of {x}?",
        ),
        _capital,
        follow=(
            "And of {x}?", "And {x}?", "What about {x}?", "And the capital of {x}?", "Of {x}?",
            "And what is the capital of {x}?", "And for {x}?", "How about {x}?", "and in {x}?",
        ),
        weight=6.0,
        noisy=False,
    ),
    Topic(
        "unknown capital",
        (
            "What is the capital of {x}?", "What's the capital of {x}?", "Capital of {x}?",
            "Tell me the capital of {x}.", "Which city is the capital of {x}?",
            "Name the capital of {x}.", "Do you know the capital of {x}?",
        ),
        ("Could you name the capital of {x}?",),
        _no_capital,
        weight=3.0,
        noisy=False,
    ),
    Topic(
        "country of a capital",
        (
            "{x} is the capital of which country?", "Which country has the capital {x}?",
            "What country is {x} the capital of?", "Of which country is {x} the capital?",
            "In which country is {x}?", "Which country is {x} in?", "Where is {x}?",
        ),
        ("{x} is the capital of what?", "In what country is {x}?"),
        _country,
        follow=("And {x}?",),
        weight=3.0,
        noisy=False,
    ),
    Topic(
        "colour",
        (
            "What colour is {x}?", "What color is {x}?", "What is the colour of {x}?",
            "Which colour is {x}?", "Tell me the colour of {x}.", "What is the color of {x}?",
            "Which color does {x} have?", "What colour does {x} have?", "Colour of {x}?",
            "Do you know the colour of {x}?", "What colour has {x}?",
        ),
        ("Can you tell me the colour of {x}?", "Which color is {x}?"),
        _colour,
        follow=("And {x}?", "And what colour is {x}?", "What about {x}?"),
        weight=5.0,
    ),
    Topic(
        "unknown colour",
        ("What colour is {x}?", "What color is {x}?", "What is the colour of {x}?"),
        ("Can you tell me the colour of {x}?",),
        _no_colour,
        weight=1.0,
        noisy=False,
    ),
    Topic(
        "things of a colour",
        (
            "What is {x}?", "What things are {x}?", "Name something {x}.",
            "Tell me something that is {x}.",
            "Name a {x} thing.", "What do you know that is {x}?", "Give me something {x}.",
        ),
        ("Name a thing that is {x}.", "Which things are {x}?"),
        _things_of_colour,
        weight=1.5,
        noisy=False,
    ),
    Topic(
        "opposite",
        (
            "What is the opposite of {x}?", "Opposite of {x}?", "What's the opposite of {x}?",
            "Tell me the opposite of {x}.", "Name the opposite of {x}.", "opposite of {x}",
            "Which word is the opposite of {x}?", "What is the contrary of {x}?",
        ),
        ("Can you tell me the opposite of {x}?", "What word is the opposite of {x}?"),
        _opposite,
        follow=("And of {x}?", "And the opposite of {x}?"),
        weight=4.0,
        noisy=False,
    ),
    Topic(
        "animal sounds",
        (
            "What does {x} say?", "What sound does {x} make?", "How does {x} sound?",
            "Which sound does {x} make?", "What noise does {x} make?", "How goes {x}?",
        ),
        ("Tell me what {x} says.", "Which noise does {x} make?"),
        _sound,
        follow=("And {x}?", "What about {x}?"),
        weight=2.0,
    ),
    Topic(
        "next day",
        (
            "What day comes after {x}?", "Which day follows {x}?", "What comes after {x}?",
            "Which day comes after {x}?", "What is the day after {x}?",
            "Today is {x}. What is tomorrow?",
            "If today is {x}, what day is tomorrow?", "What day follows {x}?", "After {x} comes?",
        ),
        ("Which day is after {x}?", "What is the next day after {x}?"),
        _next_day,
        follow=("And after {x}?",),
        weight=2.0,
    ),
    Topic(
        "day before",
        (
            "What day comes before {x}?", "Which day is before {x}?", "What comes before {x}?",
            "Today is {x}. What was yesterday?", "What is the day before {x}?", "Before {x} comes?",
        ),
        ("Which day comes before {x}?", "What day is before {x}?"),
        _day_before,
        follow=("And before {x}?",),
        weight=1.5,
    ),
    Topic(
        "next month",
        (
            "What month comes after {x}?", "Which month follows {x}?", "What comes after {x}?",
            "What is the month after {x}?", "What is the next month after {x}?", "After {x} comes?",
        ),
        ("Which month comes after {x}?", "What month follows {x}?"),
        _next_month,
        follow=("And after {x}?",),
        weight=2.0,
    ),
    Topic(
        "month before",
        (
            "What month comes before {x}?", "Which month is before {x}?", "What comes before {x}?",
            "What is the month before {x}?", "Before {x} comes?",
        ),
        ("Which month comes before {x}?", "What month is before {x}?"),
        _month_before,
        follow=("And before {x}?",),
        weight=1.5,
    ),
)  # fmt: skip
