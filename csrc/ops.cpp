// The schemas of every operator: torch.ops.prunepath.*. Kernels register against them in csrc/cpu
// and csrc/cuda, fakes in prunepath/ops/fakes.py; prunepath/ops/__init__.py documents them.
//
// T tokens, H hidden size, D intermediate size, E experts of n = D / E neurons, r the router's
// rank, K = max_experts or E.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(prunepath, m) {
  // logits [T, E] -> expert_ids int32 [T, K], probs float32 [T, K], counts int32 [T].
  m.def(
      "route(Tensor logits, float threshold, *, int min_experts=1, int max_experts=0) "
      "-> (Tensor expert_ids, Tensor probs, Tensor counts)");
  // threshold float32 [] or [T].
  m.def(
      "route.tensor(Tensor logits, Tensor threshold, *, int min_experts=1, int max_experts=0) "
      "-> (Tensor expert_ids, Tensor probs, Tensor counts)");

  // logits [T, E] -> mask bool [T, E], counts int32 [T].
  m.def(
      "select(Tensor logits, float threshold, *, int min_experts=1, int max_experts=0) "
      "-> (Tensor mask, Tensor counts)");
  m.def(
      "select.tensor(Tensor logits, Tensor threshold, *, int min_experts=1, int max_experts=0) "
      "-> (Tensor mask, Tensor counts)");

  // gate, up [D, H], down [H, D], order int64 [D] -> (gate, up, down_t) or (up, down_t), each [D,
  // H].
  m.def("pack_experts(Tensor? gate, Tensor up, Tensor down, Tensor? order=None) -> Tensor[]");

  // x [T, H], gate, up, down_t [D, H], gate_bias, up_bias [D], down_bias [H] -> y [T, H].
  m.def(
      "sparse_ffn(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor expert_ids, "
      "Tensor counts, str activation, *, int num_experts, Tensor? gate_bias=None, "
      "Tensor? up_bias=None, Tensor? down_bias=None) -> Tensor");

  // router_in [r, H] and router_out [E, r], or router_out [E, H]; router_bias [E]; of a factored
  // router F * E rows in router_out and router_bias, router_floor [F * E], router_log_scale [E];
  // with a scale for every row of router_in or router_out, uint8 of half as many columns in its
  // place; threshold float32 [] or [T] -> y [T, H], counts int32 [T].
  m.def(
      "routed_ffn(Tensor x, Tensor? router_in, Tensor router_out, Tensor? router_bias, "
      "Tensor threshold, Tensor? gate, Tensor up, Tensor down_t, str activation, *, "
      "Tensor? router_in_scale=None, Tensor? router_out_scale=None, Tensor? router_floor=None, "
      "Tensor? router_log_scale=None, Tensor? gate_bias=None, Tensor? up_bias=None, "
      "Tensor? down_bias=None, int min_experts=1, int max_experts=0) -> (Tensor y, Tensor counts)");

  // Name of the kernels that the CPU's operators use in this process.
  m.def("cpu_kernel() -> str");
}
