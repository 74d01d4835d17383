"""A prefill worker: an engine whose finished prompts go to the outbox, and the server of it."""

from __future__ import annotations

from pdserve.engine.loop import Engine
from pdserve.kv_transfer.source import TransferSource
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.loading import load


def compose(context: Context) -> Assembly:
    """Load the model; prompts in, tickets out."""
    loaded = load(context)
    settings = context.settings
    engine: Engine
    source = TransferSource(
        loaded.pool,
        loaded.fingerprint,
        worker_id=settings.worker_id,
        epoch=context.epoch,
        host=settings.host,
        port=settings.transfer_port,
        secret=settings.secret,
        lease_s=settings.lease_s,
        transport=settings.transport,
        on_returned=lambda ticket, outcome: engine.returned(ticket.ticket_id),
    )
    engine = loaded.engine(context.sink, exporter=source)

    def close() -> None:
        source.close()
        loaded.pool.close()

    return Assembly(
        engine=engine,
        model=loaded.model,
        transports=source.transports,
        traffic=lambda: (0, source.bytes_out),
        close=close,
    )
