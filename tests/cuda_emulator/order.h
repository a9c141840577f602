// Which accesses are ordered before what the running thread does now.
//
// The machine's clock advances whenever something orders accesses; an access is stamped with the clock. What
// a thread knows of another is a time: all accesses stamped earlier happened before. __syncthreads sets one
// time for a block, a full __syncwarp one for a warp; named barriers and partial __syncwarps keep times per
// warp and per lane.
//
// Between blocks there is one rule: a write is known to another block after a __threadfence of a thread that
// knows it, then an atomic operation; then, in the other block, an atomic operation on the same word, then a
// __threadfence. A fence and its atomic operation may be those of two threads with a barrier between.
// Launches are ordered one after another.
#pragma once

#include "machine.h"

namespace cuda_emulator {

// All a thread of some block had published when it did an atomic operation.
struct Release {
    uint32_t block;
    std::vector<uint32_t> known;  // by number of the thread in its block: accesses before this time
};

void order_block(Block& block);
void order_warps(Block& block, const Barrier& barrier);
void order_lanes(Warp& warp, uint32_t lanes);
void remember_fence(Thread& thread);
void release_and_acquire(Thread& thread, uint64_t word);
void begin_launch_order();

bool known_across_blocks(uint32_t thread, uint32_t time);

// Whether `me` knows the access that a thread of its block made at `time`; `other` is not `me`.
inline bool known_in_block(const Thread& me, uint32_t other, uint32_t time) {
    const Warp& warp = *me.warp;
    if (time < warp.block->time) return true;
    const uint32_t other_warp = other % kMaxThreads / kLanes;
    if (other_warp == static_cast<uint32_t>(warp.number))
        return time < warp.time || time < warp.lane_time[me.lane][other % kLanes];
    return time < warp.warp_time[other_warp];
}

inline bool known(const Thread& me, uint32_t other, uint32_t time) {
    if (other == me.id || time < machine.launch_time) return true;
    if (other / kMaxThreads == me.id / kMaxThreads) return known_in_block(me, other, time);
    return known_across_blocks(other, time);
}

}  // namespace cuda_emulator
