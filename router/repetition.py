"""Answers that run in circles: the same tokens over and over."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.router.errors import BadRequest
from pdserve.router.schemas import RepetitionDetection

REASON, DETECTED = "repetition", "repetition_detected"
"""`finish_reason` and `stop_reason` of such an answer."""
MAX_PATTERN = 256


@dataclass(frozen=True, slots=True)
class Repetition:
    """An answer ends when the last tokens are one pattern, so often."""

    shortest: int
    """Tokens of a pattern, at least 1."""
    longest: int
    count: int
    """At least 2."""


def repetition_of(given: RepetitionDetection | None) -> Repetition | None:
    """None: nothing is looked for. Raises BadRequest."""
    if given is None or not given.max_pattern_size:
        return None
    longest, shortest = given.max_pattern_size, given.min_pattern_size or 1
    count = given.min_count or 0
    if not 1 <= longest <= MAX_PATTERN:
        raise _bad("max_pattern_size", f"must be in [0, {MAX_PATTERN}]", longest)
    if not 1 <= shortest <= longest:
        raise _bad("min_pattern_size", f"must be in [0, max_pattern_size={longest}]", shortest)
    if count < 2:
        raise _bad("min_count", "must be at least 2", count)
    return Repetition(shortest, longest, count)


def _bad(member: str, rule: str, value: int) -> BadRequest:
    name = "repetition_detection"
    return BadRequest(f"{name}.{member} {rule}, got {value}.", param=name)


class RepetitionScanner:
    """Follows one answer. A token costs a comparison for each size of a pattern."""

    __slots__ = ("_equal", "_recent", "_rule")

    def __init__(self, rule: Repetition) -> None:
        self._rule = rule
        self._recent: list[int] = []
        """The last tokens, the newest first."""
        self._equal = [0] * (rule.longest + 1)
        """For each distance, how many of the newest tokens in a row equal those so far before."""

    def feed(self, token_id: int) -> bool:
        """Whether the pattern has now come so often."""
        rule, recent, equal = self._rule, self._recent, self._equal
        found = False
        for size in range(rule.shortest, min(rule.longest, len(recent)) + 1):
            equal[size] = equal[size] + 1 if recent[size - 1] == token_id else 0
            found = found or equal[size] >= size * (rule.count - 1)
        recent.insert(0, token_id)
        del recent[rule.longest :]
        return found
