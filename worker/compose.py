"""What a worker is made of, whatever its role: an engine, an outbox and an inbox over one KV pool.

A role says which legs routers give it, not what it can do: so it may change at any moment.
"""

from __future__ import annotations

from pdserve.cluster.settings import PARCEL_TRANSPORTS, WorkerSettings
from pdserve.engine.loop import Engine
from pdserve.kernels import digest
from pdserve.kv_transfer import cuda_ipc, loopback
from pdserve.kv_transfer.cuda_ipc import open_ipc
from pdserve.kv_transfer.device import device_memory
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink, faulty_source
from pdserve.kv_transfer.held import Ending
from pdserve.kv_transfer.layout import LayoutError
from pdserve.kv_transfer.nccl import open_nccl, sink_halves, source_halves
from pdserve.kv_transfer.parcels import agree
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.slices import slices_of
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import (
    SINK_HALVES,
    SOURCE_HALVES,
    TransportSettingError,
    offered_transports,
)
from pdserve.protocol.measures import Measures
from pdserve.protocol.ticket import LayoutFingerprint
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.loading import load


def _wire(settings: WorkerSettings, fingerprint: LayoutFingerprint) -> str:
    """The form in which to ask for blocks. Raises TransportSettingError for one that this worker
    cannot have."""
    wire = "" if settings.kv_wire_dtype == "auto" else settings.kv_wire_dtype
    if wire and settings.transport not in PARCEL_TRANSPORTS:
        raise TransportSettingError(
            f"--kv-wire-dtype {wire} packs blocks that travel over shm or tcp, not over "
            f"{settings.transport}; leave one of the two options out."
        )
    try:
        agree(fingerprint, fingerprint, wire=wire)
    except LayoutError as error:
        raise TransportSettingError(f"{error} Leave --kv-wire-dtype out.") from None
    return wire


def compose(context: Context) -> Assembly:
    """Load the model, and join it with both ends of the transfer."""
    settings = context.settings
    faults = Dice(Faults.parse(settings.inject_faults)) if settings.inject_faults else None
    loaded = load(context)
    digest.prepare()
    pool, fingerprint = loaded.built.pool, loaded.built.fingerprint
    memory = device_memory(pool.tensor) or pool
    nccl = open_nccl(memory, settings.transport)
    ipc = open_ipc(memory, settings.transport)
    loop = loopback.Loop(settings.worker_id)
    giving = cuda_ipc.source_halves(ipc, source_halves(nccl, SOURCE_HALVES))
    giving = loopback.source_halves(loop, giving)
    taking = cuda_ipc.sink_halves(ipc, sink_halves(nccl, SINK_HALVES))
    taking = loopback.sink_halves(loop, taking)
    transports = offered_transports(memory, settings.transport, giving)
    wire = _wire(settings, fingerprint)
    engine: Engine
    source = TransferSource(
        memory,
        fingerprint,
        worker_id=settings.worker_id,
        epoch=context.epoch,
        host=settings.host,
        port=settings.transfer_port,
        secret=settings.secret,
        lease_s=settings.lease_s,
        transports=transports,
        halves=faulty_source(giving, faults) if faults else giving,
        slices=slices_of(fingerprint.num_layers),
        on_returned=lambda ticket, ending: engine.returned(ticket.ticket_id),
    )
    sink = TransferSink(
        memory,
        fingerprint,
        name=settings.worker_id,
        secret=settings.secret,
        transport=settings.transport,
        wire=wire,
        converts=settings.kv_convert,
        halves=faulty_sink(taking, faults) if faults else taking,
    )
    engine = loaded.engine(context.sink, exporter=source, importer=sink)

    def traffic() -> tuple[int, int, int]:
        out = source.counters()
        return sink.counters().bytes_in, out.bytes_out, out.bytes_early

    def measures() -> Measures:
        return engine.measuring.measures(
            failed_releases=sink.counters().failed_releases,
            expired_tickets=source.counters().outbox.returned.get(Ending.EXPIRED.value, 0),
        )

    def close() -> None:
        source.close()
        sink.close()
        if nccl is not None:
            nccl.close()
        pool.close()

    return Assembly(
        engine=engine,
        model=loaded.info,
        grammars=loaded.grammars,
        transports=transports,
        traffic=traffic,
        measures=measures,
        routes=lambda: sink.counters().routes,
        speeds=lambda: sink.counters().speeds,
        begin_epoch=source.begin_epoch,
        close=close,
    )
