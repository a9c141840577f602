"""What both forward kernels do: walk a run of keys under the online softmax, and turn the state into a result.

    s_ij = scale · q_i·k_j (softcapped, plus bias, -inf where hidden)      lse_i = log Σ_j e^{s_ij}
    out_i = Σ_j e^{s_ij - lse_i} v_j

The state (output, maximum, total) is float32 in registers; output and total are relative to the maximum. The weights
are rounded to the queries' dtype for their product with v.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.primitives import (
    INFINITY,
    LN2,
    dot,
    dot_add,
    kept_rows,
    load_rows,
    logits_of,
    online_softmax_update,
)
from prefix_fast.kernels.row_major import add_bias, hide, present_keys, tokens_of


@triton.jit
def empty_state(BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """(output, maximum, total) of queries that have seen no key."""
    output = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    return output, maximum, total


@triton.jit
def attend(
    state, q, low, high, queries, positions, valid_queries, dims, key, value, bias, bias_rows, key_mask, strides,
    mask_stride, valid, begin, window, scale, softcap, dropout,
    SET: tl.constexpr, EDGES: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the keys [low, high) of one segment to the state; scale > 0. `bias_rows` is where a query's bias begins."""
    HOLES: tl.constexpr = key_mask is not None
    output, maximum, total = state
    tile = tl.arange(0, BLOCK_K)
    for start in range(low, high, BLOCK_K):
        keys = start + tile
        first = tl.cast(start, tl.int64)
        present = present_keys(start, tile, valid, key_mask, mask_stride, EDGES)
        tokens = tokens_of(tile, valid - start, EDGES)
        k = load_rows(key + first * strides[2], strides[2], tokens, dims, present, HOLES, D, BLOCK_D).to(q.dtype)
        logits, unit, _ = logits_of(dot(q, tl.trans(k), PRECISION, UPCAST), scale, softcap, SOFTCAP, NATURAL)
        logits = add_bias(logits, bias, 1, strides[9], bias_rows, keys, valid_queries, present, NATURAL)
        logits = hide(logits, -INFINITY, keys, positions, present, begin, window, EDGES, MASKED, CAUSAL, WINDOW)
        weights, maximum, total, factor = online_softmax_update(logits, unit, maximum, total, NATURAL)
        if DROPOUT:
            kept = kept_rows(dropout[0], queries, start, dropout[1], SET, dropout[2], BLOCK_K)
            weights = tl.where(kept, weights, 0.0)
        v = load_rows(value + first * strides[5], strides[5], tokens, dims, present, HOLES, D, BLOCK_D).to(q.dtype)
        output = dot_add(weights.to(q.dtype), v, output * factor[:, None], PRECISION, UPCAST)
    return output, maximum, total


@triton.jit
def result_of(output, maximum, total, kept_share, NATURAL: tl.constexpr, DROPOUT: tl.constexpr):
    """(out, lse) of a state; 0 and -inf where no key was seen. Dropout leaves the denominator as it is."""
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    if DROPOUT:
        output = output / (divisor * kept_share)[:, None]
    else:
        output = output / divisor[:, None]
    level = maximum if NATURAL else maximum * LN2
    return output, tl.where(empty, -INFINITY, level + tl.log(divisor))
