// Python's view of the CUDA kernels. Each function reads a Problem, asks `allocate(bytes)` for scratch, and
// launches on a stream given as an integer; the tensors' device is the current one. Scratch that is freed
// when a function returns may be in use still: as with PyTorch's allocator, only work on the same stream can
// get it next.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "launchers.h"
#include "plan.h"
#include "read_call.h"

namespace py = pybind11;
using prefix_fast::describe;
using prefix_fast::get;
using prefix_fast::Names;
using prefix_fast::names;
using prefix_fast::TensorInfo;
using namespace prefix_fast::cuda;

namespace {

// Where a call runs, as Python gives it.
struct Place {
    void* stream;
    Device device;
    py::handle allocate;
    std::vector<py::object> scratch;

    explicit Place(py::handle source)
        : stream(reinterpret_cast<void*>(source.attr("stream").cast<uint64_t>())),
          device{source.attr("multiprocessors").cast<int>(), source.attr("least_chunk").cast<int>(),
                 source.attr("least_tiles").cast<int>()},
          allocate(source) {}

    template <typename T>
    T* take(int64_t count) {
        scratch.push_back(allocate.attr("allocate")(count * int64_t{sizeof(T)}));
        return reinterpret_cast<T*>(describe(scratch.back()).data);
    }
};

// Raises where the stream is not of the device that the call's tensors are on.
void check_stream(const Place& place, py::handle where) {
    if (place.stream == nullptr) return;  // the current device's own
    const int wanted = where.attr("index").cast<int>(), found = prefix_fast_device_of_stream(place.stream);
    if (found >= 0 && found != wanted) {
        throw py::value_error("cuda backend: expected a stream of cuda:" + std::to_string(wanted) +
                              ", where the tensors are, got one of cuda:" + std::to_string(found) +
                              "; enter torch.cuda.device first");
    }
}

// cudaError_t as an exception; a launch has cleared what can be cleared of it.
void check(int error, const char* what) {
    if (error == 0) return;
    throw std::runtime_error(std::string("cuda backend: launching the ") + what + " failed with CUDA error " +
                             std::to_string(error) + " (" + prefix_fast_error_name(error) + ")");
}

// Returns the name of the kernel that ran.
std::string run_forward(py::handle problem, py::handle out, py::handle lse, py::handle where, bool tf32) {
    Place place(where);
    check_stream(place, where);
    const Call call = read_call(problem, tf32);
    const bool packed = is_packed(call);
    const Results results{read_tokens(out, packed), read_levels(lse, packed)};
    const Launchers& launch = launchers_of(call);
    if (!splits(call, place.device)) {
        check(launch.forward(&call, &results, place.stream), "forward kernel");
        return "forward";
    }
    Partials partials{};
    const int64_t parts = divide_keys(call, place.device, launch.decode_tile(call.head_dim, false),
                                      launch.decode_tile(call.head_dim, true), partials);
    const int64_t slots = int64_t{call.rows} * call.heads * call.max_queries;
    partials.out = place.take<float>(parts * slots * call.head_dim);
    partials.lse = place.take<float>(parts * slots);
    const py::object counters = where.attr("counters")(int64_t{call.rows} * call.kv_heads);
    partials.counters = reinterpret_cast<int32_t*>(describe(counters).data);
    check(launch.decode(&call, &partials, &results, place.stream), "split forward kernel");
    return "decode";
}

// The wanted gradients of one set's keys and values, `key` and `value` None where not wanted, in `parts`
// parts.
struct SetGradients {
    KeyGradients grads{};
    int64_t elements = 0;
    int parts = 1;

    SetGradients(const Call& call, int index, py::handle key, py::handle value) {
        const SegmentSet& set = call.sets[index];
        const bool packed = set.cu_seqlens.data != nullptr;
        grads.set = index;
        grads.of = set;
        grads.key = read_tokens(key, packed);
        grads.value = read_tokens(value, packed);
        grads.splits = grads.query_splits = 1;
        elements = (packed ? 1 : set.count) * int64_t{set.size} * call.kv_heads * call.head_dim;
    }

    bool wanted() const { return elements > 0 && (grads.key.data != nullptr || grads.value.data != nullptr); }

    void take_parts(Place& place) {
        parts = grads.splits * grads.query_splits;
        grads.key_part = grads.value_part = elements;
        if (parts > 1 && grads.key.data != nullptr) grads.key_parts = place.take<float>(parts * elements);
        if (parts > 1 && grads.value.data != nullptr) grads.value_parts = place.take<float>(parts * elements);
    }

    void add_parts(const Call& call, Place& place) const {
        const int32_t dtype = call.sets[grads.set].is_float32 ? int32_t{kFloat32} : call.dtype;
        const auto add = [&](const float* partial, const Tokens& target) {
            if (partial == nullptr) return;
            check(launchers_of(call).add_parts(partial, target.data, elements, parts, dtype, place.stream),
                  "sum of parts");
        };
        add(grads.key_parts, grads.key);
        add(grads.value_parts, grads.value);
    }
};

void differentiate_set(const Call& call, const Saved& saved, SetGradients& set, Place& place) {
    if (!set.wanted()) return;
    divide_set(call, place.device, set.grads.set, set.grads);
    set.take_parts(place);
    check(launchers_of(call).backward_keys(&call, &saved, &set.grads, place.stream),
          "kernel of key and value gradients");
    set.add_parts(call, place);
}

// Returns whether one kernel has made the gradients of the queries and of set 0.
bool differentiate_short(const Call& call, const Saved& saved, const Tokens& query, SetGradients& set,
                         Place& place) {
    const int splits = launchers_of(call).short_serves(call.head_dim) ? short_splits(call, place.device) : 0;
    if (splits == 0) return false;
    set.grads.splits = splits;
    set.take_parts(place);
    check(launchers_of(call).backward_short(&call, &saved, &query, &set.grads, place.stream),
          "fused kernel of query and prefix gradients");
    set.add_parts(call, place);
    return true;
}

// Returns the names of the kernels that ran.
std::string run_backward(py::handle problem, py::handle out, py::handle lse, py::handle grad_out,
                         py::handle grad_lse, py::handle grads, py::handle where, bool tf32) {
    Place place(where);
    check_stream(place, where);
    const Call call = read_call(problem, tf32);
    const bool packed = is_packed(call);
    const Launchers& launch = launchers_of(call);
    Saved saved{read_tokens(out, packed), read_tokens(grad_out, packed), read_levels(lse, packed),
                read_levels(grad_lse, packed)};
    saved.capacity = scratch_capacity(call);
    saved.levels = place.take<float>(call.heads * saved.capacity);
    saved.deltas = place.take<float>(call.heads * saved.capacity);
    check(launch.prepare(&call, &saved, place.stream), "kernel of lse and delta");
    const Tokens query = read_tokens(get(grads, names().query), packed);
    const auto sets = py::reinterpret_borrow<py::tuple>(get(grads, names().sets));
    std::vector<SetGradients> wanted;
    for (int s = 0; s < call.num_sets; ++s) {
        const auto pair = py::reinterpret_borrow<py::tuple>(sets[s]);
        wanted.emplace_back(call, s, pair[0], pair[1]);
    }
    wanted.emplace_back(call, call.num_sets, get(grads, names().key), get(grads, names().value));
    std::string ran = "prepare";
    int first = 0;
    if (query.data != nullptr && call.num_sets > 0 && wanted[0].wanted() &&
        differentiate_short(call, saved, query, wanted[0], place)) {
        ran += " short";
        first = 1;
    } else if (query.data != nullptr) {
        check(launch.backward_queries(&call, &saved, &query, place.stream), "kernel of query gradients");
        ran += " dq";
    }
    for (size_t s = first; s < wanted.size(); ++s) {
        differentiate_set(call, saved, wanted[s], place);
        if (wanted[s].wanted()) ran += " dkv";
    }
    return ran;
}

}  // namespace

PYBIND11_MODULE(PREFIX_FAST_MODULE, m) {
    m.doc() = "Prefix attention on CUDA devices.";
    m.attr("maximum_sets") = kMaximumSets;
    m.attr("architectures") = prefix_fast_architectures();
    m.attr("runtime_version") = prefix_fast_runtime_version();
    m.def("driver_version", &prefix_fast_driver_version);
    m.def("forward", &run_forward);
    m.def("backward", &run_backward);
}
