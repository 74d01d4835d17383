"""Requests whose grammar is being compiled: what comes meanwhile, and what goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdserve.engine.grammar import GrammarError, Grammars, Matcher
from pdserve.protocol.blocks import pack_tokens
from pdserve.protocol.grammar import Constraint
from pdserve.protocol.messages import Continue, Submit
from pdserve.protocol.sampling import SamplingParams
from pdserve.worker.grammars import Compiling

pytestmark = pytest.mark.anyio
MESSAGE = Submit(
    request_id="a", epoch=1, prompt=pack_tokens([1]), timeout_s=30.0, output_token_ids=[7],
    sampling=SamplingParams(seed=0, max_tokens=5, constraint=Constraint(after=(9,))),
)  # fmt: skip
GO = Continue(request_id="a", epoch=1, output_token_ids=[5])


class SlowGrammars(Grammars):
    """Compiles when told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.fault: Exception | None = None

    def matcher(self, sampling: SamplingParams, output_token_ids: Iterable[int]) -> Matcher:
        assert self.go.wait(10)
        if self.fault is not None:
            raise self.fault
        assert list(output_token_ids) == [7]
        return Matcher(sampling, None)


class Listener:
    """What came out."""

    def __init__(self, grammars: SlowGrammars, executor: ThreadPoolExecutor) -> None:
        self.grammars = grammars
        self.compiling = Compiling(grammars, executor)
        self.done: list[tuple[Submit, Continue | None]] = []
        self.failed: list[str] = []
        self.heard = asyncio.Event()

    def start(self, client: object = "x") -> None:
        def done(message: Submit, matcher: Matcher, continued: Continue | None) -> None:
            self.done.append((message, continued))
            self.heard.set()

        def failed(text: str) -> None:
            self.failed.append(text)
            self.heard.set()

        self.compiling.start(client, MESSAGE, done, failed)

    async def finish(self) -> None:
        self.grammars.go.set()
        await asyncio.wait_for(self.heard.wait(), 10)
        await asyncio.sleep(0)
        assert len(self.compiling) == 0 and not self.compiling._held


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    grammars = SlowGrammars()
    with ThreadPoolExecutor(1) as executor:
        yield Listener(grammars, executor)
        grammars.go.set()


async def test_a_request_goes_on_with_less_time(listener: Listener) -> None:
    listener.start()
    assert len(listener.compiling) == 1
    await listener.finish()
    ((message, continued),) = listener.done
    assert message.timeout_s < 30 and continued is None and not listener.failed


async def test_first_tokens_wait_for_their_request(listener: Listener) -> None:
    assert not listener.compiling.hold("x", GO)
    listener.start()
    assert not listener.compiling.hold("y", GO)
    assert listener.compiling.hold("x", GO)
    await listener.finish()
    assert listener.done[0][1] == GO
    assert not listener.compiling.hold("x", GO)


@pytest.mark.parametrize("request_id", ["a", None])
async def test_what_is_forgotten_does_not_come(listener: Listener, request_id: str | None) -> None:
    listener.start("x")
    listener.start("y")
    assert listener.compiling.hold("x", GO)
    listener.compiling.forget("x", request_id)
    listener.compiling.forget("y", "another")
    await listener.finish()
    assert len(listener.done) == 1 and listener.done[0][1] is None


@pytest.mark.parametrize("fault", [GrammarError("It is bad."), RuntimeError("boom")])
async def test_faults_are_sentences(listener: Listener, fault: Exception) -> None:
    listener.grammars.fault = fault
    listener.start()
    await listener.finish()
    assert not listener.done
    (text,) = listener.failed
    assert str(fault).rstrip(".") in text and text.endswith(".")
