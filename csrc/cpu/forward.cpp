// Forward: out = softmax over (segments of every set, own tokens) of q k^T, times v; lse in natural log.
//
// Row-major: a block of 64 (query, head of the group) lanes of one row walks the row's segments and its own
// keys under one online softmax. Segment-major (forward_plan.h says when): the block's lanes are queries of
// *all rows that read the segment*, so that a prefix is read once for 64 of them; the float32 partial states
// (m, l, O) are merged with the row's own part at the end, in the order of the sets.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "few_queries.h"
#include "forward_plan.h"
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {
namespace {

// Keep the states (m, l, O) of the block's lanes; `rows` are those of O.
void store_partial(const Problem& p, int64_t chunk, const LaneBlock& block, const float* maximum,
                   const float* sum, const float* rows, float* out, float* state) {
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t at = partial_index(p, chunk, block.row[lane], block.head[lane], block.query[lane]);
        std::copy_n(rows + lane * row_stride(p.head_dim), p.head_dim, out + at * p.head_dim);
        state[2 * at] = maximum[lane];
        state[2 * at + 1] = sum[lane];
    }
}

KeyRun item_run(const Problem& p, const FoldedItem& item) {
    KeyRun run = segment_run(p, item.folded->set, item.segment, item.kv_head);
    run.first = item.chunk * item.folded->chunk;
    run.last = std::min(run.first + item.folded->chunk, run.last);
    return run;
}

template <class Arithmetic>
void run_folded(const Problem& p, const FoldedItem& item, Ahead& ahead) {
    const LaneBlock block =
        reader_block(p, item.folded->readers, item.segment, item.kv_head, item.first_lane, item.last_lane);
    const float* queries = load_queries<Arithmetic>(p, block);
    SoftmaxState state = begin_state(p, block);
    KeyRun run = item_run(p, item);
    if (!ahead.empty()) {
        ahead.pace(2 * (run.last - run.first) * packed<Arithmetic>(p.head_dim) * block.groups *
                   (kGroup / kWidth) * 7 / 8);
        run.ahead = &ahead;
    }
    attend<Arithmetic>(p, block, queries, run, run.first, run.last, state);
    float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
    lanes_to_rows(state.out, block.groups, p.head_dim, rows);
    store_partial(p, item.chunk, block, state.maximum, state.sum, rows, item.folded->out, item.folded->state);
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
void merge_parts(const Problem& p, const ForwardPlan& plan, const LaneBlock& block, int lane, float& maximum,
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

// The head's sink joins the denominator of a query that saw a key; returns what O is multiplied by.
float add_sink(float sink, float& maximum, float& sum) {
    const float highest = sink > maximum ? sink : maximum;
    const float mine = exp2(maximum - highest);
    sum = sum * mine + exp2(sink - highest);
    maximum = highest;
    return mine;
}

// Merge, divide by l (and by 1 - p), write. A query that saw nothing gets out 0 and lse -inf.
void finish(const Problem& p, const ForwardPlan& plan, const LaneBlock& block, float* maximum, float* sum,
            float* rows, const TokenView& out, const TokenView& lse) {
    alignas(64) float logs[kLanes], factors[kLanes];
    bool empty[kLanes];
    const int64_t stride = row_stride(p.head_dim);
    for (int lane = 0; lane < block.lanes; ++lane) {
        merge_parts(p, plan, block, lane, maximum[lane], sum[lane], rows + lane * stride);
        empty[lane] = maximum[lane] == -kInf && sum[lane] == 0.0f;
        factors[lane] = empty[lane] ? 0.0f : p.keep_scale;
        if (!p.sinks.empty() && !empty[lane])
            factors[lane] *= add_sink(p.sinks[block.head[lane]], maximum[lane], sum[lane]);
        if (!empty[lane]) factors[lane] /= sum[lane];
    }
    for (int lane = 0; lane < block.lanes; lane += kWidth) store(logs + lane, log2(load(sum + lane)));
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t b = block.row[lane], h = block.head[lane], i = block.query[lane];
        write_row(out.at(b, h, i), out.dtype, p.head_dim, factors[lane], rows + lane * stride);
        float natural = kLn2 * (maximum[lane] + logs[lane]);
        if (maximum[lane] == kLowest) natural = kLowest;  // nothing but biases of finfo.min
        *reinterpret_cast<float*>(lse.at(b, h, i)) = empty[lane] ? -kInf : natural;
    }
}

void end_row(const Problem& p, const ForwardPlan& plan, const LaneBlock& block, float* maximum, float* sum,
             float* rows, const TokenView& out, const TokenView& lse) {
    if (!plan.together) return finish(p, plan, block, maximum, sum, rows, out, lse);
    store_partial(p, 0, block, maximum, sum, rows, plan.own_out, plan.own_state);
}

// All parts of the block's queries are there.
void merge_row(const Problem& p, const ForwardPlan& plan, const LaneBlock& block, const TokenView& out,
               const TokenView& lse) {
    alignas(64) float maximum[kLanes], sum[kLanes];
    std::fill_n(sum, kLanes, 0.0f);
    const int64_t stride = row_stride(p.head_dim);
    float* rows = scratch()[kOutRows].floats(kLanes * stride);
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t at = partial_index(p, 0, block.row[lane], block.head[lane], block.query[lane]);
        std::copy_n(plan.own_out + at * p.head_dim, p.head_dim, rows + lane * stride);
        maximum[lane] = plan.own_state[2 * at];
        sum[lane] = plan.own_state[2 * at + 1];
    }
    finish(p, plan, block, maximum, sum, rows, out, lse);
}

template <class Arithmetic>
void run_row(const Problem& p, const ForwardPlan& plan, const LaneBlock& block, int64_t kv_head,
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
    end_row(p, plan, block, state.maximum, state.sum, rows, out, lse);
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
    store_partial(p, item.chunk, block, state.maximum, state.sum, state.out, item.folded->out,
                  item.folded->state);
}

void run_few(const Problem& p, const ForwardPlan& plan, const LaneBlock& block, int64_t kv_head,
             const TokenView& out, const TokenView& lse) {
    float* queries;
    FewState state = begin_few(p, block, queries);
    for (int s : plan.walked) {
        const int64_t id = p.sets[s].ids[block.row[0]];
        if (id >= 0) attend_few(p, block, queries, segment_run(p, s, id, kv_head), state);
    }
    attend_few(p, block, queries, own_run(p, block.row[0], kv_head), state);
    end_row(p, plan, block, state.maximum, state.sum, state.out, out, lse);
}

void run_row_item(const Problem& p, const ForwardPlan& plan, const RowItem& item, const TokenView& out,
                  const TokenView& lse) {
    const LaneBlock block = row_block(p, item.row, item.kv_head, item.first_lane);
    if (plan.few) return run_few(p, plan, block, item.kv_head, out, lse);
    with_arithmetic(
        p, [&](auto arithmetic) { run_row<decltype(arithmetic)>(p, plan, block, item.kv_head, out, lse); });
}

void run_folded_item(const Problem& p, const FoldedItem& item, Ahead& ahead) {
    if (item.folded->few) return run_few_folded(p, item);
    with_arithmetic(p, [&](auto arithmetic) { run_folded<decltype(arithmetic)>(p, item, ahead); });
}

// The own keys and values that the row reads, if each token's follows the last one's.
void ask_for(const Problem& p, const RowItem& item, Ahead& ahead) {
    KeyRun run = own_run(p, item.row, item.kv_head);
    if (run.slides) {
        const int64_t floor = window_floor(p, item.row, item.first_lane / p.group(), 0);
        run.first = std::clamp(floor, run.first, run.last);
    }
    const auto add = [&](const char* data, int64_t stride, DType dtype) {
        if (stride == p.head_dim * (dtype == DType::kFloat32 ? 4 : 2))
            ahead.add(data + run.first * stride, (run.last - run.first) * stride);
    };
    add(run.key, run.key_stride, run.key_dtype);
    add(run.value, run.value_stride, run.value_dtype);
}

void forward_together(const Problem& p, const ForwardPlan& plan, const TokenView& out, const TokenView& lse) {
    const std::vector<FoldedItem> folded = folded_items(p, plan);
    const std::vector<RowItem> rows = row_items(p, plan);
    const std::vector<Item> items = items_together(p, folded, rows);
    parallel_for(p.threads, static_cast<int64_t>(items.size()), [&](int64_t i) {
        const Item& item = items[i];
        if (item.folded != nullptr) {
            Ahead ahead;
            for (size_t r = item.first_row; r < item.last_row; ++r) ask_for(p, rows[r], ahead);
            run_folded_item(p, *item.folded, ahead);
        }
        for (size_t r = item.first_row; r < item.last_row; ++r) run_row_item(p, plan, rows[r], out, lse);
    });
    const int64_t count = static_cast<int64_t>(rows.size());
    parallel_for(p.threads, ceil_div(count, kMergedRows), [&](int64_t i) {
        for (int64_t r = i * kMergedRows; r < std::min((i + 1) * kMergedRows, count); ++r)
            merge_row(p, plan, row_block(p, rows[r].row, rows[r].kv_head, rows[r].first_lane), out, lse);
    });
}

}  // namespace

Partition forward_partition(const Problem& p) {
    const ForwardPlan plan = make_forward_plan(p);
    const std::vector<FoldedItem> folded = folded_items(p, plan);
    const std::vector<RowItem> rows = row_items(p, plan);
    if (plan.together) return {costs_of(items_together(p, folded, rows)), merge_costs(p, plan, rows)};
    return {costs_of(folded), costs_of(rows)};
}

void forward(const Problem& p, const TokenView& out, const TokenView& lse) {
    ForwardPlan plan = make_forward_plan(p);
    allocate(p, plan);
    if (plan.together) {
        forward_together(p, plan, out, lse);
        return trim_sums();
    }
    const std::vector<FoldedItem> folded = folded_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(folded.size()), [&](int64_t i) {
        Ahead nothing;
        run_folded_item(p, folded[i], nothing);
    });
    const std::vector<RowItem> rows = row_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(rows.size()), [&](int64_t i) {
        const size_t next = i + p.threads;  // probably this thread's
        if (next < rows.size())
            prefetch_rows<false>(p, p.query, rows[next].row, rows[next].kv_head, rows[next].first_lane);
        prefetch_rows<true>(p, out, rows[i].row, rows[i].kv_head, rows[i].first_lane);
        run_row_item(p, plan, rows[i], out, lse);
    });
    trim_sums();
}

}  // namespace prefix_fast
