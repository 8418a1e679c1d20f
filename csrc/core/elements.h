#pragma once

// Elements that no compiler has a type for, as CPU and CUDA kernels read them.

#include <cstdint>

namespace prunepath {

// Two elements of 4 bits, whole numbers from -8 to 7: the even one in the low bits, each plus 8.
struct Int4Pair {
  uint8_t bits;
};

}  // namespace prunepath
