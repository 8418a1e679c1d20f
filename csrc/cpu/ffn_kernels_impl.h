// Included once by each ffn_kernels_*.cpp, which is compiled for one instruction set and defines
// PRUNEPATH_LANES (floats in a vector) and PRUNEPATH_KERNELS (the table to define). Everything here
// is in an unnamed namespace and calls nothing that another translation unit may share, so that no
// code of one instruction set is linked into another.

#include "cpu/ffn_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace prunepath {
namespace {

#define PRUNEPATH_INLINE static inline __attribute__((always_inline))

constexpr int64_t kLanes = PRUNEPATH_LANES;
constexpr int kBlock = 4;  // neurons worked on at once: x and the sums are read once for all

// Float32 rounding grows with the number of terms, so sums of this many neurons are added up apart.
constexpr int64_t kPartialNeurons = 256;

typedef float Floats __attribute__((vector_size(4 * PRUNEPATH_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * PRUNEPATH_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * PRUNEPATH_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * PRUNEPATH_LANES)));

PRUNEPATH_INLINE Floats load(const float* data) {
  Floats v;
  __builtin_memcpy(&v, data, sizeof(v));
  return v;
}

// A C-style cast between vector types of one size keeps the bits.
PRUNEPATH_INLINE Floats load(const BFloat16* data) {
#if defined(__AVX2__) && PRUNEPATH_LANES == 8  // GCC converts the general form piecewise
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  Halves halves;
  __builtin_memcpy(&halves, data, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

PRUNEPATH_INLINE Floats load(const Float16* data) {
#if defined(__F16C__) && PRUNEPATH_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
#else
  Halves halves;
  __builtin_memcpy(&halves, data, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words);
  const Words exponent = words & 0x7c00;
  const Words rebias = (Words)(exponent == 0x7c00) & (112u << 23);  // once more for inf and NaN
  const Words normal = ((words & 0x7fff) << 13) + (112u << 23) + rebias;
  const Floats subnormal = __builtin_convertvector((Ints)(words & 0x3ff), Floats) * 0x1p-24f;
  const Words is_subnormal = (Words)(exponent == 0);
  return (Floats)(((words & 0x8000) << 16) | (is_subnormal & (Words)subnormal) |
                  (~is_subnormal & normal));
#endif
}

PRUNEPATH_INLINE void store(float* data, Floats v) { __builtin_memcpy(data, &v, sizeof(v)); }

PRUNEPATH_INLINE float sum_lanes(Floats v) {
  float sums[kLanes];
  store(sums, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      sums[lane] += sums[lane + width];
    }
  }
  return sums[0];
}

// out[r] = x . row r, for R rows in pairs (G = 2) or single: `stride` elements from a pair to the
// next, `inner_stride` from the first of a pair to the second.
template <int R, int G, typename W>
PRUNEPATH_INLINE void dot_rows(const float* __restrict x, const W* __restrict rows, int64_t stride,
                               int64_t inner_stride, int64_t size, float* __restrict out) {
  Floats sums[R] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats xs = load(x + i);
    for (int r = 0; r < R; ++r) {
      sums[r] += xs * load(rows + r / G * stride + r % G * inner_stride + i);
    }
  }
  for (int r = 0; r < R; ++r) {
    float sum = sum_lanes(sums[r]);
    for (int64_t j = i; j < size; ++j) {
      sum += x[j] * to_float(rows[r / G * stride + r % G * inner_stride + j]);
    }
    out[r] = sum;
  }
}

// y += sum over r of scale[r] * rows[r * size] for R rows that follow each other.
template <int R, typename W>
PRUNEPATH_INLINE void add_rows(const float* __restrict scale, const W* __restrict rows,
                               int64_t size, float* __restrict y) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats sum = scale[0] * load(rows + i);
    for (int r = 1; r < R; ++r) {
      sum += scale[r] * load(rows + r * size + i);
    }
    store(y + i, load(y + i) + sum);
  }
  for (; i < size; ++i) {
    float sum = scale[0] * to_float(rows[i]);
    for (int r = 1; r < R; ++r) {
      sum += scale[r] * to_float(rows[r * size + i]);
    }
    y[i] += sum;
  }
}

PRUNEPATH_INLINE float parameter(const Parameter& p, int64_t index) {
  return p.data == nullptr ? 0.0f : load_as_float(p.data, p.dtype, index);
}

// R neurons of one expert, from `neuron` on, for every token of the mask.
template <int R, int G, typename W>
PRUNEPATH_INLINE void run_block(const FfnWeights& weights, int64_t neuron, uint64_t mask,
                                const float* x, float* partial) {
  const int64_t H = weights.layout.hidden_size;
  const int64_t in_stride = weights.in_strides.neuron;
  const W* in = static_cast<const W*>(weights.w_in) + neuron * in_stride;
  const W* out = static_cast<const W*>(weights.w_out) + out_offset(weights.layout, neuron);
  for (; mask != 0; mask &= mask - 1) {
    const int64_t token = __builtin_ctzll(mask);
    float pre[R * G];
    dot_rows<R * G, G>(x + token * H, in, in_stride, weights.in_strides.inner, H, pre);
    float h[R];
    for (int r = 0; r < R; ++r) {
      const int64_t bias = (neuron + r) * G;
      h[r] = activate(weights.activation, pre[r * G] + parameter(weights.b_in, bias));
      if (G == 2) {
        h[r] *= pre[r * G + 1] + parameter(weights.b_in, bias + 1);
      }
      h[r] -= parameter(weights.center, neuron + r);
    }
    add_rows<R>(h, out, H, partial + token * H);
  }
}

PRUNEPATH_INLINE void flush(uint64_t mask, int64_t size, float* __restrict partial,
                            float* __restrict sum) {
  for (; mask != 0; mask &= mask - 1) {
    float* from = partial + __builtin_ctzll(mask) * size;
    float* to = sum + __builtin_ctzll(mask) * size;
    for (int64_t i = 0; i < size; ++i) {
      to[i] += from[i];
      from[i] = 0.0f;
    }
  }
}

template <int G, typename W>
void run_neurons_typed(const FfnWeights& weights, const ActiveExperts& active, const float* x,
                       int64_t begin, int64_t end, float* sum, float* partial) {
  const int64_t n = weights.layout.expert_width;
  const int64_t H = weights.layout.hidden_size;
  uint64_t touched = 0;
  int64_t in_partial = 0;
  while (begin < end) {
    const int64_t expert = active.experts[begin / n];
    const uint64_t mask = active.masks[expert];
    int64_t neuron = expert * n + begin % n;
    const int64_t span_end = neuron + (n - begin % n < end - begin ? n - begin % n : end - begin);
    begin += span_end - neuron;
    touched |= mask;
    while (neuron < span_end) {
      if (neuron + kBlock <= span_end) {
        run_block<kBlock, G, W>(weights, neuron, mask, x, partial);
        neuron += kBlock;
        in_partial += kBlock;
      } else {
        run_block<1, G, W>(weights, neuron, mask, x, partial);
        ++neuron;
        ++in_partial;
      }
      if (in_partial >= kPartialNeurons) {
        flush(touched, H, partial, sum);
        touched = neuron < span_end ? mask : 0;
        in_partial = 0;
      }
    }
  }
  flush(touched, H, partial, sum);
}

template <typename W>
void router_logits_typed(const float* x, int64_t num_tokens, int64_t hidden_size,
                         int64_t num_experts, const W* weight, const Parameter& bias, int64_t begin,
                         int64_t end, float* logits) {
  int64_t e = begin;
  for (; e + kBlock <= end; e += kBlock) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      float* out = logits + t * num_experts + e;
      dot_rows<kBlock, 1>(x + t * hidden_size, weight + e * hidden_size, hidden_size, 0,
                          hidden_size, out);
    }
  }
  for (; e < end; ++e) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      dot_rows<1, 1>(x + t * hidden_size, weight + e * hidden_size, hidden_size, 0, hidden_size,
                     logits + t * num_experts + e);
    }
  }
  if (bias.data != nullptr) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (e = begin; e < end; ++e) {
        logits[t * num_experts + e] += parameter(bias, e);
      }
    }
  }
}

void run_neurons(const FfnWeights& weights, const ActiveExperts& active, const float* x,
                 int64_t begin, int64_t end, float* sum, float* partial) {
  const bool gated = weights.layout.per_neuron == 2;
  switch (weights.dtype) {
    case DType::kBFloat16:
      return (gated ? run_neurons_typed<2, BFloat16>
                    : run_neurons_typed<1, BFloat16>)(weights, active, x, begin, end, sum, partial);
    case DType::kFloat16:
      return (gated ? run_neurons_typed<2, Float16>
                    : run_neurons_typed<1, Float16>)(weights, active, x, begin, end, sum, partial);
    default:
      return (gated ? run_neurons_typed<2, float>
                    : run_neurons_typed<1, float>)(weights, active, x, begin, end, sum, partial);
  }
}

void router_logits(const float* x, int64_t num_tokens, int64_t hidden_size, int64_t num_experts,
                   const void* weight, DType dtype, Parameter bias, int64_t begin, int64_t end,
                   float* logits) {
  switch (dtype) {
    case DType::kBFloat16:
      return router_logits_typed(x, num_tokens, hidden_size, num_experts,
                                 static_cast<const BFloat16*>(weight), bias, begin, end, logits);
    case DType::kFloat16:
      return router_logits_typed(x, num_tokens, hidden_size, num_experts,
                                 static_cast<const Float16*>(weight), bias, begin, end, logits);
    default:
      return router_logits_typed(x, num_tokens, hidden_size, num_experts,
                                 static_cast<const float*>(weight), bias, begin, end, logits);
  }
}

}  // namespace

const FfnKernels PRUNEPATH_KERNELS = {run_neurons, router_logits};

}  // namespace prunepath
