// Included once by each ffn_kernels_*.cpp, which is compiled for one instruction set and defines
// PRUNEPATH_LANES (floats in a vector) and PRUNEPATH_KERNELS (the table to define).

#include "cpu/ffn_kernels.h"
#include "cpu/simd.h"

namespace prunepath {
namespace {

// Steps of a dot product that are added up apart, so that none waits for the one before.
constexpr int64_t kUnroll = 4;
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

// How far ahead of the row that is worked on rows are asked for. One core's own misses keep too few
// cache lines in flight for the memory's bandwidth.
constexpr int64_t kAheadBytes = 8 << 10;

// Elements that a step of the inner loops takes of every row: whole cache lines, whole pairs.
template <typename W>
constexpr int64_t step_size() {
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(W));
  return line > 2 * kLanes ? line : 2 * kLanes;
}

// Asks for the cache lines of a step.
template <typename W>
PRUNEPATH_INLINE void prefetch_step(const W* data) {
  for (int64_t i = 0; i < step_size<W>(); i += kCacheLine / static_cast<int64_t>(sizeof(W))) {
    __builtin_prefetch(data + i, 0, 3);
  }
}

template <typename W>
PRUNEPATH_INLINE int64_t rows_ahead(int64_t size) {
  const int64_t row_bytes = size * static_cast<int64_t>(sizeof(W));
  return row_bytes < kAheadBytes / 16 ? 16 : (kAheadBytes + row_bytes - 1) / row_bytes;
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

// What a step adds to a dot product.
template <typename W>
PRUNEPATH_INLINE void dot_step(const W* x, const W* row, Pair& sum) {
  for (int64_t j = 0; j < step_size<W>(); j += 2 * kLanes) {
    const Pair xs = load_pair(x + j);
    const Pair w = load_pair(row + j);
    sum.a += xs.a * w.a;
    sum.b += xs.b * w.b;
  }
}

#if defined(__AVX512BF16__) && PRUNEPATH_LANES == 16
// Products of bfloat16 are exact in float32, so that this differs in the order of the sum alone.
PRUNEPATH_INLINE void dot_step(const BFloat16* x, const BFloat16* row, Pair& sum) {
  const auto xs = (__m512bh)load_bits<Words>(x);
  const auto w = (__m512bh)load_bits<Words>(row);
  sum.a = (Floats)_mm512_dpbf16_ps((__m512)sum.a, xs, w);
}
#endif

// x . row. Asks for the row at `ahead` meanwhile.
template <typename W>
PRUNEPATH_INLINE float dot_row(const W* __restrict x, const W* __restrict row, const W* ahead,
                               int64_t size) {
  constexpr int64_t kStep = step_size<W>();
  Pair sums[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kStep <= size; i += kUnroll * kStep) {
    for (int64_t u = 0; u < kUnroll; ++u) {
      prefetch_step(ahead + i + u * kStep);
    }
    for (int64_t u = 0; u < kUnroll; ++u) {
      dot_step(x + i + u * kStep, row + i + u * kStep, sums[u]);
    }
  }
  for (; i + kStep <= size; i += kStep) {
    prefetch_step(ahead + i);
    dot_step(x + i, row + i, sums[0]);
  }
  Floats total = {};
  for (const Pair& sum : sums) {
    total += sum.a + sum.b;
  }
  float sum = sum_lanes(total);
  for (; i < size; ++i) {
    sum += to_float(x[i]) * to_float(row[i]);
  }
  return sum;
}

// y += scale * row, y in the order of `Pair`. Asks for the row at `ahead` meanwhile.
template <typename W>
PRUNEPATH_INLINE void add_row(float scale, const W* __restrict row, const W* ahead, int64_t size,
                              float* __restrict y) {
  constexpr int64_t kStep = step_size<W>();
  const auto step = [&](int64_t i) {
    for (int64_t j = i; j < i + kStep; j += 2 * kLanes) {
      const Pair w = load_pair(row + j);
      store(y + j, load(y + j) + scale * w.a);
      store(y + j + kLanes, load(y + j + kLanes) + scale * w.b);
    }
  };
  int64_t i = 0;
  for (; i + kUnroll * kStep <= size; i += kUnroll * kStep) {
    for (int64_t u = 0; u < kUnroll; ++u) {
      prefetch_step(ahead + i + u * kStep);
    }
    for (int64_t u = 0; u < kUnroll; ++u) {
      step(i + u * kStep);
    }
  }
  for (; i + kStep <= size; i += kStep) {
    prefetch_step(ahead + i);
    step(i);
  }
  for (; i < size; ++i) {
    y[i] += scale * to_float(row[i]);
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
    float* to = out + t * out_stride;
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
    if constexpr (R == 4) {
      store_lane_sums(&sums[0][t], T, to);
    } else
#endif
    {
      for (int r = 0; r < R; ++r) {
        to[r] = sum_lanes(sums[r][t]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t j = i; j < size; ++j) {
        to[r] += to_float(x[t][j]) * to_float(rows.row(r)[j]);
      }
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
PRUNEPATH_INLINE void run_tiles(const Task<W>& task, Span& span) {
  const FfnWeights& weights = task.weights;
  int64_t at = 0;
  dot_neurons<kTileRows / G, G>(task, span, at);
  dot_neurons<1, G>(task, span, at);
  activate_span<G>(weights, span);
  const W* rows = static_cast<const W*>(weights.w_out) + out_offset(weights.layout, span.neuron);
  add_tokens(task, span, rows);
}

// Reads the weights row by row as they lie in memory. While a row is worked on, the one that comes
// kAheadBytes later is asked for, across the end of each matrix into the rows that follow: those of
// the neurons from `next` on.
template <int G, typename W>
PRUNEPATH_INLINE void run_rows(const Task<W>& task, Span& span, int64_t next) {
  const FfnWeights& weights = task.weights;
  const int64_t H = weights.layout.hidden_size;
  const int64_t in_rows = span.size * G;
  const int64_t ahead = rows_ahead<W>(H);
  const W* out = static_cast<const W*>(weights.w_out) + out_offset(weights.layout, span.neuron);
  const auto in_row = [&](int64_t neuron, int64_t r) {
    return static_cast<const W*>(weights.w_in) + (neuron + r / G) * weights.in_strides.neuron +
           r % G * weights.in_strides.inner;
  };
  const auto row_ahead = [&](int64_t r) {
    r += ahead;
    return r < in_rows               ? in_row(span.neuron, r)
           : r < in_rows + span.size ? out + (r - in_rows) * H
                                     : in_row(next, r - in_rows - span.size);
  };
  for (int64_t r = 0; r < in_rows; ++r) {
    const W* row = in_row(span.neuron, r);
    const W* later = row_ahead(r);
    for (int t = 0; t < span.num_tokens; ++t) {
      span.pre[t * 2 * kSpanNeurons + r] =
          dot_row(task.x + span.tokens[t] * task.x_stride, row, t == 0 ? later : row, H);
    }
  }
  activate_span<G>(weights, span);
  for (int64_t r = 0; r < span.size; ++r) {
    const W* row = out + r * H;
    const W* later = row_ahead(in_rows + r);
    for (int t = 0; t < span.num_tokens; ++t) {
      add_row(span.hidden[t * kSpanNeurons + r], row, t == 0 ? later : row, H,
              task.partial + span.tokens[t] * H);
    }
  }
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

// Neurons [neuron, end) of one expert for the tokens of a mask; `next` are worked on after them.
template <int G, typename W>
PRUNEPATH_INLINE void run_tokens(const Task<W>& task, Span& span, int64_t neuron, int64_t end,
                                 int64_t next, uint64_t mask, bool tiles) {
  span.num_tokens = 0;
  for (; mask != 0; mask &= mask - 1) {
    span.tokens[span.num_tokens++] = static_cast<int8_t>(__builtin_ctzll(mask));
  }
  int64_t longest = kSpanNeurons;
  if (tiles) {
    const int64_t row_bytes = task.weights.layout.hidden_size * static_cast<int64_t>(sizeof(W));
    const int64_t fitting = kSpanBytes / (row_bytes + 1);
    longest = fitting < 8 ? 8 : fitting < kSpanNeurons ? fitting : kSpanNeurons;
  }
  for (span.neuron = neuron; span.neuron < end; span.neuron += span.size) {
    span.size = end - span.neuron < longest ? end - span.neuron : longest;
    if (kHasTiles && tiles) {
      run_tiles<G>(task, span);
    } else {
      run_rows<G>(task, span, span.neuron + span.size < end ? span.neuron + span.size : next);
    }
  }
}

template <int G, typename W>
void run_neurons_typed(const FfnWeights& weights, const ActiveExperts& active, const void* x,
                       int64_t x_stride, int64_t begin, int64_t end, float* sum, float* partial) {
  const int64_t n = weights.layout.expert_width;
  const int64_t H = weights.layout.hidden_size;
  const Task<W> task{weights, static_cast<const W*>(x), x_stride, partial};
  // Not by an expert's own tokens, so that what others choose changes no bit of a token.
  const bool tiles = kHasTiles && active.num_tokens > 1;
  Span span;
  uint64_t touched = 0;
  int64_t in_partial = 0;
  while (begin < end) {
    // The part of one expert that is in the range.
    const int64_t position = begin / n;
    const int32_t expert = active.experts[position];
    const int64_t left = n - begin % n < end - begin ? n - begin % n : end - begin;
    const int64_t room = kPartialNeurons - in_partial;
    const int64_t size = left < room ? left : room;
    const int64_t neuron = expert * n + begin % n;
    begin += size;
    const int64_t next = size < left   ? neuron + size
                         : begin < end ? active.experts[position + 1] * n
                                       : neuron;
    touched |= active.masks[expert];
    run_tokens<G>(task, span, neuron, neuron + size, next, active.masks[expert], tiles);
    in_partial += size;
    if (in_partial == kPartialNeurons) {
      flush<W>(touched, H, partial, sum);
      touched = 0;
      in_partial = 0;
    }
  }
  flush<W>(touched, H, partial, sum);
}

template <typename W>
void router_logits_typed(const void* x, int64_t x_stride, int64_t num_tokens, int64_t hidden_size,
                         int64_t num_experts, const void* weight, const Parameter& bias,
                         int64_t begin, int64_t end, float* logits) {
  const int64_t ahead = rows_ahead<W>(hidden_size);
  for (int64_t e = begin; e < end; ++e) {
    const W* row = static_cast<const W*>(weight) + e * hidden_size;
    const W* next = e + ahead < end ? row + ahead * hidden_size : row;
    for (int64_t t = 0; t < num_tokens; ++t) {
      logits[t * num_experts + e] =
          dot_row(static_cast<const W*>(x) + t * x_stride, row, next, hidden_size);
      next = row;
    }
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
