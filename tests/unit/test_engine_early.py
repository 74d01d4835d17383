"""Hand-overs that begin before the prompt is computed; each ends with all blocks free."""

import pytest
from fake_engine import FINGERPRINT, Bench, continuation, pair, prompt, run_prefill

from pdserve.engine import outgoing
from pdserve.engine.overlap import offers_early, takes_early
from pdserve.protocol.errors import ErrorCode


def begin_early(prefill: Bench, length: int = 20, max_tokens: int = 8, name: str = "a"):
    """A prompt whose ticket is out while some of it is still to be computed."""
    prefill.submit(name, prompt(length), max_tokens, hand_off=True)
    while not prefill.outputs.get(name):
        assert prefill.engine.step()
    ticket = prefill.last(name).ticket
    assert ticket is not None and ticket.growing and not prefill.tokens(name)
    return ticket


def arrive_early(prefill: Bench, decode: Bench, length: int = 20):
    """The same, with the decode side fetching."""
    ticket = begin_early(prefill, length)
    decode.submit("a", prompt(length), ticket=ticket)
    decode.engine.step()
    return ticket


def keep_busy(decode: Bench) -> None:
    """A request that leaves 3 of 16 blocks."""
    decode.submit("busy", prompt(50, 1), max_tokens=12)
    while not decode.tokens("busy"):
        decode.engine.step()


@pytest.mark.parametrize("order", ["token first", "blocks first", "no room before the token"])
def test_blocks_travel_while_the_prompt_is_computed(order: str) -> None:
    prefill, decode = pair(budget=8)
    if order == "no room before the token":
        keep_busy(decode)
    ticket = arrive_early(prefill, decode)
    fetching = decode.engine.status().fetching
    assert fetching == (order != "no room before the token")
    prefill.run()
    last = prefill.last("a")
    assert last.ticket.ticket_id == ticket.ticket_id and not last.ticket.growing
    assert prefill.engine.status().blocks_held == ticket.num_blocks == 5
    assert [event.name for event in last.events][-3:] == ["offered", "first_token", "held"]
    if order == "blocks first":
        decode.inbox.deliver("a")
        decode.engine.step()
        assert decode.engine.status().fetching == 1, "it waits for its token"
    decode.resume("a", last.token_ids)
    if order != "blocks first":
        decode.run()
        decode.inbox.deliver("a")
    decode.run()
    assert last.token_ids + decode.tokens("a") == continuation(prompt(20), 8)
    prefill.assert_clean()
    decode.assert_clean()


@pytest.mark.parametrize(
    ("length", "max_tokens", "early"), [(8, 8, False), (9, 8, True), (20, 8, True), (20, 1, False)]
)
def test_only_prompts_of_several_steps_are_offered_early(
    length: int, max_tokens: int, early: bool
) -> None:
    prefill, _ = pair(budget=8)
    last = run_prefill(prefill, "a", prompt(length), max_tokens)
    growing = [output for output in prefill.outputs["a"] if output.ticket and not output.token_ids]
    assert bool(growing) is early
    prefill.engine.abort("a")
    assert (last.ticket is None) is (max_tokens == 1)
    prefill.assert_clean()


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("end", ["abort", "client", "deadline", "fault"])
def test_a_growing_ticket_ends_with_its_request(end: str, read: bool) -> None:
    prefill, decode = pair(budget=8)
    ticket = arrive_early(prefill, decode)
    if read:
        prefill.outbox.read = {"a"}
    if end == "abort":
        prefill.engine.abort("a")
    elif end == "client":
        prefill.engine.abort_client("client")
    elif end == "fault":
        prefill.runner.fail_next = True
    else:
        prefill.engine.call(lambda engine: expire(engine, "a"))
    prefill.engine.step()
    held = prefill.engine.status().blocks_held
    assert held == (5 if end == "fault" else 4) * read, "nothing is free while it is read"
    if read:
        prefill.outbox.give_back(ticket.ticket_id)
    prefill.assert_clean()
    decode.inbox.deliver("a")
    decode.engine.step()
    assert decode.last("a").error.code is ErrorCode.KV_LOST
    decode.resume("a", [1])
    decode.assert_clean()


def expire(engine, name: str) -> None:
    engine._requests[name].deadline = 0.0


@pytest.mark.parametrize("state", ["waiting", "fetching", "arrived"])
def test_an_early_request_may_leave(state: str) -> None:
    prefill, decode = pair(budget=8)
    if state == "waiting":
        keep_busy(decode)
    arrive_early(prefill, decode)
    prefill.run()
    if state == "arrived":
        decode.inbox.deliver("a")
        decode.engine.step()
    decode.engine.abort("a")
    prefill.engine.abort("a")
    decode.run()
    prefill.assert_clean()
    decode.assert_clean()


def test_a_preempted_prompt_is_offered_again_only_when_it_is_complete() -> None:
    prefill, decode = pair(num_blocks=12, budget=3, max_num_seqs=2)
    prefill.submit("old", prompt(3, 1), max_tokens=24)
    prefill.engine.step()
    prefill.submit("a", prompt(36), hand_off=True)
    for _ in range(40):
        if prefill.engine.status().preemptions:
            break
        prefill.engine.step()
    assert prefill.last("a").ticket.growing and not prefill.outbox.growing
    prefill.run()
    first = prefill.last("a")
    assert not first.ticket.growing
    decode.submit("a", prompt(36), output=first.token_ids, ticket=first.ticket)
    decode.engine.step()
    decode.inbox.deliver("a")
    decode.run()
    assert first.token_ids + decode.tokens("a") == continuation(prompt(36), 8)
    prefill.assert_clean()
    decode.assert_clean()


@pytest.mark.parametrize("end", ["goes on", "is aborted, too"])
@pytest.mark.parametrize("state", ["waiting", "fetching", "arrived"])
def test_an_id_may_come_again_at_once_after_an_abort(state: str, end: str) -> None:
    """The transfer may still hold the blocks of the request that had it before."""
    prefill, decode = pair(budget=8)
    if state == "waiting":
        keep_busy(decode)
    arrive_early(prefill, decode)
    prefill.run()
    first = prefill.last("a")
    if state == "arrived":
        decode.inbox.deliver("a")
        decode.engine.step()
    decode.inbox.slow = True
    decode.engine.abort("a")
    decode.submit("a", prompt(20), output=first.token_ids, ticket=first.ticket)
    if end != "goes on":
        decode.engine.abort("a")
    decode.engine.step()
    decode.inbox.slow = False
    for name in list(decode.inbox.cancelled):
        decode.inbox.deliver(name, (0,))
    decode.run()
    while decode.inbox.pending:
        decode.inbox.deliver("a")
        decode.run()
    if end == "goes on":
        assert first.token_ids + decode.tokens("a") == continuation(prompt(20), 8)
    else:
        assert "a" not in decode.outputs
    prefill.engine.abort("a")
    prefill.assert_clean()
    decode.assert_clean()


def test_the_first_token_may_come_while_the_id_is_still_taken() -> None:
    prefill, decode = pair(budget=8)
    ticket = arrive_early(prefill, decode)
    prefill.run()
    first = prefill.last("a")
    decode.inbox.slow = True
    decode.engine.abort("a")
    decode.submit("a", prompt(20), ticket=ticket)
    decode.resume("a", first.token_ids)
    decode.engine.step()
    assert decode.engine.status().fetching == 1
    decode.inbox.slow = False
    for name in list(decode.inbox.cancelled):
        decode.inbox.deliver(name, (0,))
    decode.run()
    decode.inbox.deliver("a")
    decode.run()
    assert first.token_ids + decode.tokens("a") == continuation(prompt(20), 8)
    prefill.engine.abort("a")
    prefill.assert_clean()
    decode.assert_clean()


def test_a_ticket_of_another_request_is_refused() -> None:
    prefill, decode = pair()
    first = run_prefill(prefill, "a", prompt(8))
    decode.submit("b", prompt(8), output=first.token_ids, ticket=first.ticket)
    decode.run()
    assert "another request, a" in decode.last("b").error.message
    prefill.engine.abort("a")
    prefill.assert_clean()
    decode.assert_clean()


def test_early_requests_do_not_hold_up_others() -> None:
    prefill, decode = pair(budget=8)
    keep_busy(decode)
    arrive_early(prefill, decode)
    decode.submit("other", prompt(3, 2), max_tokens=2)
    for _ in range(8):
        decode.engine.step()
    assert decode.tokens("other") == continuation(prompt(3, 2), 2)
    decode.engine.abort("a")
    prefill.engine.abort("a")
    decode.run()
    prefill.assert_clean()
    decode.assert_clean()


@pytest.mark.parametrize(
    ("tokens", "needle"), [([], "0 tokens came of at most 8"), ([1000], "between 0 and 999")]
)
def test_wrong_first_tokens_are_refused(tokens: list[int], needle: str) -> None:
    prefill, decode = pair(budget=8)
    arrive_early(prefill, decode)
    decode.resume("a", tokens)
    decode.run()
    assert needle in decode.last("a").error.message
    prefill.engine.abort("a")
    prefill.assert_clean()
    decode.assert_clean()


def test_a_growing_ticket_comes_without_tokens() -> None:
    prefill, decode = pair(budget=8)
    ticket = begin_early(prefill)
    decode.submit("a", prompt(20), output=[1], ticket=ticket)
    decode.run()
    assert "covers 20 tokens; 21 are known" in decode.last("a").error.message
    prefill.engine.abort("a")
    prefill.assert_clean()


@pytest.mark.parametrize(
    ("computed", "known", "size", "early"),
    [(0, 8, 4, False), (3, 6, 4, False), (4, 8, 4, True), (4, 9, 4, False), (8, 9, 4, True),
     (9, 9, 4, False)],
)  # fmt: skip
def test_when_a_ticket_goes_out_early(computed: int, known: int, size: int, early: bool) -> None:
    assert offers_early(computed, known, size) is early


@pytest.mark.parametrize(
    ("available", "needed", "running", "takes"),
    [(16, 12, 0, True), (16, 13, 0, False), (3, 0, 0, False), (16, 4, 5, True), (16, 4, 6, False)],
)
def test_when_a_decode_worker_takes_a_prompt_early(
    available: int, needed: int, running: int, takes: bool
) -> None:
    assert takes_early(available, needed, 16, running, 8) is takes


@pytest.fixture
def by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of eight tokens count as large."""
    monkeypatch.setattr(outgoing, "BY_LAYERS_BYTES", 8 * FINGERPRINT.token_nbytes)


def test_the_ticket_of_a_prompt_of_one_step_goes_out_at_half_of_its_layers(by_layers: None) -> None:
    prefill, decode = pair(slices=4)
    started: list[int] = []

    def begin_there(slices: int) -> None:
        if prefill.outputs.get("a") and not started:
            started.append(slices)
            decode.submit("a", prompt(14), ticket=prefill.last("a").ticket)
            decode.engine.step()

    prefill.runner.told = begin_there
    last = run_prefill(prefill, "a", prompt(14))
    assert started == [2], "in the middle of the step"
    ticket = prefill.outputs["a"][0].ticket
    assert ticket is not None and ticket.growing and ticket.ticket_id == last.ticket.ticket_id
    blocks = prefill.outbox.tickets[ticket.ticket_id][1]
    assert prefill.outbox.advanced == [(ticket.ticket_id, blocks, done) for done in (2, 3)]
    decode.resume("a", last.token_ids)
    decode.run()
    decode.inbox.deliver("a")
    decode.run()
    assert last.token_ids + decode.tokens("a") == continuation(prompt(14), 8)
    prefill.assert_clean()
    decode.assert_clean()


def test_layers_of_each_later_chunk_go_ahead_of_it(by_layers: None) -> None:
    """Of a chunk that ends within a block only the blocks that it fills."""
    prefill, _ = pair(slices=2, budget=10)
    last = run_prefill(prefill, "a", prompt(28))
    ticket_id, blocks = last.ticket.ticket_id, prefill.outbox.tickets[last.ticket.ticket_id][1]
    assert len(blocks) == 7
    assert prefill.outbox.advanced == [(ticket_id, blocks[2:5], 1), (ticket_id, blocks[5:], 1)]
    prefill.engine.abort("a")
    prefill.assert_clean()


@pytest.mark.parametrize("why", ["small", "one slice", "stays", "last token", "preempted"])
def test_chunks_that_do_not_go_by_layers(why: str, by_layers: None) -> None:
    prefill, _ = pair(slices=1 if why == "one slice" else 4)
    length, tokens = (7 if why == "small" else 14), (1 if why == "last token" else 8)
    prefill.submit("a", prompt(length), tokens, hand_off=why != "stays")
    if why == "preempted":
        prefill.engine.call(lambda engine: preempted(engine, "a"))
    prefill.run()
    assert prefill.outbox.advanced == []
    assert sum(output.ticket is not None for output in prefill.outputs["a"]) <= 1
    prefill.engine.abort("a")
    prefill.assert_clean()


def preempted(engine, name: str) -> None:
    engine._requests[name].preemptions = 1


def test_a_step_that_fails_after_some_layers_ends_its_ticket(by_layers: None) -> None:
    prefill, _ = pair(slices=4)
    prefill.runner.fail_next = True
    prefill.submit("a", prompt(14), hand_off=True)
    prefill.engine.step()
    assert prefill.outbox.advanced and prefill.last("a").error.code is ErrorCode.INTERNAL
    assert prefill.outbox.tickets == {}
    prefill.assert_clean()
