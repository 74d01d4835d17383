"""Submissions with a grammar, while it is compiled: in a thread, before the engine sees them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

import msgspec

from pdserve.engine.grammar import GrammarError, Grammars, Matcher
from pdserve.protocol.messages import Continue, Submit

log = logging.getLogger(__name__)

LEAST_TIME_S = 0.001

Key = tuple[object, str]
Done = Callable[[Submit, Matcher, Continue | None], None]


class Compiling:
    """Requests whose matcher is being made. Event loop only.

    A request that is forgotten meanwhile (its client has left) is not passed on; the thread
    finishes what it does, which the router's check has bounded.
    """

    def __init__(self, grammars: Grammars, executor: Executor) -> None:
        self._grammars = grammars
        self._executor = executor
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._held: dict[Key, Continue] = {}
        """First tokens that came before the engine knew of their request."""

    def __len__(self) -> int:
        return len(self._tasks)

    def start(
        self,
        client: object,
        message: Submit,
        done: Done,
        failed: Callable[[str], None],
    ) -> None:
        """Call `done` with the request, its time shortened, and what `hold` was given meanwhile;
        or `failed` with a sentence."""
        key = (client, message.request_id)
        task = asyncio.create_task(self._make(key, message, done, failed))
        self._tasks[key] = task
        task.add_done_callback(lambda task: self._ended(key, task))

    def hold(self, client: object, message: Continue) -> bool:
        """Keep it for its request, if that is being compiled."""
        key = (client, message.request_id)
        if key not in self._tasks:
            return False
        self._held[key] = message
        return True

    def forget(self, client: object, request_id: str | None = None) -> None:
        """The request, or all of the client's."""
        for key in list(self._tasks):
            if key[0] is client and request_id in (None, key[1]):
                self._tasks.pop(key).cancel()
                self._held.pop(key, None)

    def _ended(self, key: Key, task: asyncio.Task[None]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
            self._held.pop(key, None)

    async def _make(
        self, key: Key, message: Submit, done: Done, failed: Callable[[str], None]
    ) -> None:
        began, loop = time.monotonic(), asyncio.get_running_loop()
        make = self._grammars.matcher
        try:
            matcher = await loop.run_in_executor(
                self._executor, make, message.sampling, message.output_token_ids
            )
        except GrammarError as error:
            failed(str(error))
        except Exception as error:
            log.exception("The grammar of %s failed", message.request_id)
            failed(f"The grammar could not be compiled: {error}.")
        else:
            left = message.timeout_s - (time.monotonic() - began)
            shortened = msgspec.structs.replace(message, timeout_s=max(LEAST_TIME_S, left))
            done(shortened, matcher, self._held.pop(key, None))
