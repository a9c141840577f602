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
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {
namespace {

constexpr int64_t kFoldedQueries = 32;  // fold rows when a row has at most this many lanes
constexpr int64_t kFoldedReaders = 8;   // and a segment has at least this many readers on average
constexpr int64_t kMinimumItems = 16;   // cut keys into chunks until there are this many work items
constexpr int64_t kMinimumChunk = 128;

// A set served segment-major.
struct FoldedSet {
    int set = 0;
    int64_t chunk = 0;                  // keys of a chunk
    int64_t chunks = 0;                 // of the longest segment
    std::vector<int64_t> reader_start;  // [N + 1] into readers
    std::vector<int64_t> readers;       // rows, ascending within a segment
    float* out = nullptr;               // [chunk][query of the call][H][D]
    float* state = nullptr;             // [chunk][query of the call][H][m, l]
};

struct FoldedItem {
    const FoldedSet* folded;
    int64_t segment, kv_head, first_lane, chunk;
};

struct Plan {
    std::vector<FoldedSet> folded;
    std::vector<int> walked;  // sets served row-major
    bool few = false;         // own tokens through few_queries.h
};

bool is_folded(const Problem& p, const SegmentSet& set) {
    const int64_t lanes = p.query_bound * p.group();
    const int64_t segments = std::max<int64_t>(static_cast<int64_t>(set.length.size()), 1);
    return lanes <= kFoldedQueries && p.rows > 1 && p.rows * lanes >= kFoldedReaders * segments;
}

FoldedSet fold(const Problem& p, int index) {
    const SegmentSet& set = p.sets[index];
    FoldedSet folded;
    folded.set = index;
    const int64_t segments = static_cast<int64_t>(set.length.size());
    folded.reader_start.assign(segments + 1, 0);
    for (int64_t id : set.ids) {
        if (id >= 0) ++folded.reader_start[id + 1];
    }
    for (int64_t n = 0; n < segments; ++n) folded.reader_start[n + 1] += folded.reader_start[n];
    folded.readers.resize(folded.reader_start[segments]);
    std::vector<int64_t> next(folded.reader_start.begin(), folded.reader_start.end() - 1);
    for (int64_t b = 0; b < p.rows; ++b) {
        if (set.ids[b] >= 0) folded.readers[next[set.ids[b]]++] = b;
    }
    const int64_t blocks = std::max<int64_t>(p.rows * p.query_bound * p.group() / kLanes, 1);
    const int64_t splits = (kMinimumItems + p.kv_heads * blocks - 1) / (p.kv_heads * blocks);
    folded.chunk = std::max(kMinimumChunk, round_up((set.mean_extent + splits - 1) / splits, kMinimumChunk));
    for (int64_t length : set.length)
        folded.chunks = std::max(folded.chunks, (length + folded.chunk - 1) / folded.chunk);
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
    const int64_t queries = p.total_queries() * p.heads;
    int64_t floats = 0;
    for (const FoldedSet& folded : plan.folded) floats += folded.chunks * queries * (p.head_dim + 2);
    float* memory = floats == 0 ? nullptr : scratch()[kCallSums].floats(floats);
    for (FoldedSet& folded : plan.folded) {
        folded.out = memory;
        folded.state = memory + folded.chunks * queries * p.head_dim;
        memory = folded.state + folded.chunks * queries * 2;
    }
    return plan;
}

int64_t slot(const Problem& p, int64_t chunk, int64_t b, int64_t h, int64_t i) {
    return (chunk * p.total_queries() + p.token_of(b, i)) * p.heads + h;
}

std::vector<FoldedItem> folded_items(const Problem& p, const Plan& plan) {
    std::vector<FoldedItem> items;
    for (const FoldedSet& folded : plan.folded) {
        const SegmentSet& set = p.sets[folded.set];
        for (int64_t n = 0; n < static_cast<int64_t>(set.length.size()); ++n) {
            int64_t lanes = 0;
            for (int64_t r = folded.reader_start[n]; r < folded.reader_start[n + 1]; ++r) {
                lanes += p.queries_of(folded.readers[r]) * p.group();
            }
            for (int64_t hk = 0; hk < p.kv_heads; ++hk) {
                for (int64_t first = 0; first < lanes; first += kLanes) {
                    for (int64_t c = 0; c * folded.chunk < set.length[n]; ++c)
                        items.push_back({&folded, n, hk, first, c});
                }
            }
        }
    }
    return items;
}

// Lanes [first, first + 64) of all queries that read the segment, rows in order.
LaneBlock reader_block(const Problem& p, const FoldedItem& item) {
    LaneBlock block;
    const int64_t group = p.group();
    int64_t skip = item.first_lane;
    for (int64_t r = item.folded->reader_start[item.segment];
         r < item.folded->reader_start[item.segment + 1] && block.lanes < kLanes; ++r) {
        const int64_t b = item.folded->readers[r];
        const int64_t lanes = p.queries_of(b) * group;
        for (int64_t lane = std::min(skip, lanes); lane < lanes && block.lanes < kLanes; ++lane) {
            block.add(b, item.kv_head * group + lane % group, lane / group);
        }
        skip = std::max<int64_t>(skip - lanes, 0);
    }
    return block;
}

template <class Arithmetic>
void run_folded(const Problem& p, const FoldedItem& item) {
    const LaneBlock block = reader_block(p, item);
    const float* queries = load_queries<Arithmetic>(p, block);
    SoftmaxState state = begin_state(p, block);
    const KeyRun run = segment_run(p, item.folded->set, item.segment, item.kv_head);
    const int64_t first = item.chunk * item.folded->chunk;
    attend<Arithmetic>(p, block, queries, run, first, std::min(first + item.folded->chunk, run.last), state);
    float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
    lanes_to_rows(state.out, block.groups, p.head_dim, rows);
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t at = slot(p, item.chunk, block.row[lane], block.head[lane], block.query[lane]);
        std::copy_n(rows + lane * row_stride(p.head_dim), p.head_dim, item.folded->out + at * p.head_dim);
        item.folded->state[2 * at] = state.maximum[lane];
        item.folded->state[2 * at + 1] = state.sum[lane];
    }
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
            const int64_t at = slot(p, c, block.row[lane], block.head[lane], block.query[lane]);
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

void run_few(const Problem& p, const Plan& plan, const LaneBlock& block, int64_t kv_head,
             const TokenView& out, const TokenView& lse) {
    const int64_t b = block.row[0], stride = row_stride(p.head_dim);
    float* queries = scratch()[kQueryRows].floats(kLanes * stride);
    read_lanes(p.query, block, p.head_dim, p.scale * kLog2E, queries);
    FewState state;
    state.out = scratch()[kOutRows].floats(kLanes * stride);
    std::fill_n(state.maximum, kWidth, -kInf);
    std::fill_n(state.sum, kWidth, 0.0f);
    std::fill_n(state.out, kFewQueries * stride, 0.0f);
    for (int s : plan.walked) {
        const int64_t id = p.sets[s].ids[b];
        if (id >= 0) attend_few(p, block, queries, segment_run(p, s, id, kv_head), state);
    }
    attend_few(p, block, queries, own_run(p, b, kv_head), state);
    finish(p, plan, block, state.maximum, state.sum, state.out, out, lse);
}

}  // namespace

void forward(const Problem& p, const TokenView& out, const TokenView& lse) {
    const Plan plan = make_plan(p);
    const std::vector<FoldedItem> items = folded_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(items.size()), [&](int64_t i) {
        with_arithmetic(p, [&](auto arithmetic) { run_folded<decltype(arithmetic)>(p, items[i]); });
    });

    // Head slowest: the blocks that read one head's prefix follow each other.
    const int64_t blocks = (p.longest_query * p.group() + kLanes - 1) / kLanes;
    const int64_t tasks = p.kv_heads * p.rows * blocks;
    parallel_for(p.threads, tasks, [&](int64_t task) {
        const int64_t first = task % blocks * kLanes, b = task / blocks % p.rows;
        const int64_t kv_head = task / blocks / p.rows;
        if (first >= p.queries_of(b) * p.group()) return;
        const int64_t next = task + p.threads;  // probably this thread's
        if (next < tasks) {
            prefetch_rows<false>(p, p.query, next / blocks % p.rows, next / blocks / p.rows,
                                 next % blocks * kLanes);
        }
        prefetch_rows<true>(p, out, b, kv_head, first);
        const LaneBlock block = row_block(p, b, kv_head, first);
        if (plan.few) {
            run_few(p, plan, block, kv_head, out, lse);
        } else {
            with_arithmetic(p, [&](auto arithmetic) {
                run_row<decltype(arithmetic)>(p, plan, block, kv_head, out, lse);
            });
        }
    });
    trim_sums();
}

}  // namespace prefix_fast
