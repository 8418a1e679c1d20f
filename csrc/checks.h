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
#include "core/routing.h"

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

// Biases: float32 whatever the weights are, or the weights' dtype.
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

inline void check_threshold_value(const char* op, float threshold) {
  if (!(std::isfinite(threshold) && threshold > 0.0f)) {
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

inline void check_num_experts(const char* op, int64_t num_experts) {
  if (num_experts < 1 || num_experts > kMaxExperts) {
    fail(op, "expected from 1 to ", kMaxExperts, " experts, got ", num_experts);
  }
}

// For route and select.
inline RouteShape check_route(const char* op, const Tensor& logits, int64_t min_experts,
                              int64_t max_experts) {
  check_float_dtype(op, "logits", logits);
  if (logits.dim() != 2) {
    fail(op, "expected logits of shape [T, E], got ", shape_string(logits.sizes()));
  }
  const int64_t num_experts = logits.size(1);
  check_num_experts(op, num_experts);
  return {logits.size(0), num_experts,
          check_expert_limits(op, min_experts, max_experts, num_experts)};
}

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

// A bias that may be missing: contiguous, float32 or the dtype of `like`.
inline void check_bias(const char* op, const char* name, const std::optional<Tensor>& bias,
                       const char* like_name, const Tensor& like, int64_t size,
                       const char* symbols) {
  if (bias.has_value()) {
    check_same_device(op, name, *bias, like_name, like);
    check_parameter_dtype(op, name, *bias, like.scalar_type());
    check_shape(op, name, *bias, {size}, symbols);
    check_contiguous(op, name, *bias);
  }
}

// Weights as rows of contiguous elements, at any distance from each other.
inline void check_table(const char* op, const char* name, const Tensor& table,
                        const FfnLayout& layout, const Tensor& x) {
  check_same_device(op, name, table, "x", x);
  check_dtype(op, name, table, x.scalar_type());
  check_shape(op, name, table, {num_neurons(layout), layout.hidden_size}, "[D, H]");
  if (layout.hidden_size > 1 && table.stride(1) != 1) {
    fail(op, "expected ", name, " with contiguous rows, got shape ", shape_string(table.sizes()),
         " with strides ", shape_string(table.strides()));
  }
}

// The tensors that sparse_ffn and routed_ffn have in common.
struct FfnTensors {
  const Tensor& x;
  const std::optional<Tensor>& gate;
  const Tensor& up;
  const Tensor& down_t;
  const std::optional<Tensor>& gate_bias;
  const std::optional<Tensor>& up_bias;
  const std::optional<Tensor>& down_bias;
};

struct FfnShape {
  int64_t num_tokens;  // T
  FfnLayout layout;
  Activation activation;
};

inline FfnShape check_ffn(const char* op, const FfnTensors& tensors, int64_t num_experts,
                          const std::string& activation) {
  const Tensor& x = tensors.x;
  const Tensor& up = tensors.up;
  check_float_dtype(op, "x", x);
  if (up.dim() != 2 || up.size(0) < 1 || up.size(1) < 1) {
    fail(op, "expected up of shape [D, H], each of at least 1, got ", shape_string(up.sizes()));
  }
  const int64_t D = up.size(0);
  const int64_t H = up.size(1);
  check_num_experts(op, num_experts);
  if (D % num_experts != 0) {
    fail(op, "expected the number of experts to divide the ", D, " neurons of up, got ",
         num_experts, " experts");
  }
  if (x.dim() != 2 || x.size(1) != H) {
    fail(op, "expected x of shape [T, H] = [T, ", H, "], got ", shape_string(x.sizes()));
  }
  const bool gated = tensors.gate.has_value();
  const FfnLayout layout{num_experts,
                         D / num_experts,
                         H,
                         gated,
                         gated ? tensors.gate->stride(0) : 0,
                         up.stride(0),
                         tensors.down_t.dim() > 0 ? tensors.down_t.stride(0) : 0};
  check_table(op, "up", up, layout, x);
  if (gated) {
    check_table(op, "gate", *tensors.gate, layout, x);
  } else if (tensors.gate_bias.has_value()) {
    fail(op, "expected gate_bias to be None for an FFN without a gate, got a tensor");
  }
  check_table(op, "down_t", tensors.down_t, layout, x);
  check_bias(op, "gate_bias", tensors.gate_bias, "x", x, D, "[D]");
  check_bias(op, "up_bias", tensors.up_bias, "x", x, D, "[D]");
  check_bias(op, "down_bias", tensors.down_bias, "x", x, H, "[H]");
  return {x.size(0), layout, check_activation(op, activation)};
}

// For sparse_ffn. Returns K, the columns of expert_ids.
inline int64_t check_selection(const char* op, const Tensor& x, const Tensor& expert_ids,
                               const Tensor& counts) {
  const int64_t T = x.size(0);
  check_same_device(op, "expert_ids", expert_ids, "x", x);
  check_same_device(op, "counts", counts, "x", x);
  check_dtype(op, "expert_ids", expert_ids, ScalarType::Int);
  check_dtype(op, "counts", counts, ScalarType::Int);
  if (expert_ids.dim() != 2 || expert_ids.size(0) != T) {
    fail(op, "expected expert_ids of shape [T, K] = [", T, ", K], got ",
         shape_string(expert_ids.sizes()));
  }
  check_shape(op, "counts", counts, {T}, "[T]");
  check_contiguous(op, "expert_ids", expert_ids);
  check_contiguous(op, "counts", counts);
  return expert_ids.size(1);
}

// Of routed_ffn.
struct RouterTensors {
  const std::optional<Tensor>& in;
  const Tensor& out;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& in_scale;
  const std::optional<Tensor>& out_scale;
  const std::optional<Tensor>& floor;
  const std::optional<Tensor>& log_scale;
};

// For routed_ffn, before check_ffn. Returns E.
inline int64_t router_num_experts(const char* op, const RouterTensors& router) {
  if (router.out.dim() != 2) {
    fail(op, "expected router_out of shape [E, r], or [E, H] without router_in, got ",
         shape_string(router.out.sizes()));
  }
  if (router.floor.has_value() != router.log_scale.has_value()) {
    fail(op, "expected router_floor and router_log_scale, or neither, got one of them");
  }
  if (!router.log_scale.has_value()) {
    return router.out.size(0);
  }
  if (router.log_scale->dim() != 1) {
    fail(op, "expected router_log_scale of shape [E], got ",
         shape_string(router.log_scale->sizes()));
  }
  return router.log_scale->size(0);
}

// Of a router's table, contiguous rows of x's dtype or, with scales, of 4 bits an element. Returns
// how many columns it has to have for rows of `size` elements.
inline int64_t check_router_table(const char* op, const char* name, const Tensor& table,
                                  const char* scale_name, const std::optional<Tensor>& scale,
                                  const Tensor& x, int64_t size, const char* symbol) {
  check_same_device(op, name, table, "x", x);
  const bool packed = scale.has_value();
  const ScalarType dtype = packed ? ScalarType::Byte : x.scalar_type();
  if (table.scalar_type() != dtype) {
    fail(op, "expected ", name, " of dtype ", dtype_name(dtype), packed ? " with " : " without ",
         scale_name, ", got ", dtype_name(table.scalar_type()));
  }
  if (packed && size % 2 != 0) {
    fail(op, "expected an even ", symbol, " for ", name, " in 4 bits, got ", size);
  }
  check_contiguous(op, name, table);
  return packed ? size / 2 : size;
}

// rank: 0 for a router of full rank. factors: 0 for a linear router.
struct RouterShape {
  int64_t rank;
  int64_t factors;
};

// For routed_ffn.
inline RouterShape check_router(const char* op, const FfnShape& shape, const Tensor& x,
                                const RouterTensors& router) {
  const int64_t E = shape.layout.num_experts;
  const int64_t H = shape.layout.hidden_size;
  const int64_t factors = !router.floor.has_value() ? 0 : shape.layout.gated ? 2 : 1;
  const int64_t rows = factors > 1 ? factors * E : E;
  int64_t rank = 0;
  if (router.in.has_value()) {
    const int64_t columns = check_router_table(op, "router_in", *router.in, "router_in_scale",
                                               router.in_scale, x, H, "H");
    if (router.in->dim() != 2 || router.in->size(0) < 1 || router.in->size(1) != columns) {
      fail(op, "expected router_in of shape [r, H", columns < H ? " / 2" : "", "] = [r, ", columns,
           "] with r of at least 1, got ", shape_string(router.in->sizes()));
    }
    rank = router.in->size(0);
    check_bias(op, "router_in_scale", router.in_scale, "x", x, rank, "[r]");
  } else if (router.in_scale.has_value()) {
    fail(op, "expected router_in_scale to be None without router_in, got a tensor");
  }
  const int64_t size = rank > 0 ? rank : H;
  const char* symbol = rank > 0 ? "r" : "H";
  const int64_t columns = check_router_table(op, "router_out", router.out, "router_out_scale",
                                             router.out_scale, x, size, symbol);
  if (!has_shape(router.out, {rows, columns})) {
    fail(op, "expected router_out of shape [", factors > 1 ? "2 * E, " : "E, ", symbol,
         columns < size ? " / 2" : "", "] = [", rows, ", ", columns, "], got ",
         shape_string(router.out.sizes()));
  }
  const char* symbols = factors > 1 ? "[2 * E]" : "[E]";
  check_bias(op, "router_out_scale", router.out_scale, "x", x, rows, symbols);
  check_bias(op, "router_bias", router.bias, "x", x, rows, symbols);
  check_bias(op, "router_floor", router.floor, "x", x, rows, symbols);
  check_bias(op, "router_log_scale", router.log_scale, "x", x, E, "[E]");
  return {rank, factors};
}

// The values of `order` are for the operator to check.
inline void check_pack_experts(const std::optional<Tensor>& gate, const Tensor& up,
                               const Tensor& down, const std::optional<Tensor>& order) {
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
  if (order.has_value()) {
    check_same_device(op, "order", *order, "up", up);
    check_dtype(op, "order", *order, ScalarType::Long);
    check_shape(op, "order", *order, {D}, "[D]");
    check_contiguous(op, "order", *order);
  }
}

}  // namespace prunepath
