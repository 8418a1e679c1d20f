#pragma once

// Which of the kernels compiled for several instruction sets this process uses.

#include "cpu/ffn_kernels.h"
#include "cpu/route_kernels.h"

namespace prunepath {

struct CpuKernels {
  const char* name;
  const FfnKernels& ffn;
  const RouteKernels& route;
};

// The kernels that PRUNEPATH_CPU_KERNEL names when this is first called; without it, the best that
// this processor has. Throws std::runtime_error if there are none of that name here.
const CpuKernels& cpu_kernels();

}  // namespace prunepath
