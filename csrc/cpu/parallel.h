// Threads and their scratch memory. Results never depend on the number of threads: tasks are cut by shapes
// and data alone, every output has one writer, and sums over tasks are taken in task order.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace prefix_fast {

// Of the buffers of all threads: bytes that they hold now, and how often one has asked for memory.
struct ScratchUse {
    std::atomic<int64_t> bytes{0}, allocations{0};
};

inline ScratchUse& scratch_use() {
    static ScratchUse use;
    return use;
}

// A growing, 64-byte aligned buffer of floats that keeps its memory between calls: fresh pages cost more than
// a small kernel does.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    float* floats(int64_t count) {
        if (count > capacity_) {
            release();
            const int64_t rounded = (count + 1023) / 1024 * 1024;
            data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(rounded) * sizeof(float)));
            if (data_ == nullptr) throw std::bad_alloc();
            capacity_ = rounded;
            scratch_use().bytes += bytes();
            ++scratch_use().allocations;
        }
        return data_;
    }
    // Give the memory back if it is more than that many floats.
    void trim(int64_t kept) {
        if (capacity_ > kept) release();
    }

  private:
    int64_t bytes() const { return capacity_ * static_cast<int64_t>(sizeof(float)); }
    void release() {
        std::free(data_);
        scratch_use().bytes -= bytes();
        data_ = nullptr;
        capacity_ = 0;
    }

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
    kSlopes,        // of the softcap                     [g][key][16]
    kOutLanes,      // o or dq                            [g][D][16]
    kOutRows,       // o, dq or a merged row              [lane][D]
    kKeyTile,       // converted or cleaned keys          [key][D]
    kValueTile,     //
    kKeyColumns,    // pairs of keys                      [key / 2][D]
    kPacked,        // ds in pairs of lanes               [g][key][8]
    kQueryPairs,    // pairs of q's rows                  [lane / 2][D]
    kGradPairs,     // pairs of do's rows
    kDropout,       // 0 or 1 / (1 - p)                   [g][key][16]
    kKept,          // dropped p, or p in pairs of lanes  [g][key][16]
    kOwnKeyGrad,    // dk of a row's own keys             [key][D]
    kOwnValueGrad,  //
    kCallSums,      // partial states of the whole call, owned by the calling thread
    kSlots
};

using Scratch = std::array<Buffer, kSlots>;

// What a buffer may keep, in floats: the partial sums of a call, and every other. Larger ones go back to the
// system when the call, or the thread's part of it, ends.
constexpr int64_t kKeptSums = int64_t{64} << 20;
constexpr int64_t kKeptOthers = int64_t{8} << 20;

inline Scratch& scratch() {
    static thread_local Scratch buffers;
    return buffers;
}

// To be called at the end of a call, by the thread that made it.
inline void trim_sums() {
    scratch()[kCallSums].trim(kKeptSums);
}

inline void trim_others() {
    for (int slot = 0; slot < kCallSums; ++slot) scratch()[slot].trim(kKeptOthers);
}

// Whether this thread has come through a fork. An OpenMP runtime may keep a pool for it whose threads exist
// in the parent alone, and would wait for them forever.
inline bool& came_through_fork() {
    static thread_local bool forked = false;
    return forked;
}
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { came_through_fork() = true; });

inline bool can_start_team() {
#if defined(_OPENMP)
    return !omp_in_parallel();
#else
    return false;
#endif
}

// body() on `team` threads at once, one of them this.
template <class Body>
void run_team(int team, const Body& body) {
#if defined(__SANITIZE_THREAD__)  // which cannot see the barriers of an OpenMP runtime
    std::vector<std::thread> others;
    for (int i = 1; i < team; ++i) others.emplace_back(body);
    body();
    for (std::thread& other : others) other.join();
#else
#pragma omp parallel num_threads(team)
    body();
#endif
}

// Costliest first, so that no long item is left for the end. Costs of one power of two keep their order, in
// which neighbours read the same keys.
template <class Item>
void costliest_first(std::vector<Item>& items) {
    const auto size = [](const Item& item) { return std::ilogb(static_cast<float>(item.cost + 1)); };
    const auto before = [&](const Item& a, const Item& b) { return size(a) > size(b); };
    if (!std::is_sorted(items.begin(), items.end(), before))
        std::stable_sort(items.begin(), items.end(), before);
}

template <class Item>
std::vector<int64_t> costs_of(const std::vector<Item>& items) {
    std::vector<int64_t> costs;
    for (const Item& item : items) costs.push_back(item.cost);
    return costs;
}

// task(0), ..., task(count - 1) in any order on up to `threads` threads; the first exception is rethrown
// here. One thread means no parallel region at all.
template <class Task>
void parallel_for(int threads, int64_t count, const Task& task) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;
    const auto work = [&] {
        try {
            for (int64_t i = next++; i < count && !failed; i = next++) task(i);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
        }
        trim_others();
    };
    const int team = static_cast<int>(std::min<int64_t>(threads, count));
    if (team <= 1 || !can_start_team()) {
        work();
    } else if (came_through_fork()) {
        std::thread([&] { run_team(team, work); }).join();  // a new thread has no pool yet
    } else {
        run_team(team, work);
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace prefix_fast
