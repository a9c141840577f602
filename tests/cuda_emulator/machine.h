// The state of the emulated machine: threads, warps and blocks, what has been found, what has been counted.
//
// One thread of the host runs everything; a thread of a block is a fibre that gives way only at an operation
// that has to wait for others. All state is therefore plain.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuda_emulator {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes, kBarriers = 16;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr size_t kMaxDynamicShared = 232448;
constexpr int kPoison = 0xff;  // NaN as float32, float16 and bfloat16, -1 as an integer

// The checks, in the order of their names in cuda_harness.py.
enum class Check : int32_t {
    kOutOfBounds,
    kMisaligned,
    kUninitialisedRead,
    kRace,
    kBarrierDivergence,
    kWarpDivergence,
    kMissingWait,
    kInFlightAtExit,
    kSharedMemoryLimit,
    kLaunchLimit,
    kReadOnlyWrite,
    kRunaway,
};

struct Finding {
    Check check;
    int32_t times;           // that this check failed at this place
    uint64_t place;          // the return address, as an offset in the module
    uint64_t address, size;  // of the access
    int32_t block[3], thread[3];
    char text[232];
};

// What the lanes of one operation of a warp have posted.
enum class Operation : uint8_t { kNone, kSyncWarp, kShuffle, kBallot, kMatch, kMma, kLdmatrix };

// What the lanes of a warp have posted; the header is what must be the same for all lanes of an operation.
struct Requests {
    struct Header {
        uint32_t mask;
        Operation operation;
        uint8_t kind;  // of the operation: the shuffle's, the element type, matrices and transposition
        uint8_t width, unused;
    };
    Header header[kLanes];
    uint64_t place[kLanes];
    uint64_t bits[kLanes];  // what goes in, and what comes out
    int operand[kLanes];
    float* d[kLanes];
    const uint32_t *a[kLanes], *b[kLanes];
    uint32_t* registers[kLanes];
    const void* row[kLanes];
};

struct AsyncCopy {
    char* to;
    uint32_t bytes, group;
    char data[16];
    uint64_t place;
};

struct Warp;
struct Block;

enum class State : uint8_t { kReady, kInWarp, kAtBarrier, kExited };

struct Thread {
    void* stack_pointer;
    size_t stack;  // number of its stack
    Warp* warp;
    uint3 index;
    uint32_t id;      // in the grid: block number * kMaxThreads + number in the block
    uint16_t number;  // in the block
    uint8_t lane;
    State state;
    uint8_t barrier;  // at which it stands
    uint64_t place;   // where it stands

    std::vector<AsyncCopy> copies;  // under way, oldest first
    uint32_t open_group;            // number of the group that the next commit closes

    // What the thread knew at its last fence (order.h).
    uint32_t fence_time, fence_block_time, fence_warp_time;
    uint32_t fence_warps[kMaxWarps];
};

// An access by a thread of the grid or block, as traffic.cpp wants it.
struct Logged {
    uint64_t place;
    uint64_t address;
    uint16_t order;  // the how manieth of this lane at this place
    uint8_t lane, size;
    bool shared;
};

struct Warp {
    Thread* threads;  // of lane 0
    Block* block;
    int number;
    uint32_t present, ready, waiting, exited;
    int cursor, stride;  // the order in which ready lanes take their turn
    Requests requests;

    uint32_t time;                       // all lanes know all accesses of each other before it
    uint32_t partial_time;               // the last __syncwarp of a part of the lanes
    uint32_t lane_time[kLanes][kLanes];  // lane i knows the accesses of lane j before it
    uint32_t warp_time[kMaxWarps];       // this warp knows the accesses of warp j before it
    std::vector<Logged> log;
};

struct Barrier {
    int expected, arrived;
    const char* file;  // of the first arrival, with its line
    int line;
    int count;                    // of true predicates
    uint32_t lanes[kMaxWarps];    // that have arrived, of each warp
    uint32_t waiting[kMaxWarps];  // those of them that wait
    uint32_t time[kMaxWarps];     // accesses of the warp before it are published
    uint32_t known[kMaxWarps];    // what those that have arrived knew of each warp: of a named barrier
};

// An atomic operation of a thread, or the fence that made it an acquisition: of the word's first releases.
struct Acquisition {
    const Thread* thread;
    uint32_t time;
    uint64_t word;
    size_t releases;
};

struct Block {
    dim3 index;
    uint32_t number;  // in the grid
    int slot;
    int threads, warps, live;
    uint32_t ready_warps;
    Thread* thread;  // the first of kMaxThreads
    Warp warp[kMaxWarps];
    Barrier barrier[kBarriers];
    int counted;   // by the last counting barrier
    uint64_t mma;  // that its warps have done

    uint32_t time;                     // every thread knows every access before it
    uint32_t named_time;               // the last barrier of a part of the block
    std::vector<Acquisition> atomics;  // not yet behind a fence, for all threads
    std::vector<Acquisition> acquired;
    std::vector<char> shared;  // contents while another block runs
};

// A seeded generator: splitmix64.
struct Random {
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
};

struct Counters {
    uint64_t launches, blocks, switches, accesses;
    uint64_t mma, mma_most;  // in all, and of the block that has most
    uint64_t ldmatrix, async_copies, atomics, barriers;
    uint64_t shared_bytes;  // of the launch that asked for most
};

struct Settings {
    uint64_t seed = 0;
    uint64_t shared_limit = 166912;
    uint64_t most_accesses = uint64_t(1) << 33;
    int most_findings = 8;
    int resident = 1;      // blocks that take turns
    bool traffic = false;  // log accesses for traffic.cpp
};

struct Machine {
    Settings settings;
    Counters counters{};
    std::vector<Finding> findings;
    Random random;

    Block* block = nullptr;     // that runs
    Thread* current = nullptr;  // the fibre that runs; null: the host's code
    void* scheduler = nullptr;  // the stack pointer of the host's code
    uint32_t clock = 1;         // counts everything that orders accesses
    uint32_t launch_time = 0;   // every access before it is ordered
    bool abandoned = false;

    dim3 grid, block_size;
    size_t shared_bytes = 0;
    const char* kernel = "";
    void (*call)(const void*) = nullptr;
    const void* parameters = nullptr;
    size_t parameter_bytes = 0;
};

extern Machine machine;

// findings.cpp
void report(Check check, uint64_t place, const void* address, uint64_t size, const char* format, ...)
    __attribute__((format(printf, 5, 6)));
[[noreturn]] void abandon();
std::string name_of(uint32_t thread);

// schedule.cpp
void give_way(State state, uint64_t place);
void wake(Warp& warp, uint32_t lanes);
void change_warp();
void change_block();
void begin_fibre(Thread& thread);
void warp_settles(Warp& warp);

#define CUDA_EMULATOR_PLACE reinterpret_cast<uint64_t>(__builtin_return_address(0))

}  // namespace cuda_emulator
