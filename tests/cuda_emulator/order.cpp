#include "order.h"

#include <algorithm>

namespace cuda_emulator {

namespace {

std::unordered_map<uint64_t, std::vector<Release>> releases;  // by word

// What the thread's last fence publishes of a thread of its block, or what that thread's own fence does.
uint32_t published(const Thread& me, const Thread& other) {
    uint32_t time = me.fence_block_time;
    if (me.fence_time != 0) {
        if (&me == &other)
            time = me.fence_time;
        else if (me.warp == other.warp)
            time = std::max(time, me.fence_warp_time);
        else
            time = std::max(time, me.fence_warps[other.warp->number]);
    }
    const bool fence_known =
        other.fence_time > 0 && (&me == &other || known_in_block(me, other.id, other.fence_time));
    return fence_known ? std::max(time, other.fence_time) : time;
}

}  // namespace

void begin_launch_order() {
    releases.clear();
    machine.launch_time = ++machine.clock;
}

void order_block(Block& block) {
    block.time = ++machine.clock;
}

void order_warps(Block& block, const Barrier& barrier) {
    const uint32_t now = ++machine.clock;
    block.named_time = now;
    uint32_t joined[kMaxWarps] = {};
    for (int w = 0; w < block.warps; ++w) {
        joined[w] = barrier.known[w];
        if (barrier.lanes[w] != 0)
            joined[w] = std::max(joined[w], barrier.waiting[w] != 0 ? now : barrier.time[w]);
    }
    for (int w = 0; w < block.warps; ++w) {
        if (barrier.waiting[w] == 0) continue;
        Warp& warp = block.warp[w];
        warp.time = now;
        for (int other = 0; other < block.warps; ++other)
            warp.warp_time[other] = std::max(warp.warp_time[other], joined[other]);
    }
}

void order_lanes(Warp& warp, uint32_t lanes) {
    const uint32_t now = ++machine.clock;
    if (lanes == warp.present) {
        warp.time = now;
        return;
    }
    warp.partial_time = now;
    uint32_t joined[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        for (int other = 0; other < kLanes; ++other)
            joined[other] = std::max(joined[other], warp.lane_time[lane][other]);
    }
    for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1) joined[lane] = now;
    for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1) std::copy(joined, joined + kLanes, warp.lane_time[lane]);
}

void remember_fence(Thread& thread) {
    const Warp& warp = *thread.warp;
    thread.fence_block_time = warp.block->time;
    thread.fence_warp_time = warp.time;
    std::copy(warp.warp_time, warp.warp_time + kMaxWarps, thread.fence_warps);
    thread.fence_time = ++machine.clock;
    Block& block = *warp.block;
    for (const Acquisition& atomic : block.atomics)
        if (atomic.thread == &thread || known_in_block(thread, atomic.thread->id, atomic.time))
            block.acquired.push_back({&thread, thread.fence_time, atomic.word, atomic.releases});
}

void release_and_acquire(Thread& thread, uint64_t word) {
    std::vector<Release>& all = releases[word];
    Block& block = *thread.warp->block;
    const auto earlier = [&](const Acquisition& other) {
        return other.thread == &thread && other.word == word;
    };
    block.atomics.erase(std::remove_if(block.atomics.begin(), block.atomics.end(), earlier),
                        block.atomics.end());
    block.atomics.push_back({&thread, machine.clock, word, all.size()});
    Release release{block.number, std::vector<uint32_t>(block.threads)};
    for (int i = 0; i < block.threads; ++i) release.known[i] = published(thread, block.thread[i]);
    all.push_back(std::move(release));
    ++machine.clock;
}

bool known_across_blocks(uint32_t thread, uint32_t time) {
    const Thread& me = *machine.current;
    const uint32_t block = thread / kMaxThreads, number = thread % kMaxThreads;
    for (const Acquisition& acquired : me.warp->block->acquired) {
        if (acquired.thread != &me && !known_in_block(me, acquired.thread->id, acquired.time)) continue;
        const std::vector<Release>& all = releases[acquired.word];
        for (size_t i = 0; i < acquired.releases; ++i)
            if (all[i].block == block && time < all[i].known[number]) return true;
    }
    return false;
}

}  // namespace cuda_emulator
