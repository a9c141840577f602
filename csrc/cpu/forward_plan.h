// How the forward is cut, and where its partial states are.
//
// Folded items are a segment's keys [chunk] against a block of lanes of its readers; row items are a block of
// one row's queries against its own keys and the segments of walked sets. Short rows run beside the folded
// items: what they read, which is most of what they cost, is asked for while those compute (ahead.h). All
// states are merged in a phase of their own then. Otherwise row items are the second phase, and merge.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "few_queries.h"
#include "folding.h"
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {

constexpr int64_t kItems = 256;         // keys are cut until there are so many items
constexpr int64_t kFullItems = 96;      // the same where full blocks make partial states dear
constexpr int64_t kMinimumChunk = 256;  // keys
constexpr int64_t kMergedRows = 8;      // row items that one item of the last phase merges
// Of own keys and values that the second-level cache takes beside a chunk of a segment.
constexpr int64_t kAheadBytes = int64_t{1} << 19;

// A set served segment-major.
struct FoldedSet {
    int set = 0;
    bool few = false;    // a segment has at most kFewQueries lanes on average: they go through few_queries.h
    int64_t chunk = 0;   // keys of a chunk
    int64_t chunks = 0;  // of the longest segment
    Readers readers;
    float* out = nullptr;    // [chunk][query of the call][H][D]
    float* state = nullptr;  // [chunk][query of the call][H][m, l]
};

struct FoldedItem {
    const FoldedSet* folded;
    int64_t segment, kv_head, first_lane, last_lane, chunk, cost;
};

// A block of queries of one row.
struct RowItem {
    int64_t row, kv_head, first_lane, cost;
};

// What one thread does at a time in the first phase: a folded item (null: none), then rows [first, last).
struct Item {
    const FoldedItem* folded;
    size_t first_row, last_row;
    int64_t cost;
};

struct ForwardPlan {
    std::vector<FoldedSet> folded;
    std::vector<int> walked;  // sets served row-major
    bool few = false;         // own tokens through few_queries.h
    bool together = false;    // rows run beside the folded items, and leave partial states too
    float* own_out = nullptr;
    float* own_state = nullptr;
};

// Blocks of all rows under all heads, from shapes alone.
inline int64_t row_items_bound(const Problem& p) {
    const int64_t blocks = p.rows * ceil_div(p.query_bound * p.group(), kLanes);
    return p.kv_heads * std::min(blocks, p.rows + head_lanes(p) / kLanes);
}

// Rows that fill few lanes are folded; and long segments are cut where rows and heads are few.
inline bool is_folded(const Problem& p, const SegmentSet& set) {
    const bool short_of_work = row_items_bound(p) < kItems / 2 && set.mean_extent >= 2 * kMinimumChunk;
    return short_of_work || rows_fold(p, set);
}

inline FoldedSet fold(const Problem& p, int index) {
    const SegmentSet& set = p.sets[index];
    FoldedSet folded;
    folded.set = index;
    folded.few = head_lanes(p) <= kFewQueries * set.count();
    folded.readers = readers_of(p, set);
    const int64_t blocks = std::max(ceil_div(head_lanes(p), kLanes), set.count());
    folded.chunk = keys_per_chunk(set.mean_extent, rows_fold(p, set) ? kFullItems : kItems,
                                  p.kv_heads * blocks, kMinimumChunk);
    folded.chunks = ceil_div(longest_of(set), folded.chunk);
    return folded;
}

inline ForwardPlan make_forward_plan(const Problem& p) {
    ForwardPlan plan;
    for (int s = 0; s < static_cast<int>(p.sets.size()); ++s) {
        if (is_folded(p, p.sets[s])) {
            plan.folded.push_back(fold(p, s));
        } else {
            plan.walked.push_back(s);
        }
    }
    const int64_t lanes = p.query_bound * p.group();
    plan.few = lanes <= kFewQueries;
    plan.together = !plan.folded.empty() && lanes <= kFoldedQueries;
    return plan;
}

// Memory for the partial states.
inline void allocate(const Problem& p, ForwardPlan& plan) {
    const int64_t queries = p.total_queries() * p.heads;
    int64_t chunks = plan.together;
    for (const FoldedSet& folded : plan.folded) chunks += folded.chunks;
    if (chunks == 0) return;
    float* memory = scratch()[kCallSums].floats(chunks * queries * (p.head_dim + 2));
    const auto take = [&](int64_t floats) {
        memory += floats;
        return memory - floats;
    };
    for (FoldedSet& folded : plan.folded) {
        folded.out = take(folded.chunks * queries * p.head_dim);
        folded.state = take(folded.chunks * queries * 2);
    }
    if (!plan.together) return;
    plan.own_out = take(queries * p.head_dim);
    plan.own_state = take(queries * 2);
}

// Multiply-adds of attending; few lanes have no idle ones.
inline int64_t lanes_cost(const Problem& p, bool few, int64_t lanes, int64_t keys) {
    return 2 * (few ? lanes * keys * p.head_dim : product_cost(p, lanes, keys));
}

inline std::vector<FoldedItem> folded_items(const Problem& p, const ForwardPlan& plan) {
    std::vector<FoldedItem> items;
    for (const FoldedSet& folded : plan.folded) {
        const int64_t width = folded.few ? kFewQueries : kLanes;
        for (int64_t n = 0; n < p.sets[folded.set].count(); ++n) {
            const int64_t lanes = lanes_of(p, folded.readers, n), keys = p.sets[folded.set].length[n];
            for (int64_t hk = 0; hk < p.kv_heads; ++hk) {
                for (int64_t first = 0; first < lanes; first += width) {
                    const int64_t last = std::min(first + width, lanes);
                    for (int64_t c = 0; c * folded.chunk < keys; ++c) {
                        const int64_t count = std::min(folded.chunk, keys - c * folded.chunk);
                        const int64_t cost = lanes_cost(p, folded.few, last - first, count);
                        items.push_back({&folded, n, hk, first, last, c, cost});
                    }
                }
            }
        }
    }
    costliest_first(items);
    return items;
}

inline int64_t row_cost(const Problem& p, const ForwardPlan& plan, int64_t b, int64_t first) {
    const int64_t end = std::min(first + kLanes, p.queries_of(b) * p.group());
    const int64_t first_query = first / p.group();
    int64_t keys = own_visible(p, b, first_query, ceil_div(end, p.group()));
    for (int s : plan.walked) keys += segment_visible(p, p.sets[s], b, first_query);
    return lanes_cost(p, plan.few, end - first, keys);
}

inline int64_t merge_cost(const Problem& p, const ForwardPlan& plan, const RowItem& item) {
    const int64_t end = std::min(item.first_lane + kLanes, p.queries_of(item.row) * p.group());
    int64_t states = 1;
    for (const FoldedSet& folded : plan.folded) states += folded.chunks;
    return states * (end - item.first_lane) * p.head_dim;
}

// Head slowest: the blocks that read one head's prefix follow each other.
inline std::vector<RowItem> row_items(const Problem& p, const ForwardPlan& plan) {
    std::vector<RowItem> items;
    items.reserve(p.kv_heads * p.rows * ceil_div(p.longest_query * p.group(), kLanes));
    for (int64_t hk = 0; hk < p.kv_heads; ++hk) {
        for (int64_t b = 0; b < p.rows; ++b) {
            for (int64_t first = 0; first < p.queries_of(b) * p.group(); first += kLanes)
                items.push_back({b, hk, first, row_cost(p, plan, b, first)});
        }
    }
    costliest_first(items);
    return items;
}

// Spread the rows over the folded items: what a thread can ask for while it computes one.
inline std::vector<Item> items_together(const Problem& p, const std::vector<FoldedItem>& folded,
                                        const std::vector<RowItem>& rows) {
    const int64_t bytes = 8 * p.total_keys() / std::max<int64_t>(p.rows, 1) * p.head_dim;
    const size_t fitting = std::max<int64_t>(kAheadBytes / std::max<int64_t>(bytes, 1), 1);
    std::vector<Item> items;
    size_t row = 0;
    for (size_t i = 0; i < folded.size(); ++i) {
        const size_t share = (rows.size() - row) / (folded.size() - i);
        items.push_back({&folded[i], row, row + std::min(share, fitting), folded[i].cost});
        row = items.back().last_row;
    }
    for (; row < rows.size(); ++row) items.push_back({nullptr, row, row + 1, 0});
    for (Item& item : items) {
        for (size_t r = item.first_row; r < item.last_row; ++r) item.cost += rows[r].cost;
    }
    return items;
}

inline std::vector<int64_t> merge_costs(const Problem& p, const ForwardPlan& plan,
                                        const std::vector<RowItem>& rows) {
    std::vector<int64_t> costs(ceil_div(static_cast<int64_t>(rows.size()), kMergedRows), 0);
    for (size_t r = 0; r < rows.size(); ++r) costs[r / kMergedRows] += merge_cost(p, plan, rows[r]);
    return costs;
}

}  // namespace prefix_fast
