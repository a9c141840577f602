// Which keys a sliding window has left behind: a lower bound per lane, beside the causal upper one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "problem.h"

namespace prefix_fast {

// First key that query i of row b sees of a run whose key 0 has position `begin`.
inline int64_t window_floor(const Problem& p, int64_t b, int64_t i, int64_t begin) {
    return i + p.offset[b] - p.window + 1 - begin;
}

// Keys of the row's segment that the window hides from query i, and from all after it.
inline int64_t window_hidden(const Problem& p, const SegmentSet& set, int64_t b, int64_t i) {
    if (set.begin.empty() || set.ids[b] < 0) return 0;
    return std::clamp<int64_t>(window_floor(p, b, i, set.begin[b]), 0, set.length[set.ids[b]]);
}

// A block's lanes over one run.
struct Window {
    alignas(64) int32_t floor[kLanes];  // keys j >= floor are visible
    int64_t lowest;                     // of all lanes
    int64_t group_highest[kGroups];
};

// `begin`: of each row; null: the own tokens.
inline Window window_of(const Problem& p, const LaneBlock& block, const int64_t* begin, int64_t keys) {
    Window window;
    window.lowest = keys;
    for (int lane = 0; lane < block.groups * kGroup; ++lane) {
        const int from = std::min(lane, block.lanes - 1);
        const int64_t b = block.row[from];
        const int64_t first = window_floor(p, b, block.query[from], begin == nullptr ? 0 : begin[b]);
        const int64_t floor = std::clamp<int64_t>(first, 0, keys);
        window.floor[lane] = static_cast<int32_t>(floor);
        window.lowest = std::min(window.lowest, floor);
        int64_t& highest = window.group_highest[lane / kGroup];
        highest = lane % kGroup == 0 ? floor : std::max(highest, floor);
    }
    return window;
}

}  // namespace prefix_fast
