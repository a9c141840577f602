"""The cost model of the C++ kernels: the time that a call should need on the machine at hand.

    t = Σ_phases (share of the busiest thread) · Σ_w cost[w] · work[w] / rate[w]

`work` is what the kernels (csrc/cpu) do for a call's shapes, counted: products of whole register tiles, idle lanes
included, sums that the tiles read and write, exponentials, rows that are transposed, bytes. `rate` is measured, by
`measure`: what the registers multiply and add, the exponentials of a softmax, bytes a second from a working set of that
size, the time of a call that computes next to nothing and that of starting the threads. `cost`, how far the kernels
stay behind these rates, is one number for each kind of work and arithmetic, fitted to measured times.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_fast.backends import native
from prefix_fast.backends.problem import Problem, SegmentSet
from prefix_fast.backends.shapes import Shape

# Constants of csrc/cpu, which the counts follow: lanes of a group and of a block of queries, keys of a tile, and what
# decides how a call is cut.
SIZES = {
    "kGroup": 16, "kLanes": 64, "kForwardTile": 256, "kBackwardTile": 64, "kFewQueries": 4, "kFoldedQueries": 32,
    "kFoldedReaders": 8, "kItems": 256, "kFullItems": 96, "kMinimumChunk": 256, "kLaneChunk": 256, "kRowPiece": 128,
    "kPartItems": 192, "kPartBytes": 1 << 27, "kKeyItems": 128, "kMinimumKeys": 256, "kFoldedExtent": 32,
    "kFewItems": 48,
}  # fmt: skip
GROUP, LANES = SIZES["kGroup"], SIZES["kLanes"]
WORKING_SETS = (1 << 18, 1 << 22, 1 << 24, 1 << 25, 1 << 27)  # bytes from which the bandwidth is measured


class Work(NamedTuple):
    """An amount, a time or a cost for each kind of work."""

    products: float = 0.0  # FLOP of the register tiles, idle lanes included
    sums: float = 0.0  # numbers that the tiles read and write, pairs of bfloat16 that are made of them included
    weights: float = 0.0  # exponentials, idle lanes included
    rows: float = 0.0  # numbers that are transposed, converted, merged or added up
    few: float = 0.0  # FLOP of the path that has the head dim on the lanes
    draws: float = 0.0  # random numbers of dropout, idle lanes included
    bytes: float = 0.0  # of tensors
    calls: float = 0.0

    def times(self, other: Work) -> Work:
        """Kind by kind."""
        return Work(*(a * b for a, b in zip(self, other, strict=True)))

    def plus(self, other: Work) -> Work:
        """Kind by kind."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def scaled(self, factor: float) -> Work:
        """Every kind by the same factor."""
        return Work(*(factor * amount for amount in self))

    @property
    def total(self) -> float:
        """The sum over the kinds."""
        return sum(self)


# Fitted by `python -I benchmarks/costs.py --write`, which measures again and replaces these lines.
COSTS: dict[str, Work] = {
    "generic": Work(1.5, 2.61, 1.27, 21.9, 1.69, 372, 1.45, 5.99),
    "generic, bfloat16": Work(1.16, 11.4, 1.19, 4.09, 3.31, 305, 3.12, 6.06),
    "generic, halves": Work(1.37, 21.2, 1.66, 7.67, 4.42, 356, 8.99, 6.43),
    "avx2": Work(1.07, 3.78, 1.52, 33.7, 1.58, 97.3, 1.47, 6.02),
    "avx2, halves": Work(1.01, 11.1, 1.93, 5.95, 3.33, 107, 4.05, 6.35),
    "avx512": Work(1.02, 6.1, 2.15, 29, 2.81, 67.1, 0.859, 5.97),
    "avx512, halves": Work(0.99, 12.2, 2.23, 8.07, 3.89, 63.3, 3.08, 6.1),
    "avx512_bf16": Work(0.987, 9.69, 2.44, 0, 3.84, 65.9, 2.93, 3.95),
}  # fmt: skip


class Machine(NamedTuple):
    """Measured rates of the machine at hand at one instruction set, of all threads together."""

    level: str
    threads: int
    multiply_adds: float  # FLOP a second, float32
    pair_multiply_adds: float  # FLOP a second, pairs of bfloat16; 0 where the level has no such instruction
    exponentials: float
    bandwidths: tuple[tuple[int, float], ...]  # (bytes of the working set, bytes a second), ascending
    overhead: float  # seconds of a call of the extension
    region: float  # seconds until all threads have started and ended; 0 for one

    def bandwidth(self, working_set: float) -> float:
        """Bytes a second, between the measured sizes a straight line of logarithms."""
        (size, rate), *larger = self.bandwidths
        for next_size, next_rate in larger:
            if working_set <= next_size:
                part = max(0.0, math.log(max(working_set, 1.0) / size) / math.log(next_size / size))
                return rate * (next_rate / rate) ** part
            size, rate = next_size, next_rate
        return rate

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP a second of the products of a call with tensors of that dtype."""
        return self.pair_multiply_adds if self.multiplies_pairs(dtype) else self.multiply_adds

    def multiplies_pairs(self, dtype: torch.dtype) -> bool:
        """Whether the kernels multiply pairs of such numbers."""
        return dtype == torch.bfloat16 and self.pair_multiply_adds > 0

    def arithmetic(self, dtype: torch.dtype) -> str:
        """The entry of COSTS."""
        if self.multiplies_pairs(dtype):
            return self.level
        level = self.level.removesuffix("_bf16")  # the same kernels
        if level == "generic" and dtype == torch.bfloat16:  # float16 is converted without an instruction for it there
            return "generic, bfloat16"
        return level if dtype == torch.float32 else f"{level}, halves"


def measure(rounds: int = 10) -> Machine:
    """The rates of this machine now, at the instruction set and the threads that calls use now. It takes half a second.

    Each is the best of short rounds: a busy machine has a quiet moment now and then.
    """
    extension = native.extension()
    threads = torch.get_num_threads() if extension.has_openmp() else 1
    memory = torch.ones(max(WORKING_SETS) // 4)
    return Machine(
        native.chosen_isa(),
        threads,
        max(extension.multiply_add(threads, 10_000) for _ in range(2 * rounds)),
        max(extension.multiply_pairs(threads, 10_000) for _ in range(2 * rounds)),
        max(extension.exponentiate(threads, 200) for _ in range(2 * rounds)),
        tuple(
            (size, max(extension.read_memory(threads, memory[: size // 4]) for _ in range(rounds)))
            for size in WORKING_SETS
        ),
        _overhead(10 * rounds),
        _least_seconds(lambda: extension.multiply_add(threads, 0), 10 * rounds) if threads > 1 else 0.0,
    )


def _overhead(rounds: int) -> float:
    """Seconds of a forward call with one query and two keys: reading the problem's attributes, nearly all of it."""
    problem, out = problem_of(Shape(1, 1, 1, 1, 1, 16, 4, ((1, 1),))), torch.empty(1, 1, 1, 16)
    return _least_seconds(lambda: native.forward(problem, out, out[..., 0]), rounds)


def problem_of(shape: Shape) -> Problem:
    """A call of that shape, of zeros that take no memory."""

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(shape.head_dim).expand(*sizes, shape.head_dim)

    kv_heads = shape.kv_heads
    sets = []
    for count, size in shape.sets:
        keys, ids = zeros(count, kv_heads, size), torch.arange(shape.rows) % max(count, 1)
        sets.append(SegmentSet(keys, keys, ids if count > 1 else None, None, None, None, False))
    own = zeros(shape.rows, kv_heads, shape.keys)
    nothing = dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "key_mask", "attn_bias", "query_offset",
         "window", "softcap", "sinks", "dropout_seed")
    )  # fmt: skip
    query = zeros(shape.rows, shape.heads, shape.queries)
    return Problem(query, own, own, tuple(sets), is_causal=shape.causal, dropout_p=0.0, scale=1.0, **nothing)


def _least_seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def forward_seconds(machine: Machine, shape: Shape, dtype: torch.dtype = torch.float32, dropout: bool = False) -> float:
    """Predicted time of `prefix_attention` without gradients."""
    limits = forward_limits(machine, shape, dtype, dropout)
    return limits.times(COSTS[machine.arithmetic(dtype)]).total + _starting(machine, shape, "forward")


def backward_seconds(
    machine: Machine, shape: Shape, dtype: torch.dtype = torch.float32, dropout: bool = False
) -> float:
    """Predicted time of the gradients of all inputs."""
    limits = backward_limits(machine, shape, dtype, dropout)
    return limits.times(COSTS[machine.arithmetic(dtype)]).total + _starting(machine, shape, "backward")


def forward_limits(machine: Machine, shape: Shape, dtype: torch.dtype, dropout: bool = False) -> Work:
    """Seconds of each kind of work in a forward call, were it done at the machine's rates."""
    shape = shape._replace(element=dtype.itemsize)
    moved = shape.shared_bytes + shape.own_bytes + 2 * shape.query_bytes
    return _limits(machine, shape, "forward", forward_work(shape), moved, dtype, dropout)


def backward_limits(machine: Machine, shape: Shape, dtype: torch.dtype, dropout: bool = False) -> Work:
    """Seconds of each kind of work in a backward call, were it done at the machine's rates."""
    shape = shape._replace(element=dtype.itemsize)
    moved = 2 * (shape.shared_bytes + shape.own_bytes) + 4 * shape.query_bytes
    work = backward_work(shape, machine.multiplies_pairs(dtype))
    return _limits(machine, shape, "backward", work, moved, dtype, dropout)


def _limits(
    machine: Machine, shape: Shape, name: str, phases: tuple[Work, ...], moved: float, dtype: torch.dtype, dropout: bool
) -> Work:
    adds = 1 / machine.multiply_adds
    draws = adds if dropout else 0.0
    seconds = Work(1 / machine.peak(dtype), adds, 1 / machine.exponentials, adds, adds, draws)
    limits = Work(bytes=moved / machine.bandwidth(moved), calls=machine.overhead)
    for work, items in zip(phases, _partition(shape, name), strict=True):
        limits = limits.plus(work.times(seconds).scaled(machine.threads * busiest_share(items, machine.threads)))
    return limits


def _starting(machine: Machine, shape: Shape, name: str) -> float:
    return machine.region * sum(len(items) > 1 for items in _partition(shape, name))


def _partition(shape: Shape, name: str) -> list[list[int]]:
    """For each phase of the call, what its items cost, in the order in which threads take them."""
    partition: list[list[int]] = native.extension().partition(problem_of(shape), name)
    return partition


def busiest_share(items: list[int], threads: int) -> float:
    """The part of all the work that the busiest of so many threads does, each taking the next item when it is free."""
    ends = [0] * threads
    for item in items:
        heapq.heapreplace(ends, ends[0] + item)
    return max(ends) / max(sum(items), 1) if any(items) else 1.0


class Cut(NamedTuple):
    """What the counts need to know of how a call is cut."""

    lanes: int  # of a row: queries times heads of a group
    head_lanes: int  # of all rows, under one key/value head
    pieces: int  # rows times key/value heads


def _cut(shape: Shape) -> Cut:
    lanes = shape.queries * shape.heads // shape.kv_heads
    return Cut(lanes, shape.rows * lanes, shape.rows * shape.kv_heads)


def rows_fold(shape: Shape, segments: int, size: int) -> bool:
    """Whether rows alone would leave most lanes idle, and others read the same segments."""
    cut = _cut(shape)
    many = cut.head_lanes >= SIZES["kFoldedReaders"] * max(segments, 1)
    return cut.lanes <= SIZES["kFoldedQueries"] and shape.rows > 1 and many and size >= SIZES["kFoldedExtent"]


def folds_forward(shape: Shape, segments: int, size: int) -> bool:
    """Whether a set is served segment-major: short rows are folded, long segments cut where there is little else."""
    cut = _cut(shape)
    items = shape.kv_heads * min(shape.rows * math.ceil(cut.lanes / LANES), shape.rows + cut.head_lanes // LANES)
    short_of_work = items < SIZES["kItems"] / 2 and size >= 2 * SIZES["kMinimumChunk"]
    return short_of_work or rows_fold(shape, segments, size)


def lane_chunk(shape: Shape, least: int) -> int:
    """Lanes that sum their part of a gradient together: `least`, unless that made too many parts or too large ones."""
    cut, keys = _cut(shape), sum(size for _, size in shape.sets)
    keys += shape.keys if cut.pieces < SIZES["kFewItems"] else 0
    lanes = cut.head_lanes * shape.kv_heads
    of_bytes = math.ceil(8 * lanes * keys * _padded(shape.head_dim, GROUP) / SIZES["kPartBytes"])
    return _padded(max(least, math.ceil(lanes / SIZES["kPartItems"]), of_bytes), LANES)


def folds_backward(shape: Shape, segments: int, size: int) -> bool:
    """As `folds_forward`; a chunk of lanes is read once more for it."""
    cut = _cut(shape)
    items = shape.kv_heads * math.ceil(cut.head_lanes / lane_chunk(shape, SIZES["kLaneChunk"]))
    idle = cut.lanes < LANES and 8 * _padded(cut.lanes, GROUP) > 9 * cut.lanes
    short_of_work = items < SIZES["kFewItems"] and size >= 4 * SIZES["kMinimumKeys"]
    return short_of_work or (idle and rows_fold(shape, segments, size))


def key_chunks(size: int, target: int, items: int, minimum: int) -> int:
    """Chunks into which a segment's keys are cut, so that `items` become `target` unless chunks were too short."""
    chunk = max(minimum, _padded(math.ceil(size / math.ceil(target / max(items, 1))), 128))
    return math.ceil(size / chunk)


def own_keys(shape: Shape) -> list[int]:
    """Own keys that each group of 16 lanes of a row needs; lanes run over (query, head of the group)."""
    lanes, needed = _cut(shape).lanes, []
    for first in range(0, lanes, GROUP):
        last_query = (min(first + GROUP, lanes) - 1) // (shape.heads // shape.kv_heads)
        visible = last_query + shape.keys - shape.queries + 1 if shape.causal else shape.keys
        needed.append(min(max(visible, 0), shape.keys))
    return needed


def forward_work(shape: Shape) -> tuple[Work, Work]:
    """Of the sets that are served segment-major, and of the rows; for short rows of both, and of merging them."""
    cut, D, shared, rows, merged = _cut(shape), shape.head_dim, Work(), Work(), Work()
    walked = []
    for count, size in shape.sets:
        if not folds_forward(shape, count, size):
            walked.append(size)
            continue
        used = max(1, min(count, shape.rows))  # segments that rows read, equally many each
        blocks = max(math.ceil(cut.head_lanes / LANES), count)
        target = SIZES["kFullItems" if rows_fold(shape, count, size) else "kItems"]
        chunks = key_chunks(size, target, shape.kv_heads * blocks, SIZES["kMinimumChunk"])
        if cut.head_lanes <= SIZES["kFewQueries"] * count:
            shared = shared.plus(Work(few=4.0 * D * cut.head_lanes * size))
        else:
            groups, blocks = (used * math.ceil(cut.head_lanes / used / lanes) for lanes in (GROUP, LANES))
            shared = shared.plus(_forward_tiles(shape, groups, blocks, size))
            shared = shared.plus(Work(rows=2.0 * D * GROUP * groups * chunks))  # queries and sums, transposed
        merged = merged.plus(Work(rows=2.0 * D * cut.lanes * chunks))  # partial results
    if cut.lanes <= SIZES["kFewQueries"]:
        keys = sum(walked) + (own_keys(shape)[-1] if cut.lanes else 0)
        rows = rows.plus(Work(few=4.0 * D * cut.lanes * keys, rows=2.0 * D * cut.lanes))
    else:
        for index, needed in enumerate(own_keys(shape)):
            rows = rows.plus(Work(rows=2.0 * D * GROUP))
            for size in (*walked, needed):
                rows = rows.plus(_forward_tiles(shape, 1, int(_ends_block(shape, index)), size))
    shared, rows, merged = shared.scaled(shape.kv_heads), rows.scaled(cut.pieces), merged.scaled(cut.pieces)
    if len(walked) < len(shape.sets) and cut.lanes <= SIZES["kFoldedQueries"]:
        return shared.plus(rows), merged.plus(Work(rows=2.0 * D * cut.lanes * cut.pieces))
    return shared, rows.plus(merged)


def _forward_tiles(shape: Shape, groups: int, blocks: int, keys: int) -> Work:
    """Of so many groups of lanes, in so many blocks, that walk these keys."""
    D, scores = shape.head_dim, float(GROUP * groups * keys)
    tiles = groups * math.ceil(keys / SIZES["kForwardTile"])
    return Work(
        products=4 * D * scores,  # K Q^T, V^T P
        sums=scores + 2 * D * GROUP * tiles,  # S written, O read and written
        weights=scores,
        rows=2.0 * D * keys * blocks if shape.element < 4 else 0.0,  # converted
        draws=scores,
    )


def backward_work(shape: Shape, pairs: bool = False) -> tuple[Work, Work, Work]:
    """Of all gradients: of the sets that are served segment-major, of the rows, and of the sums of their parts."""
    cut, D = _cut(shape), shape.head_dim
    chunk = lane_chunk(shape, SIZES["kLaneChunk"])
    shared, rows, parts = Work(), Work(), 0.0
    walked = []
    row_chunks = math.ceil(shape.rows / max(1, math.ceil(chunk / max(cut.lanes, 1))))
    if cut.pieces < SIZES["kFewItems"]:  # rows are split
        few = cut.head_lanes * shape.kv_heads < SIZES["kFewItems"] * SIZES["kLaneChunk"]
        piece = lane_chunk(shape, SIZES["kRowPiece"]) if few else chunk
        if cut.lanes > piece:
            row_chunks = shape.rows * math.ceil(cut.lanes / piece)
            parts += row_chunks * shape.keys
    for count, size in shape.sets:
        if not folds_backward(shape, count, size):
            walked.append(size)
            parts += count * size * row_chunks if row_chunks > 1 else 0
            continue
        used = max(1, min(count, shape.rows))
        groups, blocks = (used * math.ceil(cut.head_lanes / used / lanes) for lanes in (GROUP, LANES))
        lane_chunks = max(math.ceil(cut.head_lanes / chunk), count)
        chunks = key_chunks(size, SIZES["kKeyItems"], shape.kv_heads * lane_chunks, SIZES["kMinimumKeys"])
        shared = shared.plus(_backward_tiles(shape, groups, blocks, size, pairs))
        shared = shared.plus(Work(rows=6.0 * D * GROUP * groups * chunks))  # q, twice; do, o, dq; its partial sum
        of_segment = math.ceil(cut.head_lanes / used / chunk)
        parts += used * size * of_segment if of_segment > 1 else 0
    for index, needed in enumerate(own_keys(shape)):
        rows = rows.plus(Work(rows=5.0 * D * GROUP))
        for size in (*walked, needed):
            rows = rows.plus(_backward_tiles(shape, 1, int(_ends_block(shape, index)), size, pairs))
    return shared.scaled(shape.kv_heads), rows.scaled(cut.pieces), Work(rows=4.0 * D * shape.kv_heads * parts)


def _backward_tiles(shape: Shape, groups: int, blocks: int, keys: int, pairs: bool) -> Work:
    D, scores = shape.head_dim, float(GROUP * groups * keys)
    tiles = groups * math.ceil(keys / SIZES["kBackwardTile"])
    return Work(
        products=10 * D * scores,
        sums=2 * scores + 2 * D * GROUP * tiles + 4 * D * keys * blocks,  # S, dP; dQ; dK, dV
        weights=scores,
        rows=(3.0 if pairs else 2.0) * D * keys * blocks if shape.element < 4 else 0.0,  # converted
        draws=scores,
    )


def _ends_block(shape: Shape, group: int) -> bool:
    return (group + 1) % (LANES // GROUP) == 0 or (group + 1) * GROUP >= _cut(shape).lanes


def _padded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple
