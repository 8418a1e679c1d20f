// Included once by each ffn_kernels_*.cpp, which is compiled for one instruction set and defines
// PRUNEPATH_LANES (floats in a vector), PRUNEPATH_ROWS (matrix rows worked on at once, bounded by
// the vector registers) and PRUNEPATH_KERNELS (the table to define).

#include "cpu/ffn_kernels.h"
#include "cpu/simd.h"

namespace prunepath {
namespace {

constexpr int kRows = PRUNEPATH_ROWS;
constexpr int kMaxBlock = 8;  // neurons worked on at once: x and the sums are read once for all
constexpr int64_t kCacheLine = 64;

// Float32 rounding grows with the number of terms, so sums of this many neurons are added up apart.
constexpr int64_t kPartialNeurons = 256;

// Elements that a step of the inner loops takes of every row: whole cache lines, whole pairs.
template <typename W>
constexpr int64_t step_size() {
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(W));
  return line > 2 * kLanes ? line : 2 * kLanes;
}

// Into the second-level cache. One core's own misses keep too few lines in flight for the memory's
// bandwidth, and rows of a few KB end before the hardware's prefetcher has caught up with them.
template <typename W>
PRUNEPATH_INLINE void prefetch_step(const W* data) {
  for (int64_t i = 0; i < step_size<W>(); i += kCacheLine / static_cast<int64_t>(sizeof(W))) {
    __builtin_prefetch(data + i, 0, 2);
  }
}

// Matrix rows in pairs (G = 2), a gate and its up, or single.
template <int G, typename W>
struct Rows {
  const W* data;
  int64_t stride;  // elements from a pair to the next
  int64_t inner;   // from the first of a pair to the second

  __attribute__((always_inline)) const W* row(int r) const {
    return data + r / G * stride + r % G * inner;
  }
};

// What a step adds to the sums of R dot products; `sums` has a second vector for each row where
// that makes longer chains of independent additions.
template <int R, int S, int G, typename W>
PRUNEPATH_INLINE void dot_step(const W* x, const Rows<G, W>& rows, int64_t i,
                               Floats (&sums)[R][S]) {
  for (int64_t j = i; j < i + step_size<W>(); j += 2 * kLanes) {
    const Pair xs = load_pair(x + j);
    for (int r = 0; r < R; ++r) {
      const Pair w = load_pair(rows.row(r) + j);
      sums[r][0] += xs.a * w.a;
      sums[r][S - 1] += xs.b * w.b;
    }
  }
}

#if defined(__AVX512BF16__) && PRUNEPATH_LANES == 16
// Products of bfloat16 are exact in float32, so that this differs in the order of the sum alone.
template <int R, int S, int G>
PRUNEPATH_INLINE void dot_step(const BFloat16* x, const Rows<G, BFloat16>& rows, int64_t i,
                               Floats (&sums)[R][S]) {
  const auto xs = (__m512bh)load_bits<Words>(x + i);
  for (int r = 0; r < R; ++r) {
    const auto w = (__m512bh)load_bits<Words>(rows.row(r) + i);
    sums[r][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][0], xs, w);
  }
}
#endif

// out[r] = x . row r, for R rows. Prefetches as many that begin at `next`.
template <int R, int G, typename W>
PRUNEPATH_INLINE void dot_rows(const W* __restrict x, const Rows<G, W>& rows, const W* next,
                               int64_t size, float* __restrict out) {
  constexpr int kSums = R <= 4 ? 2 : 1;
  const Rows<G, W> ahead{next, rows.stride, rows.inner};
  Floats sums[R][kSums] = {};
  int64_t i = 0;
  for (; i + step_size<W>() <= size; i += step_size<W>()) {
    for (int r = 0; r < R; ++r) {
      prefetch_step(ahead.row(r) + i);
    }
    dot_step(x, rows, i, sums);
  }
  for (int r = 0; r < R; ++r) {
    float sum = sum_lanes(kSums == 2 ? sums[r][0] + sums[r][kSums - 1] : sums[r][0]);
    for (int64_t j = i; j < size; ++j) {
      sum += to_float(x[j]) * to_float(rows.row(r)[j]);
    }
    out[r] = sum;
  }
}

// y += sum over r of scale[r] * rows[r * size] for R rows that follow each other, y in the order of
// `Pair`. Prefetches the rows at `next`.
template <int R, typename W>
PRUNEPATH_INLINE void add_rows(const float* __restrict scale, const W* __restrict rows,
                               const W* next, int64_t size, float* __restrict y) {
  int64_t i = 0;
  for (; i + step_size<W>() <= size; i += step_size<W>()) {
    for (int r = 0; r < R; ++r) {
      prefetch_step(next + r * size + i);
    }
    for (int64_t j = i; j < i + step_size<W>(); j += 2 * kLanes) {
      Pair sum = {load(y + j), load(y + j + kLanes)};
      for (int r = 0; r < R; ++r) {
        const Pair w = load_pair(rows + r * size + j);
        sum.a += scale[r] * w.a;
        sum.b += scale[r] * w.b;
      }
      store(y + j, sum.a);
      store(y + j + kLanes, sum.b);
    }
  }
  for (; i < size; ++i) {
    for (int r = 0; r < R; ++r) {
      y[i] += scale[r] * to_float(rows[r * size + i]);
    }
  }
}

PRUNEPATH_INLINE float parameter(const Parameter& p, int64_t index) {
  return p.data == nullptr ? 0.0f : load_as_float(p.data, p.dtype, index);
}

template <typename W>
struct Task {
  const FfnWeights& weights;
  const W* x;
  int64_t x_stride;
  float* partial;  // [tile, hidden_size] in the order of `Pair`
};

// R neurons of one expert, from `neuron` on, for every token of the mask; prefetches those from
// `next` on.
template <int R, int G, typename W>
PRUNEPATH_INLINE void run_block(const Task<W>& task, int64_t neuron, int64_t next, uint64_t mask) {
  const FfnWeights& weights = task.weights;
  const int64_t H = weights.layout.hidden_size;
  const W* w_in = static_cast<const W*>(weights.w_in);
  const W* w_out = static_cast<const W*>(weights.w_out);
  const int64_t stride = weights.in_strides.neuron;
  const Rows<G, W> in{w_in + neuron * stride, stride, weights.in_strides.inner};
  const W* out = w_out + out_offset(weights.layout, neuron);
  for (; mask != 0; mask &= mask - 1) {
    const int64_t token = __builtin_ctzll(mask);
    float pre[R * G];
    dot_rows<R * G>(task.x + token * task.x_stride, in, w_in + next * stride, H, pre);
    float h[R];
    for (int r = 0; r < R; ++r) {
      const int64_t bias = (neuron + r) * G;
      h[r] = activate(weights.activation, pre[r * G] + parameter(weights.b_in, bias));
      if (G == 2) {
        h[r] *= pre[r * G + 1] + parameter(weights.b_in, bias + 1);
      }
      h[r] -= parameter(weights.center, neuron + r);
    }
    add_rows<R>(h, out, w_out + out_offset(weights.layout, next), H, task.partial + token * H);
    next = neuron;  // once is enough
  }
}

// The largest block of at most R neurons that fits in `left`; returns its size.
template <int R, int G, typename W>
PRUNEPATH_INLINE int64_t run_some(const Task<W>& task, int64_t neuron, int64_t left,
                                  int64_t next_span, uint64_t mask) {
  if (left >= R) {
    run_block<R, G>(task, neuron, left > R ? neuron + R : next_span, mask);
    return R;
  }
  if constexpr (R > 1) {
    return run_some<R / 2, G>(task, neuron, left, next_span, mask);
  }
  return left;
}

// Adds `partial`, in the order of `Pair`, to `sum` and clears it.
template <typename W>
PRUNEPATH_INLINE void flush(uint64_t mask, int64_t size, float* __restrict partial,
                            float* __restrict sum) {
  const Floats zero = {};
  for (; mask != 0; mask &= mask - 1) {
    float* from = partial + __builtin_ctzll(mask) * size;
    float* to = sum + __builtin_ctzll(mask) * size;
    int64_t i = 0;
    for (; i < size / step_size<W>() * step_size<W>(); i += 2 * kLanes) {
      const Pair v = in_order({load(from + i), load(from + i + kLanes)}, (const W*)nullptr);
      store(to + i, load(to + i) + v.a);
      store(to + i + kLanes, load(to + i + kLanes) + v.b);
      store(from + i, zero);
      store(from + i + kLanes, zero);
    }
    for (; i < size; ++i) {
      to[i] += from[i];
      from[i] = 0.0f;
    }
  }
}

template <int G, typename W>
void run_neurons_typed(const FfnWeights& weights, const ActiveExperts& active, const void* x,
                       int64_t x_stride, int64_t begin, int64_t end, float* sum, float* partial) {
  constexpr int kBlock = kRows / G < kMaxBlock ? kRows / G : kMaxBlock;
  const int64_t n = weights.layout.expert_width;
  const int64_t H = weights.layout.hidden_size;
  const Task<W> task{weights, static_cast<const W*>(x), x_stride, partial};
  uint64_t touched = 0;
  int64_t in_partial = 0;
  while (begin < end) {
    // The part of one expert that is in the range.
    const int64_t position = begin / n;
    const int32_t expert = active.experts[position];
    const int64_t left_in_expert = n - begin % n;
    const int64_t span = left_in_expert < end - begin ? left_in_expert : end - begin;
    int64_t neuron = expert * n + begin % n;
    const int64_t span_end = neuron + span;
    begin += span;
    const int64_t next_span = begin < end ? active.experts[position + 1] * n : neuron;
    const uint64_t mask = active.masks[expert];
    touched |= mask;
    while (neuron < span_end) {
      const int64_t done = run_some<kBlock, G>(task, neuron, span_end - neuron, next_span, mask);
      neuron += done;
      in_partial += done;
      if (in_partial >= kPartialNeurons) {
        flush<W>(touched, H, partial, sum);
        touched = neuron < span_end ? mask : 0;
        in_partial = 0;
      }
    }
  }
  flush<W>(touched, H, partial, sum);
}

// Logits of the largest block of at most R experts that fits in `left`; returns its size.
template <int R, typename W>
PRUNEPATH_INLINE int64_t router_block(const W* x, int64_t x_stride, int64_t num_tokens,
                                      int64_t hidden_size, const W* rows, int64_t left,
                                      float* logits, int64_t num_experts) {
  if (left >= R) {
    const W* next = left >= 2 * R ? rows + R * hidden_size : rows;
    for (int64_t t = 0; t < num_tokens; ++t) {
      dot_rows<R>(x + t * x_stride, Rows<1, W>{rows, hidden_size, 0}, next, hidden_size,
                  logits + t * num_experts);
      next = rows;
    }
    return R;
  }
  if constexpr (R > 1) {
    return router_block<R / 2>(x, x_stride, num_tokens, hidden_size, rows, left, logits,
                               num_experts);
  }
  return left;
}

template <typename W>
void router_logits_typed(const void* x, int64_t x_stride, int64_t num_tokens, int64_t hidden_size,
                         int64_t num_experts, const void* weight, const Parameter& bias,
                         int64_t begin, int64_t end, float* logits) {
  for (int64_t e = begin; e < end;) {
    e += router_block<kRows>(static_cast<const W*>(x), x_stride, num_tokens, hidden_size,
                             static_cast<const W*>(weight) + e * hidden_size, end - e, logits + e,
                             num_experts);
  }
  if (bias.data != nullptr) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t e = begin; e < end; ++e) {
        logits[t * num_experts + e] += parameter(bias, e);
      }
    }
  }
}

void run_neurons(const FfnWeights& weights, const ActiveExperts& active, const void* x,
                 int64_t x_stride, int64_t begin, int64_t end, float* sum, float* partial) {
  const bool gated = weights.layout.per_neuron == 2;
  const auto run = [&]() {
    switch (weights.dtype) {
      case DType::kBFloat16:
        return gated ? run_neurons_typed<2, BFloat16> : run_neurons_typed<1, BFloat16>;
      case DType::kFloat16:
        return gated ? run_neurons_typed<2, Float16> : run_neurons_typed<1, Float16>;
      default:
        return gated ? run_neurons_typed<2, float> : run_neurons_typed<1, float>;
    }
  }();
  run(weights, active, x, x_stride, begin, end, sum, partial);
}

void router_logits(const void* x, int64_t x_stride, int64_t num_tokens, int64_t hidden_size,
                   int64_t num_experts, const void* weight, DType dtype, Parameter bias,
                   int64_t begin, int64_t end, float* logits) {
  const auto run = [&]() {
    switch (dtype) {
      case DType::kBFloat16:
        return router_logits_typed<BFloat16>;
      case DType::kFloat16:
        return router_logits_typed<Float16>;
      default:
        return router_logits_typed<float>;
    }
  }();
  run(x, x_stride, num_tokens, hidden_size, num_experts, weight, bias, begin, end, logits);
}

}  // namespace

const FfnKernels PRUNEPATH_KERNELS = {run_neurons, router_logits};

}  // namespace prunepath
