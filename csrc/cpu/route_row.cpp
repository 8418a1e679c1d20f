#include "cpu/route_row.h"

#include <algorithm>

#include "core/routing.h"
#include "cpu/elements.h"

namespace prunepath {
namespace {

// Ascending order of the keys is descending order of the logits, ties by index.
uint64_t order_key(float logit, int64_t index) {
  const uint32_t bits = bits_of(logit + 0.0f);  // -0 becomes +0, so that the two are a tie
  const uint32_t descending = bits & 0x80000000 ? bits : bits ^ 0x7fffffff;
  return static_cast<uint64_t>(descending) << 32 | static_cast<uint32_t>(index);
}

}  // namespace

int32_t route_row(const float* logits, int64_t num_experts, float threshold, RouteLimits limits,
                  void* scratch, int32_t* expert_ids, float* probs) {
  uint64_t* keys = static_cast<uint64_t*>(scratch);
  int64_t* mass = reinterpret_cast<int64_t*>(keys + num_experts);

  float max = logits[0];
  bool has_nan = false;
  for (int64_t e = 0; e < num_experts; ++e) {
    has_nan |= logits[e] != logits[e];
    max = logits[e] > max ? logits[e] : max;
  }
  if (has_nan) {
    // Fails open: routed as equal logits at a threshold of 1.
    for (int64_t e = 0; e < limits.num_columns; ++e) {
      expert_ids[e] = static_cast<int32_t>(e);
      if (probs != nullptr) {
        probs[e] = probability(1, num_experts);
      }
    }
    return static_cast<int32_t>(limits.num_columns);
  }

  int64_t total = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    mass[e] = mass_units(max, logits[e]);
    total += mass[e];
    keys[e] = order_key(logits[e], e);
  }
  std::sort(keys, keys + num_experts);

  int64_t before = 0;
  int64_t count = 0;
  while (count < limits.num_columns &&
         (count < limits.min_experts || is_needed(before, threshold, total))) {
    const uint32_t expert = static_cast<uint32_t>(keys[count]);
    expert_ids[count] = static_cast<int32_t>(expert);
    if (probs != nullptr) {
      probs[count] = probability(mass[expert], total);
    }
    before += mass[expert];
    ++count;
  }
  return static_cast<int32_t>(count);
}

}  // namespace prunepath
