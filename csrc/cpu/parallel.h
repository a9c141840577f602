// Threads and their scratch memory. Results never depend on the number of threads: tasks are cut by shapes
// and data alone, every output has one writer, and sums over tasks are taken in task order.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace prefix_fast {

// A growing, 64-byte aligned buffer of floats that keeps its memory between calls: fresh pages cost more than
// a small kernel does.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    float* floats(int64_t count) {
        if (count > capacity_) {
            release();
            const int64_t rounded = (count + 1023) / 1024 * 1024;
            data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(rounded) * sizeof(float)));
            if (data_ == nullptr) throw std::bad_alloc();
            capacity_ = rounded;
        }
        return data_;
    }
    void release() {
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
    }
    int64_t capacity() const { return capacity_; }

  private:
    float* data_ = nullptr;
    int64_t capacity_ = 0;
};

// Named scratch of one thread.
enum Slot {
    kQueryLanes,    // q, scale * log2 e folded in       [g][D][16]
    kQueryRows,     // scale * q                          [lane][D]
    kGradLanes,     // do                                 [g][D][16]
    kGradRows,      // do                                 [lane][D]
    kScores,        // s, then p                          [g][key][16]
    kGradScores,    // dp, then ds                        [g][key][16]
    kOutLanes,      // o or dq                            [g][D][16]
    kOutRows,       // o, dq or a merged row              [lane][D]
    kKeyTile,       // converted or cleaned keys          [key][D]
    kValueTile,     //
    kKeyColumns,    // pairs of keys                      [key / 2][D]
    kPacked,        // p or ds in pairs                   [g][key][16]
    kQueryPairs,    // pairs of q's rows                  [lane / 2][D]
    kGradPairs,     // pairs of do's rows
    kDropout,       // 0 or 1 / (1 - p)                   [g][key][16]
    kKept,          // dropped p                          [g][key][16]
    kOwnKeyGrad,    // dk of a row's own keys             [key][D]
    kOwnValueGrad,  //
    kCallSums,      // partial states of the whole call, owned by the calling thread
    kSlots
};

using Scratch = std::array<Buffer, kSlots>;

// What the partial sums of a call may keep afterwards; larger ones go back to the system.
constexpr int64_t kKeptFloats = int64_t{64} << 20;

inline Scratch& scratch() {
    static thread_local Scratch buffers;
    return buffers;
}

// To be called at the end of a call, by the thread that made it.
inline void trim_scratch() {
    Buffer& sums = scratch()[kCallSums];
    if (sums.capacity() > kKeptFloats) sums.release();
}

// task(0), ..., task(count - 1) in any order on up to `threads` threads; the first exception is rethrown
// here. One thread means no parallel region at all, which keeps forked workers away from a thread pool that
// they do not have.
template <class Task>
void parallel_for(int threads, int64_t count, const Task& task) {
#if defined(_OPENMP)
    if (threads > 1 && count > 1 && !omp_in_parallel()) {
        std::exception_ptr failure;
        std::atomic<bool> failed{false};
        const int team = count < threads ? static_cast<int>(count) : threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
        for (int64_t i = 0; i < count; ++i) {
            if (failed.load(std::memory_order_relaxed)) continue;
            try {
                task(i);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
            }
        }
        if (failure) std::rethrow_exception(failure);
        return;
    }
#endif
    (void)threads;
    for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace prefix_fast
