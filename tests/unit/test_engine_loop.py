"""The engine's life cycles in its own steps, without tensors; each ends with all blocks free."""

import random
import threading
import time
from collections.abc import Sequence

import msgspec
import pytest
from fake_engine import Bench, continuation, pair, prompt, run_prefill

from pdserve.engine.pace import Pace
from pdserve.engine.ports import Chunk, ChunkResult, Watcher
from pdserve.protocol.blocks import route_hashes
from pdserve.protocol.errors import ErrorCode
from pdserve.protocol.messages import FinishReason


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 16, 17, 40])
def test_one_request(length: int) -> None:
    bench = Bench()
    bench.submit("a", prompt(length), max_tokens=6)
    bench.run()
    assert bench.tokens("a") == continuation(prompt(length), 6)
    assert bench.last("a").finish_reason is FinishReason.LENGTH
    bench.assert_clean()


def test_events_count_from_when_a_request_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from when the step in progress was over and the engine took it."""
    bench, now = Bench(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bench.submit("a", prompt(3), max_tokens=2)
    now[0] += 0.08
    bench.run()
    assert {event.name: event.at_s for event in bench.last("a").events}["queued"] == 0.08
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


@pytest.mark.parametrize(
    ("layout", "change", "needle"),
    [
        ({}, {"lease_s": 0.0}, "lease must be a time above 0 s, not 0.0"),
        ({}, {"lease_s": float("nan")}, "lease must be a time above 0 s, not nan"),
        ({"tp_rank": 1, "tp_size": 2}, {}, "rank 1 of 2, which does not hold all KV heads"),
    ],
)
def test_tickets_that_cannot_be_used_are_refused(layout: dict, change: dict, needle: str) -> None:
    prefill, decode = pair()
    first = run_prefill(prefill, "a", prompt(8))
    fingerprint = msgspec.structs.replace(first.ticket.fingerprint, **layout)
    ticket = msgspec.structs.replace(first.ticket, fingerprint=fingerprint, **change)
    decode.submit("a", prompt(8), output=first.token_ids, ticket=ticket)
    decode.run()
    assert needle in decode.last("a").error.message
    prefill.engine.abort("a")
    prefill.assert_clean()
    decode.assert_clean()


def test_a_faulty_step_ends_its_requests_and_no_others() -> None:
    bench = Bench(max_num_seqs=1)
    bench.submit("a", prompt(4))
    bench.submit("b", prompt(4, 1))
    bench.runner.fail_next = True
    bench.run()
    assert bench.last("a").error.code is ErrorCode.INTERNAL
    assert bench.tokens("b") == continuation(prompt(4, 1), 8)
    bench.assert_clean()


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


def test_a_stream_that_moves_may_be_handed_over_again() -> None:
    """The prefill worker has the prompt in its cache; the next token and all blocks go on."""
    prefill, decode = pair(num_blocks=32)
    tokens, right = prompt(13), continuation(prompt(13), 9)
    first = run_prefill(prefill, "a", tokens, 9)
    assert first.token_ids == right[:1] and first.ticket is not None
    prefill.outbox.give_back(first.ticket.ticket_id)  # type: ignore[union-attr]
    prefill.submit("b", tokens, 9, output=right[:4], hand_off=True)
    prefill.run()
    again = prefill.last("b")
    assert again.ticket is not None and again.token_ids == right[4:5]
    assert prefill.outputs["b"][0].cached_tokens == 12
    decode.submit("b", tokens, 9, output=right[:5], ticket=again.ticket)
    decode.engine.step()
    decode.inbox.deliver("b")  # type: ignore[union-attr]
    decode.run()
    assert decode.tokens("b") == right[5:]
    prefill.submit("c", tokens, 9, output=right[:8], hand_off=True)  # one token is left
    prefill.run()
    assert prefill.last("c").finish_reason is FinishReason.LENGTH
    prefill.assert_clean()
    decode.assert_clean()


def test_an_engine_whose_step_does_not_end_is_stuck_until_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace = Pace(least_s=0.05)
    pace.compute(100)
    pace.turn()
    bench = Bench(pace=pace)
    inside, go_on = threading.Event(), threading.Event()
    execute = bench.runner.execute

    def wedged(chunks: Sequence[Chunk], watcher: Watcher | None = None) -> list[ChunkResult]:
        inside.set()
        assert go_on.wait(10)
        return execute(chunks, watcher)

    monkeypatch.setattr(bench.runner, "execute", wedged)
    finished = threading.Event()
    bench.on_outcome = lambda: finished.set() if "a" in bench.outputs else None
    bench.engine.start()
    bench.submit("a", prompt(5), max_tokens=1)
    assert inside.wait(10)
    end = time.monotonic() + 5
    while not pace.stuck:
        assert time.monotonic() < end, "nobody notices"
        time.sleep(0.005)
    go_on.set()
    assert finished.wait(10) and bench.engine.alive
    bench.engine.stop()
    assert bench.tokens("a") == continuation(prompt(5), 1)


@pytest.mark.parametrize("size", [4, 16, 24, 32, 64])
def test_every_position_within_the_cached_blocks_is_told(size: int) -> None:
    """Routers look for the longest by bisection: none before it may be missing."""
    bench = Bench(num_blocks=64, block_size=size, budget=256)
    bench.engine.listen()
    bench.submit("a", prompt(130), max_tokens=1)
    bench.run()
    news = {name for outcome in bench.outcomes for name, there in outcome.news.items() if there}
    cached = 130 // size * size
    assert news == set(route_hashes(prompt(130)[:cached]))
    bench.assert_clean()
