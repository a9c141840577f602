"""The cost model of the Triton kernels: which path a call takes, into how many parts, and what time it should need.

    t = max(FLOP / (η · peak), exponentials / rate, L2 bytes / bandwidth, memory bytes / bandwidth) + launches

It sees static shapes alone. The rates are data sheets' and the efficiencies are assumed: nothing here was measured, so
its times are predictions, good for comparing one path with another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from prefix_fast.backends.shapes import Shape
from prefix_fast.backends.triton_config import Device, Tile, padded


class Card(NamedTuple):
    """Peak rates of a graphics card: dense matrix products with float32 sums, at the boost clock."""

    architecture: str
    multiprocessors: int
    half_flops: float  # bfloat16 and float16
    tf32_flops: float
    single_flops: float  # float32 without tensor cores
    exponentials: float  # a second: 16 a cycle and multiprocessor
    memory_bytes: float  # a second
    l2_bytes: float  # a second; about that of public microbenchmarks


# Products and memory: the makers' data sheets, without sparsity (A100 80GB SXM; A10; L40S; H100 and H200 SXM; HGX B200;
# RTX 5090; MI300X). Exponentials: 16 a cycle and multiprocessor, of the special function units of NVIDIA's and of AMD's
# quarter-rate pipes, at the boost clock. L2: of the order of what public microbenchmarks report; no maker states it.
CARDS = {
    "A100": Card("sm_80", 108, 312e12, 156e12, 19.5e12, 2.4e12, 2.04e12, 4.0e12),
    "A10": Card("sm_86", 72, 125e12, 62.5e12, 31.2e12, 1.95e12, 0.6e12, 1.8e12),
    "L40S": Card("sm_89", 142, 362e12, 183e12, 91.6e12, 5.7e12, 0.864e12, 4.5e12),
    "H100": Card("sm_90", 132, 989e12, 494e12, 67e12, 3.7e12, 3.35e12, 5.5e12),
    "H200": Card("sm_90", 132, 989e12, 494e12, 67e12, 3.7e12, 4.8e12, 5.5e12),
    "B200": Card("sm_100", 148, 2250e12, 1125e12, 75e12, 4.4e12, 8.0e12, 10e12),
    "RTX5090": Card("sm_120", 170, 209e12, 105e12, 105e12, 6.5e12, 1.79e12, 6.0e12),
    "MI300X": Card("gfx942", 304, 1307e12, 653e12, 163e12, 10.2e12, 5.3e12, 10e12),
}
_OF_THE_WHOLE = ("architecture", "multiprocessors", "memory_bytes")  # not a multiple of the multiprocessors
LAUNCH = 4e-6  # seconds of one kernel launch
FORWARD_SHARE, BACKWARD_SHARE = 0.375, 0.3  # η: of the peak, in Triton
OCCUPANCY = 2  # programs that share a multiprocessor
FILL = 0.85  # of the device, below which work is split further
LEAST_TILES = 4  # query tiles that a split of a reader list is worth
LEAST_CHUNK = 128  # keys that a split of a segment is worth
# Longest segment whose gradients stay in registers while dq is made, by the padded head dim; past it, and on other
# architectures, registers spill in the loops (benchmarks/static).
SHORT = {
    "interpreter": {64: 64, 128: 64}, "sm_90": {64: 32}, "sm_100": {64: 32}, "gfx942": {64: 64},
}  # fmt: skip
SPLIT_QUERIES = 64  # queries of a row from which on the one-pass forward fills its tiles


def card_of(device: Device | Card) -> Card:
    """The table's card of that architecture, scaled to the device's size; the least one where it has none."""
    if isinstance(device, Card):
        return device
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


class Split(NamedTuple):
    """How the split forward divides a call."""

    queries: int  # of the readers of a segment, in one tile
    own_queries: int  # of a row, with its group of heads, in one tile
    chunks: tuple[int, ...]  # of the keys of each set's segments, then of the own tokens; 0 where there are none


def key_chunks(device: Device | Card, shape: Shape, tile: Tile, few: Tile) -> Split | None:
    """The split forward with tiles of at most `tile` as it suits the call; None: one pass, with `few`, is better.

    The split forward reads a shared segment once for a tile of all its readers' queries, and cuts long chains so that
    few rows fill the device; it pays a second launch, the merge, and float32 partial results. So short chains lose
    whatever they save: where no set and no row has keys for two chunks, there is nothing to weigh.
    """
    if shape.queries >= SPLIT_QUERIES or max(shape.lengths) < 2 * least_chunk(device):
        return None
    splits = candidates(device, shape, tile)
    if device.architecture == "interpreter":
        return splits[0]  # there is no time to weigh
    seconds, best = min((split_seconds(device, shape, split), number) for number, split in enumerate(splits))
    return splits[best] if seconds < one_pass_seconds(device, shape, few) else None


def least_chunk(device: Device | Card) -> int:
    """Keys that a chunk is worth; in the interpreter, where nothing has a price, one block."""
    return 32 if device.architecture == "interpreter" else LEAST_CHUNK


def blocks(shape: Shape, tile: Tile) -> tuple[int, int]:
    """(queries, own queries) of the split forward's tiles: the smallest that hold all there are, up to the largest."""
    folded = shape.queries * shape.heads // shape.kv_heads
    readers = math.ceil(shape.rows / max(1, max((count for count, _ in shape.sets), default=1)))
    queries, own = (min(padded(n), tile.queries) for n in (readers * folded, folded))
    return queries, own


def candidates(device: Device | Card, shape: Shape, tile: Tile) -> list[Split]:
    """Splits worth comparing, the coarsest first: chunks that give every place on the device a 1st, 2nd, 4th part."""
    queries, own = blocks(shape, tile)
    least = least_chunk(device)
    walked = sum(tiles * length for tiles, length, _ in _walks(shape, Split(queries, own, (1,) * len(shape.lengths))))
    share = walked * shape.kv_heads / (device.multiprocessors * OCCUPANCY)
    splits = []
    for part in (1, 2, 4):
        chunk = max(1, math.ceil(share / (part * least))) * least
        split = Split(queries, own, tuple(math.ceil(length / chunk) for length in shape.lengths))
        if split not in splits:
            splits.append(split)
    return splits


def _walks(shape: Shape, split: Split) -> list[tuple[int, int, int]]:
    """(tiles of queries, keys, queries of a tile) of each set, its segments read equally, and of the own tokens."""
    folded = shape.queries * shape.heads // shape.kv_heads
    walks = []
    for count, size in shape.sets:
        used = max(1, min(count, shape.rows))
        walks.append((used * math.ceil(shape.rows / used * folded / split.queries), size, split.queries))
    return [*walks, (shape.rows * math.ceil(folded / split.own_queries), shape.keys, split.own_queries)]


def split_seconds(device: Device | Card, shape: Shape, split: Split) -> float:
    """Predicted time of the split forward and the merge."""
    card = card_of(device)
    partials = 2 * 4 * sum(split.chunks) * shape.rows * shape.heads * shape.queries * (shape.head_dim + 1)
    items = [
        (tiles * chunks * shape.kv_heads, math.ceil(size / max(chunks, 1)), queries)
        for (tiles, size, queries), chunks in zip(_walks(shape, split), split.chunks, strict=True)
    ]
    memory = shape.shared_bytes + shape.own_bytes + 2 * shape.query_bytes
    return _walk_seconds(card, shape, items, memory) + partials / card.l2_bytes + 2 * LAUNCH


def one_pass_seconds(device: Device | Card, shape: Shape, tile: Tile) -> float:
    """Predicted time of the one-pass forward with few queries in a row.

    The heads of a group are programs far apart, so each reads the own keys from memory anew.
    """
    programs = shape.rows * shape.heads * math.ceil(shape.queries / tile.queries)
    memory = shape.shared_bytes + shape.own_bytes * shape.heads / shape.kv_heads + 2 * shape.query_bytes
    walk = [(programs, sum(shape.lengths), tile.queries)]
    return _walk_seconds(card_of(device), shape, walk, memory) + LAUNCH


def _walk_seconds(card: Card, shape: Shape, items: list[tuple[int, int, int]], memory: float) -> float:
    """Time of programs, given as (number, keys that each walks, queries of its tile), that move `memory` bytes.

    The longest programs come in rounds: a last round that leaves places empty takes as long as a full one.
    """
    keys = sum(number * length for number, length, _ in items)
    scores = sum(number * length * queries for number, length, queries in items)
    flops = 4 * scores * shape.head_dim / (FORWARD_SHARE * _peak(card, shape))
    l2 = 2 * keys * shape.head_dim * shape.element / card.l2_bytes
    longest = max(length for _, length, _ in items) * card.multiprocessors * OCCUPANCY  # keys of a round
    rounds = math.ceil(keys / longest) * longest / keys
    return max(max(flops, scores / card.exponentials, l2) * rounds, memory / card.memory_bytes)


def short_splits(device: Device, shape: Shape, tile: Tile) -> int:
    """Splits of the readers of a short segment: of those with the fewest tiles one after another, the least.

    dq is made in these programs, so a part of the device that they leave empty costs its share of the whole time.
    """
    most = _tiles_of_readers(shape, tile) // _least_tiles(device)
    return min(range(1, max(1, most) + 1), key=lambda splits: (_tiles_in_a_row(device, shape, tile, splits), splits))


def fuses_short_prefix(device: Device, shape: Shape, tile: Tile) -> bool:
    """Whether one kernel makes dq and the gradients of the only shared set in less time than dq and dkv apart.

    It saves two of seven products and one of two exponentials over the set's keys, whole tiles of keys where few are
    real, one reading of queries and output gradients, and a launch. It costs what its programs, of at least
    LEAST_TILES query tiles each so that the partial sums stay few, leave empty of the device.
    """
    keys = SHORT.get(device.architecture, {}).get(max(64, padded(shape.head_dim)), 0)
    if len(shape.sets) != 1 or not 0 < shape.sets[0][1] <= keys:
        return False
    tiles = _tiles_of_readers(shape, tile)
    if tiles < _least_tiles(device) or device.architecture == "interpreter":
        return tiles >= _least_tiles(device)
    dq, dkv, fused = _kernels_of_short(card_of(device), shape, tile)
    best = shape.sets[0][0] * shape.kv_heads * tiles / _room(device, tile)  # tiles in a row, were they spread evenly
    in_a_row = _tiles_in_a_row(device, shape, tile, short_splits(device, shape, tile))
    return fused * in_a_row / best < dq * math.ceil(best) / best + dkv + LAUNCH


def _kernels_of_short(card: Card, shape: Shape, tile: Tile) -> tuple[float, float, float]:
    """Seconds of dq, of dkv over the short set, and of the kernel that does the work of both, on a full device."""
    size = shape.sets[0][1]
    own = shape.pairs - shape.shared_pairs
    block = shape.shared_pairs / size * padded(size)
    blocks = shape.shared_pairs / size * math.ceil(size / tile.keys) * tile.keys
    l2 = _key_bytes_of_tiles(shape, tile.queries)
    moved = shape.own_bytes + shape.shared_bytes + 3 * shape.query_bytes
    works = (
        Work(6 * (own + blocks), own + blocks, l2, moved),
        Work(8 * blocks, blocks, 0, 2 * shape.query_bytes),
        Work(6 * own + 10 * block, own + block, l2, moved),
    )
    dq, dkv, fused = (_roofline(card, shape, work, BACKWARD_SHARE) for work in works)
    return dq, dkv, fused


def _least_tiles(device: Device) -> int:
    return 1 if device.architecture == "interpreter" else LEAST_TILES


def _tiles_of_readers(shape: Shape, tile: Tile) -> int:
    """Query tiles that read one segment, of the heads of one group."""
    rows, group = shape.rows // max(shape.sets[0][0], 1), shape.heads // shape.kv_heads
    return rows * group * math.ceil(shape.queries / tile.queries)


def _tiles_in_a_row(device: Device, shape: Shape, tile: Tile, splits: int) -> int:
    """Query tiles that the busiest place for a program walks in all."""
    programs = shape.sets[0][0] * shape.kv_heads * splits
    return math.ceil(programs / _room(device, tile)) * math.ceil(_tiles_of_readers(shape, tile) / splits)


def _room(device: Device, tile: Tile) -> int:
    """Programs that run at a time. They use nearly all registers that threads can have: 8 warps fill a processor."""
    return device.multiprocessors * max(1, min(OCCUPANCY, 8 // tile.warps))


def _peak(card: Card, shape: Shape) -> float:
    if shape.element == 2:
        return card.half_flops
    return card.tf32_flops if shape.tf32 else card.single_flops


class Work(NamedTuple):
    """What a kernel does, of one head where it says so."""

    products: float  # FLOP of one head for each dimension of it
    exponentials: float  # of one head
    l2_bytes: float
    memory_bytes: float


def forward_seconds(card: Card, shape: Shape, block_q: int = 128) -> float:
    """Predicted time of the one-pass forward; every tile of queries reads its row's chain of keys through the L2."""
    memory = shape.own_bytes + shape.shared_bytes + 2 * shape.query_bytes
    work = Work(4 * shape.pairs, shape.pairs, _key_bytes_of_tiles(shape, block_q), memory)
    return _roofline(card, shape, work, FORWARD_SHARE) + LAUNCH


def backward_seconds(card: Card, shape: Shape, block_q: int = 128, fused: bool = False) -> float:
    """Predicted time of dq and of the gradients of all keys and values, which compute the scores once each.

    Args:
        card, shape: as for `forward_seconds`.
        block_q: queries of a tile.
        fused: one kernel makes dq and the gradients of a short prefix: 5 products over its keys instead of 7.
    """
    products = 14 * shape.pairs - (4 * shape.shared_pairs if fused else 0)
    exponentials = 2 * shape.pairs - (shape.shared_pairs if fused else 0)
    memory = 3 * (shape.own_bytes + shape.shared_bytes) + (5 if fused else 6) * shape.query_bytes
    work = Work(products, exponentials, 2 * _key_bytes_of_tiles(shape, block_q), memory)
    launches = 3 + (1 if fused else 2) * len(shape.sets)
    return _roofline(card, shape, work, BACKWARD_SHARE) + launches * LAUNCH


def concatenated_bytes(shape: Shape) -> float:
    """Of keys and values that hold a copy of the shared segments for every row, and the rows' own tokens."""
    copies = shape.rows * sum(size for _, size in shape.sets)
    return 2 * shape.kv_heads * copies * shape.head_dim * shape.element + shape.own_bytes


def copying_seconds(card: Card, shape: Shape) -> float:
    """Predicted time of concatenating keys, and values: a copy of the shared segments for every row."""
    return (shape.own_bytes + shape.shared_bytes + concatenated_bytes(shape)) / card.memory_bytes + 2 * LAUNCH


def concatenation_seconds(card: Card, shape: Shape, block_q: int = 128) -> tuple[float, float]:
    """(forward, backward) of flash attention over prefixes copied for each row and concatenated, with no mask to read.

    The copies are written, then read. Backward writes a gradient of each copy, which a sum over the rows reads again,
    and splits off the gradients of own tokens.
    """
    copies = concatenated_bytes(shape)
    summing = (copies + shape.own_bytes + shape.shared_bytes) / card.memory_bytes + 4 * LAUNCH
    l2 = _key_bytes_of_tiles(shape, block_q)
    forward = Work(4 * shape.pairs, shape.pairs, l2, copies + 2 * shape.query_bytes)
    backward = Work(10 * shape.pairs, shape.pairs, 2 * l2, 2 * copies + 5 * shape.query_bytes)
    return (
        copying_seconds(card, shape) + _roofline(card, shape, forward, FORWARD_SHARE) + LAUNCH,
        summing + _roofline(card, shape, backward, BACKWARD_SHARE) + 3 * LAUNCH,
    )


def cached_seconds(card: Card, shape: Shape) -> float:
    """Predicted time of a flash decode over a cache in which every row has its own copy of the prefix already."""
    memory = concatenated_bytes(shape) + 2 * shape.query_bytes
    work = Work(4 * shape.pairs, shape.pairs, memory, memory)
    return _roofline(card, shape, work, FORWARD_SHARE) + 2 * LAUNCH


def _key_bytes_of_tiles(shape: Shape, block_q: int) -> float:
    """Of the keys and values that all query tiles read together, however often each is read."""
    return 2 * shape.pairs * shape.heads * shape.head_dim * shape.element / min(block_q, max(shape.queries, 1))


def _roofline(card: Card, shape: Shape, work: Work, share: float) -> float:
    return max(
        work.products * shape.heads * shape.head_dim / (share * _peak(card, shape)),
        work.exponentials * shape.heads / card.exponentials,
        work.l2_bytes / card.l2_bytes,
        work.memory_bytes / card.memory_bytes,
    )
