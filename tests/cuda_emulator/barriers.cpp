// __syncthreads, named barriers, fences and the atomics' part in the order of accesses.

#include <algorithm>
#include <cstring>

#include "memory.h"

namespace cuda_emulator {

namespace {

void complete(Block& block, int number) {
    Barrier& barrier = block.barrier[number];
    ++machine.counters.barriers;
    block.counted = barrier.count;
    if (number == 0)
        order_block(block);
    else
        order_warps(block, barrier);
    for (int w = 0; w < block.warps; ++w) wake(block.warp[w], barrier.waiting[w]);
    barrier = Barrier{};
}

// Counts the thread; true if it is the last one, for whom the barrier falls.
bool arrive(Thread& me, int number, int expected, bool waits) {
    Block& block = *me.warp->block;
    Barrier& barrier = block.barrier[number];
    const int w = me.warp->number;
    barrier.expected = expected;
    barrier.lanes[w] |= 1u << me.lane;
    if (waits)
        barrier.waiting[w] |= 1u << me.lane;
    else
        barrier.time[w] = ++machine.clock;
    me.barrier = static_cast<uint8_t>(number);
    for (int other = 0; number != 0 && other < block.warps; ++other)
        barrier.known[other] = std::max(barrier.known[other], me.warp->warp_time[other]);
    return ++barrier.arrived == expected;
}

void named_barrier(int number, int threads, bool waits, uint64_t place) {
    Thread& me = *machine.current;
    Block& block = *me.warp->block;
    if (number < 0 || number >= kBarriers || threads <= 0 || threads % kLanes != 0) {
        report(Check::kBarrierDivergence, place, nullptr, 0,
               "barrier %d of %d threads: 0 to 15, of a multiple of 32", number, threads);
        abandon();
    }
    Barrier& barrier = block.barrier[number];
    if (barrier.arrived > 0 && barrier.expected != threads)
        report(Check::kBarrierDivergence, place, nullptr, 0,
               "barrier %d expects %d threads here, %d elsewhere", number, threads, barrier.expected);
    if (arrive(me, number, threads, waits)) {
        for (int w = 0; w < block.warps; ++w)
            if (barrier.lanes[w] != 0 && barrier.lanes[w] != block.warp[w].present)
                report(Check::kBarrierDivergence, place, nullptr, 0,
                       "only lanes %08x of warp %d came to barrier %d", barrier.lanes[w], w, number);
        complete(block, number);
        warp_settles(*me.warp);
        change_warp();
    } else if (waits) {
        give_way(State::kAtBarrier, place);
    }
}

int block_barrier(bool predicate, const char* file, int line, uint64_t place) {
    Thread& me = *machine.current;
    Block& block = *me.warp->block;
    Barrier& barrier = block.barrier[0];
    if (barrier.arrived == 0) {
        barrier.file = file;
        barrier.line = line;
    } else if (barrier.line != line || std::strcmp(barrier.file, file) != 0) {
        report(Check::kBarrierDivergence, place, nullptr, 0, "other threads of the block wait at line %d",
               barrier.line);
    }
    barrier.count += predicate;
    if (arrive(me, 0, block.threads, true)) {
        complete(block, 0);
        warp_settles(*me.warp);
        change_warp();
    } else {
        give_way(State::kAtBarrier, place);
    }
    return block.counted;
}

}  // namespace

void sync_threads(const char* file, int line) {
    block_barrier(false, file, line, CUDA_EMULATOR_PLACE);
}

int sync_threads_count(bool predicate, const char* file, int line) {
    return block_barrier(predicate, file, line, CUDA_EMULATOR_PLACE);
}

void named_barrier_sync(int barrier, int threads) {
    named_barrier(barrier, threads, true, CUDA_EMULATOR_PLACE);
}

void named_barrier_arrive(int barrier, int threads) {
    named_barrier(barrier, threads, false, CUDA_EMULATOR_PLACE);
}

void thread_fence() {
    remember_fence(*machine.current);
}

uint64_t begin_atomic(void* address, int bytes) {
    const uint64_t place = CUDA_EMULATOR_PLACE, word = reinterpret_cast<uint64_t>(address);
    change_block();
    ++machine.counters.atomics;
    access_memory(word, static_cast<size_t>(bytes), kRead | kWrite | kAtomic, place);
    if (!shared_memory.contains(word)) release_and_acquire(*machine.current, word);
    uint64_t bits = 0;
    std::memcpy(&bits, address, static_cast<size_t>(bytes));
    return bits;
}

void end_atomic(void* address, uint64_t bits, int bytes) {
    std::memcpy(address, &bits, static_cast<size_t>(bytes));
}

}  // namespace cuda_emulator
