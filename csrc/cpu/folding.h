// Segment-major work: which rows read a segment, blocks of their queries, chunks of keys and lanes.
//
// What is decided here comes from shapes alone: never from ids, lengths or threads. Chunks are large enough
// that partial results cost little beside the arithmetic, and small enough that 64 threads find work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "keys.h"
#include "lanes.h"
#include "problem.h"
#include "window.h"

namespace prefix_fast {

constexpr int64_t kFoldedQueries = 32;  // fold rows when a row has at most this many lanes
constexpr int64_t kFoldedReaders = 8;   // and a segment has at least this many lanes on average
constexpr int64_t kFoldedExtent = 32;   // and so many keys that merging, or reading the lanes twice, pays

// Rows by the segment that they read.
struct Readers {
    std::vector<int64_t> start;  // [N + 1] into rows
    std::vector<int64_t> rows;   // ascending within a segment
};

inline Readers readers_of(const Problem& p, const SegmentSet& set) {
    Readers readers;
    const int64_t segments = set.count();
    readers.start.assign(segments + 1, 0);
    for (int64_t id : set.ids) {
        if (id >= 0) ++readers.start[id + 1];
    }
    for (int64_t n = 0; n < segments; ++n) readers.start[n + 1] += readers.start[n];
    readers.rows.resize(readers.start[segments]);
    std::vector<int64_t> next(readers.start.begin(), readers.start.end() - 1);
    for (int64_t b = 0; b < p.rows; ++b) {
        if (set.ids[b] >= 0) readers.rows[next[set.ids[b]]++] = b;
    }
    return readers;
}

// Queries, under one key/value head, of all rows that read the segment.
inline int64_t lanes_of(const Problem& p, const Readers& readers, int64_t segment) {
    int64_t lanes = 0;
    for (int64_t r = readers.start[segment]; r < readers.start[segment + 1]; ++r) {
        lanes += p.queries_of(readers.rows[r]) * p.group();
    }
    return lanes;
}

// Lanes [first, last) of those queries, rows in order.
inline LaneBlock reader_block(const Problem& p, const Readers& readers, int64_t segment, int64_t kv_head,
                              int64_t first, int64_t last) {
    LaneBlock block;
    const int64_t group = p.group(), wanted = last - first;
    int64_t skip = first;
    for (int64_t r = readers.start[segment]; r < readers.start[segment + 1] && block.lanes < wanted; ++r) {
        const int64_t b = readers.rows[r], lanes = p.queries_of(b) * group;
        for (int64_t lane = std::min(skip, lanes); lane < lanes && block.lanes < wanted; ++lane) {
            block.add(b, kv_head * group + lane % group, lane / group);
        }
        skip = std::max<int64_t>(skip - lanes, 0);
    }
    return block;
}

// Place of a query's partial result for a chunk of keys: [chunk][query of the call][H].
inline int64_t partial_index(const Problem& p, int64_t chunk, int64_t b, int64_t h, int64_t i) {
    return (chunk * p.total_queries() + p.token_of(b, i)) * p.heads + h;
}

// Queries of all rows under one key/value head.
inline int64_t head_lanes(const Problem& p) {
    return p.total_queries() * p.group();
}

// Whether rows alone would leave most lanes idle, and others read the same segments.
inline bool rows_fold(const Problem& p, const SegmentSet& set) {
    const int64_t lanes = p.query_bound * p.group();
    return lanes <= kFoldedQueries && p.rows > 1 && set.mean_extent >= kFoldedExtent &&
           p.rows * lanes >= kFoldedReaders * std::max<int64_t>(set.count(), 1);
}

// Keys of a chunk such that `items` pieces of work become `target`, if a chunk is not shorter than `minimum`.
inline int64_t keys_per_chunk(int64_t extent, int64_t target, int64_t items, int64_t minimum) {
    const int64_t chunks = ceil_div(target, std::max<int64_t>(items, 1));
    return std::max(minimum, round_up(ceil_div(extent, chunks), 128));
}

inline int64_t longest_of(const SegmentSet& set) {
    return set.length.empty() ? 0 : *std::max_element(set.length.begin(), set.length.end());
}

// Multiply-adds of one product of `lanes` queries with `keys` keys; idle lanes of a group are computed too.
inline int64_t product_cost(const Problem& p, int64_t lanes, int64_t keys) {
    return round_up(lanes, kGroup) * keys * p.head_dim;
}

// Own keys that some query of [0, end) of the row sees, masks aside.
inline int64_t own_visible(const Problem& p, int64_t b, int64_t end) {
    const int64_t keys = p.keys_of(b);
    return p.causal ? std::clamp<int64_t>(end + p.offset[b], 0, keys) : keys;
}

// Own keys that some query of [first, end) of the row sees, masks aside.
inline int64_t own_visible(const Problem& p, int64_t b, int64_t first, int64_t end) {
    const int64_t keys = own_visible(p, b, end);
    return p.window > 0 ? keys - std::clamp<int64_t>(window_floor(p, b, first, 0), 0, keys) : keys;
}

// Keys of the row's segment that some query from `first` on sees.
inline int64_t segment_visible(const Problem& p, const SegmentSet& set, int64_t b, int64_t first) {
    return set.ids[b] < 0 ? 0 : set.length[set.ids[b]] - window_hidden(p, set, b, first);
}

}  // namespace prefix_fast
