"""Gradients of keys and values, segment-major: a key block stays, the queries of all its readers pass by.

    p_ij = e^{s_ij - lse_i}     dv_j = Σ_i p_ij do_i     ds_ij = p_ij (do_i·v_j - δ_i)     dk_j = scale Σ_i ds_ij q_i

The sum over i runs over all rows that read the segment, the heads of the group and their queries: one product with the
reduction dimension rows × group × Tq, accumulated in float32 registers. Own tokens are segments with one reader and a
causal edge. Long reader lists are split over programs that write float32 partials, which `reduce_kernel` adds in a
fixed order: no atomics, the same bits every time.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.key_major import readers_of, score_gradients, store_gradient, weights_of_tile
from prefix_fast.kernels.primitives import (
    dot,
    dot_add,
    even,
    load_rows,
    offset_of,
    packed_tile,
    scratch_start,
    span_of,
    valid_span_of,
)
from prefix_fast.kernels.row_major import present_keys, sizes_of, tokens_of, windowed_length


@triton.jit
def query_bounds(
    first_key, last_key, begin, offset, count, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): no query outside [low, high) sees a key of the block, and every query of
    [full_low, full_high) sees all of them. All but `high` are multiples of BLOCK_Q.
    """
    low = count * 0
    full_low = count * 0
    high = count
    full_high = count // BLOCK_Q * BLOCK_Q
    if CAUSAL:
        low = tl.maximum(first_key - offset, 0) // BLOCK_Q * BLOCK_Q
        full_low = tl.cdiv(tl.maximum(last_key - offset, 0), BLOCK_Q) * BLOCK_Q
    if WINDOW:
        high = tl.minimum(count, tl.maximum(begin + last_key + window - offset, 0))
        limit = tl.maximum(begin + first_key + window - offset, 0)
        full_high = tl.minimum(count, limit) // BLOCK_Q * BLOCK_Q
    return low, full_low, full_high, high


@triton.jit
def _gather(
    dk, dv, k, v, low, full_low, full_high, high, keys, present, first_key, dims, query, grad_out, levels, deltas, bias,
    query_stride, grad_stride, bias_strides, count, offset, begin, window, scale, softcap, dropout,
    SET: tl.constexpr, EDGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add queries of one row and head: [full_low, full_high), or with EDGES the others of [low, high).

    Both sides of the middle are one loop: a copy of it for each would take more registers than there are.
    """
    tile = tl.arange(0, BLOCK_Q)
    begins = low if EDGES else full_low
    ends = high - (full_high - full_low) if EDGES else full_high
    for start in range(begins, ends, BLOCK_Q):
        if EDGES:
            start += tl.where(start >= full_low, full_high - full_low, 0)
        first = tl.cast(start, tl.int64)
        tokens = tokens_of(tile, count - start, EDGES)
        queries = start + tile
        q = load_rows(query + first * query_stride, query_stride, tokens, dims, tokens, False, D, BLOCK_D)
        do = load_rows(grad_out + first * grad_stride, grad_stride, tokens, dims, tokens, False, D, BLOCK_D)
        level = tl.load(levels + start + tile)
        product = dot(k, tl.trans(q), PRECISION, UPCAST)
        weights, kept_weights, kept, slope = weights_of_tile(
            product, level, keys, queries, present, first_key, count, bias, bias_strides, offset, begin, window, scale,
            softcap, dropout, SET, EDGES, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT,
        )  # fmt: skip
        if WANT_K:
            dp = dot(v, tl.trans(do), PRECISION, UPCAST)
        if WANT_V:
            dv = dot_add(kept_weights.to(do.dtype), do, dv, PRECISION, UPCAST)
        if WANT_K:
            delta = tl.load(deltas + start + tile)
            ds = score_gradients(weights, kept, slope, dp, delta, dropout, SOFTCAP, DROPOUT)
            dk = dot_add(ds.to(q.dtype), q, dk, PRECISION, UPCAST)
    return dk, dv


@triton.jit(do_not_specialize=[
    "num_rows", "max_queries", "fixed_offset", "window", "threshold", "capacity", "tiles", "splits",
    "query_splits",
])  # fmt: skip
def dkv_kernel(
    query, grad_out, levels, deltas, grad_key, grad_value, order, starts, key_mask, query_offset, cu_seqlens_q, seed,
    sets, set_strides, odd_sizes, query_strides, grad_strides, key_strides, value_strides, split_strides,
    mask_strides, offset_stride, num_rows, max_queries, fixed_offset, window, scale, softcap, threshold, kept_share,
    capacity, tiles, splits, query_splits,
    SET: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    SETS: tl.constexpr, IN_WINDOW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (key tiles of all segments × splits of the readers × splits of their queries, Hkv), for one set SET."""
    OWN: tl.constexpr = SET == SETS
    SLIDES: tl.constexpr = WINDOW and (OWN or IN_WINDOW[SET])
    key, value, _, lengths, cu_seqlens, bias = sets[SET]
    strides = set_strides[SET]
    set_count, set_size = sizes_of(odd_sizes, SET)
    part = tl.program_id(0) // tiles
    split, query_split = part % splits, part // splits
    kv_head = tl.program_id(1)
    if cu_seqlens is None:
        blocks = tl.cdiv(set_size, BLOCK_K)
        unit, block = tl.program_id(0) % tiles // blocks, tl.program_id(0) % tiles % blocks
    else:
        unit, block = packed_tile(tl.program_id(0) % tiles, cu_seqlens, set_count, BLOCK_K)
    first_token, size = span_of(unit, cu_seqlens, set_size)
    first_key = block * BLOCK_K
    if first_key >= size:
        return
    _, valid = valid_span_of(unit, lengths, cu_seqlens, set_size)
    tile = tl.arange(0, BLOCK_K)
    keys = first_key + tile
    dims = tl.arange(0, BLOCK_D)
    mask = None
    if OWN and key_mask is not None:
        mask = key_mask + unit.to(tl.int64) * even(mask_strides[0])
    present = present_keys(first_key, tile, valid, mask, mask_strides[1], True)
    unit64, head64, token = unit.to(tl.int64), kv_head.to(tl.int64), first_token + first_key
    k_base = key + unit64 * strides[0] + head64 * strides[1] + token * strides[2]
    v_base = value + unit64 * strides[3] + head64 * strides[4] + token * strides[5]
    k = load_rows(k_base, strides[2], tile, dims, present, True, D, BLOCK_D).to(query.dtype.element_ty)
    v = load_rows(v_base, strides[5], tile, dims, present, True, D, BLOCK_D).to(query.dtype.element_ty)
    if OWN:
        first_reader, readers = unit, unit * 0 + 1
    else:
        first_reader, readers = readers_of(unit, order, starts, num_rows)
    pairs = tl.where(first_key < valid, readers * GROUP, 0)
    share = tl.cdiv(pairs, splits)
    chunk = tl.cdiv(tl.cdiv(max_queries, BLOCK_Q), query_splits) * BLOCK_Q
    last_key = tl.minimum(first_key + BLOCK_K, valid) - 1

    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # Addresses of the loops within, hoisted out of this one, would take the registers of the sums.
    for pair in tl.range(split * share, tl.minimum(split * share + share, pairs), disable_licm=True):
        row = first_reader + pair // GROUP
        if not OWN and order is not None:
            row = tl.load(order + row).to(tl.int32)
        dk, dv = _one_reader(
            dk, dv, k, v, row, kv_head * GROUP + pair % GROUP, query_split * chunk, query_split * chunk + chunk,
            keys, present, first_key, last_key, dims, query, grad_out, levels, deltas, bias, query_offset,
            cu_seqlens_q, seed, sets, odd_sizes, query_strides, grad_strides, strides, offset_stride, max_queries,
            fixed_offset, window, scale, softcap, threshold, kept_share, capacity,
            SET, SETS, IN_WINDOW, GROUP, CAUSAL and OWN, SLIDES, SOFTCAP, NATURAL, DROPOUT, WANT_K, WANT_V, D, BLOCK_D,
            BLOCK_Q, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    if WANT_K:
        store_gradient(dk * scale, grad_key, part, unit64, head64, token, tile, dims, keys < size, present,
                       split_strides[0], key_strides, D)  # fmt: skip
    if WANT_V:
        store_gradient(dv, grad_value, part, unit64, head64, token, tile, dims, keys < size, present,
                       split_strides[1], value_strides, D)  # fmt: skip


@triton.jit
def _one_reader(
    dk, dv, k, v, row, head, chunk_low, chunk_high, keys, present, first_key, last_key, dims, query, grad_out, levels,
    deltas, bias, query_offset, cu_seqlens_q, seed, sets, odd_sizes, query_strides, grad_strides, strides,
    offset_stride, max_queries, fixed_offset, window, scale, softcap, threshold, kept_share, capacity,
    SET: tl.constexpr, SETS: tl.constexpr, IN_WINDOW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, WANT_K: tl.constexpr,
    WANT_V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the queries of one row and head that see the key block, within one chunk of them."""
    first_token, count = span_of(row, cu_seqlens_q, max_queries)
    offset = offset_of(row, query_offset, fixed_offset, cu_seqlens_q, sets[SETS][4], offset_stride)
    begin = row * 0
    if WINDOW and SET < SETS:
        begin = -windowed_length(row, sets, odd_sizes, SET, SETS, IN_WINDOW)
    row64, head64 = row.to(tl.int64), head.to(tl.int64)
    q_base = query + row64 * query_strides[0] + head64 * query_strides[1] + first_token * query_strides[2]
    do_base = grad_out + row64 * grad_strides[0] + head64 * grad_strides[1] + first_token * grad_strides[2]
    scratch = head64 * capacity + scratch_start(row, cu_seqlens_q, max_queries)
    bias_base = bias
    if bias is not None:
        bias_base += row64 * strides[6] + head64 * strides[7]
    dropout = (0, 0, 0, 0)
    if DROPOUT:
        dropout = (tl.load(seed), row * (tl.num_programs(1) * GROUP) + head, threshold, 1 / kept_share)
    low, full_low, full_high, high = query_bounds(
        first_key, last_key, begin, offset, count, window, CAUSAL, WINDOW, BLOCK_Q
    )
    low, high = tl.maximum(low, chunk_low), tl.minimum(high, chunk_high)
    full_low = tl.minimum(tl.maximum(full_low, low), tl.maximum(low, high))
    full_high = tl.minimum(tl.maximum(full_high, full_low), tl.maximum(full_low, high))
    for loop in tl.static_range(2):
        dk, dv = _gather(
            dk, dv, k, v, low, full_low, full_high, high, keys, present, first_key, dims, q_base, do_base,
            levels + scratch, deltas + scratch, bias_base, query_strides[2], grad_strides[2], strides[8:10], count,
            offset, begin, window, scale, softcap, dropout,
            SET, loop == 0, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, WANT_K, WANT_V, D, BLOCK_D, BLOCK_Q, BLOCK_K,
            PRECISION, UPCAST,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["count", "parts"])
def reduce_kernel(partials, target, count, parts, BLOCK: tl.constexpr):
    """target[i] = Σ_part partials[part, i], in float32 and in the order of the parts. Grid: (blocks of elements,)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partials + tl.cast(part, tl.int64) * count + index, mask=index < count, other=0.0)
    tl.store(target + index, total.to(target.dtype.element_ty), mask=index < count)
