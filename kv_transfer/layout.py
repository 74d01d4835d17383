"""Between pools of different shape: which part of which source block goes where. No tensors.

A pool of one rank has the shape [N, L, 2, S, H / tp, D] (N blocks, L layers, S tokens per block, H
KV heads of the whole model, D head size). Two workers of one model may differ in S, in the number
of tensor-parallel ranks tp and in the element type; L, H and D are the model's. With more ranks
than KV heads, neighbouring ranks hold the same head.

    source, tp 1, S 4          target, tp 2, S 2
    ┌───────────────┐          rank 0 ┌───────┐┌───────┐
    │ heads 0..H/2  │  ──────►        │ tok 01││ tok 23│
    │ heads H/2..H  │          rank 1 ├───────┤├───────┤
    └───────────────┘                 └───────┘└───────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdserve.protocol.errors import PdserveError

WIDER = {("bfloat16", "float32"), ("float16", "float32")}
"""Conversions that keep every value."""


class LayoutError(PdserveError):
    """Two layouts between which blocks cannot be moved, or blocks that do not fit the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one worker, with all its ranks, lays out the KV cache."""

    num_layers: int
    num_kv_heads: int
    """Of the whole model."""
    head_dim: int
    block_size: int
    """Tokens per block."""
    dtype: str
    tp_size: int = 1

    def __post_init__(self) -> None:
        heads, ranks = self.num_kv_heads, self.tp_size
        if min(self.num_layers, heads, self.head_dim, self.block_size, ranks) < 1:
            raise LayoutError(f"All sizes of a layout must be at least 1. Given: {self}.")
        if heads % ranks and ranks % heads:
            raise LayoutError(
                f"{heads} KV heads cannot be spread evenly over {ranks} ranks: one number must be "
                "a multiple of the other."
            )

    @property
    def heads_per_rank(self) -> int:
        return max(1, self.num_kv_heads // self.tp_size)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same heads."""
        return max(1, self.tp_size // self.num_kv_heads)

    def first_head(self, rank: int) -> int:
        """Number, in the whole model, of the first head that `rank` holds."""
        return rank // self.replicas * self.heads_per_rank

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Of one rank's pool."""
        per_rank = self.heads_per_rank
        return (num_blocks, self.num_layers, 2, self.block_size, per_rank, self.head_dim)


@dataclass(frozen=True, slots=True)
class Side:
    """Where a copy begins in a rank's pool."""

    rank: int
    token: int
    """Within the block."""
    head: int
    """Within the rank."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The same box out of many blocks: for each i, all layers, K and V, `tokens` tokens and `heads`
    heads go from source block `source_blocks[i]` to target block `target_blocks[i]`. No target
    block occurs twice."""

    source: Side
    target: Side
    tokens: int
    heads: int
    source_blocks: tuple[int, ...]
    target_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Copies whose targets do not overlap, in any order."""

    copies: tuple[Copy, ...]
    source: Layout
    target: Layout

    @property
    def converts(self) -> bool:
        """Whether the elements change their type."""
        return self.source.dtype != self.target.dtype

    @property
    def exact(self) -> bool:
        """Whether every value arrives as it was."""
        pair = (self.source.dtype, self.target.dtype)
        return not self.converts or pair in WIDER

    @property
    def whole_blocks(self) -> bool:
        """Whether blocks travel as they are, rank by rank."""
        mine, theirs = self.source, self.target
        return (mine.block_size, mine.tp_size) == (theirs.block_size, theirs.tp_size)


def plan(
    source: Layout,
    target: Layout,
    num_tokens: int,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    wanted: Sequence[int] | None = None,
) -> Plan:
    """What to copy so that tokens 0 .. num_tokens - 1 of the source stand in the target.

    `source_blocks`, `target_blocks`: block numbers in token order, the same on every rank of a
    side; `wanted`: indices into `target_blocks` that are to be filled, by default all. Raises
    LayoutError.
    """
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        mine, theirs = getattr(source, name), getattr(target, name)
        if mine != theirs:
            raise LayoutError(
                f"The models differ in {name}: {mine} at the source, {theirs} at the target."
            )
    for side, layout, blocks in (
        ("source", source, source_blocks), ("target", target, target_blocks)
    ):  # fmt: skip
        needed = -(-num_tokens // layout.block_size)
        if num_tokens < 1 or len(blocks) != needed:
            raise LayoutError(
                f"{num_tokens} tokens in blocks of {layout.block_size} need {needed} blocks at the "
                f"{side}. Given: {len(blocks)}."
            )
        if len(set(blocks)) != len(blocks):
            raise LayoutError(f"A block occurs twice at the {side}.")
    indices = range(len(target_blocks)) if wanted is None else wanted
    if any(not 0 <= index < len(target_blocks) for index in indices):
        raise LayoutError(f"Wanted blocks must be among the target's {len(target_blocks)}.")
    boxes: dict[tuple[Side, Side, int, int], list[tuple[int, int]]] = {}
    for index in dict.fromkeys(indices):
        for start, block, token, tokens in _token_pieces(source, target, num_tokens, index):
            for there, here, heads in _head_pieces(source, target):
                key = (
                    Side(there[0], start, there[1]), Side(here[0], token, here[1]), tokens, heads
                )  # fmt: skip
                boxes.setdefault(key, []).append((source_blocks[block], target_blocks[index]))
    copies = [
        Copy(*key, tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))
        for key, pairs in boxes.items()
    ]
    return Plan(tuple(copies), source, target)


def _token_pieces(
    source: Layout, target: Layout, num_tokens: int, index: int
) -> Iterator[tuple[int, int, int, int]]:
    """How target block `index` is put together: (token within the source block, index of the source
    block, token within the target block, tokens)."""
    if source.block_size == target.block_size:  # rows that nobody has written travel with the rest
        yield 0, index, 0, source.block_size
        return
    first = token = index * target.block_size
    end = min(first + target.block_size, num_tokens)
    while token < end:
        block, start = divmod(token, source.block_size)
        tokens = min(source.block_size - start, end - token)
        yield start, block, token - first, tokens
        token += tokens


def _head_pieces(
    source: Layout, target: Layout
) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """How each target rank's heads are put together: ((source rank, head within it), (target rank,
    head within it), heads). Where several source ranks hold a head, target ranks take turns."""
    for rank in range(target.tp_size):
        first = head = target.first_head(rank)
        end = first + target.heads_per_rank
        while head < end:
            holder = head // source.heads_per_rank * source.replicas + rank % source.replicas
            start = head - source.first_head(holder)
            heads = min(source.heads_per_rank - start, end - head)
            yield (holder, start), (rank, head - first), heads
            head += heads
