"""Merge of the partial results of a query over disjoint sets of keys.

    lse = log Σ_c e^{lse_c} (the sink's logit among them)      out = Σ_c e^{lse_c - lse} out_c

All in float32 and in the order of the parts, which is that of the chain. A part without keys has lse -inf; its out is
not read, as nothing was written there. The parts of a set of which the row reads no segment are not read at all.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.primitives import INFINITY, add_sink, even, exponential


@triton.jit
def merge_states(output, maximum, total, outs, levels):
    """The state of one query after some parts more: outs [parts, D] and levels [parts], natural logarithms."""
    new_maximum = tl.maximum(maximum, tl.max(levels, 0))
    reference = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)
    weights = exponential(levels, 1.0, reference, True)
    factor = exponential(maximum, 1.0, reference, True)
    output = output * factor + tl.sum(outs * weights[:, None], 0)
    return output, new_maximum, total * factor + tl.sum(weights, 0)


@triton.jit
def _read_by(parts, row, sets, odd_sizes, odd_chunks, SETS: tl.constexpr):
    """Which of the parts are of segments that the row reads, or of its own tokens."""
    read = parts >= 0
    first = row * 0
    for index in tl.static_range(SETS):
        chunks = even(odd_chunks[index])
        ids = sets[index][2]
        if ids is not None:
            unit = tl.load(ids + row).to(tl.int64)
            unread = tl.where((unit >= 0) & (unit < even(odd_sizes[index][0])), 0, chunks)
            read = read & ((parts < first) | (parts >= first + unread))
        first += chunks
    return read & (parts < first + even(odd_chunks[SETS]))


@triton.jit(do_not_specialize=["num_rows", "max_queries", "kv_heads"])
def merge_kernel(
    partial_out, partial_lse, out, lse, sinks, sets, odd_sizes, out_strides, lse_strides, num_rows, max_queries,
    kv_heads, odd_chunks,
    SETS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid: (B × Hkv × Tq × group,), a query each, in the order of partial_out [Σ chunks, B, Hkv, Tq, group, D]."""
    slot = tl.program_id(0)
    pair = slot // GROUP
    token = pair % max_queries
    kv_head = pair // max_queries % kv_heads
    row = pair // max_queries // kv_heads
    head = kv_head * GROUP + slot % GROUP
    slots = num_rows * kv_heads * max_queries * GROUP
    num_parts = slot * 0
    for index in tl.static_range(SETS + 1):
        num_parts += even(odd_chunks[index])
    dims = tl.arange(0, BLOCK_D)

    output = tl.zeros((BLOCK_D,), tl.float32)
    maximum = -float("inf")
    total = 0.0
    for first in range(0, num_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        read = _read_by(parts, row, sets, odd_sizes, odd_chunks, SETS)
        places = parts.to(tl.int64) * slots + slot
        levels = tl.load(partial_lse + places, mask=read, other=-INFINITY)
        written = (levels != -INFINITY)[:, None] & (dims < D)[None, :]
        outs = tl.load(partial_out + places[:, None] * D + dims[None, :], mask=written, other=0.0)
        output, maximum, total = merge_states(output, maximum, total, outs, levels)

    if sinks is not None:
        maximum, total, factor = add_sink(maximum, total, tl.load(sinks + head).to(tl.float32), True)
        output = output * factor
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    row, head, token = row.to(tl.int64), head.to(tl.int64), token.to(tl.int64)
    out_base = out + row * out_strides[0] + head * out_strides[1] + token * out_strides[2]
    tl.store(out_base + dims, (output / divisor).to(out.dtype.element_ty), mask=dims < D)
    level = tl.where(empty, -INFINITY, maximum + tl.log(divisor))
    tl.store(lse + row * even(lse_strides[0]) + head * even(lse_strides[1]) + token * lse_strides[2], level)
