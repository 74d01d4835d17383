"""The sink's side of growing tickets: how far the source is with the prompt."""

from __future__ import annotations

from typing import Any

from pdserve.kv_transfer.job import Ended, Job
from pdserve.kv_transfer.line import Address, LinePool
from pdserve.protocol.errors import ProtocolError
from pdserve.protocol.transfer import Grown, Refused, ToReader, Watch
from pdserve.protocol.wire import MessageDecoder

_TO_READER: MessageDecoder[Any] = MessageDecoder(ToReader)


def follow(job: Job, lines: LinePool, stall_s: float) -> None:
    """Wait until the source has more blocks ready than the job knows of, or all; say so in the
    job. Raises Ended once the ticket is over or the job shall end, OSError or ProtocolError."""
    ticket = job.ticket
    deadline = job.wait(stall_s)
    with lines.line(Address.of(ticket), deadline, job.attach) as line:
        try:
            while True:
                watch = Watch(ticket_id=ticket.ticket_id, epoch=ticket.epoch, have=job.ready)
                line.send(watch, deadline)
                answer = line.receive(_TO_READER, deadline)
                if isinstance(answer, Refused):
                    break
                if not isinstance(answer, Grown) or answer.ticket_id != ticket.ticket_id:
                    raise ProtocolError("The source answered a watch with another message.")
                if not _follows(answer, job):
                    raise ProtocolError(
                        f"The source counts {answer.ready} of {ticket.num_blocks} blocks in "
                        f"{ticket.slices} slices as ready; there was {job.ready}."
                    )
                if answer.sealed or answer.ready.beyond(job.ready):
                    job.ready, job.growing = answer.ready, not answer.sealed
                    return
                deadline = job.wait(stall_s)
        finally:
            job.attach(None)
    raise Ended(answer.reason)


def _follows(answer: Grown, job: Job) -> bool:
    """Whether the answer can be true, and comes after what the job knows."""
    ready, ticket = answer.ready, job.ticket
    within = 0 <= ready.blocks <= ready.blocks + ready.ahead <= ticket.num_blocks
    return (
        within
        and 0 <= ready.slices < max(1, ticket.slices)
        and not job.ready.beyond(ready)
        and (not answer.sealed or ready.blocks == ticket.num_blocks)
    )
