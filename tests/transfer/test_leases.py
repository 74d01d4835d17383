"""What a sink says about tickets' leases, where sources misbehave."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from transfer_rig import Rig

from pdserve.kv_transfer.leases import Leases
from pdserve.kv_transfer.line import LinePool
from pdserve.protocol.ticket import KVTicket


def test_a_silent_source_is_not_asked_for_each_of_its_tickets(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question may take a second, and the other sources' leases run meanwhile."""
    asked: Counter[str] = Counter()

    def settle(ticket: KVTicket, message: object, deadline: float) -> bool:
        asked[ticket.source] += 1
        if ticket.source == "silent":
            raise TimeoutError
        return True

    leases = Leases(LinePool(secret="s", name="x"))
    monkeypatch.setattr(leases, "_settle", settle)
    ticket = rig.ticket(rig.source(), "r", [1])
    for number in range(4):
        source = "silent" if number < 3 else "other"
        leases.keep(
            msgspec.structs.replace(ticket, source=source, request_id=f"r{number}", lease_s=0.0)
        )
    leases.renew_kept()
    assert asked == {"silent": 1, "other": 1}
    leases._silent.clear()  # it has been left alone long enough
    leases.renew_kept()
    assert asked == {"silent": 2, "other": 2}


def test_an_impossible_address_is_an_unreachable_one(rig: Rig) -> None:
    """The thread that renews goes on."""
    leases = Leases(LinePool(secret="s", name="x"))
    ticket = rig.ticket(rig.source(), "r", [1])
    for changes in ({"host": "x" * 64}, {"port": 70_000}):
        leases.keep(msgspec.structs.replace(ticket, lease_s=0.0, **changes))
        leases.renew_kept()
