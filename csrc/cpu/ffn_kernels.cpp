#include "cpu/ffn_kernels.h"

namespace prunepath {

const FfnKernels& ffn_kernels() {
#if defined(__x86_64__)
  static const FfnKernels& best = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                          __builtin_cpu_supports("f16c")
                                      ? kFfnKernelsAvx2
                                      : kFfnKernelsPortable;
  return best;
#else
  return kFfnKernelsPortable;
#endif
}

}  // namespace prunepath
