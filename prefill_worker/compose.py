"""A prefill worker: an engine whose finished prompts go to the outbox, and the server of it."""

from __future__ import annotations

from pdserve.engine.loop import Engine
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import offered_transports
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.loading import load


def compose(context: Context) -> Assembly:
    """Load the model; prompts in, tickets out."""
    loaded = load(context)
    settings, pool = context.settings, loaded.built.pool
    transports = offered_transports(pool, settings.transport)
    engine: Engine
    source = TransferSource(
        pool,
        loaded.built.fingerprint,
        worker_id=settings.worker_id,
        epoch=context.epoch,
        host=settings.host,
        port=settings.transfer_port,
        secret=settings.secret,
        lease_s=settings.lease_s,
        transports=transports,
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
        close=close,
    )
