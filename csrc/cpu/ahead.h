// Memory that will be read soon, asked for while something else is computed.
//
// Reading own tokens is bound by memory, multiplying by a shared segment by arithmetic: a thread that asks
// for the former, two lines at a time, during the latter does both in the time of one. Requests in bursts
// would fill the few buffers that a core has for them, and then it waits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace prefix_fast {

// Two lines at `data`, and again `step` bytes further on. Null data: nothing.
struct Requests {
    const char* data = nullptr;
    int64_t step = 0;

    __attribute__((always_inline)) void ask() {
        __builtin_prefetch(data, 0, 2);
        __builtin_prefetch(data + 64, 0, 2);
        data += step;
    }
};

class Ahead {
  public:
    // A tile's requests may go beyond the end of a run: shorter ones are not worth them.
    void add(const char* data, int64_t bytes) {
        constexpr int64_t kShortest = 4096;
        if (bytes < kShortest) return;
        runs_.push_back({data, bytes});
        bytes_ += bytes;
    }
    bool empty() const { return runs_.empty(); }

    // Ask for everything in the course of so many units of work.
    void pace(int64_t work) {
        per_unit_ = static_cast<float>(bytes_) / static_cast<float>(std::max<int64_t>(work, 1));
    }

    // What to ask for in so many steps that are `work` units.
    Requests take(int64_t steps, int64_t work) {
        due_ += per_unit_ * static_cast<float>(work);
        if (next_ == runs_.size()) return {};
        Run& run = runs_[next_];
        const int64_t step = run.bytes < 128 * steps ? 64 : 128, bytes = steps * step;
        if (due_ < static_cast<float>(std::min(bytes, run.bytes))) return {};
        due_ -= static_cast<float>(std::min(bytes, run.bytes));
        const Requests requests{run.data, step};
        run.data += bytes;
        run.bytes -= bytes;
        if (run.bytes <= 0) ++next_;
        return requests;
    }

  private:
    struct Run {
        const char* data;
        int64_t bytes;
    };
    std::vector<Run> runs_;
    size_t next_ = 0;
    int64_t bytes_ = 0;
    float per_unit_ = 0.0f, due_ = 0.0f;
};

}  // namespace prefix_fast
