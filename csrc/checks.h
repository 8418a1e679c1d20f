#pragma once

// Argument checks that the CPU and the CUDA operators share. A failed check throws one sentence:
// operator, argument, what was expected, what came.

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/activations.h"
#include "core/layout.h"

namespace prunepath {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Text of an argument for an error message. Not a string stream: where a library carries its own
// copy of libstdc++, a stream's locale may come from another one.
inline std::string text(const char* value) { return value; }
inline std::string text(const std::string& value) { return value; }
inline std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", value);
  return digits;
}
template <typename Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
inline std::string text(Integer value) {
  return std::to_string(value);
}

template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  throw std::runtime_error("prunepath::" + std::string(op) + ": " + (text(parts) + ...) + ".");
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
  std::string out;
  for (int64_t size : sizes) {
    out += (out.empty() ? "[" : ", ") + text(size);
  }
  return out.empty() ? "[]" : out + "]";
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

struct FfnShape {
  int64_t num_tokens;  // T
  ExpertLayout layout;
  InStrides in_strides;
  Activation activation;
};

inline Activation check_activation(const char* op, const std::string& name) {
  int32_t value = 0;
  for (const char* known : kActivationNames) {
    if (name == known) {
      return static_cast<Activation>(value);
    }
    ++value;
  }
  fail(op, "expected activation relu, gelu, gelu_tanh, silu or relu2, got ", name);
}

inline ExpertLayout check_expert_weights(const char* op, const Tensor& w_in, const Tensor& w_out) {
  check_float_dtype(op, "w_in", w_in);
  if (w_in.dim() != 4 || (w_in.size(2) != 1 && w_in.size(2) != 2) || w_in.size(0) < 1) {
    fail(op, "expected w_in of shape [E, n, G, H] with E of at least 1 and G of 1 or 2, got ",
         shape_string(w_in.sizes()));
  }
  const ExpertLayout layout{w_in.size(0), w_in.size(1), w_in.size(2), w_in.size(3)};
  check_same_device(op, "w_out", w_out, "w_in", w_in);
  check_dtype(op, "w_out", w_out, w_in.scalar_type());
  check_shape(op, "w_out", w_out, {layout.num_experts, layout.expert_width, layout.hidden_size},
              "[E, n, H]");
  return layout;
}

inline ExpertLayout check_pack_experts(const std::optional<Tensor>& gate, const Tensor& up,
                                       const Tensor& down, int64_t num_experts) {
  const char* op = "pack_experts";
  check_float_dtype(op, "up", up);
  if (up.dim() != 2) {
    fail(op, "expected up of shape [D, H], got ", shape_string(up.sizes()));
  }
  const int64_t D = up.size(0);
  const int64_t H = up.size(1);
  check_same_device(op, "down", down, "up", up);
  check_dtype(op, "down", down, up.scalar_type());
  check_shape(op, "down", down, {H, D}, "[H, D]");
  if (gate.has_value()) {
    check_same_device(op, "gate", *gate, "up", up);
    check_dtype(op, "gate", *gate, up.scalar_type());
    check_shape(op, "gate", *gate, {D, H}, "[D, H]");
  }
  if (num_experts < 1 || D % num_experts != 0) {
    fail(op, "expected num_experts to be at least 1 and to divide the ", D, " neurons of up, got ",
         num_experts);
  }
  return {num_experts, D / num_experts, gate.has_value() ? 2 : 1, H};
}

inline void check_pack_experts_out(const ExpertLayout& layout, const Tensor& up, const Tensor& w_in,
                                   const Tensor& w_out) {
  const char* op = "pack_experts";
  const ScalarType dtype = up.scalar_type();
  check_out(op, "w_in", w_in, dtype,
            {layout.num_experts, layout.expert_width, layout.per_neuron, layout.hidden_size},
            "[E, n, G, H]", "up", up);
  check_out(op, "w_out", w_out, dtype,
            {layout.num_experts, layout.expert_width, layout.hidden_size}, "[E, n, H]", "up", up);
}

inline ExpertLayout check_unpack_experts(const Tensor& w_in, const Tensor& w_out) {
  const ExpertLayout layout = check_expert_weights("unpack_experts", w_in, w_out);
  check_contiguous("unpack_experts", "w_in", w_in);
  check_contiguous("unpack_experts", "w_out", w_out);
  return layout;
}

inline void check_unpack_experts_out(const ExpertLayout& layout, const Tensor& w_in,
                                     const std::optional<Tensor>& gate, const Tensor& up,
                                     const Tensor& down) {
  const char* op = "unpack_experts";
  const int64_t D = num_neurons(layout);
  const int64_t H = layout.hidden_size;
  const ScalarType dtype = w_in.scalar_type();
  if (gate.has_value() != (layout.per_neuron == 2)) {
    fail(op, "expected gate to be ", layout.per_neuron == 2 ? "given" : "None",
         " for w_in of shape ", shape_string(w_in.sizes()), ", got ",
         gate.has_value() ? "a tensor" : "None");
  }
  if (gate.has_value()) {
    check_out(op, "gate", *gate, dtype, {D, H}, "[D, H]", "w_in", w_in);
  }
  check_out(op, "up", up, dtype, {D, H}, "[D, H]", "w_in", w_in);
  check_out(op, "down", down, dtype, {H, D}, "[H, D]", "w_in", w_in);
}

// A bias or centre that may be missing: contiguous, float32 or the weights' dtype.
inline void check_parameter(const char* op, const char* name, const std::optional<Tensor>& tensor,
                            const Tensor& w_in, std::initializer_list<int64_t> shape,
                            const char* symbols) {
  if (tensor.has_value()) {
    check_same_device(op, name, *tensor, "w_in", w_in);
    check_parameter_dtype(op, name, *tensor, w_in.scalar_type());
    check_shape(op, name, *tensor, shape, symbols);
    check_contiguous(op, name, *tensor);
  }
}

// w_in may be a view, as of one matrix with the gate's rows before those of up, as long as rows are
// contiguous and neurons follow each other at one distance.
inline InStrides check_in_strides(const char* op, const ExpertLayout& layout, const Tensor& w_in) {
  const int64_t n = layout.expert_width;
  const int64_t neuron = n == 1 ? w_in.stride(0) : w_in.stride(1);
  const bool spaced = layout.num_experts == 1 || w_in.stride(0) == n * neuron;
  const bool contiguous_rows = layout.hidden_size == 1 || w_in.stride(3) == 1;
  if (!w_in.is_contiguous() && !(spaced && contiguous_rows)) {
    fail(op, "expected w_in with contiguous rows and neurons at one distance, got shape ",
         shape_string(w_in.sizes()), " with strides ", shape_string(w_in.strides()));
  }
  return {neuron, w_in.stride(2)};
}

inline FfnShape check_ffn(const char* op, const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                          const std::string& activation, const std::optional<Tensor>& b_in,
                          const std::optional<Tensor>& b_out, const std::optional<Tensor>& center) {
  const ExpertLayout layout = check_expert_weights(op, w_in, w_out);
  const int64_t E = layout.num_experts;
  const int64_t n = layout.expert_width;
  const int64_t G = layout.per_neuron;
  const int64_t H = layout.hidden_size;
  const InStrides in_strides = check_in_strides(op, layout, w_in);
  check_contiguous(op, "w_out", w_out);
  check_same_device(op, "x", x, "w_in", w_in);
  check_dtype(op, "x", x, w_in.scalar_type());
  if (x.dim() != 2 || x.size(1) != H) {
    fail(op, "expected x of shape [T, H] = [T, ", H, "], got ", shape_string(x.sizes()));
  }
  check_parameter(op, "b_in", b_in, w_in, {E, n, G}, "[E, n, G]");
  check_parameter(op, "b_out", b_out, w_in, {H}, "[H]");
  check_parameter(op, "center", center, w_in, {E, n}, "[E, n]");
  return {x.size(0), layout, in_strides, check_activation(op, activation)};
}

// For `ffn_workspace_size`.
inline ExpertLayout check_workspace_shapes(const std::string& op, const Tensor& x,
                                           const Tensor& w_in) {
  if (op != "sparse_ffn" && op != "routed_ffn") {
    fail("ffn_workspace_size", "expected op sparse_ffn or routed_ffn, got ", op);
  }
  if (x.dim() != 2 || w_in.dim() != 4) {
    fail("ffn_workspace_size", "expected x of shape [T, H] and w_in of shape [E, n, G, H], got ",
         shape_string(x.sizes()), " and ", shape_string(w_in.sizes()));
  }
  return {w_in.size(0), w_in.size(1), w_in.size(2), w_in.size(3)};
}

// Returns K, the columns of expert_ids.
inline int64_t check_selection(const char* op, const FfnShape& shape, const Tensor& x,
                               const Tensor& expert_ids, const Tensor& counts) {
  check_same_device(op, "expert_ids", expert_ids, "x", x);
  check_same_device(op, "counts", counts, "x", x);
  check_dtype(op, "expert_ids", expert_ids, ScalarType::Int);
  check_dtype(op, "counts", counts, ScalarType::Int);
  if (expert_ids.dim() != 2 || expert_ids.size(0) != shape.num_tokens) {
    fail(op, "expected expert_ids of shape [T, K] = [", shape.num_tokens, ", K], got ",
         shape_string(expert_ids.sizes()));
  }
  check_shape(op, "counts", counts, {shape.num_tokens}, "[T]");
  check_contiguous(op, "expert_ids", expert_ids);
  check_contiguous(op, "counts", counts);
  return expert_ids.size(1);
}

struct SparseFfnArguments {
  FfnShape shape;
  int64_t num_columns;  // K, of expert_ids
};

inline SparseFfnArguments check_sparse_ffn(const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                                           const Tensor& expert_ids, const Tensor& counts,
                                           const std::string& activation,
                                           const std::optional<Tensor>& b_in,
                                           const std::optional<Tensor>& b_out,
                                           const std::optional<Tensor>& center) {
  const FfnShape shape = check_ffn("sparse_ffn", x, w_in, w_out, activation, b_in, b_out, center);
  return {shape, check_selection("sparse_ffn", shape, x, expert_ids, counts)};
}

inline void check_router(const char* op, const FfnShape& shape, const Tensor& w_in,
                         const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t E = shape.layout.num_experts;
  check_same_device(op, "router_weight", weight, "w_in", w_in);
  check_dtype(op, "router_weight", weight, w_in.scalar_type());
  check_shape(op, "router_weight", weight, {E, shape.layout.hidden_size}, "[E, H]");
  check_contiguous(op, "router_weight", weight);
  check_parameter(op, "router_bias", bias, w_in, {E}, "[E]");
}

inline void check_workspace(const char* op, const Tensor& workspace, int64_t size,
                            const Tensor& x) {
  check_same_device(op, "workspace", workspace, "x", x);
  check_dtype(op, "workspace", workspace, ScalarType::Byte);
  check_contiguous(op, "workspace", workspace);
  if (workspace.dim() != 1 || workspace.size(0) < size) {
    fail(op, "expected workspace of shape [bytes] with at least ", size, " bytes, got ",
         shape_string(workspace.sizes()));
  }
}

}  // namespace prunepath
