// What a frozen model computes between its matrix products, in one pass each way: gated units and RMS norms.
#pragma once

#include <cstdint>

#include "problem.h"

namespace prefix_fast {

enum class Activation { kSilu, kGeluTanh };

// out = act(gate) up, of `count` contiguous elements. The backward reads `grad` instead of writing `out`;
// without `up` it is the activation alone.
struct Gated {
    const char *gate = nullptr, *up = nullptr;
    const char* grad = nullptr;  // of out
    char* out = nullptr;
    char *gate_grad = nullptr, *up_grad = nullptr;
    int64_t count = 0;
    DType dtype = DType::kFloat32;
    Activation activation = Activation::kSilu;
    int threads = 1;
};

void gated_forward(const Gated& unit);
void gated_backward(const Gated& unit);

// out = x rsqrt(mean x^2 + eps) (offset + weight) of contiguous rows x[H].
struct RmsNorm {
    const char *x = nullptr, *weight = nullptr;  // [rows, H], [H]
    const char* grad = nullptr;                  // of out
    char* out = nullptr;                         // the backward's is dx
    int64_t rows = 0, size = 0;
    DType dtype = DType::kFloat32;
    float eps = 0.0f, offset = 0.0f;
    int threads = 1;
};

void rms_norm_forward(const RmsNorm& norm);
void rms_norm_backward(const RmsNorm& norm);

}  // namespace prefix_fast
