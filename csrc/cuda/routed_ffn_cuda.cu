#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cuda/ffn_problem.cuh"

namespace prunepath {
namespace {

struct Arguments {
  FfnShape shape;
  int64_t num_columns;
};

// The values of thresholds are not checked: that would wait for the GPU.
Arguments check(const Tensor& x, const Tensor& router_weight,
                const std::optional<Tensor>& router_bias, const Tensor& threshold,
                const Tensor& w_in, const Tensor& w_out, const std::string& activation,
                const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                const std::optional<Tensor>& center, int64_t min_experts, int64_t max_experts) {
  const char* op = "routed_ffn";
  const FfnShape shape = check_ffn(op, x, w_in, w_out, activation, b_in, b_out, center);
  check_router(op, shape, w_in, router_weight, router_bias);
  check_threshold_tensor(op, threshold, shape.num_tokens, "x", x);
  return {shape, check_expert_limits(op, min_experts, max_experts, shape.layout.num_experts)};
}

void run(const Arguments& arguments, FfnArgs args, const Tensor& x, const Tensor& router_weight,
         const std::optional<Tensor>& router_bias, const Tensor& threshold, int64_t min_experts,
         const Tensor& counts, const Tensor& workspace) {
  if (arguments.shape.num_tokens == 0) {
    return;
  }
  const DeviceGuard guard(x.get_device_index());
  args.router_weight = router_weight.const_data_ptr();
  args.router_bias = device_parameter(router_bias);
  args.thresholds = static_cast<const float*>(threshold.const_data_ptr());
  args.threshold_stride = threshold.dim() == 1 ? threshold.stride(0) : 0;
  args.min_experts = static_cast<int32_t>(min_experts);
  args.num_columns = static_cast<int32_t>(arguments.num_columns);
  args.counts_out = static_cast<int32_t*>(counts.mutable_data_ptr());
  run_ffn(args, arguments.shape.layout, arguments.shape.num_tokens, x.scalar_type(),
          x.get_device_index(), current_stream(x), workspace.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> routed_ffn(
    const Tensor& x, const Tensor& router_weight, const std::optional<Tensor>& router_bias,
    const Tensor& threshold, const Tensor& w_in, const Tensor& w_out, const std::string& activation,
    const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
    const std::optional<Tensor>& center, int64_t min_experts, int64_t max_experts) {
  const Arguments arguments = check(x, router_weight, router_bias, threshold, w_in, w_out,
                                    activation, b_in, b_out, center, min_experts, max_experts);
  const FfnShape& shape = arguments.shape;
  Tensor y = torch::stable::new_empty(x, {shape.num_tokens, shape.layout.hidden_size});
  Tensor counts = torch::stable::new_empty(x, {shape.num_tokens}, ScalarType::Int);
  const Tensor workspace = new_workspace(shape, true, x);
  run(arguments, make_args(shape, x, w_in, w_out, b_in, b_out, center, y), x, router_weight,
      router_bias, threshold, min_experts, counts, workspace);
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
  check_workspace("routed_ffn", workspace,
                  ffn_workspace_size(shape.layout, shape.num_tokens, true, x.get_device_index()),
                  x);
  run(arguments, make_args(shape, x, w_in, w_out, b_in, b_out, center, y), x, router_weight,
      router_bias, threshold, min_experts, counts, workspace);
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("routed_ffn", TORCH_BOX(&prunepath::routed_ffn));
  m.impl("routed_ffn.out", TORCH_BOX(&prunepath::routed_ffn_out));
}
