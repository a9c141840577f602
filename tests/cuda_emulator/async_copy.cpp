// cp.async: the data arrive when the thread waits for their group; until then their place holds poison.

#include <cstring>

#include "memory.h"

namespace cuda_emulator {

namespace {

void arrive(AsyncCopy& copy) {
    shared_memory.access(reinterpret_cast<uint64_t>(copy.to), copy.bytes, kAsyncEnd, copy.place);
    std::memcpy(copy.to, copy.data, copy.bytes);
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, bool valid) {
    const uint64_t place = CUDA_EMULATOR_PLACE, to = reinterpret_cast<uint64_t>(shared);
    Thread& me = *machine.current;
    ++machine.counters.async_copies;
    AsyncCopy copy{static_cast<char*>(shared), static_cast<uint32_t>(bytes), me.open_group, {}, place};
    if (valid) {
        access_memory(reinterpret_cast<uint64_t>(global), copy.bytes, kRead, place);
        std::memcpy(copy.data, global, copy.bytes);
    }
    if (!shared_memory.contains(to)) {
        report(Check::kOutOfBounds, place, shared, copy.bytes,
               "cp.async to an address that is not in shared memory");
        abandon();
    }
    access_memory(to, copy.bytes, kAsyncBegin, place);
    std::memset(shared, kPoison, copy.bytes);
    me.copies.push_back(copy);
}

void cp_async_commit() {
    ++machine.current->open_group;
}

void cp_async_wait(int groups) {
    Thread& me = *machine.current;
    size_t arrived = 0;
    while (arrived < me.copies.size() &&
           static_cast<int64_t>(me.copies[arrived].group) < int64_t(me.open_group) - groups)
        arrive(me.copies[arrived++]);
    me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(arrived));
}

}  // namespace cuda_emulator
