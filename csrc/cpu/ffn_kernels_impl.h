// Included once by each ffn_kernels_*.cpp, which is compiled for one instruction set and defines
// PRUNEPATH_LANES (floats in a vector), PRUNEPATH_ROWS (matrix rows worked on at once, bounded by
// the vector registers) and PRUNEPATH_KERNELS (the table to define).

#include "cpu/ffn_kernels.h"
#include "cpu/simd.h"

namespace prunepath {
namespace {

constexpr int kRows = PRUNEPATH_ROWS;
constexpr int kMaxBlock = 8;  // neurons worked on at once: x and the sums are read once for all
// For calls of several tokens. Rows of weights and tokens whose dot products are worked on
// at once: a loaded weight serves all of the tokens, a loaded x all of the rows. It takes the 32
// registers of AVX-512; with fewer, the tokens one by one are as fast.
constexpr bool kHasTiles = kLanes == 16;
constexpr int kTileRows = 4;
constexpr int kDotTokens = 4;
// Tokens, and pairs of columns, whose sums of output rows are kept in registers.
constexpr int kAddTokens = 4;
constexpr int kColumnPairs = 2;

// Whether there are instructions for dot products of two elements of this type.
template <typename W>
constexpr bool kHasPairProducts = false;
#if defined(__AVX512BF16__) && PRUNEPATH_LANES == 16
template <>
constexpr bool kHasPairProducts<BFloat16> = true;
#endif

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

// What a step adds to R x T dot products, of R rows of weights and T tokens.
template <int R, int T, int G, typename W>
PRUNEPATH_INLINE void tile_step(const W* const (&x)[T], const Rows<G, W>& rows, int64_t i,
                                Floats (&sums)[R][T]) {
  for (int64_t j = i; j < i + step_size<W>(); j += 2 * kLanes) {
    Pair w[R];
    for (int r = 0; r < R; ++r) {
      w[r] = load_pair(rows.row(r) + j);
    }
    for (int t = 0; t < T; ++t) {
      const Pair xs = load_pair(x[t] + j);
      for (int r = 0; r < R; ++r) {
        sums[r][t] += xs.a * w[r].a;
        sums[r][t] += xs.b * w[r].b;
      }
    }
  }
}

#if defined(__AVX512BF16__) && PRUNEPATH_LANES == 16
// Products of bfloat16 are exact in float32, so that this differs in the order of the sum alone.
template <int R, int T, int G>
PRUNEPATH_INLINE void tile_step(const BFloat16* const (&x)[T], const Rows<G, BFloat16>& rows,
                                int64_t i, Floats (&sums)[R][T]) {
  __m512bh w[R];
  for (int r = 0; r < R; ++r) {
    w[r] = (__m512bh)load_bits<Words>(rows.row(r) + i);
  }
  for (int t = 0; t < T; ++t) {
    const auto xs = (__m512bh)load_bits<Words>(x[t] + i);
    for (int r = 0; r < R; ++r) {
      sums[r][t] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][t], xs, w[r]);
    }
  }
}
#endif

// out[t * out_stride + r] = x[t] . row r, for R rows and T tokens. Asks for the cache lines from
// `next` on, one a step of every row, where that is not null.
template <int R, int T, int G, typename W>
PRUNEPATH_INLINE void dot_tile(const W* const (&x)[T], const Rows<G, W>& rows, const W* next,
                               int64_t size, float* __restrict out, int64_t out_stride) {
  Floats sums[R][T] = {};
  int64_t i = 0;
  for (; i + step_size<W>() <= size; i += step_size<W>()) {
    if (next != nullptr) {
      for (int r = 0; r < R; r += G) {
        prefetch_step(next + r / G * size + i);
      }
    }
    tile_step<R, T>(x, rows, i, sums);
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      float sum = sum_lanes(sums[r][t]);
      for (int64_t j = i; j < size; ++j) {
        sum += to_float(x[t][j]) * to_float(rows.row(r)[j]);
      }
      out[t * out_stride + r] = sum;
    }
  }
}

// P pairs of columns of y[t] += sum over r of scale[t][r] * rows[r * size], for T tokens.
template <int T, int P, typename W>
PRUNEPATH_INLINE void add_columns(const float* const (&scale)[T], const W* __restrict rows,
                                  int64_t num_rows, int64_t size, float* const (&y)[T], int64_t j) {
  Pair sums[T][P] = {};
  for (int64_t r = 0; r < num_rows; ++r) {
    Pair w[P];
    for (int p = 0; p < P; ++p) {
      w[p] = load_pair(rows + r * size + j + p * 2 * kLanes);
    }
    for (int t = 0; t < T; ++t) {
      for (int p = 0; p < P; ++p) {
        sums[t][p].a += scale[t][r] * w[p].a;
        sums[t][p].b += scale[t][r] * w[p].b;
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int p = 0; p < P; ++p) {
      float* to = y[t] + j + p * 2 * kLanes;
      store(to, load(to) + sums[t][p].a);
      store(to + kLanes, load(to + kLanes) + sums[t][p].b);
    }
  }
}

// Neurons of one expert that are worked on together: first all dot products with x, then the sums
// of output rows, so that both weights are read in long runs.
constexpr int64_t kSpanNeurons = 64;
constexpr int64_t kSpanBytes = int64_t{128}
                               << 10;  // of output rows, which wait in the second-level cache

struct Span {
  int64_t neuron;  // the first
  int64_t size;
  int num_tokens;
  int8_t tokens[kTileTokens];
  float pre[kTileTokens * 2 * kSpanNeurons];              // [token, neuron, G]
  float hidden[kTileTokens * kSpanNeurons];               // [token, neuron]
  uint32_t hidden_pairs[kTileTokens * kSpanNeurons / 2];  // bfloat16
};

// Pre-activations of N neurons from the span's neuron `at` on, for T tokens of its list.
template <int N, int T, int G, typename W>
PRUNEPATH_INLINE void dot_tokens(const Task<W>& task, Span& span, int64_t at, int first_token) {
  const FfnWeights& weights = task.weights;
  const int64_t stride = weights.in_strides.neuron;
  const Rows<G, W> rows{static_cast<const W*>(weights.w_in) + (span.neuron + at) * stride, stride,
                        weights.in_strides.inner};
  const W* x[T];
  for (int t = 0; t < T; ++t) {
    x[t] = task.x + span.tokens[first_token + t] * task.x_stride;
  }
  const W* next = first_token == 0 ? static_cast<const W*>(weights.w_out) +
                                         out_offset(weights.layout, span.neuron + at)
                                   : nullptr;
  dot_tile<N * G, T, G>(x, rows, next, weights.layout.hidden_size,
                        span.pre + first_token * 2 * kSpanNeurons + at * G, 2 * kSpanNeurons);
}

template <int N, int T, int G, typename W>
PRUNEPATH_INLINE void dot_some(const Task<W>& task, Span& span, int64_t at, int first_token) {
  for (; first_token + T <= span.num_tokens; first_token += T) {
    dot_tokens<N, T, G>(task, span, at, first_token);
  }
  if constexpr (T > 1) {
    if (first_token < span.num_tokens) {
      dot_some<N, T - 1, G>(task, span, at, first_token);
    }
  }
}

template <int N, int G, typename W>
PRUNEPATH_INLINE void dot_neurons(const Task<W>& task, Span& span, int64_t& at) {
  for (; at + N <= span.size; at += N) {
    dot_some<N, kDotTokens, G>(task, span, at, 0);
  }
}

template <int T, int P, typename W>
PRUNEPATH_INLINE void add_some(const Task<W>& task, const Span& span, const W* rows, int64_t j,
                               int first_token) {
  const int64_t H = task.weights.layout.hidden_size;
  for (; first_token + T <= span.num_tokens; first_token += T) {
    const float* scale[T];
    float* y[T];
    for (int t = 0; t < T; ++t) {
      scale[t] = span.hidden + (first_token + t) * kSpanNeurons;
      y[t] = task.partial + span.tokens[first_token + t] * H;
    }
    add_columns<T, P>(scale, rows, span.size, H, y, j);
  }
  if constexpr (T > 1) {
    if (first_token < span.num_tokens) {
      add_some<T - 1, P>(task, span, rows, j, first_token);
    }
  }
}

#if defined(__AVX512BF16__) && PRUNEPATH_LANES == 16
// bfloat16 pairs of neighbouring rows, and of neighbouring neurons' activations, rounded as dense
// FFNs round them: one instruction then adds up two rows.
struct RowPairs {
  Words rows[kSpanNeurons / 2][2 * kColumnPairs];  // even and odd columns
};

template <int P>
PRUNEPATH_INLINE void interleave(const BFloat16* rows, int64_t num_rows, int64_t size, int64_t j,
                                 RowPairs& pairs) {
  for (int64_t r = 0; r < num_rows; r += 2) {
    for (int p = 0; p < P; ++p) {
      const BFloat16* at = rows + r * size + j + p * 2 * kLanes;
      const Words a = load_bits<Words>(at);
      const Words b = r + 1 < num_rows ? load_bits<Words>(at + size) : Words{};
      pairs.rows[r / 2][2 * p] = (a & 0xffffu) | (b << 16);
      pairs.rows[r / 2][2 * p + 1] = (a >> 16) | (b & 0xffff0000u);
    }
  }
}

template <int T, int P>
PRUNEPATH_INLINE void add_pairs(const Task<BFloat16>& task, const Span& span, const RowPairs& pairs,
                                int64_t j, int first_token) {
  const int64_t H = task.weights.layout.hidden_size;
  for (; first_token + T <= span.num_tokens; first_token += T) {
    Floats sums[T][2 * P] = {};
    const uint32_t* scale = span.hidden_pairs + first_token * (kSpanNeurons / 2);
    for (int64_t r = 0; r < (span.size + 1) / 2; ++r) {
      for (int t = 0; t < T; ++t) {
        const auto h =
            (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(scale[t * (kSpanNeurons / 2) + r]));
        for (int p = 0; p < 2 * P; ++p) {
          sums[t][p] = (Floats)_mm512_dpbf16_ps((__m512)sums[t][p], (__m512bh)pairs.rows[r][p], h);
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      float* to = task.partial + span.tokens[first_token + t] * H + j;
      for (int p = 0; p < 2 * P; ++p) {
        store(to + p * kLanes, load(to + p * kLanes) + sums[t][p]);
      }
    }
  }
  if constexpr (T > 1) {
    if (first_token < span.num_tokens) {
      add_pairs<T - 1, P>(task, span, pairs, j, first_token);
    }
  }
}

template <int P>
PRUNEPATH_INLINE void add_columns_of_all(const Task<BFloat16>& task, const Span& span,
                                         const BFloat16* rows, int64_t j) {
  RowPairs pairs;
  interleave<P>(rows, span.size, task.weights.layout.hidden_size, j, pairs);
  add_pairs<kAddTokens, P>(task, span, pairs, j, 0);
}
#endif

template <int P, typename W>
PRUNEPATH_INLINE void add_columns_of_all(const Task<W>& task, const Span& span, const W* rows,
                                         int64_t j) {
  add_some<kAddTokens, P>(task, span, rows, j, 0);
}

// Adds the span's output rows to every token of its list, column by column.
template <typename W>
PRUNEPATH_INLINE void add_tokens(const Task<W>& task, Span& span, const W* rows) {
  const int64_t H = task.weights.layout.hidden_size;
  if constexpr (kHasPairProducts<W>) {
    for (int t = 0; t < span.num_tokens; ++t) {
      for (int64_t r = 0; r < span.size; r += 2) {
        BFloat16 low, high{0};
        from_float(span.hidden[t * kSpanNeurons + r], &low);
        if (r + 1 < span.size) {
          from_float(span.hidden[t * kSpanNeurons + r + 1], &high);
        }
        span.hidden_pairs[(t * kSpanNeurons + r) / 2] =
            static_cast<uint32_t>(high.bits) << 16 | low.bits;
      }
    }
  }
  const int64_t whole = H / step_size<W>() * step_size<W>();
  int64_t j = 0;
  for (; j + 2 * kColumnPairs * kLanes <= whole; j += 2 * kColumnPairs * kLanes) {
    add_columns_of_all<kColumnPairs>(task, span, rows, j);
  }
  for (; j < whole; j += 2 * kLanes) {
    add_columns_of_all<1>(task, span, rows, j);
  }
  for (; j < H; ++j) {
    for (int t = 0; t < span.num_tokens; ++t) {
      float& y = task.partial[span.tokens[t] * H + j];
      for (int64_t r = 0; r < span.size; ++r) {
        y += span.hidden[t * kSpanNeurons + r] * to_float(rows[r * H + j]);
      }
    }
  }
}

template <int G>
PRUNEPATH_INLINE void activate_span(const FfnWeights& weights, Span& span) {
  for (int t = 0; t < span.num_tokens; ++t) {
    const float* pre = span.pre + t * 2 * kSpanNeurons;
    float* hidden = span.hidden + t * kSpanNeurons;
    for (int64_t r = 0; r < span.size; ++r) {
      const int64_t bias = (span.neuron + r) * G;
      float h = activate(weights.activation, pre[r * G] + parameter(weights.b_in, bias));
      if (G == 2) {
        h *= pre[r * G + 1] + parameter(weights.b_in, bias + 1);
      }
      hidden[r] = h - parameter(weights.center, span.neuron + r);
    }
  }
}

template <int G, typename W>
PRUNEPATH_INLINE void run_span(const Task<W>& task, Span& span) {
  const FfnWeights& weights = task.weights;
  int64_t at = 0;
  dot_neurons<kTileRows / G, G>(task, span, at);
  dot_neurons<1, G>(task, span, at);
  activate_span<G>(weights, span);
  const W* rows = static_cast<const W*>(weights.w_out) + out_offset(weights.layout, span.neuron);
  add_tokens(task, span, rows);
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

// Neurons [neuron, end) of one expert for the tokens of a mask, all of which are the span's.
template <int G, typename W>
PRUNEPATH_INLINE void run_tokens(const Task<W>& task, Span& span, int64_t neuron, int64_t end,
                                 uint64_t mask) {
  span.num_tokens = 0;
  for (; mask != 0; mask &= mask - 1) {
    span.tokens[span.num_tokens++] = static_cast<int8_t>(__builtin_ctzll(mask));
  }
  const int64_t row_bytes = task.weights.layout.hidden_size * static_cast<int64_t>(sizeof(W));
  const int64_t fitting = kSpanBytes / (row_bytes + 1);
  const int64_t longest = fitting < 8 ? 8 : fitting < kSpanNeurons ? fitting : kSpanNeurons;
  for (span.neuron = neuron; span.neuron < end; span.neuron += span.size) {
    span.size = end - span.neuron < longest ? end - span.neuron : longest;
    run_span<G>(task, span);
  }
}

template <int G, typename W>
void run_neurons_typed(const FfnWeights& weights, const ActiveExperts& active, const void* x,
                       int64_t x_stride, int64_t begin, int64_t end, float* sum, float* partial) {
  constexpr int kBlock = kRows / G < kMaxBlock ? kRows / G : kMaxBlock;
  const int64_t n = weights.layout.expert_width;
  const int64_t H = weights.layout.hidden_size;
  const Task<W> task{weights, static_cast<const W*>(x), x_stride, partial};
  Span tokens_span;
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
    if constexpr (kHasTiles) {
      // Not by this expert's own tokens, so that what others choose changes no bit of a token.
      if (active.num_tokens > 1) {
        run_tokens<G>(task, tokens_span, neuron, span_end, mask);
        in_partial += span;
        neuron = span_end;
      }
    }
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
    if (in_partial >= kPartialNeurons) {
      flush<W>(touched, H, partial, sum);
      touched = 0;
      in_partial = 0;
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
