"""From timed steps to the laws that `StepTimes` states."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec
import numpy as np

from pdserve.bench.simulation.profile import StepTimes
from pdserve.bench.step_times import Point, Sample


def typical(samples: Sequence[Sample]) -> list[Sample]:
    """The median of each point's."""
    found: dict[Point, list[float]] = {}
    for sample in samples:
        found.setdefault(sample.point, []).append(sample.seconds)
    return [Sample(point, statistics.median(seconds)) for point, seconds in found.items()]


def fit(samples: Sequence[Sample]) -> tuple[StepTimes, dict[str, float]]:
    """The laws, and how far they are off. `samples`: one per point."""
    single = [sample for sample in samples if not sample.point.prompts]
    prompts = [sample for sample in samples if not sample.point.contexts]
    mixed = [s for s in samples if s.point.prompts and s.point.contexts]
    counts = sorted({len(sample.point.contexts) for sample in single})
    decode, off = [], []
    for count in counts:
        same = [sample for sample in single if len(sample.point.contexts) == count]
        rows = [(1.0, sum(sample.point.contexts)) for sample in same]
        (base, context), error = least(rows, [sample.seconds for sample in same])
        decode.append((count, base, context))
        off += [error] * len(same)
    found, prompt_error = least(
        [(1.0, s.point.tokens, s.point.pairs) for s in prompts], [s.seconds for s in prompts]
    )
    step = StepTimes(decode=tuple(decode), prompt=(found[0], found[1], found[2]))
    step = msgspec.structs.replace(step, share=_share(step, prompts, mixed))
    errors = {"decode": statistics.fmean(off), "prompt": prompt_error}
    if mixed:
        errors["mixed"] = statistics.fmean(
            abs(_mixed_s(step, s.point) / s.seconds - 1) for s in mixed
        )
    return step, errors


def _share(step: StepTimes, prompts: Sequence[Sample], mixed: Sequence[Sample]) -> float:
    """What single tokens take beside prompts, of what they take by themselves."""
    without = {sample.point.prompts: sample.seconds for sample in prompts}
    shares = [
        (sample.seconds - without[sample.point.prompts])
        / step.decode_s(len(sample.point.contexts), sum(sample.point.contexts))
        for sample in mixed
        if sample.point.prompts in without
    ]
    return min(1.0, max(0.0, statistics.median(shares))) if shares else 1.0


def _mixed_s(step: StepTimes, point: Point) -> float:
    contexts = point.contexts
    return step.mixed_s(point.tokens, point.pairs, len(point.prompts), len(contexts), sum(contexts))


def line_through(places: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Base and slope, neither below 0."""
    (base, slope), _ = least([(1.0, place) for place in places], [max(v, 1e-6) for v in values])
    return base, slope


def least(rows: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[list[float], float]:
    """Weights ≥ 0 of the least relative squares, and the mean relative error: what would be
    negative is left out, the most negative first, and tried again."""
    y = np.array(values, dtype=float)
    a = np.array(rows, dtype=float) / y[:, None]
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)
    kept = list(range(a.shape[1]))
    weights = np.zeros(a.shape[1])
    while kept:
        found = np.linalg.lstsq((a / scale)[:, kept], np.ones(len(y)), rcond=None)[0]
        if found.min() >= 0:
            weights[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    return [float(weight) for weight in weights], float(np.abs(a @ weights - 1).mean())
