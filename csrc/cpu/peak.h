// Loops that do one thing as fast as this machine can: the rates that bound the kernels.
#pragma once

#include <cstdint>

namespace prefix_fast {

// What `threads` threads do in a second, each in a loop of that many steps that it times itself.
double multiply_add(int threads, int64_t steps);    // FLOP in registers, float32
double multiply_pairs(int threads, int64_t steps);  // FLOP, pairs of bfloat16; 0: no such level
double exponentiate(int threads, int64_t steps);    // weights, scores in the first-level cache
double read_memory(int threads, const char* data,
                   int64_t bytes);  // bytes, from the first start to the last end

}  // namespace prefix_fast
