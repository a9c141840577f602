// Forward: out = softmax over (segments of every set, own tokens) of q k^T, times v; lse in natural log.
//
// Two kernels and a merge. Row-major: a block of 64 (query, head of the group) lanes of one row walks the
// row's segments and its own keys under one online softmax. Segment-major, for few queries a row: the block's
// lanes are queries of *all rows that read the segment*, so that a prefix is read once for 64 of them; the
// float32 partial states (m, l, O) are merged with the row's own part at the end, in the order of the sets.
// Which one serves a set is decided by shapes alone, and chunks of keys are cut by the segment's own length:
// no row's bits depend on other rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "few_queries.h"
#include "folding.h"
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {
namespace {

constexpr int64_t kItems = 256;         // keys are cut until there are so many
constexpr int64_t kMinimumChunk = 256;  // keys

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

struct Plan {
    std::vector<FoldedSet> folded;
    std::vector<int> walked;  // sets served row-major
    bool few = false;         // own tokens through few_queries.h
};

// Blocks of all rows under all heads, from shapes alone.
int64_t row_items_bound(const Problem& p) {
    const int64_t blocks = p.rows * ceil_div(p.query_bound * p.group(), kLanes);
    return p.kv_heads * std::min(blocks, p.rows + head_lanes(p) / kLanes);
}

// Rows that fill few lanes are folded; and long segments are cut where rows and heads are few.
bool is_folded(const Problem& p, const SegmentSet& set) {
    const bool short_of_work = row_items_bound(p) < kItems / 2 && set.mean_extent >= 2 * kMinimumChunk;
    return short_of_work || rows_fold(p, set);
}

FoldedSet fold(const Problem& p, int index) {
    const SegmentSet& set = p.sets[index];
    FoldedSet folded;
    folded.set = index;
    folded.few = head_lanes(p) <= kFewQueries * set.count();
    folded.readers = readers_of(p, set);
    const int64_t blocks = std::max(ceil_div(head_lanes(p), kLanes), set.count());
    folded.chunk = keys_per_chunk(set.mean_extent, kItems, p.kv_heads * blocks, kMinimumChunk);
    folded.chunks = ceil_div(longest_of(set), folded.chunk);
    return folded;
}

Plan make_plan(const Problem& p) {
    Plan plan;
    for (int s = 0; s < static_cast<int>(p.sets.size()); ++s) {
        if (is_folded(p, p.sets[s])) {
            plan.folded.push_back(fold(p, s));
        } else {
            plan.walked.push_back(s);
        }
    }
    plan.few = p.query_bound * p.group() <= kFewQueries;
    return plan;
}

// Memory for the partial states.
void allocate(const Problem& p, Plan& plan) {
    const int64_t queries = p.total_queries() * p.heads;
    int64_t floats = 0;
    for (const FoldedSet& folded : plan.folded) floats += folded.chunks * queries * (p.head_dim + 2);
    float* memory = floats == 0 ? nullptr : scratch()[kCallSums].floats(floats);
    for (FoldedSet& folded : plan.folded) {
        folded.out = memory;
        folded.state = memory + folded.chunks * queries * p.head_dim;
        memory = folded.state + folded.chunks * queries * 2;
    }
}

std::vector<FoldedItem> folded_items(const Problem& p, const Plan& plan) {
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
                        const int64_t cost = 2 * product_cost(p, last - first, count);
                        items.push_back({&folded, n, hk, first, last, c, cost});
                    }
                }
            }
        }
    }
    costliest_first(items);
    return items;
}

int64_t row_cost(const Problem& p, const Plan& plan, int64_t b, int64_t first) {
    const int64_t end = std::min(first + kLanes, p.queries_of(b) * p.group());
    int64_t keys = own_visible(p, b, ceil_div(end, p.group()));
    for (int s : plan.walked) {
        if (p.sets[s].ids[b] >= 0) keys += p.sets[s].length[p.sets[s].ids[b]];
    }
    int64_t merged = 0;
    for (const FoldedSet& folded : plan.folded) merged += folded.chunks;
    return 2 * product_cost(p, end - first, keys) + merged * (end - first) * p.head_dim;
}

// Head slowest: the blocks that read one head's prefix follow each other.
std::vector<RowItem> row_items(const Problem& p, const Plan& plan) {
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

// Keep the states (m, l, O) of the item's lanes; `rows` are those of O.
void store_partial(const Problem& p, const FoldedItem& item, const LaneBlock& block, const float* maximum,
                   const float* sum, const float* rows) {
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t at = partial_index(p, item.chunk, block.row[lane], block.head[lane], block.query[lane]);
        std::copy_n(rows + lane * row_stride(p.head_dim), p.head_dim, item.folded->out + at * p.head_dim);
        item.folded->state[2 * at] = maximum[lane];
        item.folded->state[2 * at + 1] = sum[lane];
    }
}

KeyRun item_run(const Problem& p, const FoldedItem& item) {
    KeyRun run = segment_run(p, item.folded->set, item.segment, item.kv_head);
    run.first = item.chunk * item.folded->chunk;
    run.last = std::min(run.first + item.folded->chunk, run.last);
    return run;
}

template <class Arithmetic>
void run_folded(const Problem& p, const FoldedItem& item) {
    const LaneBlock block =
        reader_block(p, item.folded->readers, item.segment, item.kv_head, item.first_lane, item.last_lane);
    const float* queries = load_queries<Arithmetic>(p, block);
    SoftmaxState state = begin_state(p, block);
    const KeyRun run = item_run(p, item);
    attend<Arithmetic>(p, block, queries, run, run.first, run.last, state);
    float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
    lanes_to_rows(state.out, block.groups, p.head_dim, rows);
    store_partial(p, item, block, state.maximum, state.sum, rows);
}

// (m, l, O) <- merge of (m, l, O) and a partial state: both rescaled to the larger maximum.
void merge_state(float partial_maximum, float partial_sum, const float* partial_out, int64_t head_dim,
                 float& maximum, float& sum, float* out) {
    const float highest = partial_maximum > maximum ? partial_maximum : maximum;
    const float origin = highest == -kInf ? 0.0f : highest;
    const float mine = exp2(maximum - origin), theirs = exp2(partial_maximum - origin);
    for (int64_t d = 0; d < head_dim; ++d) out[d] = out[d] * mine + partial_out[d] * theirs;
    sum = sum * mine + partial_sum * theirs;
    maximum = highest;
}

// Merge the lane's partial states, in the order of the sets.
void merge_parts(const Problem& p, const Plan& plan, const LaneBlock& block, int lane, float& maximum,
                 float& sum, float* row) {
    for (const FoldedSet& folded : plan.folded) {
        const int64_t id = p.sets[folded.set].ids[block.row[lane]];
        if (id < 0) continue;
        for (int64_t c = 0; c * folded.chunk < p.sets[folded.set].length[id]; ++c) {
            const int64_t at = partial_index(p, c, block.row[lane], block.head[lane], block.query[lane]);
            merge_state(folded.state[2 * at], folded.state[2 * at + 1], folded.out + at * p.head_dim,
                        p.head_dim, maximum, sum, row);
        }
    }
}

// Merge, divide by l (and by 1 - p), write. A query that saw nothing gets out 0 and lse -inf.
void finish(const Problem& p, const Plan& plan, const LaneBlock& block, float* maximum, float* sum,
            float* rows, const TokenView& out, const TokenView& lse) {
    alignas(64) float logs[kLanes];
    const int64_t stride = row_stride(p.head_dim);
    for (int lane = 0; lane < block.lanes; ++lane) {
        merge_parts(p, plan, block, lane, maximum[lane], sum[lane], rows + lane * stride);
    }
    for (int lane = 0; lane < block.lanes; lane += kWidth) store(logs + lane, log2(load(sum + lane)));
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t b = block.row[lane], h = block.head[lane], i = block.query[lane];
        const bool empty = maximum[lane] == -kInf && sum[lane] == 0.0f;
        write_row(out.at(b, h, i), out.dtype, p.head_dim, empty ? 0.0f : p.keep_scale / sum[lane],
                  rows + lane * stride);
        float natural = kLn2 * (maximum[lane] + logs[lane]);
        if (maximum[lane] == kLowest) natural = kLowest;  // nothing but biases of finfo.min
        *reinterpret_cast<float*>(lse.at(b, h, i)) = empty ? -kInf : natural;
    }
}

template <class Arithmetic>
void run_row(const Problem& p, const Plan& plan, const LaneBlock& block, int64_t kv_head,
             const TokenView& out, const TokenView& lse) {
    const int64_t b = block.row[0];
    const float* queries = load_queries<Arithmetic>(p, block);
    SoftmaxState state = begin_state(p, block);
    for (int s : plan.walked) {
        const int64_t id = p.sets[s].ids[b];
        if (id < 0) continue;
        const KeyRun run = segment_run(p, s, id, kv_head);
        attend<Arithmetic>(p, block, queries, run, run.first, run.last, state);
    }
    const KeyRun own = own_run(p, b, kv_head);
    attend<Arithmetic>(p, block, queries, own, own.first, own.last, state);
    float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
    lanes_to_rows(state.out, block.groups, p.head_dim, rows);
    finish(p, plan, block, state.maximum, state.sum, rows, out, lse);
}

FewState begin_few(const Problem& p, const LaneBlock& block, float*& queries) {
    const int64_t stride = row_stride(p.head_dim);
    queries = scratch()[kQueryRows].floats(kLanes * stride);
    read_lanes(p.query, block, p.head_dim, p.scale * kLog2E, queries);
    FewState state;
    state.out = scratch()[kOutRows].floats(kLanes * stride);
    std::fill_n(state.maximum, kGroup, -kInf);
    std::fill_n(state.sum, kGroup, 0.0f);
    std::fill_n(state.out, kFewQueries * stride, 0.0f);
    return state;
}

void run_few_folded(const Problem& p, const FoldedItem& item) {
    const LaneBlock block =
        reader_block(p, item.folded->readers, item.segment, item.kv_head, item.first_lane, item.last_lane);
    float* queries;
    FewState state = begin_few(p, block, queries);
    attend_few(p, block, queries, item_run(p, item), state);
    store_partial(p, item, block, state.maximum, state.sum, state.out);
}

void run_few(const Problem& p, const Plan& plan, const LaneBlock& block, int64_t kv_head,
             const TokenView& out, const TokenView& lse) {
    float* queries;
    FewState state = begin_few(p, block, queries);
    for (int s : plan.walked) {
        const int64_t id = p.sets[s].ids[block.row[0]];
        if (id >= 0) attend_few(p, block, queries, segment_run(p, s, id, kv_head), state);
    }
    attend_few(p, block, queries, own_run(p, block.row[0], kv_head), state);
    finish(p, plan, block, state.maximum, state.sum, state.out, out, lse);
}

}  // namespace

Partition forward_partition(const Problem& p) {
    const Plan plan = make_plan(p);
    return {costs_of(folded_items(p, plan)), costs_of(row_items(p, plan))};
}

void forward(const Problem& p, const TokenView& out, const TokenView& lse) {
    Plan plan = make_plan(p);
    allocate(p, plan);
    const std::vector<FoldedItem> folded = folded_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(folded.size()), [&](int64_t i) {
        if (folded[i].folded->few) return run_few_folded(p, folded[i]);
        with_arithmetic(p, [&](auto arithmetic) { run_folded<decltype(arithmetic)>(p, folded[i]); });
    });

    const std::vector<RowItem> rows = row_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(rows.size()), [&](int64_t i) {
        const auto [b, kv_head, first, cost] = rows[i];
        const size_t next = i + p.threads;  // probably this thread's
        if (next < rows.size())
            prefetch_rows<false>(p, p.query, rows[next].row, rows[next].kv_head, rows[next].first_lane);
        prefetch_rows<true>(p, out, b, kv_head, first);
        const LaneBlock block = row_block(p, b, kv_head, first);
        if (plan.few) return run_few(p, plan, block, kv_head, out, lse);
        with_arithmetic(
            p, [&](auto arithmetic) { run_row<decltype(arithmetic)>(p, plan, block, kv_head, out, lse); });
    });
    trim_sums();
}

}  // namespace prefix_fast
