// A block of up to 64 queries that read the same keys, one query per vector lane.
//
// Lanes may come from any rows and any head of one group; consecutive lanes of a row run over (query, head of
// the group), head fastest, so that causal bounds never decrease along the lanes of a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "half.h"
#include "problem.h"
#include "simd.h"

namespace prefix_fast {

struct LaneBlock {
    int lanes = 0;
    int groups = 0;                     // ceil(lanes / 16)
    int64_t row[kLanes];                // b
    int64_t head[kLanes];               // h
    int64_t query[kLanes];              // i, within the row
    alignas(64) int32_t limit[kLanes];  // own keys j < limit are visible
    int64_t group_low[kGroups];         // smallest and largest limit of a group
    int64_t group_high[kGroups];

    void add(int64_t b, int64_t h, int64_t i) {
        row[lanes] = b;
        head[lanes] = h;
        query[lanes] = i;
        limit[lanes] = 0;
        ++lanes;
        groups = (lanes + kGroup - 1) / kGroup;
    }
};

inline int64_t round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

inline int64_t ceil_div(int64_t x, int64_t divisor) {
    return (x + divisor - 1) / divisor;
}

// Floats between scratch rows [lane][D]: off the powers of two, so that a column of lanes does not fall into
// one cache set.
inline int64_t row_stride(int64_t head_dim) {
    return round_up(head_dim, kGroup) + kGroup;
}

// Floats between groups of a lane-major operand with that many rows.
inline int64_t group_stride(int64_t rows) {
    return (round_up(rows, kGroup) + 4) * kGroup;
}

// Lanes [first, first + 64) of row b's queries under one key/value head, and their causal bounds.
inline LaneBlock row_block(const Problem& p, int64_t b, int64_t kv_head, int64_t first) {
    LaneBlock block;
    const int64_t group = p.group();
    const int64_t end = std::min<int64_t>(first + kLanes, p.queries_of(b) * group);
    const int64_t keys = p.keys_of(b);
    for (int64_t lane = first; lane < end; ++lane) {
        const int64_t i = lane / group;
        block.add(b, kv_head * group + lane % group, i);
        const int64_t visible = p.causal ? std::clamp<int64_t>(i + p.offset[b] + 1, 0, keys) : keys;
        block.limit[block.lanes - 1] = static_cast<int32_t>(visible);
    }
    for (int lane = block.lanes; lane < block.groups * kGroup; ++lane)
        block.limit[lane] = block.limit[block.lanes - 1];
    for (int g = 0; g < block.groups; ++g) {
        block.group_low[g] = block.limit[g * kGroup];
        block.group_high[g] = block.limit[g * kGroup + kGroup - 1];
    }
    return block;
}

// Ask for the lines of 64 queries' rows. They lie apart in memory, in pieces too short for the hardware's own
// prefetcher; a short problem would spend a sixth of its time waiting for them.
template <bool ForWriting>
inline void prefetch_rows(const Problem& p, const TokenView& tensor, int64_t b, int64_t kv_head,
                          int64_t first) {
    const int64_t group = p.group(), end = std::min<int64_t>(first + kLanes, p.queries_of(b) * group);
    const int64_t bytes = p.head_dim * (tensor.dtype == DType::kFloat32 ? 4 : 2);
    for (int64_t lane = first; lane < end; ++lane) {
        const char* row = tensor.at(b, kv_head * group + lane % group, lane / group);
        for (int64_t at = 0; at < bytes; at += 64) {
            __builtin_prefetch(row + at, ForWriting, 2);
            asm volatile("");  // gcc 12 drops loops that only prefetch
        }
    }
}

// rows[lane][d] = factor * tensor(lane)[d]; zeros in idle lanes and beyond D.
inline void read_lanes(const TokenView& tensor, const LaneBlock& block, int64_t head_dim, float factor,
                       float* rows) {
    const int64_t stride = row_stride(head_dim), padded = round_up(head_dim, kGroup);
    for (int lane = 0; lane < block.groups * kGroup; ++lane) {
        float* target = rows + lane * stride;
        int64_t filled = 0;
        if (lane < block.lanes) {
            const char* source = tensor.at(block.row[lane], block.head[lane], block.query[lane]);
            read_row(source, tensor.dtype, head_dim, factor, target);
            filled = head_dim;
        }
        std::memset(target + filled, 0, static_cast<size_t>(padded - filled) * sizeof(float));
    }
}

// tensor(lane)[d] = factor * rows[lane][d]
inline void write_lanes(const TokenView& tensor, const LaneBlock& block, int64_t head_dim, float factor,
                        const float* rows) {
    const int64_t stride = row_stride(head_dim);
    for (int lane = 0; lane < block.lanes; ++lane) {
        char* target = tensor.at(block.row[lane], block.head[lane], block.query[lane]);
        write_row(target, tensor.dtype, head_dim, factor, rows + lane * stride);
    }
}

// [lane][D] -> [g][D][16]
inline void rows_to_lanes(const float* rows, int groups, int64_t head_dim, float* lanes) {
    const int64_t stride = row_stride(head_dim), step = group_stride(head_dim);
    for (int g = 0; g < groups; ++g) {
        for (int64_t d = 0; d < head_dim; d += kWidth) {
            for (int lane = 0; lane < kGroup; lane += kWidth) {
                transpose_square(rows + (g * kGroup + lane) * stride + d, stride,
                                 lanes + g * step + d * kGroup + lane, kGroup);
            }
        }
    }
}

// [g][D][16] -> [lane][D]
inline void lanes_to_rows(const float* lanes, int groups, int64_t head_dim, float* rows) {
    const int64_t stride = row_stride(head_dim), step = group_stride(head_dim);
    for (int g = 0; g < groups; ++g) {
        for (int64_t d = 0; d < head_dim; d += kWidth) {
            for (int lane = 0; lane < kGroup; lane += kWidth) {
                transpose_square(lanes + g * step + d * kGroup + lane, kGroup,
                                 rows + (g * kGroup + lane) * stride + d, stride);
            }
        }
    }
}

}  // namespace prefix_fast
