"""Forward, row-major: one pass over a row's segments and its own tokens, without a merge. Training and prefill.

    s_ij = scale · q_i·k_j (softcapped, plus bias, -inf where hidden)      lse_i = log Σ_j e^{s_ij}
    out_i = Σ_j e^{s_ij - lse_i} v_j

q [Tq, D] of one row and head, k and v [keys, D] of each segment of its chain, the own tokens last. The prefix is read
in place by every row: nothing is repeated or concatenated. A query that sees no key gets 0 and -inf.
"""

import triton
import triton.language as tl
from prefix_fast.kernels.attend import attend, empty_state, result_of
from prefix_fast.kernels.primitives import add_sink, even, load_rows, offset_of, with_positive_scale
from prefix_fast.kernels.row_major import key_bounds, open_set, part_of, query_tile


@triton.jit
def _attend_set(
    state, q, row, head, kv_head, queries, positions, valid_queries, first_position, last_position, dims, sets,
    set_strides, odd_sizes, key_mask, mask_strides, window, scale, softcap, dropout,
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
    bias_rows = queries
    if bias is not None:
        bias += row.to(tl.int64) * set_strides[SET][6] + head.to(tl.int64) * set_strides[SET][7]
        bias_rows = queries.to(tl.int64) * set_strides[SET][8]
    low, full_low, full_high, high = key_bounds(
        first_position, last_position, begin, valid, window, CAUSAL and OWN, SLIDES, BLOCK_K
    )
    for part in tl.static_range(0 if SLIDES else 1, 3):
        begins, ends = part_of(low, full_low, full_high, high, part)
        state = attend(
            state, q, begins, ends, queries, positions, valid_queries, dims, key, value, bias, bias_rows, mask,
            set_strides[SET], mask_strides[1], valid, begin, window, scale, softcap, dropout,
            SET, part != 1, part != 1 or mask is not None, CAUSAL and OWN, SLIDES, SOFTCAP, NATURAL, DROPOUT, D,
            BLOCK_D, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    return state


@triton.jit(do_not_specialize=["num_rows", "max_queries", "fixed_offset", "window", "threshold"])
def forward_kernel(
    query, out, lse, sinks, key_mask, query_offset, cu_seqlens_q, seed,
    sets, set_strides, odd_sizes, query_strides, out_strides, lse_strides, mask_strides, offset_stride,
    num_rows, max_queries, fixed_offset, window, scale, softcap, threshold, kept_share,
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
    queries = first_query + tl.arange(0, BLOCK_Q)
    valid_queries = queries < count
    positions = queries + offset
    first_position = first_query + offset
    last_position = tl.minimum(first_query + BLOCK_Q, count) - 1 + offset
    dims = tl.arange(0, BLOCK_D)
    base = row.to(tl.int64) * query_strides[0] + head.to(tl.int64) * query_strides[1]
    base += (first_token + first_query) * query_strides[2]
    q = load_rows(query + base, query_strides[2], tl.arange(0, BLOCK_Q), dims, valid_queries, True, D, BLOCK_D)
    q, scale = with_positive_scale(q, scale)
    dropout = (0, 0, 0)
    if DROPOUT:
        dropout = (tl.load(seed), row * tl.num_programs(1) + head, threshold)

    state = empty_state(BLOCK_Q, BLOCK_D)
    for index in tl.static_range(SETS + 1):
        state = _attend_set(
            state, q, row, head, kv_head, queries, positions, valid_queries, first_position, last_position,
            dims, sets, set_strides, odd_sizes, key_mask, mask_strides, window, scale, softcap, dropout,
            index, SETS, IN_WINDOW, CAUSAL, WINDOW, SOFTCAP, NATURAL, DROPOUT, D, BLOCK_D, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    output, maximum, total = state
    _store(
        output, maximum, total, out, lse, sinks, row, head, first_token + first_query, valid_queries, dims,
        out_strides, lse_strides, kept_share, NATURAL, DROPOUT, D, BLOCK_Q,
    )  # fmt: skip


@triton.jit
def _store(
    output, maximum, total, out, lse, sinks, row, head, first_token, valid_queries, dims, out_strides, lse_strides,
    kept_share, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Normalise the state and write it."""
    if sinks is not None:
        maximum, total, factor = add_sink(maximum, total, tl.load(sinks + head).to(tl.float32), NATURAL)
        output = output * factor[:, None]
    output, level = result_of(output, maximum, total, kept_share, NATURAL, DROPOUT)
    tile = tl.arange(0, BLOCK_Q)
    row, head = row.to(tl.int64), head.to(tl.int64)
    out_base = out + row * out_strides[0] + head * out_strides[1] + first_token * out_strides[2]
    lse_base = lse + row * even(lse_strides[0]) + head * even(lse_strides[1]) + first_token * lse_strides[2]
    mask = valid_queries[:, None] & (dims < D)[None, :]
    tl.store(out_base + tile[:, None] * out_strides[2] + dims[None, :], output.to(out.dtype.element_ty), mask=mask)
    tl.store(lse_base + tile * lse_strides[2], level, mask=valid_queries)
