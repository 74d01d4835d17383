"""Tests the demo model on phrasings that it was not trained on.

``python -P -m pdserve.demo.evaluate`` prints right answers per kind of question, and exits with 1
where fewer than ``--threshold`` of all answers are right.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

from pdserve.demo import model_path
from pdserve.demo.ask import Asker
from pdserve.demo.corpus import Conversation, held_out
from pdserve.demo.questions import answers
from pdserve.demo.topic import Turn

Case = tuple[Conversation, Turn]  # the messages before, and the turn to judge
BATCH = 32  # questions answered together


def judge(asker: Asker, cases: list[Case]) -> list[tuple[Turn, str]]:
    """Each case's turn with the answer of the model, similar lengths answered together."""
    judged: list[tuple[Turn, str]] = []
    ordered = sorted(cases, key=lambda case: len(case[1].answer))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        asked = [[*before, {"role": "user", "content": turn.question}] for before, turn in part]
        replies = asker.ask(asked)
        judged += [(turn, reply) for (_, turn), reply in zip(part, replies, strict=True)]
        print(f"\r{len(judged)}/{len(cases)} asked", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return judged


def report(judged: list[tuple[Turn, str]], show_wrong: bool) -> float:
    """Print the table and return the share of right answers, 0 to 1."""
    total = Counter(turn.kind for turn, _ in judged)
    right = Counter(turn.kind for turn, reply in judged if answers(reply, turn.must))
    for kind in sorted(total):
        print(f"{kind:24} {right[kind]:4}/{total[kind]}")
    share = right.total() / total.total()
    print(
        f"{'all ' + str(len(total)) + ' kinds':24} {right.total():4}/{total.total()} = {share:.1%}"
    )
    if show_wrong:
        for turn, reply in judged:
            if not answers(reply, turn.must):
                print(f"[{turn.kind}] {turn.question!r} -> {reply!r}, not {turn.answer!r}")
    return share


def main() -> int:
    """Evaluate and say by the exit status whether the model is good enough."""
    parser = argparse.ArgumentParser(description="Test the demo model on held-out questions.")
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--threshold", type=float, default=0.9, help="least share of right answers")
    parser.add_argument("--per-topic", type=int, default=8, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judged = judge(Asker(args.model), held_out(args.seed, args.per_topic))
    return 0 if report(judged, args.wrong) >= args.threshold else 1


if __name__ == "__main__":
    sys.exit(main())
