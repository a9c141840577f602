#include "traffic.h"

#include <algorithm>
#include <unordered_map>

#include "memory.h"

namespace cuda_emulator {

namespace {

constexpr int kBanks = 32, kBankBytes = 4, kSectorBytes = 32;

std::unordered_map<uint64_t, Traffic> traffic;

// The deepest bank's number of different words, of at most 32 words that go out together.
int passes(const uint64_t* words, int count) {
    int depth[kBanks] = {}, most = 0;
    for (int i = 0; i < count; ++i) {
        if (std::find(words, words + i, words[i]) != words + i) continue;  // one word serves all its readers
        most = std::max(most, ++depth[words[i] % kBanks]);
    }
    return most;
}

// A request of shared memory: lanes go out 32, 16 or 8 at a time, as their size is 4, 8 or 16 bytes.
void count_shared(const Logged* begin, const Logged* end, Traffic& total) {
    const int size = std::max<int>(begin->size, kBankBytes), lanes_at_once = kLanes * kBankBytes / size;
    ++total.shared_requests;
    for (int first = 0; first < kLanes; first += lanes_at_once) {
        uint64_t words[kLanes];
        int count = 0;
        for (const Logged* at = begin; at != end; ++at) {
            if (at->lane < first || at->lane >= first + lanes_at_once) continue;
            for (int i = 0; i < size / kBankBytes; ++i)
                words[count++] =
                    shared_memory.bank_offset(at->address) / kBankBytes + static_cast<uint64_t>(i);
        }
        total.conflicts += static_cast<uint64_t>(std::max(0, passes(words, count) - 1));
    }
}

void count_global(const Logged* begin, const Logged* end, Traffic& total) {
    uint64_t sectors[2 * kLanes], bytes = 0;
    int count = 0;
    for (const Logged* at = begin; at != end; ++at) {
        sectors[count++] = at->address / kSectorBytes;
        sectors[count++] = (at->address + at->size - 1) / kSectorBytes;
        bytes += at->size;
    }
    std::sort(sectors, sectors + count);
    ++total.global_requests;
    total.sectors += static_cast<uint64_t>(std::unique(sectors, sectors + count) - sectors);
    total.fewest_sectors += (bytes + kSectorBytes - 1) / kSectorBytes;
}

Traffic& traffic_at(uint64_t place) {
    Traffic& total = traffic[place];
    total.place = place;
    return total;
}

}  // namespace

void log_access(uint64_t address, size_t bytes, bool shared, uint64_t place) {
    if (bytes > 16) return;
    Thread& me = *machine.current;
    me.warp->log.push_back({place, address, 0, me.lane, static_cast<uint8_t>(bytes), shared});
}

void count_log(Warp& warp) {
    std::vector<Logged>& log = warp.log;
    if (log.empty()) return;
    // The n-th access of each lane at a place belongs to the n-th request there.
    std::stable_sort(log.begin(), log.end(), [](const Logged& a, const Logged& b) {
        return a.place != b.place ? a.place < b.place : a.lane < b.lane;
    });
    for (size_t i = 1; i < log.size(); ++i)
        if (log[i].place == log[i - 1].place && log[i].lane == log[i - 1].lane)
            log[i].order = log[i - 1].order + 1;
    std::stable_sort(log.begin(), log.end(), [](const Logged& a, const Logged& b) {
        return a.place != b.place     ? a.place < b.place
               : a.shared != b.shared ? a.shared < b.shared
                                      : a.order < b.order;
    });
    for (size_t first = 0, end; first < log.size(); first = end) {
        end = first + 1;
        const auto same = [&](const Logged& other) {
            return other.place == log[first].place && other.shared == log[first].shared &&
                   other.order == log[first].order;
        };
        while (end < log.size() && same(log[end])) ++end;
        Traffic& total = traffic_at(log[first].place);
        if (log[first].shared)
            count_shared(&log[first], &log[first] + (end - first), total);
        else
            count_global(&log[first], &log[first] + (end - first), total);
    }
    log.clear();
}

void count_rows(const uint64_t* rows, int count, uint64_t place) {
    Traffic& total = traffic_at(place);
    ++total.shared_requests;
    for (int first = 0; first < count; first += 8) {
        uint64_t words[kLanes];
        for (int i = 0; i < kLanes; ++i)
            words[i] =
                shared_memory.bank_offset(rows[first + i / 4]) / kBankBytes + static_cast<uint64_t>(i % 4);
        total.conflicts += static_cast<uint64_t>(passes(words, kLanes) - 1);
    }
}

std::vector<Traffic> traffic_by_place() {
    std::vector<Traffic> all;
    for (const auto& [place, total] : traffic) {
        all.push_back(total);
        all.back().place = place - module_base();
    }
    return all;
}

void forget_traffic() {
    traffic.clear();
}

}  // namespace cuda_emulator
