// A Problem (prefix_fast/backends/problem.py) as the kernels take it (call.h). Values on the device are not
// read.
#pragma once

#include <algorithm>
#include <string>

#include "../tensor_info.h"
#include "call.h"

namespace prefix_fast::cuda {

inline int32_t float_type(const TensorInfo& info) {
    if (info.dtype.is(dtypes().float32)) return kFloat32;
    if (info.dtype.is(dtypes().bfloat16)) return kBFloat16;
    if (info.dtype.is(dtypes().float16)) return kFloat16;
    throw py::type_error("cuda backend: expected float32, bfloat16 or float16, got " +
                         py::str(info.dtype).cast<std::string>());
}

inline int32_t as_int32(int64_t value, const char* what) {
    if (value < 0 || value > INT32_MAX) {
        throw py::value_error(std::string("cuda backend: expected fewer than 2^31 ") + what + ", got " +
                              std::to_string(value) + "; divide the call");
    }
    return static_cast<int32_t>(value);
}

// [units, heads, tokens, D], or packed [total, heads, D].
inline Tokens read_tokens(py::handle tensor, bool packed) {
    if (tensor.is_none()) return {};
    const TensorInfo info = describe(tensor);
    if (packed) return {info.data, 0, info.stride[1], info.stride[0]};
    return {info.data, info.stride[0], info.stride[1], info.stride[2]};
}

// [B, H, Tq], or packed [total, H].
inline Levels read_levels(py::handle tensor, bool packed) {
    const Tokens tokens = read_tokens(tensor, packed);
    return {static_cast<float*>(tokens.data), tokens.unit, tokens.head, tokens.token};
}

// A 0- or 1-dimensional integer tensor.
inline Integers read_integers(py::handle tensor) {
    if (tensor.is_none()) return {};
    const TensorInfo info = describe(tensor);
    const DTypes& types = dtypes();
    const int64_t bytes = info.dtype.is(types.int64)   ? 8
                          : info.dtype.is(types.int32) ? 4
                          : info.dtype.is(types.int16) ? 2
                          : info.dtype.is(types.int8)  ? 1
                          : info.dtype.is(types.uint8) ? -1
                                                       : 0;
    if (bytes == 0) {
        throw py::type_error("cuda backend: expected an integer tensor, got " +
                             py::str(info.dtype).cast<std::string>());
    }
    return {info.data, info.rank == 0 || info.size[0] == 1 ? 0 : info.stride[0], bytes};
}

inline Bias read_bias(py::handle tensor) {
    Bias bias{};
    if (tensor.is_none()) return bias;
    const TensorInfo info = describe(tensor);
    bias.data = info.data;
    bias.dtype = float_type(info);
    int64_t* strides[kMaximumRank] = {&bias.row, &bias.head, &bias.query, &bias.key};
    for (int d = 0; d < info.rank; ++d) {  // aligned at the last dimension; a dimension of one is repeated
        *strides[kMaximumRank - info.rank + d] = info.size[d] == 1 ? 0 : info.stride[d];
    }
    return bias;
}

inline void read_set(py::handle source, int32_t dtype, SegmentSet& set) {
    const Names& n = names();
    const TensorInfo key = describe(get(source, n.key));
    const py::object offsets = get(source, n.cu_seqlens), plan = get(source, n.plan);
    const bool packed = !offsets.is_none();
    set.key = read_tokens(get(source, n.key), packed);
    set.value = read_tokens(get(source, n.value), packed);
    set.cu_seqlens = read_integers(offsets);
    set.ids = read_integers(get(source, n.ids));
    set.lengths = read_integers(get(source, n.lengths));
    set.bias = read_bias(get(source, n.bias));
    set.count = as_int32(packed ? describe(offsets).size[0] - 1 : key.size[0], "segments");
    set.size = as_int32(packed ? key.size[0] : key.size[2], "keys");
    set.in_window = get(source, n.in_window).cast<bool>();
    set.is_float32 = dtype != kFloat32 && float_type(key) == kFloat32;
    if (set.ids.data != nullptr && !plan.is_none()) {
        set.order = static_cast<const int32_t*>(read_integers(plan[py::int_(0)]).data);
        set.starts = static_cast<const int32_t*>(read_integers(plan[py::int_(1)]).data);
    }
}

// Where the queries stand: an integer, a tensor on the device, or Tk - Tq.
inline void read_offset(py::handle offset, int64_t queries, int64_t keys, bool packed, Call& call) {
    if (offset.is_none()) {
        call.own_offset = packed;
        call.fixed_offset = packed ? 0 : static_cast<int32_t>(keys - queries);
    } else if (PyLong_Check(offset.ptr())) {
        int overflow = 0;
        const long long given = PyLong_AsLongLongAndOverflow(offset.ptr(), &overflow);
        const int64_t farthest = kFarthest;
        const int64_t value = overflow == 0 ? given : overflow * farthest;
        call.fixed_offset = static_cast<int32_t>(std::clamp(value, -farthest, farthest));
    } else {
        call.query_offset = read_integers(offset);
    }
}

inline void read_numbers(py::handle source, Call& call) {
    const Names& n = names();
    const py::object window = get(source, n.window), softcap = get(source, n.softcap);
    call.has_window = !window.is_none();
    if (call.has_window) {
        int overflow = 0;
        const long long given = PyLong_AsLongLongAndOverflow(window.ptr(), &overflow);
        call.window = static_cast<int32_t>(overflow != 0 ? kFarthest : std::min<int64_t>(given, kFarthest));
    }
    call.softcap = softcap.is_none() ? 0 : softcap.cast<float>();
    call.scale = get(source, n.scale).cast<float>();
    const double rate = get(source, n.dropout_p).cast<double>();
    call.kept_share = call.inverse_share = 1;
    if (rate > 0) {
        call.threshold = static_cast<uint32_t>(rate * 4294967296.0);  // rate < 1
        call.kept_share = static_cast<float>(1.0 - rate);
        call.inverse_share = static_cast<float>(1 / (1.0 - rate));
        call.seed = reinterpret_cast<const uint64_t*>(describe(get(source, n.dropout_seed)).data);
    }
}

inline Call read_call(py::handle source, bool tf32) {
    const Names& n = names();
    Call call{};
    const TensorInfo query = describe(get(source, n.query)), key = describe(get(source, n.key));
    const py::object offsets_q = get(source, n.cu_seqlens_q), offsets_k = get(source, n.cu_seqlens_k);
    const bool packed = !offsets_q.is_none();
    const auto sets = py::reinterpret_borrow<py::tuple>(get(source, n.sets));
    if (sets.size() > kMaximumSets) {
        throw py::value_error("cuda backend: expected at most " + std::to_string(kMaximumSets) +
                              " segment sets, got " + std::to_string(sets.size()));
    }
    call.dtype = float_type(query);
    call.tf32 = tf32;
    call.query = read_tokens(get(source, n.query), packed);
    call.cu_seqlens_q = read_integers(offsets_q);
    call.rows = as_int32(packed ? describe(offsets_q).size[0] - 1 : query.size[0], "rows");
    call.heads = as_int32(query.size[1], "heads");
    call.kv_heads = as_int32(key.size[1], "heads");
    call.max_queries = as_int32(packed ? query.size[0] : query.size[2], "queries");
    call.head_dim = as_int32(query.size[packed ? 2 : 3], "dims");
    call.num_sets = static_cast<int32_t>(sets.size());
    for (size_t s = 0; s < sets.size(); ++s) read_set(sets[s], call.dtype, call.sets[s]);
    SegmentSet& own = call.sets[sets.size()];
    own.key = read_tokens(get(source, n.key), packed);
    own.value = read_tokens(get(source, n.value), packed);
    own.cu_seqlens = read_integers(offsets_k);
    own.bias = read_bias(get(source, n.attn_bias));
    own.count = call.rows;
    own.size = as_int32(packed ? key.size[0] : key.size[2], "keys");
    const py::object mask = get(source, n.key_mask), sinks = get(source, n.sinks);
    if (!mask.is_none()) {
        const TensorInfo info = describe(mask);
        call.key_mask = reinterpret_cast<const uint8_t*>(info.data);
        call.mask_unit = info.stride[0], call.mask_token = info.stride[1];
    }
    if (!sinks.is_none()) {
        const TensorInfo info = describe(sinks);
        call.sinks = info.data, call.sinks_stride = info.stride[0], call.sinks_dtype = float_type(info);
    }
    call.causal = get(source, n.is_causal).cast<bool>();
    read_offset(get(source, n.query_offset), call.max_queries, own.size, packed, call);
    read_numbers(source, call);
    return call;
}

}  // namespace prefix_fast::cuda
