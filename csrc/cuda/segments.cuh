// What a block reads of a call (call.h): spans of tokens, the segment that a row reads, bounds of what is
// seen, tiles.
//
// A *span* is a run of tokens in memory: those of a row, or of a segment. Dense and packed tensors are the
// same thing with other starts.
#pragma once

#include <cstdint>

#include "call.h"

namespace prefix_fast::cuda {

struct Span {
    int64_t first;  // token
    int count;
};

// What a row reads of one set.
struct Chain {
    const char* key;  // of the kv head, at the segment's first key
    const char* value;
    int valid;  // keys
    int begin;  // position of the first key among the row's own tokens
};

// Which keys of a row's own tokens are hidden from all of its queries; null: none.
struct KeyMask {
    const uint8_t* data;
    int64_t stride;

    __device__ bool hides(int key) const { return data != nullptr && data[key * stride] == 0; }
};

// Tiles of the queries of one row that a block walks a chain with.
struct QueryTile {
    int row, first, count;  // first query of the tile, queries of the row
    int64_t token;          // of the tile's first query
};

struct KeyBounds {
    int low, full_low, full_high, high;
};

__device__ inline int64_t at(const Integers& list, int64_t index) {
    const int64_t place = index * list.stride;
    switch (list.bytes) {
        case 8:
            return static_cast<const int64_t*>(list.data)[place];
        case 4:
            return static_cast<const int32_t*>(list.data)[place];
        case 2:
            return static_cast<const int16_t*>(list.data)[place];
        case 1:
            return static_cast<const int8_t*>(list.data)[place];
        default:
            return static_cast<const uint8_t*>(list.data)[place];
    }
}

__device__ inline int minimum(int a, int b) {
    return a < b ? a : b;
}
__device__ inline int maximum(int a, int b) {
    return a > b ? a : b;
}
__host__ __device__ inline int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
__device__ inline int clamped(int64_t value, int64_t low, int64_t high) {
    return static_cast<int>(value < low ? low : value > high ? high : value);
}

__device__ inline Span span_of(int unit, const Integers& cu_seqlens, int size) {
    if (cu_seqlens.data == nullptr) return {0, size};
    const int64_t first = at(cu_seqlens, unit);
    return {first, static_cast<int>(at(cu_seqlens, unit + 1) - first)};
}

// A segment's span without what is past its length.
__device__ inline Span valid_span_of(const SegmentSet& set, int unit) {
    Span span = span_of(unit, set.cu_seqlens, set.size);
    if (set.lengths.data != nullptr) span.count = clamped(at(set.lengths, unit), 0, span.count);
    return span;
}

// Segment of a shared set that a row reads; -1: none.
__device__ inline int segment_of(const SegmentSet& set, int row) {
    if (set.ids.data == nullptr) return set.count > 0 ? 0 : -1;
    const int64_t unit = at(set.ids, row);
    return unit >= 0 && unit < set.count ? static_cast<int>(unit) : -1;
}

// Keys of the row's windowed sets from set `from` on: so far before its own tokens does that set begin.
__device__ inline int windowed_length(const Call& call, int row, int from) {
    int length = 0;
    for (int s = from; s < call.num_sets; ++s) {
        const SegmentSet& set = call.sets[s];
        const int unit = set.in_window ? segment_of(set, row) : -1;
        if (unit >= 0) length += valid_span_of(set, unit).count;
    }
    return length;
}

// Whether keys of the set can leave the window.
__device__ inline bool slides(const Call& call, const SegmentSet& set, bool own) {
    return call.has_window && (own || set.in_window);
}
__device__ inline bool slides(const Call& call, int set) {
    return slides(call, call.sets[set], set == call.num_sets);
}

// Bytes from the start of a tensor to a token of one head.
__device__ inline int64_t offset_bytes(const Tokens& tokens, int64_t unit, int64_t head, int64_t token,
                                       int bytes) {
    return (unit * tokens.unit + head * tokens.head + token * tokens.token) * bytes;
}

// The span of a segment for one head: `unit` -1 has no keys.
__device__ inline Chain chain_of(const SegmentSet& set, int unit, int kv_head, int begin, int bytes) {
    if (unit < 0) return {nullptr, nullptr, 0, begin};
    const Span span = valid_span_of(set, unit);
    const int width = set.is_float32 ? 4 : bytes;
    return {
        static_cast<const char*>(set.key.data) + offset_bytes(set.key, unit, kv_head, span.first, width),
        static_cast<const char*>(set.value.data) + offset_bytes(set.value, unit, kv_head, span.first, width),
        span.count, begin};
}

// What a row reads of set `s` of its chain.
__device__ inline Chain open_set(const Call& call, int s, int row, int kv_head, int bytes) {
    const SegmentSet& set = call.sets[s];
    if (s == call.num_sets) return chain_of(set, row, kv_head, 0, bytes);
    const int begin = slides(call, s) ? -windowed_length(call, row, s) : 0;
    return chain_of(set, segment_of(set, row), kv_head, begin, bytes);
}

// Position of a row's query 0 among its own tokens.
__device__ inline int offset_of(const Call& call, int row) {
    if (call.query_offset.data != nullptr) return clamped(at(call.query_offset, row), -kFarthest, kFarthest);
    if (!call.own_offset) return call.fixed_offset;
    return span_of(row, call.sets[call.num_sets].cu_seqlens, 0).count -
           span_of(row, call.cu_seqlens_q, 0).count;
}

// Block of `unit` that is the `tile`-th of a packed tensor, of whose offsets each stands for `width` tokens.
//
// Unit u owns the tiles from width · cu_seqlens[u] / block + u on: at least as many as it has blocks. So the
// number of tiles is width · total / block + units whatever the lengths are, and no table has to be made.
__device__ inline void packed_tile(int tile, const Integers& cu_seqlens, int units, int width, int block,
                                   int* unit, int* index) {
    int low = 0, high = units;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (at(cu_seqlens, middle) * width / block + middle <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    *unit = low;
    *index = tile - static_cast<int>(at(cu_seqlens, low) * width / block + low);
}

// The query tile of a block: rows fastest, long causal tiles first. first >= count: the block has nothing to
// do.
__device__ inline QueryTile query_tile(const Call& call, int index, int block) {
    int row, tile;
    if (call.cu_seqlens_q.data == nullptr) {
        row = index % call.rows;
        tile = ceil_div(call.max_queries, block) - 1 - index / call.rows;
    } else {
        packed_tile(index, call.cu_seqlens_q, call.rows, 1, block, &row, &tile);
    }
    const Span span = span_of(row, call.cu_seqlens_q, call.max_queries);
    return {row, tile * block, span.count, span.first + tile * block};
}

// No query of a tile, at positions first to last, sees a key outside [low, high), and every one sees every
// key of [full_low, full_high) that is present. All but `high` are multiples of `block`.
__device__ inline KeyBounds key_bounds(int first, int last, int begin, int valid, int window, bool causal,
                                       bool sliding, int block) {
    KeyBounds bounds{0, 0, valid / block * block, valid};
    if (causal) {
        bounds.high = minimum(valid, maximum(last + 1, 0));
        bounds.full_high = minimum(valid, maximum(first + 1, 0)) / block * block;
    }
    if (sliding) {
        bounds.low = maximum(first - window + 1 - begin, 0) / block * block;
        bounds.full_low = ceil_div(maximum(last - window + 1 - begin, 0), block) * block;
    }
    return bounds;
}

// Where a row's padded scratch begins; at least one whole tile of kScratchTile holds its last queries.
__device__ inline int64_t scratch_start(const Call& call, int row) {
    if (call.cu_seqlens_q.data != nullptr) return at(call.cu_seqlens_q, row) + int64_t{row} * kScratchTile;
    return int64_t{row} * (ceil_div(call.max_queries, kScratchTile) * kScratchTile);
}

// Tiles of the queries of all rows: of packed ones an upper bound.
inline int query_tiles(const Call& call, int block) {
    if (call.cu_seqlens_q.data != nullptr) return call.max_queries / block + call.rows;
    return call.rows * ceil_div(call.max_queries, block);
}

}  // namespace prefix_fast::cuda
