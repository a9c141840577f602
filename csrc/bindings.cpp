// Python's view of the kernels: reads the attributes of a Problem (prefix_fast/backends/problem.py) and of
// its tensors into raw pointers and strides. No torch header is needed: one build serves every torch release.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cpu/pointwise.h"
#include "cpu/problem.h"
#include "tensor_info.h"

namespace py = pybind11;
using prefix_fast::BiasView;
using prefix_fast::CrossEntropy;
using prefix_fast::describe;
using prefix_fast::DType;
using prefix_fast::dtypes;
using prefix_fast::get;
using prefix_fast::Grads;
using prefix_fast::kMaximumRank;
using prefix_fast::Names;
using prefix_fast::names;
using prefix_fast::Problem;
using prefix_fast::Saved;
using prefix_fast::SegmentGrads;
using prefix_fast::SegmentSet;
using prefix_fast::TensorInfo;
using prefix_fast::TokenView;

namespace {

DType float_type(const TensorInfo& info) {
    if (info.dtype.is(dtypes().float32)) return DType::kFloat32;
    if (info.dtype.is(dtypes().bfloat16)) return DType::kBFloat16;
    if (info.dtype.is(dtypes().float16)) return DType::kFloat16;
    throw py::type_error("cpu backend: expected float32, bfloat16 or float16, got " +
                         py::str(info.dtype).cast<std::string>());
}

int64_t bytes_of(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}

template <class T>
std::vector<int64_t> copy_ints(const TensorInfo& info, int64_t count) {
    std::vector<int64_t> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = reinterpret_cast<const T*>(info.data)[i * info.stride[0]];
    return values;
}

// A 0- or 1-dimensional integer tensor.
std::vector<int64_t> read_ints(py::handle tensor) {
    const TensorInfo info = describe(tensor);
    const int64_t count = info.rank == 0 ? 1 : info.size[0];
    if (info.dtype.is(dtypes().int64)) return copy_ints<int64_t>(info, count);
    if (info.dtype.is(dtypes().int32)) return copy_ints<int32_t>(info, count);
    if (info.dtype.is(dtypes().int16)) return copy_ints<int16_t>(info, count);
    if (info.dtype.is(dtypes().int8)) return copy_ints<int8_t>(info, count);
    if (info.dtype.is(dtypes().uint8)) return copy_ints<uint8_t>(info, count);
    throw py::type_error("cpu backend: expected an integer tensor, got " +
                         py::str(info.dtype).cast<std::string>());
}

// [B, H, T(, D)], or packed [total, H(, D)] with the first token of each row in `start`.
TokenView token_view(const TensorInfo& info, const std::vector<int64_t>& start) {
    TokenView view;
    view.data = info.data;
    view.dtype = float_type(info);
    const int64_t bytes = bytes_of(view.dtype);
    if (start.empty()) {
        view.row = info.stride[0] * bytes;
        view.head = info.stride[1] * bytes;
        view.token = info.stride[2] * bytes;
    } else {
        view.token = info.stride[0] * bytes;
        view.head = info.stride[1] * bytes;
        view.start = start.data();
    }
    return view;
}

TokenView optional_view(py::handle tensor, const std::vector<int64_t>& start) {
    return tensor.is_none() ? TokenView{} : token_view(describe(tensor), start);
}

std::vector<int64_t> optional_ints(py::handle tensor) {
    return tensor.is_none() ? std::vector<int64_t>{} : read_ints(tensor);
}

BiasView read_bias(py::handle tensor) {
    BiasView bias;
    if (tensor.is_none()) return bias;
    const TensorInfo info = describe(tensor);
    bias.data = info.data;
    bias.dtype = float_type(info);
    int64_t* strides[kMaximumRank] = {&bias.row, &bias.head, &bias.query, &bias.key};
    for (int d = 0; d < info.rank; ++d) {  // aligned at the last dimension; a dimension of one is repeated
        *strides[kMaximumRank - info.rank + d] =
            info.size[d] == 1 ? 0 : info.stride[d] * bytes_of(bias.dtype);
    }
    return bias;
}

void read_set(py::handle source, int64_t rows, SegmentSet& set) {
    const Names& n = names();
    const TensorInfo key = describe(get(source, n.key));
    set.start = optional_ints(get(source, n.cu_seqlens));
    set.key = token_view(key, set.start);
    set.value = token_view(describe(get(source, n.value)), set.start);
    const bool packed = !set.start.empty();
    const int64_t segments = packed ? static_cast<int64_t>(set.start.size()) - 1 : key.size[0];
    set.extent.assign(segments, packed ? 0 : key.size[2]);
    for (int64_t i = 0; packed && i < segments; ++i) set.extent[i] = set.start[i + 1] - set.start[i];
    set.mean_extent = packed ? key.size[0] / (segments > 0 ? segments : 1) : key.size[2];
    set.length = optional_ints(get(source, n.lengths));
    if (set.length.empty()) set.length = set.extent;
    set.ids = optional_ints(get(source, n.ids));
    if (set.ids.empty()) set.ids.assign(rows, segments > 0 ? 0 : -1);
    set.bias = read_bias(get(source, n.bias));
}

void read_mask(py::handle tensor, Problem& p) {
    if (tensor.is_none()) return;
    const TensorInfo info = describe(tensor);
    p.key_mask = reinterpret_cast<const bool*>(info.data);
    p.key_mask_row = info.stride[0];
    p.key_mask_key = info.stride[1];
}

// Sums of positions stay within 64 bits.
int64_t within_reach(int64_t position) {
    constexpr int64_t kFarthest = int64_t{1} << 61;
    return std::clamp(position, -kFarthest, kFarthest);
}

void read_offsets(py::handle offset, Problem& p) {
    p.offset.resize(p.rows);
    if (offset.is_none()) {
        for (int64_t b = 0; b < p.rows; ++b) p.offset[b] = p.keys_of(b) - p.queries_of(b);
    } else if (PyLong_Check(offset.ptr())) {
        p.offset.assign(p.rows, within_reach(offset.cast<int64_t>()));
    } else {
        const std::vector<int64_t> values = read_ints(offset);
        for (int64_t b = 0; b < p.rows; ++b)
            p.offset[b] = within_reach(values.size() == 1 ? values[0] : values[b]);
    }
}

// Sets in the window end where the own tokens, or the next of them, begin.
void read_window(py::handle source, const py::tuple& sets, Problem& p) {
    const py::object window = get(source, names().window);
    if (window.is_none()) return;
    p.window = within_reach(window.cast<int64_t>());
    std::vector<int64_t> begin(p.rows, 0);
    for (size_t s = sets.size(); s-- > 0;) {
        if (!get(sets[s], names().in_window).cast<bool>()) continue;
        SegmentSet& set = p.sets[s];
        for (int64_t b = 0; b < p.rows; ++b) begin[b] -= set.ids[b] < 0 ? 0 : set.length[set.ids[b]];
        set.begin = begin;
    }
}

void read_sinks(py::handle tensor, Problem& p) {
    if (tensor.is_none()) return;
    const TensorInfo info = describe(tensor);
    const DType dtype = float_type(info);
    for (int64_t h = 0; h < p.heads; ++h) {
        const char* at = info.data + h * info.stride[0] * bytes_of(dtype);
        p.sinks.push_back(prefix_fast::in_log2(prefix_fast::read_element(at, dtype)));
    }
}

void read_dropout(py::handle source, Problem& p) {
    const double rate = get(source, names().dropout_p).cast<double>();
    p.dropout = rate > 0;
    if (!p.dropout) return;
    p.dropout_threshold = static_cast<uint32_t>(rate * 4294967296.0);  // rate < 1
    p.keep_scale = static_cast<float>(1.0 / (1.0 - rate));
    p.seed = static_cast<uint64_t>(read_ints(get(source, names().dropout_seed)).at(0));
}

// Views hold pointers into the problem's own vectors, so it is filled in place and never copied.
void read_problem(py::handle source, int threads, Problem& p) {
    if (threads < 1) {
        throw std::invalid_argument("cpu backend: expected at least one thread, got " +
                                    std::to_string(threads) + "; torch.set_num_threads sets their number");
    }
    const Names& n = names();
    const TensorInfo query = describe(get(source, n.query)), key = describe(get(source, n.key));
    p.query_start = optional_ints(get(source, n.cu_seqlens_q));
    p.key_start = optional_ints(get(source, n.cu_seqlens_k));
    const bool packed = !p.query_start.empty();
    p.rows = packed ? static_cast<int64_t>(p.query_start.size()) - 1 : query.size[0];
    p.heads = query.size[1];
    p.kv_heads = key.size[1];
    p.head_dim = query.size[packed ? 2 : 3];
    p.query = token_view(query, p.query_start);
    p.key = token_view(key, p.key_start);
    p.value = token_view(describe(get(source, n.value)), p.key_start);
    p.query_len = packed ? 0 : query.size[2];
    p.key_len = packed ? 0 : key.size[2];
    p.longest_query = p.query_len;
    for (int64_t b = 0; packed && b < p.rows; ++b)
        p.longest_query = std::max(p.longest_query, p.queries_of(b));
    const py::object bound = get(source, n.max_seqlen_q);
    p.query_bound = !packed ? p.query_len : bound.is_none() ? query.size[0] : bound.cast<int64_t>();
    const auto sets = py::reinterpret_borrow<py::tuple>(get(source, n.sets));
    p.sets.resize(sets.size());
    for (size_t s = 0; s < sets.size(); ++s) read_set(sets[s], p.rows, p.sets[s]);
    read_mask(get(source, n.key_mask), p);
    p.bias = read_bias(get(source, n.attn_bias));
    p.causal = get(source, n.is_causal).cast<bool>();
    read_window(source, sets, p);
    if (p.causal || p.window > 0) read_offsets(get(source, n.query_offset), p);
    const py::object softcap = get(source, n.softcap);
    if (!softcap.is_none()) p.softcap = softcap.cast<float>();
    read_sinks(get(source, n.sinks), p);
    read_dropout(source, p);
    p.scale = get(source, n.scale).cast<float>();
    p.threads = threads;
}

void run_forward(py::handle problem, py::handle out, py::handle lse, int threads) {
    Problem p;
    read_problem(problem, threads, p);
    const TokenView out_view = token_view(describe(out), p.query_start);
    const TokenView lse_view = token_view(describe(lse), p.query_start);
    py::gil_scoped_release unlocked;
    prefix_fast::forward(p, out_view, lse_view);
}

void run_backward(py::handle problem, py::handle out, py::handle lse, py::handle grad_out,
                  py::handle grad_lse, py::handle grads, int threads) {
    const Names& n = names();
    Problem p;
    read_problem(problem, threads, p);
    Saved saved{token_view(describe(out), p.query_start), token_view(describe(lse), p.query_start),
                token_view(describe(grad_out), p.query_start), optional_view(grad_lse, p.query_start)};
    Grads g;
    g.query = optional_view(get(grads, n.query), p.query_start);
    g.key = optional_view(get(grads, n.key), p.key_start);
    g.value = optional_view(get(grads, n.value), p.key_start);
    const auto sets = py::reinterpret_borrow<py::tuple>(get(grads, n.sets));
    for (size_t s = 0; s < sets.size(); ++s) {
        const auto pair = py::reinterpret_borrow<py::tuple>(sets[s]);
        g.sets.push_back({optional_view(pair[0], p.sets[s].start), optional_view(pair[1], p.sets[s].start)});
    }
    py::gil_scoped_release unlocked;
    prefix_fast::backward(p, saved, g);
}

// The row losses of logits [N, V] are written, and, where they are wanted, the gradients in the logits'
// place.
void run_cross_entropy(py::handle logits, py::handle target, py::handle weight, py::handle loss,
                       int64_t ignored, float scale, float softcap, float smoothing, float z_loss,
                       bool gradient, int threads) {
    const TensorInfo x = describe(logits);
    const auto* targets = reinterpret_cast<const int64_t*>(describe(target).data);
    const auto* weights = weight.is_none() ? nullptr : reinterpret_cast<const float*>(describe(weight).data);
    auto* losses = reinterpret_cast<float*>(describe(loss).data);
    const CrossEntropy rows{x.data,  float_type(x), x.size[0], x.size[1], targets, weights,  losses,
                            ignored, scale,         softcap,   smoothing, z_loss,  gradient, threads};
    py::gil_scoped_release unlocked;
    prefix_fast::cross_entropy(rows);
}

prefix_fast::Activation activation_of(const std::string& name) {
    if (name == "silu") return prefix_fast::Activation::kSilu;
    if (name == "gelu_tanh") return prefix_fast::Activation::kGeluTanh;
    throw py::value_error("gated: expected silu or gelu_tanh, got " + name);
}

char* data_of(py::handle tensor) {
    return tensor.is_none() ? nullptr : describe(tensor).data;
}

prefix_fast::Gated read_gated(py::handle gate, py::handle up, const std::string& activation, int threads) {
    const TensorInfo x = describe(gate);
    prefix_fast::Gated unit;
    unit.gate = x.data, unit.up = data_of(up);
    unit.count = x.size[0], unit.dtype = float_type(x);
    unit.activation = activation_of(activation), unit.threads = threads;
    return unit;
}

void run_gated_forward(py::handle gate, py::handle up, py::handle out, const std::string& activation,
                       int threads) {
    prefix_fast::Gated unit = read_gated(gate, up, activation, threads);
    unit.out = data_of(out);
    py::gil_scoped_release unlocked;
    prefix_fast::gated_forward(unit);
}

void run_gated_backward(py::handle grad, py::handle gate, py::handle up, py::handle gate_grad,
                        py::handle up_grad, const std::string& activation, int threads) {
    prefix_fast::Gated unit = read_gated(gate, up, activation, threads);
    unit.grad = data_of(grad), unit.gate_grad = data_of(gate_grad), unit.up_grad = data_of(up_grad);
    py::gil_scoped_release unlocked;
    prefix_fast::gated_backward(unit);
}

// `grad` None: the forward.
void run_rms_norm(py::handle grad, py::handle x, py::handle weight, py::handle out, float eps, float offset,
                  int threads) {
    const TensorInfo rows = describe(out);
    const prefix_fast::RmsNorm norm{data_of(x),   data_of(weight),  data_of(grad), rows.data, rows.size[0],
                                    rows.size[1], float_type(rows), eps,           offset,    threads};
    py::gil_scoped_release unlocked;
    norm.grad == nullptr ? prefix_fast::rms_norm_forward(norm) : prefix_fast::rms_norm_backward(norm);
}

// For each phase of "forward" or "backward" (of everything), the multiply-adds of its items in the order in
// which threads take them.
py::list partition(py::handle problem, const std::string& pass) {
    Problem p;
    read_problem(problem, 1, p);
    const bool is_forward = pass == "forward";
    if (!is_forward && pass != "backward") {
        throw py::value_error("partition: expected forward or backward, got " + pass);
    }
    py::list phases;
    for (const std::vector<int64_t>& phase :
         is_forward ? prefix_fast::forward_partition(p) : prefix_fast::backward_partition(p)) {
        py::list costs;
        for (int64_t cost : phase) costs.append(cost);
        phases.append(costs);
    }
    return phases;
}

// Names of the instruction sets that this CPU and its operating system run.
py::list supported_isas() {
    py::list isas;
    isas.append("generic");
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) isas.append("avx2");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        isas.append("avx512");
        if (__builtin_cpu_supports("avx512bf16")) isas.append("avx512_bf16");
    }
#endif
    return isas;
}

double read_tensor(int threads, py::handle tensor) {
    const TensorInfo info = describe(tensor);
    if (info.rank != 1) throw std::invalid_argument("expected a tensor of one dimension");
    return prefix_fast::read_memory(threads, info.data, info.size[0] * bytes_of(float_type(info)));
}

bool has_openmp() {
#if defined(_OPENMP)
    return true;
#else
    return false;
#endif
}

}  // namespace

PYBIND11_MODULE(PREFIX_FAST_MODULE, m) {
    m.doc() = "Prefix attention on the CPU, compiled for one instruction set.";
    m.def("forward", &run_forward);
    m.def("backward", &run_backward);
    m.def("cross_entropy", &run_cross_entropy);
    m.def("gated_forward", &run_gated_forward);
    m.def("gated_backward", &run_gated_backward);
    m.def("rms_norm", &run_rms_norm);
    m.def("partition", &partition);
    m.def("supported_isas", &supported_isas);
    m.def("has_openmp", &has_openmp);
    m.def("scratch_bytes", [] { return prefix_fast::scratch_use().bytes.load(); });
    m.def("scratch_allocations", [] { return prefix_fast::scratch_use().allocations.load(); });
    m.def("multiply_add", &prefix_fast::multiply_add);
    m.def("multiply_pairs", &prefix_fast::multiply_pairs);
    m.def("exponentiate", &prefix_fast::exponentiate);
    m.def("read_memory", &read_tensor);
}
