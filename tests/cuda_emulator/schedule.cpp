// Which fibre runs: blocks in a shuffled order, some of them taking turns; warps by chance; the lanes of a
// warp one after another, in an order that changes whenever the warp has come together.

#include <algorithm>
#include <numeric>

#include "fibre.h"
#include "memory.h"
#include "traffic.h"

namespace cuda_emulator {

namespace {

std::vector<std::unique_ptr<Block>> slots;
std::vector<std::unique_ptr<Thread[]>> slot_threads;

Thread& lane_of(Warp& warp, int lane) {
    return warp.threads[lane];
}

void enter(Thread& next) {
    Thread* from = machine.current;
    if (from == &next) return;
    ++machine.counters.switches;
    machine.current = &next;
    cuda_emulator_switch(from == nullptr ? &machine.scheduler : &from->stack_pointer, next.stack_pointer);
}

void return_to_scheduler() {
    Thread* from = machine.current;
    machine.current = nullptr;
    void* never;
    cuda_emulator_switch(from == nullptr ? &never : &from->stack_pointer, machine.scheduler);
}

// The next of the warp's ready lanes in the present order.
Thread& next_lane(Warp& warp) {
    int lane = warp.cursor;
    while (!(warp.ready >> lane & 1)) lane = (lane + warp.stride) % kLanes;
    warp.cursor = (lane + warp.stride) % kLanes;
    return lane_of(warp, lane);
}

Warp& any_ready_warp(Block& block) {
    uint32_t skip = machine.random.below(static_cast<uint32_t>(__builtin_popcount(block.ready_warps)));
    uint32_t ready = block.ready_warps;
    for (; skip > 0; --skip) ready &= ready - 1;
    return block.warp[__builtin_ctz(ready)];
}

void run_fibre() {
    machine.call(machine.parameters);
    Thread& me = *machine.current;
    Block& block = *me.warp->block;
    if (!me.copies.empty())
        report(Check::kInFlightAtExit, me.copies.front().place, me.copies.front().to, me.copies.front().bytes,
               "the thread ended before it waited for this cp.async");
    --block.live;
    me.warp->exited |= 1u << me.lane;
    give_way(State::kExited, 0);
    __builtin_unreachable();
}

void begin_warp(Block& block, int number) {
    Warp& warp = block.warp[number];
    const int lanes = std::min(kLanes, block.threads - number * kLanes);
    warp.threads = block.thread + number * kLanes;
    warp.block = &block;
    warp.number = number;
    warp.present = warp.ready = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp.waiting = warp.exited = 0;
    warp.cursor = static_cast<int>(machine.random.below(kLanes));
    warp.stride = 1 + 2 * static_cast<int>(machine.random.below(kLanes / 2));
    warp.time = warp.partial_time = 0;
    std::fill_n(&warp.lane_time[0][0], kLanes * kLanes, 0u);
    std::fill_n(warp.warp_time, kMaxWarps, 0u);
    warp.log.clear();
}

void begin_block(Block& block, uint32_t number, int slot) {
    const dim3 size = machine.block_size, grid = machine.grid;
    block.number = number;
    block.index = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    block.slot = slot;
    block.threads = block.live = static_cast<int>(size.x * size.y * size.z);
    block.warps = (block.threads + kLanes - 1) / kLanes;
    block.thread = slot_threads[slot].get();
    block.ready_warps = block.warps == kMaxWarps ? kAllLanes : (1u << block.warps) - 1;
    block.time = block.named_time = 0;
    block.atomics.clear();
    block.acquired.clear();
    block.mma = 0;
    std::fill_n(block.barrier, kBarriers, Barrier{});
    for (int w = 0; w < block.warps; ++w) begin_warp(block, w);
    for (int i = 0; i < block.threads; ++i) {
        Thread& thread = block.thread[i];
        const auto n = static_cast<unsigned>(i);
        thread.warp = &block.warp[i / kLanes];
        thread.index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
        thread.id = number * kMaxThreads + n;
        thread.number = static_cast<uint16_t>(i);
        thread.lane = static_cast<uint8_t>(i % kLanes);
        thread.state = State::kReady;
        thread.open_group = 0;
        thread.fence_time = thread.fence_block_time = thread.fence_warp_time = 0;
        thread.copies.clear();
        thread.stack = static_cast<size_t>(slot) * kMaxThreads + n;
        thread.stack_pointer = stacks.prepare(thread.stack, run_fibre);
    }
    shared_memory.begin_block(slot);
}

// No thread of the block can go on: says for what some of them wait that will never happen.
void report_standstill(Block& block) {
    const Thread* stuck = nullptr;
    int in_warps = 0, at_barriers = 0;
    for (int i = 0; i < block.threads; ++i) {
        Thread& thread = block.thread[i];
        in_warps += thread.state == State::kInWarp;
        at_barriers += thread.state == State::kAtBarrier;
        if (thread.state == State::kInWarp || (thread.state == State::kAtBarrier && stuck == nullptr)) {
            if (stuck == nullptr || stuck->state != State::kInWarp) stuck = &thread;
        }
    }
    machine.current = const_cast<Thread*>(stuck);
    const Check check = in_warps > 0 ? Check::kWarpDivergence : Check::kBarrierDivergence;
    machine.abandoned = true;  // first: a report from here must not do it
    report(check, stuck->place, nullptr, 0,
           "waits for ever: %d threads in operations of a warp, %d at barriers, %d ended", in_warps,
           at_barriers, block.threads - block.live);
    machine.current = nullptr;
}

// Runs the block until it ends, gives way to another one (true), or the launch is abandoned.
bool run_block(Block& block) {
    machine.block = &block;
    enter(next_lane(any_ready_warp(block)));
    if (machine.abandoned) return false;
    if (block.live == 0) return false;
    if (block.ready_warps != 0) return true;
    report_standstill(block);
    return false;
}

int refuse(const char* what, uint64_t value, uint64_t limit) {
    report(Check::kLaunchLimit, 0, nullptr, 0, "%s of kernel %s: %zu, of at most %zu", what, machine.kernel,
           static_cast<size_t>(value), static_cast<size_t>(limit));
    return 1;
}

int check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z,
                   blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (threads == 0 || threads > kMaxThreads) return refuse("threads of a block", threads, kMaxThreads);
    if (block.z > 64) return refuse("blockDim.z", block.z, 64);
    if (grid.x > 0x7fffffffu) return refuse("gridDim.x", grid.x, 0x7fffffffu);
    if (grid.y > 65535) return refuse("gridDim.y", grid.y, 65535);
    if (grid.z > 65535) return refuse("gridDim.z", grid.z, 65535);
    if (blocks >= (uint64_t(1) << 32) / kMaxThreads)
        return refuse("blocks of a grid, for this emulator", blocks, (1u << 22) - 1);
    if (shared_bytes > machine.settings.shared_limit) {
        report(Check::kSharedMemoryLimit, 0, nullptr, 0,
               "%zu dynamic bytes of shared memory for kernel %s, of at most %zu", shared_bytes,
               machine.kernel, static_cast<size_t>(machine.settings.shared_limit));
        return 1;
    }
    return 0;
}

// Blocks in a random order, `resident` of them at a time.
void run_blocks(uint32_t count) {
    std::vector<uint32_t> order(count);
    std::iota(order.begin(), order.end(), 0u);
    for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[machine.random.below(i)]);
    const int resident = static_cast<int>(
        std::min<uint32_t>(count, static_cast<uint32_t>(std::max(1, machine.settings.resident))));
    while (static_cast<int>(slots.size()) < resident) {
        slots.push_back(std::make_unique<Block>());
        slot_threads.push_back(std::make_unique<Thread[]>(kMaxThreads));
    }
    stacks.reserve(static_cast<size_t>(resident) * kMaxThreads);
    std::vector<int> running;
    uint32_t next = 0;
    int loaded = -1;  // the slot whose block's shared memory lies in place
    const auto begin = [&](int slot) {
        if (loaded >= 0) shared_memory.save(*slots[loaded]);
        begin_block(*slots[slot], order[next++], slot);
        loaded = slot;
        ++machine.counters.blocks;
    };
    for (int slot = 0; slot < resident; ++slot) {
        begin(slot);
        running.push_back(slot);
    }
    while (!running.empty() && !machine.abandoned) {
        const size_t chosen = machine.random.below(static_cast<uint32_t>(running.size()));
        const int slot = running[chosen];
        if (loaded != slot) {
            if (loaded >= 0) shared_memory.save(*slots[loaded]);
            shared_memory.restore(*slots[slot]);
            loaded = slot;
        }
        if (run_block(*slots[slot])) continue;
        loaded = -1;
        if (next < count)
            begin(slot);
        else
            running.erase(running.begin() + static_cast<std::ptrdiff_t>(chosen));
    }
}

}  // namespace

void wake(Warp& warp, uint32_t lanes) {
    warp.ready |= lanes;
    if (lanes != 0) warp.block->ready_warps |= 1u << warp.number;
}

// The running thread stops in `state`; returns when it has been woken.
void give_way(State state, uint64_t place) {
    Thread& me = *machine.current;
    Warp& warp = *me.warp;
    Block& block = *warp.block;
    stacks.check_room(me.stack);
    me.state = state;
    me.place = place;
    warp.ready &= ~(1u << me.lane);
    if (warp.ready != 0) {
        enter(next_lane(warp));
    } else {
        warp_settles(warp);
        block.ready_warps &= ~(1u << warp.number);
        if (block.ready_warps != 0)
            enter(next_lane(any_ready_warp(block)));
        else
            return_to_scheduler();
    }
    me.state = State::kReady;
}

// Every lane of the warp has stopped, or the warp has come together.
void warp_settles(Warp& warp) {
    if (machine.settings.traffic) count_log(warp);
    warp.cursor = static_cast<int>(machine.random.below(kLanes));
    warp.stride = 1 + 2 * static_cast<int>(machine.random.below(kLanes / 2));
}

// Lets another warp run, now and then.
void change_warp() {
    Block& block = *machine.current->warp->block;
    if (machine.random.below(4) == 0) enter(next_lane(any_ready_warp(block)));
}

void change_block() {
    if (machine.settings.resident > 1 && machine.random.below(2) == 0) return_to_scheduler();
}

int run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
             const void* parameters, size_t parameter_bytes) {
    machine.kernel = name;
    machine.grid = grid;
    machine.block_size = block;
    if (uint64_t(grid.x) * grid.y * grid.z == 0) return 0;
    if (check_limits(grid, block, shared_bytes) != 0) return 1;
    machine.shared_bytes = shared_bytes;
    machine.call = call;
    machine.parameters = parameters;
    machine.parameter_bytes = parameter_bytes;
    machine.abandoned = false;
    ++machine.counters.launches;
    machine.counters.shared_bytes = std::max<uint64_t>(machine.counters.shared_bytes, shared_bytes);
    begin_launch_order();
    shared_memory.locate();
    shared_memory.begin_launch(shared_bytes);
    run_blocks(grid.x * grid.y * grid.z);
    machine.parameters = nullptr;
    machine.parameter_bytes = 0;
    machine.current = nullptr;
    return machine.abandoned ? 719 : 0;
}

uint3 thread_index() {
    return machine.current->index;
}
uint3 block_index() {
    const dim3 index = machine.current->warp->block->index;
    return {index.x, index.y, index.z};
}
dim3 block_size() {
    return machine.block_size;
}
dim3 grid_size() {
    return machine.grid;
}

}  // namespace cuda_emulator
