#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "cuda/ffn_problem.cuh"

namespace prunepath {
namespace {

void run(const SparseFfnArguments& arguments, FfnArgs args, const Tensor& x,
         const Tensor& expert_ids, const Tensor& counts, const Tensor& workspace) {
  if (arguments.shape.num_tokens == 0) {
    return;
  }
  const DeviceGuard guard(x.get_device_index());
  static const int32_t no_experts = 0;  // an address for expert_ids that has no columns
  args.expert_ids = static_cast<const int32_t*>(expert_ids.const_data_ptr());
  args.expert_ids = args.expert_ids == nullptr ? &no_experts : args.expert_ids;
  args.counts = static_cast<const int32_t*>(counts.const_data_ptr());
  args.num_columns = static_cast<int32_t>(arguments.num_columns);
  run_ffn(args, arguments.shape.layout, arguments.shape.num_tokens, x.scalar_type(),
          x.get_device_index(), current_stream(x), workspace.mutable_data_ptr());
}

Tensor sparse_ffn(const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                  const Tensor& expert_ids, const Tensor& counts, const std::string& activation,
                  const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                  const std::optional<Tensor>& center) {
  const SparseFfnArguments arguments =
      check_sparse_ffn(x, w_in, w_out, expert_ids, counts, activation, b_in, b_out, center);
  Tensor y =
      torch::stable::new_empty(x, {arguments.shape.num_tokens, arguments.shape.layout.hidden_size});
  const Tensor workspace = new_workspace(arguments.shape, false, x);
  run(arguments, make_args(arguments.shape, x, w_in, w_out, b_in, b_out, center, y), x, expert_ids,
      counts, workspace);
  return y;
}

void sparse_ffn_out(const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                    const Tensor& expert_ids, const Tensor& counts, const std::string& activation,
                    const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                    const std::optional<Tensor>& center, const Tensor& y, const Tensor& workspace) {
  const SparseFfnArguments arguments =
      check_sparse_ffn(x, w_in, w_out, expert_ids, counts, activation, b_in, b_out, center);
  const FfnShape& shape = arguments.shape;
  check_out("sparse_ffn", "y", y, x.scalar_type(), {shape.num_tokens, shape.layout.hidden_size},
            "[T, H]", "x", x);
  check_workspace("sparse_ffn", workspace,
                  ffn_workspace_size(shape.layout, shape.num_tokens, false, x.get_device_index()),
                  x);
  run(arguments, make_args(shape, x, w_in, w_out, b_in, b_out, center, y), x, expert_ids, counts,
      workspace);
}

int64_t workspace_size(const std::string& op, const Tensor& x, const Tensor& w_in) {
  const ExpertLayout layout = check_workspace_shapes(op, x, w_in);
  return ffn_workspace_size(layout, x.size(0), op == "routed_ffn", x.get_device_index());
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("sparse_ffn", TORCH_BOX(&prunepath::sparse_ffn));
  m.impl("sparse_ffn.out", TORCH_BOX(&prunepath::sparse_ffn_out));
  m.impl("ffn_workspace_size", TORCH_BOX(&prunepath::workspace_size));
}
