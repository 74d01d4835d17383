"""What a router learns of speeds, and when it hands prompts over because of it."""

from __future__ import annotations

import random

import pytest

from pdserve.cluster.placement import ANY_NUMBER
from pdserve.cluster.records import Role
from pdserve.protocol.messages import LifeEvent
from pdserve.router.placement import (
    COMPUTE,
    Candidate,
    Disaggregate,
    WorkerLoad,
    by_cost,
    first_options,
    usable,
)
from pdserve.router.predict import MAX_WORKERS, WARM, Fit, Fits, LegFacts, Predictor


def test_a_line_is_found_through_noise() -> None:
    rng, fit = random.Random(0), Fit(2)
    for _ in range(300):
        x = rng.random() * 3
        fit.add((1.0, x), 0.5 + 2 * x + rng.gauss(0, 0.05))
    assert fit.predict((1.0, 2.0)) == pytest.approx(4.5, rel=0.03)
    assert fit.weights == pytest.approx([0.5, 2.0], rel=0.1)


def test_outliers_hardly_move_it() -> None:
    rng, fit = random.Random(0), Fit(2)
    for number in range(400):
        x = rng.random() * 3
        fit.add((1.0, x), 100.0 if number % 25 == 24 else 0.5 + 2 * x + rng.gauss(0, 0.02))
    assert fit.predict((1.0, 2.0)) == pytest.approx(4.5, rel=0.1)


def test_a_change_of_speed_is_followed() -> None:
    rng, fit = random.Random(0), Fit(2)
    for speed in (1.0, 3.0):
        for _ in range(500):
            x = rng.random() * 3
            fit.add((1.0, x), speed * x)
    assert fit.predict((1.0, 2.0)) == pytest.approx(6.0, rel=0.05)


def test_nothing_is_ever_predicted_to_be_faster_for_being_longer() -> None:
    rng, fit = random.Random(0), Fit(3)
    for _ in range(200):
        x = rng.random()
        fit.add((1.0, x, x * x), 1.0 - x / 2 + rng.gauss(0, 0.1))
    assert min(fit.weights) >= 0


def test_samples_that_are_all_the_same_for_long_do_no_harm() -> None:
    fit = Fit(3)
    for _ in range(20_000):
        fit.add((1.0, 0.5, 0.1), 0.25)
    assert fit.predict((1.0, 0.5, 0.1)) == pytest.approx(0.25, rel=0.01)
    for x in (0.1, 0.9, 0.4, 0.7) * 50:
        fit.add((1.0, x, 0.1), 0.5 * x)
    assert fit.predict((1.0, 0.8, 0.1)) == pytest.approx(0.4, rel=0.1)


def test_unknown_workers_are_judged_by_all_and_their_number_is_bounded() -> None:
    fits = Fits(1)
    assert fits.of("a") is None
    for _ in range(WARM):
        fits.add("a", (1.0,), 2.0)
    known, other = fits.of("a"), fits.of("b")
    assert known is not None and other is not None and known is not other
    for number in range(MAX_WORKERS + 50):
        fits.add(f"w{number}", (1.0,), 2.0)
    assert len(fits._own) == MAX_WORKERS
    fits.add("w1000", (1.0,), float("nan"))
    fits.add("w1000", (1.0,), -1.0)
    assert fits.of("b").predict((1.0,)) == pytest.approx(2.0, rel=0.01)  # type: ignore[union-attr]


# A cluster whose laws are known: prefill 5 ms + 0.1 ms per token, transfer 20 ms + 0.01 ms per
# token, step 4 ms + 1 ms per request.


def leg(worker: str, **at: float) -> tuple[LifeEvent, ...]:
    return tuple(LifeEvent(name, when) for name, when in at.items())


def trained(transfer_s: float = 0.02, lengths: tuple[int, int] = (20, 4000)) -> Predictor:
    rng, predictor = random.Random(0), Predictor()
    for _ in range(200):
        length, requests = rng.randint(*lengths), rng.randint(0, 20)
        cached = rng.randint(0, 19) if lengths[0] < lengths[1] else 0
        prefill = 0.005 + 1e-4 * (length - cached)
        predictor.learn(
            LegFacts(
                worker_id="p0", length=length, cached=cached, drawn=1, requests=0,
                events=leg("p0", queued=0, scheduled=0.5, first_token=0.5 + prefill, held=9),
            )
        )  # fmt: skip
        fetch, step = transfer_s + 1e-5 * length, 0.004 + 0.001 * requests
        predictor.learn(
            LegFacts(
                worker_id="d0", length=length, cached=0, drawn=11, requests=requests,
                hand_over_s=fetch,
                events=leg(
                    "d0", queued=0, fetch_started=0.1, fetched=0.1 + fetch, first_token=1.0,
                    finished=1.0 + 10 * step,
                ),
            )
        )  # fmt: skip
    return predictor


def test_the_laws_are_learnt_from_life_events() -> None:
    predictor = trained()
    assert predictor.warm
    assert predictor.prefill_s("p0", 2000) == pytest.approx(0.205, rel=0.05)
    assert predictor.prefill_s("d0", 500, 1500) == pytest.approx(0.055, rel=0.15)
    assert predictor.transfer_s("d0", 2000) == pytest.approx(0.04, rel=0.05)
    assert predictor.step_s("d0", 10, 2000) == pytest.approx(0.014, rel=0.05)
    assert predictor.most_requests("d0", 0.014, 2000) == pytest.approx(10, abs=1)
    assert predictor.most_requests("d0", 0.0001, 2000) == 1
    assert Predictor().most_requests("d0", 0.01, 10) == ANY_NUMBER


def test_legs_in_which_something_went_wrong_teach_nothing() -> None:
    predictor = Predictor()
    for name in ("preempted", "recomputed"):
        events = leg("d0", scheduled=0, first_token=1.0, finished=2.0) + leg("d0", **{name: 0.5})
        for _ in range(50):
            predictor.learn(
                LegFacts(worker_id="d0", length=9, cached=0, drawn=9, requests=1, events=events)
            )
    assert not predictor.warm and predictor.prefill_s("d0", 9) is None


def where(
    predictor: Predictor,
    tokens: int,
    *workers: WorkerLoad,
    mode: Disaggregate = Disaggregate.AUTO,
    slowest_s: float = 0.0,
) -> Candidate:
    price_of = predictor.price if predictor.warm else None
    options = first_options(workers, (), mode, price_of, slowest_s * 1e6)
    index = by_cost(options, tokens, 0)
    assert index is not None
    return options[index]


def worker(name: str, **numbers: int) -> WorkerLoad:
    role = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}[name[0]]
    return WorkerLoad(worker_id=name, role=role, **numbers)


def test_short_prompts_stay_on_an_idle_decode_worker_and_long_ones_too() -> None:
    """Nobody is hurt there, and a transfer always costs something."""
    for tokens in (20, 4000):
        assert not where(trained(), tokens, worker("p0"), worker("d0")).hand_off


def test_long_prompts_leave_the_streams_of_a_busy_decode_worker_alone() -> None:
    busy = worker("d0", requests=20)
    assert where(trained(), 4000, worker("p0"), busy).hand_off
    assert where(trained(), 300, worker("p0"), busy).hand_off
    assert not where(trained(), 5, worker("p0"), worker("d0", requests=5)).hand_off


def test_what_a_prefill_does_to_streams_is_known_though_all_prompts_are_equally_long() -> None:
    """30 ms each, 22 of them to hand over: worth it for two streams, and not for none."""
    predictor = trained(lengths=(256, 256))
    assert where(predictor, 256, worker("p0"), worker("d0", requests=2)).hand_off
    assert not where(predictor, 256, worker("p0"), worker("d0")).hand_off


def test_prompts_that_are_mostly_cached_there_stay() -> None:
    busy = worker("d0", requests=20, cached_tokens=3995)
    assert not where(trained(), 4000, worker("p0"), busy).hand_off


def test_a_busy_prefill_worker_is_passed_by() -> None:
    decode = worker("d0", requests=3)
    assert where(trained(), 1000, worker("p0"), decode).hand_off
    assert not where(trained(), 1000, worker("p0", queued_tokens=9000), decode).hand_off


def test_slow_transfers_keep_prompts_where_they_are() -> None:
    decode = worker("d0", requests=2)
    assert where(trained(), 1000, worker("p0"), decode).hand_off
    assert not where(trained(transfer_s=0.8), 1000, worker("p0"), decode).hand_off


def test_a_first_token_that_is_soon_enough_spares_the_streams() -> None:
    """Handing over takes longer, but the client can wait, and nobody else has to."""
    slow, decode = trained(transfer_s=0.6), worker("d0", requests=2)
    assert not where(slow, 1000, worker("p0"), decode).hand_off
    assert where(slow, 1000, worker("p0"), decode, slowest_s=1.0).hand_off


def test_nobody_free_or_alive_to_prefill() -> None:
    cold = Predictor()
    assert where(cold, 1000, worker("p0"), worker("d0")).hand_off  # nothing is known yet
    assert not where(cold, 1000, worker("d0")).hand_off
    full = worker("p0", free_tokens=10)
    assert not where(trained(), 1000, full, worker("d0", requests=30)).hand_off


def test_always_and_never() -> None:
    pair = worker("p0"), worker("d0")
    assert where(trained(), 5, *pair, mode=Disaggregate.ALWAYS).hand_off
    assert not where(Predictor(), 5, *pair, mode=Disaggregate.NEVER).hand_off
    for mode, alone in ((Disaggregate.ALWAYS, False), (Disaggregate.AUTO, True),
                        (Disaggregate.NEVER, True)):  # fmt: skip
        assert usable([worker("d0")], mode) is alone
        assert not usable([worker("p0")], mode) and not usable([], mode)


def test_without_a_choice_costs_are_in_tokens() -> None:
    price_of = trained().price
    for workers in ([worker("d0")], [worker("c0"), worker("c1")]):
        options = first_options(workers, (), Disaggregate.AUTO, price_of, 5.0)
        assert {(option.price, option.floor) for option in options} == {(COMPUTE, 0)}


def test_an_itl_target_bounds_the_requests_of_a_worker() -> None:
    predictor = trained()
    assert predictor.most_requests("d0", 0.008, 1000) == pytest.approx(4, abs=1)
