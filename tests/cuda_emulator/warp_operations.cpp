// Operations for which the lanes of a warp come together: __syncwarp, shuffles, votes, mma, ldmatrix.

#include "warp_operations.h"

#include "memory.h"
#include "traffic.h"

namespace cuda_emulator {

namespace {

uint64_t bits_of(const Requests::Header& header) {
    return __builtin_bit_cast(uint64_t, header);
}

const char* name_of(Operation operation) {
    switch (operation) {
        case Operation::kSyncWarp:
            return "__syncwarp";
        case Operation::kShuffle:
            return "a shuffle";
        case Operation::kBallot:
            return "a vote";
        case Operation::kMatch:
            return "a match";
        case Operation::kMma:
            return "mma.sync";
        case Operation::kLdmatrix:
            return "ldmatrix";
        default:
            return "nothing";
    }
}

int shuffle_source(const Requests& requests, int lane) {
    const int width = requests.header[lane].width, operand = requests.operand[lane];
    const int first = lane & ~(width - 1), last = first + width - 1;
    switch (static_cast<Shuffle>(requests.header[lane].kind)) {
        case Shuffle::kIndex:
            return first + (operand & (width - 1));
        case Shuffle::kXor:
            return (lane ^ operand) <= last ? lane ^ operand : lane;
        case Shuffle::kUp:
            return lane - operand >= first ? lane - operand : lane;
        case Shuffle::kDown:
            return lane + operand <= last ? lane + operand : lane;
    }
    return lane;
}

void shuffle_lanes(Requests& requests, uint32_t lanes) {
    uint64_t result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        const int source = shuffle_source(requests, lane);
        if (!(lanes >> source & 1))
            report(Check::kWarpDivergence, requests.place[lane], nullptr, 0,
                   "lane %d shuffles from lane %d, which the mask %08x does not name", lane, source, lanes);
        result[lane] = requests.bits[source];
    }
    for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1) requests.bits[lane] = result[lane];
}

void vote_lanes(Requests& requests, uint32_t lanes) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1 && requests.bits[lane] != 0) votes |= 1u << lane;
    for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1) requests.bits[lane] = votes;
}

void match_lanes(Requests& requests, uint32_t lanes) {
    uint32_t result[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane)
        for (int other = 0; other < kLanes; ++other)
            if (lanes >> lane & lanes >> other & 1 && requests.bits[lane] == requests.bits[other])
                result[lane] |= 1u << other;
    for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1) requests.bits[lane] = result[lane];
}

void perform(Warp& warp, uint32_t lanes, Operation operation) {
    switch (operation) {
        case Operation::kSyncWarp:
            order_lanes(warp, lanes);
            break;
        case Operation::kShuffle:
            shuffle_lanes(warp.requests, lanes);
            break;
        case Operation::kBallot:
            vote_lanes(warp.requests, lanes);
            break;
        case Operation::kMatch:
            match_lanes(warp.requests, lanes);
            break;
        case Operation::kMma:
            multiply(warp);
            break;
        case Operation::kLdmatrix:
            load_matrices(warp);
            break;
        default:
            break;
    }
}

void report_divergence(const Warp& warp, const Requests::Header& mine, int other, uint64_t place) {
    const Requests::Header& its = warp.requests.header[other];
    report(Check::kWarpDivergence, place, nullptr, 0,
           "%s with the mask %08x, while lane %d is at %s with %08x", name_of(mine.operation), mine.mask,
           other, name_of(its.operation), its.mask);
    abandon();
}

// Waits until all lanes of the mask have posted the same operation; the last one performs it.
void together(Thread& me, Requests::Header header, uint64_t place) {
    Warp& warp = *me.warp;
    const uint32_t lane = 1u << me.lane;
    // A mask of all lanes names those that exist, but mma and ldmatrix need a whole warp.
    if (header.operation <= Operation::kMatch) header.mask &= warp.present;
    const uint32_t mask = header.mask;
    warp.requests.header[me.lane] = header;
    warp.requests.place[me.lane] = place;
    if (!(mask & lane)) {
        report(Check::kWarpDivergence, place, nullptr, 0, "lane %d calls %s with the mask %08x", me.lane,
               name_of(header.operation), mask);
        abandon();
    }
    warp.waiting |= lane;
    if ((warp.waiting & mask) != mask) {
        give_way(State::kInWarp, place);
        return;
    }
    for (int other = 0; other < kLanes; ++other)
        if (mask >> other & 1 && bits_of(warp.requests.header[other]) != bits_of(header))
            report_divergence(warp, header, other, place);
    warp.waiting &= ~mask;
    count_access(place);
    perform(warp, mask, header.operation);
    wake(warp, mask);
    if (mask == warp.present) warp_settles(warp);
    change_warp();
}

}  // namespace

void sync_warp(uint32_t mask) {
    together(*machine.current, {mask, Operation::kSyncWarp, 0, 0, 0}, CUDA_EMULATOR_PLACE);
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width) {
    Thread& me = *machine.current;
    Requests& requests = me.warp->requests;
    requests.bits[me.lane] = bits;
    requests.operand[me.lane] = operand;
    together(me, {mask, Operation::kShuffle, static_cast<uint8_t>(kind), static_cast<uint8_t>(width), 0},
             CUDA_EMULATOR_PLACE);
    return requests.bits[me.lane];
}

uint32_t ballot(uint32_t mask, bool predicate) {
    Thread& me = *machine.current;
    me.warp->requests.bits[me.lane] = predicate;
    together(me, {mask, Operation::kBallot, 0, 0, 0}, CUDA_EMULATOR_PLACE);
    return static_cast<uint32_t>(me.warp->requests.bits[me.lane]);
}

uint32_t match_any(uint32_t mask, uint64_t bits) {
    Thread& me = *machine.current;
    me.warp->requests.bits[me.lane] = bits;
    together(me, {mask, Operation::kMatch, 0, 0, 0}, CUDA_EMULATOR_PLACE);
    return static_cast<uint32_t>(me.warp->requests.bits[me.lane]);
}

namespace {

inline void post_mma(Element element, float* d, const uint32_t* a, const uint32_t* b, uint64_t place) {
    Thread& me = *machine.current;
    Requests& requests = me.warp->requests;
    requests.d[me.lane] = d;
    requests.a[me.lane] = a;
    requests.b[me.lane] = b;
    together(me, {kAllLanes, Operation::kMma, static_cast<uint8_t>(element), 0, 0}, place);
}

}  // namespace

void mma_f16(float* d, const uint32_t* a, const uint32_t* b) {
    post_mma(Element::kF16, d, a, b, CUDA_EMULATOR_PLACE);
}
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    post_mma(Element::kBf16, d, a, b, CUDA_EMULATOR_PLACE);
}
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b) {
    post_mma(Element::kTf32, d, a, b, CUDA_EMULATOR_PLACE);
}

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed) {
    Thread& me = *machine.current;
    Requests& requests = me.warp->requests;
    requests.registers[me.lane] = registers;
    requests.row[me.lane] = row;
    const auto kind = static_cast<uint8_t>(2 * matrices + transposed);
    together(me, {kAllLanes, Operation::kLdmatrix, kind, 0, 0}, CUDA_EMULATOR_PLACE);
}

}  // namespace cuda_emulator
