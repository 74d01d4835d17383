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
                if not job.ready <= answer.ready <= ticket.num_blocks or (
                    answer.sealed and answer.ready < ticket.num_blocks
                ):
                    raise ProtocolError(
                        f"The source counts {answer.ready} ready blocks of {ticket.num_blocks}; "
                        f"there were {job.ready}."
                    )
                if answer.sealed or answer.ready > job.ready:
                    job.ready, job.growing = answer.ready, not answer.sealed
                    return
                deadline = job.wait(stall_s)
        finally:
            job.attach(None)
    raise Ended(answer.reason)
