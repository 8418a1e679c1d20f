#pragma once

// Checked tensors as the pointers that ffn.h works on.

#include <optional>

#include "cpu/ffn.h"

namespace prunepath {

inline Parameter make_parameter(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? Parameter{tensor->const_data_ptr(), element_type(*tensor)}
                            : Parameter{};
}

inline FfnProblem make_problem(const FfnShape& shape, const Tensor& x, const Tensor& w_in,
                               const Tensor& w_out, const std::optional<Tensor>& b_in,
                               const std::optional<Tensor>& b_out,
                               const std::optional<Tensor>& center, const Tensor& y) {
  const FfnWeights weights{shape.layout,           element_type(w_in),     w_in.const_data_ptr(),
                           shape.in_strides,       w_out.const_data_ptr(), make_parameter(b_in),
                           make_parameter(center), shape.activation};
  return {weights,     shape.num_tokens,      x.const_data_ptr(),  x.stride(0),
          x.stride(1), make_parameter(b_out), y.mutable_data_ptr()};
}

}  // namespace prunepath
