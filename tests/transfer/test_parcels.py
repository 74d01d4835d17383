"""Fetches between pools that are cut differently: block sizes, ranks, dtypes, forms of travel."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_rig import FINGERPRINT, Rig

from pdserve.kernels.wire import packed_nbytes
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink, faulty_source
from pdserve.kv_transfer.layout import LayoutError
from pdserve.kv_transfer.memory import HostMemory
from pdserve.kv_transfer.parcels import MOST_BYTES, Packing, agree, heads_of, objection
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport, Parcels

LAYERS, HEADS, DIM, BLOCKS = 2, 4, 8, 24
ANY = Parcels(block_size=1, first_head=0, num_heads=1)
TRANSPORTS = ("shm", "tcp")
UNTOUCHED = 7.0


def layout(**changes: Any) -> LayoutFingerprint:
    same = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "block_size": 4}
    return msgspec.structs.replace(FINGERPRINT, **{**same, **changes})


def ranks(fingerprint: LayoutFingerprint) -> list[LayoutFingerprint]:
    size = fingerprint.tp_size
    return [msgspec.structs.replace(fingerprint, tp_rank=rank) for rank in range(size)]


def pool(rig: Rig, rank: LayoutFingerprint) -> tuple[HostMemory, torch.Tensor]:
    """A rank's pool, and the same as [N, L, 2, S, heads of the rank, D]."""
    packing = Packing(rank, ANY)
    memory = rig.memory(BLOCKS, packing.block_nbytes)
    data = torch.frombuffer(memory._map, dtype=torch.uint8)[: BLOCKS * packing.block_nbytes]
    return memory, packing.tensor(data.view(BLOCKS, -1))


class World:
    """All ranks of a source and of a sink, and a prompt of `count` tokens in the source's."""

    def __init__(
        self,
        rig: Rig,
        theirs: LayoutFingerprint,
        mine: LayoutFingerprint,
        count: int,
        source: dict[str, Any] | None = None,
        **sink: Any,
    ) -> None:
        self.rig, self.count, self.requests = rig, count, 0
        size = theirs.block_size
        self.blocks = list(range(BLOCKS - 1, -1, -2))[: -(-count // size)]
        self.tokens = torch.randn(count, LAYERS, 2, HEADS, DIM).to(getattr(torch, theirs.dtype))
        self.sources: list[tuple[LayoutFingerprint, TransferSource]] = []
        for rank in ranks(theirs):
            memory, blocks = pool(rig, rank)
            heads = heads_of(rank)
            for token in range(count):
                part = self.tokens[token, :, :, heads.start : heads.stop]
                blocks[self.blocks[token // size], :, :, token % size] = part
            name = f"prefill-{rank.tp_rank}"
            made = rig.source(memory, fingerprint=rank, worker_id=name, **(source or {}))
            self.sources.append((rank, made))
        self.sinks: list[tuple[LayoutFingerprint, TransferSink, torch.Tensor]] = []
        for rank in ranks(mine):
            memory, blocks = pool(rig, rank)
            blocks.fill_(UNTOUCHED)
            self.sinks.append((rank, rig.sink(memory, fingerprint=rank, **sink), blocks))

    def ticket(self, source: TransferSource) -> KVTicket:
        self.requests += 1
        hashes = [b"h"] * (self.count // source._fingerprint.block_size)
        return source.offer(f"r{self.requests}", self.blocks, self.count, hashes)

    def fetch(self, wanted: list[int], targets: list[int]) -> list[FetchReport]:
        """Each rank of the sink, from each rank of the source that has heads that it misses."""
        reports = []
        for mine, sink, _ in self.sinks:
            missing = set(heads_of(mine))
            for theirs, source in self.sources:
                if found := set(heads_of(theirs)) & missing:
                    missing -= found
                    ticket = self.ticket(source)
                    reports.append(self.rig.fetch(sink, ticket, wanted, targets).only())
            assert not missing
        return reports

    def arrived(self, wanted: list[int], targets: list[int]) -> list[tuple[Any, Any]]:
        """(what stands in the sink's blocks, what must) for each rank and block."""
        pairs = []
        for mine, _, blocks in self.sinks:
            heads, size = heads_of(mine), mine.block_size
            others = [block for block in range(BLOCKS) if block not in targets]
            assert bool((blocks[others] == UNTOUCHED).all())
            for index, target in zip(wanted, targets, strict=True):
                right = self.tokens[index * size : (index + 1) * size]
                right = right[:, :, :, heads.start : heads.stop]
                got = blocks[target].permute(2, 0, 1, 3, 4)[: right.shape[0]]
                pairs.append((got, right))
        return pairs


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_tokens_arrive_in_any_cut(data: st.DataObject) -> None:
    sizes, degrees = st.sampled_from([1, 2, 3, 4, 8, 12]), st.sampled_from([1, 2, 4, 8])
    theirs = layout(block_size=data.draw(sizes), tp_size=data.draw(degrees))
    mine = layout(block_size=data.draw(sizes), tp_size=data.draw(degrees))
    room = BLOCKS // 2 * min(theirs.block_size, mine.block_size)
    count = data.draw(st.integers(1, min(40, room)))
    own = -(-count // mine.block_size)
    wanted = sorted(data.draw(st.sets(st.integers(0, own - 1), min_size=1)))
    targets = data.draw(st.permutations(range(BLOCKS)))[: len(wanted)]
    transport = data.draw(st.sampled_from(TRANSPORTS))
    rig = Rig()
    try:
        world = World(rig, theirs, mine, count, transport=transport)
        reports = world.fetch(wanted, targets)
        assert all(report.ok and report.transport == transport for report in reports), reports
        for got, right in world.arrived(wanted, targets):
            assert torch.equal(got, right)
    finally:
        rig.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("wire", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_blocks_are_smaller_and_close(
    rig: Rig, transport: str, wire: str, dtype: str
) -> None:
    same = layout(dtype=dtype)
    world = World(rig, same, same, 16, transport=transport, wire=wire)
    (report,) = world.fetch([0, 1, 3], [4, 9, 2])
    assert report.ok
    assert report.nbytes == 3 * packed_nbytes((LAYERS, 2, 4, HEADS, DIM))
    assert report.nbytes < 3 * Packing(same, ANY).block_nbytes
    rig.returned.wait()
    assert world.sources[0][1].counters().bytes_out == report.nbytes
    for got, right in world.arrived([0, 1, 3], [4, 9, 2]):
        largest = right.float().abs().amax(-1, keepdim=True)
        bound = largest / 254
        if wire == "fp8":
            bound = torch.maximum(right.float().abs() / 16, largest / 448 / 1024)
        rounding = right.float().abs() / 128 if dtype == "bfloat16" else 1e-6
        assert bool(((got.float() - right.float()).abs() <= bound + rounding).all())


def test_packed_and_cut_at_once(rig: Rig) -> None:
    theirs, mine = layout(block_size=2, tp_size=2), layout(block_size=8, dtype="bfloat16")
    world = World(rig, theirs, mine, 21, wire="int8", converts=True)
    assert all(report.ok for report in world.fetch([0, 2], [4, 9]))
    for got, right in world.arrived([0, 2], [4, 9]):
        torch.testing.assert_close(got.float(), right, rtol=0.01, atol=0.03)


def test_another_dtype_is_refused_until_it_is_asked_for(rig: Rig) -> None:
    theirs, mine = layout(), layout(dtype="bfloat16")
    world = World(rig, theirs, mine, 8)
    (report,) = world.fetch([0, 1], [0, 1])
    assert report.failed == (0, 1)
    assert "dtype: 'bfloat16' here, 'float32' there" in report.reason
    assert "only where that is asked for" in report.reason
    world = World(rig, theirs, mine, 8, converts=True)
    (report,) = world.fetch([0, 1], [0, 1])
    assert report.ok
    for got, right in world.arrived([0, 1], [0, 1]):
        assert torch.equal(got, right.bfloat16())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_spoiled_parcels_are_fetched_again(rig: Rig, transport: str) -> None:
    dice = Dice(Faults(seed=3, flip=0.2, reorder=0.2, drop=0.1, truncate=0.1))
    world = World(
        rig, layout(), layout(block_size=2), 16,
        source={"halves": faulty_source(SOURCE_HALVES, dice)},
        halves=faulty_sink(SINK_HALVES, dice), transport=transport,
    )  # fmt: skip
    outcomes = set()
    for _ in range(20):
        (report,) = world.fetch([1, 2, 6], [4, 5, 6])
        outcomes.add(report.ok)
        if report.ok:
            for got, right in world.arrived([1, 2, 6], [4, 5, 6]):
                assert torch.equal(got, right)
    assert True in outcomes and dice.count.total() > 5


def test_a_growing_ticket_travels_in_parcels(rig: Rig) -> None:
    """Parcels wait for all the source's blocks that they are made of."""
    world = World(rig, layout(block_size=4), layout(block_size=6), 20, stall_s=1.0)
    (_, source), ((_, sink, _),) = world.sources[0], world.sinks
    ticket = source.open("g", 20, [b"h"] * 5)
    reports = rig.fetch(sink, ticket, [0, 1, 3], [4, 5, 6])
    for first, end in ((0, 1), (1, 2), (2, 4)):  # 4, 8 and 16 tokens: none, one, two parcels
        source.extend("g", world.blocks[first:end])
    source.seal("g", world.blocks[4:])
    assert reports.only().ok
    for got, right in world.arrived([0, 1, 3], [4, 5, 6]):
        assert torch.equal(got, right)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"num_layers": 3}, {}, "num_layers: 2 here, 3 there"),
        ({"weights": "x"}, {"converts": True, "wire": "int8"}, "weights"),
        ({"dtype": "float16"}, {}, "dtype: 'float32' here, 'float16' there"),
        ({"dtype": "float8_e4m3fn"}, {"converts": True}, "Only float32, bfloat16, float16 can"),
        ({"tp_size": 2, "tp_rank": 1}, {"rank": (0, 2)}, "holds the KV heads 0 to 1"),
    ],
    ids=["layers", "weights", "dtype", "float8", "heads"],
)
def test_what_differs_too_much_is_named(
    changes: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    rank, size = options.pop("rank", (0, 1))
    with pytest.raises(LayoutError, match=says):
        agree(layout(tp_rank=rank, tp_size=size), layout(**changes), **options)


def test_exactness_is_not_given_up_for_batch_invariant_workers() -> None:
    same = layout(batch_invariant=True)
    assert agree(same, same) is None
    with pytest.raises(LayoutError, match="bit by bit"):
        agree(same, same, wire="int8")
    float8 = layout(dtype="float8_e4m3fn")
    with pytest.raises(LayoutError, match="cannot travel as int8"):
        agree(float8, float8, wire="int8")


@pytest.mark.parametrize(
    ("parcels", "says"),
    [
        ({"wire": "zip"}, "not as 'zip'"),
        ({"block_size": 0}, "1 to 1024 tokens"),
        ({"block_size": 2**40}, "1 to 1024 tokens"),
        ({"first_head": 2, "num_heads": 1}, "holds 0 to 1"),
        ({"first_head": -1, "num_heads": 2}, "holds 0 to 1"),
        ({"num_heads": 0}, "holds 0 to 1"),
    ],
)
def test_a_source_refuses_impossible_parcels(parcels: dict[str, Any], says: str) -> None:
    asked = msgspec.structs.replace(ANY, **parcels)
    assert says in objection(layout(tp_size=2), asked)
    assert objection(layout(tp_size=2), ANY) == ""


def test_a_source_does_not_gather_more_than_it_can_hold() -> None:
    big = msgspec.structs.replace(ANY, block_size=1024, num_heads=4)
    each = Packing(layout(), big).nbytes("float32")
    assert objection(layout(), big, MOST_BYTES // each) == ""
    assert "are allowed" in objection(layout(), big, MOST_BYTES // each + 1)
