"""Fixed questions with what their answers must contain, for the tests and for ``make demo``.

None of them needs more than what the demo model was trained to do; matching is in lower case.
"""

Question = tuple[str, tuple[str, ...]]  # the question, and strings that its answer contains

SHOWCASE: tuple[Question, ...] = (
    ("Who are you?", ("demo model", "pdserve")),
    ("What does a prefill worker do?", ("prompt", "kv cache")),
    ("What is 7 + 8?", ("15",)),
    ("What is the capital of Italy?", ("rome",)),
    (
        "Explain disaggregated serving in detail.",
        ("router", "prefill worker", "kv cache", "decode worker"),
    ),
)

QUESTIONS: tuple[Question, ...] = (
    *SHOWCASE,
    ("Hello!", ("hello",)),
    ("How are you?", ("fine",)),
    ("What can you do?", ("pdserve", "sums")),
    ("Thank you!", ("welcome",)),
    ("Goodbye", ("goodbye",)),
    ("What is pdserve?", ("pdserve", "prefill", "decode")),
    ("What is the router?", ("router", "worker")),
    ("What is a decode worker?", ("token", "kv cache")),
    ("What is the KV cache?", ("keys", "values")),
    ("What is a block table?", ("block", "request")),
    ("What is KV transfer?", ("prefill", "decode", "tcp")),
    ("What is NCCL?", ("nccl", "gpu")),
    ("Why does pdserve use Redis?", ("redis", "workers")),
    ("What does TTFT stand for?", ("time to first token",)),
    ("What is ITL?", ("inter-token latency",)),
    ("What is TPOT?", ("time per output token",)),
    ("What is continuous batching?", ("batch", "step")),
    ("What is chunked prefill?", ("prompt", "pieces")),
    ("What is the prefix cache?", ("prompt", "blocks")),
    ("What is preemption?", ("memory", "later")),
    ("Why split prefill and decode?", ("compute", "memory")),
    ("When should I colocate?", ("one gpu",)),
    ("How do I start pdserve?", ("make serve",)),
    ("What happens when a worker dies?", ("another worker",)),
    ("What is 12 - 5?", ("= 7.",)),
    ("What is 6 times 7?", ("= 42.",)),
    ("Which is larger, 3 or 9?", ("9 is larger",)),
    ("Is 7 even or odd?", ("odd",)),
    ("Count to 5.", ("1, 2, 3, 4, 5.",)),
    ("How do you spell water?", ("w-a-t-e-r",)),
    ("How many letters does house have?", ("5 letters",)),
    ("List the days of the week.", ("monday", "wednesday", "sunday")),
    ("What are the seasons?", ("spring", "summer", "autumn", "winter")),
    ("What colour is the sky?", ("blue",)),
    ("What is the capital of Japan?", ("tokyo",)),
    ("What is the opposite of hot?", ("cold",)),
    ("Which day comes after Friday?", ("saturday",)),
    ("Tell me a long story.", ("once upon a time", "the end")),
    ("Who wrote Hamlet?", ("do not know",)),
    ("What is photosynthesis?", ("do not know",)),
)

# A conversation: each question after the answers to those before it.
FOLLOW_UPS: tuple[Question, ...] = (
    ("What is the capital of France?", ("paris",)),
    ("And of Italy?", ("rome",)),
    ("Thanks!", ("welcome",)),
    ("What is the router?", ("router", "worker")),
    ("Shorter please", ("picks the workers",)),
    ("Why?", ("because",)),
)


def answers(text: str, must: tuple[str, ...]) -> bool:
    """Whether ``text`` contains every string of ``must``, in any case of letters."""
    lower = text.lower()
    return all(part in lower for part in must)
