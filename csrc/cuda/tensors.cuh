#pragma once

// What the CUDA operators do with tensors besides checking them.

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

inline void check_launch(const char* op) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    fail(op, "the CUDA kernel did not start: ", cudaGetErrorString(status));
  }
}

}  // namespace prunepath
