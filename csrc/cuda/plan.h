// How a call is divided, from its static shape and the size of the device: no other row's ids can change a
// row's bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "call.h"

namespace prefix_fast::cuda {

// What plans know of a device, and the least work that a division is worth.
struct Device {
    int multiprocessors;
    int least_chunk;  // keys of a chunk of a segment
    int least_tiles;  // query tiles of a part of a reader list
};

constexpr int kBlocksOfMultiprocessor = 2;
constexpr double kFill = 0.85;         // of the device, below which work is divided further
constexpr int kFewQueriesOfRow = 8;    // decode and verification: always the split forward
constexpr int kManyQueriesOfRow = 64;  // from here on the one-pass forward fills its tiles

inline int64_t divided(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline bool is_packed(const Call& call) {
    return call.cu_seqlens_q.data != nullptr;
}

// Keys of a segment of a set; of packed ones their mean.
inline int64_t length_of(const SegmentSet& set) {
    return set.cu_seqlens.data != nullptr ? divided(set.size, std::max(set.count, 1)) : set.size;
}

// Whether the split forward runs. It reads a shared segment once for a tile of all its readers' queries and
// cuts long chains so that few rows fill the device; one pass has no parts to write.
inline bool splits(const Call& call, const Device& device) {
    if (is_packed(call) || call.max_queries >= kManyQueriesOfRow) return false;
    if (call.max_queries <= kFewQueriesOfRow) return true;
    int64_t longest = 0;
    for (int s = 0; s <= call.num_sets; ++s) longest = std::max(longest, length_of(call.sets[s]));
    return longest >= 2 * device.least_chunk;
}

// Fills in chunks and whether tiles hold many queries; returns the number of parts. The own tokens always
// have a chunk, so that every row has a part; their number is rounded up, so that a growing cache seldom
// changes the division.
inline int divide_keys(const Call& call, const Device& device, int few, int many, Partials& partials) {
    const int64_t width = int64_t{call.max_queries} * (call.heads / call.kv_heads);
    int64_t most = 0;
    for (int s = 0; s < call.num_sets; ++s) {
        const int64_t used = std::max(1, std::min(call.sets[s].count, call.rows));
        most = std::max(most, divided(call.rows, used) * width);
    }
    partials.queries = most > few;
    partials.own_queries = width > few;
    int64_t walked = 0;
    for (int s = 0; s <= call.num_sets; ++s) {
        const bool own = s == call.num_sets;
        const int64_t used = own ? call.rows : std::max(1, std::min(call.sets[s].count, call.rows));
        const int64_t tile = (own ? partials.own_queries : partials.queries) ? many : few;
        walked += used * divided(divided(call.rows, used) * width, tile) * length_of(call.sets[s]);
    }
    const double share =
        double(walked) * call.kv_heads / (double(device.multiprocessors) * kBlocksOfMultiprocessor);
    const int64_t least = device.least_chunk;
    const int64_t chunk = std::max<int64_t>(1, int64_t(std::ceil(share / double(least)))) * least;
    int parts = 0;
    for (int s = 0; s <= call.num_sets; ++s) {
        const bool own = s == call.num_sets;
        const int64_t keys = divided(length_of(call.sets[s]), least) * least;
        partials.chunks[s] = int32_t(own ? std::max<int64_t>(1, divided(keys, chunk)) : divided(keys, chunk));
        if (!own && call.sets[s].count == 0) partials.chunks[s] = 0;
        parts += partials.chunks[s];
    }
    return parts;
}

// The least number of splits that fills the device, with enough query tiles for each to be worth its partial
// sums, of `programs` blocks that each walk about `pairs` (rows × heads of a group) of `query_tiles`.
inline void divide_readers(const Device& device, int64_t programs, int64_t pairs, int64_t query_tiles,
                           KeyGradients& grads) {
    const double places = kFill * device.multiprocessors * kBlocksOfMultiprocessor;
    int64_t wanted = int64_t(std::ceil(places / double(std::max<int64_t>(programs, 1))));
    wanted = std::max<int64_t>(1, std::min(wanted, pairs * query_tiles / device.least_tiles));
    const int64_t readers = std::min(wanted, std::max<int64_t>(pairs, 1));
    grads.splits = int32_t(readers);
    grads.query_splits = int32_t(std::max<int64_t>(1, std::min(wanted / readers, query_tiles)));
}

// Of the gradients of one set's keys and values, by about the kernels' tiles.
inline void divide_set(const Call& call, const Device& device, int index, KeyGradients& grads) {
    constexpr int kKeys = 64, kQueries = 64;
    const SegmentSet& set = call.sets[index];
    const bool own = index == call.num_sets, packed = is_packed(call);
    const int64_t tiles = set.cu_seqlens.data != nullptr ? set.size / kKeys + set.count
                                                         : int64_t{set.count} * divided(set.size, kKeys);
    const int64_t readers = own ? 1 : std::max(call.rows / std::max(set.count, 1), 1);
    const int64_t query_tiles = packed ? 1 : std::max<int64_t>(1, divided(call.max_queries, kQueries));
    divide_readers(device, tiles * call.kv_heads, readers * (call.heads / call.kv_heads), query_tiles, grads);
}

// Scores need more than a scale: see softmax.cuh.
inline bool has_options(const Call& call) {
    bool found = call.softcap != 0 || call.seed != nullptr;
    for (int s = 0; s <= call.num_sets; ++s) found = found || call.sets[s].bias.data != nullptr;
    return found;
}

// Whether one kernel makes the gradients of the queries and of the only shared set, and into how many blocks
// a segment's readers are then divided: as many as fill the device, each with enough query tiles. 0: it does
// not.
inline int short_splits(const Call& call, const Device& device) {
    constexpr int kQueries = 64;
    const SegmentSet& set = call.sets[0];
    if (call.num_sets != 1 || is_packed(call) || set.cu_seqlens.data != nullptr || has_options(call))
        return 0;
    if (set.size == 0 || set.size > kShortKeys || set.count == 0) return 0;
    const int64_t readers = std::max(call.rows / set.count, 1);
    const int64_t tiles = readers * (call.heads / call.kv_heads) * divided(call.max_queries, kQueries);
    const int64_t most = tiles / device.least_tiles;
    const int64_t places = int64_t{device.multiprocessors} * kBlocksOfMultiprocessor;
    return int(std::min(most, std::max<int64_t>(1, places / (int64_t{set.count} * call.kv_heads))));
}

// Places of one head in the padded scratch of lse and δ.
inline int64_t scratch_capacity(const Call& call) {
    if (is_packed(call)) return int64_t{call.max_queries} + int64_t{call.rows} * kScratchTile;
    return call.rows * divided(call.max_queries, kScratchTile) * kScratchTile;
}

}  // namespace prefix_fast::cuda
