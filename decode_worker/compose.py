"""A decode worker: an engine fed by the inbox; colocated, the same engine fed by prompts too."""

from __future__ import annotations

from pdserve.kv_transfer.device import device_memory
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink
from pdserve.kv_transfer.nccl import open_nccl, sink_halves
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.transports import SINK_HALVES
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.loading import load


def compose(context: Context) -> Assembly:
    """Load the model; tickets (or prompts) in, tokens out."""
    settings = context.settings
    faults = Dice(Faults.parse(settings.inject_faults)) if settings.inject_faults else None
    loaded = load(context)
    pool = loaded.built.pool
    memory = device_memory(pool.tensor) or pool
    nccl = open_nccl(memory, settings.transport)
    halves = sink_halves(nccl, SINK_HALVES)
    sink = TransferSink(
        memory,
        loaded.built.fingerprint,
        name=settings.worker_id,
        secret=settings.secret,
        transport=settings.transport,
        halves=faulty_sink(halves, faults) if faults else halves,
    )

    def close() -> None:
        sink.close()
        if nccl is not None:
            nccl.close()
        pool.close()

    return Assembly(
        engine=loaded.engine(context.sink, importer=sink),
        model=loaded.info,
        transports=tuple(halves) if settings.transport == "auto" else (settings.transport,),
        traffic=lambda: (sink.counters().bytes_in, 0),
        routes=lambda: sink.counters().routes,
        close=close,
    )
