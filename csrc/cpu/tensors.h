#pragma once

// What the CPU operators do with tensors besides checking them.

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "checks.h"
#include "cpu/elements.h"

namespace prunepath {

inline DType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

inline Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype) {
  // Straight to the C shim: the dispatcher's empty costs more than a small FFN.
  int64_t strides[8];
  int64_t stride = 1;
  for (int64_t dim = static_cast<int64_t>(shape.size()) - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= shape.begin()[dim];
  }
  int32_t dtype_code = aoti_torch_dtype_float32();
  switch (dtype) {
    case ScalarType::BFloat16:
      dtype_code = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      dtype_code = aoti_torch_dtype_float16();
      break;
    case ScalarType::Int:
      dtype_code = aoti_torch_dtype_int32();
      break;
    case ScalarType::Bool:
      dtype_code = aoti_torch_dtype_bool();
      break;
    default:
      break;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(),
                                                  strides, dtype_code, aoti_torch_device_type_cpu(),
                                                  0, &handle));
  return Tensor(handle);
}

// Calls `function` with a typed null pointer of the tensor's element type.
template <typename Function>
inline void with_element_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kBFloat16:
      return function(static_cast<const BFloat16*>(nullptr));
    case DType::kFloat16:
      return function(static_cast<const Float16*>(nullptr));
    default:
      return function(static_cast<const float*>(nullptr));
  }
}

// Thresholds of a batch: one value for all tokens, or one a token. On the CPU every value is
// checked.
struct Thresholds {
  const float* data;
  int64_t stride;

  float operator[](int64_t token) const { return data[token * stride]; }
};

inline Thresholds check_thresholds(const char* op, const Tensor& threshold, int64_t num_tokens,
                                   const char* like_name, const Tensor& like) {
  check_threshold_tensor(op, threshold, num_tokens, like_name, like);
  const bool per_token = threshold.dim() == 1;
  const Thresholds values{static_cast<const float*>(threshold.const_data_ptr()),
                          per_token ? threshold.stride(0) : 0};
  for (int64_t token = 0; token < (per_token ? num_tokens : 1); ++token) {
    check_threshold_value(op, values[token]);
  }
  return values;
}

// Uninitialised memory aligned to a cache line, freed at the end of the scope.
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(std::aligned_alloc(64, static_cast<size_t>((size + 63) / 64 * 64))) {
    if (data_ == nullptr && size > 0) {
      throw std::bad_alloc();
    }
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace prunepath
