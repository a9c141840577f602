"""Gradients of all queries, and of the keys and values of a shared segment that is one short block, in one walk.

    p_ij = e^{s_ij - lse_i}                                 ds_ij = p_ij (do_i·v_j - δ_i)
    dq_i = scale (Σ_shared ds_ij k_j + Σ_own ds_ij k_j)
    dv_j = Σ_i p_ij do_i,    dk_j = scale Σ_i ds_ij q_i     (shared keys j; queries i of all rows that read them)

A program keeps dK and dV of one segment in float32 registers while it walks its share of the query tiles that read it,
and makes dq of each tile completely: over a shared key that is 5 matrix products instead of the 7 of dq and dkv apart,
and one exponential instead of two, and queries and output gradients are read once. dk and dv of the own tokens are not
made here, as their sums run over other queries.

The segment has keys as rows (`key_major`), so that dK and dV take p and ds as they come, and its part of dq is
dqᵀ = kᵀ·dsᵀ. That finished float32 sum is transposed to be what the own tokens' products add to; as an operand of a
product it could be miscompiled. Own tokens are those of `dq_kernel`. The programs of a segment take tiles in turn, the
longest first, so that all have about the same work; they write float32 partial sums of dK and dV.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.key_major import readers_of, score_gradients, store_gradient, weights_of_tile
from prefix_fast.kernels.prefix_attention_bwd_dq import descend_set
from prefix_fast.kernels.primitives import dot, dot_add, load_rows, offset_of, scratch_start, valid_span_of
from prefix_fast.kernels.row_major import sizes_of, windowed_length


@triton.jit
def _add_segment(
    dk, dv, k, v, q, do, level, delta, row, head, keys, present, queries, count, offset, sets, set_strides, odd_sizes,
    window, scale, softcap, dropout,
    IN_WINDOW: tl.constexpr, SLIDES: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV plus those of a query tile, and the segment's part of the tile's dq: all five products of scores."""
    bias = sets[0][5]
    if bias is not None:
        bias += row.to(tl.int64) * set_strides[0][6] + head.to(tl.int64) * set_strides[0][7]
    begin = row * 0
    if SLIDES:
        begin = -windowed_length(row, sets, odd_sizes, 0, 1, IN_WINDOW)
    product = dot(k, tl.trans(q), PRECISION, UPCAST)
    weights, kept_weights, kept, slope = weights_of_tile(
        product, level, keys, queries, present, 0, count, bias, set_strides[0][8:10], offset, begin, window, scale,
        softcap, dropout, 0, True, False, SLIDES, SOFTCAP, NATURAL, DROPOUT,
    )  # fmt: skip
    if WANT_V:
        dv = dot_add(kept_weights.to(do.dtype), do, dv, PRECISION, UPCAST)
    weights = tl.where(present[:, None], weights, 0.0)  # e^-lse of a key that is not there can be infinite
    dp = dot(v, tl.trans(do), PRECISION, UPCAST)
    ds = score_gradients(weights, kept, slope, dp, delta, dropout, SOFTCAP, DROPOUT).to(q.dtype)
    if WANT_K:
        dk = dot_add(ds, q, dk, PRECISION, UPCAST)
    return dk, dv, tl.trans(dot(tl.trans(k), ds, PRECISION, UPCAST))


@triton.jit
def _walk_tile(
    dk, dv, k, v, row, head, kv_head, first_query, dims, keys, present, query, grad_out, levels, deltas, grad_query,
    key_mask, query_offset, seed, sets, set_strides, odd_sizes, query_strides, grad_strides, target_strides,
    mask_strides, offset_stride, count, fixed_offset, window, scale, softcap, threshold, kept_share, capacity,
    IN_WINDOW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dq of one query tile, and add to dK and dV of the segment."""
    tile = tl.arange(0, BLOCK_Q)
    queries = first_query + tile
    valid_queries = queries < count
    offset = offset_of(row, query_offset, fixed_offset, None, None, offset_stride)
    row64, head64, token = row.to(tl.int64), head.to(tl.int64), tl.cast(first_query, tl.int64)
    q_base = query + row64 * query_strides[0] + head64 * query_strides[1] + token * query_strides[2]
    do_base = grad_out + row64 * grad_strides[0] + head64 * grad_strides[1] + token * grad_strides[2]
    q = load_rows(q_base, query_strides[2], tile, dims, valid_queries, True, D, BLOCK_D)
    do = load_rows(do_base, grad_strides[2], tile, dims, valid_queries, True, D, BLOCK_D)
    scratch = head64 * capacity + scratch_start(row, None, count) + first_query
    level = tl.load(levels + scratch + tile)
    delta = tl.load(deltas + scratch + tile)
    dropout = (0, 0, 0, 0)
    if DROPOUT:
        dropout = (tl.load(seed), row * (tl.num_programs(1) * GROUP) + head, threshold, 1 / kept_share)
    dk, dv, dq = _add_segment(
        dk, dv, k, v, q, do, level, delta, row, head, keys, present, queries, count, offset, sets, set_strides,
        odd_sizes, window, scale, softcap, dropout,
        IN_WINDOW, WINDOW and IN_WINDOW[0], SOFTCAP, NATURAL, DROPOUT, WANT_K, WANT_V, PRECISION, UPCAST,
    )  # fmt: skip
    last_position = tl.minimum(first_query + BLOCK_Q, count) - 1 + offset
    dq = descend_set(
        dq, q, do, level, delta, row, head, kv_head, queries, queries + offset, valid_queries, first_query + offset,
        last_position, dims, sets, set_strides, odd_sizes, key_mask, mask_strides, window, scale, softcap, dropout,
        1, 1, IN_WINDOW, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, D, BLOCK_D, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    target = grad_query + row64 * target_strides[0] + head64 * target_strides[1] + token * target_strides[2]
    pointers = target + tile[:, None] * target_strides[2] + dims[None, :]
    mask = valid_queries[:, None] & (dims < D)[None, :]
    tl.store(pointers, (dq * scale).to(grad_query.dtype.element_ty), mask=mask)
    return dk, dv


@triton.jit(do_not_specialize=[
    "num_rows", "max_queries", "fixed_offset", "window", "threshold", "capacity", "splits",
])  # fmt: skip
def short_kernel(
    query, grad_out, levels, deltas, grad_query, grad_key, grad_value, order, starts, key_mask, query_offset,
    cu_seqlens_q, seed, sets, set_strides, odd_sizes, query_strides, grad_strides, target_strides, key_strides,
    value_strides, split_strides, mask_strides, offset_stride, num_rows, max_queries, fixed_offset, window, scale,
    softcap, threshold, kept_share, capacity, splits,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, BLOCK_P: tl.constexpr,
    SETS: tl.constexpr, IN_WINDOW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (segments × splits, Hkv); where rows have ids, a segment more, whose readers are those that read none.

    `sets` holds one dense set, whose segments have at most BLOCK_P keys, and the own tokens. The rows are dense.
    """
    tl.static_assert(SETS == 1 and cu_seqlens_q is None and sets[0][4] is None, "one dense set and dense rows")
    key, value, _, lengths, _, _ = sets[0]
    strides = set_strides[0]
    number, size = sizes_of(odd_sizes, 0)
    unit, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    kv_head = tl.program_id(1)
    segment = tl.minimum(unit, number - 1)
    _, valid = valid_span_of(segment, lengths, None, size)
    keys = tl.arange(0, BLOCK_P)
    present = keys < tl.where(unit < number, valid, 0)
    dims = tl.arange(0, BLOCK_D)
    unit64, head64 = segment.to(tl.int64), kv_head.to(tl.int64)
    k_base = key + unit64 * strides[0] + head64 * strides[1]
    v_base = value + unit64 * strides[3] + head64 * strides[4]
    k = load_rows(k_base, strides[2], keys, dims, present, True, D, BLOCK_D).to(query.dtype.element_ty)
    v = load_rows(v_base, strides[5], keys, dims, present, True, D, BLOCK_D).to(query.dtype.element_ty)
    first_reader, readers = readers_of(unit, order, starts, num_rows)
    pairs = readers * GROUP
    tiles = tl.cdiv(max_queries, BLOCK_Q)

    dk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for item in range(split, pairs * tiles, splits):
        row = first_reader + item % pairs // GROUP
        if order is not None:
            row = tl.load(order + row).to(tl.int32)
        dk, dv = _walk_tile(
            dk, dv, k, v, row, kv_head * GROUP + item % GROUP, kv_head, (tiles - 1 - item // pairs) * BLOCK_Q, dims,
            keys, present, query, grad_out, levels, deltas, grad_query, key_mask, query_offset, seed, sets,
            set_strides, odd_sizes, query_strides, grad_strides, target_strides, mask_strides, offset_stride,
            max_queries, fixed_offset, window, scale, softcap, threshold, kept_share, capacity,
            IN_WINDOW, GROUP, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, WANT_K, WANT_V, D, BLOCK_D, BLOCK_Q, BLOCK_K,
            PRECISION, UPCAST,
        )  # fmt: skip
    exists = keys < tl.where(unit < number, size, 0)
    if WANT_K:
        store_gradient(dk * scale, grad_key, split, unit64, head64, 0, keys, dims, exists, present, split_strides[0],
                       key_strides, D)  # fmt: skip
    if WANT_V:
        store_gradient(dv, grad_value, split, unit64, head64, 0, keys, dims, exists, present, split_strides[1],
                       value_strides, D)  # fmt: skip
