// Backward: gradients of queries, own keys and values, and of every segment's keys and values.
//
// Because lse is final, a query's gradient is the sum of its parts against each segment and against its row's
// own keys, in any order that is always the same. Sets whose rows fold (backward_plan.h) are served
// segment-major, 64 lanes of any of their readers at a time, and leave a float32 part of dq; the row-major
// phase adds those to its own part, in the order of the sets. Every sum over chunks is taken in their order:
// the bits do not depend on threads.
#include "backward_plan.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "differentiate.h"
#include "folding.h"
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {
namespace {

// A chunk of keys of a segment against a chunk of its readers' lanes.
struct SegmentItem {
    const FoldedGrads* folded;
    int64_t segment, kv_head, first_lane, last_lane, chunk, part, cost;
};

struct RowItem {
    const RowChunk* chunk;
    int64_t index, kv_head, cost;
};

// Positions [first, last) of one gradient, under one head.
struct SumItem {
    const Unit* unit;
    int64_t kv_head, first, last, cost;
};

constexpr int64_t kProducts = 5;

std::vector<SegmentItem> segment_items(const Problem& p, const BackwardPlan& plan) {
    std::vector<SegmentItem> items;
    for (const FoldedGrads& folded : plan.folded) {
        const SegmentSet& set = p.sets[folded.set];
        for (int64_t n = 0; n < set.count(); ++n) {
            const int64_t lanes = lanes_of(p, folded.readers, n);
            for (int64_t hk = 0; hk < p.kv_heads; ++hk) {
                for (int64_t c = 0; c * folded.chunk < set.length[n]; ++c) {
                    const int64_t keys = std::min(folded.chunk, set.length[n] - c * folded.chunk);
                    int64_t part = folded.first_part[n];
                    for (int64_t first = 0; first < lanes; first += plan.lane_chunk, ++part) {
                        const int64_t last = std::min(first + plan.lane_chunk, lanes);
                        const int64_t cost = kProducts * product_cost(p, last - first, keys);
                        items.push_back({&folded, n, hk, first, last, c, part, cost});
                    }
                }
            }
        }
    }
    costliest_first(items);
    return items;
}

int64_t row_cost(const Problem& p, const BackwardPlan& plan, const RowChunk& chunk) {
    int64_t products = 0;
    for (int64_t b = chunk.row; b < chunk.end; ++b) {
        const int64_t end = chunk.split() ? chunk.last_lane : p.queries_of(b) * p.group();
        for (int64_t first = chunk.first_lane; first < end; first += kLanes) {
            const int64_t last = std::min(first + kLanes, end), query = first / p.group();
            int64_t keys = own_visible(p, b, query, ceil_div(last, p.group()));
            for (const WalkedSet& walked : plan.walked)
                keys += segment_visible(p, p.sets[walked.set], b, query);
            products += product_cost(p, last - first, keys);
        }
    }
    return kProducts * products;
}

// Head slowest: chunks that read one head's segments follow each other.
std::vector<RowItem> row_items(const Problem& p, const BackwardPlan& plan) {
    std::vector<RowItem> items;
    std::vector<int64_t> costs;
    for (const RowChunk& chunk : plan.chunks) costs.push_back(row_cost(p, plan, chunk));
    for (int64_t hk = 0; hk < p.kv_heads; ++hk) {
        for (size_t c = 0; c < plan.chunks.size(); ++c)
            items.push_back({&plan.chunks[c], static_cast<int64_t>(c), hk, costs[c]});
    }
    costliest_first(items);
    return items;
}

// Whether the only part of the unit is already its gradient.
bool is_summed(const BackwardPlan& plan, const Unit& unit) {
    if (unit.last_part - unit.first_part != 1) return false;
    const Part& part = plan.parts[unit.first_part];
    return (!unit.grads.key || part.key_in_place) && (!unit.grads.value || part.value_in_place);
}

std::vector<SumItem> sum_items(const Problem& p, const BackwardPlan& plan) {
    std::vector<SumItem> items;
    for (const Unit& unit : plan.units) {
        const int64_t done = is_summed(plan, unit) ? unit.length : 0;
        const int64_t adds = 2 * (unit.last_part - unit.first_part + 1) * p.head_dim;
        for (int64_t hk = 0; hk < p.kv_heads; ++hk) {
            for (int64_t first = done; first < unit.extent; first += kSumRows) {
                const int64_t last = std::min(first + kSumRows, unit.extent);
                items.push_back({&unit, hk, first, last, (last - first) * adds});
            }
        }
    }
    return items;
}

template <class Arithmetic>
void differentiate_block(const Problem& p, const Saved& saved, const Grads& grads, const SegmentItem& item,
                         const LaneBlock& block, const KeyRun& run, RunSums& sums) {
    BlockState state;
    load_block<Arithmetic>(p, block, saved, sums.key.data != nullptr, static_cast<bool>(grads.query), state);
    differentiate<Arithmetic>(p, block, state, run, sums);
    if (!grads.query) return;
    const int64_t stride = row_stride(p.head_dim);
    float* rows = scratch()[kOutRows].floats(kLanes * stride);
    lanes_to_rows(state.query_grad, block.groups, p.head_dim, rows);
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t at = partial_index(p, item.chunk, block.row[lane], block.head[lane], block.query[lane]);
        std::copy_n(rows + lane * stride, p.head_dim, item.folded->query_grad + at * p.head_dim);
    }
}

void run_segment(const Problem& p, const BackwardPlan& plan, const Saved& saved, const Grads& grads,
                 const SegmentItem& item) {
    KeyRun run = segment_run(p, item.folded->set, item.segment, item.kv_head);
    run.first = item.chunk * item.folded->chunk;
    run.last = std::min(run.first + item.folded->chunk, run.last);
    RunSums sums = plan.parts[item.part].at(item.kv_head);
    sums.key.written = sums.value.written = run.first;
    for (int64_t first = item.first_lane; first < item.last_lane; first += kLanes) {
        const LaneBlock block = reader_block(p, item.folded->readers, item.segment, item.kv_head, first,
                                             std::min(first + kLanes, item.last_lane));
        with_arithmetic(p, [&](auto arithmetic) {
            differentiate_block<decltype(arithmetic)>(p, saved, grads, item, block, run, sums);
        });
    }
    sums.clear_to(run.last, round_up(p.head_dim, kGroup));
}

// rows[lane] += the parts of dq that the segments of folded sets left.
void add_query_parts(const Problem& p, const BackwardPlan& plan, const LaneBlock& block, float* rows) {
    for (int lane = 0; lane < block.lanes; ++lane) {
        float* row = rows + lane * row_stride(p.head_dim);
        for (const FoldedGrads& folded : plan.folded) {
            const SegmentSet& set = p.sets[folded.set];
            const int64_t n = set.ids[block.row[lane]];
            for (int64_t c = 0; n >= 0 && c * folded.chunk < set.length[n]; ++c) {
                const int64_t at = partial_index(p, c, block.row[lane], block.head[lane], block.query[lane]);
                const float* part = folded.query_grad + at * p.head_dim;
                for (int64_t d = 0; d < p.head_dim; ++d) row[d] += part[d];
            }
        }
    }
}

// Where the gradient of row b's own keys (or values) is summed: in place if it can be, else in scratch.
Sum own_sum(const Problem& p, const TokenView& grad, int64_t b, int64_t kv_head, Slot slot) {
    const int64_t keys = p.keys_of(b), columns = round_up(p.head_dim, kGroup);
    if (!grad || keys == 0) return {};
    Sum sum{nullptr, columns, 0};
    if (sums_in_place(grad, p.head_dim)) {
        sum = {reinterpret_cast<float*>(grad.at(b, kv_head, 0)), grad.token / 4, 0};
    } else {
        sum.data = scratch()[slot].floats(keys * columns);
    }
    return sum;
}

void write_own(const Problem& p, const TokenView& grad, int64_t b, int64_t kv_head, Sum sum) {
    if (sum.data == nullptr || sums_in_place(grad, p.head_dim)) return;
    for (int64_t j = 0; j < p.keys_of(b); ++j) {
        write_row(grad.at(b, kv_head, j), grad.dtype, p.head_dim, 1.0f, sum.data + j * sum.stride);
    }
}

// Whether anything at all is wanted of row b in the row-major phase.
bool row_matters(const Problem& p, const BackwardPlan& plan, const Grads& grads, int64_t b) {
    if (grads.query || grads.key || grads.value) return true;
    for (const WalkedSet& walked : plan.walked) {
        const SegmentGrads& wanted = grads.sets[walked.set];
        if ((wanted.key || wanted.value) && p.sets[walked.set].ids[b] >= 0) return true;
    }
    return false;
}

// The block after this one: of the same row, or the first of the next.
void prefetch_next(const Problem& p, const Saved& saved, int64_t b, int64_t kv_head, int64_t first) {
    if (first >= p.queries_of(b) * p.group()) {
        first = 0;
        if (++b >= p.rows) return;
    }
    for (const TokenView* tensor : {&p.query, &saved.grad_out, &saved.out}) {
        prefetch_rows<false>(p, *tensor, b, kv_head, first);
    }
}

// A segment, or the own keys, as row b reads it, and where its gradients are summed.
struct RowRun {
    KeyRun run;
    RunSums sums;
};

// In the order of the sets; the own keys last. The first reader of a chunk assigns, the others add.
std::vector<RowRun> row_runs(const Problem& p, const BackwardPlan& plan, const Grads& grads,
                             const RowItem& item, int64_t b) {
    std::vector<RowRun> runs;
    for (const WalkedSet& walked : plan.walked) {
        const SegmentSet& set = p.sets[walked.set];
        const int64_t n = set.ids[b];
        if (n < 0 || p.queries_of(b) == 0) continue;
        RowRun row{segment_run(p, walked.set, n, item.kv_head), {}};
        row.sums = plan.parts[walked.part_of[item.index * set.count() + n]].at(item.kv_head);
        row.sums.key.written = row.sums.value.written = walked.assigns[b] ? 0 : set.length[n];
        runs.push_back(row);
    }
    RowRun own{own_run(p, b, item.kv_head), {}};
    if (item.chunk->split()) {
        own.sums = plan.parts[item.chunk->own_part].at(item.kv_head);
    } else {
        own.sums = {own_sum(p, grads.key, b, item.kv_head, kOwnKeyGrad),
                    own_sum(p, grads.value, b, item.kv_head, kOwnValueGrad)};
    }
    runs.push_back(own);
    return runs;
}

void finish_own(const Problem& p, const BackwardPlan& plan, const Grads& grads, const RowItem& item,
                int64_t b, RunSums& own) {
    const bool split = item.chunk->split();
    const int64_t columns = round_up(p.head_dim, kGroup);
    own.clear_to(split ? plan.parts[item.chunk->own_part].length : p.keys_of(b), columns);
    if (split) return;
    write_own(p, grads.key, b, item.kv_head, own.key);
    write_own(p, grads.value, b, item.kv_head, own.value);
}

template <class Arithmetic>
void differentiate_row(const Problem& p, const BackwardPlan& plan, const Saved& saved, const Grads& grads,
                       const RowItem& item, int64_t b) {
    std::vector<RowRun> runs = row_runs(p, plan, grads, item, b);
    bool want_keys = false;
    for (const RowRun& row : runs) want_keys |= row.sums.key.data != nullptr;
    const int64_t end = item.chunk->split() ? item.chunk->last_lane : p.queries_of(b) * p.group();
    for (int64_t first = item.chunk->first_lane; first < end; first += kLanes) {
        const LaneBlock block = row_block(p, b, item.kv_head, first);
        BlockState state;
        if (grads.query) prefetch_rows<true>(p, grads.query, b, item.kv_head, first);
        load_block<Arithmetic>(p, block, saved, want_keys, static_cast<bool>(grads.query), state);
        prefetch_next(p, saved, b, item.kv_head, first + kLanes);
        for (RowRun& row : runs) differentiate<Arithmetic>(p, block, state, row.run, row.sums);
        if (!grads.query) continue;
        float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
        lanes_to_rows(state.query_grad, block.groups, p.head_dim, rows);
        add_query_parts(p, plan, block, rows);
        write_lanes(grads.query, block, p.head_dim, state.query_scale, rows);
    }
    for (size_t s = 0; s + 1 < runs.size(); ++s)
        runs[s].sums.clear_to(runs[s].run.last, round_up(p.head_dim, kGroup));
    finish_own(p, plan, grads, item, b, runs.back().sums);
}

// gradient[position] = sum of the parts in their order; zero where there is none.
void write_sums(const Problem& p, const BackwardPlan& plan, const SumItem& item, bool of_keys) {
    const TokenView& grad = of_keys ? item.unit->grads.key : item.unit->grads.value;
    if (!grad) return;
    const int64_t columns = round_up(p.head_dim, kGroup);
    float* row = scratch()[kOutRows].floats(columns);
    for (int64_t position = item.first; position < item.last; ++position) {
        std::fill_n(row, columns, 0.0f);
        for (int64_t k = item.unit->first_part; k < item.unit->last_part; ++k) {
            if (position >= plan.parts[k].length) continue;
            const RunSums sums = plan.parts[k].at(item.kv_head);
            const Sum& sum = of_keys ? sums.key : sums.value;
            const float* from = sum.data + position * sum.stride;
            for (int64_t d = 0; d < columns; ++d) row[d] += from[d];
        }
        write_row(grad.at(item.unit->index, item.kv_head, position), grad.dtype, p.head_dim, 1.0f, row);
    }
}

}  // namespace

Partition backward_partition(const Problem& p) {
    Grads grads;  // the cut does not depend on what is wanted
    grads.sets.resize(p.sets.size());
    const BackwardPlan plan = make_backward_plan(p, grads);
    return {costs_of(segment_items(p, plan)), costs_of(row_items(p, plan)), costs_of(sum_items(p, plan))};
}

void backward(const Problem& p, const Saved& saved, const Grads& grads) {
    BackwardPlan plan = make_backward_plan(p, grads);
    const int64_t floats = lay_out(p, grads, nullptr, plan);
    if (floats > 0) lay_out(p, grads, scratch()[kCallSums].floats(floats), plan);

    const std::vector<SegmentItem> segments = segment_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(segments.size()), [&](int64_t i) {
        const SegmentGrads& wanted = grads.sets[segments[i].folded->set];
        if (grads.query || wanted.key || wanted.value) run_segment(p, plan, saved, grads, segments[i]);
    });
    const std::vector<RowItem> rows = row_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(rows.size()), [&](int64_t i) {
        for (int64_t b = rows[i].chunk->row; b < rows[i].chunk->end; ++b) {
            if (!row_matters(p, plan, grads, b)) continue;
            with_arithmetic(p, [&](auto arithmetic) {
                differentiate_row<decltype(arithmetic)>(p, plan, saved, grads, rows[i], b);
            });
        }
    });
    const std::vector<SumItem> sums = sum_items(p, plan);
    parallel_for(p.threads, static_cast<int64_t>(sums.size()), [&](int64_t i) {
        write_sums(p, plan, sums[i], true);
        write_sums(p, plan, sums[i], false);
    });
    trim_sums();
}

}  // namespace prefix_fast
