"""From workers' outputs to text: however tokens are grouped on the way, the answer is the same."""

from __future__ import annotations

import random

import pytest

from pdserve.cluster.model_files import DEMO_MODEL
from pdserve.protocol.messages import FinishReason, Output, PositionLogprobs
from pdserve.protocol.sampling import SamplingParams
from pdserve.router.output import AnswerText, Delta
from pdserve.router.requests import TextOptions
from pdserve.router.tokenizer import TextTokenizer, load_tokenizer

EOS = 2


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    return load_tokenizer(DEMO_MODEL)


def sampling(**fields: object) -> SamplingParams:
    return SamplingParams(
        **({"seed": 1, "max_tokens": 1000, "eos_token_ids": (EOS,)} | fields)  # type: ignore[arg-type]
    )


def outputs(
    ids: list[int], finish: FinishReason, rng: random.Random, largest: int = 3
) -> list[Output]:
    """`ids` in groups of random size."""
    found, rest = [], list(ids)
    while rest:
        size = rng.randint(1, largest)
        group, rest = rest[:size], rest[size:]
        reason = finish if not rest else None
        logprobs = [PositionLogprobs(-1.0 * token, 1) for token in group]
        found.append(
            Output(request_id="r", token_ids=group, finish_reason=reason, logprobs=logprobs)
        )
    return found


def collect(
    demo: TextTokenizer,
    coming: list[Output],
    params: SamplingParams,
    options: TextOptions,
    eager: bool = True,
) -> Delta:
    """All deltas as one; `eager` takes one after each output, else only at the end."""
    answer = AnswerText(demo.tokens, [1], params, options)
    whole = Delta()
    for output in coming:
        if answer.finished:
            break
        answer.feed(output)
        delta = answer.take() if eager or answer.finished else None
        if delta is not None:
            whole.text += delta.text
            whole.token_ids += delta.token_ids
            whole.logprobs += delta.logprobs
            whole.offsets += delta.offsets
            whole.finish_reason = delta.finish_reason or whole.finish_reason
            if delta.stop_reason is not None:
                whole.stop_reason = delta.stop_reason
    assert answer.finished
    assert len(whole.token_ids) == answer.count
    return whole


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice("abc dé☃漢👍\n.") for _ in range(rng.randint(1, 50)))


def test_a_thousand_texts_streamed_and_not(demo: TextTokenizer) -> None:
    rng = random.Random(11)
    for _ in range(1000):
        ids = [*demo.encode(random_text(rng), False), EOS]
        stops = tuple(random_text(rng)[: rng.randint(1, 3)] for _ in range(rng.randint(0, 4)))
        options = TextOptions(stops=stops, include_stop=rng.random() < 0.3)
        params = sampling(min_tokens=rng.choice([0, 0, 3]), logprobs=0)
        streamed = collect(demo, outputs(ids, FinishReason.STOP, rng), params, options)
        whole = collect(
            demo, outputs(ids, FinishReason.STOP, rng, 99), params, options, eager=False
        )
        assert streamed == whole
        assert len(streamed.logprobs) == len(streamed.offsets) == len(streamed.token_ids)


def test_eos_is_counted_but_not_shown(demo: TextTokenizer) -> None:
    ids = [*demo.encode("hi", False), EOS]
    found = collect(
        demo,
        outputs(ids, FinishReason.STOP, random.Random(0)),
        sampling(),
        TextOptions(skip_special_tokens=False),
    )
    assert (found.text, found.token_ids, found.finish_reason) == ("hi", ids, "stop")
    shown = collect(
        demo,
        outputs(ids, FinishReason.STOP, random.Random(0)),
        sampling(),
        TextOptions(skip_special_tokens=False, include_stop=True),
    )
    assert shown.text == "hi<|im_end|>"


def test_eos_is_shown_when_it_ends_nothing(demo: TextTokenizer) -> None:
    ids = [EOS, EOS]
    found = collect(
        demo,
        outputs(ids, FinishReason.LENGTH, random.Random(0)),
        sampling(ignore_eos=True),
        TextOptions(skip_special_tokens=False),
    )
    assert (found.text, found.finish_reason) == ("<|im_end|>" * 2, "length")


def test_tokens_behind_a_stop_do_not_count(demo: TextTokenizer) -> None:
    ids = demo.encode("one. two. three.", False)
    one = [Output(request_id="r", token_ids=ids)]
    found = collect(demo, one, sampling(), TextOptions(stops=(".",)))
    assert (found.text, found.finish_reason, found.stop_reason) == ("one", "stop", ".")
    assert found.token_ids == ids[: len(found.token_ids)] and len(found.token_ids) < len(ids)


def test_min_tokens_protects_the_beginning(demo: TextTokenizer) -> None:
    ids = demo.encode(". . . .", False)
    coming = [Output(request_id="r", token_ids=ids, finish_reason=FinishReason.LENGTH)]
    first = collect(demo, coming, sampling(), TextOptions(stops=(".",)))
    assert first.text == ""
    later = collect(demo, coming, sampling(min_tokens=2), TextOptions(stops=(".",)))
    assert later.text.startswith(".") and later.finish_reason == "stop"


def test_a_cut_character_is_replaced(demo: TextTokenizer) -> None:
    ids = demo.encode("x☃", False)[:-1]
    coming = [Output(request_id="r", token_ids=ids, finish_reason=FinishReason.LENGTH)]
    assert collect(demo, coming, sampling(), TextOptions()).text == "x\ufffd"


def test_offsets_are_characters_of_the_text(demo: TextTokenizer) -> None:
    text = "a☃b c"
    ids = demo.encode(text, False)
    found = collect(
        demo,
        outputs(ids, FinishReason.LENGTH, random.Random(0)),
        sampling(logprobs=0),
        TextOptions(),
    )
    assert found.offsets[0] == 0 and found.offsets == sorted(found.offsets)
    assert found.offsets[-1] < len(text)
