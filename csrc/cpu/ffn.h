#pragma once

// The FFN on the CPU: x and the selected experts to y, parallel over the neurons of every expert
// that any token of a tile needs.

#include <cstdint>

#include "cpu/ffn_kernels.h"
#include "cpu/route_kernels.h"
#include "cpu/tensors.h"

namespace prunepath {

struct FfnProblem {
  FfnWeights weights;
  int64_t num_tokens;
  const void* x;  // of weights.dtype, as y is
  int64_t x_token_stride;
  int64_t x_hidden_stride;
  Parameter b_out;
  void* y;  // contiguous
};

struct Router {
  const void* weight;  // [E, H] of the FFN's dtype
  Parameter bias;
  Thresholds thresholds;
  RouteLimits limits;
};

// Bytes of workspace that the two functions below need with the current number of threads.
int64_t ffn_workspace_size(const ExpertLayout& layout, int64_t num_tokens, bool routed);

// expert_ids [num_tokens, num_columns], counts [num_tokens], contiguous. Throws on a bad selection.
void run_sparse_ffn(const FfnProblem& problem, const int32_t* expert_ids, const int32_t* counts,
                    int64_t num_columns, void* workspace);

// Writes counts [num_tokens].
void run_routed_ffn(const FfnProblem& problem, const Router& router, int32_t* counts,
                    void* workspace);

}  // namespace prunepath
