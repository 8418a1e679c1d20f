#pragma once

// Top-mass selection of one row of logits. route_kernels_impl.h defines it; it is compiled once for
// every instruction set, and cpu/kernels.h chooses between them. The only files of csrc/cpu that
// compile the routing arithmetic; the results are the same bits in all of them.

#include <cstdint>

#include "cpu/elements.h"

namespace prunepath {

struct RouteLimits {
  int64_t min_experts;
  int64_t max_experts;  // K: never 0
};

// A row of logits of any dtype.
struct LogitRow {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from an expert's logit to the next
};

// Experts that a row is padded to in the scratch memory.
constexpr int64_t padded_experts(int64_t num_experts) { return (num_experts + 31) / 32 * 32 + 32; }

// Bytes of scratch for a row of `num_experts` logits, aligned for uint64_t.
constexpr int64_t route_scratch_size(int64_t num_experts) {
  return 6 * 4 * padded_experts(num_experts);
}

struct RouteKernels {
  // Writes 1 for every active expert and 0 for the others to `mask` [num_experts]. Returns how many
  // are active.
  int32_t (*select_row)(const LogitRow& logits, int64_t num_experts, float threshold,
                        RouteLimits limits, void* scratch, uint8_t* mask);

  // Writes the active experts, most mass first, to `expert_ids` and their probabilities to `probs`;
  // entries past the count are left alone. Returns the count.
  int32_t (*route_row)(const LogitRow& logits, int64_t num_experts, float threshold,
                       RouteLimits limits, void* scratch, int32_t* expert_ids, float* probs);
};

extern const RouteKernels kRouteKernelsPortable;
#if defined(__x86_64__)
extern const RouteKernels kRouteKernelsAvx2;
extern const RouteKernels kRouteKernelsAvx512;
#endif

}  // namespace prunepath
