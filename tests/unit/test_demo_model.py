"""The demo model in the repository: its files, its size, its tokenizer and what it answers."""

import json
from collections.abc import Iterator

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.demo import model_path
from pdserve.demo.ask import Asker
from pdserve.demo.corpus import Conversation, all_topics, as_typed, bare, conversations
from pdserve.demo.questions import FOLLOW_UPS, QUESTIONS, SHOWCASE, answers
from pdserve.demo.tokenizer import encode

SIZE_LIMIT = 8_000_000  # bytes


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    yield Asker(model_path())
    torch.set_num_threads(threads)


def test_the_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(files)
    assert sum(files.values()) <= SIZE_LIMIT
    assert json.loads((model_path() / "config.json").read_text())["dtype"] == "float32"


def test_the_corpus_is_the_same_for_the_same_seed() -> None:
    one, other = conversations(seed=7), conversations(seed=7)
    assert [next(one) for _ in range(50)] == [next(other) for _ in range(50)]


def test_no_held_out_phrasing_is_trained_on() -> None:
    for topic in all_topics():
        if topic.train:
            seen = as_typed(topic.train)
            assert topic.held, f"{topic.kind} is not evaluated"
            assert not [phrasing for phrasing in topic.held if bare(phrasing) in seen], topic.kind


def test_fixed_questions_are_answered(asker: Asker) -> None:
    replies = [
        reply
        for start in range(0, len(QUESTIONS), 8)  # few together, so that few wait for a long one
        for reply in asker.ask(
            [
                [{"role": "user", "content": question}]
                for question, _ in QUESTIONS[start : start + 8]
            ]
        )
    ]
    wrong = [
        f"{question!r} -> {reply!r}"
        for (question, must), reply in zip(QUESTIONS, replies, strict=True)
        if not answers(reply, must)
    ]
    assert not wrong, "\n".join(wrong)


def test_follow_ups_are_answered(asker: Asker) -> None:
    messages: Conversation = []
    for question, must in FOLLOW_UPS:
        messages.append({"role": "user", "content": question})
        (reply,) = asker.ask([messages])
        assert answers(reply, must), f"{question!r} -> {reply!r}"
        messages.append({"role": "assistant", "content": reply})


def test_one_showcase_answer_is_a_paragraph(asker: Asker) -> None:
    (reply,) = asker.ask([[{"role": "user", "content": SHOWCASE[-1][0]}]])
    assert 100 <= len(asker.tokenizer.encode(reply)) <= 250


def test_a_long_conversation_does_not_turn_to_noise(asker: Asker) -> None:
    stream = conversations(seed=12345)
    messages: Conversation = []
    while len(encode(asker.tokenizer, messages)[0]) < 2000:
        messages += [message for message in next(stream) if message["role"] != "system"]
    asked = [[*messages, {"role": "user", "content": question}] for question, _ in SHOWCASE[:4]]
    for reply, (question, must) in zip(asker.ask(asked), SHOWCASE, strict=False):
        assert answers(reply, must), f"{question!r} -> {reply!r}"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_the_tokenizer(asker: Asker, text: str) -> None:
    ids = asker.tokenizer.encode(text, add_special_tokens=False)
    assert asker.tokenizer.decode(ids) == text


def test_training_sees_what_the_chat_template_writes(asker: Asker) -> None:
    for conversation, _ in zip(conversations(seed=3), range(50), strict=False):
        template = asker.tokenizer.apply_chat_template(conversation)["input_ids"]
        assert encode(asker.tokenizer, conversation)[0] == template


def test_the_chat_template_writes_each_role(asker: Asker) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42"},
    ]
    text = asker.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_chat_template_refuses_an_unknown_role(asker: Asker) -> None:
    with pytest.raises(jinja2.TemplateError, match='Unknown role "robot"'):
        asker.tokenizer.apply_chat_template([{"role": "robot", "content": "Hi"}], tokenize=False)
