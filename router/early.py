"""A hand-over that begins before its prompt is complete.

    placing ──submitted──► leg ──first token──► resumed: it is the answer's running leg
       ▲                    │
       └──its worker fails──┘

Whatever goes wrong here costs nothing but the head start: then blocks are handed over at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdserve.protocol.errors import RequestError
from pdserve.protocol.ticket import KVTicket
from pdserve.router.candidates import CandidateSet
from pdserve.router.chooser import Verdict
from pdserve.router.leg import AnswerLeg

MAX_TRIES = 4
"""Workers that are asked to fetch one prompt early."""

Done = Callable[[Verdict], None]


class Early:
    """At most one leg at a time, which awaits its first token. Event loop only."""

    def __init__(
        self,
        ticket: KVTicket,
        *,
        readers: Callable[[], CandidateSet],
        choose: Callable[[CandidateSet, Done], None],
        submit: Callable[[Verdict, KVTicket], AnswerLeg | None],
    ) -> None:
        """`readers()`: who may fetch; `choose(readers, done)`: one of them, now or later;
        `submit(verdict, ticket)`: the leg, or None if its worker has just left."""
        self._ticket = ticket
        self._readers, self._choose, self._submit = readers, choose, submit
        self._tries = 0
        self._over = False
        self.leg: AnswerLeg | None = None
        """None: it is being placed, or has ended badly."""

    def place(self) -> None:
        """Choose who shall fetch; maybe nobody."""
        readers = self._readers()
        if readers and self._tries < MAX_TRIES:
            self._tries += 1
            self._choose(readers, self._send)

    def _send(self, verdict: Verdict) -> None:
        """Carry a choice out, unless the first token was quicker."""
        if not self._over:
            self.leg = self._submit(verdict, self._ticket)
            if self.leg is None:
                self.place()

    def fetches(self, ticket: KVTicket) -> bool:
        """The prompt is complete and this is its ticket: whether a leg is fetching with it. If
        not, nobody has been found yet, or the growing ticket has ended and this is another one."""
        return self.leg is not None and ticket.ticket_id == self._ticket.ticket_id

    def resume(self, tokens: Sequence[int]) -> AnswerLeg | None:
        """Send the leg its first tokens; it is the caller's now. None if its worker has gone."""
        leg, self.leg, self._over = self.leg, None, True
        assert leg is not None
        try:
            leg.link.resume(leg.request_id, list(tokens))
        except RequestError:
            return None
        return leg

    def ended(self, elsewhere: bool) -> None:
        """The leg has failed; if that may help, somebody else fetches."""
        self.leg = None
        if elsewhere:
            self.place()

    def drop(self) -> None:
        """Nobody needs it any more. Idempotent."""
        leg, self.leg, self._over = self.leg, None, True
        if leg is not None:
            leg.link.abort(leg.request_id)
