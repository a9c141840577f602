// What the lanes' requests of a whole warp become.
#pragma once

#include "machine.h"

namespace cuda_emulator {

enum class Element : uint8_t { kF16, kBf16, kTf32 };

// tensor_core.cpp
void multiply(Warp& warp);
void load_matrices(Warp& warp);

}  // namespace cuda_emulator
