// What pybind11 modules read of a torch tensor without a torch header: its pointer, shape, strides and dtype.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace prefix_fast {

namespace py = pybind11;

// Attribute names as Python strings, made once; looking up by char* would build one for every access. Never
// freed: module teardown may come after the interpreter's.
struct Names {
    py::str query{"query"}, key{"key"}, value{"value"}, sets{"sets"}, ids{"ids"}, lengths{"lengths"};
    py::str cu_seqlens{"cu_seqlens"}, cu_seqlens_q{"cu_seqlens_q"}, cu_seqlens_k{"cu_seqlens_k"};
    py::str max_seqlen_q{"max_seqlen_q"}, key_mask{"key_mask"}, attn_bias{"attn_bias"},
        is_causal{"is_causal"};
    py::str query_offset{"query_offset"}, dropout_p{"dropout_p"}, dropout_seed{"dropout_seed"},
        scale{"scale"}, plan{"plan"};
    py::str window{"window"}, softcap{"softcap"}, sinks{"sinks"}, bias{"bias"}, in_window{"in_window"};
    py::str data_ptr{"data_ptr"}, stride{"stride"}, shape{"shape"}, dtype{"dtype"};
};

inline const Names& names() {
    static const Names* all = new Names();
    return *all;
}

struct DTypes {
    py::module_ torch = py::module_::import("torch");
    py::object float32 = torch.attr("float32"), bfloat16 = torch.attr("bfloat16"),
               float16 = torch.attr("float16");
    py::object int64 = torch.attr("int64"), int32 = torch.attr("int32"), int16 = torch.attr("int16");
    py::object int8 = torch.attr("int8"), uint8 = torch.attr("uint8");
};

inline const DTypes& dtypes() {
    static const DTypes* all = new DTypes();
    return *all;
}

inline py::object get(py::handle object, const py::str& name) {
    PyObject* found = PyObject_GetAttr(object.ptr(), name.ptr());
    if (found == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

constexpr int kMaximumRank = 4;

struct TensorInfo {
    char* data = nullptr;
    int rank = 0;
    int64_t size[kMaximumRank] = {}, stride[kMaximumRank] = {};  // elements
    py::object dtype;
};

inline TensorInfo describe(py::handle tensor) {
    TensorInfo info;
    const auto shape = py::reinterpret_borrow<py::tuple>(get(tensor, names().shape));
    PyObject* pointer = PyObject_CallMethodNoArgs(tensor.ptr(), names().data_ptr.ptr());
    if (pointer == nullptr) throw py::error_already_set();
    info.data = static_cast<char*>(PyLong_AsVoidPtr(py::reinterpret_steal<py::object>(pointer).ptr()));
    PyObject* strides = PyObject_CallMethodNoArgs(tensor.ptr(), names().stride.ptr());
    if (strides == nullptr) throw py::error_already_set();
    const auto stride = py::reinterpret_steal<py::tuple>(strides);
    info.rank = static_cast<int>(shape.size());
    if (info.rank > kMaximumRank) throw std::invalid_argument("expected tensors of at most 4 dimensions");
    for (int d = 0; d < info.rank; ++d) {
        info.size[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d));
        info.stride[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), d));
    }
    info.dtype = get(tensor, names().dtype);
    return info;
}

}  // namespace prefix_fast
