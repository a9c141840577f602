// Backward: gradients of queries, own keys and values, and of every segment's keys and values.
//
// A task is one key/value head of a chunk of rows: it walks their blocks of 64 queries (differentiate.h),
// writes dq and the own gradients, and sums its part of every segment that the chunk reads in float32. Chunks
// are cut by shapes alone and their parts are added in order, so the bits do not depend on threads. A chunk
// that is a segment's only reader sums in the gradient itself. At most kMaximumChunks parts of a segment
// exist: the extra memory is at most that many float32 copies of the wanted segment gradients.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "differentiate.h"
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {
namespace {

constexpr int64_t kMaximumChunks = 16;
constexpr int64_t kChunkQueries = 512;  // lanes over which a part's traffic is small beside the arithmetic

// One chunk's part of one segment's gradient: [Hkv][length][D].
struct Part {
    int64_t chunk, segment, length;
    Sum key, value;                // of key/value head 0
    int64_t key_head, value_head;  // floats from head to head
    bool key_in_place, value_in_place;
};

struct SetPlan {
    std::vector<int64_t> part_of;               // [chunks * N], -1: the chunk does not read the segment
    std::vector<Part> parts;                    // ascending by chunk
    std::vector<std::vector<int64_t>> readers;  // [N] parts of the segment, ascending by chunk
};

struct Plan {
    int64_t rows_per_chunk = 1, chunks = 0;
    std::vector<SetPlan> sets;
};

// Sums may go straight to a float32 gradient whose rows are whole vectors.
bool sums_in_place(const TokenView& grad, int64_t head_dim) {
    return grad && grad.dtype == DType::kFloat32 && head_dim % kGroup == 0;
}

void list_parts(const Problem& p, int index, Plan& plan) {
    const SegmentSet& set = p.sets[index];
    SetPlan& s = plan.sets[index];
    const int64_t segments = static_cast<int64_t>(set.length.size());
    s.part_of.assign(plan.chunks * segments, -1);
    s.readers.resize(segments);
    for (int64_t b = 0; b < p.rows; ++b) {
        const int64_t n = set.ids[b], chunk = b / plan.rows_per_chunk;
        if (n < 0 || s.part_of[chunk * segments + n] >= 0) continue;
        s.part_of[chunk * segments + n] = static_cast<int64_t>(s.parts.size());
        s.readers[n].push_back(static_cast<int64_t>(s.parts.size()));
        s.parts.push_back({chunk, n, set.length[n], {}, {}, 0, 0, false, false});
    }
}

// Place one side (keys or values) of a part: in the gradient, or `memory` floats into the scratch of the
// call.
int64_t place(const Problem& p, const TokenView& grad, int64_t segment, int64_t length, bool alone,
              int64_t memory, Sum& sum, int64_t& head, bool& in_place) {
    if (!grad) return memory;
    in_place = alone && sums_in_place(grad, p.head_dim);
    if (in_place) {
        sum = {reinterpret_cast<float*>(grad.at(segment, 0, 0)), grad.token / 4, 0};
        head = grad.head / 4;
        return memory;
    }
    sum.stride = round_up(p.head_dim, kGroup);
    head = length * sum.stride;
    return memory + p.kv_heads * head;
}

Plan make_plan(const Problem& p, const Grads& grads) {
    Plan plan;
    const int64_t lanes = std::max<int64_t>(p.query_bound * p.group(), 1);
    plan.rows_per_chunk =
        std::max((kChunkQueries + lanes - 1) / lanes, (p.rows + kMaximumChunks - 1) / kMaximumChunks);
    plan.chunks = (p.rows + plan.rows_per_chunk - 1) / plan.rows_per_chunk;
    plan.sets.resize(p.sets.size());
    std::vector<std::pair<Sum*, int64_t>> pending;
    int64_t memory = 0;
    for (int s = 0; s < static_cast<int>(p.sets.size()); ++s) {
        const SegmentGrads& target = grads.sets[s];
        if (!target.key && !target.value) continue;
        list_parts(p, s, plan);
        for (Part& part : plan.sets[s].parts) {
            const int64_t length = p.sets[s].length[part.segment];
            const bool alone = plan.sets[s].readers[part.segment].size() == 1;
            const int64_t key_at = memory;
            memory = place(p, target.key, part.segment, length, alone, memory, part.key, part.key_head,
                           part.key_in_place);
            if (target.key && !part.key_in_place) pending.push_back({&part.key, key_at});
            const int64_t value_at = memory;
            memory = place(p, target.value, part.segment, length, alone, memory, part.value, part.value_head,
                           part.value_in_place);
            if (target.value && !part.value_in_place) pending.push_back({&part.value, value_at});
        }
    }
    float* base = memory == 0 ? nullptr : scratch()[kCallSums].floats(memory);
    for (auto& [sum, at] : pending) sum->data = base + at;
    return plan;
}

Sum at_head(Sum sum, int64_t head_stride, int64_t kv_head) {
    if (sum.data != nullptr) sum.data += kv_head * head_stride;
    return sum;
}

// The sums of row b's part of a set, all written before; or nothing when no gradient of the set is wanted.
RunSums set_sums(const Plan& plan, int set, int64_t segment, int64_t segments, int64_t b, int64_t kv_head) {
    const SetPlan& s = plan.sets[set];
    if (s.part_of.empty()) return {};
    const Part& part = s.parts[s.part_of[b / plan.rows_per_chunk * segments + segment]];
    RunSums sums{at_head(part.key, part.key_head, kv_head), at_head(part.value, part.value_head, kv_head)};
    sums.key.written = sums.value.written = part.length;
    return sums;
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

// Whether anything at all is wanted of row b.
bool row_matters(const Problem& p, const Plan& plan, const Grads& grads, int64_t b) {
    if (grads.query || grads.key || grads.value) return true;
    for (size_t s = 0; s < p.sets.size(); ++s) {
        if (!plan.sets[s].part_of.empty() && p.sets[s].ids[b] >= 0) return true;
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

template <class Arithmetic>
void differentiate_row(const Problem& p, const Plan& plan, const Saved& saved, const Grads& grads, int64_t b,
                       int64_t kv_head) {
    RunSums own{own_sum(p, grads.key, b, kv_head, kOwnKeyGrad),
                own_sum(p, grads.value, b, kv_head, kOwnValueGrad)};
    const KeyRun own_keys = own_run(p, b, kv_head);
    bool want_keys = own.key.data != nullptr;
    for (const SegmentGrads& set : grads.sets) want_keys |= static_cast<bool>(set.key);
    const int64_t lanes = p.queries_of(b) * p.group();
    for (int64_t first = 0; first < lanes; first += kLanes) {
        const LaneBlock block = row_block(p, b, kv_head, first);
        BlockState state;
        if (grads.query) prefetch_rows<true>(p, grads.query, b, kv_head, first);
        load_block<Arithmetic>(p, block, saved, want_keys, static_cast<bool>(grads.query), state);
        prefetch_next(p, saved, b, kv_head, first + kLanes);
        for (int s = 0; s < static_cast<int>(p.sets.size()); ++s) {
            const int64_t n = p.sets[s].ids[b];
            if (n < 0) continue;
            const int64_t segments = static_cast<int64_t>(p.sets[s].length.size());
            RunSums sums = set_sums(plan, s, n, segments, b, kv_head);
            differentiate<Arithmetic>(p, block, state, segment_run(p, s, n, kv_head), sums);
        }
        differentiate<Arithmetic>(p, block, state, own_keys, own);
        if (!grads.query) continue;
        float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
        lanes_to_rows(state.query_grad, block.groups, p.head_dim, rows);
        write_lanes(grads.query, block, p.head_dim, state.query_scale, rows);
    }
    const int64_t columns = round_up(p.head_dim, kGroup);
    own.key.clear_to(p.keys_of(b), columns);
    own.value.clear_to(p.keys_of(b), columns);
    write_own(p, grads.key, b, kv_head, own.key);
    write_own(p, grads.value, b, kv_head, own.value);
}

void run_chunk(const Problem& p, const Plan& plan, const Saved& saved, const Grads& grads, int64_t chunk,
               int64_t kv_head) {
    for (size_t s = 0; s < plan.sets.size(); ++s) {
        for (const Part& part : plan.sets[s].parts) {
            if (part.chunk != chunk) continue;
            const int64_t length = p.sets[s].length[part.segment], columns = round_up(p.head_dim, kGroup);
            at_head(part.key, part.key_head, kv_head).clear_to(length, columns);
            at_head(part.value, part.value_head, kv_head).clear_to(length, columns);
        }
    }
    const int64_t end = std::min(p.rows, (chunk + 1) * plan.rows_per_chunk);
    for (int64_t b = chunk * plan.rows_per_chunk; b < end; ++b) {
        if (!row_matters(p, plan, grads, b)) continue;
        with_arithmetic(p, [&](auto arithmetic) {
            differentiate_row<decltype(arithmetic)>(p, plan, saved, grads, b, kv_head);
        });
    }
}

// gradient[position] = sum of the parts in chunk order; zero past the length and where nobody read the
// segment.
void write_segment(const Problem& p, const SetPlan& plan, const TokenView& grad, bool of_keys,
                   int64_t segment, int64_t kv_head, int64_t length, int64_t extent) {
    const int64_t columns = round_up(p.head_dim, kGroup);
    float* row = scratch()[kOutRows].floats(columns);
    const std::vector<int64_t>& parts = plan.readers[segment];
    int64_t position = 0;
    if (parts.size() == 1) {
        const Part& part = plan.parts[parts[0]];
        if (of_keys ? part.key_in_place : part.value_in_place) position = length;
    }
    for (; position < extent; ++position) {
        std::fill_n(row, columns, 0.0f);
        for (size_t k = 0; k < parts.size() && position < length; ++k) {
            const Part& part = plan.parts[parts[k]];
            const Sum sum = of_keys ? at_head(part.key, part.key_head, kv_head)
                                    : at_head(part.value, part.value_head, kv_head);
            const float* from = sum.data + position * sum.stride;
            for (int64_t d = 0; d < columns; ++d) row[d] += from[d];
        }
        write_row(grad.at(segment, kv_head, position), grad.dtype, p.head_dim, 1.0f, row);
    }
}

}  // namespace

void backward(const Problem& p, const Saved& saved, const Grads& grads) {
    const Plan plan = make_plan(p, grads);
    parallel_for(p.threads, plan.chunks * p.kv_heads, [&](int64_t task) {
        run_chunk(p, plan, saved, grads, task % plan.chunks, task / plan.chunks);
    });
    for (size_t s = 0; s < p.sets.size(); ++s) {
        const SegmentSet& set = p.sets[s];
        const SegmentGrads& grad = grads.sets[s];
        if (!grad.key && !grad.value) continue;
        const int64_t segments = static_cast<int64_t>(set.length.size());
        parallel_for(p.threads, segments * p.kv_heads, [&](int64_t task) {
            const int64_t n = task % segments, hk = task / segments;
            if (grad.key) write_segment(p, plan.sets[s], grad.key, true, n, hk, set.length[n], set.extent[n]);
            if (grad.value)
                write_segment(p, plan.sets[s], grad.value, false, n, hk, set.length[n], set.extent[n]);
        });
    }
    trim_sums();
}

}  // namespace prefix_fast
