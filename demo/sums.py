"""Skills with numbers: sums, comparing, counting."""

from random import Random

from pdserve.demo.topic import Fill, Topic

LARGEST = 20  # sums and differences go up to 20 and 20
LARGEST_FACTOR = 10
TOO_BIG = (
    "Those numbers are too big for me. I can add and subtract up to 20, and multiply up to 10."
)


def _sum(rng: Random) -> Fill:
    a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    return Fill(f"{a} + {b} = {a + b}.", (f"= {a + b}.",), {"a": str(a), "b": str(b)})


def _difference(rng: Random) -> Fill:
    a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    if rng.random() < 0.7:
        a, b = max(a, b), min(a, b)
    return Fill(f"{a} - {b} = {a - b}.", (f"= {a - b}.",), {"a": str(a), "b": str(b)})


def _product(rng: Random) -> Fill:
    a, b = rng.randint(0, LARGEST_FACTOR), rng.randint(0, LARGEST_FACTOR)
    return Fill(f"{a} * {b} = {a * b}.", (f"= {a * b}.",), {"a": str(a), "b": str(b)})


def _quotient(rng: Random) -> Fill:
    b, c = rng.randint(1, LARGEST_FACTOR), rng.randint(0, LARGEST_FACTOR)
    return Fill(f"{b * c} / {b} = {c}.", (f"= {c}.",), {"a": str(b * c), "b": str(b)})


def _too_big(rng: Random) -> Fill:
    top = rng.choice((100, 1000, 100_000))
    a, b = str(rng.randint(21, top)), str(rng.randint(21, top))
    return Fill(TOO_BIG, ("too big",), {"a": a, "b": b})


def _larger(rng: Random) -> Fill:
    a, b = rng.sample(range(101 if rng.random() < 0.5 else 21), 2)
    answer = f"{max(a, b)} is larger than {min(a, b)}."
    return Fill(answer, (answer,), {"a": str(a), "b": str(b)})


def _smaller(rng: Random) -> Fill:
    a, b = rng.sample(range(101 if rng.random() < 0.5 else 21), 2)
    answer = f"{min(a, b)} is smaller than {max(a, b)}."
    return Fill(answer, (answer,), {"a": str(a), "b": str(b)})


def _parity(rng: Random) -> Fill:
    number = rng.randint(0, 100)
    word = "odd" if number % 2 else "even"
    return Fill(f"{number} is {word}.", (f"is {word}",), {"a": str(number)})


def _count_to(rng: Random) -> Fill:
    top = rng.randint(2, 20)
    answer = ", ".join(map(str, range(1, top + 1))) + "."
    return Fill(answer, (answer,), {"a": str(top)})


def _count_between(rng: Random) -> Fill:
    low = rng.randint(0, 15)
    high = rng.randint(low + 2, 20)
    answer = ", ".join(map(str, range(low, high + 1))) + "."
    return Fill(answer, (answer,), {"a": str(low), "b": str(high)})


def _count_down(rng: Random) -> Fill:
    top = rng.randint(3, 20)
    answer = ", ".join(map(str, range(top, -1, -1))) + "."
    return Fill(answer, (answer,), {"a": str(top)})


def _next_number(rng: Random) -> Fill:
    number = rng.randint(0, 99)
    return Fill(f"After {number} comes {number + 1}.", (f"comes {number + 1}",), {"a": str(number)})


NUMBER_TOPICS = (
    Topic(
        "addition",
        (
            "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?",
            "{a} plus {b}", "How much is {a} plus {b}?", "Add {a} and {b}.", "{a}+{b}=",
            "What do you get when you add {a} and {b}?", "Compute {a} + {b}.", "{a} + {b} =",
            "Can you add {a} and {b}?", "What is the sum of {a} and {b}?", "Calculate {a} + {b}",
            "I have {a} apples and get {b} more. How many have I?", "How much is {a} + {b}?",
            "What's {a}+{b}?", "What is {a} and {b} together?", "Tell me what {a} plus {b} is.",
        ),
        (
            "Sum of {a} and {b}?",
            "Can you compute {a} + {b}?", "Tell me the sum of {a} and {b}.",
        ),
        _sum,
        follow=("And {a} + {b}?", "And {a} plus {b}?", "Now {a} + {b}", "What about {a} + {b}?"),
        weight=10.0,
        noisy=False,
    ),
    Topic(
        "subtraction",
        (
            "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?",
            "{a} minus {b}", "How much is {a} minus {b}?", "Subtract {b} from {a}.", "{a}-{b}=",
            "Take {b} away from {a}.", "Compute {a} - {b}.", "What do you get for {a} minus {b}?",
            "What is the difference of {a} and {b}?", "Calculate {a} - {b}", "{a} - {b} =",
            "I have {a} apples and eat {b}. How many are left?", "How much is {a} - {b}?",
            "What's {a}-{b}?", "Tell me what {a} minus {b} is.",
        ),
        (
            "Can you compute {a} - {b}?", "Can you subtract {b} from {a}?",
        ),
        _difference,
        follow=("And {a} - {b}?", "And {a} minus {b}?", "Now {a} - {b}", "What about {a} - {b}?"),
        weight=10.0,
        noisy=False,
    ),
    Topic(
        "multiplication",
        (
            "What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b}",
            "{a} times {b}", "How much is {a} times {b}?", "Multiply {a} by {b}.", "{a}*{b}=",
            "Multiply {a} and {b}.", "Compute {a} * {b}.", "What is the product of {a} and {b}?",
            "{a} * {b} = ?", "What is {a} multiplied by {b}?", "{a} × {b}", "What is {a} x {b}?",
        ),
        (
            "Can you compute {a} * {b}?", "Can you multiply {a} by {b}?",
        ),
        _product,
        follow=("And {a} * {b}?", "And {a} times {b}?", "Now {a} * {b}"),
        weight=5.0,
        noisy=False,
    ),
    Topic(
        "division",
        (
            "What is {a} / {b}?", "What is {a} divided by {b}?", "{a} / {b}", "{a}/{b}",
            "{a} : {b}",
            "{a} divided by {b}", "How much is {a} divided by {b}?", "Divide {a} by {b}.",
            "Compute {a} / {b}.", "{a} / {b} = ?", "What do you get when you divide {a} by {b}?",
        ),
        ("Can you compute {a} / {b}?", "Can you divide {a} by {b}?"),
        _quotient,
        follow=("And {a} / {b}?", "And {a} divided by {b}?"),
        weight=4.0,
        noisy=False,
    ),
    Topic(
        "sum too big",
        (
            "What is {a} + {b}?", "What is {a} times {b}?", "{a} * {b}", "{a}+{b}", "{a} - {b}",
            "How much is {a} plus {b}?", "Multiply {a} by {b}.", "What is {a} - {b}?",
            "Compute {a} * {b}.", "Add {a} and {b}.", "What is {a} minus {b}?", "{a} + {b} = ?",
        ),
        ("Can you multiply {a} by {b}?", "Can you compute {a} - {b}?"),
        _too_big,
        weight=2.0,
        noisy=False,
    ),
    Topic(
        "larger number",
        (
            "Which is larger, {a} or {b}?", "Which is bigger: {a} or {b}?",
            "{a} or {b}, what is more?",
            "What is larger, {a} or {b}?", "Which number is larger, {a} or {b}?",
            "What is more, {a} or {b}?", "Compare {a} and {b}.", "Which is greater, {a} or {b}?",
            "Is {a} larger than {b}?", "Is {a} bigger than {b}?", "max of {a} and {b}",
        ),
        ("Which number is bigger, {a} or {b}?", "What is greater, {a} or {b}?"),
        _larger,
        follow=("And {a} or {b}?",),
        weight=3.0,
        noisy=False,
    ),
    Topic(
        "smaller number",
        (
            "Which is smaller, {a} or {b}?", "What is smaller, {a} or {b}?",
            "What is less, {a} or {b}?",
            "Which number is smaller, {a} or {b}?", "Which is less, {a} or {b}?",
            "Is {a} smaller than {b}?", "Is {a} less than {b}?", "min of {a} and {b}",
        ),
        ("Which number is less, {a} or {b}?", "Which one is smaller, {a} or {b}?"),
        _smaller,
        weight=2.0,
        noisy=False,
    ),
    Topic(
        "even or odd",
        (
            "Is {a} even or odd?", "Is {a} even?", "Is {a} odd?", "Is {a} an even number?",
            "Is {a} an odd number?", "{a}: even or odd?", "even or odd: {a}",
            "Is the number {a} even or odd?", "Tell me if {a} is even.",
        ),
        ("Is {a} odd or even?", "Is the number {a} even?"),
        _parity,
        follow=("And {a}?", "What about {a}?"),
        weight=2.0,
        noisy=False,
    ),
    Topic(
        "count to",
        (
            "Count to {a}.", "Can you count to {a}?", "Please count to {a}.", "Count up to {a}.",
            "Count from 1 to {a}.", "Count from one to {a}.", "List the numbers up to {a}.",
            "Say the numbers from 1 to {a}.", "Write the numbers from 1 to {a}.", "count {a}",
        ),
        ("Could you count to {a} for me?", "I want you to count to {a}."),
        _count_to,
        weight=2.5,
        noisy=False,
    ),
    Topic(
        "count between",
        (
            "Count from {a} to {b}.", "Can you count from {a} to {b}?",
            "List the numbers from {a} to {b}.",
            "Write the numbers from {a} to {b}.", "Numbers from {a} to {b}", "Count {a} to {b}",
        ),
        ("Could you count from {a} up to {b}?",),
        _count_between,
        weight=2.5,
        noisy=False,
    ),
    Topic(
        "count down",
        (
            "Count down from {a}.", "Can you count down from {a}?", "Count backwards from {a}.",
            "Count down from {a} to 0.", "Countdown from {a}", "Count from {a} down to zero.",
        ),
        ("Could you count backwards from {a}?",),
        _count_down,
        weight=2.0,
        noisy=False,
    ),
    Topic(
        "next number",
        (
            "What comes after {a}?", "Which number comes after {a}?", "What number follows {a}?",
            "What is the next number after {a}?", "What is the number after {a}?",
        ),
        ("Which number follows {a}?", "What number is after {a}?"),
        _next_number,
        follow=("And after {a}?",),
        weight=2.0,
        noisy=False,
    ),
)  # fmt: skip
