#pragma once

// The arithmetic of top-mass routing. Mass is an integer, so that a sum does not depend on its
// order and every backend selects the same experts for the same logits, bit for bit. Compile
// without fast-math.

#include <cstdint>

#include "core/macros.h"

namespace prunepath {

constexpr float kLog2E = 0x1.715476p+0f;  // log2(e) rounded to float32
constexpr int kMassFractionBits = 20;
constexpr float kMassMaxExponent = 30.0f;  // 2^-30 and less is no mass
// 2^-f in Q30 as a polynomial of degree 5, f in Q20.
constexpr int32_t kMassC0 = 1073741694;
constexpr int32_t kMassC1 = -744255587;
constexpr int32_t kMassC2 = 257885219;
constexpr int32_t kMassC3 = -59368625;
constexpr int32_t kMassC4 = 9885125;
constexpr int32_t kMassC5 = -1017037;

// About 2^30 * exp(z - max) as an integer; 0 for z = -inf. `max` is the largest logit of the row
// and neither is NaN. Equal infinities have no difference, hence the comparison.
PRUNEPATH_HD int64_t mass_units(float max, float z) {
  const float t = z == max ? 0.0f : (max - z) * kLog2E;
  const float capped = t < kMassMaxExponent ? t : kMassMaxExponent;
  const int32_t u = static_cast<int32_t>(capped * static_cast<float>(1 << kMassFractionBits));
  const int32_t k = u >> kMassFractionBits;
  const int64_t f = u & ((1 << kMassFractionBits) - 1);
  int64_t a = kMassC5;
  a = ((a * f) >> kMassFractionBits) + kMassC4;
  a = ((a * f) >> kMassFractionBits) + kMassC3;
  a = ((a * f) >> kMassFractionBits) + kMassC2;
  a = ((a * f) >> kMassFractionBits) + kMassC1;
  a = ((a * f) >> kMassFractionBits) + kMassC0;
  return a >> k;
}

// Whether expert i with logit a comes before expert j with logit b: more mass first, ties by index.
PRUNEPATH_HD bool goes_before(float a, int32_t i, float b, int32_t j) {
  return a > b || (a == b && i < j);
}

// Whether an expert with this much mass before it is needed to cover the threshold. A threshold of
// 1 or more, or NaN, needs every expert.
PRUNEPATH_HD bool is_needed(int64_t mass_before, float threshold, int64_t total) {
  return !(threshold < 1.0f) || static_cast<double>(mass_before) <
                                    static_cast<double>(threshold) * static_cast<double>(total);
}

// Softmax probability of an expert. Both integers are exact in float64.
PRUNEPATH_HD float probability(int64_t mass, int64_t total) {
  return static_cast<float>(static_cast<double>(mass) / static_cast<double>(total));
}

}  // namespace prunepath
