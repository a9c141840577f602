"""The steps that the attention kernels share: products, exponents, spans of tokens, masks, dropout, merging of states.

A *span* is a run of tokens in memory: those of a row, or of a segment. Dense and packed tensors are the same thing with
other starts, so a tensor is described by three strides (unit, head, token; the last dim is contiguous, the unit stride
of a packed tensor is 0) and by its offsets `cu_seqlens`, None for a dense one.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
FARTHEST = tl.constexpr(2**30)  # offsets beyond hide or show every key
PADDING = tl.constexpr(128)  # every row's scratch is padded to tiles of this many queries; query tiles divide it


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a · b, accumulated in float32. UPCAST: the interpreter multiplies the raw bits of bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + a · b, accumulated in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def even(number):
    """The size or stride that comes as an odd number, 2n + 3: see `odd` in prefix_fast.backends.triton_call."""
    return (number >> 1) - 1


@triton.jit
def span_of(unit, cu_seqlens, size):
    """First token (int64) and number of tokens of a row or segment."""
    if cu_seqlens is None:
        first = unit.to(tl.int64) * 0
        count = size
    else:
        first = tl.load(cu_seqlens + unit).to(tl.int64)
        count = (tl.load(cu_seqlens + unit + 1).to(tl.int64) - first).to(tl.int32)
    return first, count


@triton.jit
def segment_of(row, ids, lengths, cu_seqlens, count, size):
    """Segment that a row reads, its first token (int64) and its number of valid keys; 0 keys where it reads none."""
    if ids is None:
        unit = row * 0
        chosen = unit + count > 0
    else:
        unit = tl.load(ids + row).to(tl.int64)
        chosen = (unit >= 0) & (unit < count)
        unit = tl.where(chosen, unit, 0).to(tl.int32)
    if count == 0:
        first = row.to(tl.int64) * 0
        valid = row * 0
    else:
        first, valid = valid_span_of(unit, lengths, cu_seqlens, size)
        valid = tl.where(chosen, valid, 0)
    return unit, first, valid


@triton.jit
def valid_span_of(unit, lengths, cu_seqlens, size):
    """First token (int64) of a segment and its number of valid keys; lengths are clamped to what exists."""
    first, valid = span_of(unit, cu_seqlens, size)
    if lengths is not None:
        given = tl.load(lengths + unit).to(tl.int64)
        valid = tl.minimum(tl.maximum(given, 0), valid.to(tl.int64)).to(tl.int32)
    return first, valid


@triton.jit
def packed_tile(tile, cu_seqlens, num_units, BLOCK: tl.constexpr, width=1):
    """(unit, block) of one tile of a packed tensor, of whose offsets each stands for `width` tokens.

    Unit u owns the tiles from width · cu_seqlens[u] // BLOCK + u on: at least as many as it has blocks. So the number
    of tiles is width · total // BLOCK + num_units whatever the lengths are, and no table has to be made.
    """
    low = 0
    high = num_units
    while high - low > 1:
        middle = (low + high) // 2
        begins = (tl.load(cu_seqlens + middle) * width // BLOCK + middle).to(tl.int32)
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle)
    begins = (tl.load(cu_seqlens + low) * width // BLOCK + low).to(tl.int32)
    return low, tile - begins


@triton.jit
def offset_of(row, query_offset, fixed_offset, cu_seqlens_q, cu_seqlens_k, stride):
    """Position of a row's query 0 among its own tokens."""
    if query_offset is not None:
        given = tl.load(query_offset + row.to(tl.int64) * stride).to(tl.int64)
        offset = tl.minimum(tl.maximum(given, -FARTHEST), FARTHEST).to(tl.int32)
    elif fixed_offset is None:
        query_count = tl.load(cu_seqlens_q + row + 1) - tl.load(cu_seqlens_q + row)
        key_count = tl.load(cu_seqlens_k + row + 1) - tl.load(cu_seqlens_k + row)
        offset = (key_count - query_count).to(tl.int32)
    else:
        offset = row * 0 + fixed_offset
    return offset


@triton.jit
def scratch_start(row, cu_seqlens, size):
    """Where a row's padded scratch begins; at least one whole tile of PADDING holds its last queries."""
    if cu_seqlens is None:
        start = row.to(tl.int64) * (tl.cdiv(size, PADDING) * PADDING)
    else:
        start = tl.load(cu_seqlens + row).to(tl.int64) + row * PADDING
    return start


@triton.jit
def load_rows(base, stride, tokens, dims, valid, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, dims] of one head; 0 where a token is not valid or past the head dim."""
    pointers = base + tokens[:, None] * stride + dims[None, :]
    if MASKED and D != BLOCK_D:
        return tl.load(pointers, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    if D != BLOCK_D:
        return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def tanh(x):
    """To a few units in the last place, near zero too (Cephes tanhf)."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def logits_of(product, scale, softcap, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr):
    """Logits from q · k, their unit, and their derivative after the scale (1 without softcap).

    Logits times unit are natural where some key has a bias (its largest numbers times log2 e would overflow) and base-2
    otherwise. Plain ones are the products themselves: `exponential` scales them in the FMA that it needs anyway.
    """
    slope = 1.0
    unit = 1.0
    if SOFTCAP:
        bounded = tanh(product * (scale / softcap))
        slope = 1 - bounded * bounded
        logits = softcap * bounded if NATURAL else (softcap * LOG2E) * bounded
    elif NATURAL:
        logits = product * scale
    else:
        logits = product
        unit = scale * LOG2E
    return logits, unit, slope


@triton.jit
def with_positive_scale(q, scale):
    """(q, scale) with the same logits and scale > 0, so that the largest product is the largest logit."""
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    return (q.to(tl.float32) * sign).to(q.dtype), tl.where(scale == 0, 1.0, tl.abs(scale))


@triton.jit
def exponential(logits, unit, reference, NATURAL: tl.constexpr):
    """e^(logits - reference) of natural logits, 2^(logits · unit - reference) of base-2 ones."""
    if NATURAL:
        return tl.exp2((logits - reference) * LOG2E)
    return tl.exp2(tl.fma(logits, unit, -reference))


@triton.jit
def online_softmax_update(logits, unit, maximum, total, NATURAL: tl.constexpr):
    """Weights of a new tile of logits relative to the new maximum, the new state, and the factor of the old one.

    unit > 0; the maximum is that of logits · unit. A row that has seen no key keeps the maximum -inf and takes its
    exponents relative to 0: -inf minus -inf is NaN.
    """
    new_maximum = tl.maximum(maximum, tl.max(logits, 1) * unit)
    reference = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)
    weights = exponential(logits, unit, reference[:, None], NATURAL)
    factor = exponential(maximum, 1.0, reference, NATURAL)
    return weights, new_maximum, total * factor + tl.sum(weights, 1), factor


@triton.jit
def add_sink(maximum, total, sink, NATURAL: tl.constexpr):
    """The state after one more logit that has no value: new maximum and total, and the factor of the old sums.

    A row without any key stays empty: a sink alone makes no distribution.
    """
    logit = sink if NATURAL else sink * LOG2E
    empty = total == 0
    new_maximum = tl.where(empty, maximum, tl.maximum(maximum, logit))
    factor = tl.where(empty, 1.0, exponential(maximum, 1.0, new_maximum, NATURAL))
    total = tl.where(empty, 0.0, total * factor + exponential(logit, 1.0, new_maximum, NATURAL))
    return new_maximum, total, factor


@triton.jit
def kept_rows(seed, queries, first_key, stream, set_index, threshold, KEYS: tl.constexpr):
    """Dropout's mask [queries, KEYS] from key `first_key`, a multiple of 4: True where the weight is kept.

    One Philox4x32-10 block (Salmon et al. 2011) serves four keys: counter (query, key // 4, row · H + head, set).
    """
    columns = first_key // 4 + tl.arange(0, KEYS // 4)
    c0 = tl.broadcast_to(queries[:, None], (queries.shape[0], KEYS // 4)).to(tl.uint32)
    c1 = tl.broadcast_to(columns[None, :], (queries.shape[0], KEYS // 4)).to(tl.uint32)
    words = _interleaved_words(seed, c0, c1, stream, set_index)
    return tl.reshape(words, (queries.shape[0], KEYS)) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def kept_columns(seed, queries, first_key, stream, set_index, threshold, KEYS: tl.constexpr):
    """`kept_rows` transposed: [KEYS, queries]."""
    columns = first_key // 4 + tl.arange(0, KEYS // 4)
    c0 = tl.broadcast_to(queries[None, :], (KEYS // 4, queries.shape[0])).to(tl.uint32)
    c1 = tl.broadcast_to(columns[:, None], (KEYS // 4, queries.shape[0])).to(tl.uint32)
    words = tl.permute(_interleaved_words(seed, c0, c1, stream, set_index), (0, 2, 3, 1))
    return tl.reshape(words, (KEYS, queries.shape[0])) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def _interleaved_words(seed, c0, c1, stream, set_index):
    """The four words of each counter along two last dims of 2, in order when flattened."""
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = c0 * 0 + stream.to(tl.uint32)
    c3 = c0 * 0 + set_index
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, c3, key0, key1)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))
