// Gated units, where act(x) = x sigmoid(z(x)):
//
//   silu        z = x                            gelu, tanh form        z = 2 sqrt(2/pi) (x + 0.044715 x^3)
//   out = act(gate) up        dup = act(gate) dout        dgate = (s + gate s (1 - s) z') up dout,  s =
//   sigmoid(z)
//
// RMS norms, with r = rsqrt(mean x^2 + eps) and g = (offset + weight) dout:
//
//   out = x r (offset + weight)        dx = r (g - x r^2 mean(g x))
//
// In float32, whatever the storage; nothing is kept for the backward but the inputs. A task is a fixed piece
// of the work, so that no thread count changes a bit.
#include "pointwise.h"

#include <algorithm>
#include <cmath>

#include "half.h"
#include "lanes.h"
#include "parallel.h"
#include "simd.h"

namespace prefix_fast {
namespace {

constexpr int64_t kPiece = 512;         // elements that are converted at a time, a multiple of every width
constexpr int64_t kTask = 32 * kPiece;  // elements of a task: few enough for a team, enough to pay for one

struct Slope {
    Vec value;  // z
    Vec slope;  // z'
};

PF_INLINE Slope inner(Vec x, Activation activation) {
    if (activation == Activation::kSilu) return {x, broadcast(1.0f)};
    // Beyond the bound s is 0 or 1 and the slope of no account, but x^3 may overflow.
    x = max(broadcast(-100.0f), min(x, broadcast(100.0f)));
    const Vec factor = broadcast(1.5957691216057308f), cubic = broadcast(0.044715f), square = x * x;
    return {factor * fma(cubic * square, x, x),
            factor * fma(broadcast(3.0f) * cubic, square, broadcast(1.0f))};
}

// 1 / (1 + e^-z); the bound keeps e^-z finite, and the quotient a normal number.
PF_INLINE Vec sigmoid(Vec z) {
    const Vec e = exp2(min(broadcast(-kLog2E) * z, broadcast(126.0f)));
    return broadcast(1.0f) / (broadcast(1.0f) + e);
}

struct Piece {
    alignas(64) float gate[kPiece], up[kPiece], grad[kPiece];
};

void read(const char* source, DType dtype, int64_t first, int64_t count, float* target) {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    read_row(source + first * bytes, dtype, count, 1.0f, target);
    std::fill(target + count, target + round_up(count, kWidth), 0.0f);
}

void write(char* target, DType dtype, int64_t first, int64_t count, const float* source) {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    write_row(target + first * bytes, dtype, count, 1.0f, source);
}

// step(first element, elements), in pieces
template <class Step>
void in_pieces(int64_t elements, int threads, const Step& step) {
    parallel_for(threads, ceil_div(elements, kTask), [&](int64_t task) {
        const int64_t end = std::min(elements, (task + 1) * kTask);
        for (int64_t at = task * kTask; at < end; at += kPiece) step(at, std::min(kPiece, end - at));
    });
}

template <Activation kind>
void forward_piece(const Gated& unit, int64_t first, int64_t count) {
    Piece piece;
    read(unit.gate, unit.dtype, first, count, piece.gate);
    if (unit.up != nullptr) read(unit.up, unit.dtype, first, count, piece.up);
    for (int64_t i = 0; i < count; i += kWidth) {
        const Vec x = load(piece.gate + i), active = x * sigmoid(inner(x, kind).value);
        store(piece.gate + i, unit.up == nullptr ? active : active * load(piece.up + i));
    }
    write(unit.out, unit.dtype, first, count, piece.gate);
}

template <Activation kind>
void backward_piece(const Gated& unit, int64_t first, int64_t count) {
    Piece piece;
    read(unit.gate, unit.dtype, first, count, piece.gate);
    read(unit.grad, unit.dtype, first, count, piece.grad);
    if (unit.up != nullptr) read(unit.up, unit.dtype, first, count, piece.up);
    for (int64_t i = 0; i < count; i += kWidth) {
        const Vec x = load(piece.gate + i), grad = load(piece.grad + i);
        const Slope z = inner(x, kind);
        const Vec s = sigmoid(z.value), active = x * s;
        const Vec slope = fma(active * (broadcast(1.0f) - s), z.slope, s);
        store(piece.gate + i, unit.up == nullptr ? slope * grad : slope * grad * load(piece.up + i));
        store(piece.up + i, active * grad);
    }
    write(unit.gate_grad, unit.dtype, first, count, piece.gate);
    if (unit.up != nullptr) write(unit.up_grad, unit.dtype, first, count, piece.up);
}

// row(index, x or g [H], x [H], weight [H]) in scratch rows padded with zeros
template <class Row>
void in_rows(const RmsNorm& norm, const Row& row) {
    const int64_t each = std::max<int64_t>(1, kTask / std::max<int64_t>(1, norm.size));
    parallel_for(norm.threads, ceil_div(norm.rows, each), [&](int64_t task) {
        const int64_t padded = round_up(norm.size, kWidth);
        float* weight = scratch()[kKeyTile].floats(padded);
        read(norm.weight, norm.dtype, 0, norm.size, weight);
        for (int64_t h = 0; h < norm.size; ++h) weight[h] += norm.offset;
        float *x = scratch()[kScores].floats(padded), *g = scratch()[kGradScores].floats(padded);
        const int64_t end = std::min(norm.rows, (task + 1) * each);
        for (int64_t i = task * each; i < end; ++i) {
            read(norm.x, norm.dtype, i * norm.size, norm.size, x);
            Vec squares = {};
            for (int64_t h = 0; h < padded; h += kWidth) squares = fma(load(x + h), load(x + h), squares);
            const float mean = sum_lanes(squares) / static_cast<float>(norm.size);
            row(i, 1.0f / std::sqrt(mean + norm.eps), x, weight, g);
            write(norm.out, norm.dtype, i * norm.size, norm.size, x);
        }
    });
}

}  // namespace

void gated_forward(const Gated& unit) {
    in_pieces(unit.count, unit.threads, [&](int64_t first, int64_t count) {
        if (unit.activation == Activation::kSilu) return forward_piece<Activation::kSilu>(unit, first, count);
        forward_piece<Activation::kGeluTanh>(unit, first, count);
    });
}

void gated_backward(const Gated& unit) {
    in_pieces(unit.count, unit.threads, [&](int64_t first, int64_t count) {
        if (unit.activation == Activation::kSilu)
            return backward_piece<Activation::kSilu>(unit, first, count);
        backward_piece<Activation::kGeluTanh>(unit, first, count);
    });
}

void rms_norm_forward(const RmsNorm& norm) {
    in_rows(norm, [&](int64_t, float r, float* x, const float* weight, float*) {
        const Vec factor = broadcast(r);
        for (int64_t h = 0; h < norm.size; h += kWidth) store(x + h, load(x + h) * factor * load(weight + h));
    });
}

void rms_norm_backward(const RmsNorm& norm) {
    in_rows(norm, [&](int64_t i, float r, float* x, const float* weight, float* g) {
        read(norm.grad, norm.dtype, i * norm.size, norm.size, g);
        Vec products = {};
        for (int64_t h = 0; h < norm.size; h += kWidth) {
            const Vec scaled = load(g + h) * load(weight + h);
            store(g + h, scaled);
            products = fma(scaled, load(x + h), products);
        }
        const float mean = sum_lanes(products) / static_cast<float>(norm.size);
        const Vec factor = broadcast(r), along = broadcast(mean * r * r);
        for (int64_t h = 0; h < norm.size; h += kWidth)
            store(x + h, factor * (load(g + h) - load(x + h) * along));
    });
}

}  // namespace prefix_fast
