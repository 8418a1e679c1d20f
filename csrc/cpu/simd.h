// Vectors of PRUNEPATH_LANES floats, for the files that are compiled once for every instruction
// set. Everything is in an unnamed namespace, so that no code of one instruction set is linked into
// another.

#pragma once

#include <cstdint>

#include "cpu/elements.h"

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own headers' deliberately undefined vectors.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace prunepath {
namespace {

#define PRUNEPATH_INLINE static inline __attribute__((always_inline, unused))

constexpr int64_t kLanes = PRUNEPATH_LANES;

typedef float Floats __attribute__((vector_size(4 * PRUNEPATH_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * PRUNEPATH_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * PRUNEPATH_LANES)));
typedef int64_t Longs __attribute__((vector_size(4 * PRUNEPATH_LANES)));  // half as many
typedef uint64_t LongWords __attribute__((vector_size(4 * PRUNEPATH_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * PRUNEPATH_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(PRUNEPATH_LANES)));

template <typename Vector>
PRUNEPATH_INLINE Vector load_bits(const void* data) {
  Vector v;
  __builtin_memcpy(&v, data, sizeof(v));
  return v;
}

template <typename Vector>
PRUNEPATH_INLINE void store(void* data, Vector v) {
  __builtin_memcpy(data, &v, sizeof(v));
}

PRUNEPATH_INLINE Floats load(const float* data) { return load_bits<Floats>(data); }

// A C-style cast between vector types of one size keeps the bits.
PRUNEPATH_INLINE Floats load(const Float16* data) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
#elif defined(__F16C__) && PRUNEPATH_LANES == 8
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
#else
  const Words words = __builtin_convertvector(load_bits<Halves>(data), Words);
  const Words exponent = words & 0x7c00;
  const Words rebias = (Words)(exponent == 0x7c00) & (112u << 23);  // once more for inf and NaN
  const Words normal = ((words & 0x7fff) << 13) + (112u << 23) + rebias;
  const Floats subnormal = __builtin_convertvector((Ints)(words & 0x3ff), Floats) * 0x1p-24f;
  const Words is_subnormal = (Words)(exponent == 0);
  return (Floats)(((words & 0x8000) << 16) | (is_subnormal & (Words)subnormal) |
                  (~is_subnormal & normal));
#endif
}

PRUNEPATH_INLINE Floats load_in_order(const BFloat16* data) {
  return (Floats)(__builtin_convertvector(load_bits<Halves>(data), Words) << 16);
}

// 2 * kLanes elements that follow each other, in the order that is cheapest to widen to: the even
// and the odd ones for bfloat16 and 4 bits, the first and the second half for the others. Vectors
// that have only been computed elementwise keep that order; `in_order` undoes it.
struct Pair {
  Floats a, b;
};

template <typename W>
PRUNEPATH_INLINE Pair load_pair(const W* data) {
  return {load(data), load(data + kLanes)};
}

PRUNEPATH_INLINE Pair load_pair(const BFloat16* data) {
  const Words words = load_bits<Words>(data);
  return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}

PRUNEPATH_INLINE Ints load_bytes(const void* data) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(data)));
#elif defined(__AVX2__) && PRUNEPATH_LANES == 8
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(data)));
#else
  return __builtin_convertvector(load_bits<Bytes>(data), Ints);
#endif
}

PRUNEPATH_INLINE Pair load_pair(const Int4Pair* data) {
  const Ints pairs = load_bytes(data);
  return {__builtin_convertvector((pairs & 15) - 8, Floats),
          __builtin_convertvector((pairs >> 4) - 8, Floats)};
}

template <typename W>
PRUNEPATH_INLINE Pair in_order(Pair v, const W*) {
  return v;
}

PRUNEPATH_INLINE Pair in_order(Pair v, const BFloat16*) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {(Floats)_mm512_permutex2var_ps((__m512)v.a, first, (__m512)v.b),
          (Floats)_mm512_permutex2var_ps((__m512)v.a, second, (__m512)v.b)};
#elif defined(__AVX2__) && PRUNEPATH_LANES == 8
  const __m256 low = _mm256_unpacklo_ps((__m256)v.a, (__m256)v.b);
  const __m256 high = _mm256_unpackhi_ps((__m256)v.a, (__m256)v.b);
  return {(Floats)_mm256_permute2f128_ps(low, high, 0x20),
          (Floats)_mm256_permute2f128_ps(low, high, 0x31)};
#else
  float mixed[2 * kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    mixed[2 * i] = v.a[i];
    mixed[2 * i + 1] = v.b[i];
  }
  return {load(mixed), load(mixed + kLanes)};
#endif
}

// 0, 1, 2, …
PRUNEPATH_INLINE Ints lane_numbers() {
  Ints numbers;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    numbers[lane] = lane;
  }
  return numbers;
}

// Bit i is set iff lane i of a comparison's result is.
PRUNEPATH_INLINE uint32_t lane_bits(Ints is_set) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  return _mm512_movepi32_mask((__m512i)is_set);
#elif defined(__AVX2__) && PRUNEPATH_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)is_set));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    bits |= static_cast<uint32_t>(is_set[lane] & 1) << lane;
  }
  return bits;
#endif
}

// Writes the kLanes lowest bits as bytes of 0 or 1.
PRUNEPATH_INLINE void spread_bits(uint32_t bits, uint8_t* out) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_maskz_set1_epi8(static_cast<__mmask16>(bits), 1));
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    out[lane] = bits >> lane & 1;
  }
#endif
}

PRUNEPATH_INLINE float sum_lanes(Floats v) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sums[kLanes];
  store(sums, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      sums[lane] += sums[lane + width];
    }
  }
  return sums[0];
#endif
}

}  // namespace
}  // namespace prunepath
