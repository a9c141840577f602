// One attention call as the kernels see it: plain structs of raw pointers and strides. No torch header, no
// CUDA header.
//
// B rows, H query heads, Hkv key/value heads, Tq / Tk a row's query / own key tokens, N segments of a set, P
// (padded) segment length, D head dim. The own tokens are the last set of a row's chain. Ids, lengths and
// offsets are values of the device that the host never reads.
#pragma once

#include <cstdint>

namespace prefix_fast::cuda {

constexpr int kMaximumSets = 4;     // shared sets of a call
constexpr int kFarthest = 1 << 30;  // offsets beyond hide or show every key
constexpr int kShortKeys = 64;      // longest segment of the fused backward
constexpr int kShortHeadDim = 96;   // and its largest head dim
constexpr int kScratchTile = 128;   // every row's scratch is padded to tiles of so many queries
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Elements (unit, head, token) of [units, heads, tokens, D] or packed [total, heads, D]; strides in elements,
// the last dim contiguous, the unit stride of a packed tensor 0. Null data: absent.
struct Tokens {
    void* data;
    int64_t unit, head, token;
};

// A list of integers of 1, 2, 4 or 8 bytes, -1: unsigned bytes. Null data: absent.
struct Integers {
    const void* data;
    int64_t stride;
    int64_t bytes;
};

// Additive bias of (row, head, query, key), broadcast where a stride is 0. Null data: absent.
struct Bias {
    const void* data;
    int64_t row, head, query, key;
    int64_t dtype;
};

// N segments of keys and values; for the own tokens one for each row.
struct SegmentSet {
    Tokens key, value;
    Integers ids;         // [B], outside [0, N): the row reads nothing; absent: every row reads segment 0
    Integers lengths;     // [N] valid keys, clamped to what exists
    Integers cu_seqlens;  // [N + 1] of packed segments
    Bias bias;
    const int32_t* order;   // the plan: rows sorted by segment [B], absent where there are no ids
    const int32_t* starts;  // first of each segment's rows in it [N + 2]
    int32_t count;          // N
    int32_t size;           // P, or the tokens of all packed segments
    int32_t in_window;      // its keys are positions before the row's own and can leave the window
    int32_t is_float32;     // beside queries of half precision
};

// lse or its gradient, float32: [B, H, Tq], or packed [total, H].
struct Levels {
    float* data;
    int64_t unit, head, token;
};

struct Call {
    Tokens query;
    SegmentSet sets[kMaximumSets + 1];  // `num_sets` shared sets, then the own tokens
    Integers cu_seqlens_q;              // [B + 1] of packed rows
    Integers query_offset;              // stride 0 of a single one; absent: fixed_offset
    const uint8_t* key_mask;            // [B, Tk] of own keys, 0: hidden
    int64_t mask_unit, mask_token;
    const void* sinks;  // [H]
    int64_t sinks_stride, sinks_dtype;
    const uint64_t* seed;  // of dropout; absent: none
    int32_t num_sets, rows, heads, kv_heads;
    int32_t max_queries;  // of a dense row; the total of packed ones
    int32_t head_dim;
    int32_t dtype;
    int32_t fixed_offset, own_offset;  // own_offset: the offset is each packed row's Tk - Tq
    int32_t causal, has_window, window;
    int32_t tf32;                     // products of float32 on tensor cores
    float scale, softcap;             // softcap 0: none
    uint32_t threshold;               // a weight is kept when its random word reaches it
    float kept_share, inverse_share;  // of the weights that dropout keeps, and 1 over it
};

// What a forward pass writes.
struct Results {
    Tokens out;
    Levels lse;
};

// What a forward pass wrote and what comes back, for a backward pass; `levels` and `deltas` are its scratch.
struct Saved {
    Tokens out, grad_out;
    Levels lse, grad_lse;  // grad_lse may be absent
    float* levels;  // [H, capacity] lse, rows padded to tiles: +inf where there is no query or it sees no key
    float* deltas;  // δ, 0 there
    int64_t capacity;  // places of one head
};

// Where the gradients of one set's keys and values go. Null data: not wanted.
struct KeyGradients {
    Tokens key, value;
    float* key_parts;  // [splits · query_splits, like the tensor] float32; absent: written at once
    float* value_parts;
    int64_t key_part, value_part;  // elements of one part
    SegmentSet of;                 // call.sets[set]: what is read of it has a fixed place here
    int32_t set;
    int32_t tiles;         // of keys, of all segments
    int32_t splits;        // of a segment's readers
    int32_t query_splits;  // of each reader's queries
};

// The split forward's partial results, each query's in slot ((b · Hkv + kv head) · Tq + i) · group + member.
struct Partials {
    float* out;                        // [Σ chunks, slots, D]
    float* lse;                        // [Σ chunks, slots] natural
    int32_t* counters;                 // [B · Hkv] queries × parts that are done; 0 before and after
    int32_t chunks[kMaximumSets + 1];  // of the keys of each set's segments; 0: no set
    int32_t tiles[kMaximumSets + 1];   // of their readers' queries
    int32_t queries, own_queries;      // of a tile
};

}  // namespace prefix_fast::cuda
