#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/ffn.h"
#include "cpu/ffn_problem.h"

namespace prunepath {
namespace {

struct Arguments {
  FfnShape shape;
  Router router;
};

Arguments check(const Tensor& x, const Tensor& router_weight,
                const std::optional<Tensor>& router_bias, const Tensor& threshold,
                const Tensor& w_in, const Tensor& w_out, const std::string& activation,
                const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                const std::optional<Tensor>& center, int64_t min_experts, int64_t max_experts) {
  const char* op = "routed_ffn";
  const FfnShape shape = check_ffn(op, x, w_in, w_out, activation, b_in, b_out, center);
  check_router(op, shape, w_in, router_weight, router_bias);
  const int64_t num_columns =
      check_expert_limits(op, min_experts, max_experts, shape.layout.num_experts);
  const Thresholds thresholds = check_thresholds(op, threshold, shape.num_tokens, "x", x);
  return {shape,
          {router_weight.const_data_ptr(),
           make_parameter(router_bias),
           thresholds,
           {min_experts, num_columns}}};
}

std::tuple<Tensor, Tensor> routed_ffn(
    const Tensor& x, const Tensor& router_weight, const std::optional<Tensor>& router_bias,
    const Tensor& threshold, const Tensor& w_in, const Tensor& w_out, const std::string& activation,
    const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
    const std::optional<Tensor>& center, int64_t min_experts, int64_t max_experts) {
  const Arguments arguments = check(x, router_weight, router_bias, threshold, w_in, w_out,
                                    activation, b_in, b_out, center, min_experts, max_experts);
  const FfnShape& shape = arguments.shape;
  Tensor y = new_tensor({shape.num_tokens, shape.layout.hidden_size}, x.scalar_type());
  Tensor counts = new_tensor({shape.num_tokens}, ScalarType::Int);
  const Scratch workspace(ffn_workspace_size(shape.layout, shape.num_tokens, true));
  run_routed_ffn(make_problem(shape, x, w_in, w_out, b_in, b_out, center, y), arguments.router,
                 static_cast<int32_t*>(counts.mutable_data_ptr()), workspace.data());
  return {y, counts};
}

void routed_ffn_out(const Tensor& x, const Tensor& router_weight,
                    const std::optional<Tensor>& router_bias, const Tensor& threshold,
                    const Tensor& w_in, const Tensor& w_out, const std::string& activation,
                    const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                    const std::optional<Tensor>& center, int64_t min_experts, int64_t max_experts,
                    const Tensor& y, const Tensor& counts, const Tensor& workspace) {
  const Arguments arguments = check(x, router_weight, router_bias, threshold, w_in, w_out,
                                    activation, b_in, b_out, center, min_experts, max_experts);
  const FfnShape& shape = arguments.shape;
  check_out("routed_ffn", "y", y, x.scalar_type(), {shape.num_tokens, shape.layout.hidden_size},
            "[T, H]", "x", x);
  check_out("routed_ffn", "counts", counts, ScalarType::Int, {shape.num_tokens}, "[T]", "x", x);
  check_workspace("routed_ffn", workspace, ffn_workspace_size(shape.layout, shape.num_tokens, true),
                  x);
  run_routed_ffn(make_problem(shape, x, w_in, w_out, b_in, b_out, center, y), arguments.router,
                 static_cast<int32_t*>(counts.mutable_data_ptr()), workspace.mutable_data_ptr());
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CPU, m) {
  m.impl("routed_ffn", TORCH_BOX(&prunepath::routed_ffn));
  m.impl("routed_ffn.out", TORCH_BOX(&prunepath::routed_ffn_out));
}
