"""The engine's life cycles in its own steps, without tensors; each ends with all blocks free."""

import random
import threading

import pytest
from fake_engine import Bench, FakeOutbox, continuation

from pdserve.engine.overlap import offers_early, takes_early
from pdserve.protocol.errors import ErrorCode
from pdserve.protocol.messages import FinishReason


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 16, 17, 40])
def test_one_request(length: int) -> None:
    bench = Bench()
    bench.submit("a", prompt(length), max_tokens=6)
    bench.run()
    assert bench.tokens("a") == continuation(prompt(length), 6)
    assert bench.last("a").finish_reason is FinishReason.LENGTH
    bench.assert_clean()


def test_a_long_prompt_is_cut_into_chunks_and_decodes_go_first() -> None:
    bench = Bench(num_blocks=32, budget=8)
    bench.submit("short", prompt(3, 1), max_tokens=20)
    bench.engine.step()
    bench.submit("long", prompt(20, 2), max_tokens=2)
    bench.run()
    with_both = [step for step in bench.runner.steps if len(step) == 2]
    assert all(step[0][0] == "short" and step[0][2] == 1 for step in with_both)
    assert [step[1][1:] for step in with_both[:3]] == [(0, 7), (7, 7), (14, 6)]
    assert bench.tokens("short") == continuation(prompt(3, 1), 20)
    bench.assert_clean()


def test_the_prefix_cache_is_used_and_correct() -> None:
    bench = Bench(num_blocks=32)
    shared = prompt(12)
    bench.submit("a", [*shared, 1], max_tokens=2)
    bench.run()
    bench.submit("b", [*shared, 2], max_tokens=2)
    bench.submit("c", shared, max_tokens=2)
    bench.run()
    assert bench.outputs["a"][0].cached_tokens == 0
    assert bench.outputs["b"][0].cached_tokens == 12
    assert bench.outputs["c"][0].cached_tokens == 8, "one token must remain to be computed"
    assert bench.tokens("b") == continuation([*shared, 2], 2)
    assert bench.tokens("c") == continuation(shared, 2)
    bench.assert_clean()


def test_salts_separate_and_prompt_logprobs_do_not_read_the_cache() -> None:
    bench = Bench(num_blocks=32)
    bench.submit("a", prompt(12), max_tokens=1)
    bench.run()
    bench.submit("b", prompt(12), max_tokens=1, prompt_logprobs=0)
    bench.run()
    assert bench.outputs["b"][0].cached_tokens == 0
    bench.assert_clean()


def test_preemption_changes_nothing_but_time() -> None:
    bench = Bench(num_blocks=8, budget=64)
    for name in "abc":
        bench.submit(name, prompt(7, ord(name)), max_tokens=16)
    bench.run()
    assert bench.engine.status().preemptions > 0
    for name in "abc":
        assert bench.tokens(name) == continuation(prompt(7, ord(name)), 16)
    bench.assert_clean()


def test_eos_and_stop_tokens() -> None:
    bench = Bench()
    expected = continuation(prompt(5), 8)
    bench.submit("eos", prompt(5), eos_token_ids=(expected[2],))
    bench.submit("stop", prompt(5), stop_token_ids=(expected[3],), ignore_eos=True)
    bench.submit("ignored", prompt(5), eos_token_ids=(expected[2],), ignore_eos=True)
    bench.run()
    assert bench.tokens("eos") == expected[:3]
    assert bench.last("eos").finish_reason is FinishReason.STOP
    assert bench.last("eos").stop_token_id is None
    assert bench.last("stop").stop_token_id == expected[3]
    assert bench.tokens("ignored") == expected
    bench.assert_clean()


def pair(**options: int) -> tuple[Bench, Bench]:
    """A prefill and a decode engine with a fake transfer between them."""
    outbox = FakeOutbox()
    prefill = Bench(outbox=outbox, **options)
    decode = Bench(feed=(prefill.runner, outbox), **options)
    return prefill, decode


def run_prefill(prefill: Bench, name: str, tokens: list[int], max_tokens: int = 8):
    prefill.submit(name, tokens, max_tokens, hand_off=True)
    prefill.run()
    return prefill.last(name)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 16, 17, 37])
def test_disaggregated_equals_colocated(length: int) -> None:
    prefill, decode = pair()
    first = run_prefill(prefill, "a", prompt(length))
    assert first.ticket is not None
    assert first.ticket.num_tokens == length
    assert prefill.engine.status().blocks_held == first.ticket.num_blocks
    decode.submit("a", prompt(length), output=first.token_ids, ticket=first.ticket)
    decode.engine.step()
    assert decode.engine.status().fetching == 1
    decode.inbox.deliver("a")
    decode.run()
    assert first.token_ids + decode.tokens("a") == continuation(prompt(length), 8)
    prefill.assert_clean()
    decode.assert_clean()


def test_only_missing_blocks_travel() -> None:
    prefill, decode = pair(num_blocks=32)
    decode.submit("warm", prompt(12), max_tokens=1)
    decode.run()
    tokens = [*prompt(12), 1, 2, 3, 4, 5]
    first = run_prefill(prefill, "a", tokens)
    orders = []
    fetch = decode.inbox.fetch
    decode.inbox.fetch = lambda *args: (orders.append(args[1]), fetch(*args))
    decode.submit("a", tokens, output=first.token_ids, ticket=first.ticket)
    decode.engine.step()
    assert orders == [(3, 4)]
    decode.inbox.deliver("a")
    decode.run()
    assert first.token_ids + decode.tokens("a") == continuation(tokens, 8)
    prefill.assert_clean()
    decode.assert_clean()


@pytest.mark.parametrize("failed", [(0, 1, 2), (1,), (2,)])
def test_a_failed_fetch_is_computed_again(failed: tuple[int, ...]) -> None:
    prefill, decode = pair()
    first = run_prefill(prefill, "a", prompt(10))
    decode.submit("a", prompt(10), output=first.token_ids, ticket=first.ticket)
    decode.engine.step()
    decode.inbox.deliver("a", failed)
    decode.run()
    assert first.token_ids + decode.tokens("a") == continuation(prompt(10), 8)
    assert "recomputed" in [event.name for event in decode.last("a").events]
    prefill.assert_clean()
    decode.assert_clean()


def test_leases_are_renewed_while_a_request_waits_for_room() -> None:
    prefill, decode = pair(max_num_seqs=1)
    decode.submit("busy", prompt(3, 9), max_tokens=4)
    decode.engine.step()
    first = run_prefill(prefill, "a", prompt(10))
    aborted = run_prefill(prefill, "b", prompt(5))
    for name, output, length in (("a", first, 10), ("b", aborted, 5)):
        decode.submit(name, prompt(length), output=output.token_ids, ticket=output.ticket)
    decode.engine.step()
    assert decode.inbox.kept == {"a", "b"}
    decode.engine.abort("b")
    prefill.engine.abort("b")
    decode.run()
    assert decode.inbox.kept == set(), "a fetch renews by itself"
    decode.inbox.deliver("a")
    decode.run()
    assert first.token_ids + decode.tokens("a") == continuation(prompt(10), 8)
    prefill.assert_clean()
    decode.assert_clean()


def test_the_first_token_may_end_it_without_a_ticket() -> None:
    prefill, _ = pair()
    output = run_prefill(prefill, "a", prompt(5), max_tokens=1)
    assert (output.ticket, output.finish_reason) == (None, FinishReason.LENGTH)
    prefill.assert_clean()


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding", "held", "fetching"])
def test_abort_in_every_state(stage: str) -> None:
    prefill, decode = pair(budget=8)
    bench = decode
    if stage == "waiting":
        bench.submit("a", prompt(5))
    elif stage == "prefilling":
        bench.submit("a", prompt(20))
        bench.engine.step()
        assert not bench.tokens("a")
    elif stage == "decoding":
        bench.submit("a", prompt(5))
        bench.engine.step()
        assert bench.tokens("a")
    else:
        first = run_prefill(prefill, "a", prompt(20))
        if stage == "held":
            prefill.engine.abort("a")
            assert prefill.engine.status().blocks_held
        else:
            bench.submit("a", prompt(20), output=first.token_ids, ticket=first.ticket)
            bench.engine.step()
    bench.engine.abort("a")
    bench.engine.step()
    bench.assert_clean()
    prefill.assert_clean()
    assert all(output.finish_reason is None for output in bench.outputs.get("a", []))


def test_a_client_that_leaves_takes_everything_along() -> None:
    prefill, _ = pair(budget=8)
    run_prefill(prefill, "held", prompt(9))
    prefill.submit("running", prompt(20), client="client")
    prefill.submit("other", prompt(4), max_tokens=3, client="other")
    prefill.engine.step()
    prefill.engine.abort_client("client")
    prefill.run()
    assert prefill.tokens("other") == continuation(prompt(4), 3)
    prefill.assert_clean()


def test_deadlines_end_requests_with_a_typed_error() -> None:
    prefill, decode = pair()
    first = run_prefill(prefill, "fetching", prompt(9))
    decode.submit(
        "fetching", prompt(9), output=first.token_ids, ticket=first.ticket, timeout_s=0.02
    )
    decode.submit("late", prompt(9), timeout_s=0.0)
    decode.engine.step()
    threading.Event().wait(0.03)
    decode.engine.step()
    decode.run()
    for name in ("late", "fetching"):
        assert decode.last(name).error.code is ErrorCode.DEADLINE
    decode.assert_clean()
    prefill.assert_clean()


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [1] * 250, "max_tokens": 10}, "model length of 256"),
        ({"prompt": [1] * 60, "max_tokens": 10}, "KV cache holds 64"),
        ({"prompt": [1000]}, "between 0 and 999"),
        ({"prompt": [1], "output": [1] * 8}, "exist already"),
        ({"prompt": [1], "hand_off": True}, "not a prefill worker"),
    ],
)
def test_requests_that_can_never_run_are_refused(options: dict, needle: str) -> None:
    bench = Bench()
    bench.submit("a", **options)
    bench.run()
    error = bench.last("a").error
    assert error.code is ErrorCode.INVALID_REQUEST
    assert needle in error.message
    bench.assert_clean()


def test_a_faulty_step_ends_its_requests_and_no_others() -> None:
    bench = Bench(max_num_seqs=1)
    bench.submit("a", prompt(4))
    bench.submit("b", prompt(4, 1))
    bench.runner.fail_next = True
    bench.run()
    assert bench.last("a").error.code is ErrorCode.INTERNAL
    assert bench.tokens("b") == continuation(prompt(4, 1), 8)
    bench.assert_clean()


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


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(seed: int) -> None:
    """Requests arrive, are aborted, fetched, refetched and preempted at random."""
    rng = random.Random(seed)
    budget = rng.choice([8, 13, 40])
    prefill, decode = pair(num_blocks=24, budget=budget)
    prompts = {
        f"r{i}": prompt(8, 1)[: rng.randint(0, 8)] + prompt(rng.randint(1, 20), i)
        for i in range(40)
    }
    todo, firsts, early, aborted = list(prompts), {}, {}, set()
    for turn in range(4000):
        if todo and rng.random() < 0.3:
            name = todo.pop()
            if rng.random() < 0.7:
                prefill.submit(name, prompts[name], 12, hand_off=True)
            else:
                decode.submit(name, prompts[name], 12)
        if rng.random() < 0.02:
            name = rng.choice(list(prompts))
            aborted.add(name)
            prefill.engine.abort(name)
            decode.engine.abort(name)
        for bench in rng.sample([prefill, decode], rng.randint(1, 2)):
            bench.engine.step()
        for name, outputs in prefill.outputs.items():
            ticket = outputs[-1].ticket
            if ticket is None or name in firsts or name in aborted:
                continue
            if ticket.growing:
                if name not in early and rng.random() < 0.7:
                    early[name] = ticket.ticket_id
                    decode.submit(name, prompts[name], 12, ticket=ticket)
            elif name not in early or decode.lost(name):
                firsts[name] = outputs[-1]
                decode.submit(name, prompts[name], 12, output=outputs[-1].token_ids, ticket=ticket)
            elif early[name] == ticket.ticket_id:
                firsts[name] = outputs[-1]
                decode.resume(name, outputs[-1].token_ids)
        for name in list(decode.inbox.pending):
            growing = name in prefill.outbox.growing
            if rng.random() < (0.02 if growing else 0.3):
                decode.inbox.deliver(name, (0,) if rng.random() < 0.2 else ())
        prefill.outbox.read = set(prefill.outbox.growing) if rng.random() < 0.5 else set()
        for ticket_id in list(prefill.outbox.cut_tickets):
            if rng.random() < 0.3:
                prefill.outbox.give_back(ticket_id)
        busy = decode.inbox.pending or not (prefill.idle and decode.idle)
        if not todo and not busy and turn > 200:
            break
    assert budget == 40 or any(name in firsts for name in early), "no hand-over began early"
    for bench in (prefill, decode):
        for ticket_id in list(prefill.outbox.tickets):
            prefill.outbox.give_back(ticket_id)
        bench.assert_clean()
    for name in prompts.keys() - aborted:
        tokens = (firsts[name].token_ids if name in firsts else []) + decode.tokens(name)
        assert tokens == continuation(prompts[name], 12)


def test_the_thread_wakes_for_commands_and_stops() -> None:
    bench = Bench()
    bench.engine.start()
    finished = threading.Event()
    bench.on_outcome = lambda: finished.set() if "a" in bench.outputs else None
    bench.submit("a", prompt(3), max_tokens=1)
    assert finished.wait(5)
    bench.engine.stop()
    assert not bench.engine.alive
    assert bench.engine.failure is None
    assert bench.tokens("a") == continuation(prompt(3), 1)
    bench.assert_clean()
