// exp and log of vectors, to about two units in the last place. NaN and infinities come out as from
// the scalar functions. Like cpu/simd.h, for the files that are compiled once for every instruction
// set.
//
// The polynomials are those of expf and logf in the Cephes library (S. L. Moshier).

#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpu/simd.h"

namespace prunepath {
namespace {

// log(2) in two parts, the first of which is exact times any exponent.
constexpr float kLog2High = 0.693359375f;
constexpr float kLog2Low = -2.12194440e-4f;

PRUNEPATH_INLINE Floats exp_of(Floats x) {
  constexpr float kLimit = 104.0f;       // from here on it is infinite, or zero
  constexpr float kRounder = 0x1.8p23f;  // a float of this size has no fraction
  x = x > kLimit ? Floats{} + kLimit : x;
  x = x < -kLimit ? Floats{} - kLimit : x;
  const Floats shifted = x * 1.44269504088896341f + kRounder;
  const Floats n = shifted - kRounder;
  const Floats r = (x - n * kLog2High) - n * kLog2Low;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  for (const float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * r + c;
  }
  p = p * (r * r) + r + 1.0f;
  // 2^n is no float at the ends; its square root is one.
  const Ints exponent = (Ints)shifted - (Ints)(Floats{} + kRounder);
  const Ints half = exponent >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
}

// exponent * log(2) + log(1 + f) for f from sqrt(1/2) - 1 to sqrt(2) - 1.
PRUNEPATH_INLINE Floats log_of_parts(Floats exponent, Floats f) {
  const Floats square = f * f;
  Floats p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  for (const float c : {1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                        2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    p = p * f + c;
  }
  const Floats small = p * f * square + exponent * kLog2Low - 0.5f * square;
  return f + small + exponent * kLog2High;
}

// For x of at least 0.
PRUNEPATH_INLINE Floats log_of(Floats x) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const Ints is_subnormal = x < 0x1p-126f;
  const Ints bits = (Ints)(is_subnormal ? x * 0x1p24f : x);
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // sqrt(1/2) has these bits
  const Floats f = (Floats)(bits - (exponent << 23)) - 1.0f;
  const Ints scaled = is_subnormal & 24;
  const Floats log = log_of_parts(__builtin_convertvector(exponent - scaled, Floats), f);
  return x < kInf ? (x > 0.0f ? log : Floats{} - kInf) : x;
}

// log(1 + exp(x)).
PRUNEPATH_INLINE Floats softplus(Floats x) {
  const Floats u =
      exp_of(x > 0.0f ? -x : x);  // at most 1, and log(1 + u) keeps a tiny one's digits
  const Ints is_large = u > 0.41421356237309505f;
  const Floats f = is_large ? 0.5f * u - 0.5f : u;
  const Floats exponent = (Floats)(is_large & (Ints)(Floats{} + 1.0f));
  return (x > 0.0f ? x : Floats{}) + log_of_parts(exponent, f);
}

}  // namespace
}  // namespace prunepath
