#pragma once

// The arithmetic of top-mass routing. Mass is an integer, so that a sum does not depend on its
// order and every backend selects the same experts for the same logits, bit for bit. Compile
// without fast-math.

#include <cstdint>

#include "core/macros.h"

namespace prunepath {

constexpr int64_t kMaxExperts = 1 << 16;  // so that a row's mass is at most 2^46

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

// How far an expert of logit z is behind the largest, in powers of two: Q20, at most 30. Not for
// NaN. Equal infinities have no difference, hence the comparison.
PRUNEPATH_HD int32_t mass_exponent(float max, float z) {
  const float t = z == max ? 0.0f : (max - z) * kLog2E;
  const float capped = t < kMassMaxExponent ? t : kMassMaxExponent;
  return static_cast<int32_t>(capped * static_cast<float>(1 << kMassFractionBits));
}

// (a * f) >> 20, where |a| < 2^30 and 0 <= f < 2^20.
PRUNEPATH_HD int32_t multiply_fraction(int32_t a, int32_t f) {
#ifdef __CUDA_ARCH__
  return __mulhi(2 * a, f << 11);
#else
  return static_cast<int32_t>((int64_t{a} * f) >> kMassFractionBits);
#endif
}

// About 2^(30 - exponent) as an integer.
PRUNEPATH_HD int64_t mass_at(int32_t exponent) {
  const int32_t k = exponent >> kMassFractionBits;
  const int32_t f = exponent & ((1 << kMassFractionBits) - 1);
  int32_t a = kMassC5;
  a = multiply_fraction(a, f) + kMassC4;
  a = multiply_fraction(a, f) + kMassC3;
  a = multiply_fraction(a, f) + kMassC2;
  a = multiply_fraction(a, f) + kMassC1;
  a = multiply_fraction(a, f) + kMassC0;
  return a >> k;
}

// About 2^30 * exp(z - max) as an integer; 0 for z = -inf. `max` is the largest logit of the row
// and neither is NaN.
PRUNEPATH_HD int64_t mass_units(float max, float z) { return mass_at(mass_exponent(max, z)); }

// A logit's place in the order of routing: more for a larger logit, equal for -0 and +0, never 0.
// Not for NaN.
PRUNEPATH_HD uint32_t ordered_key(float logit) {
  union {
    float value;
    uint32_t bits;
  } z = {logit + 0.0f};
  return z.bits ^ (z.bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// Whether an expert with this much mass before it is needed to cover the threshold. A threshold of
// 1 or more, or NaN, needs every expert.
PRUNEPATH_HD bool is_needed(int64_t mass_before, float threshold, int64_t total) {
  return !(threshold < 1.0f) || static_cast<double>(mass_before) <
                                    static_cast<double>(threshold) * static_cast<double>(total);
}

// What a row is routed by.
struct RoutingRule {
  float threshold;
  int64_t total;  // mass of the row
  int64_t min_experts;
  int64_t max_experts;  // K
};

// Whether the expert that has `rank` experts of mass `mass_before` before it is active. True for a
// prefix of the order, so that a search for the first that is not needs no sort.
PRUNEPATH_HD bool is_active(const RoutingRule& rule, int64_t rank, int64_t mass_before) {
  return rank < rule.max_experts &&
         (rank < rule.min_experts || is_needed(mass_before, rule.threshold, rule.total));
}

// How many of `ties` experts of one logit, of mass `mass` each, are active, where `rank` experts of
// mass `mass_before` come before them: those of the lowest indices.
PRUNEPATH_HD int64_t active_ties(const RoutingRule& rule, int64_t rank, int64_t mass_before,
                                 int64_t ties, int64_t mass) {
  int64_t low = 0;  // as many are active
  while (low < ties) {
    const int64_t middle = low + (ties - low) / 2;
    if (is_active(rule, rank + middle, mass_before + middle * mass)) {
      low = middle + 1;
    } else {
      ties = middle;
    }
  }
  return low;
}

// Softmax probability of an expert. Both integers are exact in float64.
PRUNEPATH_HD float probability(int64_t mass, int64_t total) {
  return static_cast<float>(static_cast<double>(mass) / static_cast<double>(total));
}

}  // namespace prunepath
