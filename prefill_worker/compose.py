"""A prefill worker: an engine whose finished prompts go to the outbox, and the server of it."""

from __future__ import annotations

from pdserve.engine.loop import Engine
from pdserve.kv_transfer.device import device_memory
from pdserve.kv_transfer.faults import Dice, Faults, faulty_source
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SOURCE_HALVES, offered_transports
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.loading import load


def compose(context: Context) -> Assembly:
    """Load the model; prompts in, tickets out."""
    settings = context.settings
    faults = settings.inject_faults
    halves = faulty_source(SOURCE_HALVES, Dice(Faults.parse(faults))) if faults else SOURCE_HALVES
    loaded = load(context)
    pool = loaded.built.pool
    memory = device_memory(pool.tensor) or pool
    transports = offered_transports(memory, settings.transport)
    engine: Engine
    source = TransferSource(
        memory,
        loaded.built.fingerprint,
        worker_id=settings.worker_id,
        epoch=context.epoch,
        host=settings.host,
        port=settings.transfer_port,
        secret=settings.secret,
        lease_s=settings.lease_s,
        transports=transports,
        halves=halves,
        on_returned=lambda ticket, ending: engine.returned(ticket.ticket_id),
    )
    engine = loaded.engine(context.sink, exporter=source)

    def close() -> None:
        source.close()
        pool.close()

    return Assembly(
        engine=engine,
        model=loaded.info,
        transports=transports,
        traffic=lambda: (0, source.counters().bytes_out),
        routes=dict,
        close=close,
    )
