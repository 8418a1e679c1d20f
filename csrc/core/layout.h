#pragma once

// Where a neuron's weights lie. An expert is two contiguous spans: w_in [E, n, G, H] and
// w_out [E, n, H]; a neuron is one row of G * H and one of H.

#include <cstdint>

#include "core/macros.h"

namespace prunepath {

struct ExpertLayout {
  int64_t num_experts;   // E
  int64_t expert_width;  // n
  int64_t per_neuron;    // G: 2 with a gate, else 1
  int64_t hidden_size;   // H
};

// Elements between the rows of w_in where it is a view: of two matrices in one, say.
struct InStrides {
  int64_t neuron;  // from a neuron to the next one, over all experts
  int64_t inner;   // from a neuron's gate to its up
};

PRUNEPATH_HD int64_t num_neurons(const ExpertLayout& layout) {
  return layout.num_experts * layout.expert_width;
}

// Offset in w_in of the G rows of a neuron, which is counted over all experts.
PRUNEPATH_HD int64_t in_offset(const ExpertLayout& layout, int64_t neuron) {
  return neuron * layout.per_neuron * layout.hidden_size;
}

// Offset in w_out of the row of a neuron.
PRUNEPATH_HD int64_t out_offset(const ExpertLayout& layout, int64_t neuron) {
  return neuron * layout.hidden_size;
}

}  // namespace prunepath
