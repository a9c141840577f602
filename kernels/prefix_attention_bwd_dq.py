"""Gradient of the queries, row-major, and the small kernel that prepares both halves of the backward pass.

    δ_i = Σ_d do_i·o_i - g_i     p_ij = e^{s_ij - lse_i}    ds_ij = p_ij (do_i·v_j - δ_i)   dq_i = scale Σ_j ds_ij k_j

lse is that of the whole chain, so each segment's part is independent of the others; g is the gradient of lse. δ and lse
are float32 in a scratch whose rows are padded to whole tiles: there, and for queries that see no key, lse is +inf and
δ is 0, so p is 0 without a mask. dq is float32 in registers and scaled last; p and do·v are recomputed, never stored.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.primitives import (
    INFINITY,
    LOG2E,
    dot,
    dot_add,
    even,
    exponential,
    kept_rows,
    load_rows,
    logits_of,
    offset_of,
    scratch_start,
)
from prefix_fast.kernels.row_major import (
    add_bias,
    hide,
    key_bounds,
    open_set,
    part_of,
    present_keys,
    query_tile,
    tokens_of,
)


@triton.jit(do_not_specialize=["num_rows", "max_queries", "capacity"])
def prepare_kernel(
    out, lse, grad_out, grad_lse, cu_seqlens_q, levels, deltas, out_strides, lse_strides, grad_strides,
    grad_lse_strides, num_rows, max_queries, capacity,
    NATURAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Write δ and lse (as a power of 2, or natural) to the padded scratch [H, capacity]. Grid: (query tiles, H)."""
    row, first_query, first_token, count = query_tile(cu_seqlens_q, num_rows, max_queries, PADDING)
    if first_query >= count:
        return
    head = tl.program_id(1)
    tile = tl.arange(0, PADDING)
    dims = tl.arange(0, BLOCK_D)
    valid = first_query + tile < count
    token = first_token + first_query
    row64, head64 = row.to(tl.int64), head.to(tl.int64)
    out_base = out + row64 * out_strides[0] + head64 * out_strides[1] + token * out_strides[2]
    grad_base = grad_out + row64 * grad_strides[0] + head64 * grad_strides[1] + token * grad_strides[2]
    lse_base = lse + row64 * even(lse_strides[0]) + head64 * even(lse_strides[1]) + token * lse_strides[2]
    o = load_rows(out_base, out_strides[2], tile, dims, valid, True, D, BLOCK_D).to(tl.float32)
    do = load_rows(grad_base, grad_strides[2], tile, dims, valid, True, D, BLOCK_D).to(tl.float32)
    delta = tl.sum(o * do, 1)
    if grad_lse is not None:
        g_base = grad_lse + row64 * even(grad_lse_strides[0]) + head64 * even(grad_lse_strides[1])
        g_base += token * grad_lse_strides[2]
        delta -= tl.load(g_base + tile * grad_lse_strides[2], mask=valid, other=0.0).to(tl.float32)
    level = tl.load(lse_base + tile * lse_strides[2], mask=valid, other=-INFINITY)
    empty = level == -INFINITY
    level = tl.where(empty, INFINITY, level if NATURAL else level * LOG2E)
    start = head64 * capacity + scratch_start(row, cu_seqlens_q, max_queries) + first_query
    tl.store(levels + start + tile, level)
    tl.store(deltas + start + tile, tl.where(empty, 0.0, delta))


@triton.jit
def _descend(
    dq, q, do, level, delta, low, high, queries, positions, valid_queries, dims, key, value, bias, key_mask, strides,
    mask_stride, valid, begin, window, scale, softcap, dropout,
    SET: tl.constexpr, EDGES: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add Σ_j ds_ij k_j over the keys [low, high) of one segment."""
    HOLES: tl.constexpr = key_mask is not None
    tile = tl.arange(0, BLOCK_K)
    for start in range(low, high, BLOCK_K):
        keys = start + tile
        first = tl.cast(start, tl.int64)
        present = present_keys(start, tile, valid, key_mask, mask_stride, EDGES)
        tokens = tokens_of(tile, valid - start, EDGES)
        k = load_rows(key + first * strides[2], strides[2], tokens, dims, present, HOLES, D, BLOCK_D).to(q.dtype)
        v = load_rows(value + first * strides[5], strides[5], tokens, dims, present, HOLES, D, BLOCK_D).to(q.dtype)
        product = dot(q, tl.trans(k), PRECISION, UPCAST)
        logits, unit, slope = logits_of(product, scale, softcap, SOFTCAP, NATURAL)
        logits = add_bias(logits, bias, strides[8], strides[9], queries, keys, valid_queries, present, NATURAL)
        weights = exponential(logits, unit, level[:, None], NATURAL)
        weights = hide(weights, 0.0, keys, positions, present, begin, window, EDGES, MASKED, CAUSAL, WINDOW)
        dp = dot(do, tl.trans(v), PRECISION, UPCAST)
        if DROPOUT:
            kept = kept_rows(dropout[0], queries, start, dropout[1], SET, dropout[2], BLOCK_K)
            dp = tl.where(kept, dp * dropout[3], 0.0)
        ds = weights * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * slope
        dq = dot_add(ds.to(q.dtype), k, dq, PRECISION, UPCAST)
    return dq


@triton.jit
def descend_set(
    dq, q, do, level, delta, row, head, kv_head, queries, positions, valid_queries, first_position, last_position,
    dims, sets, set_strides, odd_sizes, key_mask, mask_strides, window, scale, softcap, dropout,
    SET: tl.constexpr, SETS: tl.constexpr, IN_WINDOW: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One segment of the row's chain, or its own tokens: up to three loops, of which the middle one has no mask."""
    OWN: tl.constexpr = SET == SETS
    SLIDES: tl.constexpr = WINDOW and (OWN or IN_WINDOW[SET])
    key, value, valid, begin = open_set(row, kv_head, sets, set_strides, odd_sizes, SET, SETS, IN_WINDOW, SLIDES)
    mask = None
    if OWN and key_mask is not None:
        mask = key_mask + row.to(tl.int64) * even(mask_strides[0])
    bias = sets[SET][5]
    if bias is not None:
        bias += row.to(tl.int64) * set_strides[SET][6] + head.to(tl.int64) * set_strides[SET][7]
    low, full_low, full_high, high = key_bounds(
        first_position, last_position, begin, valid, window, CAUSAL and OWN, SLIDES, BLOCK_K
    )
    for part in tl.static_range(0 if SLIDES else 1, 3):
        begins, ends = part_of(low, full_low, full_high, high, part)
        dq = _descend(
            dq, q, do, level, delta, begins, ends, queries, positions, valid_queries, dims, key, value, bias, mask,
            set_strides[SET], mask_strides[1], valid, begin, window, scale, softcap, dropout,
            SET, part != 1, part != 1 or mask is not None, CAUSAL and OWN, SLIDES, SOFTCAP, NATURAL, DROPOUT, D,
            BLOCK_D, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["num_rows", "max_queries", "fixed_offset", "window", "threshold", "capacity"])
def dq_kernel(
    query, grad_out, levels, deltas, grad_query, key_mask, query_offset, cu_seqlens_q, seed,
    sets, set_strides, odd_sizes, query_strides, grad_strides, target_strides, mask_strides, offset_stride,
    num_rows, max_queries, fixed_offset, window, scale, softcap, threshold, kept_share, capacity,
    SETS: tl.constexpr, IN_WINDOW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of the queries of all rows, H). `sets` holds SETS shared sets and then the own tokens."""
    row, first_query, first_token, count = query_tile(cu_seqlens_q, num_rows, max_queries, BLOCK_Q)
    if first_query >= count:
        return
    head = tl.program_id(1)
    kv_head = head // GROUP
    offset = offset_of(row, query_offset, fixed_offset, cu_seqlens_q, sets[SETS][4], offset_stride)
    tile = tl.arange(0, BLOCK_Q)
    queries = first_query + tile
    valid_queries = queries < count
    positions = queries + offset
    last_position = tl.minimum(first_query + BLOCK_Q, count) - 1 + offset
    dims = tl.arange(0, BLOCK_D)
    row64, head64, token = row.to(tl.int64), head.to(tl.int64), first_token + first_query
    q_base = query + row64 * query_strides[0] + head64 * query_strides[1] + token * query_strides[2]
    do_base = grad_out + row64 * grad_strides[0] + head64 * grad_strides[1] + token * grad_strides[2]
    q = load_rows(q_base, query_strides[2], tile, dims, valid_queries, True, D, BLOCK_D)
    do = load_rows(do_base, grad_strides[2], tile, dims, valid_queries, True, D, BLOCK_D)
    scratch = head64 * capacity + scratch_start(row, cu_seqlens_q, max_queries) + first_query
    level = tl.load(levels + scratch + tile)
    delta = tl.load(deltas + scratch + tile)
    dropout = (0, 0, 0, 0)
    if DROPOUT:
        dropout = (tl.load(seed), row * tl.num_programs(1) + head, threshold, 1 / kept_share)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for index in tl.static_range(SETS + 1):
        dq = descend_set(
            dq, q, do, level, delta, row, head, kv_head, queries, positions, valid_queries, first_query + offset,
            last_position, dims, sets, set_strides, odd_sizes, key_mask, mask_strides, window, scale, softcap, dropout,
            index, SETS, IN_WINDOW, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, D, BLOCK_D, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    target = grad_query + row64 * target_strides[0] + head64 * target_strides[1] + token * target_strides[2]
    pointers = target + tile[:, None] * target_strides[2] + dims[None, :]
    mask = valid_queries[:, None] & (dims < D)[None, :]
    tl.store(pointers, (dq * scale).to(grad_query.dtype.element_ty), mask=mask)
