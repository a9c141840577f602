// Bank conflicts and sectors: the accesses of a warp's lanes at one place, put side by side as requests of
// the warp.
#pragma once

#include "machine.h"

namespace cuda_emulator {

struct Traffic {
    uint64_t place;
    uint64_t shared_requests, conflicts;  // conflicts: passes over the banks beyond those that the size needs
    uint64_t global_requests, sectors;    // of 32 bytes
    uint64_t fewest_sectors;              // that could hold the bytes
};

void log_access(uint64_t address, size_t bytes, bool shared, uint64_t place);
// Counts what the warp's lanes have logged since the last time, when they have come together.
void count_log(Warp& warp);
// Passes over the banks for rows of 16 bytes, eight at a time.
void count_rows(const uint64_t* rows, int count, uint64_t place);
std::vector<Traffic> traffic_by_place();
void forget_traffic();

}  // namespace cuda_emulator
