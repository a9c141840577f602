"""The cost model of the Triton kernels: which path a call takes, into how many parts, and what time it should need.

    t = max(FLOP / (η · peak), exponentials / rate, L2 bytes / bandwidth, memory bytes / bandwidth) + launches

It sees static shapes alone. The rates are data sheets' and the efficiencies are assumed: nothing here was measured, so
its times are predictions, good for comparing one path with another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from prefix_fast.backends.triton_config import Device


class Card(NamedTuple):
    """Peak rates of a graphics card: dense matrix products with float32 sums, boost clock."""

    architecture: str
    multiprocessors: int
    half_flops: float  # bfloat16 and float16
    tf32_flops: float
    single_flops: float  # float32 without tensor cores
    exponentials: float  # a second: 16 a cycle and multiprocessor
    memory_bytes: float  # a second
    l2_bytes: float  # a second; about that of public microbenchmarks


CARDS = {
    "A100": Card("sm_80", 108, 312e12, 156e12, 19.5e12, 2.4e12, 2.04e12, 4.0e12),
    "A10": Card("sm_86", 72, 125e12, 62e12, 31e12, 1.9e12, 0.6e12, 1.8e12),
    "L40S": Card("sm_89", 142, 362e12, 183e12, 91e12, 5.7e12, 0.864e12, 4.5e12),
    "H100": Card("sm_90", 132, 989e12, 494e12, 67e12, 3.7e12, 3.35e12, 5.5e12),
    "H200": Card("sm_90", 132, 989e12, 494e12, 67e12, 3.7e12, 4.8e12, 5.5e12),
    "B200": Card("sm_100", 148, 2250e12, 1125e12, 75e12, 4.4e12, 8.0e12, 10e12),
    "RTX5090": Card("sm_120", 170, 209e12, 105e12, 105e12, 6.5e12, 1.79e12, 6.0e12),
    "MI300X": Card("gfx942", 304, 1307e12, 653e12, 163e12, 10e12, 5.3e12, 10e12),
}
_OF_THE_WHOLE = ("architecture", "multiprocessors", "memory_bytes")  # not a multiple of the multiprocessors
LAUNCH = 4e-6  # seconds of one kernel launch
FORWARD_SHARE, BACKWARD_SHARE = 0.375, 0.3  # η: of the peak, in Triton
OCCUPANCY = 2  # programs that share a multiprocessor
FILL = 0.85  # of the device, below which work is split further
LEAST_TILES = 4  # query tiles that a split of a reader list is worth
LEAST_CHUNK = 128  # keys that a split of a segment is worth
SHORT = 64  # keys of a segment whose gradients stay in registers while dq is made
SPLIT_QUERIES = 64  # queries of a row from which on the one-pass forward fills its tiles


class Shape(NamedTuple):
    """What is static about a call. Packed sets count as segments of their average length."""

    rows: int  # B
    heads: int  # H
    kv_heads: int  # Hkv
    queries: int  # Tq
    keys: int  # Tk
    head_dim: int
    element: int  # bytes of one number of query, key and value
    sets: tuple[tuple[int, int], ...]  # (N, P) of each shared set
    causal: bool = True
    tf32: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of a row's chain: its segment of each set, then its own."""
        return (*(size for _, size in self.sets), self.keys)

    @property
    def pairs(self) -> float:
        """Visible (query, key) pairs of one head, all rows together."""
        own = self.queries * self.keys
        if self.causal:
            own -= min(self.queries, self.keys) * (min(self.queries, self.keys) - 1) // 2
        return self.rows * (self.queries * sum(size for _, size in self.sets) + own)

    @property
    def shared_bytes(self) -> float:
        """Of the keys and values of all shared segments."""
        return 2 * self.kv_heads * self.head_dim * self.element * sum(count * size for count, size in self.sets)

    @property
    def own_bytes(self) -> float:
        """Of the rows' own keys and values."""
        return 2 * self.rows * self.kv_heads * self.keys * self.head_dim * self.element

    @property
    def query_bytes(self) -> float:
        """Of the queries; as many as of the output."""
        return self.rows * self.heads * self.queries * self.head_dim * self.element


def card_of(device: Device) -> Card:
    """The table's card of that architecture, scaled to the device's size; the least one where it has none."""
    card = next((card for card in CARDS.values() if card.architecture == device.architecture), CARDS["A10"])
    scale = device.multiprocessors / card.multiprocessors
    scaled = {name: getattr(card, name) * scale for name in Card._fields if name not in _OF_THE_WHOLE}
    return card._replace(multiprocessors=device.multiprocessors, **scaled)


class Splits(NamedTuple):
    """Into how many programs the readers of a segment, and the queries of each, are divided."""

    readers: int
    queries: int


def reader_splits(device: Device, programs: int, pairs: int, query_tiles: int) -> Splits:
    """The least number of splits that fills the device, with enough query tiles for each to be worth its partial sums.

    `programs` there are without splitting; each walks about `pairs` (rows × heads of a group) of `query_tiles`.
    """
    least = 1 if device.architecture == "interpreter" else LEAST_TILES
    wanted = math.ceil(FILL * device.multiprocessors * OCCUPANCY / max(programs, 1))
    wanted = max(1, min(wanted, pairs * query_tiles // least))
    readers = min(wanted, max(pairs, 1))
    return Splits(readers, max(1, min(wanted // readers, query_tiles)))


def key_chunks(device: Device, shape: Shape, block_q: int) -> tuple[int, ...] | None:
    """Chunks of each set's segments, and of the own tokens, for the split forward; None: one pass is better.

    The split forward reads a shared segment once for a tile of all its readers' queries, and cuts long chains so that
    few rows fill the device; it pays a second launch, the merge, and float32 partial results.
    """
    if shape.queries >= SPLIT_QUERIES or sum(shape.lengths) == 0:
        return None
    chunks = _chunks_that_fit(device, shape, block_q)
    return (
        chunks if _split_seconds(device, shape, block_q, chunks) < _one_pass_seconds(device, shape, block_q) else None
    )


def _folded_tiles(shape: Shape, block_q: int) -> tuple[int, ...]:
    """Query tiles of each set, where the queries of all readers of a segment are rows of one matrix; then of own."""
    group = shape.heads // shape.kv_heads
    folded = group * shape.queries
    shared = tuple(
        (math.ceil(shape.rows * folded / block_q) if count == 1 else shape.rows * folded // block_q + count)
        for count, _ in shape.sets
    )
    return (*shared, shape.rows * math.ceil(folded / block_q))


def _chunks_that_fit(device: Device, shape: Shape, block_q: int) -> tuple[int, ...]:
    """The smallest chunk of keys, found by bisection, with which all items run at once on the device."""
    least = 32 if device.architecture == "interpreter" else LEAST_CHUNK
    room = device.multiprocessors * OCCUPANCY
    tiles = _folded_tiles(shape, block_q)
    low, high = 1, max(1, math.ceil(max(shape.lengths) / least))
    while low < high:
        middle = (low + high) // 2
        items = sum(t * math.ceil(n / (middle * least)) for t, n in zip(tiles, shape.lengths, strict=True))
        low, high = (low, middle) if items * shape.kv_heads <= room else (middle + 1, high)
    return tuple(max(1, math.ceil(length / (low * least))) for length in shape.lengths)


def _split_seconds(device: Device, shape: Shape, block_q: int, chunks: tuple[int, ...]) -> float:
    card = card_of(device)
    tiles = _folded_tiles(shape, block_q)
    walked = sum(t * n for t, n in zip(tiles, shape.lengths, strict=True)) * shape.kv_heads  # keys, by all programs
    items = shape.kv_heads * sum(t * c for t, c in zip(tiles, chunks, strict=True))
    partials = 2 * 4 * sum(chunks) * shape.rows * shape.heads * shape.queries * (shape.head_dim + 1)
    return _walk_seconds(card, shape, block_q, walked, items) + partials / card.l2_bytes + 2 * LAUNCH


def _one_pass_seconds(device: Device, shape: Shape, block_q: int) -> float:
    programs = shape.rows * shape.heads * math.ceil(shape.queries / block_q)
    return _walk_seconds(card_of(device), shape, block_q, programs * sum(shape.lengths), programs) + LAUNCH


def _walk_seconds(card: Card, shape: Shape, block_q: int, walked: int, programs: int) -> float:
    """Time for programs that read `walked` keys in all, each against `block_q` queries."""
    flops = 4 * block_q * walked * shape.head_dim / (FORWARD_SHARE * _peak(card, shape))
    l2 = 2 * walked * shape.head_dim * shape.element / card.l2_bytes
    memory = (shape.shared_bytes + shape.own_bytes + 2 * shape.query_bytes) / card.memory_bytes
    rounds = math.ceil(programs / (card.multiprocessors * OCCUPANCY)) * card.multiprocessors * OCCUPANCY
    return max(max(flops, l2) * rounds / max(programs, 1), memory)


def fuses_short_prefix(device: Device, shape: Shape, index: int) -> bool:
    """Whether set `index` is short enough for its gradients to stay in registers while dq is made.

    5 matrix products instead of 7 over its keys, and queries and output gradients are read once instead of twice; it
    pays while the segment is one block of keys and the heads and splits of the readers alone fill the device.
    """
    count, size = shape.sets[index]
    tiles = shape.rows * shape.heads // max(count, 1) * math.ceil(shape.queries / 64)
    enough = 1 if device.architecture == "interpreter" else LEAST_TILES
    return len(shape.sets) == 1 and 0 < size <= SHORT and tiles >= enough


def _peak(card: Card, shape: Shape) -> float:
    if shape.element == 2:
        return card.half_flops
    return card.tf32_flops if shape.tf32 else card.single_flops


def forward_seconds(card: Card, shape: Shape) -> float:
    """Predicted time of the one-pass forward."""
    return _roofline(card, shape, 4, FORWARD_SHARE, shape.own_bytes + shape.shared_bytes + 2 * shape.query_bytes, 1)


def backward_seconds(card: Card, shape: Shape) -> float:
    """Predicted time of dq and of the gradients of all keys and values."""
    moved = 3 * (shape.own_bytes + shape.shared_bytes) + 6 * shape.query_bytes
    return _roofline(card, shape, 14, BACKWARD_SHARE, moved, 3 + 2 * len(shape.sets))


def concatenation_seconds(card: Card, shape: Shape) -> tuple[float, float]:
    """(forward, backward) of flash attention over prefixes copied for each row and concatenated, with no mask to read.

    The copies are written and read; backward gives one gradient to each copy, which are then summed over the rows.
    """
    row_prefix = shape.rows * sum(size for _, size in shape.sets)
    copied = 2 * shape.kv_heads * row_prefix * shape.head_dim * shape.element + shape.own_bytes
    attention = copied + 2 * shape.query_bytes
    forward = _roofline(card, shape, 4, FORWARD_SHARE, attention, 1) + 2 * (copied / card.memory_bytes + LAUNCH)
    gradients = _roofline(card, shape, 10, BACKWARD_SHARE, 2 * copied + 5 * shape.query_bytes, 3)
    return forward, gradients + 2 * copied / card.memory_bytes + 4 * LAUNCH


def _roofline(card: Card, shape: Shape, products: int, share: float, moved: float, launches: int) -> float:
    scores = shape.pairs * shape.heads
    flops = products * scores * shape.head_dim / (share * _peak(card, shape))
    exponentials = scores * (1 if products <= 10 else 2) / card.exponentials
    return max(flops, exponentials, moved / card.memory_bytes) + launches * LAUNCH
