"""What the row-major kernels share: which query tile a program has, which keys it walks, and what of them it sees."""

import triton
import triton.language as tl
from prefix_fast.kernels.primitives import even, packed_tile, segment_of, span_of


@triton.jit
def query_tile(cu_seqlens_q, num_rows, max_queries, BLOCK_Q: tl.constexpr):
    """(row, first query, first token, query count) of this program: rows fastest, long causal tiles first."""
    program = tl.program_id(0)
    if cu_seqlens_q is None:
        row = program % num_rows
        tile = tl.cdiv(max_queries, BLOCK_Q) - 1 - program // num_rows
    else:
        row, tile = packed_tile(program, cu_seqlens_q, num_rows, BLOCK_Q)
    first, count = span_of(row, cu_seqlens_q, max_queries)
    return row, tile * BLOCK_Q, first, count


@triton.jit
def sizes_of(odd_sizes, SET: tl.constexpr):
    """Number of segments of a set, and the tokens of a segment or of all packed ones."""
    return even(odd_sizes[SET][0]), even(odd_sizes[SET][1])


@triton.jit
def windowed_length(row, sets, odd_sizes, FROM: tl.constexpr, SETS: tl.constexpr, IN_WINDOW: tl.constexpr):
    """Keys of the row's windowed sets from set FROM on: so far before its own tokens does that set begin."""
    length = row * 0
    for index in tl.static_range(FROM, SETS):
        if IN_WINDOW[index]:
            ids, lengths, cu_seqlens = sets[index][2], sets[index][3], sets[index][4]
            count, size = sizes_of(odd_sizes, index)
            _, _, valid = segment_of(row, ids, lengths, cu_seqlens, count, size)
            length += valid
    return length


@triton.jit
def key_bounds(
    first_position, last_position, begin, valid, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): no query of the tile sees a key outside [low, high), and every one sees every
    key of [full_low, full_high) that is present. All but `high` are multiples of BLOCK_K.
    """
    low = valid * 0
    full_low = valid * 0
    high = valid
    full_high = valid // BLOCK_K * BLOCK_K
    if CAUSAL:
        high = tl.minimum(valid, tl.maximum(last_position + 1, 0))
        full_high = tl.minimum(valid, tl.maximum(first_position + 1, 0)) // BLOCK_K * BLOCK_K
    if WINDOW:
        low = tl.maximum(first_position - window + 1 - begin, 0) // BLOCK_K * BLOCK_K
        full_low = tl.cdiv(tl.maximum(last_position - window + 1 - begin, 0), BLOCK_K) * BLOCK_K
    return low, full_low, full_high, high


@triton.jit
def open_set(
    row, kv_head, sets, set_strides, odd_sizes, SET: tl.constexpr, SETS: tl.constexpr, IN_WINDOW: tl.constexpr,
    SLIDES: tl.constexpr,
):  # fmt: skip
    """What the row reads of one set: key and value at its first key, valid keys, position of its first key."""
    key, value, ids, lengths, cu_seqlens, _ = sets[SET]
    strides = set_strides[SET]
    count, size = sizes_of(odd_sizes, SET)
    begin = row * 0
    if SET == SETS:
        unit = row
        first, valid = span_of(row, cu_seqlens, size)
    else:
        unit, first, valid = segment_of(row, ids, lengths, cu_seqlens, count, size)
        if SLIDES:
            begin = -windowed_length(row, sets, odd_sizes, SET, SETS, IN_WINDOW)
    key_base = key + unit.to(tl.int64) * strides[0] + kv_head.to(tl.int64) * strides[1] + first * strides[2]
    value_base = value + unit.to(tl.int64) * strides[3] + kv_head.to(tl.int64) * strides[4] + first * strides[5]
    return key_base, value_base, valid, begin


@triton.jit
def part_of(low, full_low, full_high, high, PART: tl.constexpr):
    """The keys of one of the three loops: before the unmasked middle, the middle, after it."""
    if PART == 0:
        return low, tl.minimum(full_low, high)
    if PART == 1:
        return full_low, full_high
    return tl.maximum(full_low, full_high), high


@triton.jit
def present_keys(start, tile, valid, key_mask, mask_stride, EDGES: tl.constexpr):
    """Which keys of a tile exist and are not masked out for the whole row. EDGES: some may not exist."""
    present = start + tile < valid
    if key_mask is not None:
        pointers = key_mask + tl.cast(start, tl.int64) * mask_stride + tile.to(tl.int64) * mask_stride
        if EDGES:
            present = present & (tl.load(pointers, mask=present, other=0) != 0)
        else:
            present = tl.load(pointers) != 0
    return present


@triton.jit
def tokens_of(tile, count, EDGES: tl.constexpr):
    """Rows to load of a tile of which `count` exist: the last again in place of those past it, which needs no mask.

    Nor does it keep the rows' addresses, the same as those of the loop without edges, in registers from there to here.
    """
    return tl.minimum(tile, count - 1) if EDGES else tile


@triton.jit
def hide(
    scores, hidden, keys, positions, present, begin, window, EDGES: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """`hidden` where the query at `positions` does not see the key. EDGES: the tile crosses one of `key_bounds`."""
    if MASKED:
        seen = present[None, :]
        if EDGES and CAUSAL:
            seen = seen & (keys[None, :] <= positions[:, None])
        if EDGES and WINDOW:
            seen = seen & (keys[None, :] + begin > positions[:, None] - window)
        scores = tl.where(seen, scores, hidden)
    return scores


@triton.jit
def add_bias(logits, bias, query_stride, key_stride, queries, keys, valid_queries, present, NATURAL: tl.constexpr):
    """Natural logits plus the bias of one row and head."""
    if bias is not None:
        tl.static_assert(NATURAL, "a bias is added to natural logits")
        pointers = bias + queries.to(tl.int64)[:, None] * query_stride + keys.to(tl.int64)[None, :] * key_stride
        logits += tl.load(pointers, mask=valid_queries[:, None] & present[None, :], other=0.0).to(tl.float32)
    return logits
