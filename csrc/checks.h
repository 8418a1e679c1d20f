#pragma once

// Argument checks that the CPU and the CUDA operators share. A failed check throws one sentence:
// operator, argument, what was expected, what came.

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace prunepath {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "prunepath::" << op << ": ";
  (message << ... << parts);
  message << ".";
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

template <typename Sizes>
inline std::string shape_string(const Sizes& sizes) {
  std::ostringstream out;
  out << "[";
  const char* separator = "";
  for (int64_t size : sizes) {
    out << separator << size;
    separator = ", ";
  }
  out << "]";
  return out.str();
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) {
    return false;
  }
  int64_t dim = 0;
  for (int64_t size : shape) {
    if (tensor.size(dim++) != size) {
      return false;
    }
  }
  return true;
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape, const char* symbols) {
  if (!has_shape(tensor, shape)) {
    fail(op, "expected ", name, " of shape ", symbols, " = ", shape_string(shape), ", got ",
         shape_string(tensor.sizes()));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    fail(op, "expected ", name, " of dtype ", dtype_name(dtype), ", got ",
         dtype_name(tensor.scalar_type()));
  }
}

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_float_dtype(const char* op, const char* name, const Tensor& tensor) {
  if (!is_float_dtype(tensor.scalar_type())) {
    fail(op, "expected ", name, " of dtype float32, bfloat16 or float16, got ",
         dtype_name(tensor.scalar_type()));
  }
}

// Biases, centres: float32 whatever the weights are, or the weights' dtype.
inline void check_parameter_dtype(const char* op, const char* name, const Tensor& tensor,
                                  ScalarType dtype) {
  const ScalarType got = tensor.scalar_type();
  if (got != ScalarType::Float && got != dtype) {
    fail(op, "expected ", name, " of dtype float32 or ", dtype_name(dtype), ", got ",
         dtype_name(got));
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* like_name, const Tensor& like) {
  if (tensor.is_cpu() != like.is_cpu() || tensor.get_device_index() != like.get_device_index()) {
    const auto device = [](const Tensor& t) {
      return t.is_cpu() ? std::string("cpu") : "cuda:" + std::to_string(t.get_device_index());
    };
    fail(op, "expected ", name, " on the device of ", like_name, " (", device(like), "), got ",
         device(tensor));
  }
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    fail(op, "expected ", name, " to be contiguous, got shape ", shape_string(tensor.sizes()),
         " with strides ", shape_string(tensor.strides()));
  }
}

// An output that the caller owns: exact shape and dtype, contiguous.
inline void check_out(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                      std::initializer_list<int64_t> shape, const char* symbols,
                      const char* like_name, const Tensor& like) {
  check_same_device(op, name, tensor, like_name, like);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, shape, symbols);
  check_contiguous(op, name, tensor);
}

inline bool is_valid_threshold(float threshold) {
  return std::isfinite(threshold) && threshold > 0.0f;
}

inline void check_threshold_value(const char* op, float threshold) {
  if (!is_valid_threshold(threshold)) {
    fail(op, "expected threshold to be finite and greater than 0 in float32, got ", threshold);
  }
}

// A threshold tensor is float32 and has one value for all tokens or one for each.
inline void check_threshold_tensor(const char* op, const Tensor& threshold, int64_t num_tokens,
                                   const char* like_name, const Tensor& like) {
  check_same_device(op, "threshold", threshold, like_name, like);
  check_dtype(op, "threshold", threshold, ScalarType::Float);
  if (threshold.dim() != 0 && !has_shape(threshold, {num_tokens})) {
    fail(op, "expected threshold of shape [] or [T] = [", num_tokens, "], got ",
         shape_string(threshold.sizes()));
  }
}

// Returns K, the number of columns that the selected experts may take.
inline int64_t check_expert_limits(const char* op, int64_t min_experts, int64_t max_experts,
                                   int64_t num_experts) {
  if (min_experts < 1 || min_experts > num_experts) {
    fail(op, "expected min_experts from 1 to the number of experts, ", num_experts, ", got ",
         min_experts);
  }
  if (max_experts != 0 && (max_experts < min_experts || max_experts > num_experts)) {
    fail(op, "expected max_experts to be 0 (all) or from min_experts, ", min_experts,
         ", to the number of experts, ", num_experts, ", got ", max_experts);
  }
  return max_experts == 0 ? num_experts : max_experts;
}

struct RouteShape {
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int64_t num_columns;  // K
};

inline RouteShape check_route(const char* op, const Tensor& logits, int64_t min_experts,
                              int64_t max_experts) {
  check_float_dtype(op, "logits", logits);
  if (logits.dim() != 2 || logits.size(1) < 1) {
    fail(op, "expected logits of shape [T, E] with E of at least 1, got ",
         shape_string(logits.sizes()));
  }
  const int64_t num_experts = logits.size(1);
  return {logits.size(0), num_experts,
          check_expert_limits(op, min_experts, max_experts, num_experts)};
}

inline void check_route_out(const char* op, const RouteShape& shape, const Tensor& logits,
                            const Tensor& expert_ids, const Tensor& probs, const Tensor& counts) {
  const int64_t T = shape.num_tokens;
  const int64_t K = shape.num_columns;
  check_out(op, "expert_ids", expert_ids, ScalarType::Int, {T, K}, "[T, K]", "logits", logits);
  check_out(op, "probs", probs, ScalarType::Float, {T, K}, "[T, K]", "logits", logits);
  check_out(op, "counts", counts, ScalarType::Int, {T}, "[T]", "logits", logits);
}

}  // namespace prunepath
