#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "cuda/ffn.cuh"

namespace prunepath {
namespace {

Tensor sparse_ffn(const Tensor& x, const std::optional<Tensor>& gate, const Tensor& up,
                  const Tensor& down_t, const Tensor& expert_ids, const Tensor& counts,
                  const std::string& activation, int64_t num_experts,
                  const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
                  const std::optional<Tensor>& down_bias) {
  const char* op = "sparse_ffn";
  const FfnTensors tensors{x, gate, up, down_t, gate_bias, up_bias, down_bias};
  const FfnShape shape = check_ffn(op, tensors, num_experts, activation);
  const int64_t num_columns = check_selection(op, x, expert_ids, counts);
  const DeviceGuard guard(x.get_device_index());
  const Tensor rows = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(rows, {shape.num_tokens, shape.layout.hidden_size});
  const GivenExperts given{static_cast<const int32_t*>(expert_ids.const_data_ptr()),
                           static_cast<const int32_t*>(counts.const_data_ptr()),
                           static_cast<int32_t>(num_columns)};
  run_ffn(op, tensors, rows, shape, given, y);
  return y;
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("sparse_ffn", TORCH_BOX(&prunepath::sparse_ffn));
}
