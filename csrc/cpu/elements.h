#pragma once

// Torch-free element types: how a float32, bfloat16 or float16 is read and written.

#include <cstdint>
#include <cstring>

#include "core/elements.h"
#include "core/macros.h"

namespace prunepath {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

PRUNEPATH_HD float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

PRUNEPATH_HD uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

PRUNEPATH_HD float to_float(float value) { return value; }

PRUNEPATH_HD float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

PRUNEPATH_HD float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31;
  const uint32_t mantissa = value.bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact in float32
    return float_from_bits(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return float_from_bits(sign | (wide << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even; NaN stays NaN.
PRUNEPATH_HD void from_float(float value, float* out) { *out = value; }

PRUNEPATH_HD void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  out->bits = value != value ? static_cast<uint16_t>((bits >> 16) | 0x40)
                             : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

PRUNEPATH_HD void from_float(float value, Float16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x7f800000) {
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: adding 2^-1 aligns the float32 mantissa's last bit with float16's 2^-24.
    half = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    half = half > 0x7c00 ? 0x7c00 : half;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// The dtype of a pointer whose type is not known when compiling. Of kInt4 are a router's tables
// alone.
enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt4 };

PRUNEPATH_HD float load_as_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

}  // namespace prunepath
