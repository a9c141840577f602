// The loss of rows of logits, and in the logits' place its gradient.
#pragma once

#include <cstdint>

#include "problem.h"

namespace prefix_fast {

// Rows x[V] of raw logits, contiguous, with one target each.
struct CrossEntropy {
    char* logits = nullptr;  // [rows, V]; becomes the gradient
    DType dtype = DType::kFloat32;
    int64_t rows = 0, vocabulary = 0;
    const int64_t* target = nullptr;  // [rows] in [0, V), or `ignored`: no loss, a gradient of zeros
    const float* weight = nullptr;    // [rows]; null: 1
    float* loss = nullptr;            // [rows]
    int64_t ignored = -100;
    float scale = 1.0f, softcap = 0.0f;  // 0: none
    float smoothing = 0.0f, z_loss = 0.0f;
    bool gradient = true;  // false: the logits stay as they are
    int threads = 1;
};

void cross_entropy(const CrossEntropy& rows);

}  // namespace prefix_fast
