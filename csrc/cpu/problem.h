// One attention call as the kernels see it: raw pointers, strides in bytes, offsets and ids read into plain
// vectors.
//
// B rows, H query heads, Hkv key/value heads, Tq / Tk a row's query / own key tokens, N segments of a set, D
// head dim.
#pragma once

#include <cstdint>
#include <vector>

namespace prefix_fast {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

// Elements (row, head, token) of a dense [B, H, T, ...] tensor, or of a packed [total, H, ...] one (row
// stride 0 and the first token of every row in `start`). Null data: absent.
struct TokenView {
    char* data = nullptr;
    int64_t row = 0, head = 0, token = 0;
    const int64_t* start = nullptr;
    DType dtype = DType::kFloat32;

    char* at(int64_t b, int64_t h, int64_t t) const {
        return data + (start ? (start[b] + t) * token : b * row + t * token) + h * head;
    }
    explicit operator bool() const { return data != nullptr; }
};

// Bias of (row, head, query, key), broadcast where a stride is 0. Null data: absent.
struct BiasView {
    const char* data = nullptr;
    int64_t row = 0, head = 0, query = 0, key = 0;
    DType dtype = DType::kFloat32;

    const char* at(int64_t b, int64_t h, int64_t i, int64_t j) const {
        return data + b * row + h * head + i * query + j * key;
    }
    explicit operator bool() const { return data != nullptr; }
};

// N segments of keys and values, dense [N, Hkv, P, D] or packed [total, Hkv, D]; `row` of the views is the
// segment.
struct SegmentSet {
    TokenView key, value;
    std::vector<int64_t> start;   // [N + 1] for packed sets, else empty
    std::vector<int64_t> length;  // [N] valid keys
    std::vector<int64_t> extent;  // [N] positions a segment has, valid or not
    std::vector<int64_t> ids;     // [B], -1: the row reads nothing
    std::vector<int64_t> begin;   // [B] position of key 0 in a window over own tokens; empty: never leaves it
    int64_t mean_extent = 0;      // from shapes alone
    BiasView bias;                // [B, H, Tq, P]

    int64_t count() const { return static_cast<int64_t>(length.size()); }
};

struct Problem {
    int64_t rows = 0, heads = 0, kv_heads = 0, head_dim = 0;
    TokenView query, key, value;
    std::vector<int64_t> query_start, key_start;  // [B + 1] for packed rows, else empty
    int64_t query_len = 0, key_len = 0;           // of dense rows
    int64_t longest_query = 0;                    // of any row of this call
    int64_t query_bound = 0;                      // the same, from shapes alone: what decisions may depend on
    std::vector<SegmentSet> sets;

    const bool* key_mask = nullptr;  // [B, Tk]
    int64_t key_mask_row = 0, key_mask_key = 0;
    BiasView bias;  // [B, H, Tq, Tk]

    bool causal = false;
    int64_t window = 0;  // 0: none
    std::vector<int64_t>
        offset;  // [B]; key j is visible to i when j <= i + offset and j > i + offset - window

    float softcap = 0.0f;      // 0: none
    std::vector<float> sinks;  // [H], log2 units; empty: none

    bool dropout = false;
    uint32_t dropout_threshold = 0;  // kept where the random word reaches it
    float keep_scale = 1.0f;
    uint64_t seed = 0;

    float scale = 1.0f;
    int threads = 1;

    int64_t group() const { return heads / kv_heads; }
    int64_t queries_of(int64_t b) const {
        return query_start.empty() ? query_len : query_start[b + 1] - query_start[b];
    }
    int64_t keys_of(int64_t b) const { return key_start.empty() ? key_len : key_start[b + 1] - key_start[b]; }
    int64_t token_of(int64_t b, int64_t i) const {  // index of a query among all queries of the call
        return query_start.empty() ? b * query_len + i : query_start[b] + i;
    }
    int64_t total_keys() const { return key_start.empty() ? rows * key_len : key_start[rows]; }
    int64_t total_queries() const { return query_start.empty() ? rows * query_len : query_start[rows]; }
};

struct SegmentGrads {
    TokenView key, value;
};

struct Grads {
    TokenView query, key, value;
    std::vector<SegmentGrads> sets;
};

// What the backward reads of the forward and of the loss. grad_lse may be absent.
struct Saved {
    TokenView out, lse, grad_out, grad_lse;
};

void forward(const Problem& problem, const TokenView& out, const TokenView& lse);
void backward(const Problem& problem, const Saved& saved, const Grads& grads);

// How the work is cut: for each phase (threads wait for each other in between) the multiply-adds of its
// items, in the order in which threads take them. The same for any number of threads.
using Partition = std::vector<std::vector<int64_t>>;
Partition forward_partition(const Problem& problem);
Partition backward_partition(const Problem& problem);

}  // namespace prefix_fast
