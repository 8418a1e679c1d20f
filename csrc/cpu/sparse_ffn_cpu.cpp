#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "cpu/ffn.h"
#include "cpu/ffn_problem.h"
#include "cpu/kernels.h"

namespace prunepath {
namespace {

void run(const FfnProblem& problem, const SparseFfnArguments& arguments, const Tensor& expert_ids,
         const Tensor& counts, void* workspace) {
  run_sparse_ffn(problem, static_cast<const int32_t*>(expert_ids.const_data_ptr()),
                 static_cast<const int32_t*>(counts.const_data_ptr()), arguments.num_columns,
                 workspace);
}

Tensor sparse_ffn(const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                  const Tensor& expert_ids, const Tensor& counts, const std::string& activation,
                  const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                  const std::optional<Tensor>& center) {
  const SparseFfnArguments arguments =
      check_sparse_ffn(x, w_in, w_out, expert_ids, counts, activation, b_in, b_out, center);
  const FfnShape& shape = arguments.shape;
  Tensor y = new_tensor({shape.num_tokens, shape.layout.hidden_size}, x.scalar_type());
  const Scratch workspace(ffn_workspace_size(shape.layout, shape.num_tokens, false));
  run(make_problem(shape, x, w_in, w_out, b_in, b_out, center, y), arguments, expert_ids, counts,
      workspace.data());
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
                  ffn_workspace_size(shape.layout, shape.num_tokens, false), x);
  run(make_problem(shape, x, w_in, w_out, b_in, b_out, center, y), arguments, expert_ids, counts,
      workspace.mutable_data_ptr());
}

int64_t workspace_size(const std::string& op, const Tensor& x, const Tensor& w_in) {
  return ffn_workspace_size(check_workspace_shapes(op, x, w_in), x.size(0), op == "routed_ffn");
}

std::string cpu_kernel() { return cpu_kernels().name; }

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CPU, m) {
  m.impl("sparse_ffn", TORCH_BOX(&prunepath::sparse_ffn));
  m.impl("sparse_ffn.out", TORCH_BOX(&prunepath::sparse_ffn_out));
  m.impl("ffn_workspace_size", TORCH_BOX(&prunepath::workspace_size));
}

// Has no tensor among its arguments, so it belongs to no device.
STABLE_TORCH_LIBRARY_IMPL(prunepath, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernel", TORCH_BOX(&prunepath::cpu_kernel));
}
