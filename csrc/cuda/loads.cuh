// Runs of rows of global memory, a tile at a time into shared memory.
//
// A thread copies one 16-byte chunk of every kStep-th row of a tile, so that its addresses in either memory
// are one sum apart: a tile costs a thread a product and, for each of its rows, an addition and a comparison.
// Rows of the tile's own type are copied asynchronously and are under way until the group of copies is waited
// for.
#pragma once

#include <cstdint>

#include "elements.cuh"
#include "memory.cuh"
#include "pipeline.cuh"
#include "segments.cuh"
#include "tiles.cuh"

namespace prefix_fast::cuda {

constexpr int power_of_two_from(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

// Like std::bool_constant, on the device.
template <bool kValue>
struct Constant {
    __device__ constexpr operator bool() const { return kValue; }
};

// A run of rows of one head, as this thread copies them to tiles of kRows rows of D elements.
template <typename T, int kRows, int D, int kThreads>
struct TileCopy {
    using S = Storage<T>;
    static constexpr int kChunks = D / kChunk<T>, kLanes = power_of_two_from(kChunks),
                         kStep = kThreads / kLanes;
    static_assert(kThreads % kLanes == 0 && (kRows % kStep == 0 || kRows < kStep));

    const char* data;  // this thread's chunk of row 0
    int64_t stride;    // elements
    int count;         // rows that exist; none of a thread whose chunk is past the head dim

    __device__ TileCopy(const char* run, int64_t token_stride, int rows, int head_dim, bool is_float32) {
        data = run + column() * (kIsHalf<T> && is_float32 ? 4 : int{sizeof(S)});
        stride = token_stride;
        count = column() < head_dim ? rows : 0;
    }

    // Rows [start, start + kRows) in the tile's own type, zeros where they do not exist or are hidden.
    __device__ void load(S* tile, int start, const KeyMask& mask) const {
        each_row(tile, start, sizeof(S), mask,
                 [](S* to, const char* from, bool valid) { cp_async_16(to, from, valid); });
    }
    __device__ void load(S* tile, int start) const { load(tile, start, KeyMask{nullptr, 0}); }

    // The same of float32 rows beside tiles of half precision: rounded, and there when this returns.
    __device__ void load_rounded(S* tile, int start, const KeyMask& mask) const {
        if constexpr (kIsHalf<T>) {
            each_row(tile, start, 4, mask, [](S* to, const char* from, bool valid) {
                store_shared_16(to, valid ? rounded_chunk(from) : uint4{0, 0, 0, 0});
            });
        }
    }

    // Once the copies of this thread have arrived: rounds the chunks of it to what products read.
    __device__ void arrived(S* tile) const {
        if constexpr (std::is_same_v<T, Tf32>) {
            each_row(tile, 0, sizeof(S), KeyMask{nullptr, 0}, [](S* at, const char*, bool) {
                store_shared_16(at, factors_of<T>(load_shared_16(at)));
            });
        }
    }

    // Whichever the run needs.
    __device__ void load(S* tile, int start, const KeyMask& mask, bool is_float32) const {
        if (kIsHalf<T> && is_float32) {
            load_rounded(tile, start, mask);
        } else {
            load(tile, start, mask);
        }
    }

  private:
    __device__ static int column() { return threadIdx.x % kLanes * kChunk<T>; }

    template <typename Copy>
    __device__ void each_row(S* tile, int start, int bytes, const KeyMask& mask, const Copy& copy) const {
        const int place = threadIdx.x / kLanes, first = start + place;
        if (kLanes > kChunks && column() >= D) return;
        if (kRows < kStep && place >= kRows) return;
        const char* from = data + static_cast<uint32_t>(first) * stride * bytes;
        S* to = tile + place * kPitch<T, D> + column();
#pragma unroll
        for (int row = 0; row < kRows; row += kStep) {
            copy(to + row * kPitch<T, D>, from, first + row < count && !mask.hides(first + row));
            from += kStep * bytes * stride;
        }
    }

    // 16 bytes of a tile from 32 of a float32 row.
    __device__ static uint4 rounded_chunk(const char* from) {
        const uint4 a = load_global_16(from), b = load_global_16(from + 16);
        return {packed<S>(as_float(a.x), as_float(a.y)), packed<S>(as_float(a.z), as_float(a.w)),
                packed<S>(as_float(b.x), as_float(b.y)), packed<S>(as_float(b.z), as_float(b.w))};
    }
};

}  // namespace prefix_fast::cuda
