"""What the kernels with keys as rows share: weights and gradients of a tile of scores, readers of a segment, storing.

    pᵀ_ji = e^{s_ij - lse_i}      dsᵀ_ji = p_ij (do_i·v_j - δ_i)

The transposed products are computed as such (sᵀ = k·qᵀ): transposing a computed product to be an operand of another has
been miscompiled on Hopper (triton issue 6124; flash-linear-attention 640).
"""

import triton
import triton.language as tl
from prefix_fast.kernels.primitives import exponential, kept_columns, logits_of


@triton.jit
def weights_of_tile(
    product, level, keys, queries, present, first_key, count, bias, bias_strides, offset, begin, window, scale, softcap,
    dropout,
    SET: tl.constexpr, EDGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """(weights, weights after dropout, kept, slope), each [keys, queries], from k·qᵀ.

    Keys that are not present have weights too, which the caller must not use; queries past the last have lse = +inf.
    """
    logits, unit, slope = logits_of(product, scale, softcap, SOFTCAP, NATURAL)
    if bias is not None:
        pointers = bias + queries.to(tl.int64)[None, :] * bias_strides[0] + keys.to(tl.int64)[:, None] * bias_strides[1]
        mask = (queries < count)[None, :] & present[:, None]
        logits += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    weights = exponential(logits, unit, level[None, :], NATURAL)
    if EDGES and (CAUSAL or WINDOW):
        seen = tl.full((keys.shape[0], queries.shape[0]), True, tl.int1)
        if CAUSAL:
            seen = seen & (keys[:, None] <= queries[None, :] + offset)
        if WINDOW:
            seen = seen & (keys[:, None] + begin > queries[None, :] + offset - window)
        weights = tl.where(seen, weights, 0.0)
    kept = True
    kept_weights = weights
    if DROPOUT:
        kept = kept_columns(dropout[0], queries, first_key, dropout[1], SET, dropout[2], keys.shape[0])
        kept_weights = tl.where(kept, weights * dropout[3], 0.0)
    return weights, kept_weights, kept, slope


@triton.jit
def score_gradients(
    weights, kept, slope, dp, delta, dropout, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr
):  # fmt: skip
    """dsᵀ [keys, queries] from v·doᵀ; scaled where it is multiplied by q or k."""
    if DROPOUT:
        dp = tl.where(kept, dp * dropout[3], 0.0)
    ds = weights * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    return ds


@triton.jit
def readers_of(unit, order, starts, num_rows):
    """First entry in `order` and number of the rows that read a segment; without a list, every row reads it."""
    if order is None:
        first = unit * 0
        count = unit * 0 + num_rows
    else:
        first = tl.load(starts + unit).to(tl.int32)
        count = tl.load(starts + unit + 1).to(tl.int32) - first
    return first, count


@triton.jit
def store_gradient(
    total, target, part, unit, head, token, tile, dims, exists, present, split_stride, strides, D: tl.constexpr
):
    """Store a gradient block, or a partial sum of it: exact zeros where no key is valid."""
    base = target + part.to(tl.int64) * split_stride + unit * strides[0] + head * strides[1] + token * strides[2]
    result = tl.where(present[:, None], total, 0.0).to(target.dtype.element_ty)
    tl.store(base + tile[:, None] * strides[2] + dims[None, :], result, mask=exists[:, None] & (dims < D)[None, :])
