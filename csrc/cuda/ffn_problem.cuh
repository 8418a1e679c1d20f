#pragma once

// Checked tensors as what ffn.cuh works on, and its entry points.

#include <optional>

#include "cuda/ffn.cuh"

namespace prunepath {

// Bytes of workspace that `run_ffn` needs on the device.
int64_t ffn_workspace_size(const ExpertLayout& layout, int64_t num_tokens, bool routed, int device);

// Launches the FFN of any number of tokens. With `expert_ids` null it selects, and writes
// `counts_out`.
void run_ffn(FfnArgs args, const ExpertLayout& layout, int64_t num_tokens, ScalarType dtype,
             int device, cudaStream_t stream, void* workspace);

inline DeviceParameter device_parameter(const std::optional<Tensor>& tensor) {
  return tensor.has_value()
             ? DeviceParameter{tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Float}
             : DeviceParameter{nullptr, false};
}

inline FfnArgs make_args(const FfnShape& shape, const Tensor& x, const Tensor& w_in,
                         const Tensor& w_out, const std::optional<Tensor>& b_in,
                         const std::optional<Tensor>& b_out, const std::optional<Tensor>& center,
                         const Tensor& y) {
  FfnArgs args{};
  args.x = x.const_data_ptr();
  args.x_token_stride = x.stride(0);
  args.x_hidden_stride = x.stride(1);
  args.w_in = w_in.const_data_ptr();
  args.w_out = w_out.const_data_ptr();
  args.b_in = device_parameter(b_in);
  args.b_out = device_parameter(b_out);
  args.center = device_parameter(center);
  args.y = y.mutable_data_ptr();
  args.in_neuron_stride = shape.in_strides.neuron;
  args.in_inner_stride = shape.in_strides.inner;
  args.hidden_size = static_cast<int32_t>(shape.layout.hidden_size);
  args.num_experts = static_cast<int32_t>(shape.layout.num_experts);
  args.expert_width = static_cast<int32_t>(shape.layout.expert_width);
  args.per_neuron = static_cast<int32_t>(shape.layout.per_neuron);
  args.activation = shape.activation;
  return args;
}

inline Tensor new_workspace(const FfnShape& shape, bool routed, const Tensor& x) {
  return torch::stable::new_empty(
      x, {ffn_workspace_size(shape.layout, shape.num_tokens, routed, x.get_device_index())},
      ScalarType::Byte);
}

}  // namespace prunepath
