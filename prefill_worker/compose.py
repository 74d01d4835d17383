"""A prefill worker: an engine whose finished prompts go to the outbox, and the server of it."""

from __future__ import annotations

from pdserve.engine.loop import Engine
from pdserve.kv_transfer.device import device_memory
from pdserve.kv_transfer.faults import Dice, Faults, faulty_source
from pdserve.kv_transfer.nccl import open_nccl, source_halves
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SOURCE_HALVES, offered_transports
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.loading import load


def compose(context: Context) -> Assembly:
    """Load the model; prompts in, tickets out."""
    settings = context.settings
    faults = Dice(Faults.parse(settings.inject_faults)) if settings.inject_faults else None
    loaded = load(context)
    pool = loaded.built.pool
    memory = device_memory(pool.tensor) or pool
    nccl = open_nccl(memory, settings.transport)
    halves = source_halves(nccl, SOURCE_HALVES)
    transports = offered_transports(memory, settings.transport, halves)
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
        halves=faulty_source(halves, faults) if faults else halves,
        on_returned=lambda ticket, ending: engine.returned(ticket.ticket_id),
    )
    engine = loaded.engine(context.sink, exporter=source)

    def close() -> None:
        source.close()
        if nccl is not None:
            nccl.close()
        pool.close()

    return Assembly(
        engine=engine,
        model=loaded.info,
        transports=transports,
        traffic=lambda: (0, source.counters().bytes_out),
        routes=dict,
        close=close,
    )
