"""Forward, segment-major: the queries of all readers of a segment against one chunk of its keys. Decode, few queries.

    lse_ic = log Σ_{j in c} e^{s_ij}      out_ic = Σ_{j in c} e^{s_ij - lse_ic} v_j      for each chunk c of i's chain

A tile of q holds rows × Tq × group queries that read one segment, so that its keys are read once for all of them; own
tokens are segments with one reader, a causal edge and a tile of Tq × group. One grid serves every set: work items, one
set's after another's, are (segment, tile of its queries, chunk of its keys). Partial results are float32 until
`merge_states` adds them up. A chunk in which a query sees no key has lse -inf, and its out is not written.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.attend import attend, empty_state, result_of
from prefix_fast.kernels.key_major import readers_of
from prefix_fast.kernels.primitives import (
    even,
    load_rows,
    offset_of,
    packed_tile,
    span_of,
    valid_span_of,
    with_positive_scale,
)
from prefix_fast.kernels.row_major import key_bounds, part_of, sizes_of, windowed_length


@triton.jit
def _readers_of_tile(
    tile, order, starts, num_rows, num_units, width, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(segment, its first reader, number of readers, first query of the tile among theirs); `width` each reader has."""
    if OWN:
        tiles = tl.cdiv(width, BLOCK)
        unit, block = tile // tiles, tile % tiles
        first, count = unit, unit * 0 + 1
    else:
        if order is None:
            unit, block = tile * 0, tile
        else:
            unit, block = packed_tile(tile, starts, num_units, BLOCK, width)
        first, count = readers_of(unit, order, starts, num_rows)
    return unit, first, count, block * BLOCK


@triton.jit
def _folded(folded, first_reader, order, max_queries, GROUP: tl.constexpr):
    """(row, token, head within the group) of queries by their place among those of a segment's readers."""
    pair = folded // GROUP
    row = first_reader + pair // max_queries
    if order is not None:
        row = tl.load(order + row).to(tl.int32)
    return row, pair % max_queries, folded % GROUP


@triton.jit
def chunk_of(chunk, chunks, low, high, BLOCK_K: tl.constexpr):
    """The keys of one of `chunks` equal runs of whole blocks of [low, high); low is a multiple of BLOCK_K."""
    length = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), chunks), BLOCK_K) * BLOCK_K
    begin = low + chunk * length
    return begin, tl.minimum(begin + length, high)


@triton.jit
def _keys_of_tile(
    unit, row, token, first_query, last_query, chunk, chunks, sets, odd_sizes, query_offset, fixed_offset,
    offset_stride, window,
    SET: tl.constexpr, SETS: tl.constexpr, IN_WINDOW: tl.constexpr, CAUSAL: tl.constexpr, SLIDES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(first token, valid keys, positions of the queries, the four bounds of `key_bounds`, begin and end of the chunk).

    Readers of a segment in the window differ in what they see of it, and a row's bits must not depend on its company:
    every block that some of them see is masked, which changes nothing for those that see none of it.
    """
    _, _, _, lengths, cu_seqlens, _ = sets[SET]
    _, size = sizes_of(odd_sizes, SET)
    positions = token
    if SET == SETS:
        first_token, valid = span_of(unit, cu_seqlens, size)
        offset = offset_of(unit, query_offset, fixed_offset, None, None, offset_stride)
        positions = token + offset
        low, full_low, full_high, high = key_bounds(
            first_query + offset, last_query + offset, 0, valid, window, CAUSAL, SLIDES, BLOCK_K
        )
        begin, end = chunk_of(chunk, chunks, low, high, BLOCK_K)
    else:
        first_token, valid = valid_span_of(unit, lengths, cu_seqlens, size)
        low, full_low, full_high, high = key_bounds(0, 0, 0, valid, window, False, False, BLOCK_K)
        begin, end = chunk_of(chunk, chunks, low, high, BLOCK_K)
        if SLIDES:
            positions += offset_of(row, query_offset, fixed_offset, None, None, offset_stride)
            positions += windowed_length(row, sets, odd_sizes, SET, SETS, IN_WINDOW)
            low = tl.maximum(tl.min(positions) - window + 1, 0) // BLOCK_K * BLOCK_K
            full_low = high
    return first_token, valid, positions, low, full_low, full_high, high, begin, end


@triton.jit
def _item(
    tile, chunk, part, query, partial_out, partial_lse, order, starts, key_mask, query_offset, seed, sets, set_strides,
    odd_sizes, query_strides, mask_strides, offset_stride, num_rows, max_queries, fixed_offset, window, scale, softcap,
    threshold, kept_share, chunks,
    SET: tl.constexpr, SETS: tl.constexpr, IN_WINDOW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of queries against one chunk of keys of set SET, into partial result `part`."""
    OWN: tl.constexpr = SET == SETS
    SLIDES: tl.constexpr = WINDOW and (OWN or IN_WINDOW[SET])
    key, value, _, _, _, bias = sets[SET]
    count, _ = sizes_of(odd_sizes, SET)
    strides = set_strides[SET]
    kv_head = tl.program_id(1)
    width = max_queries * GROUP
    unit, first_reader, readers, first_query = _readers_of_tile(
        tile, order, starts, num_rows, count, width, OWN, BLOCK_Q
    )
    if first_query < readers * width:
        last_query = tl.minimum(first_query + BLOCK_Q, readers * width) - 1
        folded = first_query + tl.arange(0, BLOCK_Q)
        valid_queries = folded <= last_query
        row, token, member = _folded(tl.minimum(folded, last_query), first_reader, order, max_queries, GROUP)
        head = kv_head * GROUP + member
        dims = tl.arange(0, BLOCK_D)
        row64, head64 = row.to(tl.int64), head.to(tl.int64)
        q_rows = row64 * query_strides[0] + head64 * query_strides[1] + token * query_strides[2]
        q = load_rows(query, 1, q_rows, dims, valid_queries, True, D, BLOCK_D)
        q, scale = with_positive_scale(q, scale)
        bias_rows = q_rows
        if bias is not None:
            bias_rows = row64 * strides[6] + head64 * strides[7] + token.to(tl.int64) * strides[8]
        dropout = (0, 0, 0)
        if DROPOUT:
            stream = row * (tl.num_programs(1) * GROUP) + head
            dropout = (tl.load(seed), stream[:, None], threshold)

        mask = None
        if OWN and key_mask is not None:
            mask = key_mask + unit.to(tl.int64) * even(mask_strides[0])
        first_token, valid, positions, low, full_low, full_high, high, begin, end = _keys_of_tile(
            unit, row, token, first_query // GROUP, last_query // GROUP, chunk, chunks, sets, odd_sizes, query_offset,
            fixed_offset, offset_stride, window, SET, SETS, IN_WINDOW, CAUSAL, SLIDES, BLOCK_K,
        )  # fmt: skip
        unit64, kv_head64 = unit.to(tl.int64), kv_head.to(tl.int64)
        key_base = key + unit64 * strides[0] + kv_head64 * strides[1] + first_token * strides[2]
        value_base = value + unit64 * strides[3] + kv_head64 * strides[4] + first_token * strides[5]

        state = empty_state(BLOCK_Q, BLOCK_D)
        for loop in tl.static_range(0 if SLIDES else 1, 3 if OWN or not SLIDES else 1):
            loop_low, loop_high = part_of(low, full_low, full_high, high, loop)
            state = attend(
                state, q, tl.maximum(loop_low, begin), tl.minimum(loop_high, end), token, positions, valid_queries,
                dims, key_base, value_base, bias, bias_rows, mask, strides, mask_strides[1], valid, 0, window, scale,
                softcap, dropout,
                SET, loop != 1, loop != 1 or mask is not None, CAUSAL and OWN, SLIDES, SOFTCAP, NATURAL, DROPOUT, D,
                BLOCK_D, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
        output, maximum, total = state
        output, level = result_of(output, maximum, total, kept_share, NATURAL, DROPOUT)
        slots = part * (num_rows * tl.num_programs(1) * width).to(tl.int64)
        slots += (row64 * tl.num_programs(1) + kv_head) * width + token * GROUP + member
        written = (valid_queries & (level != float("-inf")))[:, None] & (dims < D)[None, :]
        tl.store(partial_out + slots[:, None] * D + dims[None, :], output, mask=written)
        tl.store(partial_lse + slots, level, mask=valid_queries)


@triton.jit(do_not_specialize=["num_rows", "max_queries", "fixed_offset", "window", "threshold"])
def split_forward_kernel(
    query, partial_out, partial_lse, readers, key_mask, query_offset, cu_seqlens_q, seed,
    sets, set_strides, odd_sizes, query_strides, mask_strides, offset_stride,
    num_rows, max_queries, fixed_offset, window, scale, softcap, threshold, kept_share, odd_tiles, odd_chunks,
    SETS: tl.constexpr, IN_WINDOW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (Σ over sets of tiles × chunks, Hkv). Tiles are fastest: programs side by side read the same keys.

    `readers` holds (order, starts) of each set, (None, None) where every row reads segment 0; the numbers of tiles and
    chunks are those of each set, the own tokens last. partial_out is [Σ chunks, B, Hkv, Tq, group, D].
    """
    tl.static_assert(cu_seqlens_q is None, "packed rows are the one-pass kernel's")
    item = tl.program_id(0)
    part = item * 0
    for index in tl.static_range(SETS + 1):
        tiles, chunks = even(odd_tiles[index]), even(odd_chunks[index])
        items = tiles * chunks
        if (item >= 0) & (item < items):
            order, starts = readers[index]
            _item(
                item % tiles, item // tiles, part + item // tiles, query, partial_out, partial_lse,
                order, starts, key_mask, query_offset, seed, sets, set_strides, odd_sizes, query_strides, mask_strides,
                offset_stride, num_rows, max_queries, fixed_offset, window, scale, softcap, threshold, kept_share,
                chunks,
                index, SETS, IN_WINDOW, GROUP, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, D, BLOCK_D,
                BLOCK_OWN if index == SETS else BLOCK_Q, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
        item -= items
        part += chunks
