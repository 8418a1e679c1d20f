#pragma once

// Where a neuron's weights lie: one row in each of the tables gate, up and down_t, [D, H].

#include <cstdint>

#include "core/macros.h"

namespace prunepath {

struct FfnLayout {
  int64_t num_experts;   // E
  int64_t expert_width;  // n: expert e is neurons e * n to (e + 1) * n - 1
  int64_t hidden_size;   // H
  bool gated;
  // Elements from a row to the next.
  int64_t gate_stride;
  int64_t up_stride;
  int64_t down_stride;
};

// D
PRUNEPATH_HD int64_t num_neurons(const FfnLayout& layout) {
  return layout.num_experts * layout.expert_width;
}

}  // namespace prunepath
