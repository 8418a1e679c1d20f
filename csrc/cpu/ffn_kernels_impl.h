// Included once by each ffn_kernels_*.cpp, which is compiled for one instruction set and defines
// PRUNEPATH_LANES (floats in a vector) and PRUNEPATH_KERNELS (the table to define).

#include "cpu/ffn_kernels.h"
#include "cpu/simd.h"
#include "cpu/simd_math.h"

namespace prunepath {
namespace {

// Steps of a dot product that are added up apart, so that none waits for the one before.
constexpr int64_t kUnroll = 4;

constexpr int64_t kCacheLine = 64;

// Float32 rounding grows with the number of terms, so sums of this many neurons are added up apart.
constexpr int64_t kPartialNeurons = 256;

// How far ahead of the row that is worked on rows are asked for. One core's own misses keep too few
// cache lines in flight for the memory's bandwidth, and the active rows are not next to each other.
constexpr int64_t kAheadBytes = 6 << 10;

// Neurons whose rows are read one by one: first all that a dot product with x needs, then all that
// are added to y.
constexpr int64_t kBlockNeurons = 16;

// Calls of several tokens work on register tiles: a loaded weight serves several tokens, a loaded x
// several rows. It takes the 32 registers of AVX-512; with fewer, the tokens one by one are as
// fast.
constexpr bool kHasTiles = kLanes == 16;
constexpr int kTileRows = 4;
constexpr int kTileTokensAtOnce = 4;
constexpr int64_t kSpanNeurons = 64;
constexpr int64_t kSpanBytes = int64_t{128} << 10;  // of output rows, which wait in the L2 cache

// Elements that a W holds.
template <typename W>
constexpr int64_t kElements = 1;
template <>
constexpr int64_t kElements<Int4Pair> = 2;

// Elements that a step of the inner loops takes of every row: whole cache lines, whole pairs.
template <typename W>
constexpr int64_t step_size() {
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(W));
  return line > 2 * kLanes ? line : 2 * kLanes;
}

// As many as of bfloat16, whose order of x they share.
template <>
constexpr int64_t step_size<Int4Pair>() {
  return step_size<BFloat16>();
}

template <typename W>
constexpr int64_t whole_steps(int64_t size) {
  return size / step_size<W>() * step_size<W>();
}

// Asks for the cache lines of a step, into the second-level cache: the first level keeps fewer in
// flight.
template <typename W>
PRUNEPATH_INLINE void prefetch_step(const W* data) {
  for (int64_t i = 0; i < step_size<W>(); i += kCacheLine / static_cast<int64_t>(sizeof(W))) {
    __builtin_prefetch(data + i, 0, 2);
  }
}

PRUNEPATH_INLINE float parameter(const Parameter& p, int64_t index) {
  return p.data == nullptr ? 0.0f : load_as_float(p.data, p.dtype, index);
}

template <typename X>
void widen_from(const X* x, int64_t stride, int64_t size, DType weights, float* out) {
  const bool even_first = weights == DType::kBFloat16 || weights == DType::kInt4;
  const int64_t whole = even_first ? whole_steps<BFloat16>(size) : 0;
  for (int64_t i = 0; i < whole; i += 2 * kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      out[i + lane] = to_float(x[(i + 2 * lane) * stride]);
      out[i + kLanes + lane] = to_float(x[(i + 2 * lane + 1) * stride]);
    }
  }
  for (int64_t i = whole; i < size; ++i) {
    out[i] = to_float(x[i * stride]);
  }
}

void widen(const void* x, DType dtype, int64_t stride, int64_t size, DType weights, float* out) {
  switch (dtype) {
    case DType::kBFloat16:
      return widen_from(static_cast<const BFloat16*>(x), stride, size, weights, out);
    case DType::kFloat16:
      return widen_from(static_cast<const Float16*>(x), stride, size, weights, out);
    default:
      return widen_from(static_cast<const float*>(x), stride, size, weights, out);
  }
}

template <typename W>
PRUNEPATH_INLINE float element(const W* row, int64_t i) {
  return to_float(row[i]);
}

PRUNEPATH_INLINE float element(const Int4Pair* row, int64_t i) {
  return static_cast<float>((row[i / 2].bits >> i % 2 * 4 & 15) - 8);
}

// out[t] = x[t] . row for T tokens, each of them in the same order whatever T is. Asks for the row
// at `ahead` meanwhile. Where GCC does not unroll these loops, the sums stay in memory.
template <int T, typename W>
PRUNEPATH_INLINE void dot_row(const float* const (&x)[T], const W* __restrict row, const W* ahead,
                              int64_t size, float (&out)[T]) {
  constexpr int64_t kStep = step_size<W>();
  Pair sums[T][kUnroll] = {};
  const auto step = [&](int64_t i, int64_t u) {
#pragma GCC unroll 8
    for (int64_t j = i; j < i + kStep; j += 2 * kLanes) {
      const Pair w = load_pair(row + j / kElements<W>);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        sums[t][u].a += load(x[t] + j) * w.a;
        sums[t][u].b += load(x[t] + j + kLanes) * w.b;
      }
    }
  };
  int64_t i = 0;
  for (; i + kUnroll * kStep <= size; i += kUnroll * kStep) {
    for (int64_t u = 0; u < kUnroll; ++u) {
      prefetch_step(ahead + (i + u * kStep) / kElements<W>);
    }
#pragma GCC unroll 4
    for (int64_t u = 0; u < kUnroll; ++u) {
      step(i + u * kStep, u);
    }
  }
  for (; i + kStep <= size; i += kStep) {
    prefetch_step(ahead + i / kElements<W>);
    step(i, 0);
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    Floats total = {};
#pragma GCC unroll 4
    for (const Pair& sum : sums[t]) {
      total += sum.a + sum.b;
    }
    out[t] = sum_lanes(total);
    for (int64_t j = i; j < size; ++j) {
      out[t] += x[t][j] * element(row, j);
    }
  }
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

template <typename W>
PRUNEPATH_INLINE int64_t rows_ahead(int64_t size) {
  const int64_t row_bytes = size / kElements<W> * static_cast<int64_t>(sizeof(W));
  const int64_t rows = (kAheadBytes + row_bytes - 1) / row_bytes;
  return rows < kBlockNeurons ? rows : kBlockNeurons;
}

template <typename W>
void dot_rows_typed(const float* x, int64_t num_tokens, const RouterTable& table, int64_t begin,
                    int64_t end, float* out) {
  const int64_t size = table.size;
  const int64_t stride = size / kElements<W>;
  const int64_t ahead = rows_ahead<W>(size);
  for (int64_t r = begin; r < end; ++r) {
    const W* row = static_cast<const W*>(table.data) + r * stride;
    const W* later = r + ahead < end ? row + ahead * stride : row;
    const float scale = table.dtype == DType::kInt4 ? parameter(table.scale, r) : 1.0f;
    const float bias = parameter(table.bias, r);
    int64_t t = 0;
    for (; t + 2 <= num_tokens; t += 2) {
      float dots[2];
      dot_row<2>({x + t * size, x + (t + 1) * size}, row, t == 0 ? later : row, size, dots);
      out[t * table.rows + r] = dots[0] * scale + bias;
      out[(t + 1) * table.rows + r] = dots[1] * scale + bias;
    }
    if (t < num_tokens) {
      float dot[1];
      dot_row<1>({x + t * size}, row, t == 0 ? later : row, size, dot);
      out[t * table.rows + r] = dot[0] * scale + bias;
    }
  }
}

void dot_rows(const float* x, int64_t num_tokens, const RouterTable& table, int64_t begin,
              int64_t end, float* out) {
  const auto run = [&]() {
    switch (table.dtype) {
      case DType::kInt4:
        return dot_rows_typed<Int4Pair>;
      case DType::kBFloat16:
        return dot_rows_typed<BFloat16>;
      case DType::kFloat16:
        return dot_rows_typed<Float16>;
      default:
        return dot_rows_typed<float>;
    }
  }();
  run(x, num_tokens, table, begin, end, out);
}

// `count` elements, at most kLanes of them, and then zeros.
PRUNEPATH_INLINE Floats load_some(const Parameter& p, int64_t index, int64_t count) {
  if (count == kLanes) {
    switch (p.dtype) {
      case DType::kBFloat16:
        return load_in_order(static_cast<const BFloat16*>(p.data) + index);
      case DType::kFloat16:
        return load(static_cast<const Float16*>(p.data) + index);
      default:
        return load(static_cast<const float*>(p.data) + index);
    }
  }
  float some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    some[i] = parameter(p, index + i);
  }
  return load(some);
}

PRUNEPATH_INLINE Floats router_activate(Activation activation, Floats x) {
  switch (activation) {
    case Activation::kGelu:
    case Activation::kGeluTanh:
      return x / (1.0f + exp_of(-1.702f * x));
    case Activation::kSilu:
      return x / (1.0f + exp_of(-x));
    case Activation::kRelu2: {
      const Floats root = softplus(x);
      return root * root;
    }
    default:
      return softplus(x);
  }
}

void combine_factors(const RouterFactors& router, int64_t num_tokens, int64_t begin, int64_t end,
                     float* factors) {
  const int64_t E = router.num_experts;
  for (int64_t t = 0; t < num_tokens; ++t) {
    float* row = factors + t * router.num_factors * E;
    for (int64_t e = begin; e < end; e += kLanes) {
      const int64_t count = end - e < kLanes ? end - e : kLanes;
      Floats logit = load_some(router.log_scale, e, count);
      for (int64_t f = 0; f < router.num_factors; ++f) {
        const Floats v = load_some({row, DType::kFloat32}, f * E + e, count);
        const Floats factor = f == 0 ? router_activate(router.activation, v) : v;
        const Floats floor = load_some(router.floor, f * E + e, count);
        logit += 0.25f * log_of(factor * factor + floor * floor);
      }
      if (count == kLanes) {
        store(row + e, logit);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          row[e + i] = logit[i];
        }
      }
    }
  }
}

template <typename W>
struct Task {
  const FfnWeights& weights;
  const ActiveNeurons& active;
  const TileX& x;
  float* partial;  // [num_tokens, hidden_size] in the order of `Pair`

  // Row of a neuron, counted over the list: of the gate or up, or of the down projection.
  template <bool kGated>
  __attribute__((always_inline)) const W* in_row(int64_t place, int which) const {
    const FfnLayout& layout = weights.layout;
    const int64_t neuron = active.neurons[place];
    return kGated && which == 0 ? static_cast<const W*>(weights.gate) + neuron * layout.gate_stride
                                : static_cast<const W*>(weights.up) + neuron * layout.up_stride;
  }
  __attribute__((always_inline)) const W* down_row(int64_t place) const {
    return static_cast<const W*>(weights.down) + active.neurons[place] * weights.layout.down_stride;
  }
};

// The activation of a neuron whose dot products with x are `pre`.
template <bool kGated>
PRUNEPATH_INLINE float hidden_of(const FfnWeights& weights, int32_t neuron, const float* pre) {
  if (!kGated) {
    return activate(weights.activation, pre[0] + parameter(weights.up_bias, neuron));
  }
  return activate(weights.activation, pre[0] + parameter(weights.gate_bias, neuron)) *
         (pre[1] + parameter(weights.up_bias, neuron));
}

// A block's rows in the order in which they are read.
template <bool kGated, typename W>
struct Block {
  static constexpr int64_t kInputs = kGated ? 2 : 1;
  int64_t size = 0;  // neurons
  const W* rows[(kInputs + 1) * kBlockNeurons];

  void fill(const Task<W>& task, int64_t begin, int64_t end) {
    size = end - begin < kBlockNeurons ? end - begin : kBlockNeurons;
    const W** row = rows;
    for (int64_t i = begin; i < begin + size; ++i) {
      for (int which = 0; which < kInputs; ++which) {
        *row++ = task.template in_row<kGated>(i, which);
      }
    }
    for (int64_t i = begin; i < begin + size; ++i) {
      *row++ = task.down_row(i);
    }
  }

  int64_t num_rows() const { return (kInputs + 1) * size; }
};

// Reads the neurons from `begin` to `end` row by row. While a row is worked on, the one that is
// read kAheadBytes later is asked for, whichever table it is in.
template <bool kGated, typename W>
PRUNEPATH_INLINE void run_rows(const Task<W>& task, int64_t begin, int64_t end, int64_t last) {
  constexpr int64_t G = kGated ? 2 : 1;
  const int64_t H = task.weights.layout.hidden_size;
  const int64_t ahead = rows_ahead<W>(H);
  Block<kGated, W> blocks[2];
  float values[kBlockNeurons][kTileTokens][G];  // dot products, then activations in [.][.][0]
  blocks[0].fill(task, begin, end);
  for (int64_t at = begin, turn = 0; at < end; at += kBlockNeurons, turn ^= 1) {
    const Block<kGated, W>& block = blocks[turn];
    Block<kGated, W>& next = blocks[turn ^ 1];
    next.fill(task, at + block.size, last);
    const auto later = [&](int64_t r) {
      const int64_t target = r + ahead - block.num_rows();
      return target < 0                 ? block.rows[r + ahead]
             : target < next.num_rows() ? next.rows[target]
                                        : block.rows[r];
    };
    for (int64_t r = 0; r < block.size * G; ++r) {
      const W* ask = later(r);
      for (uint64_t mask = task.active.masks[at + r / G]; mask != 0; mask &= mask - 1) {
        const int t = __builtin_ctzll(mask);
        float dot[1];
        dot_row<1>({task.x.wide + t * H}, block.rows[r], ask, H, dot);
        values[r / G][t][r % G] = dot[0];
        ask = block.rows[r];
      }
    }
    for (int64_t i = 0; i < block.size; ++i) {
      for (uint64_t mask = task.active.masks[at + i]; mask != 0; mask &= mask - 1) {
        float* value = values[i][__builtin_ctzll(mask)];
        value[0] = hidden_of<kGated>(task.weights, task.active.neurons[at + i], value);
      }
    }
    for (int64_t i = 0; i < block.size; ++i) {
      const W* ask = later(block.size * G + i);
      for (uint64_t mask = task.active.masks[at + i]; mask != 0; mask &= mask - 1) {
        const int t = __builtin_ctzll(mask);
        add_row(values[i][t][0], block.rows[block.size * G + i], ask, H, task.partial + t * H);
        ask = block.rows[block.size * G + i];
      }
    }
  }
}

// What a step adds to R x T dot products, of R rows of weights and T tokens.
template <int R, int T, typename W>
PRUNEPATH_INLINE void tile_step(const W* const (&x)[T], const W* const (&rows)[R], int64_t i,
                                Floats (&sums)[R][T]) {
  for (int64_t j = i; j < i + step_size<W>(); j += 2 * kLanes) {
    Pair w[R];
    for (int r = 0; r < R; ++r) {
      w[r] = load_pair(rows[r] + j);
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
template <int R, int T>
PRUNEPATH_INLINE void tile_step(const BFloat16* const (&x)[T], const BFloat16* const (&rows)[R],
                                int64_t i, Floats (&sums)[R][T]) {
  __m512bh w[R];
  for (int r = 0; r < R; ++r) {
    w[r] = (__m512bh)load_bits<Words>(rows[r] + i);
  }
  for (int t = 0; t < T; ++t) {
    const auto xs = (__m512bh)load_bits<Words>(x[t] + i);
    for (int r = 0; r < R; ++r) {
      sums[r][t] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][t], xs, w[r]);
    }
  }
}
#endif

// Neurons that register tiles work on together.
struct Span {
  int64_t begin;  // place in the list
  int64_t size;
  float hidden[kTileTokens][kSpanNeurons];
};

// Activations of N neurons from the span's neuron `at` on, for T tokens that all of them serve.
// Asks for the N rows of the down projection, and for the rows of the N neurons from `next` on, if
// `ask`.
template <int N, int T, bool kGated, typename W>
PRUNEPATH_INLINE void dot_tile(const Task<W>& task, Span& span, int64_t at, const int* tokens,
                               bool ask, int64_t next) {
  constexpr int G = kGated ? 2 : 1;
  const int64_t H = task.weights.layout.hidden_size;
  const W* rows[N * G];
  const W* asked[N * (G + 1)];
  for (int i = 0; i < N; ++i) {
    for (int g = 0; g < G; ++g) {
      rows[i * G + g] = task.template in_row<kGated>(span.begin + at + i, g);
      asked[i * (G + 1) + g] = task.template in_row<kGated>(next + i, g);
    }
    asked[i * (G + 1) + G] = task.down_row(span.begin + at + i);
  }
  const W* x[T];
  for (int t = 0; t < T; ++t) {
    x[t] = static_cast<const W*>(task.x.data) + tokens[t] * task.x.stride;
  }
  Floats sums[N * G][T] = {};
  int64_t j = 0;
  for (; j + step_size<W>() <= H; j += step_size<W>()) {
    if (ask) {
      for (const W* row : asked) {
        prefetch_step(row + j);
      }
    }
    tile_step<N * G, T>(x, rows, j, sums);
  }
  for (int t = 0; t < T; ++t) {
    for (int i = 0; i < N; ++i) {
      float pre[G];
      for (int g = 0; g < G; ++g) {
        pre[g] = sum_lanes(sums[i * G + g][t]);
        for (int64_t tail = j; tail < H; ++tail) {
          pre[g] += to_float(x[t][tail]) * to_float(rows[i * G + g][tail]);
        }
      }
      span.hidden[tokens[t]][at + i] =
          hidden_of<kGated>(task.weights, task.active.neurons[span.begin + at + i], pre);
    }
  }
}

template <int N, int T, bool kGated, typename W>
PRUNEPATH_INLINE void dot_tokens(const Task<W>& task, Span& span, int64_t at, const int* tokens,
                                 int num_tokens, int64_t next, int first = 0) {
  for (; first + T <= num_tokens; first += T) {
    dot_tile<N, T, kGated>(task, span, at, tokens + first, first == 0, next);
  }
  if constexpr (T > 1) {
    if (first < num_tokens) {
      dot_tokens<N, T - 1, kGated>(task, span, at, tokens, num_tokens, next, first);
    }
  }
}

PRUNEPATH_INLINE int list_bits(uint64_t mask, int* out) {
  int count = 0;
  for (; mask != 0; mask &= mask - 1) {
    out[count++] = __builtin_ctzll(mask);
  }
  return count;
}

// P pairs of columns of y[t] += sum over the listed rows of hidden[t][row] * row, for T tokens.
template <int T, int P, typename W>
PRUNEPATH_INLINE void add_columns(const float* const (&hidden)[T], const W* const* rows,
                                  const uint8_t* list, int64_t num_rows, int64_t j,
                                  float* const (&y)[T]) {
  Pair sums[T][P];
  for (int t = 0; t < T; ++t) {
    for (int p = 0; p < P; ++p) {
      const float* from = y[t] + j + p * 2 * kLanes;
      sums[t][p] = {load(from), load(from + kLanes)};
    }
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    const W* row = rows[list[i]] + j;
    for (int p = 0; p < P; ++p) {
      const Pair w = load_pair(row + p * 2 * kLanes);
      for (int t = 0; t < T; ++t) {
        sums[t][p].a += hidden[t][list[i]] * w.a;
        sums[t][p].b += hidden[t][list[i]] * w.b;
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int p = 0; p < P; ++p) {
      float* to = y[t] + j + p * 2 * kLanes;
      store(to, sums[t][p].a);
      store(to + kLanes, sums[t][p].b);
    }
  }
}

// The neurons of a span that each of its tokens needs.
struct TokenRows {
  uint8_t list[kTileTokens][kSpanNeurons];
  int size[kTileTokens];
};

// Adds P pairs of columns of the span's down rows, T tokens at a time, which need the same neurons.
template <int T, int P, typename W>
PRUNEPATH_INLINE void add_tokens(const Task<W>& task, const Span& span, const TokenRows& needed,
                                 const W* const* rows, const int* tokens, int num_tokens, int64_t j,
                                 int first = 0) {
  const int64_t H = task.weights.layout.hidden_size;
  for (; first + T <= num_tokens; first += T) {
    const float* hidden[T];
    float* y[T];
    for (int t = 0; t < T; ++t) {
      hidden[t] = span.hidden[tokens[first + t]];
      y[t] = task.partial + tokens[first + t] * H;
    }
    const int any = tokens[first];
    add_columns<T, P>(hidden, rows, needed.list[any], needed.size[any], j, y);
  }
  if constexpr (T > 1) {
    if (first < num_tokens) {
      add_tokens<T - 1, P>(task, span, needed, rows, tokens, num_tokens, j, first);
    }
  }
}

template <int T, int P, typename W>
PRUNEPATH_INLINE void add_span(const Task<W>& task, const Span& span, const TokenRows& needed,
                               const W* const* rows, const int* tokens, int num_tokens) {
  const int64_t H = task.weights.layout.hidden_size;
  int64_t j = 0;
  for (; j + P * 2 * kLanes <= whole_steps<W>(H); j += P * 2 * kLanes) {
    add_tokens<T, P>(task, span, needed, rows, tokens, num_tokens, j);
  }
  for (; j < whole_steps<W>(H); j += 2 * kLanes) {
    add_tokens<1, 1>(task, span, needed, rows, tokens, num_tokens, j);
  }
  for (int i = 0; i < num_tokens && j < H; ++i) {
    const int t = tokens[i];
    for (int r = 0; r < needed.size[t]; ++r) {
      const uint8_t row = needed.list[t][r];
      for (int64_t tail = j; tail < H; ++tail) {
        task.partial[t * H + tail] += span.hidden[t][row] * to_float(rows[row][tail]);
      }
    }
  }
}

// Works on the neurons from `begin` to `end` in register tiles; `last` ends the list.
template <bool kGated, typename W>
PRUNEPATH_INLINE void run_tiles(const Task<W>& task, int64_t begin, int64_t end, int64_t last) {
  constexpr int kNeurons = kTileRows / (kGated ? 2 : 1);
  const uint64_t* masks = task.active.masks;
  const int64_t row_bytes = task.weights.layout.hidden_size * static_cast<int64_t>(sizeof(W));
  const int64_t fitting = kSpanBytes / row_bytes;
  const int64_t longest = fitting < 8 ? 8 : fitting < kSpanNeurons ? fitting : kSpanNeurons;
  Span span;
  for (span.begin = begin; span.begin < end; span.begin += span.size) {
    span.size = end - span.begin < longest ? end - span.begin : longest;
    TokenRows needed = {};
    const W* rows[kSpanNeurons];
    uint64_t any = 0;
    uint64_t all = ~uint64_t{0};
    int tokens[kTileTokens];
    for (int64_t at = 0; at < span.size;) {
      const uint64_t mask = masks[span.begin + at];
      const int num_tokens = list_bits(mask, tokens);
      int64_t equal = 1;
      while (equal < kNeurons && at + equal < span.size && masks[span.begin + at + equal] == mask) {
        ++equal;
      }
      equal = equal == kNeurons ? equal : 1;
      int64_t next = span.begin + at + equal;
      next = next + equal <= last ? next : span.begin + at;
      if (equal == kNeurons) {
        dot_tokens<kNeurons, kTileTokensAtOnce, kGated>(task, span, at, tokens, num_tokens, next);
      } else {
        dot_tokens<1, kTileTokensAtOnce, kGated>(task, span, at, tokens, num_tokens, next);
      }
      for (int64_t i = at; i < at + equal; ++i) {
        rows[i] = task.down_row(span.begin + i);
        for (int t = 0; t < num_tokens; ++t) {
          needed.list[tokens[t]][needed.size[tokens[t]]++] = static_cast<uint8_t>(i);
        }
      }
      any |= mask;
      all &= mask;
      at += equal;
    }
    const int num_tokens = list_bits(any, tokens);
    if (any == all) {
      add_span<4, 2>(task, span, needed, rows, tokens, num_tokens);
    } else {
      add_span<1, 4>(task, span, needed, rows, tokens, num_tokens);
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
    for (; i < whole_steps<W>(size); i += 2 * kLanes) {
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

template <bool kGated, typename W>
void run_neurons_typed(const FfnWeights& weights, const ActiveNeurons& active, const TileX& x,
                       int64_t begin, int64_t end, float* sum, float* partial) {
  const Task<W> task{weights, active, x, partial};
  for (int64_t at = begin; at < end; at += kPartialNeurons) {
    const int64_t to = end - at < kPartialNeurons ? end : at + kPartialNeurons;
    // Not by a neuron's own tokens, so that what others choose changes no bit of a token.
    if (kHasTiles && x.num_tokens > 1) {
      run_tiles<kGated>(task, at, to, end);
    } else {
      run_rows<kGated>(task, at, to, end);
    }
    uint64_t touched = 0;
    for (int64_t i = at; i < to; ++i) {
      touched |= active.masks[i];
    }
    flush<W>(touched, weights.layout.hidden_size, partial, sum);
  }
}

void run_neurons(const FfnWeights& weights, const ActiveNeurons& active, const TileX& x,
                 int64_t begin, int64_t end, float* sum, float* partial) {
  const bool gated = weights.layout.gated;
  const auto run = [&]() {
    switch (weights.dtype) {
      case DType::kBFloat16:
        return gated ? run_neurons_typed<true, BFloat16> : run_neurons_typed<false, BFloat16>;
      case DType::kFloat16:
        return gated ? run_neurons_typed<true, Float16> : run_neurons_typed<false, Float16>;
      default:
        return gated ? run_neurons_typed<true, float> : run_neurons_typed<false, float>;
    }
  }();
  run(weights, active, x, begin, end, sum, partial);
}

}  // namespace

const FfnKernels PRUNEPATH_KERNELS = {widen, dot_rows, combine_factors, run_neurons};

}  // namespace prunepath
