#include "cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace prunepath {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

bool always() { return true; }

struct Choice {
  CpuKernels kernels;
  bool (*supported)();
};

// Best first.
const Choice kChoices[] = {
#if defined(__x86_64__)
    {{"avx512_bf16", kFfnKernelsAvx512Bf16, kRouteKernelsAvx512}, has_avx512_bf16},
    {{"avx512", kFfnKernelsAvx512, kRouteKernelsAvx512}, has_avx512},
    {{"avx2", kFfnKernelsAvx2, kRouteKernelsAvx2}, has_avx2},
#endif
    {{"portable", kFfnKernelsPortable, kRouteKernelsPortable}, always},
};

const CpuKernels& choose() {
  const char* wanted = std::getenv("PRUNEPATH_CPU_KERNEL");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string supported;
  for (const Choice& choice : kChoices) {
    if (choice.supported()) {
      if (any || std::string(wanted) == choice.kernels.name) {
        return choice.kernels;
      }
      supported += (supported.empty() ? "" : ", ") + std::string(choice.kernels.name);
    }
  }
  throw std::runtime_error(
      "Expected PRUNEPATH_CPU_KERNEL to be unset or one of the kernels that "
      "this processor supports (" +
      supported + "), got '" + wanted + "'.");
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace prunepath
