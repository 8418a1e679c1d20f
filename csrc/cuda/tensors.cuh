#pragma once

// What the CUDA operators do with tensors besides checking them, and how they launch.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace prunepath {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream on the tensor's device. Kernels go there and nothing waits for them.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int sm_count(int device) {
  int value = 1;
  cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
  return value;
}

// Whether the code that this library runs on the device knows programmatic dependent launch.
bool has_dependent_launch(int device);

// Where an operator's kernels go.
struct Target {
  const char* op;
  int device;
  cudaStream_t stream;
};

inline Target target_of(const char* op, const Tensor& tensor) {
  return {op, tensor.get_device_index(), current_stream(tensor)};
}

inline void check_launch(const char* op, cudaError_t status) {
  if (status != cudaSuccess) {
    fail(op, "the CUDA kernel did not start: ", cudaGetErrorString(status));
  }
}

// Launches a kernel that calls `wait_for_previous_kernel` in all its threads before it touches what
// others write, and may therefore start while the one before it ends.
template <typename... Parameters, typename... Arguments>
void launch(const Target& target, void (*kernel)(Parameters...), dim3 grid, int threads,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = target.stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = has_dependent_launch(target.device) ? 1 : 0;
  check_launch(target.op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace prunepath
