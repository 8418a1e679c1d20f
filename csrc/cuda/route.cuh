#pragma once

// Top-mass routing of whole rows, for operators that route inside.

#include <cstdint>

#include "checks.h"
#include "cuda/tensors.cuh"

namespace prunepath {

struct RouteArgs {
  const void* logits;
  int64_t token_stride;
  int64_t expert_stride;
  const float* thresholds;  // null: `threshold` for every token
  int64_t threshold_stride;
  float threshold;
  int64_t num_tokens;
  int32_t num_experts;
  int32_t min_experts;
  int32_t num_columns;
  uint64_t* workspace;  // of `route_workspace_size` elements, null if that is 0
  int32_t* expert_ids;
  float* probs;
  int32_t* counts;
};

// Rows of many experts are sorted in global memory: keys for `tokens` of them.
int64_t route_workspace_size(int64_t tokens, int64_t num_experts);

void launch_route(const RouteArgs& args, ScalarType dtype, cudaStream_t stream);

}  // namespace prunepath
