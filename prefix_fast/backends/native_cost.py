"""The cost model of the C++ kernels: the time that a call should need on the machine at hand.

    t = Σ_w cost[w] · work[w] / rate[w]

`work` is what the kernels (csrc/cpu) do for a call's shapes, counted: products of whole register tiles, idle lanes
included, sums that the tiles read and write, exponentials, rows that are transposed, bytes. `rate` is measured, by
`measure`: what the registers multiply and add, the exponentials of a softmax, bytes a second from a working set of that
size, and the time of a call that computes next to nothing; the time of starting the threads is added. `cost`, how far
the kernels stay behind these rates, is one number for each kind of work and arithmetic, fitted to measured times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from prefix_fast.backends import native
from prefix_fast.backends.problem import Problem, SegmentSet
from prefix_fast.backends.shapes import Shape

# Sizes in csrc/cpu, which the counts follow: lanes of a group and of a block of queries, keys of a tile, and the bounds
# that choose a path.
SIZES = {
    "kGroup": 16, "kLanes": 64, "kForwardTile": 128, "kBackwardTile": 64, "kFewQueries": 4, "kFoldedQueries": 32,
    "kFoldedReaders": 8, "kMinimumItems": 16, "kMinimumChunk": 128, "kChunkQueries": 512, "kMaximumChunks": 16,
}  # fmt: skip
WORKING_SETS = (1 << 18, 1 << 22, 1 << 24, 1 << 25, 1 << 27)  # bytes from which the bandwidth is measured


class Work(NamedTuple):
    """An amount, a time or a cost for each kind of work."""

    products: float = 0.0  # FLOP of the register tiles, idle lanes included
    sums: float = 0.0  # numbers that the tiles read and write, pairs of bfloat16 that are made of them included
    weights: float = 0.0  # exponentials, idle lanes included
    rows: float = 0.0  # numbers that are transposed, converted or merged
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


# Fitted by `python -I benchmarks/costs.py`, which measures again and prints these lines.
COSTS: dict[str, Work] = {
    "avx512": Work(1.14, 0, 1.76, 56.9, 5.4, 96.5, 1.08, 0.85),
    "avx512_bf16": Work(0.875, 12.3, 0.907, 19.5, 5.31, 94.6, 4.09, 6.75),
    "avx512, halves": Work(1.05, 11.3, 0.649, 14.9, 7.07, 105, 3.74, 0),
    "avx2": Work(0.999, 11.7, 2.57, 61.1, 5.62, 131, 1.08, 0),
    "avx2, halves": Work(0.971, 18.3, 1.19, 14.7, 7.67, 107, 3.46, 0),
    "generic": Work(1.64, 0, 1.75, 45.9, 0.944, 348, 2.7, 10.5),
    "generic, halves": Work(1.09, 25.3, 0.667, 25.5, 8.43, 300, 1.95, 17.9),
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
                part = max(0.0, math.log(working_set / size) / math.log(next_size / size))
                return rate * (next_rate / rate) ** part
            size, rate = next_size, next_rate
        return rate

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP a second of the products of a call with tensors of that dtype."""
        return self.pair_multiply_adds if self._pairs(dtype) else self.multiply_adds

    def arithmetic(self, dtype: torch.dtype) -> str:
        """The entry of COSTS."""
        if self._pairs(dtype):
            return self.level
        level = self.level.removesuffix("_bf16")  # the same kernels
        return level if dtype == torch.float32 else f"{level}, halves"

    def _pairs(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and self.pair_multiply_adds > 0


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
    query, out = torch.ones(1, 1, 1, 16), torch.empty(1, 1, 1, 16)
    segment = SegmentSet(query, query, None, None, None, None, False)
    nothing = dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "key_mask", "attn_bias", "query_offset",
         "window", "softcap", "sinks", "dropout_seed")
    )  # fmt: skip
    problem = Problem(query, query, query, (segment,), is_causal=True, dropout_p=0.0, scale=0.25, **nothing)
    return _least_seconds(lambda: native.forward(problem, out, out[..., 0]), rounds)


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
    regions = sum(tasks > 1 for _, tasks in (folded_work(shape), walked_work(shape)))
    return limits.times(COSTS[machine.arithmetic(dtype)]).total + regions * machine.region


def backward_seconds(
    machine: Machine, shape: Shape, dtype: torch.dtype = torch.float32, dropout: bool = False
) -> float:
    """Predicted time of the gradients of all inputs."""
    limits = backward_limits(machine, shape, dtype, dropout)
    regions = 1 + len(shape.sets)  # the rows, then the parts of each set
    return limits.times(COSTS[machine.arithmetic(dtype)]).total + regions * machine.region


def forward_limits(machine: Machine, shape: Shape, dtype: torch.dtype = torch.float32, dropout: bool = False) -> Work:
    """Seconds of each kind of work in a forward call, were it done at the machine's rate."""
    shape = shape._replace(element=dtype.itemsize)
    shared, tasks = folded_work(shape)
    rows, blocks = walked_work(shape)
    limits = _seconds(machine, shared, dtype, tasks).plus(_seconds(machine, rows, dtype, blocks))
    moved = shape.shared_bytes + shape.own_bytes + 2 * shape.query_bytes
    return _whole_call(machine, limits, moved, dropout)


def backward_limits(machine: Machine, shape: Shape, dtype: torch.dtype = torch.float32, dropout: bool = False) -> Work:
    """Seconds of each kind of work in a backward call, were it done at the machine's rate."""
    shape = shape._replace(element=dtype.itemsize)
    work, tasks = backward_work(shape, machine.arithmetic(dtype) == "avx512_bf16")
    moved = 2 * (shape.shared_bytes + shape.own_bytes) + 4 * shape.query_bytes
    return _whole_call(machine, _seconds(machine, work, dtype, tasks), moved, dropout)


def _whole_call(machine: Machine, limits: Work, moved: float, dropout: bool) -> Work:
    return limits._replace(
        draws=limits.draws if dropout else 0.0,
        bytes=moved / machine.bandwidth(moved),
        calls=machine.overhead,
    )


def _seconds(machine: Machine, work: Work, dtype: torch.dtype, tasks: int) -> Work:
    """Of the thread with the most tasks."""
    if tasks == 0:
        return Work()
    share = math.ceil(tasks / machine.threads) / tasks * machine.threads
    adds, exponentials = share / machine.multiply_adds, share / machine.exponentials
    products = share / machine.peak(dtype)
    return work.times(Work(products, adds, exponentials, adds, adds, adds))


def own_keys(shape: Shape) -> list[int]:
    """Own keys that each group of 16 lanes of a row needs; lanes run over (query, head of the group)."""
    group = shape.heads // shape.kv_heads
    lanes, needed = shape.queries * group, []
    for first in range(0, lanes, SIZES["kGroup"]):
        last_query = min(first + SIZES["kGroup"], lanes) - 1
        visible = last_query // group + shape.keys - shape.queries + 1 if shape.causal else shape.keys
        needed.append(min(max(visible, 0), shape.keys))
    return needed


def _ends_block(index: int, groups: list[int]) -> bool:
    blocks = SIZES["kLanes"] // SIZES["kGroup"]
    return (index + 1) % blocks == 0 or index == len(groups) - 1


def folded(shape: Shape, segments: int) -> bool:
    """Whether the queries of all rows that read a segment are folded into the lanes of one product."""
    lanes = shape.queries * shape.heads // shape.kv_heads
    enough = shape.rows * lanes >= SIZES["kFoldedReaders"] * max(segments, 1)
    return lanes <= SIZES["kFoldedQueries"] and shape.rows > 1 and enough


def folded_work(shape: Shape) -> tuple[Work, int]:
    """(work, tasks) of the sets whose readers are folded: scores, weights and float32 partial results."""
    lanes, D = shape.queries * shape.heads // shape.kv_heads, shape.head_dim
    total, tasks = Work(), 0
    for segments, size in shape.sets:
        if not folded(shape, segments) or size == 0:
            continue
        used = min(segments, shape.rows)  # segments that rows read, equally many each
        groups = used * math.ceil(shape.rows * lanes / used / SIZES["kGroup"])
        blocks = used * math.ceil(shape.rows * lanes / used / SIZES["kLanes"])
        splits = math.ceil(SIZES["kMinimumItems"] / (shape.kv_heads * max(shape.rows * lanes // SIZES["kLanes"], 1)))
        least = SIZES["kMinimumChunk"]
        chunk = max(least, math.ceil(math.ceil(size / splits) / least) * least)
        chunks = math.ceil(size / chunk)
        work = _forward_tiles(D, groups, [size], shape.element < 4, blocks)
        # Queries and sums are transposed for every chunk; partial results are written and merged.
        rows = work.rows + 2 * D * chunks * (groups * SIZES["kGroup"] + shape.rows * lanes)
        total = total.plus(work._replace(rows=rows))
        tasks += shape.kv_heads * blocks * chunks
    return total.scaled(shape.kv_heads), tasks


def walked_work(shape: Shape) -> tuple[Work, int]:
    """(work, tasks) of the rows: each walks its own keys and what is not folded."""
    lanes, D = shape.queries * shape.heads // shape.kv_heads, shape.head_dim
    walked = [size for segments, size in shape.sets if not folded(shape, segments)]
    own, pieces = own_keys(shape), shape.rows * shape.kv_heads
    if not own:
        return Work(), 0
    if lanes <= SIZES["kFewQueries"]:
        work = Work(few=4.0 * D * lanes * (sum(walked) + own[-1]), rows=2.0 * D * lanes)
    else:
        work = Work(rows=2.0 * D * SIZES["kGroup"] * len(own))
        for index, needed in enumerate(own):
            last = _ends_block(index, own)
            work = work.plus(_forward_tiles(D, 1, [*walked, needed], shape.element < 4, int(last)))
    return work.scaled(pieces), pieces * math.ceil(lanes / SIZES["kLanes"])


def _forward_tiles(D: int, groups: int, runs: list[int], halves: bool, blocks: int) -> Work:
    """Of groups of lanes that all walk these runs of keys; halves are converted, once for a block."""
    keys = sum(runs)
    scores = float(SIZES["kGroup"] * groups * keys)
    tiles = groups * sum(math.ceil(size / SIZES["kForwardTile"]) for size in runs)
    return Work(
        products=4 * D * scores,  # K Q^T, V^T P
        sums=scores + 2 * D * SIZES["kGroup"] * tiles,  # S written, O read and written
        weights=scores,
        rows=2.0 * D * keys * blocks if halves else 0.0,
        draws=scores,
    )


def backward_work(shape: Shape, pairs: bool = False) -> tuple[Work, int]:
    """(work, tasks) of all gradients: five products over the keys that a row sees, for a chunk of rows at a time."""
    lanes, D, tile = shape.queries * shape.heads // shape.kv_heads, shape.head_dim, SIZES["kBackwardTile"]
    shared, own, pieces = [size for _, size in shape.sets], own_keys(shape), shape.rows * shape.kv_heads
    work = Work(rows=5.0 * D * SIZES["kGroup"] * len(own))  # q, twice; do, o, dq
    for index, needed in enumerate(own):
        runs = [*shared, needed]
        scores = float(SIZES["kGroup"] * sum(runs))
        tiles = sum(math.ceil(size / tile) for size in runs)
        last = _ends_block(index, own)
        work = work.plus(
            Work(
                products=10 * D * scores,
                sums=2 * scores + 2 * D * SIZES["kGroup"] * tiles + (4 * D * sum(runs) if last else 0),  # dq; dk, dv
                weights=scores,
                rows=(3.0 if pairs else 2.0) * D * sum(runs) if last and shape.element < 4 else 0.0,
                draws=scores,
            )
        )
    chunk = max(math.ceil(SIZES["kChunkQueries"] / max(lanes, 1)), math.ceil(shape.rows / SIZES["kMaximumChunks"]))
    chunks = math.ceil(shape.rows / chunk)
    work = work.scaled(pieces)
    if chunks > 1:  # partial sums, cleared and added
        parts = 4.0 * D * chunks * shape.kv_heads * sum(segments * size for segments, size in shape.sets)
        work = work._replace(rows=work.rows + parts)
    return work, chunks * shape.kv_heads
