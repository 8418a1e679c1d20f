#pragma once

// Top-mass selection of one row of logits. The only place of csrc/cpu that compiles the routing
// arithmetic.

#include <cstdint>

namespace prunepath {

struct RouteLimits {
  int64_t min_experts;
  int64_t num_columns;  // max_experts, or the number of experts
};

// Bytes of scratch that `route_row` needs for a row of `num_experts` logits.
constexpr int64_t route_scratch_size(int64_t num_experts) { return 16 * num_experts; }

// Writes the active experts of `logits` [num_experts], most mass first, to `expert_ids`, and their
// probabilities to `probs` where that is not null; entries past the count are left alone. Returns
// the count. `scratch` is aligned for int64_t.
int32_t route_row(const float* logits, int64_t num_experts, float threshold, RouteLimits limits,
                  void* scratch, int32_t* expert_ids, float* probs);

}  // namespace prunepath
