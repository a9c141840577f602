// The rates that bound the kernels: fused multiply-adds (and products of bfloat16 pairs) in registers,
// weights of a softmax from scores in the first-level cache, bytes read from memory.
//
// Every chain of sums starts elsewhere and ends in `sink`, so that the compiler can neither merge chains nor
// drop them; all values stay finite and normal.
#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <utility>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace prefix_fast {
namespace {

// Independent sums: more than the latency of an FMA times the FMAs begun in a cycle, within the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif
constexpr int64_t kPassScores = 1024;         // of one pass of exponentials: 4 KiB in, 4 KiB out
constexpr int64_t kPiece = int64_t{1} << 16;  // bytes that a thread reads at a time

using Clock = std::chrono::steady_clock;

std::atomic<float> sink{0.0f};

double seconds(Clock::duration time) {
    return std::max(std::chrono::duration<double>(time).count(), 1e-9);
}

void keep(const Vec* values, int count) {
    Vec total{};
    for (int i = 0; i < count; ++i) total += values[i];
    sink.store(sum_lanes(total), std::memory_order_relaxed);
}

// The sum of the threads' own rates: what one loses by starting late is no part of them.
template <class Loop>
double rate(int threads, double work, const Loop& loop) {
    std::vector<double> rates(static_cast<size_t>(threads));
    parallel_for(threads, threads, [&](int64_t thread) {
        const Clock::time_point start = Clock::now();
        loop();
        rates[static_cast<size_t>(thread)] = work / seconds(Clock::now() - start);
    });
    return std::accumulate(rates.begin(), rates.end(), 0.0);
}

// chain[i] <- step(chain[i]), `steps` times
template <class Step>
PF_INLINE void run_chains(int64_t steps, Step step) {
    Vec chain[kChains];
    const float start = sink.load(std::memory_order_relaxed);
    for (int i = 0; i < kChains; ++i) chain[i] = broadcast(start) + broadcast(1.0f + static_cast<float>(i));
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 24
        for (int i = 0; i < kChains; ++i) chain[i] = step(chain[i]);
    }
    keep(chain, kChains);
}

}  // namespace

double multiply_add(int threads, int64_t steps) {
    return rate(threads, 2.0 * kWidth * kChains * static_cast<double>(steps), [&] {
        const Vec half = broadcast(0.5f), one = broadcast(1.0f);
        run_chains(steps, [&](Vec sum) { return fma(sum, half, one); });
    });
}

double multiply_pairs(int threads, int64_t steps) {
#if defined(__AVX512BF16__)
    return rate(threads, 4.0 * kWidth * kChains * static_cast<double>(steps), [&] {
        const Vec small = (Vec)broadcast_int(0x39803980);  // two times 2^-12
        run_chains(steps, [&](Vec sum) { return Pairs::fma(small, small, sum); });
    });
#else
    (void)threads, (void)steps;
    return 0.0;
#endif
}

double exponentiate(int threads, int64_t steps) {
    return rate(threads, static_cast<double>(kPassScores * steps), [&] {
        alignas(64) float scores[kPassScores], weights[kPassScores];
        for (int64_t j = 0; j < kPassScores; ++j) scores[j] = -static_cast<float>(j % 64) / 8.0f;
        const Vec origin = broadcast(1.0f);
        Vec sum{};
        for (int64_t s = 0; s < steps; ++s) {
            for (int64_t j = 0; j < kPassScores; j += kWidth) {
                const Vec weight = exp2(load(scores + j) - origin);
                sum += weight;
                store(weights + j, weight);
            }
            std::swap(scores[s % kPassScores], weights[0]);  // a pass needs the one before
        }
        keep(&sum, 1);
    });
}

double read_memory(int threads, const char* data, int64_t bytes) {
    const int64_t pieces = bytes / kPiece;
    std::vector<Clock::time_point> starts(static_cast<size_t>(pieces)), ends(static_cast<size_t>(pieces));
    parallel_for(threads, pieces, [&](int64_t piece) {
        starts[static_cast<size_t>(piece)] = Clock::now();
        const float* from = reinterpret_cast<const float*>(data + piece * kPiece);
        constexpr int kSums = 4;
        Vec sum[kSums] = {};
        for (int64_t j = 0; j < kPiece / 4; j += kSums * kWidth) {
            for (int i = 0; i < kSums; ++i) sum[i] += load(from + j + i * kWidth);
        }
        keep(sum, kSums);
        ends[static_cast<size_t>(piece)] = Clock::now();
    });
    if (pieces == 0) return 0.0;
    const auto first = *std::min_element(starts.begin(), starts.end());
    const auto last = *std::max_element(ends.begin(), ends.end());
    return static_cast<double>(pieces * kPiece) / seconds(last - first);
}

}  // namespace prefix_fast
