// For each row x of raw logits with target t and weight w, where y = cap tanh(scale x / cap), or scale x:
//
//   lse  = log sum_v e^{y_v}          p_v = e^{y_v - lse}
//   loss = w (lse - (1 - eps) y_t - eps mean_v y_v + z lse^2)
//   dx_v = w ((1 + 2 z lse) p_v - (1 - eps) [v = t] - eps / V) scale (1 - tanh^2)
//
// A row is one thread's from its logits to its gradient, in float32; sums run in an order that V alone
// decides. The matrix products around it take a hundred times as long.
#include "cross_entropy.h"

#include <algorithm>

#include "half.h"
#include "lanes.h"
#include "parallel.h"
#include "scores.h"
#include "simd.h"

namespace prefix_fast {
namespace {

constexpr int kSums = 2;  // independent sums of vectors; more leave the registers of AVX2
constexpr int64_t kStep = kSums * kWidth;

// y in log2 units, -inf beyond V, and where it is capped the slopes 1 - tanh^2.
void read_logits(const CrossEntropy& rows, const char* source, float* y, float* slopes) {
    const int64_t count = rows.vocabulary, padded = round_up(count, kStep);
    read_row(source, rows.dtype, count, rows.scale * kLog2E, y);
    std::fill(y + count, y + padded, -kInf);
    if (slopes == nullptr) return;
    const Softcap capped(rows.softcap);
    for (int64_t v = 0; v < count; v += kWidth) {
        Vec slope;
        store(y + v, capped(load(y + v), slope));
        store(slopes + v, slope);
    }
    std::fill(y + count, y + padded, -kInf);
}

float largest(const float* y, int64_t count) {
    Vec top[kSums];
    std::fill_n(top, kSums, broadcast(-kInf));
    for (int64_t v = 0; v < count; v += kStep) {
        for (int i = 0; i < kSums; ++i) top[i] = max(top[i], load(y + v + i * kWidth));
    }
    float highest = -kInf;
    for (const Vec& part : top) {
        for (int lane = 0; lane < kWidth; ++lane) highest = std::max(highest, part[lane]);
    }
    return highest;
}

// sum_v 2^(y_v - origin)
float sum_of_weights(const float* y, int64_t count, float origin) {
    const Vec reference = broadcast(origin);
    Vec part[kSums] = {};
    for (int64_t v = 0; v < count; v += kStep) {
        for (int i = 0; i < kSums; ++i) part[i] += exp2(load(y + v + i * kWidth) - reference);
    }
    return sum_lanes(part[0] + part[1]);
}

float mean_of(const float* y, int64_t count) {
    double total = 0.0;
    for (int64_t v = 0; v < count; ++v) total += y[v];
    return static_cast<float>(total / static_cast<double>(count));
}

// y_v <- (weighted 2^(y_v - origin) - even - picked [v = target]) slope_v
void differentiate(int64_t count, float origin, float weighted, float even, int64_t target, float picked,
                   const float* slopes, float* y) {
    const Vec reference = broadcast(origin), factor = broadcast(weighted), less = broadcast(even);
    for (int64_t v = 0; v < count; v += kWidth)
        store(y + v, fma(exp2(load(y + v) - reference), factor, -less));
    y[target] -= picked;
    if (slopes == nullptr) return;
    for (int64_t v = 0; v < count; v += kWidth) store(y + v, load(y + v) * load(slopes + v));
}

void run_row(const CrossEntropy& rows, int64_t i) {
    const int64_t count = rows.vocabulary, target = rows.target[i];
    char* logits = rows.logits + i * count * (rows.dtype == DType::kFloat32 ? 4 : 2);
    float* y = scratch()[kScores].floats(round_up(count, kStep));
    if (target == rows.ignored) {
        rows.loss[i] = 0.0f;
        std::fill_n(y, count, 0.0f);
        if (rows.gradient) write_row(logits, rows.dtype, count, 1.0f, y);
        return;
    }
    float* slopes = rows.softcap > 0.0f ? scratch()[kSlopes].floats(round_up(count, kStep)) : nullptr;
    read_logits(rows, logits, y, slopes);
    const float highest = largest(y, count), total = sum_of_weights(y, count, highest);
    const float level = log2(broadcast(total))[0], lse = kLn2 * (highest + level);
    const float weight = rows.weight == nullptr ? 1.0f : rows.weight[i], at_target = y[target];
    float loss = kLn2 * (highest - at_target + level) + rows.z_loss * lse * lse;
    if (rows.smoothing > 0.0f) loss += rows.smoothing * kLn2 * (at_target - mean_of(y, count));
    rows.loss[i] = weight * loss;
    if (!rows.gradient) return;
    const float factor = weight * rows.scale;
    differentiate(count, highest, factor * (1.0f + 2.0f * rows.z_loss * lse) / total,
                  factor * rows.smoothing / static_cast<float>(count), target,
                  factor * (1.0f - rows.smoothing), slopes, y);
    write_row(logits, rows.dtype, count, 1.0f, y);
}

}  // namespace

void cross_entropy(const CrossEntropy& rows) {
    parallel_for(rows.threads, rows.rows, [&](int64_t i) { run_row(rows, i); });
}

}  // namespace prefix_fast
