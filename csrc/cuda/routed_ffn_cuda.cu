#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cuda/ffn.cuh"

namespace prunepath {
namespace {

std::tuple<Tensor, Tensor> routed_ffn(
    const Tensor& x, const std::optional<Tensor>& router_in, const Tensor& router_out,
    const std::optional<Tensor>& router_bias, const Tensor& threshold,
    const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down_t,
    const std::string& activation, const std::optional<Tensor>& router_in_scale,
    const std::optional<Tensor>& router_out_scale, const std::optional<Tensor>& router_floor,
    const std::optional<Tensor>& router_log_scale, const std::optional<Tensor>& gate_bias,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias,
    int64_t min_experts, int64_t max_experts) {
  const char* op = "routed_ffn";
  const FfnTensors tensors{x, gate, up, down_t, gate_bias, up_bias, down_bias};
  const RouterTensors router_tensors{router_in,       router_out,       router_bias,
                                     router_in_scale, router_out_scale, router_floor,
                                     router_log_scale};
  const FfnShape shape = check_ffn(op, tensors, router_num_experts(op, router_tensors), activation);
  const auto [rank, factors] = check_router(op, shape, x, router_tensors);
  // The values of thresholds are not checked: that would wait for the GPU.
  check_threshold_tensor(op, threshold, shape.num_tokens, "x", x);
  const int64_t num_columns =
      check_expert_limits(op, min_experts, max_experts, shape.layout.num_experts);
  const DeviceGuard guard(x.get_device_index());
  const Tensor rows = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(rows, {shape.num_tokens, shape.layout.hidden_size});
  Tensor counts = torch::stable::new_empty(rows, {shape.num_tokens}, ScalarType::Int);
  Router router{};
  router.in = rank > 0 ? router_in->const_data_ptr() : nullptr;
  router.out = router_out.const_data_ptr();
  router.in_scale = device_parameter(router_in_scale);
  router.out_scale = device_parameter(router_out_scale);
  router.bias = device_parameter(router_bias);
  router.floor = device_parameter(router_floor);
  router.log_scale = device_parameter(router_log_scale);
  router.factors = static_cast<int32_t>(factors);
  router.rank = static_cast<int32_t>(rank);
  router.thresholds = static_cast<const float*>(threshold.const_data_ptr());
  router.threshold_stride = threshold.dim() == 1 ? threshold.stride(0) : 0;
  router.min_experts = static_cast<int32_t>(min_experts);
  router.max_experts = static_cast<int32_t>(num_columns);
  router.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  run_ffn(op, tensors, rows, shape, router, y);
  return {y, counts};
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("routed_ffn", TORCH_BOX(&prunepath::routed_ffn));
}
