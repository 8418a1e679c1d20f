// The schemas of every operator: torch.ops.prunepath.*. Kernels register against them in csrc/cpu
// and csrc/cuda, fakes in prunepath/ops/fakes.py.
//
// T tokens, E experts of n neurons, H hidden size, K = max_experts or E, G = 2 (gated) or 1.
// `.out` overloads write to tensors that the caller owns and return nothing.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(prunepath, m) {
  // logits [T, E] -> expert_ids int32 [T, K], probs float32 [T, K], counts int32 [T].
  m.def(
      "route(Tensor logits, float threshold, *, int min_experts=1, int max_experts=0) "
      "-> (Tensor expert_ids, Tensor probs, Tensor counts)");
  m.def(
      "route.out(Tensor logits, float threshold, *, int min_experts=1, int max_experts=0, "
      "Tensor(a!) expert_ids, Tensor(b!) probs, Tensor(c!) counts) -> ()");
  // threshold float32 [] or [T].
  m.def(
      "route.tensor(Tensor logits, Tensor threshold, *, int min_experts=1, int max_experts=0) "
      "-> (Tensor expert_ids, Tensor probs, Tensor counts)");
  m.def(
      "route.tensor_out(Tensor logits, Tensor threshold, *, int min_experts=1, "
      "int max_experts=0, Tensor(a!) expert_ids, Tensor(b!) probs, Tensor(c!) counts) -> ()");

  // gate, up [E*n, H], down [H, E*n] -> w_in [E, n, G, H], w_out [E, n, H].
  m.def(
      "pack_experts(Tensor? gate, Tensor up, Tensor down, int num_experts) "
      "-> (Tensor w_in, Tensor w_out)");
  m.def(
      "pack_experts.out(Tensor? gate, Tensor up, Tensor down, int num_experts, *, "
      "Tensor(a!) w_in, Tensor(b!) w_out) -> ()");
  // (gate, up, down) or (up, down).
  m.def("unpack_experts(Tensor w_in, Tensor w_out) -> Tensor[]");
  m.def(
      "unpack_experts.out(Tensor w_in, Tensor w_out, *, Tensor(a!)? gate, Tensor(b!) up, "
      "Tensor(c!) down) -> ()");

  // x [T, H], b_in [E, n, G], b_out [H], center [E, n] -> y [T, H].
  m.def(
      "sparse_ffn(Tensor x, Tensor w_in, Tensor w_out, Tensor expert_ids, Tensor counts, "
      "str activation, *, Tensor? b_in=None, Tensor? b_out=None, Tensor? center=None) -> Tensor");
  m.def(
      "sparse_ffn.out(Tensor x, Tensor w_in, Tensor w_out, Tensor expert_ids, Tensor counts, "
      "str activation, *, Tensor? b_in=None, Tensor? b_out=None, Tensor? center=None, "
      "Tensor(a!) y, Tensor(b!) workspace) -> ()");

  // router_weight [E, H], router_bias [E], threshold float32 [] or [T].
  m.def(
      "routed_ffn(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor threshold, "
      "Tensor w_in, Tensor w_out, str activation, *, Tensor? b_in=None, Tensor? b_out=None, "
      "Tensor? center=None, int min_experts=1, int max_experts=0) -> (Tensor y, Tensor counts)");
  m.def(
      "routed_ffn.out(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor threshold, "
      "Tensor w_in, Tensor w_out, str activation, *, Tensor? b_in=None, Tensor? b_out=None, "
      "Tensor? center=None, int min_experts=1, int max_experts=0, Tensor(a!) y, "
      "Tensor(b!) counts, Tensor(c!) workspace) -> ()");

  // Bytes of workspace that the `.out` overload of sparse_ffn or routed_ffn needs for these
  // tensors; on the CPU with the current number of threads.
  m.def("ffn_workspace_size(str op, Tensor x, Tensor w_in) -> int");

  // Name of the kernels that the CPU's operators use in this process.
  m.def("cpu_kernel() -> str");
}
