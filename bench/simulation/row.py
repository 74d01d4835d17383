"""Equal steps one after the other, whose pace may change before they are over."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.bench.simulation.profile import StepTimes


@dataclass(frozen=True, slots=True)
class Content:
    """Of a step: see StepTimes."""

    tokens: int = 0
    """Of prompts; with any of them there is only one step."""
    pairs: float = 0.0
    prompts: int = 0
    requests: int = 0
    context: int = 0

    def seconds(self, times: StepTimes, skipped: int, steps: int) -> float:
        """Of `steps` steps, if `skipped` came before them."""
        if self.prompts:
            return steps * times.mixed_s(
                self.tokens, self.pairs, self.prompts, self.requests, self.context
            )
        return times.decode_s(self.requests, self.context + self.requests * skipped, steps)


@dataclass(slots=True)
class Row:
    """The steps that a worker computes before anything can happen to its requests."""

    content: Content
    steps: int
    times: StepTimes
    """How long they take as things stand."""
    since: float
    """When that began to be so; in the future, if they have not begun."""
    done: int = 0
    """Steps that were over by then."""
    part: float = 0.0
    """What of the next one was."""

    def ends_at(self) -> float:
        return self.since + self._spent(self.steps - self.done)

    def _spent(self, steps: int) -> float:
        """Seconds from `since` until `steps` more steps are over."""
        if not steps:
            return 0.0
        content, times = self.content, self.times
        whole = content.seconds(times, self.done, steps)
        return whole - self.part * content.seconds(times, self.done, 1) if self.part else whole

    def over(self, now: float) -> int:
        """How many steps are over, at least all before `since`."""
        spent = now - self.since
        low, high = 0, self.steps - self.done
        while low < high:
            middle = (low + high + 1) // 2
            if self._spent(middle) <= spent:
                low = middle
            else:
                high = middle - 1
        return self.done + low

    def stop(self, now: float) -> bool:
        """End with the step that is being computed. Whether that changes anything."""
        if self.steps < 2:
            return False
        wanted = self.over(now) + 1
        if wanted >= self.steps:
            return False
        self.steps = wanted
        return True

    def turn(self, now: float, times: StepTimes) -> None:
        """From now on a step takes as long as `times` says."""
        over = self.over(now)
        if over < self.steps:
            begun = self._spent(over - self.done)
            rest = self._spent(over - self.done + 1) - begun
            before = self.part if over == self.done else 0.0
            share = (now - self.since - begun) / rest if rest else 1.0
            self.part = before + (1 - before) * min(1.0, max(0.0, share))
        else:
            self.part = 0.0
        self.done, self.since, self.times = over, max(now, self.since), times
