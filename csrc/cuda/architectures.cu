// What this library was compiled for.

#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <string>

#include "cuda/tensors.cuh"

namespace prunepath {
namespace {

__global__ void probe_kernel() {}

// Compute capabilities times ten, ascending: "80,90".
std::string cuda_architectures() {
  std::string names;
  for (int architecture : {__CUDA_ARCH_LIST__}) {
    names += (names.empty() ? "" : ",") + text(architecture / 10);
  }
  return names;
}

}  // namespace

// Asks for the code that was chosen: a newer GPU may run what was compiled for an older one.
bool has_dependent_launch(int device) {
  constexpr size_t kRemembered = 64;
  static std::array<std::atomic<int>, kRemembered> known{};  // architectures, 0: not asked for yet
  const auto index = static_cast<size_t>(device);
  int architecture = index < kRemembered ? known[index].load(std::memory_order_relaxed) : 0;
  if (architecture == 0) {
    cudaFuncAttributes attributes = {};
    check_launch("has_dependent_launch", cudaFuncGetAttributes(&attributes, probe_kernel));
    architecture = attributes.ptxVersion;
    if (index < kRemembered) {
      known[index].store(architecture, std::memory_order_relaxed);
    }
  }
  return architecture >= 90;
}

}  // namespace prunepath

STABLE_TORCH_LIBRARY_FRAGMENT(prunepath, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(prunepath, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&prunepath::cuda_architectures));
}
